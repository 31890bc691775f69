"""The command `dp-lora export` (= `dp-lora-export`): copies what may leave a finished run, and nothing else.

`dp_lora.records.manifest` says what that is and why. The folder appears whole or not at all, it names neither
folders nor people of this machine, and all its files have one date. Until it is complete and checked, only
its owner can enter it, under another name. The next export to the same folder removes what a kill left.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import signal
import struct
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_lora.commands.parser import Parser, ending
from dp_lora.commands.words import folder_word
from dp_lora.config.load import read_config
from dp_lora.config.schema import ADJACENCIES, Config
from dp_lora.errors import UserError
from dp_lora.records import manifest
from dp_lora.records.run_directory import is_whole
from dp_lora.storage.files import (
    file_lock,
    json_ready,
    read_json,
    read_lines,
    write_atomic,
    write_json,
    write_lines,
)

DATE = 315532800
"""1 January 1980, the earliest that a zip file knows: the time of modification of all that is exported."""

_PIXELS = frozenset({"IHDR", "PLTE", "tRNS", "IDAT", "IEND"})
"""The chunks of a PNG file that make the picture; all others hold words, times or settings."""

_SHORTEST = 5
"""Characters of a path below which finding it in a file says nothing."""


class _Stopped(BaseException):
    """The command was told to end by a signal."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class _Run:
    """The records of a finished run."""

    directory: Path
    config: Config
    privacy: Mapping[str, Any]
    """privacy.json, with the relation of neighbours that holds."""
    restated: bool
    """Whether the run, of an earlier version, calls its relation by another name."""
    covered: bool
    """Whether a guarantee covers the training, or its images are public."""


def main(words: Sequence[str] | None = None) -> None:
    """Exports one run. A user's mistake is one line and exit status 2."""
    parser = Parser(
        prog="dp-lora export",
        description="Copies what may leave a finished run into a new folder, and nothing else.",
    )
    parser.add_argument("run", type=folder_word, metavar="RUN", help="a run directory")
    parser.add_argument("folder", type=folder_word, metavar="FOLDER", help="a new or an empty folder")
    parser.add_argument(
        "--with-uncovered",
        action="store_true",
        help="also what no epsilon covers, marked: metrics on private images, and runs without a guarantee",
    )
    with ending("dp-lora export", interrupted="nothing was written"):
        try:
            given = parser.parse_args(words)
            with _signals():
                folder = export(given.run, given.folder, with_uncovered=given.with_uncovered)
        except OSError as error:
            raise UserError(f"{error.filename or 'writing'}: {error.strerror}") from error
        except _Stopped as stopped:
            print("dp-lora export: was told to stop; nothing was written", file=sys.stderr)
            sys.exit(128 + stopped.number)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(path)


@contextmanager
def _signals() -> Iterator[None]:
    """While this holds, a signal to end is an exception, so that what is half done is removed."""

    def stop(number: int, frame: object) -> None:
        raise _Stopped(number)

    # What its caller ignores, as under nohup, stays ignored.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


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
    with _partial(folder) as partial:
        with _still(directory):
            _write(run, partial, with_uncovered=with_uncovered)
        _check_names(run, partial)
        partial.chmod(0o777 & ~_umask())
        _date(partial)
        _put(partial, folder)
    return folder


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, its owner's alone; it is gone at the end unless it was given its name.

    Those that earlier exports to `folder` left when they were killed are removed. The lock on each, which
    the system frees when its holder dies, tells them from one that is being written.
    """
    name = hashlib.sha256(folder.name.encode()).hexdigest()[:8]
    beside = folder.absolute().parent
    for stale in beside.glob(f".dp-lora-export.{name}.*.partial"):
        with _locked(stale) as is_free:
            if is_free:
                shutil.rmtree(stale, ignore_errors=True)
    partial = beside / f".dp-lora-export.{name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(mode=0o700)
        with _locked(partial):
            yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of the folder; gives whether it was free."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The umask of this process; to read it is to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _check_folder(directory: Path, folder: Path) -> None:
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link; expected a new or an empty folder")
    if folder.resolve().is_relative_to(directory.resolve()):
        raise UserError(f"{folder}: lies in the run directory, which is private; expected another place")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not empty; expected a new or an empty folder")


def _finished(directory: Path) -> _Run:
    from dp_lora.records.card import no_guarantee

    for name in ("config.yaml", "status.json", "privacy.json", "adapter"):
        if not (directory / name).exists():
            raise UserError(
                f"{directory}: no {name} in it; expected the run directory of a finished dp-lora job"
            )
    config = read_config(directory / "config.yaml")
    try:
        state = _record(directory / "status.json")["state"]
        privacy = _record(directory / "privacy.json")
        complete = privacy["complete"] is True
        nothing = no_guarantee(privacy, reproducible_noise=privacy["reproducible_noise"] is not False)
        restated = config.privacy.adjacency == "zero_out" and privacy["adjacency"].startswith("add or remove")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{directory}: its records cannot be read ({reason})") from error
    if state != "done" or not complete:
        raise UserError(
            f"{directory}: the run is {state if complete else 'not complete'}; expected a finished one: give "
            "its command again first"
        )
    if restated:
        privacy = {**privacy, "adjacency": ADJACENCIES["zero_out"].format(unit="image")}
    public = config.data.public and not privacy.get("unprotected_start")
    is_covered = public or nothing is None
    return _Run(directory, config, privacy, restated=restated, covered=is_covered)


def _record(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises UserError when it holds something else."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path}: expected a JSON object as the job wrote it, found {type(record).__name__}")
    return record


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
    _copy_adapter(run, folder / "adapter")
    for name in ("samples.npz", "samples.png"):
        if (source / name).exists() or (source / name).is_symlink():
            _copy_file(source / name, folder / name)
    if (source / "images").exists():
        from dp_lora.jobs.drawing import write_images
        from dp_lora.models.sample import load

        write_images(load(folder), folder)  # of the samples that were copied, not of what lies there
    with _named(source / "privacy.json"):
        write_json(folder / "privacy.json", manifest.privacy(run.privacy))
    rows = read_lines(source / "metrics.jsonl")
    _check_steps(run, rows)
    with _named(source / "metrics.jsonl"):
        write_lines(
            folder / "metrics.jsonl",
            [manifest.row(row, private_loss=run.config.tracking.private_loss) for row in rows],
        )
    if (source / "result.json").exists():
        result = _record(source / "result.json")
        with _named(source / "result.json"):
            shown = manifest.result(
                result,
                public=run.config.data.public,
                released=manifest.is_released(run.privacy),
                with_uncovered=with_uncovered,
            )
        write_json(folder / "result.json", shown)
    settings = OmegaConf.create(_settings(run))
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(settings))
    if (source / "provenance.json").exists():
        record = _record(source / "provenance.json")
        with _named(source / "provenance.json"):
            write_json(folder / "provenance.json", manifest.provenance(record))
    assert {path.name for path in folder.iterdir()} <= manifest.FILES.keys()


def _check_steps(run: _Run, rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuses a run that has logged, and so released, a later step than its privacy.json counts."""
    for row in rows:
        step, counted = row.get("step"), run.privacy.get("steps")
        if row.get("stage") != "finetune" or not isinstance(step, int) or not isinstance(counted, int):
            continue
        if step > counted:
            raise UserError(
                f"{run.directory / 'metrics.jsonl'}: names step {step} of the training, and privacy.json "
                f"states {counted}: more was released than is stated; expected what the job wrote"
            )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the name of the file before what is wrong with one of its values."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}, so this is not what the job wrote") from error


def _copy_adapter(run: _Run, folder: Path) -> None:
    from dp_lora.records.card import with_public_number

    source = run.directory / "adapter"
    if source.is_symlink():
        raise UserError(f"{source}: is a link; expected the folder that the job wrote")
    is_whole(run.directory, "finetune")
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.name not in manifest.ADAPTER or not path.is_file():
            raise UserError(
                f"{path}: does not belong to an adapter; expected only {', '.join(sorted(manifest.ADAPTER))}"
            )
        _copy_file(path, folder / path.name)
    card = folder / "README.md"
    if run.restated and card.exists():
        write_atomic(card, with_public_number(card.read_text(encoding="utf-8"), run.privacy))


def _copy_file(source: Path, copy: Path) -> None:
    if source.is_symlink() or not source.is_file():
        what = "a link" if source.is_symlink() else "no file"
        raise UserError(f"{source}: is {what}; expected the file that the job wrote")
    content = source.read_bytes()
    if source.suffix == ".npz":
        try:
            names = {name.removesuffix(".npy") for name in zipfile.ZipFile(io.BytesIO(content)).namelist()}
        except zipfile.BadZipFile as error:
            raise UserError(
                f"{source}: the samples cannot be read ({error}); remove the file, and the run's own command "
                "draws them again"
            ) from error
        if names != manifest.SAMPLES:
            raise UserError(f"{source}: holds {', '.join(sorted(names))}; expected images, labels, classes")
    if source.suffix == ".png" and (odd := _chunks(content) - _PIXELS):
        raise UserError(
            f"{source}: holds {', '.join(sorted(odd))} beside its pixels; remove the file, and the run's own "
            "command draws it again"
        )
    write_atomic(copy, content)


def _chunks(png: bytes) -> set[str]:
    """The kinds of chunks of a PNG file; `no PNG` where it is none."""
    found, place = set[str](), 8
    while png[:8] == b"\x89PNG\r\n\x1a\n" and place + 12 <= len(png):
        size, kind = struct.unpack_from(">I4s", png, place)
        found.add(kind.decode("latin-1"))
        place += 12 + size
    return found if place == len(png) else {*found, "no PNG"}


def _check_names(run: _Run, folder: Path) -> None:
    """Refuses an export in which a folder of this machine is named.

    Cards of earlier versions hold the path of the pre-trained model.
    """
    for path in _files(folder):
        content = path.read_bytes()
        named = [field for field, name in _private_paths(run) if name.encode() in content]
        if path.suffix in (".md", ".yaml", ".jsonl", ".json") and path.name != "adapter_config.json":
            found = set(re.findall(r"[\w-]+", content.decode(errors="replace")))
            named += [field for field, word in _private_words(run) if word in found]
        for field in named:
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


def _private_words(run: _Run) -> Iterator[tuple[str, str]]:
    """Sources that are named by one word, as folders of the working directory are, with the setting.

    A word that the card or the settings use anyway, such as "images", tells nothing and is none of them.
    """
    from dp_lora.models.adapters import class_names
    from dp_lora.records import audit_section, card

    classes = class_names(run.directory / "adapter") or ()
    fields = (*manifest.FILES, *manifest.ROWS, *manifest.PRIVACY, *manifest.RESULT, *manifest.PROVENANCE)
    sections = (Path(str(part.__file__)) for part in (card, audit_section))
    text = " ".join(section.read_text(encoding="utf-8") for section in sections)
    known = set(re.findall(r"[\w-]+", " ".join([*_texts(_settings(run)), *fields, *classes, text])))
    for field in ("data", "public_data"):
        source = getattr(run.config, field).source
        if source and re.fullmatch(r"[\w-]{3,}", source) and source not in known:
            yield f"{field}.source", source


def _settings(run: _Run) -> Any:
    return json_ready(manifest.exported_settings(run.config))


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested settings, and every name of one."""
    if isinstance(value, Mapping):
        yield from value
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


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
