"""The trainings that an adapter descends from, by the private records of the run that made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config.load import read_config
from dp_lora.jobs import content
from dp_lora.jobs.begun import begun, releases_of
from dp_lora.jobs.reuse import START, taken
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.records.run_directory import WAY_OUT
from dp_lora.storage.files import Damaged, read_json
from dp_lora.training.receipts import PLAN, read_receipt

if TYPE_CHECKING:
    from dp_lora.data.sets import ImageSplits
    from dp_lora.privacy.ledger import Charge


@dataclass(frozen=True)
class Training:
    """One of the trainings that an adapter descends from, or a release on held-out images of one of them."""

    run: str
    """Its number in ledger and index, of a release with the release's; empty if it was on public images."""
    noise_multiplier: float
    sample_rate: float
    steps: int
    """That were begun."""
    private: bool
    """False without noise, and with noise from a seed."""
    adjacency: str
    """The relation of its guarantee: a value of `privacy.adjacency`."""
    directory: str
    """Of the run that trained, absolute; empty where only ledger or index know it."""
    same_images: bool
    """Whether it was on the images of the run that lists it, or on some of them."""
    unit: str = "image"
    """What its guarantee protects: a value of `privacy.unit`."""
    same_roles: bool = False
    """Whether it was on just the images of the run that lists it, which trains on the same ones of them."""

    @property
    def counts(self) -> bool:
        """Whether a training on the images of the run that lists it adds to what this one spent on one image.

        A release does not if its held-out images are held out by that run as well.
        """
        return self.same_images and not (is_release(self) and self.same_roles)

    @property
    def mechanism(self) -> Mechanism:
        """The noisy steps, for the accountant."""
        return Mechanism(self.noise_multiplier, self.sample_rate, self.steps)


def record_of(run: Path) -> Mapping[str, Any] | None:
    """What the run in the directory `run` noted about the adapter that it started from; None if from none.

    Raises Damaged when the record is lost, or not as it was written.
    """
    path = run / "checkpoint" / START
    if path.exists():
        found = read_json(path)
        if not isinstance(found, dict):
            raise Damaged(f"{path}: expected what the run started from, as it wrote it: {WAY_OUT}")
        return found
    config = read_config(run / "config.yaml")
    given = config.train.continue_from or config.model.adapter
    if given is not None:
        raise Damaged(f"{path}: is missing, and the run started from {given}; put it back, or {WAY_OUT}")
    return None


def kept(folder: Path) -> Sequence[Training]:
    """The trainings behind the run of the private `folder`, as it noted them when it began."""
    path = folder / START
    if not path.exists():
        return ()
    try:
        return [Training(**one) for one in read_json(path)["trainings"]]
    except (KeyError, TypeError) as error:
        raise Damaged(f"{path}: expected what the run started from, as it wrote it: {WAY_OUT}") from error


def behind(run: Path, images: ImageSplits, books: Sequence[Training]) -> list[Training]:
    """The trainings that the adapter of `run` descends from, and their releases, the run's own last.

    By the record and the statement of that run.

    Args:
        run: the directory of a finished run.
        images: of the run that is to start from the adapter.
        books: what ledger and index have on these images, or on images shared with them.
    """
    record_of(run)
    last, earlier = replace(_of_run(run), same_roles=True), kept(run / "checkpoint")
    stated = read_json(run / "privacy.json").get("earlier_trainings", ())
    if len(stated) > sum(one.counts for one in earlier):
        raise Damaged(
            f"{run / 'checkpoint' / START}: says less of earlier trainings than privacy.json; expected it as "
            f"the run wrote it: {WAY_OUT}"
        )
    shared = {one.run for one in books}
    exactly = is_on(str(run), images) or is_on(last.directory, images)
    same = exactly or last.run in shared

    def seen_from_here(one: Training) -> Training:
        on_these = is_on(one.directory, images)
        known = (same and one.same_images) or one.run in shared or on_these
        return replace(one, same_images=known, same_roles=on_these or (exactly and one.same_roles))

    found: dict[str, Training] = {}
    for one in (*earlier, last):
        for part in (*releases(one, books), one):
            found.setdefault(name_of(part), seen_from_here(part))
    return list(found.values())


def is_on(directory: str, images: ImageSplits) -> bool:
    """Whether the run in `directory` is there, and began on just these images."""
    folder = Path(directory) / "checkpoint"
    return bool(directory) and (folder / content.NAME).exists() and content.refusal(images, folder) is None


def releases(one: Training, books: Sequence[Training | Charge]) -> Iterator[Training]:
    """The releases on held-out images of the run of a training, by its record, by ledger and by index."""
    if is_release(one):
        return
    number = f"{name_of(one)}-release-"
    folder = Path(one.directory) / "checkpoint"
    records = releases_of(folder) if one.directory and folder.is_dir() else []
    if records:
        secret = read_config(folder.parent / "config.yaml").privacy.insecure_seed is None
        for place, made in enumerate(records):
            noise = float(made["noise_multiplier"])
            yield replace(
                one,
                run=f"{number}{made.get('number', place)}",
                noise_multiplier=noise,
                sample_rate=1.0,
                steps=1,
                private=secret and noise > 0,
            )
    for other in books:
        if other.run.startswith(number):
            noise = other.mechanism.noise_multiplier
            part = replace(one, run=other.run, noise_multiplier=noise, sample_rate=1.0, steps=1)
            yield replace(part, private=other.private)


def _of_run(run: Path) -> Training:
    """The training of a finished run, with the larger of the steps that are stated and on record."""
    record = read_json(run / "privacy.json")
    source = taken(run)
    folder = (run if source is None else source.directory) / "checkpoint"
    receipt = read_receipt(folder) if source is None else source.receipt
    plan = read_json(folder / PLAN) if (folder / PLAN).exists() else record
    for name in ("noise_multiplier", "sample_rate"):
        if plan[name] != record[name]:
            raise Damaged(
                f"{run / 'privacy.json'}: {name} {record[name]} is not that of the training, {plan[name]}: "
                f"{WAY_OUT}"
            )
    noise = float(record["noise_multiplier"])
    own = float(record.get("epsilon_of_this_training", record["epsilon"]))
    steps = max(int(record["steps"]), begun(folder) if folder.is_dir() else 0)
    private = noise > 0 and own != float("inf") and record["reproducible_noise"] is False
    relation = "add_or_remove" if str(record["adjacency"]).startswith("add or remove") else "zero_out"
    return Training(
        run="" if receipt is None else receipt.run,
        noise_multiplier=noise,
        sample_rate=float(record["sample_rate"]),
        steps=steps,
        private=private,
        adjacency=relation,
        unit=str(record.get("unit", "image")),
        directory=str((run if source is None else source.directory).resolve()),
        same_images=True,
    )


def is_release(one: Training) -> bool:
    """Whether it is a release on held-out images, not a training."""
    return "-release-" in one.run


def name_of(one: Training) -> str:
    """The number of a training, or the place of one that has none."""
    return one.run or one.directory
