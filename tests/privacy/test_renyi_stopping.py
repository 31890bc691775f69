"""What the least budget of a filter is worth when results also decide after which run to stop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.signal import fftconvolve

from dp_lora.privacy.renyi import least_budget, renyi_divergences
from dp_lora.privacy.subsampled_gaussian import Mechanism

DELTA = 1e-5


def used(sigma: float, runs: int) -> float:
    """The delta, in units of `DELTA`, at which the totals of a chain of Gaussian mechanisms hold.

    The chain stops as soon as the privacy loss of all runs so far exceeds the total stated after them, which
    is the worst that whoever stops by results can do: delta is then the sum over t of the mean of
    1 - exp(total - loss) where it stops. The loss after each run is normal with mean 1 / 2 sigma^2 and twice
    that as its variance; its density is kept on a grid.
    """
    mean = 1 / (2 * sigma**2)
    spread = math.sqrt(2 * mean)
    one = renyi_divergences([Mechanism(sigma, 1.0, 1)])
    totals = [least_budget(one * count, DELTA) for count in range(1, runs + 1)]
    width = spread / 40
    grid = np.arange(-12 * spread * math.sqrt(runs), totals[-1] + 12 * spread, width)
    near = np.arange(-8 * spread, 8 * spread + width, width)
    kernel = np.exp(-(near**2) / (2 * spread**2))
    kernel /= kernel.sum()
    density, found = np.zeros(len(grid)), 0.0
    density[np.argmin(np.abs(grid))] = 1.0
    for count, total in enumerate(totals, start=1):
        middle = len(near) // 2
        density = np.maximum(fftconvolve(density, kernel)[middle : middle + len(grid)], 0.0)
        loss = grid + count * mean
        over = loss > total
        found += float(density[over] @ -np.expm1(total - loss[over]))
        density[over] = 0.0
    return found / DELTA


@pytest.mark.parametrize(("sigma", "runs"), [(1.0, 40), (5.0, 60)])
def test_a_chain_that_results_end_holds_at_a_somewhat_larger_delta(sigma: float, runs: int) -> None:
    """More than one run alone uses: a total that is no budget is not what the filter is proven for."""
    alone = used(sigma, 1)
    assert 0 < alone < 0.2
    assert 2 * alone < used(sigma, runs) < 1.4


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [5.0, 10.0])
def test_long_chains_use_more_than_delta_and_less_than_twice(sigma: float) -> None:
    assert 1.3 < used(sigma, 1000) <= 1.75
