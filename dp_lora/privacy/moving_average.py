"""The moving average of parameters, which is what a training releases in place of the last ones.

It is a function of the parameters after each step, so averaging released parameters costs no privacy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def average_decay(largest: float, step: int) -> float:
    """The decay of the moving average after step `step` (from 0), at most `largest`.

    It is small at first, so that the start is forgotten: Karras et al. 2024 call it a ramp.

    >>> average_decay(0.999, 0), average_decay(0.999, 100_000)
    (0.1, 0.999)
    """
    return min(largest, (1 + step) / (10 + step))


class MovingAverage:
    """The exponential moving average of `parameters`, which it follows from their values now.

    Guarantee: `values` depends on the values of the parameters at each `update` and on nothing else. It stays
    on their device and in their dtype.

    Args:
        parameters: what is averaged; the average keeps these objects and reads them at each update.
        largest_decay: in [0, 1]; 0 makes the average equal the parameters at the last update.
    """

    def __init__(self, parameters: Iterable[Tensor], largest_decay: float) -> None:
        self._parameters = list(parameters)
        self.largest_decay = largest_decay
        self.values = [p.detach().clone() for p in self._parameters]
        self.first = 0
        """The number of the first step that moves a parameter; the ramp of the decay begins there."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the parameters after step `step` (from 0); call it once a step."""
        decay = average_decay(self.largest_decay, step - self.first)
        for averaged, parameter in zip(self.values, self._parameters, strict=True):
            averaged.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Writes the average into `parameters`, in the order of those that it follows."""
        for parameter, averaged in zip(parameters, self.values, strict=True):
            parameter.copy_(averaged)

    @property
    def state(self) -> list[Tensor]:
        """The average on the CPU, for a checkpoint."""
        return [value.cpu() for value in self.values]

    @torch.no_grad()
    def load(self, state: Sequence[Tensor]) -> None:
        """Takes over a `state`."""
        for averaged, saved in zip(self.values, state, strict=True):
            averaged.copy_(saved)
