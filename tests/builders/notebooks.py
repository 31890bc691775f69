"""The notebooks, run."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


def executed(name: str, monkeypatch: pytest.MonkeyPatch, **parameters: Path) -> str:
    """All output of a notebook that was run, as text; raises when a cell fails."""
    for variable, path in parameters.items():
        monkeypatch.setenv(variable, str(path))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"], "a warning is an error"
    return json.dumps(outputs)
