"""Whether what a run directory holds is whole, and what is done where it is not.

One policy for damaged files. What comes of released values alone, the samples, the result and the status, is
made again at no cost in privacy, and the job says so. Everything else is refused with one line before
anything is written or charged: the adapter, which may have been given to somebody, what was spent, what a
training goes on from, and a result that a budget of its own has paid for.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from dp_lora.errors import UserError
from dp_lora.files import Damaged, read_json, read_lines

OUTPUTS = {"finetune": "adapter", "sample": "samples.npz", "evaluate": "result.json"}
"""What a stage leaves in the run directory, whole or not at all; where it is, the stage is skipped."""

_OBJECTS = ("privacy.json", "provenance.json", "checkpoint/plan.json", "checkpoint/charge.json")
"""Files with one JSON object that are not made again."""

_SAMPLES = {"images.npy", "labels.npy", "classes.npy"}


def is_whole(directory: Path, stage: str) -> bool:
    """Whether the output of the stage is there and can be read. Raises UserError for a damaged adapter."""
    path = directory / OUTPUTS[stage]
    if not path.exists():
        return False
    if stage == "finetune":
        _check_adapter(path)
        return True
    if stage == "sample":
        try:
            with zipfile.ZipFile(path) as archive:
                return set(archive.namelist()) >= _SAMPLES
        except (zipfile.BadZipFile, OSError):
            return False
    return bool(_object(path))


def state(directory: Path) -> str | None:
    """running, done or failed, as status.json says; None where it says nothing that can be read."""
    said = _object(directory / "status.json").get("state")
    return said if isinstance(said, str) else None


def result(directory: Path) -> dict[str, Any]:
    """The content of result.json; empty where there is none that can be read."""
    return _object(directory / "result.json")


def check_records(directory: Path) -> None:
    """Raises UserError for the first file of a run that is damaged and not made again."""
    for name in _OBJECTS:
        path = directory / name
        if path.exists() and not isinstance(read_json(path), dict):
            raise Damaged(f"{path}: expected a JSON object as this program writes it")
    read_lines(directory / "metrics.jsonl")
    if (directory / OUTPUTS["finetune"]).exists():
        _check_adapter(directory / OUTPUTS["finetune"])


def _object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that is made again; empty where there is none that can be read."""
    try:
        found = read_json(path)
    except (Damaged, FileNotFoundError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_adapter(folder: Path) -> None:
    """Raises UserError unless the folder holds weights, and weights and descriptions are whole."""
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    reason = None if weights else "it holds no weights"
    for path in weights:
        if not _is_whole_safetensors(path):
            reason = f"{path.name} is damaged"
    if (folder / "adapter_model.safetensors").exists() and not _object(folder / "adapter_config.json"):
        reason = "adapter_config.json is missing or damaged"
    if reason is not None:
        again = (folder.parent / "checkpoint" / "state.pt").exists()
        way_out = (
            "remove the folder, and the same command writes it again from checkpoint/ at no further epsilon"
            if again
            else "remove the run directory to start again, and count what was spent"
        )
        raise UserError(
            f"{folder}: {reason}; expected the files that the training left: put them back, or {way_out}"
        )


def _is_whole_safetensors(path: Path) -> bool:
    """Whether this is a file, as long as its header says."""
    if not path.is_file():
        return False
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
    return bool(ends) and size == 8 + length + max(ends)
