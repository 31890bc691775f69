"""Poisson batches: every example joins every batch by itself, with exactly the stated probability."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from dp_lora.privacy.randomness import Randomness


def poisson_batch(randomness: Randomness, step: int, num_examples: int, sample_rate: float) -> torch.Tensor:
    """Sorted indices int64 of the examples in the batch of `step`; it may be empty.

    Guarantees:
        * Example i is in the batch with probability `sample_rate` rounded down to a multiple of 2^-64,
          independently of every other example and of every other step.
        * Whether example i is in depends on nothing but (key, step, i): not on `num_examples`, so that
          adding an example at the end of the data changes no other inclusion.
        * Every process that has the key draws the same batch.
    """
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate={sample_rate}: expected a number in (0, 1]")
    threshold = int(Fraction(sample_rate) * 2**64)
    if threshold == 2**64:
        return torch.arange(num_examples)
    words = randomness.bits64("batch", step, range(num_examples))[:, 0]
    return torch.from_numpy(np.flatnonzero(words < np.uint64(threshold)))
