"""Tables and estimates from run directories, with what failed and what is missing among the rows."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, composed
from omegaconf import OmegaConf

from dp_lora.files import write_json
from sweeps import plan, report
from sweeps.collect import collect, row

SPENT = {
    "epsilon": 9.9, "delta": 1e-5, "noise_multiplier": 0.5, "noise_multiplicity": 2, "steps": 4,
    "expected_batch_size": 60, "accountant": "prv", "adjacency": "add or remove one image",
}  # fmt: skip
RESULT = {
    "metrics": {"accuracy_cnn": 0.9, "accuracy_cnn_before": 0.1, "fd_lite0": 12.5}, "n_samples": 40,
    "seed": 0, "reference": "test", "device": "cpu", "seconds": {"finetune": 3.0, "sample": 1.0},
}  # fmt: skip


def run(directory: Path, state: str | None, **files: Any) -> Path:
    directory.mkdir(parents=True)
    if state:
        write_json(directory / "status.json", {"state": state, **files.pop("status", {})})
    for name, content in files.items():
        write_json(directory / f"{name}.json", content)
    return directory


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    runs = tmp_path / "default"
    directories = [
        run(runs / "a-1", "done", privacy=SPENT, result=RESULT),
        run(runs / "b-2", "failed", status={"error": "RuntimeError"}, privacy=SPENT),
        run(runs / "c-3", "running", privacy={**SPENT, "epsilon": "inf"}),
        runs / "d-4",
        runs / "e-5",
    ]
    folder = tmp_path / "sweeps" / "mine"
    (folder / "cells").mkdir(parents=True)
    cells = [
        {
            "number": n,
            "identity": path.name[-1],
            "words": ["model=tiny8", f"seed={n}"],
            "directory": str(path),
        }
        for n, path in enumerate(directories)
    ]
    write_json(folder / "sweep.json", {"command": "dp-lora -m seed=0,1,2,3,4", "cells": cells})
    (folder / "cells" / "5.failed").write_text("data.source=/secret/name: no such folder\n")
    return folder


def test_every_cell_is_a_row_whatever_became_of_it(sweep: Path) -> None:
    rows = collect(sweep)
    assert [r["cell"] for r in rows] == [f"seed={n}" for n in range(5)]
    assert [r["state"] for r in rows] == ["done", "failed", "running", "missing", "failed"]
    assert rows[0]["accuracy_cnn"] == 0.9 and rows[0]["seconds"] == 4.0 and rows[0]["epsilon"] == 9.9
    assert rows[1]["error"] == "RuntimeError" and rows[1]["seconds"] is None
    assert rows[2]["epsilon"] == math.inf
    assert [r["state"] for r in collect(sweep, ended=True)] == [
        "done", "failed", "failed", "missing", "failed"
    ]  # fmt: skip
    assert rows[3] | row(Path("/nowhere")) == rows[3] | {"directory": "/nowhere"}


def test_a_table_says_what_its_numbers_are(sweep: Path) -> None:
    text = report.write(sweep)
    assert (sweep / "report.md").read_text() == text
    lines = text.splitlines()
    assert lines[0].startswith("| cell | state | epsilon | delta |") and "accuracy_cnn_before" not in lines[0]
    assert len([line for line in lines if line.startswith("| seed=")]) == 5
    for word in ("n_samples", "seed", "epsilon by prv, add or remove one image", "dp-lora -m seed=0,1,2,3,4"):
        assert word in text
    assert "secret" not in text
    rows = list(csv.DictReader(io.StringIO((sweep / "report.csv").read_text())))
    assert [r["state"] for r in rows] == ["done", "failed", "failed", "missing", "failed"]
    assert rows[0]["accuracy_cnn_before"] == "0.1"


def test_hours_come_from_runs_of_the_same_kind(tmp_path: Path) -> None:
    config = composed(*TINY, "train.max_steps=40", "noise_multiplicity=k4")
    assert plan.hours(config, plan.rates(tmp_path)) is None
    finished = run(tmp_path / "a-1", "done", privacy=SPENT, result=RESULT)
    assert plan.rates(tmp_path) == [], "a run without its configuration tells nothing"
    (finished / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    # 3 s for 4 x 60 x 2 draws, and 1 s for the rest.
    expected = 3 / (4 * 60 * 2) * (40 * 60 * 4) + 1
    assert plan.hours(config, plan.rates(tmp_path)) == pytest.approx(expected / 3600)
    other = composed(*TINY, "resources=gpu1")
    assert plan.hours(other, plan.rates(tmp_path)) is None
    assert plan.hours(composed(*TINY, "train.epochs=2"), plan.rates(tmp_path)) is None
