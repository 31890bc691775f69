"""What a finished run says, and `dp-lora export` called on it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_lora.__main__ import main

PLAN = {
    "sample_rate": 0.04, "num_examples": 1500, "steps": 4, "noise_multiplier": 0.8, "delta": 1e-5,
    "epsilon": 2.0, "adjacency": "one image contributes nothing instead, Poisson sampling", "complete": True,
    "reproducible_noise": False, "label_counts": [700, 800],
}  # fmt: skip
NOTE = "computed on private data; releasing it is not covered by epsilon"
RESULT: dict[str, Any] = {
    "metrics": {"accuracy_cnn": 0.8, "inception_score": 2.0}, "intervals": {"accuracy_cnn": [0.7, 0.9]},
    "private_metrics": ["accuracy_cnn", "audit.membership_inference"], "private_metrics_note": NOTE,
    "reference": {"split": "test", "n": 311}, "tested_on": {"split": "test", "n": 311}, "n_samples": 40,
    "seconds": {"finetune": 144.0, "sample": 3.1}, "peak_memory_bytes": 1_000_000_001, "batch_sizes": [3, 4],
    "audit": {"epsilon": 2.0, "membership_inference": {"loss": {"auc": 0.75}}},
}  # fmt: skip


def save_samples(directory: Path, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    (directory / "samples.npz").write_bytes(buffer.getvalue())


def export(run: Path, folder: Path, *flags: str) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["dp-lora", "export", str(run), str(folder), *flags])
        main()
    return folder


def refused(capsys: pytest.CaptureFixture[str], run: Path, folder: Path, *flags: str) -> str:
    """The one line with which the export ends; nothing is left behind."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        export(run, folder, *flags)
    assert ended.value.code == 2 and sorted(folder.parent.rglob("*")) == before
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("dp-lora export: ") and said.err.count("\n") == 1
    return said.err
