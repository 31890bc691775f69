"""The plan of a private search: the one epsilon of a trial with which the search meets its target.

Every cell trains with the noise that gives its own sample rate and steps the same epsilon, by Renyi
divergences at a few orders. That epsilon is found by bisection, so that the strictest statement about the
search that applies meets the target. Nothing here looks at an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dp_lora.errors import PlanError
from dp_lora.privacy.renyi import FEW_ORDERS, divergences_of, epsilon_of_divergences
from dp_lora.privacy.selection import BOUNDS, Search
from dp_lora.privacy.subsampled_gaussian import Mechanism

_LARGEST_SIGMA = 1e4


@dataclass(frozen=True)
class SearchPlan:
    """A search, and what each of its trials spends."""

    search: Search
    trials: tuple[Mechanism, ...]
    """The training of a trial of each cell, in the order in which the schedules were given."""
    trial_epsilon: float
    """Of the training of one trial, at `delta` (rdp)."""
    target_epsilon: float
    delta: float


def plan_search(
    schedules: Sequence[tuple[float, int]],
    score: Mechanism,
    *,
    distribution: str,
    expected_trials: float,
    target_epsilon: float,
    delta: float,
    strictest: Sequence[str] = ("both",),
) -> SearchPlan:
    """The plan with the least noise that meets the target.

    Guarantee: `search.epsilon(delta, of)` of the plan is at most `target_epsilon` for each of `strictest`.

    Args:
        schedules: sample rate and number of steps of each cell.
        score: the noised sum by which a trial is scored.
        distribution: of the number of trials, a name in `selection.BOUNDS`.
        expected_trials: its mean, at least 1.
        target_epsilon: finite and above 0.
        delta: in (0, 1).
        strictest: whom the target is for (`selection.SETS`); the other statements say what they come to.

    Raises:
        PlanError: the scores alone pass the target.
    """
    if distribution not in BOUNDS:
        raise PlanError(f"<distribution>={distribution}: expected one of {', '.join(BOUNDS)}")
    if not 1 <= expected_trials < math.inf:
        raise PlanError(f"<expected_trials>={expected_trials:g}: expected at least 1")
    if not 0 < target_epsilon < math.inf:
        raise PlanError(f"<target_epsilon>={target_epsilon:g}: expected a finite number above 0")

    def at(noise: dict[tuple[float, int], float]) -> Search:
        cells = tuple(Mechanism(noise[one], *one) for one in schedules)
        return Search(cells, score, distribution, float(expected_trials))

    def spent(search: Search) -> float:
        return max(search.epsilon(delta, of) for of in strictest)

    least = spent(at(dict.fromkeys(schedules, _LARGEST_SIGMA)))
    if least > target_epsilon:
        raise PlanError(
            f"<target_epsilon>={target_epsilon:g}: the scores of the trials alone come to epsilon "
            f"{least:.4g}; expected a larger <target_epsilon>, or a smaller <release_epsilon> or "
            "<expected_trials>"
        )
    distinct = list(dict.fromkeys(schedules))

    def search_of(log_epsilon: float) -> Search:
        return at({one: noise_of_trial(math.exp(log_epsilon), delta, *one) for one in distinct})

    fits = _largest(lambda value: spent(search_of(value)) <= target_epsilon, math.log(target_epsilon))
    noise = {one: noise_of_trial(math.exp(fits), delta, *one) for one in distinct}
    trials = tuple(Mechanism(noise[one], *one) for one in schedules)
    return SearchPlan(at(noise), trials, math.exp(fits), target_epsilon, delta)


def noise_of_trial(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The noise multiplier, rounded up to five digits, with which a training has at most this epsilon.

    By Renyi divergences at `renyi.FEW_ORDERS`.

    Raises:
        PlanError: no noise multiplier up to 10,000 has it.
    """

    def fits(log_inverse: float) -> bool:
        found = divergences_of(Mechanism(math.exp(-log_inverse), sample_rate, steps), FEW_ORDERS)
        return epsilon_of_divergences(found, delta, FEW_ORDERS) <= epsilon

    if not fits(-math.log(_LARGEST_SIGMA)):
        raise PlanError(
            f"<target_epsilon>: no noise gives a trial epsilon {epsilon:.3g}; expected a larger one"
        )
    sigma = math.exp(-_largest(fits, 0.0, bottom=-math.log(_LARGEST_SIGMA)))
    digits: float = 10.0 ** (4 - math.floor(math.log10(sigma)))
    return math.ceil(sigma * digits) / digits


def _largest(fits: Callable[[float], bool], start: float, bottom: float = -math.inf) -> float:
    """The largest number, to 1/2000, that `fits`, as all smaller ones do; `bottom` fits."""
    width, low = 0.5, start
    while not fits(low):
        low, width = max(low - width, bottom), 2 * width
        if low < -700:
            raise PlanError("<target_epsilon>: no noise meets it; expected a larger one")
    high, width = low + 0.25, 0.5
    while fits(high):
        low, high, width = high, high + width, 2 * width
        if high > 700:
            return low
    while high - low > 1 / 2000:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
