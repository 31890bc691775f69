"""Run directories as plain rows, with what is missing and what failed among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dp_lora.files import read_json

PRIVACY = ("epsilon", "delta", "noise_multiplier", "noise_multiplicity", "steps", "accountant", "adjacency")
"""What a row takes from privacy.json."""


def collect(folder: Path, *, ended: bool = False) -> list[dict[str, Any]]:
    """One row for each cell of the sweep in `folder`, in its order, whatever became of the cell.

    Keys as of `row`, and `cell`: what was asked of this cell and differs between cells.

    Args:
        folder: of the sweep.
        ended: no job of the sweep is left, so one that says that it runs was killed.
    """
    cells = read_json(folder / "sweep.json")["cells"]
    common = set.intersection(*(set(cell["words"]) for cell in cells)) if len(cells) > 1 else set()
    rows = []
    for cell in cells:
        asked = " ".join(word for word in cell["words"] if word not in common)
        found = row(Path(cell["directory"]))
        failure = folder / "cells" / f"{cell['identity']}.failed"
        if found["state"] != "done" and failure.exists():
            found |= {"state": "failed", "error": found["error"] or "see its log"}
        if found["state"] == "running" and ended:
            found |= {"state": "failed", "error": "it was killed, or ran out of memory or time"}
        rows.append({"cell": asked.replace("'", "") or "defaults", **found})
    return rows


def row(directory: Path) -> dict[str, Any]:
    """What a run directory says of its run.

    `state` is done, failed, running or missing; `error` the line of a failed one; `directory`; of
    privacy.json the names in `PRIVACY`; of result.json every metric by its name, `n_samples`, `seed`,
    `reference`, `device`, and `seconds` of all stages together. What is not there is None.
    """
    status = _read(directory / "status.json")
    privacy, result = _read(directory / "privacy.json"), _read(directory / "result.json")
    seconds = result.get("seconds")
    return {
        "state": status.get("state", "missing"),
        "error": status.get("error"),
        "directory": str(directory),
        **{name: _number(privacy.get(name)) for name in PRIVACY},
        **result.get("metrics", {}),
        **{name: result.get(name) for name in ("n_samples", "seed", "reference", "device")},
        "seconds": round(sum(seconds.values()), 1) if isinstance(seconds, Mapping) else None,
    }


def configuration(directory: Path) -> dict[str, Any]:
    """The resolved configuration of a run; empty when it has none yet."""
    path = directory / "config.yaml"
    values = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def runs(folders: Iterable[Path]) -> list[Path]:
    """The run directories in these folders of experiments."""
    return sorted(path.parent for folder in folders for path in folder.glob("*/status.json"))


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = read_json(path) if path.exists() else {}
    return record


def _number(value: Any) -> Any:
    """Infinity, which JSON holds as a word, as the number it is."""
    return float(value) if value in ("inf", "-inf", "nan") else value
