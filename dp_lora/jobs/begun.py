"""The steps and releases that a run, or its copies together, have begun, by their private records."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_lora.storage.files import Damaged, read_json


def begun(folder: Path) -> int:
    """Number of executions that the write-ahead record in `folder` names."""
    from dp_lora.privacy.executions import Executions

    return Executions(folder / "executions.jsonl", {}, writes=False).count


def begun_by_all(folders: Sequence[Path]) -> int:
    """Number of executions that the records of several copies of one run name, each of them once.

    The lines that two records begin with alike are one history; all others are different executions.
    """
    records = [_lines(folder) for folder in folders]
    total = 0
    for number, (folder, lines) in enumerate(zip(folders, records, strict=True)):
        shared = max((_alike(lines, other) for other in records[:number]), default=0)
        total += begun(folder) - _begun_in(lines[:shared])
    return total


def _alike(lines: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Number of lines with which both begin."""
    return sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(lines, other, strict=False))
    )


def _begun_in(lines: Sequence[bytes]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "executions.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        return begun(Path(folder))


def _lines(folder: Path) -> list[bytes]:
    """The whole lines of the write-ahead record in `folder`."""
    path = folder / "executions.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def progress_of(folder: Path) -> int:
    """Bytes of the write-ahead record in `folder`, which is only ever added to."""
    path = folder / "executions.jsonl"
    return path.stat().st_size if path.exists() else 0


def stated_release(directory: Path) -> dict[str, Any] | None:
    """What privacy.json of the run in `directory` says about its releases; None if it says nothing."""
    path = directory / "privacy.json"
    found = read_json(path) if path.exists() else None
    release = found.get("release") if isinstance(found, dict) else None
    return release if isinstance(release, dict) else None


def releases_of(folder: Path) -> list[dict[str, Any]]:
    """The releases on held-out images that were made in the run of the private `folder`, in their order."""
    path = folder / "releases.json"
    found = read_json(path) if path.exists() else []
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and {"inputs", "noise_multiplier"} <= one.keys() for one in found
    ):
        raise Damaged(f"{path}: no list of releases; expected what this program wrote there")
    return found
