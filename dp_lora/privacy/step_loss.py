"""The privacy loss of one step, put on a grid so that no delta becomes smaller.

The loss of a step under "add or remove one image", with mu = 1 / noise_multiplier and q the sample rate:

    remove  u ~ (1 - q) N(0, 1) + q N(mu, 1), loss  L(u) = log(1 - q + q exp(mu u - mu^2 / 2)),
    add     u ~ N(0, 1),                      loss -L(u).

Connect the dots (Doroshenko et al. 2022): delta is the mean of a function of the loss that is convex and
falling in exp(-loss), and stays so under composition. So the mass of a cell [a, a + d] may be moved to its
two ends, if no less mass is kept in all, and no less than E [(1 - exp(a - loss)) / (1 - exp(-d)); cell]
comes to the upper end. Both are integrals of Gaussians, taken over short pieces by Gauss and Legendre's
rule of four nodes; its error, |g^(8)| h^9 4!^4 / (9 8!^3) for a piece of width h, is added to them, and so
is the rounding. Where a loss lies is rounded by at most `Step.slack`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

EPS = 2.0**-52
"""The rounding of a double."""

# Widest piece of the quadrature in standard deviations of the noise: its relative error is below 1e-12.
_PIECE = 0.03
# Gauss and Legendre with four nodes: |error| <= this x width^9 x max |8th derivative|.
_QUADRATURE = math.factorial(4) ** 4 / (9 * math.factorial(8) ** 3)


@dataclass(frozen=True, eq=False)
class Step:
    """A step's loss in one direction, at most: mass `probs[i]` at (first + i) d, `infinite` at infinity."""

    first: int
    probs: Array
    log_probs: Array
    infinite: float
    slack: float
    """How far a loss may lie above where its mass was counted."""
    times: int = 1

    def tilted(self, theta: float, interval: float) -> tuple[float, Array]:
        """log M(theta), without the offset of `first`, and p(x) exp(theta x) / M(theta)."""
        exponents = theta * interval * np.arange(len(self.probs)) + self.log_probs
        top = float(exponents.max())
        tilted = np.exp(exponents - top)
        total = float(tilted.sum())
        return top + math.log(total), tilted / total


@functools.lru_cache(maxsize=32)
def step_losses(
    noise_multiplier: float, sample_rate: float, interval: float, tail: float
) -> tuple[Step, Step]:
    """The loss of one step in both directions, pessimistically on the grid.

    Args:
        tail: what u may have above the last cell, and below the first one.
    """
    from scipy.special import ndtr, ndtri

    mu, q = 1 / noise_multiplier, sample_rate
    low, high = float(ndtri(tail)), max(-float(ndtri(tail / 2)), mu - float(ndtri(min(0.5, tail / (2 * q)))))
    loss = _Loss(mu, q)
    ends = loss(np.array([low, high]))
    first, last = math.floor(ends[0] / interval), math.ceil(ends[1] / interval)
    last = max(last, first + 1)
    edges = np.empty(last - first + 1)
    edges[0], edges[-1] = low, high
    edges[1:-1] = np.clip(loss.inverse(interval * np.arange(first + 1, last)), low, high)
    np.maximum.accumulate(edges, out=edges)
    mass = _masses(loss, edges, interval * np.arange(first, last), interval)
    below = (1 - q) * float(ndtr(low)) + q * float(ndtr(low - mu))
    removed = _on_grid(mass.removed, mass.removed_up, first, below, tail, mass.slack)
    added = _on_grid(mass.added[::-1], mass.added_up[::-1], -last, float(ndtr(-high)), tail, mass.slack)
    return removed, added


def _on_grid(mass: Array, up: Array, first: int, below: float, tail: float, slack: float) -> Step:
    """Cells' masses moved to their ends, `up` of each to the upper one; what lies `below` joins the first."""
    probs = np.zeros(len(mass) + 1)
    probs[1:] += up
    probs[:-1] += np.maximum(mass - up, 0.0)
    probs[1] += below
    probs *= 1 + 4 * EPS
    # Without the empty ends; a mass that underflowed is in `infinite`.
    (held,) = np.nonzero(probs)
    probs = probs[held[0] : held[-1] + 1]
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs)
    return Step(first + int(held[0]), probs, log_probs, tail + 1e-290, slack)


class _Loss:
    """L(u) = log(1 - q + q exp(mu u - mu^2 / 2)), rising in u."""

    def __init__(self, mu: float, q: float) -> None:
        self.mu, self.q = mu, q

    def __call__(self, u: Array) -> Array:
        value = self.mu * (u - self.mu / 2)
        if self.q == 1:
            return value
        if self.q > 0.9:
            return np.logaddexp(math.log1p(-self.q), math.log(self.q) + value)
        # Near 0 to full relative precision; where exp would overflow, 1 - q is nothing beside it.
        near = np.log1p(self.q * np.expm1(np.minimum(value, 600.0)))
        return np.where(value > 600.0, value + math.log(self.q), near)

    def inverse(self, loss: Array) -> Array:
        """The u of each loss; -inf below the least one, log(1 - q)."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            near = np.log1p(np.maximum(np.expm1(np.minimum(loss, 1.0)) / self.q, -1.0))
            absent = np.minimum((1 - self.q) * np.exp(np.minimum(-loss, 700.0)), 1.0)
            far = loss - math.log(self.q) + np.log1p(-absent)
        # Far below 0, expm1 is -1 but for the last digits, which are all that tells of the loss.
        return np.where(np.abs(loss) > 1.0, far, near) / self.mu + self.mu / 2

    def slack(self, u: Array, loss: Array) -> float:
        """More than the rounding of a loss, and of the ends of its cell, can come to."""
        value = self.mu * (np.abs(u) + self.mu)
        slope = np.exp(np.minimum(math.log(self.q) + self.mu * (u - self.mu / 2) - loss, 0.0))
        rounding = 16 * np.abs(loss) + 8 * slope * (1 + value) + 64 * self.q
        return float(EPS * rounding.max())


@dataclass(frozen=True, eq=False)
class _Masses:
    """The mass of each cell, under both directions, and the part of it that goes to the upper end."""

    removed: Array
    removed_up: Array
    added: Array
    added_up: Array
    slack: float


def _masses(loss: _Loss, edges: Array, losses: Array, interval: float) -> _Masses:
    """The integrals over the cells between `edges` of u, whose lower ends have the losses `losses`."""
    mu, q, cells = loss.mu, loss.q, len(losses)
    extra = np.arange(edges[0], edges[-1], _PIECE)[1:] if np.diff(edges).max() > _PIECE else np.empty(0)
    cuts = np.sort(np.concatenate([edges, extra]))
    cell = np.minimum(np.searchsorted(edges, cuts[:-1], side="right") - 1, cells - 1)
    half, middle = np.diff(cuts) / 2, (cuts[:-1] + cuts[1:]) / 2
    start, width = losses[cell], -math.expm1(-interval)
    sums, slack = np.zeros((4, len(half))), 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(4), strict=True):
        u = middle + node * half
        at = loss(u)
        slack = max(slack, loss.slack(u, at))
        absent, present = _density(u) * (half * weight), _density(u - mu) * (half * weight)
        mixed = (1 - q) * absent + q * present
        up = np.clip(np.expm1(np.minimum(start - at, 1.0)) / -width, 0.0, 1.0)
        up_added = np.clip(np.expm1(np.minimum(at - start - interval, 1.0)) / -width, 0.0, 1.0)
        sums += np.stack([mixed, mixed * up, absent, absent * up_added])
    # Rounding: of the exponents, whose size is the square of the distance, and of a few operations.
    farthest = np.maximum(np.abs(middle), np.abs(middle - mu)) + half
    sums *= 1 + 4 * EPS * (16 + np.minimum(farthest**2, 1e6))
    none, some = _quadrature_error(middle, half), _quadrature_error(middle - mu, half)
    mixed_error = (1 - q) * none + q * some
    with np.errstate(over="ignore"):
        sums[0] += mixed_error
        sums[1] += (mixed_error + _scaled(start, none)) / width
        sums[2] += none
        sums[3] += (none + _scaled(-start - interval, mixed_error)) / width
    removed, removed_up, added, added_up = (np.bincount(cell, row, cells).astype(np.float64) for row in sums)
    return _Masses(removed, np.minimum(removed_up, removed), added, np.minimum(added_up, added), slack)


def _density(t: Array) -> Array:
    """The standard normal's."""
    return np.asarray(np.exp(-t * t / 2)) / math.sqrt(2 * math.pi)


def _quadrature_error(t: Array, half: Array) -> Array:
    """An upper bound on the quadrature error of a piece of the standard normal's density.

    Its eighth derivative is He_8(t) times the density, and |He_8(t)| <= (t^2 + 105^(1/4))^4.
    """
    nearest = np.maximum(np.abs(t) - half, 0.0)
    derivative = ((np.abs(t) + half) ** 2 + 3.21) ** 4 * _density(nearest)
    return np.asarray(_QUADRATURE * (2 * half) ** 9 * derivative)


def _scaled(exponent: Array, error: Array) -> Array:
    """exp(exponent) x error, 0 where the error is."""
    with np.errstate(divide="ignore"):
        return np.exp(np.minimum(exponent + np.log(error), 700.0))
