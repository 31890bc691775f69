"""One training loop. Public pre-training and private fine-tuning differ only in the step they pass in.

A run that is interrupted at any moment continues when it is started again: the last checkpoint is
loaded and the steps after it are taken again.
"""

from __future__ import annotations

import errno
import io
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dp_lora.errors import UserError
from dp_lora.privacy.collectives import largest
from dp_lora.records.progress import Progress
from dp_lora.storage.files import private_directory, write_atomic
from dp_lora.training.signals import Leave, listening

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Step(Protocol):
    """One optimiser step, with the state that a checkpoint must hold."""

    def __call__(self, step: int, /) -> dict[str, float]:
        """Takes step number `step` and returns what may be shown and logged about it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, apart from its number."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        ...


class Checkpoint:
    """The state of a run in a private folder, replaced as a whole: a crash in any byte leaves a valid one.

    Args:
        folder: made with mode 0700.
        minutes: time between two checkpoints.
        name: of the file, when several trainings share a folder.
        writes: false on all processes of a job but the first, which then only read.
    """

    def __init__(self, folder: Path, minutes: float, name: str = "state", *, writes: bool = True) -> None:
        self.path = private_directory(folder) / f"{name}.pt"
        self._writes = writes
        self._seconds = minutes * 60
        self._last = time.monotonic()

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Number of finished steps and the step's state, or None when there is no checkpoint.

        Raises UserError when the file cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            finished, state = saved["finished"], saved["state"]
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.path}: the checkpoint cannot be read ({reason}); expected one written by this "
                "version; remove the run directory to start again"
            ) from error
        return finished, state

    def save(self, finished: int, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint atomically.

        Raises OSError, the old one untouched, when it cannot; UserError when the disk is full.
        """
        if not self._writes:
            return
        buffer = io.BytesIO()
        torch.save({"finished": finished, "state": dict(state)}, buffer)
        try:
            write_atomic(self.path, buffer.getvalue(), mode=0o600)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise UserError(
                f"{self.path}: no room for the checkpoint after step {finished} ({error.strerror}); the one "
                "before it stays valid. Make room and give the same command again"
            ) from error
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the time between checkpoints has passed."""
        return time.monotonic() - self._last >= self._seconds


def run_steps(
    step: Step,
    total: int,
    checkpoint: Checkpoint,
    progress: Progress,
    log: Callable[[int, dict[str, float]], None],
) -> None:
    """Takes the steps that are not finished yet, up to `total` of them.

    Args:
        step: its state was loaded from `checkpoint` already, see `resume`.
        total: number of steps of the whole training.
        checkpoint: written when due, on a signal and after the last step.
        progress: advanced once a step; it starts at the number of finished steps.
        log: called with the number of finished steps and what the step returned.

    Raises:
        Interrupted: when a signal asked for it, once the step in hand is finished and saved.
    """
    with listening() as requests:
        for number in range(progress.done, total):
            values = step(number)
            log(number + 1, values)
            progress.update(1, **values)
            # The strongest reason of any process: all leave after the same step.
            leave = Leave(largest(requests.leave))
            if leave or requests.save or checkpoint.due() or number + 1 == total:
                checkpoint.save(number + 1, step.state_dict())
                requests.save = False
            if leave is Leave.PREEMPTED or (leave and number + 1 < total):
                raise leave.error(f"stopped after step {number + 1} of {total}")


def resume(step: Step, checkpoint: Checkpoint) -> int:
    """Number of finished steps, with the state after them loaded into `step`; 0 without a checkpoint."""
    found = checkpoint.load()
    if found is None:
        return 0
    finished, state = found
    step.load_state_dict(state)
    return finished


def learning_rate(base: float, schedule: str, step: int, total: int, warmup_steps: int = 0) -> float:
    """The learning rate of step `step` (from 0) of `total`: a function of the step only, never of the data.

    `constant`, or from `base` down to zero along a line or half a cosine; a linear warm-up comes first.
    """
    if step < warmup_steps:
        return base * (step + 1) / (warmup_steps + 1)
    left = 1 - (step - warmup_steps) / max(1, total - warmup_steps)
    factors = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return base * factors[schedule]


def plain(value: Any) -> Any:
    """`value` with NumPy's numbers as Python's, which a checkpoint can be read with."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
