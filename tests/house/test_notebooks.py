"""The notebooks run from top to bottom on files of runs, hold no output, and define nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from sweeps.bill import bill
from sweeps.collect import collect, write_frame
from sweeps.folders import read
from tests.builders.notebooks import FOLDER, executed
from tests.builders.sweep_folder import grid, write_sweep

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_output_and_imports_what_it_uses(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not re.search(r"^\s*(def|class) |lambda", cell.source, re.MULTILINE)
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
        assert cell.metadata == {}
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}


def test_the_notebook_of_an_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sweep(tmp_path, "rank", grid(lora__rank=[4, 8], seed=[0, 1, 2]), ["done"] * 5 + ["failed"])
    rows = collect([read(folder)])
    write_frame(rows, tmp_path / "runs.csv")
    shown = executed("ablation", monkeypatch, DP_LORA_FRAME=tmp_path / "runs.csv")
    for expected in ("lora.rank", "image/png", "on the same images", "accuracy_cnn", "failed"):
        assert expected in shown
    # Without the directories the bill is the one that they give.
    private = bill([cell.directory for cell in read(folder).cells])
    assert json.dumps(private.sets[0].lines()[1])[1:-1] in shown
