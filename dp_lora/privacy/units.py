"""What runs spend on one image, or on one person, whichever of the two each of them protects.

    a run for   one image                               one person with all of their images
    images      its own mechanism                       with at most m images: m images at once; else no bound
    persons     the replacement of a person's record:   its own mechanism
                two persons by group privacy

Why a person's record is replaced. Take one image from a person who has others, or let it contribute nothing.
The person's draws then fall on other images, and the clipped gradient g turns into another one, g'. Each has
norm at most C, and the two may point apart, so that the sum moves by up to 2 C, not by C. Between both sets
lies the one in which the person contributes nothing: one step of the person's relation leads from the first
set to it, another one from there to the second. A person with a single image is one of the two steps alone.
The releases a, b and c under the three sets have hockey-stick divergences H with

    H(a | c) <= H_1(a | b) + exp(e_1) H_2(b | c)  at  e = e_1 + e_2,

since a <= exp(e_1) b + (a - exp(e_1) b)+, and the same for b and c. Runs for images go from the first set to
the last in one of the two steps, whichever it is. So all runs together are bounded by the profile of all of
them for the first step and that of the runs for persons for the second. The profiles hold for plans that were
fixed beforehand.

Why m images are a mixture. Each of a person's m images joins a batch by itself with probability q, and adds a
vector of norm at most C. With j of them in the batch the sum moves by at most j C, and j is Binomial(m, q).
Among all vectors of such norms those along one line, j C with these probabilities, are the worst, whatever
the earlier steps released, and fewer images are dominated by more (Choquette-Choo et al. 2023, "Privacy
amplification for matrix mechanisms", arXiv:2310.15526, whose mixture of Gaussians dp_accounting computes).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from dp_lora.errors import UserError
from dp_lora.privacy import accounting
from dp_lora.privacy.accounting import Spent
from dp_lora.privacy.renyi import ORDERS, Array, divergences_of, renyi_divergences
from dp_lora.privacy.subsampled_gaussian import Mechanism

MOST_IMAGES = 10_000
"""Of a person, in a bound for them as a group."""

LEAST_DELTA = 1e-9
"""The smallest delta with a bound for groups of images: below it the transform's rounding would be felt."""

_POINTS = 4000
"""Of the grid on which epsilon is divided between the two steps."""

_TAIL = 1e-18
"""The probability of the numbers of images in a batch that are left out, once a step."""


def epsilon_of_image(images: Sequence[Mechanism], persons: Sequence[Mechanism], delta: float) -> Spent:
    """An upper bound on epsilon of all these runs together for one image.

    Args:
        images: of runs that protect one image.
        persons: of runs that protect a person with all of their images.
        delta: in (0, 1).
    """
    images, persons = _spending(images), _spending(persons)
    if not persons:
        return accounting.composed(images, delta)
    if any(m.noise_multiplier == 0 for m in (*images, *persons)):
        return Spent(math.inf, "none")
    return Spent(_two_steps(tuple(images + persons), tuple(persons), delta), "group of two persons")


def epsilon_of_person(
    images: Sequence[Mechanism], persons: Sequence[Mechanism], delta: float, images_per_person: int | None
) -> Spent:
    """An upper bound on epsilon of all these runs together for a person with all of their images.

    Args:
        images, persons, delta: as of `epsilon_of_image`.
        images_per_person: the most images that a person has, as the owner of the set states it; None: no
            bound is stated, so that runs for images have no epsilon for a person.

    Raises UserError for a number of images that is not from 1 to `MOST_IMAGES`.
    """
    if images_per_person is not None and not 1 <= images_per_person <= MOST_IMAGES:
        raise UserError(f"images per person: {images_per_person}; expected 1 to {MOST_IMAGES}")
    images, persons = _spending(images), _spending(persons)
    if not images or images_per_person == 1:
        return accounting.composed([*images, *persons], delta)
    if images_per_person is None or delta < LEAST_DELTA:
        return Spent(math.inf, "none")
    if any(m.noise_multiplier == 0 for m in (*images, *persons)):
        return Spent(math.inf, "none")
    parts = tuple(sorted((m, images_per_person) for m in map(astuple, images)))
    parts += tuple(sorted((m, 1) for m in map(astuple, persons)))
    return Spent(_grouped(parts, delta), f"pld, {images_per_person} images at once")


def divergences_of_image(images: Sequence[Mechanism], persons: Sequence[Mechanism]) -> Array:
    """Renyi divergences at `ORDERS` of all these runs together for one image, at most.

    For the two steps of a run for persons: D_a(P | R) <= (a - 1/2) / (a - 1) D_2a(P | Q) + D_(2a - 1)(Q | R)
    (Mironov 2017, the weak triangle inequality).
    """
    total = renyi_divergences(images)
    if any(m.noise_multiplier == 0 for m in _spending(persons)):
        return np.full(len(ORDERS), math.inf)
    alpha = np.asarray(ORDERS)
    for mechanism in _spending(persons):
        first = divergences_of(mechanism, tuple(2 * alpha))
        second = divergences_of(mechanism, tuple(2 * alpha - 1))
        total = total + (alpha - 0.5) / (alpha - 1) * first + second
    return total


def divergences_for_image(unit: str, divergences: Array) -> Array:
    """Renyi divergences at `ORDERS` for one image of what has `divergences` for one `unit`, at most.

    For a person they are needed at higher orders, as in `divergences_of_image`: those of the next order that
    is there bound them, since a divergence grows with its order; beyond the last one there is no bound.
    """
    if unit == "image":
        return divergences
    alpha = np.asarray(ORDERS)
    kept = np.append(divergences, math.inf)
    first, second = (kept[np.searchsorted(alpha, orders)] for orders in (2 * alpha, 2 * alpha - 1))
    return np.asarray((alpha - 0.5) / (alpha - 1) * first + second)


def _spending(mechanisms: Sequence[Mechanism]) -> list[Mechanism]:
    return [m for m in mechanisms if m.steps and m.sample_rate]


def _two_steps(first: tuple[Mechanism, ...], second: tuple[Mechanism, ...], delta: float) -> float:
    """The smallest epsilon of a grid at which the profiles of the two steps leave at most `delta`."""
    near = accounting.epsilon(first, delta / 2).epsilon
    rest = delta / 2 * math.exp(-min(near, 600.0))
    far = accounting.epsilon(second, max(rest, 1e-290)).epsilon
    if not math.isfinite(near + far) or rest < 1e-290:
        return math.inf
    grid = np.linspace(0.0, near + far, _POINTS + 1)
    of_first = accounting.profile_of(first, grid, delta)
    of_second = accounting.profile_of(second, grid, max(rest, accounting.LEAST_DELTA))

    def at(index: int) -> float:
        """Delta at `grid[index]`, over all ways to divide it."""
        one, other = of_first[: index + 1], of_second[: index + 1][::-1]
        with np.errstate(divide="ignore", over="ignore"):
            return float(np.min(one + np.exp(np.minimum(grid[: index + 1] + np.log(other), 700.0))))

    low, high = -1, _POINTS
    if at(high) > delta:
        return float(near + far)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= delta else (middle, high)
    return float(grid[high])


@functools.lru_cache(maxsize=64)
def _grouped(parts: tuple[tuple[tuple[float, float, int], int], ...], delta: float) -> float:
    """Epsilon of steps in which so many images of one person may be at once: ((sigma, q, steps), m) each."""
    left, slack, total = delta, 0.0, None
    interval = max(_interval(sigma, rate, images) for (sigma, rate, _), images in parts)
    for (sigma, rate, steps), images in parts:
        loss, tail = _mixture(sigma, rate, images, interval)
        # A mixture without the rarest shifts is at least 1 - tail of the whole one.
        left, slack = left - steps * tail, slack - steps * math.log1p(-tail)
        composed = loss.self_compose(steps)
        total = composed if total is None else total.compose(composed)
    if total is None or left <= 0:
        return math.inf
    return float(total.get_epsilon_for_delta(left)) + slack


def _interval(sigma: float, rate: float, images: int) -> float:
    """Width of a cell of the loss: a fraction of its spread, but some hundred thousand cells at most.

    Every width gives a bound. Finding a cell's end takes dp_accounting some 50 microseconds.
    """
    reach = (images / sigma) ** 2 / 2 + 12 * images / sigma + 1
    spread = images * rate / sigma
    return max(min(reach / 2e4, spread / 20), reach / 2e5)


def _mixture(sigma: float, rate: float, images: int, interval: float) -> tuple[Any, float]:
    """The privacy loss of a step for so many images at once, and the probability that it leaves out."""
    from dp_accounting.pld import privacy_loss_distribution
    from scipy.stats import binom

    counts = np.arange(images + 1)
    above = binom.sf(counts, images, rate)
    most = int(np.argmax(above <= _TAIL))
    probs = binom.pmf(counts[: most + 1], images, rate)
    there = probs > 0
    loss = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        sigma,
        counts[: most + 1][there].astype(float).tolist(),
        (probs[there] / probs.sum()).tolist(),
        value_discretization_interval=interval,
    )
    return loss, float(above[most])
