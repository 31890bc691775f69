"""Sets of patients: images with metadata.csv that says whose each of them is."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def patients(folder: Path, counts: Mapping[str, int], seed: int = 0, side: int = 8) -> Path:
    """As many images of each patient as `counts` says, of two classes, beside metadata.csv.

    The images of a patient do not depend on those of the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for patient, count in counts.items():
        rng = np.random.default_rng([seed, *patient.encode()])
        for number in range(count):
            name = f"{patient}_{number}.png"
            Image.fromarray(rng.integers(0, 256, (side, side), np.uint8)).save(folder / name)
            rows.append((name, ("benign", "malignant")[number % 2], patient))
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file_name", "label", "patient"))
        writer.writerows(rows)
    return folder
