"""A real job that takes its time over each step, so that a blow finds it training on a fast machine too."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dp_lora.config.schema import Config
from dp_lora.jobs import stages
from dp_lora.privacy.step import PrivateStep

STEP_S = 0.4


def paced(config: Config, words: Sequence[str]) -> None:
    """Runs the job; each step waits before it is applied."""
    apply = PrivateStep.apply

    def waited(self: PrivateStep) -> bool:
        time.sleep(STEP_S)
        return apply(self)

    PrivateStep.apply = waited  # type: ignore[method-assign]
    stages.run(config, words)
