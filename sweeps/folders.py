"""The folders of sweeps: which there are, their cells, and what became of each."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dp_lora.config.identity import is_private
from dp_lora.errors import UserError

DEFAULT = Path("outputs") / "sweeps"
"""Where sweeps are looked for when no folder is named."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, whatever became of it."""

    identity: str
    """The run's fingerprint."""
    words: tuple[str, ...]
    """The words that asked for it; empty for a run that no sweep asked for."""
    directory: Path
    """The directory of the run; it may not exist yet."""


@dataclass(frozen=True)
class Sweep:
    """A sweep that a launcher began, or a folder of runs that were started one by one."""

    folder: Path
    cells: tuple[Cell, ...]
    command: str | None = None
    """The command that begins it and builds it again; None for a folder of runs."""
    code: str | None = None
    """Version of the code that it was begun with."""

    @property
    def launched(self) -> bool:
        """Whether a launcher began it."""
        return self.command is not None

    @functools.cached_property
    def _common(self) -> set[str]:
        words = [set(cell.words) for cell in self.cells]
        return set.intersection(*words) if len(words) > 1 else set()

    def asked(self, cell: Cell) -> tuple[str, ...]:
        """The words of a cell that are not those of all cells.

        Reports are shown to others, so the values of private settings are numbered, and places are left out.
        """
        own = [word.replace("'", "") for word in cell.words if word not in self._common]
        return tuple(self._shown(word) for word in own if not word.startswith("paths."))

    def _shown(self, word: str) -> str:
        if not is_private(word):
            return word
        name = word.partition("=")[0]
        each = sorted(
            {w.replace("'", "") for cell in self.cells for w in cell.words if w.startswith(f"{name}=")}
        )
        return f"{name}=#{each.index(word) + 1}"

    def failure(self, cell: Cell) -> Path:
        """The file with the line that the cell's last start ended with; its text is for the owner only."""
        return self.folder / "cells" / f"{cell.identity}.failed"


def find(folders: Sequence[Path]) -> list[Sweep]:
    """The sweeps in `folders`, or in `outputs/sweeps` when there are none, by their names.

    A folder is that of a sweep, one with sweeps in it, one of runs (`outputs/<experiment>`), or a run's.

    Raises UserError for a folder that is none of these, and as `read` does.
    """
    found = [sweep for folder in folders or [DEFAULT] for sweep in _in(folder)]
    return list({sweep.folder.resolve(): sweep for sweep in found}.values())


def _in(folder: Path) -> list[Sweep]:
    if (folder / "sweep.json").exists():
        return [read(folder)]
    inside = sorted(path.parent for path in folder.glob("*/sweep.json"))
    if inside:
        return [read(path) for path in inside]
    runs = sorted(path for path in folder.iterdir() if is_run(path)) if folder.is_dir() else []
    if not runs and is_run(folder):
        runs = [folder.absolute()]
    if runs:
        return [Sweep(folder, tuple(Cell(identity(run), (), run) for run in runs))]
    raise UserError(
        f"{folder}: no sweep and no run is in it; expected outputs/sweeps/<name>, or a folder of runs such "
        "as outputs/default"
    )


def read(folder: Path) -> Sweep:
    """The sweep in `folder`, its cells in their order.

    Runs that lie elsewhere than where they ran are found beside the sweep, as `outputs` has them.

    Raises UserError when sweep.json is not what a launcher writes, when a directory is not that of its cell,
    and when two directories claim one cell.
    """
    path = folder / "sweep.json"
    if (folder.parent / "draws.json").exists():
        raise UserError(
            f"{folder}: holds the trials of a private search, which are private and in no table or bill; "
            "expected released/ beside private/"
        )
    record = read_record(path)
    try:
        rows = [(row["identity"], tuple(row["words"]), Path(row["directory"])) for row in record["cells"]]
        command, code = str(record["command"]), str(record["code"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not the record of a sweep; expected command, code and cells") from None
    cells = []
    listed: dict[Path, list[str]] = {}
    for name, words, directory in rows:
        here = _moved(folder, directory)
        if identity(here) != name:
            raise UserError(f"{path}: {here.name} is not the directory of cell {name}")
        if here.parent not in listed:
            listed[here.parent] = _names(here.parent)
        claims = [other for other in listed[here.parent] if other.endswith(f"-{name}")]
        if len(claims) > 1:
            raise UserError(
                f"{here.parent}: {' and '.join(sorted(claims))} both claim cell {name} of {folder.name}; "
                "expected one: move the other away"
            )
        cells.append(Cell(name, words, here.parent / claims[0] if claims else here))
    return Sweep(folder, tuple(cells), command, code)


def _moved(folder: Path, directory: Path) -> Path:
    """The run directory, or the one that lies as it did beside the sweep's folder."""
    beside = folder.absolute().parent.parent / directory.parent.name / directory.name
    return seen_from_here(beside if not directory.exists() and beside.exists() else directory)


def seen_from_here(path: Path) -> Path:
    """The path without the working directory, if it is in there: what is shown names no home."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def is_run(directory: Path) -> bool:
    """Whether a job has begun in this directory."""
    return (directory / "status.json").exists() or (directory / "config.yaml").exists()


def identity(directory: Path) -> str:
    """The fingerprint in the name of a run directory."""
    return directory.name.rpartition("-")[2]


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object of a file. Raises UserError when it is none: half-written, or of something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: no JSON ({error}); expected a file that dp-lora wrote") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record


def read_settings(directory: Path) -> dict[str, Any]:
    """The config.yaml of a run as plain values, to be read only; empty when there is none yet.

    Raises UserError for a damaged one.
    """
    path = directory / "config.yaml"
    if not path.exists():
        return {}
    state = path.stat()
    return _parsed(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=10_000)
def _parsed(path: Path, changed: int, size: int) -> dict[str, Any]:
    """The settings of a file of this state: a command reads each several times."""
    # Not OmegaConf, which takes ten times as long, and a sweep has hundreds of these.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), loader)
    except yaml.YAMLError as error:
        raise UserError(
            f"{path}: no YAML ({' '.join(str(error).split())}); expected a run's settings"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a run's settings by name, found {type(values).__name__}")
    return values


def directories(sweeps: Iterable[Sweep]) -> list[Path]:
    """The run directories of these sweeps, each once."""
    return list(dict.fromkeys(cell.directory for sweep in sweeps for cell in sweep.cells))


def runs(folders: Iterable[Path]) -> list[Path]:
    """The run directories in these folders of experiments."""
    return sorted(path.parent for folder in folders for path in folder.glob("*/status.json"))
