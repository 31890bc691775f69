"""A write-ahead record of every step begun, so that nothing runs unaccounted and no noise is used twice.

A run that is resumed takes the steps after its last checkpoint again. When such a step is bit for bit
the one that was begun before, it draws the same batch and the same noise, releases the same value, and
costs nothing more. When anything that rounds differently has changed in between (device, precision,
microbatch, number of processes, versions), the two releases would share their noise and differ by their
gradients alone: the step then draws a fresh batch and fresh noise, and both executions are accounted.

A step that runs out of memory is given up before it has released anything and begins again in smaller
microbatches.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_lora.files import append_line, read_lines

ORIGIN = "origin"
"""The lineage of a run before its first step."""


class Executions:
    """Every (step, lineage) that a run has begun.

    A lineage names all that a state came from: the numerics of each step up to it. Two executions of a
    step with one lineage start from the same parameters and compute the same bits.

    Args:
        path: a JSON-lines file in the run's private folder.
        numerics: all that can change how a step rounds.
        writes: false on all processes of a job but the first; they read the record once and then follow
            it without writing, since every process begins the same steps.
    """

    def __init__(self, path: Path, numerics: Mapping[str, Any], *, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        self._numerics = dict(numerics)
        self._begun: dict[int, list[str]] = {}
        # The execution that `begin` has just added, until it releases something.
        self._new: str | None = None
        for row in read_lines(path):
            self._note(row["step"], row["execution"], row.get("instead_of"))

    @property
    def count(self) -> int:
        """Number of different executions begun: what the accountant is told."""
        return sum(len(executions) for executions in self._begun.values())

    def replayable(self, step: int, lineage: str) -> int:
        """Number of steps from `step` on, from a state of `lineage`, begun before: they cost nothing."""
        first = step
        while (execution := self._execution(step, lineage)) in self._begun.get(step, []):
            step, lineage = step + 1, execution
        return step - first

    def begin(self, step: int, lineage: str) -> tuple[int, str]:
        """Records that `step` begins from a state of `lineage`, on disk before it returns.

        Returns:
            The generation of the randomness to use, 0 unless the step was begun before from another
            lineage or under other numerics; and the lineage of the state after the step.
        """
        execution = self._execution(step, lineage)
        new = execution not in self._begun.get(step, [])
        if new:
            self._write(step, execution)
        self._new = execution if new else None
        return self._begun[step].index(execution), execution

    def begin_again(self, step: int, lineage: str, **numerics: Any) -> tuple[int, str]:
        """Records that `step`, just begun, is given up and begins anew under changed `numerics`.

        Guarantees:
            * The execution given up has released nothing. If it was a new one it is taken off the count, and
              its randomness may serve the next one.
            * If it was the replay of an earlier one, that one stays on the count.

        Returns what `begin` does.
        """
        given_up, self._numerics = self._new, self._numerics | numerics
        execution = self._execution(step, lineage)
        new = execution not in self._begun[step]
        if new or given_up is not None:
            self._write(step, execution, given_up)
        self._new = execution if new else None
        return self._begun[step].index(execution), execution

    def _write(self, step: int, execution: str, instead_of: str | None = None) -> None:
        if self._writes:
            row = {"step": step, "execution": execution}
            append_line(self._path, row if instead_of is None else {**row, "instead_of": instead_of})
            _sync(self._path)
            _sync(self._path.parent)
        self._note(step, execution, instead_of)

    def _note(self, step: int, execution: str, instead_of: str | None) -> None:
        executions = self._begun.setdefault(step, [])
        if instead_of is not None:
            # It was the last one added, so no other's generation changes.
            executions.remove(instead_of)
        if execution not in executions:
            executions.append(execution)

    def _execution(self, step: int, lineage: str) -> str:
        numerics = json.dumps(self._numerics, sort_keys=True)
        return hashlib.sha256(f"{lineage}/{step}/{numerics}".encode()).hexdigest()[:16]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
