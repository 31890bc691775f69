"""What a job charges to the ledger of its private set, and the budget that may refuse the job.

The ledger lies beside the data: `privacy_ledger.jsonl` in `paths.data` for the published sets, and for a
folder or file that `data.source` names `<its name>.privacy_ledger.jsonl` next to it. `paths.ledger` names
another file. Public data is not charged.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dp_lora.config import Config
from dp_lora.errors import UserError
from dp_lora.files import private_directory, read_json, write_json
from dp_lora.job import OUTPUTS, check_writable
from dp_lora.signals import Preempted

if TYPE_CHECKING:
    from dp_lora.privacy.accounting import Mechanism
    from dp_lora.privacy.ledger import Charge
    from dp_lora.privacy.plan import PrivacyPlan

NAME = "privacy_ledger.jsonl"
RECEIPT = "charge.json"
"""The receipt's name in the private `checkpoint/`."""

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


def charge_of(config: Config, plan: PrivacyPlan, run: str) -> Charge:
    """What the whole plan costs."""
    from dp_lora.privacy.ledger import Charge

    private = plan.private and config.privacy.insecure_seed is None
    return Charge(run, private_set(config.data.name), plan.mechanism, plan.delta, private)


def refusal(config: Config, plan: PrivacyPlan, directory: Path) -> str | None:
    """Why the ledger, or the budget, does not let this job train; None when nothing speaks against it.

    Writes nothing. `charged` asks again when nobody else can write.
    """
    from dp_lora.privacy.ledger import Ledger

    if config.data.public or (directory / OUTPUTS["finetune"]).exists():
        return None
    mine = charge_of(config, plan, _receipt(config, directory / "checkpoint").run)
    path = ledger_path(config)
    try:
        check_writable(path.parent, f"paths.ledger={path}")
        admit(config, mine, [c for c in Ledger(path).charges() if c.run != mine.run])
    except UserError as error:
        return str(error)
    return None


def admit(config: Config, mine: Charge, others: Sequence[Charge]) -> None:
    """Raises UserError when `privacy.budget_epsilon` has no room for `mine` after what `others` spent.

    The budget holds for runs that are chosen after seeing results of earlier ones (`ledger.fits`).
    """
    from dp_lora.privacy.ledger import fits, spent_adaptively

    budget, others = config.privacy.budget_epsilon, [c for c in others if c.private_set == mine.private_set]
    if budget is None or fits(mine, others, budget):
        return
    before = spent_adaptively(others, mine.delta)
    after = spent_adaptively([*others, mine], mine.delta, above=budget)
    raise UserError(
        f"privacy.budget_epsilon={budget:g}: {_runs(len(others))} on {mine.private_set} spent epsilon "
        f"{before:.4g}, this one would make it {after:.4g}, at delta {mine.delta:g} and for runs that may be "
        f"chosen after seeing earlier ones ({ledger_path(config)}); expected a run that spends less, or a "
        "larger budget"
    )


@contextmanager
def charged(config: Config, plan: PrivacyPlan, folder: Path) -> Iterator[None]:
    """Charges the plan to the ledger before the training begins, and what it began when it ends.

    A job that a cluster will start again, or that is killed, stays charged with its whole plan until it is
    continued and ends; so does, for good, one that fills its budget (`ledger.fills`).

    Args:
        config: the job; public data is not charged.
        plan: of the training.
        folder: the run's private `checkpoint/`; it keeps the run's number.

    Raises UserError when the budget would be passed or the ledger cannot be used.
    """
    from dp_lora.privacy.ledger import Ledger, fills

    if config.data.public:
        yield
        return
    ledger, before = Ledger(ledger_path(config)), _receipt(config, folder)
    known = before.digest if before.ledger == str(ledger.path) else None
    receipt = replace(before, ledger=str(ledger.path), digest=known)
    # The run's number is kept before it is charged, so that a crash in between does not charge it twice.
    _keep(folder, receipt)
    plan_charge = charge_of(config, plan, receipt.run)
    digest = ledger.enter(plan_charge, lambda others: admit(config, plan_charge, others), known)
    _keep(folder, replace(receipt, digest=digest))

    def settle() -> None:
        steps, budget = begun(folder), config.privacy.budget_epsilon
        if budget is not None and plan_charge.private and fills(plan_charge, budget):
            steps = max(steps, plan.steps)
        mechanism = replace(plan_charge.mechanism, steps=steps)
        _keep(folder, replace(receipt, digest=ledger.enter(replace(plan_charge, mechanism=mechanism))))

    try:
        yield
    except Preempted:
        raise
    except BaseException:
        # What went wrong counts, not that a full disk has no room for the correction.
        with suppress(OSError, UserError):
            settle()
        raise
    settle()


def charge_release(config: Config, mechanism: Mechanism, delta: float, folder: Path, number: int) -> None:
    """Charges a release on the set's held-out images, on disk before it is made; once for each `number`.

    Args:
        config: the job; public data is not charged.
        mechanism, delta: of the release.
        folder: the run's private `checkpoint/`.
        number: of the release, from 0, in this run.

    Raises UserError when the budget would be passed or the ledger cannot be used.
    """
    from dp_lora.privacy.ledger import Charge, Ledger

    if config.data.public:
        return
    receipt, ledger = _receipt(config, private_directory(folder)), Ledger(ledger_path(config))
    _keep(folder, receipt)
    private = mechanism.noise_multiplier > 0 and config.privacy.insecure_seed is None
    mine = Charge(f"{receipt.run}-release-{number}", receipt.private_set, mechanism, delta, private)
    if mine not in ledger.charges():
        ledger.enter(mine, lambda others: admit(config, mine, others))


def line_of_all_runs(config: Config, delta: float) -> str | None:
    """What the ledger says of all runs on the job's private set; None when there is one run or none."""
    from dp_lora.privacy.ledger import Ledger, spent, spent_adaptively

    if config.data.public:
        return None
    path, name = ledger_path(config), private_set(config.data.name)
    try:
        charges = [c for c in Ledger(path).charges() if c.private_set == name and c.mechanism.steps]
    except UserError as error:
        return str(error)
    if len(charges) < 2:
        return None
    together, runs = spent(charges, delta), f"{_runs(len(charges))} on {name} together"
    if together.accountant == "none":
        return f"epsilon {together.epsilon:.4g} of {runs}; {path}"
    return (
        f"epsilon {together.epsilon:.4g} at delta {delta:g} ({together.accountant}) of {runs} if all were "
        f"fixed beforehand, {spent_adaptively(charges, delta):.4g} also if later ones were chosen after "
        f"seeing earlier ones; {path}"
    )


def _runs(number: int) -> str:
    return f"{number} run{'s' * (number != 1)}"


def begun(folder: Path) -> int:
    """Number of executions that the write-ahead record in `folder` names."""
    from dp_lora.privacy.executions import Executions

    return Executions(folder / "executions.jsonl", {}, writes=False).count


@dataclass(frozen=True)
class Receipt:
    """What a run keeps of its charge: its number, the set, the ledger, and the digest of its line there."""

    run: str
    private_set: str
    ledger: str | None = None
    digest: str | None = None


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt in a run's private `checkpoint/`; None when it has none."""
    path = folder / RECEIPT
    return Receipt(**read_json(path)) if path.exists() else None


def _receipt(config: Config, folder: Path) -> Receipt:
    """The run's receipt, or that of a new run."""
    return read_receipt(folder) or Receipt(secrets.token_hex(8), private_set(config.data.name))


def _keep(folder: Path, receipt: Receipt) -> None:
    write_json(folder / RECEIPT, asdict(receipt), mode=0o600)
