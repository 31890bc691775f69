"""The charges of a job to the ledger of its private set, and the budget that may refuse the job.

The ledger lies beside the data: `privacy_ledger.jsonl` in `paths.data` for the published sets, and for a
folder or file that `data.source` names `<its name>.privacy_ledger.jsonl` next to it. `paths.ledger` names
another file. Public data is not charged.

Of a ledger beside `data.source` every line counts, whatever its set is called there: a preset says how files
are read, not whose images they are. In a ledger of several sets the public names tell published sets apart;
images of one's own may be any of them, so that only the index can.

The same charges stand in the user's index of images (`dp_lora.jobs.image_index`), which knows a set again
wherever it lies and adds what was spent on sets that share images with it.

A run keeps a receipt, which names its last start or end by a random nonce. The receipt is written before the
index, the index before the ledger, and the ledger before anything is drawn, so one of two copies of a run is
always found behind them and refused, and a kill between two of the writes is no copy. Both have to know a run
that goes on for where they saw it last: a ledger that was copied along with a run says what the copy says.

What was once charged at the end of a training is never taken back, whatever the directory says later.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs import reuse
from dp_lora.jobs.begun import begun, progress_of
from dp_lora.records.run_directory import OUTPUTS
from dp_lora.storage.files import (
    check_file,
    check_writable,
    private_directory,
    write_json,
)
from dp_lora.training.receipts import (
    RECEIPT,
    Receipt,
    check_record,
    check_same_mechanism,
    check_same_plan,
    read_receipt,
)
from dp_lora.training.signals import Preempted

if TYPE_CHECKING:
    from dp_lora.data.sets import ImageSplits
    from dp_lora.jobs.image_index import ImageIndex, KnownSet
    from dp_lora.privacy.ledger import Charge, Ledger, Settled, Turn
    from dp_lora.privacy.plan import PrivacyPlan
    from dp_lora.privacy.subsampled_gaussian import Mechanism

NAME = "privacy_ledger.jsonl"

SAME_IMAGES = {
    "mnist5k": "mnist",
    **dict.fromkeys(("celebahq", "celeba32", "celeba64"), "celeba"),
    **dict.fromkeys(("imagenet32", "imagenet64"), "imagenet"),
}
"""Sets whose images are another one's or a part of them, so that what is spent on them adds up."""


def private_set(name: str) -> str:
    """The name under which the private set `data.name` is charged.

    Size, channels, classes and number of the images do not matter: they are the same people's.

    >>> private_set("mnist5k"), private_set("mnist"), private_set("imagefolder")
    ('mnist', 'mnist', 'imagefolder')
    """
    return SAME_IMAGES.get(name, name)


def ledger_path(config: Config) -> Path:
    """The file of the ledger that the job is charged to, absolute."""
    given, source, paths = config.paths.ledger, config.data.source, config.paths
    if given is not None:
        return Path(given).expanduser().absolute()
    if source is not None and Path(source).expanduser().exists():
        return ledger_beside(source)
    return Path(paths.data).expanduser().absolute() / NAME


def ledger_beside(source: str) -> Path:
    """The file of the ledger next to a folder or file of images."""
    path = Path(source).expanduser().resolve()
    return path.with_name(f"{path.name}.{NAME}")


def is_beside(path: Path, source: str | None) -> bool:
    """Whether the ledger `path` is the one next to `source`, so that all its lines are on one set."""
    return source is not None and path.resolve() == ledger_beside(source)


OWN = "imagefolder"
"""The name under which images of one's own are charged that no published set's preset reads."""


def may_be_one_set(one: str, other: str, *, own: bool) -> bool:
    """Whether charges of two names in one ledger may be on the same images.

    Of published sets the names tell. Images of one's own can be read by the preset of any set, and so can
    those of `OWN`. own: whether those of `one` are.

    >>> may_be_one_set("mnist", "cifar10", own=False), may_be_one_set("celeba", "cifar10", own=True)
    (False, True)
    """
    return own or one == other or OWN in (one, other)


def charge_of(config: Config, plan: PrivacyPlan, run: str) -> Charge:
    """The charge for the whole plan."""
    from dp_lora.privacy.ledger import Charge

    private = plan.private and config.privacy.insecure_seed is None
    return Charge(run, private_set(config.data.name), plan.mechanism, plan.delta, private, plan.unit)


def refusal(
    config: Config, plan: PrivacyPlan, directory: Path, images: ImageSplits, *, alone: bool = False
) -> str | None:
    """Why the ledger, or the budget, does not let this job look at `images`; None where nothing forbids it.

    Writes nothing. `charged` and `charge_release` ask again when nobody else can write. `alone`: no other run
    has made the training, which would cost nothing.
    """
    trains = "finetune" in config.stages and not (directory / OUTPUTS["finetune"]).exists()
    trains = trains and (alone or not reuse.may_take(config, directory))
    evaluates = "evaluate" in config.stages and not (directory / OUTPUTS["evaluate"]).exists()
    releases = evaluates and config.evaluation.release == "dp"
    if config.data.public or not (trains or releases):
        return None
    trained = (directory / OUTPUTS["finetune"]).exists()
    folder = reuse.account_folder(directory) if trained else directory / "checkpoint"
    account = Account(config, folder, images)
    try:
        ledger, index = account.books.ledger.path, account.books.index.folder
        check_file(ledger, f"paths.ledger={ledger}")
        check_writable(index, f"paths.index={index}")
        account.check(account.turn(progress_of(folder) if trains else None))
        if trains:
            mine = account.planned(plan)
            admit(config, mine, account.books.others(mine))
    except UserError as error:
        return str(error)
    return None


def admit(config: Config, mine: Charge, others: Sequence[Charge]) -> None:
    """Raises UserError when `privacy.budget_epsilon` has no room for `mine` after what `others` spent.

    The budget holds for runs that are chosen after seeing results of earlier ones (`ledger.fits`).
    """
    from dp_lora.privacy.ledger import fits, smallest_delta, spent_adaptively

    budget = config.privacy.budget_epsilon
    if budget is None or fits(mine, others, budget):
        return
    delta, path = smallest_delta(mine, others), ledger_path(config)
    if mine.unit == "person" and any(c.unit == "image" and c.mechanism.steps for c in others):
        raise UserError(
            f"privacy.budget_epsilon={budget:g} with privacy.unit=person: earlier runs on {mine.private_set} "
            f"protect single images, and have no epsilon for a person with any number of them ({path}); "
            "expected null, or privacy.unit=image"
        )
    before = spent_adaptively(others, delta, unit=mine.unit)
    after = spent_adaptively([*others, mine], delta, above=budget, unit=mine.unit)
    raise UserError(
        f"privacy.budget_epsilon={budget:g}: {in_words(len(others))} on {mine.private_set} spent epsilon "
        f"{before:.4g}, this one would make it {after:.4g}, counted by the Renyi filter, which counts "
        "more than a run's own epsilon since runs may be chosen after seeing earlier ones, at the "
        f"smallest delta of all, {delta:g} ({path}); expected a run that spends less, or a larger budget"
    )


class Books:
    """Where what was spent on `images` is written: the ledger of their set, and the user's index.

    Methods raise UserError when one of them cannot be used.
    """

    def __init__(self, config: Config, images: ImageSplits) -> None:
        from dp_lora.jobs.image_index import ImageIndex, default_folder
        from dp_lora.privacy.ledger import Ledger

        given = config.paths.index
        self.config, self.images = config, images
        self.ledger: Ledger = Ledger(ledger_path(config))
        place = default_folder() if given is None else Path(given).expanduser().absolute()
        self.index: ImageIndex = ImageIndex(place, by_person=config.privacy.unit == "person")
        # Whether all lines of the ledger are on these images.
        self.one_set = is_beside(self.ledger.path, config.data.source)

    def others(self, mine: Charge) -> list[Charge]:
        """The charges of all other runs on the set of `mine`, and on sets that share images with it."""
        found = self.index.find(self.images)
        own = self._on_these_images(mine, self.ledger.charges(), found)
        return [] if found is None and not own else self._together(mine, own, self.index.charges(), found)

    def in_ledger(self, mine: Charge) -> list[Charge]:
        """Those of `others` that are in the ledger."""
        return self._on_these_images(mine, self.ledger.charges(), self.index.find(self.images))

    def enter(self, charge: Charge, known: str | None, turn: Turn, *, admitted: bool) -> str:
        """Enters `charge` in both, on disk before this returns; the rest is as in `Ledger.enter`.

        The index first: after a crash in between a run may stand there with more than it took, never less.
        The budget is asked while nobody else can write to either, unless the charge is `admitted` already.
        """
        found = self.index.register(self.images)

        def ask(in_ledger: Sequence[Charge]) -> None:
            others = self._on_these_images(charge, in_ledger, found)

            def ask_both(indexed: Sequence[Charge]) -> None:
                if not admitted:
                    admit(self.config, charge, self._together(charge, others, indexed, found))

            self.index.enter(found, charge, others, ask_both, turn)

        return self.ledger.enter(charge, ask, known, turn)

    def of_run(self, run: str) -> list[Charge]:
        """The charges of the run `run` in the ledger and in the index: its training and its releases."""
        found = [*self.ledger.charges(), *self.index.charges()]
        return [charge for charge in found if charge.run == run or charge.run.startswith(f"{run}-release-")]

    def settled(self, run: str) -> Settled:
        """The larger of what both say."""
        from dp_lora.privacy.ledger import Settled

        both = (self.ledger.settled(run), self.index.settled(run))
        return Settled(max(one.steps for one in both), max(one.begun for one in both))

    def note(self, turn: Turn, progress: int) -> None:
        """Notes in both how far the run has come; see `Mark.note`."""
        for one in (self.index, self.ledger):
            one.mark(turn.owner).note(turn.nonce, progress)

    def _on_these_images(
        self, mine: Charge, charges: Sequence[Charge], found: KnownSet | None
    ) -> list[Charge]:
        """The `charges` of other runs in the ledger that are on the images of `mine`, or may be.

        In a ledger of several sets, those of another name are left out that the index has seen begin on
        other images.
        """
        others = [charge for charge in charges if charge.run != mine.run]
        if self.one_set:
            return others
        own, name = self.config.data.source is not None, mine.private_set
        apart: set[str] = set() if found is None else self.index.apart(found)
        return [
            c
            for c in others
            if c.private_set == name or (c.run not in apart and may_be_one_set(name, c.private_set, own=own))
        ]

    def _together(
        self, mine: Charge, others: Sequence[Charge], indexed: Sequence[Charge], found: KnownSet | None
    ) -> list[Charge]:
        """`others`, and of the charges in the index those of sets that share images with `found`."""
        together = {charge.run: charge for charge in others}
        names = set() if found is None else self.index.together(found)
        for charge in indexed:
            other = together.get(charge.run)
            if charge.private_set not in names or charge.run == mine.run:
                continue
            # A run that stands in both counts once, with what is larger: a crash may have come in between.
            if other is None or other.mechanism.steps < charge.mechanism.steps:
                together[charge.run] = replace(charge, private_set=mine.private_set)
        return list(together.values())


class Account:
    """The account of one run: its receipt in the private `folder`, and its lines in the books.

    Methods raise UserError as those of `Books`, and for a run that has gone on elsewhere.
    """

    def __init__(self, config: Config, folder: Path, images: ImageSplits) -> None:
        self.books, self.folder = Books(config, images), folder
        self.receipt = read_receipt(folder) or Receipt(secrets.token_hex(8), private_set(config.data.name))

    def turn(self, progress: int | None) -> Turn:
        """The next start of the run, with the bytes of its record so far, or (None) its end or a release."""
        from dp_lora.privacy.ledger import Turn

        mine = self.receipt
        known = [nonce for nonce in (mine.nonce, mine.previous, mine.index_previous) if nonce is not None]
        return Turn(mine.run, secrets.token_hex(8), known, progress)

    def check(self, turn: Turn) -> tuple[str | None, str | None]:
        """The run's last nonces in ledger and index; UserError when one is none that this directory knows."""
        from dp_lora.privacy.marks import Superseded

        try:
            return self.books.ledger.check(turn), self.books.index.check(turn)
        except Superseded as error:
            raise self.gone_on() from error

    def planned(self, plan: PrivacyPlan) -> Charge:
        """The charge for a start of the run: its whole plan, and no less than at an earlier end.

        Raises UserError when the run does not go on as it began (`dp_lora.training.receipts`).
        """
        check_same_plan(plan, self.folder)
        charge = charge_of(self.books.config, plan, self.receipt.run)
        settled = self.books.settled(charge.run)
        check_same_mechanism(charge, self.books.of_run(charge.run), self.folder)
        check_record(begun(self.folder), settled.begun, self.folder)
        steps = max(plan.steps, settled.steps)
        return replace(charge, mechanism=replace(charge.mechanism, steps=steps))

    def enter(self, charge: Charge, turn: Turn, *, admitted: bool = False) -> None:
        """Writes `turn` into the receipt, then `charge` with it into the books, on disk before this returns.

        A kill in between leaves a receipt that knows the nonces of both, old or new.
        """
        from dp_lora.privacy.marks import Superseded

        before, here = self.receipt, str(self.books.ledger.path)
        known = before.digest if before.ledger == here else None
        in_ledger, in_index = self.check(turn)
        self._keep(
            replace(
                before,
                ledger=here,
                digest=known,
                nonce=turn.nonce,
                previous=in_ledger,
                index=str(self.books.index.folder),
                index_previous=in_index,
            )
        )
        try:
            digest = self.books.enter(charge, known, turn, admitted=admitted)
        except Superseded as error:
            self._keep(before)
            raise self.gone_on() from error
        self._keep(replace(self.receipt, digest=digest))

    def gone_on(self) -> UserError:
        """The error of a copy."""
        here, there = str(self.books.ledger.path), self.receipt.ledger
        moved = "" if there in (None, here) else f" Its last charge is in {there}: paths.ledger names it."
        index = self.books.index.folder
        return UserError(
            f"{self.folder}: this run has gone on elsewhere ({here}; paths.index={index}): this is a copy of "
            f"it, or an older state that was brought back, and what it takes would not be charged.{moved} "
            f"Go on where the run went on; or remove {self.folder}: the same command then begins a new run, "
            "charged in full"
        )

    def _keep(self, receipt: Receipt) -> None:
        self.receipt = receipt
        write_json(private_directory(self.folder) / RECEIPT, asdict(receipt), mode=0o600)


@contextmanager
def charged(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> Iterator[Callable[[], None]]:
    """Charges the plan to the ledger before the training begins, and what it began when it ends.

    A job that a cluster will start again, or that is killed, stays charged with its whole plan until it is
    continued and ends; so does, for good, one that fills its budget (`ledger.fills`). What it was charged at
    an earlier end is never taken back. Gives a function that has to be called before anything of a step
    leaves the process: it notes how far the run has come and raises UserError when a copy of the run has
    taken its place, or its record of steps was moved away or cut. Then the whole plan stays charged.

    Args:
        config: the job; public data is not charged.
        plan: of the training.
        folder: the run's private `checkpoint/`; it keeps the run's number.
        images: private.

    Raises UserError when the budget would be passed, when the ledger or the index cannot be used, when the
    run has gone on elsewhere, and as `Account.planned`; then nothing was charged.
    """
    from dp_lora.privacy.ledger import fills
    from dp_lora.privacy.marks import Superseded

    if config.data.public:
        yield lambda: None
        return
    account = Account(config, folder, images)
    turn = account.turn(progress_of(folder))
    account.check(turn)
    plan_charge, settled = account.planned(plan), account.books.settled(turn.owner)
    account.enter(plan_charge, turn)

    furthest = 0

    def note() -> None:
        nonlocal furthest
        if (progress := progress_of(folder)) < furthest:
            raise UserError(
                f"{folder}: its record of steps was moved, removed or cut while the run went on; expected it "
                "to stay. The run stays charged with its whole plan"
            )
        furthest = progress
        try:
            account.books.note(turn, progress)
        except Superseded as error:
            raise account.gone_on() from error

    def settle() -> None:
        if progress_of(folder) < furthest:
            return
        taken, budget = begun(folder), config.privacy.budget_epsilon
        steps = max(taken, settled.steps)
        if budget is not None and plan_charge.private and fills(plan_charge, budget):
            steps = max(steps, plan.steps)
        mechanism = replace(plan_charge.mechanism, steps=steps)
        end = account.turn(None)._replace(begun=taken)
        account.enter(replace(plan_charge, mechanism=mechanism), end, admitted=True)

    try:
        yield note
    except Preempted:
        raise
    except BaseException:
        # What went wrong counts, not that a full disk has no room for the correction.
        with suppress(OSError, UserError):
            settle()
        raise
    settle()


@contextmanager
def charge_release(
    config: Config, mechanism: Mechanism, delta: float, folder: Path, number: int, images: ImageSplits
) -> Iterator[None]:
    """Charges a release on the set's held-out images, on disk before it is made; once for each `number`.

    The release is made, and kept in `folder`, inside of the block, and may be shown after it: at its end a
    copy of the run that has released something in the meantime is noticed.

    Args:
        config: the job; public data is not charged.
        mechanism, delta: of the release.
        folder: the run's private `checkpoint/`.
        number: of the release, from 0, in this run (`next_release`).
        images: private.

    Raises UserError as `charged`, and when another release was charged under the number.
    """
    from dp_lora.privacy.ledger import Charge

    if config.data.public:
        yield
        return
    account = Account(config, folder, images)
    private = mechanism.noise_multiplier > 0 and config.privacy.insecure_seed is None
    name = f"{account.receipt.run}-release-{number}"
    unit = config.privacy.unit
    mine = Charge(name, account.receipt.private_set, mechanism, delta, private, unit)
    if any(c.run == name and c.mechanism != mechanism for c in account.books.of_run(account.receipt.run)):
        raise UserError(
            f"{account.folder / 'releases.json'}: another release was charged as number {number} "
            f"({account.books.ledger.path}); expected the file as it was written"
        )
    account.enter(mine, account.turn(None), admitted=mine in account.books.ledger.charges())
    yield
    account.enter(mine, account.turn(None), admitted=True)


def in_words(number: int) -> str:
    """A number of runs, in words."""
    return f"{number} run{'s' * (number != 1)}"


def releases_charged(config: Config, folder: Path, images: ImageSplits) -> dict[int, Mechanism]:
    """The releases of the run of the private `folder`, by number, that the ledger or the index has.

    A release whose record was lost may have been seen, so its number and its charge stay.
    """
    if config.data.public:
        return {}
    account = Account(config, folder, images)
    run = account.receipt.run
    charges = [charge for charge in account.books.of_run(run) if charge.run != run]
    return {int(charge.run.rpartition("-")[2]): charge.mechanism for charge in charges}
