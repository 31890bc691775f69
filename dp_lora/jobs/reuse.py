"""One training for all runs that differ only in what follows it.

Images and metrics are functions of the released adapter, so that other images from it, or other metrics of
them, cost no privacy. A run that differs from a finished one in `sampler` or `evaluation` alone takes its
training: adapter, statement and logged values. Nothing is charged, and no noise is drawn.

Guarantee: a training is taken only if it is complete and whole, was of the same settings, and began with the
same images, by the keyed record of their content. A run without that record, as earlier versions left them,
gives its training to nobody.

`<outputs>/.trainings/` has a file for each training that ended, which names its run directory, and a lock, so
that jobs which ask for the same training at the same time train once. What was spent stays with the run that
trained: a run that has taken its training keeps where from in its private `checkpoint/`, and no key, receipt
or record of steps. A release on held-out images by such a run is charged to the run that trained.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dp_lora.config.identity import training_fingerprint
from dp_lora.config.load import read_config
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs import content
from dp_lora.records.run_directory import OUTPUTS, is_whole, keep_adapter
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

_PLACE = ".trainings"


@dataclass(frozen=True)
class Taken:
    """Where a run has its training from."""

    directory: Path
    """Of the run that trained."""
    receipt: Receipt | None
    """That run's, as it was then: its number, by which ledger and bill know it. None on public data."""


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


def offer(config: Config, directory: Path) -> None:
    """Makes the training that ended in `directory` known to later runs."""
    outputs = Path(config.paths.outputs).expanduser()
    record = {"directory": str(directory.relative_to(outputs))}
    write_json(
        private_directory(outputs / _PLACE) / f"{training_fingerprint(config)}.json", record, mode=0o600
    )


def may_take(config: Config, directory: Path) -> bool:
    """Whether the run in `directory` may find its training made, or in the making, by another run."""
    if _trains(directory):
        return False
    return any(path.exists() for path in _paths(config))


def find(
    config: Config, directory: Path, images: ImageSplits, hold: ExitStack, say: Callable[[str], None]
) -> Path | None:
    """The run directory with the training that the run in `directory` asks for; None if it has to train.

    Waits while another job makes it. With None, `hold` has the lock, under which the run is to train.

    Raises UserError when the training is there and damaged.
    """
    if _trains(directory):
        return None
    record, lock = _paths(config)
    private_directory(lock.parent)

    def waiting() -> None:
        say("finetune: another job makes this training; waiting for it")

    hold.enter_context(file_lock(lock, waiting=waiting))
    source = _recorded(config, record)
    if source is None or source == directory:
        return None
    if not is_whole(source, "finetune") or not read_json(source / "privacy.json").get("complete"):
        return None
    if not (source / "checkpoint" / content.NAME).exists():
        return None
    if content.refusal(images, source / "checkpoint") is not None:
        say(f"finetune: the training of {source} was of other images, so this run trains by itself")
        return None
    hold.close()
    return source


def take(source: Path, directory: Path, tracker: Tracker) -> None:
    """Gives the run in `directory` the training of the run in `source`; the adapter comes last and whole."""
    checkpoint = private_directory(directory / "checkpoint")
    receipt = read_receipt(source / "checkpoint")
    trained = taken(source) or Taken(source, receipt)
    tracker.rewind("finetune", 0)
    for row in read_lines(source / "metrics.jsonl"):
        if row["stage"] == "finetune":
            values = {name: value for name, value in row.items() if name not in ("stage", "step", "time")}
            tracker.log(row["step"], values, "finetune")
    tracker.stage_ended("finetune")
    statement = {k: v for k, v in read_json(source / "privacy.json").items() if k != "release"}
    tracker.privacy(statement)
    write_json(checkpoint / content.NAME, read_json(source / "checkpoint" / content.NAME), mode=0o600)
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


def _paths(config: Config) -> tuple[Path, Path]:
    """The file that names the run with the training, and its lock."""
    folder = Path(config.paths.outputs).expanduser() / _PLACE
    identity = training_fingerprint(config)
    return folder / f"{identity}.json", folder / f"{identity}.lock"


def _recorded(config: Config, record: Path) -> Path | None:
    """The run directory that `record` names, if it is there and of the same training."""
    try:
        found = read_json(record)
        source = (Path(config.paths.outputs).expanduser() / found["directory"]).resolve()
        same = training_fingerprint(read_config(source / "config.yaml")) == training_fingerprint(config)
    # Written again by the training that follows.
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    return source if same and (source / "privacy.json").exists() else None
