"""The privacy bill: what all runs on a private set spend together, failed and partial ones included.

Every run looks at the same people's images, so their mechanisms compose: a table of twelve runs of epsilon 10
does not cost epsilon 10. The bill counts the steps that each run began, by its write-ahead record; a run
without privacy makes it infinite. Beside it stands what it would cost to release only the best of so many
runs (`dp_lora.privacy.selection`), and what the ledger beside the data counts over all time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dp_lora.config.schema import ADJACENCIES
from dp_lora.errors import UserError
from dp_lora.jobs.begun import begun_by_all, releases_of
from dp_lora.jobs.image_index import ImageIndex
from dp_lora.jobs.spending import (
    may_be_one_set,
    private_set,
)
from dp_lora.privacy.accounting import MANY, composed
from dp_lora.privacy.ledger import Charge, Ledger, Uncovered, spent, spent_adaptively
from dp_lora.privacy.renyi import epsilon_of_divergences, renyi_divergences
from dp_lora.privacy.selection import SEARCHED_BY, best_of
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import json_ready
from sweeps.charged import Run, read

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
    unit: str = "image"
    """Whom the epsilons are for: a person where all runs protect persons, else one image."""
    searches: int = 0
    """Private searches among the runs with privacy, each counted as a whole."""
    runs_for_persons: int = 0
    """Runs with privacy that protect a person with all of their images."""
    images_per_person: int | None = None
    """The most images that one person has, as the owner of the set states it."""
    other_epsilon: float | None = None
    """Epsilon of the runs with privacy together for the other unit (`dp_lora.privacy.units`), where runs of
    both kinds are there, all protect persons, or `images_per_person` is stated; inf: no bound."""

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
                *self._of_the_other_unit(private),
            ]
        if self.searches:
            found = f"{self.searches} private search{'es' * (self.searches != 1)} among them"
            lines.append(
                f"{found}, counted by Renyi divergences with all trials, for somebody in the training and "
                "among the held-out images"
            )
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

    def _of_the_other_unit(self, private: int) -> list[str]:
        """What the runs spend on whom they do not protect, and on the others where they protect both."""
        if self.other_epsilon is None:
            return []
        as_group = "as the replacement of that person's record: two persons by group privacy"
        spent = f"epsilon {self.other_epsilon:.4g} at delta {self.delta:g}"
        if self.unit == "person":
            return [f"for one image: {spent}, since a run for persons covers an image {as_group}"]
        singles = f"runs for single images ({private - self.runs_for_persons})"
        lines = []
        if self.runs_for_persons:
            lines.append(f"runs for persons ({self.runs_for_persons}) count for one image {as_group}")
        if self.images_per_person is None:
            lines.append(
                f"for a person with all of their images: not bounded, because of {singles}; "
                "--images-per-person states the most that a person has"
            )
        else:
            most = self.images_per_person
            lines.append(
                f"for a person with at most {most} images, as stated: {spent}, with {singles} counted as "
                f"{most} images at once (mixture of Gaussians)"
            )
        return lines

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


def bill(directories: Sequence[Path], images_per_person: int | None = None) -> Bill:
    """The bill of these run directories; one that does not exist, or has begun no step, costs nothing.

    images_per_person: the most images that one person has, where the owner of the sets states it.

    Raises UserError for a directory that holds a trained adapter and does not say what was spent on it, for
    files that cannot be read, and for a ledger that was edited.
    """
    copies: dict[str, list[Run]] = {}
    for directory in dict.fromkeys(directories):
        if (run := read(directory)) is not None:
            copies.setdefault(run.charge.run, []).append(run)
    runs = _with_earlier(_by_shared_images([_united(of_one) for of_one in copies.values()]))
    return _bill(runs, images_per_person)


def _with_earlier(runs: Sequence[Run]) -> list[Run]:
    """The runs, and the earlier trainings that their adapters tell of, wherever their directories are."""
    known = {run.charge.run for run in runs}
    # A run that is billed tells of its own releases.
    known |= {f"{run.charge.run}-release-{number}" for run in runs for number in range(len(run.releases))}
    behind = {one.run: Run(run.owner, one) for run in runs for one in run.earlier if one.run not in known}
    return [*runs, *behind.values()]


def _by_shared_images(runs: Sequence[Run]) -> list[Run]:
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
    return _bill([Run(charge.private_set, charge) for charge in charges])


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
        if row.get("accountant") == SEARCHED_BY:
            raise UserError(
                f"{row['directory']}: is the winner of a private search, which a table does not tell; "
                "expected its run directory: python -m sweeps bill"
            )
        mechanism = Mechanism(float(row["noise_multiplier"]), float(row["sample_rate"]), steps)
        private = mechanism.noise_multiplier > 0 and not row["reproducible_noise"]
        unit = "person" if " one person" in str(row.get("adjacency")) else "image"
        name, delta = private_set(row["data"]), float(row["delta"])
        charges.append(Charge(f"{number}", name, mechanism, delta, private, unit))
    return planned(charges)


def _united(copies: Sequence[Run]) -> Run:
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


def _bill(runs: Sequence[Run], images_per_person: int | None = None) -> Bill:
    owners: dict[str, list[Run]] = {}
    for run in runs:
        owners.setdefault(run.owner, []).append(run)
    names = [of_one[0].charge.private_set for of_one in owners.values()]
    bills = []
    for number, of_one in enumerate(owners.values()):
        name = names[number]
        # Two folders of one's own are told apart without saying where they are.
        shown = name if names.count(name) == 1 else f"{name} {names[: number + 1].count(name)}"
        bills.append(_bill_of_set(shown, of_one, images_per_person))
    return Bill(tuple(bills))


def _bill_of_set(name: str, runs: Sequence[Run], images_per_person: int | None) -> SetBill:
    private = [run for run in runs if run.charge.private]
    delta = min(run.charge.delta for run in private or runs)
    kinds = {run.charge.unit for run in private}
    unit = "person" if kinds == {"person"} else "image"
    parts = [part for run in private for part in run.charges]
    of_private = spent(parts, delta, unit)
    searches = [run for run in private if run.charge.search is not None]
    selection = None
    if len(kinds) == 1 and not searches:
        selection = best_of([run.mechanisms for run in private], delta)
    other = None
    if "person" in kinds or (private and images_per_person is not None):
        asked = "image" if unit == "person" else "person"
        other = spent(parts, delta, asked, images_per_person).epsilon
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
        adjacency=ADJACENCIES["zero_out"].format(unit=unit),
        best_of_epsilon=selection.epsilon if selection else None,
        best_of_distribution=selection.distribution if selection else None,
        adaptive_epsilon=spent_adaptively(parts, delta, unit=unit) if len(private) > 1 else None,
        unit=unit,
        searches=len(searches),
        runs_for_persons=sum(run.charge.unit == "person" for run in private),
        images_per_person=images_per_person,
        other_epsilon=other,
        **_ledgers(runs, delta, unit),
    )


def _largest(runs: Sequence[Run], delta: float) -> float:
    """Epsilon of the run that spent most; rdp alone where there are many different ones."""
    largest = max((run.charge.search.epsilon(delta) for run in runs if run.charge.search), default=0.0)
    distinct = {run.mechanisms for run in runs if run.charge.search is None}
    by_rdp = sorted(
        ((epsilon_of_divergences(renyi_divergences(one), delta), one) for one in distinct), reverse=True
    )
    if len(distinct) > MANY:
        return max(largest, by_rdp[0][0])
    for bound, one in by_rdp:
        # `composed` is at most the rdp bound, and takes much longer.
        if bound <= largest:
            break
        largest = max(largest, composed(one, delta).epsilon)
    return largest


def _ledgers(runs: Sequence[Run], delta: float, unit: str) -> dict[str, Any]:
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
        "ledger_epsilon": spent(list(counted.values()), delta, unit).epsilon,
        "ledger_adaptive_epsilon": spent_adaptively(list(counted.values()), delta, unit=unit),
        "ledger_uncovered": uncovered,
    }


def _on_these_images(charges: Sequence[_Line], runs: Sequence[Run], charged: Sequence[Run]) -> list[_Line]:
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


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
