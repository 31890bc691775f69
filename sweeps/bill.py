"""The privacy bill: what all runs on a private set spend together, failed and partial ones included.

Every run looks at the same people's images, so their mechanisms compose: a table of twelve runs of epsilon 10
does not cost epsilon 10. The bill counts the steps that each run began, by its write-ahead record; a run
without privacy makes it infinite. Beside it stands what it would cost to release only the best of so many
runs (`dp_lora.privacy.selection`), and what the ledger beside the data counts over all time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dp_lora.config.schema import ADJACENCIES
from dp_lora.errors import UserError
from dp_lora.jobs.begun import begun, begun_by_all, releases_of
from dp_lora.jobs.image_index import ImageIndex
from dp_lora.jobs.reuse import START, taken
from dp_lora.jobs.spending import (
    is_beside,
    ledger_beside,
    may_be_one_set,
    private_set,
)
from dp_lora.privacy.accounting import MANY, composed
from dp_lora.privacy.ledger import Charge, Ledger, Uncovered, spent, spent_adaptively
from dp_lora.privacy.renyi import epsilon_of_divergences, least_budget, renyi_divergences
from dp_lora.privacy.selection import best_of
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import json_ready, read_json
from dp_lora.training.receipts import read_receipt
from sweeps.folders import read_settings

_Line = TypeVar("_Line", Charge, Uncovered)


@dataclass(frozen=True)
class SetBill:
    """The privacy spent on one private set. Epsilons are upper bounds for `delta`; inf: no guarantee."""

    private_set: str
    runs: int
    """That began at least one step."""
    runs_without_privacy: int
    """Of them, those without noise or with noise from a seed."""
    steps: int
    epsilon: float
    """Epsilon of all runs together."""
    private_epsilon: float
    """Epsilon of the runs with privacy together."""
    largest_epsilon: float
    """The largest epsilon of a single run with privacy."""
    delta: float
    """The smallest of the runs' own."""
    accountant: str
    adjacency: str
    best_of_epsilon: float | None
    """Epsilon of releasing only the best of a random number of runs; None without a run with privacy."""
    best_of_distribution: str | None
    ledger: str | None = None
    """Its file name."""
    ledger_runs: int | None = None
    ledger_epsilon: float | None = None
    """Epsilon of all runs that the ledger counts for this set."""
    adaptive_epsilon: float | None = None
    """Epsilon of the runs with privacy together, even if later ones were chosen after seeing earlier ones."""
    ledger_adaptive_epsilon: float | None = None
    """The same for all runs that the ledger counts."""
    ledger_uncovered: int = 0
    """Uses of the set in the ledger that no epsilon covers, and none of these counts."""

    def lines(self) -> list[str]:
        """The bill in words, each number with what it needs to be read."""
        private = self.runs - self.runs_without_privacy
        lines = [f"{_count(self.runs, 'run')}, {_count(self.steps, 'step')} on the same images"]
        if self.runs_without_privacy:
            lines.append(
                f"{self.runs_without_privacy} without privacy (no noise, or noise from a seed): all together "
                "have no guarantee, epsilon inf"
            )
        if private:
            them = "all" if private == self.runs else f"the other {private}"
            lines += [
                f"{them} together: epsilon {self.private_epsilon:.4g} {self._reading()}"
                + self._adaptively(self.adaptive_epsilon),
                f"the largest of one run alone: epsilon {self.largest_epsilon:.4g} at delta {self.delta:g}",
            ]
        if self.best_of_epsilon is not None:
            lines.append(
                f"if only the best of K runs were released: epsilon {self.best_of_epsilon:.4g} at delta "
                f"{self.delta:g} (rdp; Papernot and Steinke 2022), for K random with mean {private} "
                f"({self.best_of_distribution}), each run of a cell drawn at random, and a score that is "
                "private itself; these runs were not made that way"
            )
        if self.ledger_runs is not None and self.ledger_epsilon is not None:
            lines.append(
                f"the ledger counts {_count(self.ledger_runs, 'run')} over all time: epsilon "
                f"{self.ledger_epsilon:.4g} at delta {self.delta:g}"
                f"{self._adaptively(self.ledger_adaptive_epsilon)}"
            )
        if self.ledger_uncovered:
            lines.append(
                f"the ledger names {_count(self.ledger_uncovered, 'use')} of the images that no epsilon "
                "covers: metrics without noise; no epsilon here counts them"
            )
        return [f"{self.private_set}: {line}" for line in lines]

    def _reading(self) -> str:
        return f"at delta {self.delta:g} ({self.accountant}; {self.adjacency})"

    def _adaptively(self, epsilon: float | None) -> str:
        if epsilon is None or not math.isfinite(epsilon):
            return ""
        return (
            f" if all were fixed beforehand, {epsilon:.4g} also if later runs were chosen after seeing "
            "earlier ones (Renyi filter)"
        )


@dataclass(frozen=True)
class Bill:
    """The privacy spent on each private set."""

    sets: tuple[SetBill, ...]

    def lines(self) -> list[str]:
        """The bill in words."""
        lines = [line for one in self.sets for line in one.lines()]
        return lines or ["no run has taken a step on private data"]

    def to_dict(self) -> dict[str, Any]:
        """The bill for JSON; infinite numbers as the string inf."""
        record: dict[str, Any] = json_ready({"sets": [asdict(one) for one in self.sets]})
        return record


@dataclass(frozen=True)
class _Run:
    """A run that began at least one step on private data."""

    owner: str
    """Tells the private sets apart: the name, or for a folder of one's own its ledger."""
    charge: Charge
    releases: tuple[Mechanism, ...] = ()
    """On held-out images, each of which may be of somebody who is in the training too."""
    ledger: Path | None = None
    digest: str | None = None
    checkpoint: Path | None = None
    """The private folder, where it can be read: it tells which steps and releases copies have in common."""
    index: Path | None = None
    """The user's index of images, which knows whether its images are in other sets too."""
    place: Path | None = None
    """The ledger that it was charged to, or would be by its settings."""
    own: bool = False
    """Whether its images are from a place that `data.source` names."""
    beside: bool = False
    """Whether its ledger lies beside them, so that all that is charged there is on one set."""
    copies: tuple[_Run, ...] = ()
    """The other copies of its directory, which may be charged to another ledger."""
    earlier: tuple[Charge, ...] = ()
    """The trainings on the same images from whose adapter it started."""

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """All that the run released."""
        return (self.charge.mechanism, *self.releases)


def bill(directories: Sequence[Path]) -> Bill:
    """The bill of these run directories; one that does not exist, or has begun no step, costs nothing.

    Raises UserError for a directory that holds a trained adapter and does not say what was spent on it, for
    files that cannot be read, and for a ledger that was edited.
    """
    copies: dict[str, list[_Run]] = {}
    for directory in dict.fromkeys(directories):
        if (run := _read(directory)) is not None:
            copies.setdefault(run.charge.run, []).append(run)
    return _bill(_with_earlier(_by_shared_images([_united(of_one) for of_one in copies.values()])))


def _with_earlier(runs: Sequence[_Run]) -> list[_Run]:
    """The runs, and the earlier trainings that their adapters tell of, wherever their directories are."""
    known = {run.charge.run for run in runs}
    behind = {one.run: _Run(run.owner, one) for run in runs for one in run.earlier if one.run not in known}
    return [*runs, *behind.values()]


def _by_shared_images(runs: Sequence[_Run]) -> list[_Run]:
    """The runs, with one owner for all sets that share images, whatever these are called."""
    folders = {run.index for run in runs if run.index is not None}
    shared = {run: name for folder in folders for run, name in ImageIndex(folder).set_of_runs().items()}
    above: dict[str, str] = {}

    def top(name: str) -> str:
        return top(above[name]) if name in above else name

    def join(owner: str, name: str) -> None:
        if top(owner) != top(name):
            above[top(owner)] = top(name)

    for run in runs:
        if run.charge.run in shared:
            join(run.owner, f"images {shared[run.charge.run]}")
        # Whatever preset read the images; in a ledger of several sets only the index could tell them apart.
        if run.place is not None and (run.beside or (run.own and run.charge.run not in shared)):
            join(run.owner, str(run.place))
    first: dict[str, str] = {}
    return [replace(run, owner=first.setdefault(top(run.owner), run.owner)) for run in runs]


def planned(charges: Iterable[Charge]) -> Bill:
    """The bill of runs that are still to be made: `dp_lora.jobs.spending.charge_of` their configurations."""
    return _bill([_Run(charge.private_set, charge) for charge in charges])


def of_rows(rows: Iterable[Mapping[str, Any]]) -> Bill:
    """The bill of the rows of a frame that `collect` wrote, where the run directories are not at hand.

    A row does not say whether its data is public, so that all are counted; one that has begun no step costs
    nothing. A run that is not done may have begun a step more than its row says.
    """
    charges = []
    for number, row in enumerate(rows):
        if not row["steps"] or row["sample_rate"] is None:
            continue
        steps = int(row["steps"])
        if row["state"] != "done":
            steps = min(steps + 1, int(row["planned_steps"]))
        mechanism = Mechanism(float(row["noise_multiplier"]), float(row["sample_rate"]), steps)
        private = mechanism.noise_multiplier > 0 and not row["reproducible_noise"]
        charges.append(Charge(f"{number}", private_set(row["data"]), mechanism, float(row["delta"]), private))
    return planned(charges)


def _united(copies: Sequence[_Run]) -> _Run:
    """One run of all `copies` of its directory, with every step and release that one of them made.

    Copies have in common what their records had when they were made. What they did after that counts for
    each of them: whether it drew the same noise cannot be seen.
    """
    last = copies[-1]
    folders = [copy.checkpoint for copy in copies if copy.checkpoint is not None]
    if len(copies) == 1 or len(folders) < len(copies):
        return last
    steps = max(begun_by_all(folders), *(copy.charge.mechanism.steps for copy in copies))
    releases = {json.dumps(one, sort_keys=True): one for folder in folders for one in releases_of(folder)}
    mechanisms = tuple(Mechanism(float(one["noise_multiplier"]), 1.0, 1) for one in releases.values())
    # Where the folder is gone to which they were written, a run's own statement has them.
    mechanisms = max((mechanisms, *(copy.releases for copy in copies)), key=len)
    whole = replace(last.charge, mechanism=replace(last.charge.mechanism, steps=steps))
    return replace(last, charge=whole, releases=mechanisms, copies=tuple(copies[:-1]))


def _bill(runs: Sequence[_Run]) -> Bill:
    owners: dict[str, list[_Run]] = {}
    for run in runs:
        owners.setdefault(run.owner, []).append(run)
    names = [of_one[0].charge.private_set for of_one in owners.values()]
    bills = []
    for number, of_one in enumerate(owners.values()):
        name = names[number]
        # Two folders of one's own are told apart without saying where they are.
        shown = name if names.count(name) == 1 else f"{name} {names[: number + 1].count(name)}"
        bills.append(_bill_of_set(shown, of_one))
    return Bill(tuple(bills))


def _bill_of_set(name: str, runs: Sequence[_Run]) -> SetBill:
    private = [run for run in runs if run.charge.private]
    delta = min(run.charge.delta for run in private or runs)
    of_private = composed([part for run in private for part in run.mechanisms], delta)
    selection = best_of([run.mechanisms for run in private], delta) if private else None
    return SetBill(
        private_set=name,
        runs=len(runs),
        runs_without_privacy=len(runs) - len(private),
        steps=sum(run.charge.mechanism.steps for run in runs),
        epsilon=of_private.epsilon if len(private) == len(runs) else math.inf,
        private_epsilon=of_private.epsilon,
        largest_epsilon=_largest(private, delta),
        delta=delta,
        accountant=of_private.accountant if private else "none",
        # What is stated of all: a run whose relation is add_or_remove keeps this promise too.
        adjacency=ADJACENCIES["zero_out"],
        best_of_epsilon=selection.epsilon if selection else None,
        best_of_distribution=selection.distribution if selection else None,
        adaptive_epsilon=_adaptively(private, delta),
        **_ledgers(runs, delta),
    )


def _adaptively(runs: Sequence[_Run], delta: float) -> float | None:
    """The smallest budget that has room for two or more runs that were chosen one after the other."""
    if len(runs) < 2:
        return None
    return least_budget(renyi_divergences([part for run in runs for part in run.mechanisms]), delta)


def _largest(runs: Sequence[_Run], delta: float) -> float:
    """Epsilon of the run that spent most; rdp alone where there are many different ones."""
    distinct = {run.mechanisms for run in runs}
    by_rdp = sorted(
        ((epsilon_of_divergences(renyi_divergences(one), delta), one) for one in distinct), reverse=True
    )
    if len(distinct) > MANY:
        return by_rdp[0][0]
    largest = 0.0
    for bound, one in by_rdp:
        # `composed` is at most the rdp bound, and takes much longer.
        if bound <= largest:
            break
        largest = max(largest, composed(one, delta).epsilon)
    return largest


def _ledgers(runs: Sequence[_Run], delta: float) -> dict[str, Any]:
    """The entries of these runs' ledgers on their set; empty if no ledger can be seen."""
    counted, uncovered = dict[tuple[str, str], Charge](), 0
    runs = [one for run in runs for one in (run, *run.copies)]
    paths = sorted({run.ledger for run in runs if run.ledger is not None and run.ledger.exists()})
    for path in paths:
        ledger = Ledger(path)
        expected = {run.digest for run in runs if run.ledger == path and run.digest is not None}
        if not expected <= ledger.digests():
            raise UserError(
                f"{path}: lines of runs that were charged here are not there: the ledger was edited or "
                "replaced; expected the file as it was written"
            )
        charged = [run for run in runs if run.ledger == path]
        # A copy that was charged to another ledger has the number of the run that it was copied from.
        place = str(path.resolve())
        counted.update(
            ((place, c.run), c)
            for c in _on_these_images(ledger.charges(), runs, charged)
            if c.mechanism.steps
        )
        uncovered += len(_on_these_images(ledger.uncovered(), runs, charged))
    if not counted:
        return {}
    return {
        "ledger": ", ".join(dict.fromkeys(path.name for path in paths)),
        "ledger_runs": len(counted),
        "ledger_epsilon": spent(list(counted.values()), delta).epsilon,
        "ledger_adaptive_epsilon": spent_adaptively(list(counted.values()), delta),
        "ledger_uncovered": uncovered,
    }


def _on_these_images(charges: Sequence[_Line], runs: Sequence[_Run], charged: Sequence[_Run]) -> list[_Line]:
    """The `charges` of a ledger that are on the images of `runs`, or may be; `charged` are in it.

    The same choice as `dp_lora.jobs.spending.Books` makes for a job.
    """
    if any(run.beside for run in charged):
        return list(charges)
    folders = {run.index for run in runs if run.index is not None}
    seen = {
        run: name for folder in folders for run, name in ImageIndex(folder).set_of_runs(seen=True).items()
    }
    here = {seen.get(run.charge.run) for run in runs}
    # Where it is not known of a run which images it had, no other can be told from it.
    apart = set() if None in here else {run for run, name in seen.items() if name not in here}
    names = {run.charge.private_set for run in runs}
    own = {run.charge.private_set for run in charged if run.own}
    return [
        c
        for c in charges
        if c.private_set in names
        or (
            c.run not in apart and any(may_be_one_set(name, c.private_set, own=name in own) for name in names)
        )
    ]


def _read(directory: Path) -> _Run | None:
    """The run in this directory; None when it has begun no step, or its data is public."""
    try:
        return _read_files(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory}: what this run spent cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); expected the privacy.json and config.yaml of a run"
        ) from error


def _read_files(directory: Path) -> _Run | None:
    checkpoint, privacy = directory / "checkpoint", _optional(directory / "privacy.json")
    visible = os.access(checkpoint, os.R_OK | os.X_OK)
    plan = privacy or (_optional(checkpoint / "plan.json") if visible else {})
    steps = _steps(checkpoint, privacy, visible=visible)
    if not plan or not steps:
        if (directory / "adapter").exists():
            raise UserError(
                f"{directory}: holds an adapter and no privacy.json; expected the record of what was spent"
            )
        return None
    receipt = read_receipt(checkpoint) if visible else None
    trained = taken(directory) if visible else None
    if trained is not None:
        # The same run to ledger and bill: its training counts once, and its releases are kept with it.
        receipt = trained.receipt
        if trained.directory.is_dir():
            checkpoint = trained.directory / "checkpoint"
    config = _settings(directory)
    if receipt is None and config["data"]["public"]:
        return None
    name = private_set(config["data"]["name"]) if receipt is None else receipt.private_set
    ledger = Path(receipt.ledger) if receipt is not None and receipt.ledger is not None else None
    source = config.get("data", {}).get("source")
    place = ledger
    if place is None and source is not None and Path(source).expanduser().exists():
        place = ledger_beside(source)
    seeded = privacy["reproducible_noise"] if privacy else config["privacy"]["insecure_seed"] is not None
    mechanism = Mechanism(float(plan["noise_multiplier"]), float(plan["sample_rate"]), steps)
    return _Run(
        owner=name if name != "imagefolder" else str(ledger or ledger_beside(config["data"]["source"])),
        charge=Charge(
            receipt.run if receipt is not None else str(directory.resolve()),
            name,
            mechanism,
            float(plan["delta"]),
            private=mechanism.noise_multiplier > 0 and not seeded,
        ),
        releases=_releases(privacy),
        ledger=ledger,
        place=place,
        own=source is not None,
        beside=place is not None and is_beside(place, source),
        digest=receipt.digest if receipt is not None else None,
        checkpoint=checkpoint if visible else None,
        index=Path(receipt.index) if receipt is not None and receipt.index is not None else None,
        earlier=_earlier(directory, name, privacy, visible=visible),
    )


def _earlier(directory: Path, name: str, privacy: Mapping[str, Any], *, visible: bool) -> tuple[Charge, ...]:
    """The trainings on the same images that the adapter of a run descends from, by its own records."""
    path = directory / "checkpoint" / START
    found = read_json(path)["trainings"] if visible and path.exists() else ()
    listed = [one for one in found if one["same_images"]] or privacy.get("earlier_trainings", ())
    return tuple(
        Charge(
            one.get("run") or f"{directory.resolve()} {number}",
            name,
            Mechanism(float(one["noise_multiplier"]), float(one["sample_rate"]), int(one["steps"])),
            float(privacy["delta"]),
            one.get("private", float(one["noise_multiplier"]) > 0),
        )
        for number, one in enumerate(listed)
    )


def _settings(directory: Path) -> dict[str, Any]:
    try:
        return read_settings(directory)
    except UserError as error:
        raise ValueError(str(error)) from error


def _steps(checkpoint: Path, privacy: Mapping[str, Any], *, visible: bool) -> int:
    """Number of steps that a run began.

    Without its write-ahead record, which is its owner's, a run that was cut off may have begun one step
    more than privacy.json says.
    """
    if privacy.get("complete", False):
        return int(privacy["steps"])
    if visible and (checkpoint / "executions.jsonl").exists():
        return begun(checkpoint)
    return min(privacy["steps"] + 1, privacy["planned_steps"]) if privacy else 0


def _releases(privacy: Mapping[str, Any]) -> tuple[Mechanism, ...]:
    """Metrics on held-out images within a budget of their own (`evaluation.release=dp`)."""
    release = privacy.get("release")
    if release is None:
        return ()
    # Earlier versions name the last one, in whose run all were alike.
    noise = release.get("noise_multipliers", [release["noise_multiplier"]] * int(release["releases"]))
    return tuple(Mechanism(float(one), 1.0, 1) for one in noise)


def _optional(path: Path) -> dict[str, Any]:
    record = read_json(path) if path.exists() else {}
    if not isinstance(record, dict):
        raise TypeError(f"{path.name}: expected an object, found {type(record).__name__}")
    return record


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
