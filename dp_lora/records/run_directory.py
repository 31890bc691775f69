"""Whether what a run directory holds is whole, and what is done where it is not.

One policy for damaged files. What comes of released values alone, the samples, the result and the status, is
made again at no cost in privacy, and the job says so. Everything else is refused with one line before
anything is written or charged: the adapter, which may have been given to somebody, what was spent, what a
training goes on from, and a result that a budget of its own has paid for.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

from dp_lora.errors import UserError
from dp_lora.storage.files import Damaged, private_directory, read_json, read_lines, write_json

OUTPUTS = {"finetune": "adapter", "sample": "samples.npz", "evaluate": "result.json"}
"""The output of a stage in the run directory, whole or not at all; if it is there, the stage is skipped."""

_OBJECTS = (
    "privacy.json",
    "provenance.json",
    "checkpoint/plan.json",
    "checkpoint/charge.json",
    "checkpoint/adapter.json",
)
"""Files with one JSON object that are not made again."""

_STATED = {"epsilon", "delta", "noise_multiplier", "sample_rate", "steps", "reproducible_noise"}
"""Fields without which privacy.json states nothing."""

WAY_OUT = "put it back, or remove the run directory to start again, and count what was spent"
"""From a file that is missing or damaged and that is not made again."""

ADAPTER_RECORD = "adapter.json"
"""In the private `checkpoint/`: the SHA-256 of each file of the adapter that is loaded again, by its name."""

_LOADED = (".safetensors", ".json")

_SAMPLES = {"images.npy", "labels.npy", "classes.npy"}


def keep_adapter(folder: Path, checkpoint: Path) -> None:
    """Notes in the private `checkpoint` what the adapter in `folder` consists of, before it is made known.

    From then on the adapter is whole only with all of these files as they were written; the card beside them
    belongs to its readers.
    """
    digests = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.suffix in _LOADED}
    write_json(private_directory(checkpoint) / ADAPTER_RECORD, digests, mode=0o600)


def is_whole(directory: Path, stage: str) -> bool:
    """Whether the output of the stage is there and can be read. Raises UserError for a damaged adapter."""
    path = directory / OUTPUTS[stage]
    if not path.exists():
        return False
    if stage == "finetune":
        _check_adapter(path)
        return True
    if stage == "sample":
        return is_whole_archive(path)
    return bool(result(directory))


def state(directory: Path) -> str | None:
    """running, done or failed, as status.json says; None where it says nothing that can be read."""
    said = _object(directory / "status.json").get("state")
    return said if isinstance(said, str) else None


def result(directory: Path) -> dict[str, Any]:
    """The content of result.json; empty where there is none that can be read."""
    found = _object(directory / "result.json")
    return found if isinstance(found.get("metrics", {}), dict) else {}


def check_records(directory: Path) -> None:
    """Raises UserError for the first file of a run that is damaged and not made again."""
    try:
        for name in _OBJECTS:
            path = directory / name
            if path.exists() and not isinstance(read_json(path), dict):
                raise Damaged(f"{path}: expected a JSON object as this program writes it")
        privacy = directory / "privacy.json"
        if privacy.exists() and (missing := sorted(_STATED - read_json(privacy).keys())):
            raise Damaged(f"{privacy}: says nothing of {missing[0]}; expected the statement of a training")
        read_lines(directory / "metrics.jsonl")
    except Damaged as error:
        raise Damaged(f"{error}: {WAY_OUT}") from error
    images = directory / "checkpoint" / "content.json"
    if _object(directory / "checkpoint" / "plan.json").get("content") and not images.exists():
        raise UserError(
            f"{images}: is missing; expected the record of the images that the run began with: {WAY_OUT}"
        )
    if (directory / OUTPUTS["finetune"]).exists():
        _check_adapter(directory / OUTPUTS["finetune"])


def _object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that is made again; empty where there is none that can be read."""
    try:
        found = read_json(path)
    except (Damaged, FileNotFoundError, NotADirectoryError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_adapter(folder: Path) -> None:
    """Raises UserError unless the folder holds weights, and weights and descriptions are whole."""
    reason = _broken(folder)
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


def _broken(folder: Path) -> str | None:
    """Says what is wrong with an adapter, by itself and by the record of its run; None if nothing is.

    Earlier versions kept no record: of their adapters, a description without its weights is found.
    """
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not weights:
        return "it holds no weights"
    for path in weights:
        if not path.is_file() or not _is_whole_safetensors(path):
            return f"{path.name} is damaged"
    described = folder / "adapter_config.json"
    if (folder / "adapter_model.safetensors").exists() and not _object(described):
        return "adapter_config.json is missing or damaged"
    if described.exists() and not (folder / "adapter_model.safetensors").exists():
        return "adapter_model.safetensors is missing"
    for name, digest in _object(folder.parent / "checkpoint" / ADAPTER_RECORD).items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is not the file that the training left"
    return None


def is_whole_archive(path: Path) -> bool:
    """Whether this is a zip file with the samples, each with the checksum that it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist()) >= _SAMPLES and archive.testzip() is None
    # What a changed byte makes of the format: no zip, no deflate, an unknown method, a password asked for.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
