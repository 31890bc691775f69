"""A write-ahead record of every step begun and of its sum: nothing runs unaccounted, no noise is used twice.

A run that is resumed takes the steps after its last checkpoint again. When such a step is bit for bit
the one that was begun before, it draws the same batch and the same noise, releases the same value, and
costs nothing more. Otherwise the two releases must share neither noise, or they would differ by their
gradients alone, nor a batch, or they would not compose as independent ones. So:

    1. An execution is named after all that is known to change what it computes: the steps before it, the
       numerics, and the attempt. Its name is on disk before its batch is drawn, which belongs to that name.
    2. A digest of its sum is on disk before its noise is drawn, which belongs to that sum.
    3. A step that was begun before and now has another sum is thrown away unreleased, whatever the reason,
       and is begun in a new attempt: another name, hence another batch, other draws, another noise.

Every name on disk is accounted, released or not. A crash between 1 and 2 leaves an execution of which
nothing was released: it is taken again, and its sum may be another one then. A crash after 2 leaves one that
may have been released: it is taken again and released if its sum is the same, and else is thrown away.

What one record cannot see is another copy of it. Two copies of a run that go on at the same time, with
all that is known the same but their sums not, draw different noise for one batch; each counts its own
executions only.

A step that runs out of memory is given up before it has a sum and begins again in smaller microbatches.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_lora.storage.files import Damaged, append_line, read_lines

ORIGIN = "origin"
"""The lineage of a run before its first step."""


class Spent(Exception):
    """All executions of the plan were begun: there is no privacy left for another one. None was begun."""


@dataclass(frozen=True)
class Execution:
    """One step as it is taken from one state, in one way.

    Args:
        step: its number.
        lineage: of the state that it starts from.
        attempt: how often the step, begun from that state in this way, has had another sum than before.
        name: of all three and the numerics; what the batch and the draws are derived from.
        generation: its place among the executions of this step in this record.
    """

    step: int
    lineage: str
    attempt: int
    name: str
    generation: int


class Executions:
    """Every execution of a step that a run has begun, with the digest of its sum.

    A lineage names all that a state came from: the executions of the steps up to it and their sums.

    Args:
        path: a JSON-lines file in the run's private folder.
        numerics: all that is known to change how a step rounds or what it starts from.
        most: number of executions that the plan accounts for; None for as many as come.
        writes: false on all processes of a job but the first; they read the record once and then follow
            it without writing, since every process begins the same steps and has the same sums.

    Raises Damaged when the file is not as it was written.
    """

    def __init__(
        self, path: Path, numerics: Mapping[str, Any], most: int | None = None, *, writes: bool = True
    ) -> None:
        self._path, self._most, self._writes = path, most, writes
        self._numerics = dict(numerics)
        self._begun: dict[int, list[str]] = {}
        self._sums: dict[str, str] = {}
        # The name of the execution that was begun last, until it has a sum; None when it is a replay.
        self._new: str | None = None
        self._folder_synced = False
        for number, row in enumerate(read_lines(path), start=1):
            try:
                if not isinstance(row["step"], int) or not isinstance(row["execution"], str):
                    raise TypeError
                self._note(row)
            except (KeyError, TypeError, ValueError) as error:
                raise Damaged(
                    f"{path}, line {number}: no execution of a step, or one in place of another that was not "
                    "begun; expected the file as it was written"
                ) from error

    @property
    def count(self) -> int:
        """Number of different executions begun: what the accountant is told."""
        return sum(len(names) for names in self._begun.values())

    def replayable(self, step: int, lineage: str) -> int:
        """Number of steps from `step` on, from a state of `lineage`, begun before: at most so many are free.

        They cost nothing if their sums are what they were.
        """
        first, states = step, {lineage}
        while begun := [name for state in states for name in self._attempts(step, state)]:
            step += 1
            states = {_after(name, self._sums[name]) for name in begun if name in self._sums}
        return step - first

    def lead_to(self, finished: int, lineage: str) -> bool:
        """Whether a state of `lineage` behind `finished` steps came of executions that are on record.

        What an earlier version began has no sums; its lineages are the names of the executions themselves.
        """
        if not finished:
            return lineage == ORIGIN
        if not all(self._begun.get(step) for step in range(finished)):
            return False
        last = self._begun[finished - 1]
        return lineage in [_after(name, self._sums[name]) if name in self._sums else name for name in last]

    def begin(self, step: int, lineage: str) -> Execution:
        """Records that `step` begins from a state of `lineage`, on disk before it returns.

        Raises Spent when it would be one execution more than `most`.
        """
        return self._start(step, lineage, attempt=0)

    def begin_anew(self, execution: Execution) -> Execution:
        """The next attempt at a step whose sum is not the one that `execution` had: as `begin`.

        The sum in hand has to be thrown away. The execution stays on the count.
        """
        return self._start(execution.step, execution.lineage, execution.attempt + 1)

    def begin_again(self, execution: Execution, **numerics: Any) -> Execution:
        """Records that `execution`, just begun, is given up and its step begins under changed `numerics`.

        Guarantees:
            * The execution given up has no sum, so it has released nothing. If it was a new one it is taken
              off the count.
            * If it was the replay of an earlier one, that one stays on the count.

        As `begin` else.
        """
        given_up = self._new
        assert given_up is None or (given_up == execution.name and given_up not in self._sums)
        self._numerics |= numerics
        return self._start(execution.step, execution.lineage, attempt=0, instead_of=given_up)

    def keep_sum(self, execution: Execution, digest: str) -> str | None:
        """Records the digest of the sum of `execution`, on disk before it returns.

        Args:
            execution: as `begin` or its likes returned it last.
            digest: equal only for equal sums that get the same noise at the same scale.

        Returns:
            The lineage of the state after the step, or None when the execution had another sum before: then
            nothing of this one may be released.
        """
        if execution.name not in self._sums:
            self._write({"step": execution.step, "execution": execution.name, "sum": digest})
        self._new = None
        return _after(execution.name, digest) if self._sums[execution.name] == digest else None

    def _start(self, step: int, lineage: str, attempt: int, instead_of: str | None = None) -> Execution:
        name = self._name(step, lineage, attempt)
        new = name not in self._begun.get(step, [])
        if new and self._most is not None and self.count - (instead_of is not None) >= self._most:
            raise Spent(f"{self.count} executions of {self._most} were begun")
        if new or instead_of is not None:
            row = {"step": step, "execution": name}
            self._write(row if instead_of is None else {**row, "instead_of": instead_of})
        self._new = name if new else None
        return Execution(step, lineage, attempt, name, self._begun[step].index(name))

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._writes:
            append_line(self._path, row)
            _sync(self._path)
            if not self._folder_synced:
                _sync(self._path.parent)
                self._folder_synced = True
        self._note(row)

    def _note(self, row: Mapping[str, Any]) -> None:
        names, name = self._begun.setdefault(row["step"], []), row["execution"]
        if (given_up := row.get("instead_of")) is not None:
            # It was the last one added, so no other's generation changes.
            names.remove(given_up)
        if name not in names:
            names.append(name)
        if "sum" in row:
            self._sums.setdefault(name, row["sum"])

    def _attempts(self, step: int, lineage: str) -> list[str]:
        """The names of all attempts at `step` from a state of `lineage` that were begun."""
        found: list[str] = []
        while (name := self._name(step, lineage, len(found))) in self._begun.get(step, []):
            found.append(name)
        return found

    def _name(self, step: int, lineage: str, attempt: int) -> str:
        return _digest(lineage, step, attempt, json.dumps(self._numerics, sort_keys=True))


def _after(name: str, digest: str) -> str:
    return _digest("after", name, digest)


def _digest(*parts: str | int) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
