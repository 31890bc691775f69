"""A real job that waits in its last step, so that a blow finds it training however fast the machine is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dp_lora.config.identity import run_directory
from dp_lora.config.schema import Config
from dp_lora.jobs import stages
from dp_lora.privacy.step import PrivateStep
from dp_lora.training.signals import Requests

STEP_S = 0.4
"""So long that a job of `quiet.STEPS` steps saves before its last one."""


def paced(config: Config, words: Sequence[str]) -> None:
    """Runs the job; it takes its time, and its last step ends after `let_end` or a signal."""
    apply, note, told = PrivateStep.apply, Requests.note, list[int]()
    allowed = _allowed(run_directory(config, words))

    def noted(self: Requests, number: int) -> None:
        told.append(number)
        note(self, number)

    def waited(self: PrivateStep) -> bool:
        time.sleep(STEP_S)
        while self.number + 1 == config.train.max_steps and not (allowed.exists() or told):
            time.sleep(0.05)
        return apply(self)

    PrivateStep.apply = waited  # type: ignore[method-assign]
    Requests.note = noted  # type: ignore[method-assign]
    stages.run(config, words)


def let_end(directory: Path) -> None:
    """Lets the job of this run directory end."""
    allowed = _allowed(directory)
    allowed.parent.mkdir(exist_ok=True)
    allowed.touch()


def is_allowed(directory: Path) -> bool:
    """Whether `let_end` was called for it."""
    return _allowed(directory).exists()


def _allowed(directory: Path) -> Path:
    # Beside the folder of outputs, where no job finds what is not its own.
    outputs = directory.parent.parent
    return outputs.with_name("allowed") / directory.name
