"""One training for all runs that differ only in what follows it.

Images and metrics are functions of the released adapter, so that other images from it, or other metrics of
them, cost no privacy. A run that differs from a finished one in `sampler` or `evaluation` alone takes its
training: adapter, statement and logged values. Nothing is charged, and no noise is drawn.

Guarantee: a training is taken only if it is complete and whole, was of the same settings, and began with the
same images, by the keyed record of their content. A run without that record, as earlier versions left them,
gives its training to nobody.

`<outputs>/.trainings-<user>/` has a file for each training that ended, which names its run directory, and a
lock, so that jobs which ask for the same training at the same time train once. What was spent stays with the
run that trained: a run that has taken its training keeps where from in its private `checkpoint/`, and no key,
receipt or record of steps. A release on held-out images by such a run is charged to the run that trained.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dp_lora.config.identity import training_fingerprint
from dp_lora.config.load import read_config
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs import content
from dp_lora.jobs.begun import stated_release
from dp_lora.records.field_kinds import NON_FINITE
from dp_lora.records.run_directory import OUTPUTS, WAY_OUT, check_records, is_whole, keep_adapter
from dp_lora.storage.files import (
    Damaged,
    file_lock,
    private_directory,
    read_json,
    read_lines,
    write_json,
)
from dp_lora.training.receipts import PLAN, RECEIPT, Receipt, read_receipt

if TYPE_CHECKING:
    from dp_lora.data.sets import ImageSplits
    from dp_lora.records.tracker import Tracker

NAME = "training.json"
"""In the private `checkpoint/` of a run that has taken its training: where from."""

START = "start.json"
"""In that of a run that started from an adapter: its digest, and the trainings behind it."""

BASE = "base.json"
"""In that of a run that trains: the SHA-256 of the pre-trained weights."""


@dataclass(frozen=True)
class Taken:
    """Where a run has its training from."""

    directory: Path
    """Of the run that trained."""
    receipt: Receipt | None
    """That run's, as it was then: its number, by which ledger and bill know it. None on public data."""


class Begun(NamedTuple):
    """The adapter that a training starts from."""

    adapter: str
    """SHA-256 of its weights."""
    earlier: frozenset[str]
    """The earlier trainings on the same images that the statement counts, by their numbers."""


def taken(directory: Path) -> Taken | None:
    """Where the run in `directory` has its training from; None if it trained itself, or has not yet.

    Raises Damaged when the record is not as `take` wrote it.
    """
    path = directory / "checkpoint" / NAME
    if not path.exists() or _trains(directory):
        return None
    found = read_json(path)
    try:
        receipt = None if found["receipt"] is None else Receipt(**found["receipt"])
        return Taken((directory / found["directory"]).resolve(), receipt)
    except (KeyError, TypeError) as error:
        raise Damaged(
            f"{path}: expected where the training was taken from, as this program wrote it"
        ) from error


def account_folder(directory: Path) -> Path:
    """The private folder of the run in `directory` that is charged for what its adapter's images release.

    Raises UserError if that is another run, which is not there any more.
    """
    source = taken(directory)
    if source is None:
        return directory / "checkpoint"
    folder = source.directory / "checkpoint"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: is missing; expected the run whose training this one has taken, to which a release "
            "is charged: put it back"
        )
    return folder


@contextmanager
def account(directory: Path, waiting: Callable[[], None]) -> Iterator[Path]:
    """`account_folder`, held by this process alone; `waiting` is called if another one holds it."""
    folder = account_folder(directory)
    with ExitStack() as stack:
        if folder != directory / "checkpoint":  # which the job holds already
            stack.enter_context(file_lock(folder / "lock", waiting=waiting))
        yield folder


def begin(directory: Path, pretrained: Path) -> None:
    """Notes in the private `checkpoint/` of a run that is to train with which weights it does."""
    from dp_lora.models.folders import sha256_of_weights

    path = private_directory(directory / "checkpoint") / BASE
    # Of a run that an earlier version began it is not known.
    if not path.exists() and not _trains(directory):
        write_json(path, {"model": sha256_of_weights(pretrained)}, mode=0o600)


def offer(config: Config, directory: Path) -> None:
    """Makes the training of a run known to later runs, if it has ended; otherwise it does nothing."""
    record, _ = _paths(config)
    base = directory / "checkpoint" / BASE
    if not base.exists() or not _trains(directory) or not _is_complete(directory):
        return
    within = str(directory.relative_to(_outputs(config)))  # which may be moved with its runs
    known = {"directory": within, **read_json(base)}
    if record.exists() and (_outputs(config) / _named(record)["directory"] / OUTPUTS["finetune"]).exists():
        return
    private_directory(record.parent)
    write_json(record, known, mode=0o600)


def may_take(config: Config, directory: Path) -> bool:
    """Whether the run in `directory` may find its training made, or in the making, by another run."""
    return not _trains(directory) and any(path.exists() for path in _paths(config))


def find(
    config: Config,
    directory: Path,
    images: ImageSplits,
    pretrained: Path,
    start: Begun | None,
    hold: ExitStack,
    say: Callable[[str], None],
) -> Path | None:
    """The run directory with the training that a run asks for; None if it has to train.

    Waits while another job makes it. With None, `hold` has the lock, under which the run is to train.

    Args:
        config, directory: of the run.
        images: private.
        pretrained: the folder of its pre-trained model.
        start: the adapter that it starts from.
        hold: closed when the training is not in the making any more.
        say: tells the owner.

    Raises UserError when the training is there and damaged.
    """
    if _trains(directory):
        return None
    record, lock = _paths(config)
    private_directory(lock.parent)

    def waiting() -> None:
        say("finetune: another job makes this training; waiting for it")

    hold.enter_context(file_lock(lock, waiting=waiting))
    source, why = _recorded(config, directory, images, pretrained, start, record)
    if why is not None:
        say(f"finetune: {why}, so this run trains by itself")
    if source is not None:
        hold.close()
    return source


def _recorded(
    config: Config,
    directory: Path,
    images: ImageSplits,
    pretrained: Path,
    start: Begun | None,
    record: Path,
) -> tuple[Path | None, str | None]:
    """The run directory that `record` names, or the reason why its training is not the one asked for."""
    from dp_lora.models.folders import sha256_of_weights

    if not record.exists():
        return None, None
    found = _named(record)
    source = (_outputs(config) / found["directory"]).resolve()
    if source == directory.resolve() or not (source / OUTPUTS["finetune"]).exists():
        return None, None
    other = read_config(source / "config.yaml")
    check_records(source)
    if training_fingerprint(other) != training_fingerprint(config) or not _is_complete(source):
        return None, f"{record} names {source}, which is another training"
    if found["model"] != sha256_of_weights(pretrained):
        return None, f"the training of {source} began with other weights of the pre-trained model"
    path = source / "checkpoint" / START
    began = read_json(path) if path.exists() else {}
    if not isinstance(began, dict):
        raise Damaged(f"{path}: expected what a run started from, as this program wrote it: {WAY_OUT}")
    if (None if start is None else start.adapter) != began.get("adapter"):
        return None, f"the training of {source} started from another adapter"
    stated = len(read_json(source / "privacy.json").get("earlier_trainings", ()))
    # What an adapter without its run was trained on is not known, so all runs count, this one among them.
    trained = taken(source)
    receipt = read_receipt(source / "checkpoint") if trained is None else trained.receipt
    if start is not None and len(start.earlier - {"" if receipt is None else receipt.run}) > stated:
        return None, f"the statement of {source} knows less of earlier trainings on these images"
    path = source / "checkpoint" / content.NAME
    if not path.exists():
        return None, f"{path} is missing, so it is not known which images that training was of"
    if not isinstance(kept := read_json(path), dict) or not kept.keys() >= content.FIELDS:
        raise Damaged(f"{path}: expected the record of a run's images as this program wrote it: {WAY_OUT}")
    if content.refusal(images, source / "checkpoint") is not None:
        return None, f"the training of {source} was of other images"
    _rows(source)
    return source, None


def _named(record: Path) -> dict[str, str]:
    """The content of the file that `offer` wrote. Raises Damaged when it is something else."""
    found = read_json(record)
    texts = isinstance(found, dict) and all(isinstance(found.get(n), str) for n in ("directory", "model"))
    if not texts:
        raise Damaged(f"{record}: expected the name of a run as this program wrote it; remove the file")
    return dict(found)


def _rows(source: Path) -> list[tuple[int, dict[str, float]]]:
    """The logged steps of a training, with the values of each. Raises Damaged when they are not whole."""
    path = source / "metrics.jsonl"
    rows: list[tuple[int, dict[str, float]]] = []
    try:
        for row in read_lines(path):
            if row["stage"] == "finetune":
                values = {name: v for name, v in row.items() if name not in ("stage", "step", "time")}
                numbers = {n: float(v) if v in NON_FINITE else v for n, v in values.items()}
                rows.append((row["step"], numbers))
        steps = [step for step, _ in rows]
        whole = bool(steps) and all(a < b for a, b in itertools.pairwise(steps))
    except (OSError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: expected the rows that the training logged: {WAY_OUT}") from error
    if not whole:
        raise Damaged(f"{path}: expected the steps of the training in their order: {WAY_OUT}")
    return rows


def take(source: Path, directory: Path, tracker: Tracker) -> None:
    """Gives the run in `directory` the training of the run in `source`; the adapter comes last and whole."""
    checkpoint = private_directory(directory / "checkpoint")
    receipt = read_receipt(source / "checkpoint")
    trained = taken(source) or Taken(source, receipt)
    tracker.rewind("finetune", 0)
    for step, values in _rows(source):
        tracker.log(step, values, "finetune")
    tracker.stage_ended("finetune")
    statement = {k: v for k, v in read_json(source / "privacy.json").items() if k != "release"}
    if (release := stated_release(directory)) is not None:
        statement["release"] = release  # of its own, from before its adapter was lost
    tracker.privacy(statement)
    write_json(checkpoint / content.NAME, read_json(source / "checkpoint" / content.NAME), mode=0o600)
    if (source / "checkpoint" / START).exists():
        write_json(checkpoint / START, read_json(source / "checkpoint" / START), mode=0o600)
    there = os.path.relpath(trained.directory, directory.resolve())
    shown = None if trained.receipt is None else asdict(trained.receipt)
    write_json(checkpoint / NAME, {"directory": str(there), "receipt": shown}, mode=0o600)
    partial = directory / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source / OUTPUTS["finetune"], partial)
    keep_adapter(partial, checkpoint)
    partial.replace(directory / OUTPUTS["finetune"])
    tracker.adapter(directory / OUTPUTS["finetune"])


def _trains(directory: Path) -> bool:
    """Whether the run has begun a training of its own."""
    return any((directory / "checkpoint" / name).exists() for name in (RECEIPT, PLAN))


def _is_complete(directory: Path) -> bool:
    """Whether a training has ended, by its statement."""
    path = directory / "privacy.json"
    found = read_json(path) if path.exists() else {}
    return isinstance(found, dict) and found.get("complete") is True and is_whole(directory, "finetune")


def _outputs(config: Config) -> Path:
    return Path(config.paths.outputs).expanduser()


def _paths(config: Config) -> tuple[Path, Path]:
    """The file that names the run with the training, and its lock; nobody can take another user's run."""
    folder = _outputs(config) / f".trainings-{os.getuid()}"
    identity = training_fingerprint(config)
    return folder / f"{identity}.json", folder / f"{identity}.lock"
