"""Receipts: a run's charge and plan in its `checkpoint/`, and whether it goes on as it began."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from dp_lora.errors import UserError
from dp_lora.storage.files import Damaged, read_json

if TYPE_CHECKING:
    from dp_lora.privacy.executions import Executions
    from dp_lora.privacy.ledger import Charge
    from dp_lora.privacy.plan import PrivacyPlan

RECEIPT, PLAN = "charge.json", "plan.json"
"""Names of the two files."""

_COMPARED = (
    "num_examples", "steps", "noise_multiplier", "sample_rate", "expected_batch_size", "max_grad_norm",
    "delta", "noise_multiplicity", "clipping", "adjacency", "loss_share",
)  # fmt: skip
"""Fields of a plan with which a run goes on as it began."""


@dataclass(frozen=True)
class Receipt:
    """A run's copy of its charge: its number, the set, the ledger, and the digest of its line there.

    `nonce` is that of its last start or end, `previous` and `index_previous` those that ledger and index had
    before: each has one of them last. Receipts of earlier versions have none of the three, or not the last.
    """

    run: str
    private_set: str
    ledger: str | None = None
    digest: str | None = None
    nonce: str | None = None
    previous: str | None = None
    index: str | None = None
    """Folder of the user's index that has the charge too."""
    index_previous: str | None = None


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt in `folder`; None when it has none. Raises Damaged for a file that is something else."""
    path = folder / RECEIPT
    if not path.exists():
        return None
    found = read_json(path)
    needed, known = {"run", "private_set"}, {field.name for field in fields(Receipt)}
    if not isinstance(found, dict):
        wrong = f"{type(found).__name__} in place of an object"
    elif odd := sorted((needed - found.keys()) | (found.keys() - known)):
        wrong = f"{odd[0]} is {'unknown' if odd[0] in found else 'missing'}"
    elif odd := sorted(
        k for k, v in found.items() if not isinstance(v, str) and (v is not None or k in needed)
    ):
        wrong = f"{odd[0]} is no text"
    else:
        return Receipt(**found)
    raise Damaged(f"{path}: {wrong}; expected the receipt of a charge as this program wrote it")


def check_same_plan(plan: PrivacyPlan, folder: Path) -> None:
    """Raises UserError when the run of the private `folder` began with another plan."""
    path = folder / PLAN
    if not path.exists():
        return
    before, now = read_json(path), plan.to_dict()
    try:
        for name in _COMPARED:
            if now[name] == before[name]:
                continue  # also the number of images, where it is private
            if isinstance(now[name], str) and now[name] != "inf":
                raise UserError(
                    f"{path}: this run began with {name}={before[name]!r} and now has {now[name]!r}"
                )
            if not math.isclose(float(now[name]), float(before[name]), rel_tol=1e-6):
                raise UserError(
                    f"{path}: this run began with {name}={before[name]} and now has {now[name]}: the private "
                    "examples or the plan have changed since; expected the same ones, or another folder "
                    "(of a job: paths.outputs)"
                )
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{path}: no plan of a run; expected what this program wrote there") from error


def check_same_mechanism(charge: Charge, earlier: Iterable[Charge], folder: Path) -> None:
    """Raises UserError when the run was charged with other noise or another sample rate for steps it began.

    A charge takes the place of an earlier one of the same run, so what was begun would be charged as what it
    was not. Of `earlier`, charges of other runs are left out.
    """
    for other in earlier:
        if other.run != charge.run or not other.mechanism.steps:
            continue
        pairs = [
            (charge.mechanism.noise_multiplier, other.mechanism.noise_multiplier),
            (charge.mechanism.sample_rate, other.mechanism.sample_rate),
        ]
        # But for the rounding of a calibration.
        if charge.private != other.private or not all(math.isclose(a, b, rel_tol=1e-6) for a, b in pairs):
            raise UserError(
                f"{folder}: this run began with {_told(other)} and now has {_told(charge)}; expected what it "
                "began with, or another paths.outputs"
            )


def _told(charge: Charge) -> str:
    noise, rate = charge.mechanism.noise_multiplier, charge.mechanism.sample_rate
    return f"noise multiplier {noise:g}, sample rate {rate:g}{'' if charge.private else ', no privacy'}"


def check_begun(folder: Path) -> None:
    """Raises UserError when the private `folder` holds what only begun steps leave, and no record of them."""
    record = folder / "executions.jsonl"
    left = next((name for name in ("state.pt", "finished") if (folder / name).exists()), None)
    if left is not None and (not record.exists() or not record.stat().st_size):
        raise UserError(
            f"{record}: is not there or empty, and {left} beside it is of steps that were begun: they would "
            f"be released and not counted. Bring it back; or remove {folder}: the same command then begins a "
            "new run, charged in full"
        )


def check_lineage(executions: Executions, finished: int, lineage: str, folder: Path) -> None:
    """Raises UserError unless `executions` are on record that led to the state of the private `folder`.

    Args:
        executions: the record.
        finished: number of steps behind the state.
        lineage: of the state.
        folder: where both lie.
    """
    if not executions.lead_to(finished, lineage):
        raise UserError(
            f"{folder / 'state.pt'}: the {finished} steps that led to it are not in the executions.jsonl "
            "beside it: it is of another run or version, or the record was cut, and they would be released "
            f"and not counted. Bring back what belongs together; or remove {folder}: the same command then "
            "begins a new run, charged in full"
        )


def check_record(begun: int, settled: int, folder: Path) -> None:
    """Raises UserError when the record in `folder` names fewer executions than the run had begun before.

    That is what an earlier end of it left in ledger and index, what its privacy.json states, and at least
    one where there is a state (`check_begun`).

    Args:
        begun: the executions that it names.
        settled: those that were on record at that end, by ledger and index.
        folder: the run's private `checkpoint/`.
    """
    check_begun(folder)
    if begun < settled:
        raise UserError(
            f"{folder / 'executions.jsonl'}: names {begun} executions, and this run ended with at least "
            f"{settled} by its ledger: the record was removed or cut, and what is begun without it would not "
            f"be charged. Bring it back; or remove {folder}: the same command then begins a new run, charged "
            "in full"
        )
    path = folder.parent / "privacy.json"
    found = read_json(path) if path.exists() else {}
    stated = found.get("steps", 0) if isinstance(found, dict) else 0
    # A directory whose `checkpoint/` was removed begins a new run, whose privacy.json is another one.
    if (folder / PLAN).exists() and isinstance(stated, int) and begun < stated:
        raise UserError(
            f"{folder / 'executions.jsonl'}: names {begun} executions, and {path.name} states {stated}: the "
            f"record was removed or cut, and what was begun would not be counted. Bring it back; or remove "
            f"{folder}: the same command then begins a new run, charged in full"
        )
