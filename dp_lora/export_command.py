"""The command `dp-lora export` (= `dp-lora-export`): copies what may leave a finished run, and nothing else.

`dp_lora.manifest` says what that is and why. The folder appears whole or not at all, it names neither folders
nor people of this machine, and all its files have one date.
"""

from __future__ import annotations

import argparse
import io
import os
import secrets
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dp_lora import manifest
from dp_lora.config import Config, from_omegaconf
from dp_lora.errors import UserError
from dp_lora.files import file_lock, json_ready, read_json, read_lines, write_atomic, write_json, write_lines

DATE = 315532800
"""1 January 1980, the earliest that a zip file knows: the time of modification of all that is exported."""

_SHORTEST = 5
"""Characters of a path below which finding it in a file says nothing."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


@dataclass(frozen=True)
class _Run:
    """The records of a finished run."""

    directory: Path
    config: Config
    privacy: Mapping[str, Any]
    covered: bool
    """Whether a guarantee covers the training, or its images are public."""


def main(words: Sequence[str] | None = None) -> None:
    """Exports one run. A user's mistake is one line and exit status 2."""
    parser = _Parser(
        prog="dp-lora export",
        description="Copies what may leave a finished run into a new folder, and nothing else.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or an empty folder")
    parser.add_argument(
        "--with-uncovered",
        action="store_true",
        help="also what no epsilon covers, marked: metrics on private images, and runs without a guarantee",
    )
    try:
        given = parser.parse_args(words)
        folder = export(
            given.run.expanduser(), given.folder.expanduser(), with_uncovered=given.with_uncovered
        )
    except UserError as error:
        print(f"dp-lora export: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"dp-lora export: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dp-lora export: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(path)


def export(directory: Path, folder: Path, *, with_uncovered: bool = False) -> Path:
    """Copies what `manifest` lets through of the finished run in `directory`, and returns `folder`.

    Args:
        directory: the run directory; nothing in it changes.
        folder: absent or empty.
        with_uncovered: also what no epsilon covers, marked as that.

    Raises UserError, and leaves no file behind, when the run is not finished, has no guarantee, or holds
    something that may not leave where nothing of the kind is expected.
    """
    _check_folder(directory, folder)
    run = _finished(directory)
    if not run.covered and not with_uncovered:
        raise UserError(
            f"{directory}: this run has no privacy guarantee, so nothing of it is covered by epsilon; "
            "expected a run with one, or --with-uncovered"
        )
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        with _still(directory):
            partial.mkdir()
            _write(run, partial, with_uncovered=with_uncovered)
        _check_names(run, partial)
        _date(partial)
        _put(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _check_folder(directory: Path, folder: Path) -> None:
    if folder.resolve().is_relative_to(directory.resolve()):
        raise UserError(f"{folder}: lies in the run directory, which is private; expected another place")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not empty; expected a new or an empty folder")


def _finished(directory: Path) -> _Run:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from dp_lora.card import no_guarantee

    for name in ("config.yaml", "status.json", "privacy.json", "adapter"):
        if not (directory / name).exists():
            raise UserError(
                f"{directory}: no {name} in it; expected the run directory of a finished dp-lora job"
            )
    try:
        state = read_json(directory / "status.json")["state"]
        privacy = read_json(directory / "privacy.json")
        config = from_omegaconf(OmegaConf.load(directory / "config.yaml"))  # type: ignore[arg-type]
        complete = bool(privacy["complete"])
        nothing = no_guarantee(privacy, reproducible_noise=bool(privacy["reproducible_noise"]))
    except (ValueError, KeyError, TypeError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{directory}: its records cannot be read ({reason})") from error
    if state != "done" or not complete:
        raise UserError(
            f"{directory}: the run is {state}; expected a finished one: give its command again first"
        )
    return _Run(directory, config, privacy, covered=config.data.public or nothing is None)


@contextmanager
def _still(directory: Path) -> Iterator[None]:
    """While no job is at work on the run."""

    def refuse() -> None:
        raise UserError(f"{directory}: another process is at work on this run; wait for it or stop it")

    lock = directory / "checkpoint" / "lock"
    if not lock.exists():  # a copy of a run without its private folder
        yield
        return
    with file_lock(lock, waiting=refuse):
        yield


def _write(run: _Run, folder: Path, *, with_uncovered: bool) -> None:
    """Writes every file of `manifest.FILES` that the run has."""
    from omegaconf import OmegaConf

    source = run.directory
    _copy_adapter(source / "adapter", folder / "adapter")
    for name in ("samples.npz", "samples.png"):
        if (source / name).exists():
            _copy_file(source / name, folder / name)
    write_json(folder / "privacy.json", manifest.privacy(run.privacy))
    rows = [manifest.row(row) for row in read_lines(source / "metrics.jsonl")]
    write_lines(folder / "metrics.jsonl", rows)
    if (source / "result.json").exists():
        shown = manifest.result(read_json(source / "result.json"), with_uncovered=with_uncovered)
        write_json(folder / "result.json", shown)
    settings = OmegaConf.create(json_ready(manifest.exported_settings(run.config)))
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(settings))
    if (source / "provenance.json").exists():
        write_json(folder / "provenance.json", manifest.provenance(read_json(source / "provenance.json")))
    assert {path.name for path in folder.iterdir()} <= manifest.FILES.keys()


def _copy_adapter(source: Path, folder: Path) -> None:
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.name not in manifest.ADAPTER or not path.is_file():
            raise UserError(
                f"{path}: does not belong to an adapter; expected only {', '.join(sorted(manifest.ADAPTER))}"
            )
        _copy_file(path, folder / path.name)


def _copy_file(source: Path, copy: Path) -> None:
    if source.is_symlink():
        raise UserError(f"{source}: is a link; expected the file that the job wrote")
    content = source.read_bytes()
    if source.suffix == ".npz":
        names = {name.removesuffix(".npy") for name in zipfile.ZipFile(io.BytesIO(content)).namelist()}
        if names != manifest.SAMPLES:
            raise UserError(f"{source}: holds {', '.join(sorted(names))}; expected images, labels, classes")
    write_atomic(copy, content)


def _check_names(run: _Run, folder: Path) -> None:
    """Refuses an export in which a folder of this machine is named.

    Cards of earlier versions hold the path of the pre-trained model.
    """
    for path in _files(folder):
        content = path.read_bytes()
        for field, name in _private_paths(run):
            if name.encode() in content:
                raise UserError(
                    f"{run.directory / path.relative_to(folder)}: names {field}, which may not leave; "
                    "expected what a run of this version writes, where no folder is named"
                )


def _private_paths(run: _Run) -> Iterator[tuple[str, str]]:
    """Folders that no exported file may name, with what they are."""
    config = run.config
    given = {
        "data.source": config.data.source,
        "public_data.source": config.public_data.source,
        "model.pretrained": config.model.pretrained,
        "paths.outputs": config.paths.outputs,
        "paths.cache": config.paths.cache,
        "paths.data": config.paths.data,
        "the run directory": str(run.directory),
        "the home directory": "~",
    }
    for field, value in given.items():
        # The name of a pipeline on the hub has a slash, and stands in the card.
        on_the_hub = field == "model.pretrained" and not Path(value or "").expanduser().exists()
        if value is None or on_the_hub:
            continue
        resolved = str(Path(value).expanduser().absolute())
        for name in {value, resolved}:
            if os.sep in name and len(name) >= _SHORTEST:
                yield field, name


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _date(folder: Path) -> None:
    """Gives all of the folder the same date: when files were written says how long the training took."""
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (DATE, DATE))


def _put(partial: Path, folder: Path) -> None:
    """Gives the finished folder its name. An empty folder of that name is replaced in the same moment."""
    try:
        partial.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; expected a new or an empty folder") from error


if __name__ == "__main__":
    main()
