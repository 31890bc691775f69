"""Renyi divergences of noisy steps, the bounds that they give, and the filter over runs chosen one by one.

Renyi divergences of the Poisson-subsampled Gaussian mechanism (Mironov, Talwar and Zhang 2019) add up over
steps, whatever each step's parameters depend on. They are looser than privacy loss distributions by 5 to
10 %, never fail, and are what a budget over adaptively chosen runs can be kept by (`admits`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from dp_lora.privacy.subsampled_gaussian import Mechanism

Array = npt.NDArray[np.float64]

ORDERS: tuple[float, ...] = (
    *(1.01, 1.02, 1.05),
    *(1 + x / 10 for x in range(1, 60)),
    *(7 + x / 4 for x in range(16)),
    *range(11, 64),
    *(64, 80, 96, 128, 192, 256, 512, 1024),
)
"""Where Renyi divergences are computed."""

# For all orders the points are the same.
_LARGEST_FRACTION = max(order for order in ORDERS if order % 1)

FEW_ORDERS: tuple[float, ...] = (1.05, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
"""Enough for an order of magnitude."""


def divergences_of(mechanism: Mechanism, orders: tuple[float, ...] = ORDERS) -> Array:
    """Renyi divergences of one mechanism with noise, at `orders`, at most."""
    return mechanism.steps * _of_one_step(mechanism.noise_multiplier, mechanism.sample_rate, orders)


def renyi_divergences(mechanisms: Sequence[Mechanism]) -> Array:
    """Renyi divergences of all `mechanisms` together, at `ORDERS`; inf where one has no noise."""
    seen = [m for m in mechanisms if m.steps and m.sample_rate]
    if any(m.noise_multiplier == 0 for m in seen):
        return np.full(len(ORDERS), math.inf)
    return np.asarray(np.sum([np.zeros(len(ORDERS)), *map(divergences_of, seen)], axis=0))


def epsilon_of_divergences(divergences: Array, delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    """Epsilon that Renyi divergences at `orders` give for `delta` in (0, 1).

    Canonne, Kamath and Steinke 2020, proposition 12.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}: expected a number in (0, 1)")
    return max(0.0, float(np.min(divergences + _conversion(np.asarray(orders), math.log(delta)))))


def delta_of_divergences(divergences: Array, epsilon: float) -> float:
    """Delta that Renyi divergences at `ORDERS` give for `epsilon`; it inverts `epsilon_of_divergences`."""
    alpha = np.asarray(ORDERS)
    exponents = (alpha - 1) * (divergences - epsilon + np.log((alpha - 1) / alpha)) - np.log(alpha)
    return min(1.0, math.exp(min(0.0, float(np.min(exponents)))))


def _conversion(alpha: Array, log_delta: float | Array) -> Array:
    """The difference between the epsilon that a divergence at order alpha gives and the divergence."""
    return np.asarray(-(log_delta + np.log(alpha)) / (alpha - 1) + np.log((alpha - 1) / alpha))


# The filter

_SHARES: tuple[tuple[float, float], ...] = (
    (1.0, 0.5),
    *((share, 0.1) for share in (0.75, 0.6, 0.5, 0.35, 0.2)),
)
"""(part of the first order's distance from 1, part of delta) of each order that a budget is kept by."""


def filter_orders(budget: float, delta: float) -> list[tuple[int, float]]:
    """Which of `ORDERS` keep the budget (epsilon, delta), and the divergence that each allows all runs.

    A function of the budget alone, as it has to be. The first order allows the most of what falls in
    proportion to the order, as the divergence of a Gaussian mechanism does; the others are for rare large
    losses, whose divergence grows faster. Each has its part of delta.
    """
    alpha = np.asarray(ORDERS)
    allowed = budget - _conversion(alpha, math.log(delta) + math.log(_SHARES[0][1]))
    first = float(alpha[int(np.argmax(allowed / alpha))])
    found: dict[int, float] = {}
    for share, part in _SHARES:
        index = int(np.argmin(np.abs(alpha - 1 - share * (first - 1))))
        most = budget - float(_conversion(alpha[index : index + 1], math.log(delta * part))[0])
        found[index] = max(most, found.get(index, -math.inf))
    return list(found.items())


def admits(divergences: Array, budget: float, delta: float) -> bool:
    """Whether a budget (epsilon, delta) that was fixed before the first run has room for all of the runs.

    Guarantee: let runs be chosen one after the other, each with a look at all that the earlier ones
    released, and each only if this is true of the sum of the divergences at `ORDERS` of all runs so far and
    itself. Then everything that is released is (budget, delta)-private.

    Proof. For one order alpha and the divergence B that `filter_orders` allows it, the runs that go on while
    the sum at alpha is at most B have divergence at most B together (Feldman and Zrnic 2021, theorem 3.1: the
    Renyi filter, which needs one order fixed beforehand), hence are (budget, part x delta)-private (Canonne,
    Kamath and Steinke 2020). The releases after which the sum at alpha is still at most B, and at no earlier
    order of the list, are as likely as with that filter alone, since the sum only grows. So for each set of
    releases the bounds on these parts add up, and the parts of delta add up to delta. An order that is picked
    by what came out, with the whole of delta, would have no such proof (compare Lecuyer 2021).

    Args:
        divergences: of all runs together, at `ORDERS` (`renyi_divergences`).
        budget: epsilon, above 0.
        delta: in (0, 1).
    """
    return any(divergences[index] <= most for index, most in filter_orders(budget, delta))


def least_budget(divergences: Array, delta: float, above: float = 0.0) -> float:
    """The smallest budget above `above` that `admits` the divergences, to 0.01 %; inf where none does.

    It holds for whoever had fixed it before the first run. If what came out also decided after which run to
    stop, it holds at a larger delta: `admits` bounds the runs up to one budget, and each stop states another.
    """
    if not np.isfinite(divergences).any():
        return math.inf
    if not divergences.any() and above == 0:
        return 0.0
    low, high = above, max(2 * above, 1e-3)
    while not admits(divergences, high, delta):
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if admits(divergences, middle, delta) else (middle, high)
    return high


# One step

_EPS = float(np.finfo(np.float64).eps)
# The least noise multiplier with integrals, which take 1 / sigma^2 points.
_LEAST_SIGMA = 0.01


@functools.lru_cache(maxsize=256)
def _of_one_step(noise_multiplier: float, sample_rate: float, orders: tuple[float, ...]) -> Array:
    """Renyi divergences at `orders`, and at most those of a step that sees every image.

    They are log(A) / (alpha - 1), where A is the mean over x ~ N(0, sigma^2) of the density ratio
    1 - q + q exp((2x - 1) / 2 sigma^2) to the power alpha (Mironov, Talwar and Zhang 2019, section 3.3).
    """
    alphas = np.asarray(orders, np.float64)
    whole = alphas / 2 / noise_multiplier**2
    if sample_rate in (0, 1):
        return sample_rate * whole
    found = np.full(len(alphas), math.inf)
    integer = alphas == np.floor(alphas)
    with np.errstate(all="ignore"):
        for i in np.flatnonzero(integer):
            found[i] = _log_sum(*_binomial(noise_multiplier, sample_rate, alphas[i]))
        if noise_multiplier >= _LEAST_SIGMA and not integer.all():
            largest = max(_LARGEST_FRACTION, float(alphas[~integer].max()))
            terms = _trapezia(noise_multiplier, sample_rate, largest)
            for i in np.flatnonzero(~integer):
                found[i] = _log_sum(*terms(alphas[i]))
    # exp((alpha - 1) D) is convex: what is seen with probability q tells no more than what is seen always.
    return np.asarray(np.fmin(np.maximum(found, 0.0) / (alphas - 1), whole))


def _log_sum(terms: Array, sizes: Array) -> float:
    """log(sum(exp(terms))), with what rounding may have taken from it.

    Args:
        terms: [M].
        sizes: [M], the sum of the magnitudes that each term was computed from.
    """
    shares = np.exp(terms - terms.max())
    total = shares.sum()
    rounding = 4 * _EPS * (float(shares @ sizes / total) + 8 + math.log2(len(terms)))
    return float(terms.max() + math.log(total)) + rounding


def _binomial(sigma: float, q: float, alpha: float) -> tuple[Array, Array]:
    """The logarithms of the terms of A at an integer alpha, by the binomial theorem, and their sizes."""
    from scipy.special import gammaln

    i = np.arange(alpha + 1)
    parts = (
        gammaln(alpha + 1) - gammaln(i + 1) - gammaln(alpha - i + 1),
        i * math.log(q),
        (alpha - i) * math.log1p(-q),
        (i * i - i) / (2 * sigma**2),
    )
    sizes = 2 * gammaln(alpha + 1) + np.sum(np.abs(parts[1:]), axis=0)
    return np.sum(parts, axis=0), sizes


def _trapezia(sigma: float, q: float, largest: float) -> Callable[[float], tuple[Array, Array]]:
    """For alpha up to `largest`: the logarithms of the terms of A by the trapezoidal rule, and their sizes.

    Nothing but rounding is left out. The integrand f is analytic where |Im x| < pi sigma^2, and there the
    integral of |f| is at most A exp(y^2 / 2 sigma^2) for y = Im x. So the rule's relative error is at most
    2 exp(a^2 / 2 sigma^2) / (exp(2 pi a / h) - 1) for every a < pi sigma^2 (Trefethen and Weideman 2014,
    theorem 5.1). With h = min(sigma / 8, sigma^2 / 4), a = 12 h gives 1e-31. And f is at most the density
    times 2^alpha (1 + q^alpha exp(alpha (2x - 1) / 2 sigma^2)), so that what is more than 12 sigma outside of
    [0, alpha] comes to 2^(alpha + 2) Phi(-12) A at most, which is below 1e-28 A.
    """
    h = min(sigma / 8, sigma**2 / 4)
    x = h * np.arange(math.ceil((largest + 24 * sigma) / h) + 2) - 12 * sigma
    loss = (2 * x - 1) / (2 * sigma**2)
    seen, missed = math.log(q) + loss, math.log1p(-q)
    ratio, density = np.logaddexp(missed, seen), -(x**2) / (2 * sigma**2)
    sizes = np.abs(ratio) - missed + np.exp(seen - ratio) * (abs(math.log(q)) + np.abs(loss))
    scale = math.log(h / (sigma * math.sqrt(2 * math.pi)))

    def terms(alpha: float) -> tuple[Array, Array]:
        here = slice(int(np.searchsorted(x, alpha + 12 * sigma)) + 1)
        return alpha * ratio[here] + density[here] + scale, alpha * sizes[here] - density[here] + abs(scale)

    return terms
