"""Whether a training has diverged, told by what it releases.

Guarantee: the checks read the trained weights, which are a function of the noised sums, and synthetic
examples that anybody can draw. What they say, and that a run stops, is therefore post-processing: the epsilon
of the executed steps covers it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.models.folders import LatentDiffusion
from dp_lora.privacy.collectives import largest
from dp_lora.training import tuning

GROWTH = 1e4
"""How many times as large as the largest weight before the training, or as 1, a weight may become."""

LARGEST_LOSS = 10.0
"""Mean squared error of the predicted noise, whose variance is 1: a network that says nothing has 1."""


class Diverged(UserError):
    """The weights are of no use; what the executed steps spent is spent."""


class Watch:
    """Stops a training whose weights have left all bounds.

    Args:
        parameters: that are trained, as they are before the training.
        config: of the job, whose settings the message names.
        noise_multiplier: of the job's plan, for the message.
        spent: what an epsilon means for this run, with {} for its value; empty where nothing is spent.
    """

    def __init__(
        self, parameters: Sequence[Tensor], config: Config, noise_multiplier: float, spent: str
    ) -> None:
        self._parameters, self._spent = parameters, spent
        self._settings, self._expected = _causes(config, noise_multiplier)
        self._bound = GROWTH * max(1.0, self._largest())

    def after(self, step: int, total: int, epsilon: float) -> None:
        """Looks at the weights after step number `step` of `total`; `epsilon` is of all executions so far.

        Raises Diverged on every process of the job when a weight is not finite or beyond its bound.
        """
        found = self._largest()
        if largest(not found <= self._bound):
            size = f"has grown to {found:.3g}" if math.isfinite(found) else "is no finite number any more"
            raise self._error(f"a trained weight {size} after step {step} of {total}", epsilon)

    def at_the_end(self, model: LatentDiffusion, epsilon: float) -> None:
        """Looks at what the trained model predicts on synthetic examples; raises Diverged as `after` does."""
        with torch.no_grad():
            loss = float(tuning.synthetic_losses(model, examples=4, k=1, seed=0)(slice(0, 4)).mean())
        if largest(not loss <= LARGEST_LOSS):
            raise self._error(
                f"the trained model's error on synthetic noise is {loss:.3g}, not about 1", epsilon
            )

    def _largest(self) -> float:
        """The largest absolute value of all weights; NaN when one is NaN."""
        return float(torch.stack([p.detach().abs().max().float() for p in self._parameters]).max())

    def _error(self, what: str, epsilon: float) -> Diverged:
        spent = f"; {self._spent.format(f'{epsilon:.4g}')}" if self._spent else ""
        return Diverged(f"{self._settings}: the training diverged: {what}{spent}; expected {self._expected}")


def _causes(config: Config, noise_multiplier: float) -> tuple[str, str]:
    """The settings that can make a training diverge, with their values, and what to do about them."""
    train, privacy = config.train, config.privacy
    settings = f"train.learning_rate={train.learning_rate:g}"
    factors = {
        "train.embedder_learning_rate_factor": train.embedder_learning_rate_factor,
        "trainable.learning_rate_factor": config.trainable.learning_rate_factor,
    }
    settings += "".join(f", {name}={factor:g}" for name, factor in factors.items() if factor != 1)
    expected = "a smaller learning rate" + " or factor" * any(factor != 1 for factor in factors.values())
    if not noise_multiplier:
        return settings, expected
    return (
        f"{settings}, privacy.max_grad_norm={privacy.max_grad_norm:g} with noise multiplier "
        f"{noise_multiplier:.4g}",
        f"{expected}, or less noise against the gradients: a larger train.expected_batch_size or epsilon, or "
        "a max_grad_norm that is not far above their norms",
    )
