"""The ledger of a private set: a file beside it that says what was spent, and is only ever added to.

Each line is a JSON object and holds what a run costs the set: its mechanism with the steps that it began, or
may still begin. A run is entered before its first step with all the steps of its plan, and again at its end
with those that it began; its last line counts, so that a run that is resumed is charged once. Nothing is in
it but numbers that privacy.json has too, the set's public name, and random numbers: one for each run, and one
for each of its starts and ends, its nonce.

Guarantees:
    * Two processes that write at once both succeed, one after the other (flock), and what is written is on
      the disk before a step begins (fsync).
    * A process that dies while it writes leaves half a line at the end, which every reader leaves out and
      the next writer removes; the run of that line has not begun a step.
    * Each line holds a digest of itself and of the line before. A line that was changed, removed or put in
      between is noticed. Lines missing at the end are noticed by the runs that they belong to, which keep
      the digest of theirs; a ledger with a head, a file that names its last line, notices them itself.
    * A run goes on only from where the ledger saw it last: of two copies of a run directory one goes on, and
      so neither the steps of the other nor those behind an older state that was brought back go uncharged.
      While a run is open, a mark beside the ledger says how far it has come (`privacy.marks`).
    * A use that no epsilon covers has a line of its own, which is no charge: it counts zero steps to whoever
      reads it as one, as earlier versions do.
    * A private search has one number, whose lines give its Renyi divergences: they follow from its plan, so
      that neither the lines nor how many there are tell how many trials it drew.
    * The end of a training says how many executions were on record, so that a record which was removed or
      cut since is noticed, and with how many it was charged, which is never taken back.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from dp_lora.errors import UserError
from dp_lora.privacy import units
from dp_lora.privacy.accounting import Spent
from dp_lora.privacy.marks import Mark, Superseded
from dp_lora.privacy.renyi import Array, admits, epsilon_of_divergences, least_budget, renyi_divergences
from dp_lora.privacy.selection import Search
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import append_line, read_lines, write_atomic

FILTER = "Renyi filter"
"""Bounds the epsilon of runs that were chosen after seeing earlier ones; named in place of an accountant."""

SEARCHED = Mechanism(0.0, 1.0, 1)
"""Stands in the charge of a search where another one has its steps. It has no noise, so that whoever does not
know of searches, as earlier versions do not, counts an infinite epsilon."""

PATIENCE_S = 300.0
"""How long to wait for a ledger that others write to, each of them for less than a second."""


@dataclass(frozen=True)
class Charge:
    """The cost of one run to a private set."""

    run: str
    """A random number of the run's own; it outlives restarts, not the removal of the run directory."""
    private_set: str
    mechanism: Mechanism
    """With the steps that were begun, or may still be."""
    delta: float
    private: bool = True
    """False without noise, and with noise that a seed in the configuration gives away."""
    unit: str = "image"
    """What the run protects: one image, or one person with all of their images."""
    search: Search | None = None
    """Of a private search, which is charged as a whole; its `mechanism` is `SEARCHED`."""


@dataclass(frozen=True)
class Uncovered:
    """A use of a private set that no epsilon covers, as its owner chose it: metrics without noise."""

    run: str
    """The number of the run whose images were compared."""
    private_set: str
    use: str
    """Names the use among those of the run: the same one is entered once."""
    by: tuple[str, ...]
    """The extractors and classifiers that saw private images."""


class Turn(NamedTuple):
    """A start or an end of a run, by which the ledger tells the run from its copies."""

    owner: str
    """The number of the run."""
    nonce: str
    """A random number, which the run keeps in its directory before the ledger has it."""
    follows: Collection[str]
    """What the run's last nonce in the ledger may be: one that this directory knows for its own."""
    progress: int | None = None
    """Bytes of the write-ahead record of a run that begins or goes on; None at its end."""
    begun: int | None = None
    """Executions on record at the end of a training; None at a start, and around a release."""


class Settled(NamedTuple):
    """The largest counts that the ends of a run's trainings left."""

    steps: int = 0
    """With which the run was charged."""
    begun: int = 0
    """Executions on record. Lines of earlier versions say no more than whether there was one."""


class CutShort(UserError):
    """The line that a ledger's head names is not there."""


def spent(
    charges: Sequence[Charge], delta: float, unit: str = "image", images_per_person: int | None = None
) -> Spent:
    """Epsilon of all `charges` together for `delta`; infinite if one of them has no privacy.

    The composition is that of mechanisms that were fixed before the first of them; see `spent_adaptively`.

    Args:
        charges: of runs that protect either unit.
        delta: in (0, 1).
        unit: whom epsilon is for, whatever each run protects (`dp_lora.privacy.units`).
        images_per_person: the most images of one person, as the set's owner states it.
    """
    if any(not charge.private and charge.mechanism.steps for charge in charges):
        return Spent(math.inf, "none")
    if any(charge.search is not None for charge in charges):
        return Spent(epsilon_of_divergences(_divergences(charges, unit), delta), "rdp")
    images, persons = by_unit(charges)
    if unit == "person":
        return units.epsilon_of_person(images, persons, delta, images_per_person)
    return units.epsilon_of_image(images, persons, delta)


def spent_adaptively(
    charges: Sequence[Charge], delta: float, above: float = 0.0, unit: str = "image"
) -> float:
    """The smallest budget above `above` that has room for all `charges`, each chosen after those before it.

    At least epsilon of `spent`; infinite if one of them has no privacy, or none for the `unit`.
    """
    if any(not charge.private and charge.mechanism.steps for charge in charges):
        return math.inf
    return least_budget(_divergences(charges, unit), delta, above)


def by_unit(charges: Sequence[Charge]) -> tuple[list[Mechanism], list[Mechanism]]:
    """The mechanisms of runs that protect an image, and of those that protect a person, without searches."""
    found: dict[str, list[Mechanism]] = {"image": [], "person": []}
    for charge in charges:
        if charge.mechanism.steps and charge.search is None:
            found[charge.unit].append(charge.mechanism)
    return found["image"], found["person"]


def _divergences(charges: Sequence[Charge], unit: str) -> Array:
    """Renyi divergences of all `charges` together for one `unit`; inf where a run does not bound it."""
    images, persons = by_unit(charges)
    searches = [(charge.unit, charge.search.divergences()) for charge in charges if charge.search is not None]
    if unit == "image":
        total = units.divergences_of_image(images, persons)
        return sum((units.divergences_for_image(of, one) for of, one in searches), total)
    total = renyi_divergences(persons) + (math.inf if images else 0.0)
    return sum((one if of == "person" else one + math.inf for of, one in searches), total)


def fits(charge: Charge, others: Sequence[Charge], budget: float) -> bool:
    """Whether the budget of epsilon, at the smallest delta of all, has room for `charge` after `others`.

    Guarantee: everything that is released is (budget, that delta)-private, even if each run is chosen with a
    look at what the earlier ones released, for a budget and a delta that were fixed before the first. The
    Renyi filter has room (`dp_lora.privacy.renyi.admits`), or `fills` and there are no others. A budget is a
    pair of numbers: who asks with a larger delta of their own is judged at the smallest all the same.
    """
    if any(not c.private and c.mechanism.steps for c in (charge, *others)):
        return False
    others = [c for c in others if c.mechanism.steps]
    divergences = _divergences([charge, *others], charge.unit)
    delta = smallest_delta(charge, others)
    return admits(divergences, budget, delta) or (not others and fills(charge, budget))


def smallest_delta(charge: Charge, others: Sequence[Charge]) -> float:
    """The smallest delta of `charge` and of those `others` that spent something: a budget is judged at it."""
    return min([charge.delta, *(c.delta for c in others if c.mechanism.steps)])


def fills(charge: Charge, budget: float) -> bool:
    """Whether a first run fits into a budget by its epsilon, and leaves the filter no room for any other.

    Its steps are fixed before anything was seen. So that no other run is ever admitted, whatever comes out,
    it has to stay charged with all of them.
    """
    if admits(_divergences([charge], charge.unit), budget, charge.delta):
        return False
    return spent([charge], charge.delta, charge.unit).epsilon <= budget


class Ledger:
    """The ledger in the file `path`, which is made with its folder by the first charge.

    All methods raise UserError when the file was edited, or cannot be read, locked or written.
    """

    def __init__(self, path: Path, head: Path | None = None) -> None:
        """`head`: a file that keeps the digest of the last line; without that line CutShort is raised."""
        self.path, self.head = path, head

    def charges(self) -> list[Charge]:
        """The charge in force of each run, in the order in which the runs began."""
        return _in_force(self._entries())

    def uncovered(self) -> list[Uncovered]:
        """The uses that no epsilon covers, in the order in which they were entered."""
        return [_use(entry) for entry in self._entries() if "uncovered" in entry]

    def enter_uncovered(self, use: Uncovered, delta: float) -> None:
        """Enters a use that no epsilon covers, on disk before this returns, unless it is there already.

        delta: of the run; the line says it as every other does.
        """
        with self._locked():
            entries = self._entries()
            if any("uncovered" in entry and _use(entry) == use for entry in entries):
                return
            nothing = Mechanism(1.0, 0.0, 0)
            charge = Charge(f"{use.run}-uncovered-{use.use}", use.private_set, nothing, delta, private=False)
            self._append(charge, entries[-1]["digest"] if entries else "", uncovered=use.by)

    def digests(self) -> set[str]:
        """The digests of all lines."""
        return {entry["digest"] for entry in self._entries()}

    def self_charged(self) -> set[str]:
        """The runs of lines that a start or an end of theirs wrote, not somebody who only knew of them."""
        return {entry["run"] for entry in self._entries() if "owner" in entry}

    def check(self, turn: Turn) -> str | None:
        """The last nonce of the run, None where it has none; raises Superseded unless `turn` follows it."""
        return self._check(turn, self._entries())

    def settled(self, owner: str) -> Settled:
        """The counts that the ends of the run `owner` left; zero for a run that has not ended."""
        ends = [
            (entry["steps"], entry.get("begun", min(1, entry["steps"])))
            for entry in self._entries()
            # The set is part of the number of a line in the index; a release has a number of its own.
            if entry["run"].partition("@")[0] == entry.get("owner") == owner and not entry["open"]
        ]
        return (
            Settled(max(steps for steps, _ in ends), max(begun for _, begun in ends)) if ends else Settled()
        )

    def mark(self, owner: str) -> Mark:
        """The mark of the run `owner`, which says how far it has come while it has not ended."""
        return Mark(self.path.with_name(f"{self.path.name}.{owner}"))

    def enter(
        self,
        charge: Charge,
        admit: Callable[[Sequence[Charge]], None] = lambda others: None,
        known: str | None = None,
        turn: Turn | None = None,
    ) -> str:
        """Makes `charge` the one in force of its run, on disk before this returns.

        Args:
            charge: of a run that is about to begin or go on, or that has ended.
            admit: called with the charges of all other runs, whatever their sets are called, while nobody
                else can write; what it raises is raised, and nothing is written.
            known: digest of an earlier line of the run, which must still be there.
            turn: the start or end that this charge belongs to; it is written even if the charge is not new.

        Returns the digest of the run's last line. Raises Superseded when the run has gone on elsewhere.
        """
        with self._locked():
            entries = self._entries()
            if known is not None and not any(entry["digest"] == known for entry in entries):
                raise UserError(
                    f"{self.path}: the line with which this run was charged is not there: the ledger was "
                    "edited or replaced; expected the file as it was written"
                )
            if turn is not None:
                self._check(turn, entries)
            charges = _in_force(entries)
            admit([c for c in charges if c.run != charge.run])
            if turn is None and charge in charges:
                return str(next(e["digest"] for e in reversed(entries) if e["run"] == charge.run))
            previous = entries[-1]["digest"] if entries else ""
            return self._append(charge, previous) if turn is None else self._take(turn, charge, previous)

    def enter_all(
        self,
        charges: Sequence[Charge],
        admit: Callable[[Sequence[Charge]], None] = lambda others: None,
        turn: Turn | None = None,
    ) -> None:
        """Makes each of `charges` the one in force of its run; `admit` is called with all in force before.

        The last of `charges` is that of `turn`; it is then as in `enter`.
        """
        with self._locked():
            entries = self._entries()
            if turn is not None:
                self._check(turn, entries)
            in_force = _in_force(entries)
            admit(in_force)
            previous = entries[-1]["digest"] if entries else ""
            rest = charges if turn is None else charges[:-1]
            for charge in rest:
                if charge not in in_force:
                    previous = self._append(charge, previous)
            if turn is not None:
                self._take(turn, charges[-1], previous)

    def _take(self, turn: Turn, charge: Charge, previous: str) -> str:
        """Writes the line of a start or an end, and the mark before or after it."""
        if turn.progress is not None:
            self.mark(turn.owner).begin(turn.nonce, turn.progress)
        digest = self._append(charge, previous, turn)
        if turn.progress is None:
            self.mark(turn.owner).end()
        return digest

    def _check(self, turn: Turn, entries: Sequence[Mapping[str, Any]]) -> str | None:
        last = next((e for e in reversed(entries) if "nonce" in e and e["owner"] == turn.owner), None)
        if last is not None and last["nonce"] not in turn.follows:
            raise Superseded(f"{self.path}: the run {turn.owner} has gone on elsewhere")
        if turn.progress is not None:
            self.mark(turn.owner).check(turn.progress, expected=last is not None and last["open"])
        return None if last is None else str(last["nonce"])

    def _append(
        self, charge: Charge, previous: str, turn: Turn | None = None, uncovered: Sequence[str] = ()
    ) -> str:
        start: dict[str, Any] = {"uncovered": list(uncovered)} if uncovered else {}
        # A line without a unit is of an image, as all lines of earlier versions are.
        start |= {} if charge.unit == "image" else {"unit": charge.unit}
        if turn is not None:
            start |= {"owner": turn.owner, "nonce": turn.nonce, "open": turn.progress is not None}
            start |= {} if turn.begun is None else {"begun": turn.begun}
        start |= {} if charge.search is None else {"search": charge.search.to_dict()}
        record = {
            # No finer: how long a training took tells how large its batches were.
            "time": datetime.now(UTC).isoformat(timespec="minutes"),
            "run": charge.run,
            "set": charge.private_set,
            "noise_multiplier": charge.mechanism.noise_multiplier,
            "sample_rate": charge.mechanism.sample_rate,
            "steps": charge.mechanism.steps,
            "delta": charge.delta,
            "private": charge.private and charge.search is None,
            **start,
            "previous": previous,
        }
        digest = _digest(record)
        append_line(self.path, {**record, "digest": digest})
        for path in (self.path, self.path.parent):
            _sync(path)
        # After the line: a crash in between leaves the name of an earlier one.
        if self.head is not None:
            write_atomic(self.head, digest, mode=0o600)
        return digest

    def _entries(self) -> list[dict[str, Any]]:
        """All whole lines, in order, each checked against the one before."""
        try:
            # Before the lines, to which somebody may add.
            head = self.head.read_text() if self.head is not None and self.head.exists() else ""
            entries = read_lines(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: the ledger cannot be read ({error})") from error
        previous = ""
        for number, entry in enumerate(entries, start=1):
            content = {name: value for name, value in entry.items() if name != "digest"}
            if content.get("previous") != previous or entry.get("digest") != _digest(content):
                raise UserError(
                    f"{self.path}, line {number}: the ledger was edited, since this line does not follow "
                    "from the one before; expected the file as it was written"
                )
            previous = entry["digest"]
        if head and not any(entry["digest"] == head for entry in entries):
            raise CutShort(
                f"{self.path}: its last lines are not there: the ledger was removed, cut or replaced; "
                "expected the file as it was written"
            )
        return entries

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The file, made when absent, with nobody else writing."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._wait_for(descriptor)
            yield
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            os.close(descriptor)

    def _wait_for(self, descriptor: int) -> None:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(
                        f"{self.path}: the ledger cannot be locked: another process has held it for "
                        f"{PATIENCE_S:g} s; expected one that lets go"
                    ) from None
            time.sleep(0.02)

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: the ledger cannot be locked and written ({error.strerror}); expected a place that "
            "can be written, on a file system with flock; paths.ledger names another file"
        )


def _in_force(entries: Sequence[Mapping[str, Any]]) -> list[Charge]:
    latest: dict[str, Charge] = {}
    for entry in entries:
        if "uncovered" in entry:
            continue
        mechanism = Mechanism(entry["noise_multiplier"], entry["sample_rate"], entry["steps"])
        search = Search.from_dict(entry["search"]) if "search" in entry else None
        latest[entry["run"]] = Charge(
            entry["run"],
            entry["set"],
            mechanism,
            entry["delta"],
            entry["private"] or search is not None,
            entry.get("unit", "image"),
            search,
        )
    return list(latest.values())


def _use(entry: Mapping[str, Any]) -> Uncovered:
    run, _, use = entry["run"].partition("-uncovered-")
    return Uncovered(run, entry["set"], use, tuple(entry["uncovered"]))


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
