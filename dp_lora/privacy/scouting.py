"""Scouting: the first S noisy steps of a plan choose which matrices the remaining T steps train.

A scouting step is a `PrivateStep` like any other: same sampler, clip, noise, record and accountant. Only what
follows the release differs: the released update is kept and not applied, so weights, optimiser and moving
average stay as they are. After S of them the choice reads their mean and nothing else, and a second engine on
the chosen matrices takes the T steps that are left, under the same plan and record.

Guarantee: the choice is post-processing of S releases of the Gaussian mechanism, and the T steps are chosen
by it. Composition holds for mechanisms that are chosen by earlier releases, whatever the dimension of what
each releases, provided that S, T, the sample rate q and sigma are fixed beforehand: a `PrivacyPlan` fixes
S + T, q, sigma and C, and the caller fixes S. So epsilon of the plan covers choice, scores and training. A
number of steps or a noise that followed from the choice would not be covered.

The score of a matrix compares the energy of its released mean update with that of the noise in it; see
`score`. DP-SAPF (arXiv 2605.30312) chooses matrices by noisy gradients, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.step import DPSGD, PrivateStep


@dataclass(frozen=True)
class Kept:
    """The scouting so far, a function of released values alone.

    Args:
        total: float64 [P] on the CPU, the sum of the released updates.
        steps: number of releases in it.
        chosen: names of the matrices that were chosen, in the model's order; None before the choice.
    """

    total: Tensor
    steps: int
    chosen: tuple[str, ...] | None = None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        chosen = None if self.chosen is None else list(self.chosen)
        return {"total": self.total, "steps": self.steps, "chosen": chosen}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Kept:
        """From what `state_dict` returned."""
        chosen = state["chosen"]
        return cls(state["total"].double(), int(state["steps"]), None if chosen is None else tuple(chosen))


class ScoutStep(PrivateStep):
    """A private step whose released update is kept and not applied."""

    sgd: Scout

    def _descend(self, update: Tensor) -> None:
        kept = self.sgd.kept
        self.sgd.kept = Kept(kept.total + update.double().cpu(), kept.steps + 1)


class Scout(DPSGD):
    """The engine of the scouting steps, on the candidates alone: each trainable parameter is one matrix.

    Args, Raises: as of `DPSGD`. The optimiser never steps.

    Attributes:
        kept: the released updates so far; a checkpoint has them.
    """

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.kept = Kept(torch.zeros(self.gradients.num_parameters, dtype=torch.float64), 0)

    def begin(self, number: int) -> PrivateStep:
        """Begins scouting step `number`; as `DPSGD.begin` else."""
        self.refuse_forked()
        self.current = ScoutStep(self, number)
        return self.current

    @property
    def sizes(self) -> list[int]:
        """The dimension of each matrix, in the order of `gradients.parameters`."""
        return [p.numel() for p in self.parameters]

    def scores(self) -> list[float]:
        """The score of each matrix, in the order of `gradients.parameters`."""
        return scores(self.kept, self.sizes, self.plan)

    def state_dict(self) -> dict[str, Any]:
        """As of `DPSGD`, with the released updates."""
        return {**super().state_dict(), "scouted": self.kept.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`; as `DPSGD.load_state_dict` else."""
        super().load_state_dict(state)
        self.kept = Kept.of(state["scouted"])


class AfterScouting(DPSGD):
    """The engine of the steps that follow the choice; its checkpoints keep what the choice was made from.

    Args:
        kept: from the `Scout`, with the choice.
        lineage: of the state after the last scouting step.
        Others, Raises: as of `DPSGD`.
    """

    def __init__(self, *args: Any, kept: Kept, lineage: str, **given: Any) -> None:
        super().__init__(*args, **given)
        self.kept, self.lineage = kept, lineage
        # Steps are numbered through; the average begins with the first one that moves a weight.
        self.average.first = kept.steps

    def state_dict(self) -> dict[str, Any]:
        """As of `DPSGD`, with the released updates of the scouting and the choice."""
        return {**super().state_dict(), "scouted": self.kept.state_dict()}


def scores(kept: Kept, sizes: Sequence[int], plan: PrivacyPlan) -> list[float]:
    """The score of each matrix from the mean of the released updates.

    Args:
        kept: at least one release.
        sizes: the dimension of each matrix, in the order of the coordinates.
        plan: of the run, whose noise is in the releases.
    """
    mean = kept.total / kept.steps
    # Of the mean of S releases, on each coordinate; without noise, what the mean itself has there.
    noise = plan.noise_std / plan.expected_batch_size / math.sqrt(kept.steps)
    unit = noise or float(mean.square().mean().sqrt()) or 1.0
    parts = (mean / unit).split(list(sizes))
    return [score(float(part.square().sum()), len(part), noisy=noise > 0) for part in parts]


def score(energy: float, dimension: int, *, noisy: bool = True) -> float:
    """(energy of the update - energy of its noise) / (energy of its noise sqrt(2 / dimension)).

    Without a signal the energy, in units of one coordinate's noise, has a chi-square distribution: mean d and
    variance 2 d. The score then has mean 0 and variance 1 whatever d is, so that matrices of unequal size are
    equals; they differ by the skewness sqrt(8 / d) alone. Without noise, by public images or in a run that
    has no privacy, it is the limit up to a factor that all matrices share: energy / sqrt(2 d).

    Args:
        energy: sum of the squares of the update, in units of the variance of one coordinate's noise.
        dimension: d, the number of coordinates.
        noisy: whether there is noise.

    >>> score(200.0, 200), round(score(260.0, 200), 6)
    (0.0, 3.0)
    """
    return (energy - dimension * noisy) / math.sqrt(2 * dimension)


def number_of(share: float, candidates: int) -> int:
    """The number of matrices that a share of all is: the nearest whole number, at least 1.

    >>> number_of(0.5, 20), number_of(0.1, 4)
    (10, 1)
    """
    return max(1, math.floor(share * candidates + 0.5))


def best(by_name: Mapping[str, float], share: float) -> tuple[str, ...]:
    """The names of the best `share` of the matrices, in the order in which they are given.

    Of equal scores the earlier one wins.

    >>> best({"a": 0.1, "b": 2.0, "c": 2.0, "d": -1.0}, 0.5)
    ('b', 'c')
    """
    ranked = sorted(by_name, key=lambda name: -by_name[name])
    chosen = set(ranked[: number_of(share, len(by_name))])
    return tuple(name for name in by_name if name in chosen)
