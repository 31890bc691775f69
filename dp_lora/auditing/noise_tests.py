"""Tests of the release itself: whether it shows as much noise, and as independent, as was claimed.

A guess of who was in the training says little about an engine that adds too little noise while it samples few
examples: most canaries are in few batches, and the score that is best for the claimed noise is a bad one for
less. The noise can be looked at directly. Where no example has a gradient, a release holds noise alone, and
divided by the standard deviation that was claimed it has to be standard normal, independent from coordinate
to coordinate and from step to step. Where a canary has a coordinate of its own, a release holds the noise and
what this one example adds, which is bounded. And the parameters have to be what the optimiser makes of the
release.

A test is no bound on epsilon. It says with which probability a correct engine would look as bad, and nothing
more: noise of another distribution, or noise that somebody can predict, may pass it.

False alarms: a correct engine is accused with a probability of at most `FALSE_ALARM`. Each of `TESTS` is
accused at an equal share of it, whichever of them are done (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

FALSE_ALARM = 0.01
"""How often all tests together accuse an engine that does what it claims, at most."""

TESTS = {
    "variance": "too little noise of all steps and coordinates together",
    "variance_above": "too much noise of all steps and coordinates together",
    "weakest_step": "the step with the least noise",
    "weakest_coordinate": "the coordinate with the least noise",
    "alike_steps": "the two steps whose noise is most alike",
    "alike_coordinates": "the two coordinates whose noise is most alike",
    "largest_contribution": "the largest value at the coordinates of the canaries",
    "weakest_tensor": "the trained tensor with the least noise, in steps on no example",
    "loudest_tensor": "the trained tensor with the most noise, in steps on no example",
    "weakest_trained_coordinate": "the trained coordinate with the least noise, in steps on no example",
    "repeated_noise": "noise that came twice at any place, in steps on no example",
    "missing_release": "a step that released nothing",
    "unreleased_update": "parameters that are not what the optimiser makes of the releases",
    "run_update_norms": "the update norms that the run has logged, together",
    "run_smallest_update_norm": "the smallest update norm that the run has logged",
}
"""The subject of each test. `missing_release` and `unreleased_update` involve no chance: p is 0 or 1."""

WATCHED = 256
"""Coordinates whose noise is kept for every step, to see whether some of it came twice."""

KEPT = 1 << 22
"""Neighbouring values that are kept of about so many places at most, to see whether some came twice."""

_SAME = 2.0**-72
"""Largest probability that three neighbouring values of one place are, signs aside, those of another."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""An odd number whose multiples have first bits that look drawn (Knuth's multiplicative hashing)."""

_FLOAT32_LOSS = 1e-10
"""Relative loss of a norm in float32, for each square in its sum: measured for up to 5e7 of them."""

_BLOCK = 1024


@dataclass(frozen=True)
class Verdict:
    """The p-values of the tests that were done, and what follows from all of them."""

    p_values: Mapping[str, float]
    """By the names in `TESTS`: each is at most a with a probability of at most a if the engine is correct."""

    @property
    def p_value(self) -> float:
        """The p-value of all tests together: the smallest one, corrected for their number."""
        return min(1.0, len(TESTS) * min(self.p_values.values(), default=1.0))

    @property
    def accused(self) -> tuple[str, ...]:
        """The tests that a correct engine passes, but for a share of `FALSE_ALARM`."""
        return tuple(name for name, p in self.p_values.items() if p < FALSE_ALARM / len(TESTS))


def together(*parts: Mapping[str, float]) -> dict[str, float]:
    """All p-values; of a test that was done twice, and whose p-values are 0 or 1, the smaller one."""
    return {
        name: min(part[name] for part in parts if name in part)
        for name in TESTS
        if any(name in part for part in parts)
    }


def largest_contribution(largest: float, values: int, sigma: float, amplitude: float) -> float:
    """A p-value against one example that adds more than it may to its own coordinate, at any step.

    A value is a contribution in [-a, a] and Gaussian noise. Its magnitude is above x > a with a probability
    of at most sf((x - a) / sigma) + sf((x + a) / sigma), since that grows with the magnitude of the
    contribution. The number of values is paid for (Bonferroni), whether they are independent or not.

    Args:
        largest: magnitude of the largest value.
        values: number of them.
        sigma: standard deviation of the noise on each, as claimed.
        amplitude: a, in the same unit.
    """
    from scipy.stats import norm

    if largest <= amplitude:
        return 1.0
    tail = norm.sf((largest - amplitude) / sigma) + norm.sf((largest + amplitude) / sigma)
    return min(1.0, values * float(tail))


class SilentNoise:
    """The releases of a training's steps at coordinates where no example has a gradient.

    Args:
        coordinates: number of them, at least 1.
    """

    def __init__(self, coordinates: int) -> None:
        self._by_coordinate = np.zeros(coordinates)
        self._by_step: list[float] = []
        self._watched: list[npt.NDArray[np.float32]] = []

    def add(self, values: Floats) -> None:
        """Takes one step.

        Args:
            values: [coordinates], divided by the standard deviation of the noise that is claimed. What is
                not finite is no noise and counts as 0.
        """
        values = np.where(np.isfinite(values), values, 0.0)
        squares = np.square(values, dtype=np.float64)
        self._by_coordinate += squares
        self._by_step.append(float(squares.sum()))
        self._watched.append(values[:WATCHED].astype(np.float32))

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        return len(self._by_step)

    @property
    def observations(self) -> int:
        """Number of values so far."""
        return self.steps * len(self._by_coordinate)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All that `from_arrays` needs."""
        watched = np.array(self._watched, dtype=np.float32).reshape(self.steps, -1)
        return {
            "noise_by_coordinate": self._by_coordinate.copy(),
            "noise_by_step": np.array(self._by_step),
            "noise_watched": watched,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> SilentNoise:
        """The record whose `arrays` these are, to go on from."""
        made = cls(len(arrays["noise_by_coordinate"]))
        made._by_coordinate += arrays["noise_by_coordinate"]
        made._by_step = [float(value) for value in arrays["noise_by_step"]]
        made._watched = list(np.asarray(arrays["noise_watched"], dtype=np.float32))
        return made

    def ratio(self, stop: int | None = None) -> float:
        """The noise's standard deviation over the claimed one, estimated at the coordinates before `stop`."""
        part = self._by_coordinate[:stop]
        return math.sqrt(float(part.sum()) / (self.steps * len(part)))

    def interval(self, confidence: float) -> tuple[float, float]:
        """The exact interval of what `ratio` estimates, if the noise is Gaussian and independent."""
        from scipy.stats import chi2

        total, n, tail = float(self._by_coordinate.sum()), self.observations, (1 - confidence) / 2
        return math.sqrt(total / chi2.ppf(1 - tail, n)), math.sqrt(total / chi2.ppf(tail, n))

    def p_values(self) -> dict[str, float]:
        """The tests of too little noise, of too much, and of noise that came twice.

        Under the claim the sum of n squares has the chi-square distribution with n degrees of freedom, and
        the smallest of several p-values times their number is a p-value. Noise that is left out at one step,
        or for one coordinate, shows in those of single steps and coordinates. Too much of it harms nobody by
        itself, but says that a release is scaled by something else than the plan, such as the batch.
        """
        from scipy.stats import chi2

        steps, coordinates = self.steps, len(self._by_coordinate)
        watched = np.array(self._watched, dtype=np.float64).reshape(steps, -1)
        weakest_step, weakest = min(self._by_step), float(self._by_coordinate.min())
        return {
            "variance": float(chi2.cdf(sum(self._by_step), steps * coordinates)),
            "variance_above": float(chi2.sf(sum(self._by_step), steps * coordinates)),
            "weakest_step": min(1.0, steps * float(chi2.cdf(weakest_step, coordinates))),
            "weakest_coordinate": min(1.0, coordinates * float(chi2.cdf(weakest, steps))),
            "alike_steps": most_alike(watched),
            "alike_coordinates": most_alike(np.ascontiguousarray(watched.T)),
        }


def most_alike(rows: Floats) -> float:
    """A p-value against rows that are independent standard normal vectors, from the two most alike.

    The squared cosine of the angle between two of them has the distribution Beta(1/2, (n - 1) / 2) whatever
    their lengths are, so noise that is used twice shows even if it is scaled or turned around. The number of
    pairs is paid for. 1 for fewer than two rows, and for rows of one value, which are all alike.

    Args:
        rows: [rows, n].
    """
    from scipy.stats import beta

    count, n = rows.shape
    if count < 2 or n < 2:
        return 1.0
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    # A row of zeros is like no other: what it lacks is seen by its length.
    unit = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    largest = 0.0
    for start in range(0, count, _BLOCK):
        cosines = np.abs(unit[start : start + _BLOCK] @ unit[start:].T)
        # Each pair once, and no row with itself.
        largest = max(largest, float(np.triu(cosines, 1).max()))
    pairs = count * (count - 1) / 2
    p_value: float = pairs * float(beta.sf(min(1.0, largest**2), 0.5, (n - 1) / 2))
    return min(1.0, p_value)


class ReleasedNoise:
    """The releases of steps on no example, at every coordinate that is trained: noise and nothing else.

    Args:
        sizes: number of coordinates of each trained tensor, in the order of a release; each at least 1.
        noise_std: standard deviation of the noise on each coordinate of a release, as claimed.
        steps: how many will be taken.
    """

    def __init__(self, sizes: Sequence[int], noise_std: float, steps: int) -> None:
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._sizes, self._noise_std, self._steps = np.array(sizes), noise_std, 0
        self._checks: dict[str, float] = {}
        self._by_coordinate = np.zeros(sum(sizes))
        self._triples = 0
        self._kept: list[tuple[Words, Words]] = []
        # One place of 2^n is kept, chosen by the values there: a repetition is kept wherever it is.
        self._thinned = max(0, math.ceil(math.log2(max(1, steps * sum(sizes)) / KEPT)))

    @property
    def coordinates(self) -> int:
        """Number of them."""
        return len(self._by_coordinate)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Takes one step.

        Args:
            values: float32 [coordinates], as released. What is not finite is no noise and counts as 0.
        """
        values = np.ascontiguousarray(values, dtype=np.float32)
        scaled = np.where(np.isfinite(values), values, 0).astype(np.float64) / self._noise_std
        self._by_coordinate += np.square(scaled)
        self._steps += 1
        # Without the sign: what is turned around is repeated, too.
        bits = (values.view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.uint64)
        pairs, third = bits[:-2] << np.uint64(32) | bits[1:-1], bits[2:]
        # Where there is no noise it is missing, not repeated: other tests see that.
        chosen = pairs > 0
        self._triples += len(pairs)
        if self._thinned:
            chosen &= pairs * _GOLDEN >> np.uint64(64 - self._thinned) == 0
        self._kept.append((pairs[chosen], third[chosen]))

    def checked(self, p_values: Mapping[str, float]) -> None:
        """Takes what else was found in these steps, by the names in `TESTS`."""
        self._checks |= p_values

    def p_values(self) -> dict[str, float]:
        """The tests of too little noise, of too much, and of noise that came twice; and what else was found.

        Those of the size are chi-square tests of the squares of each tensor and of each coordinate; the
        smallest p-value is multiplied by their number. With few steps, that of a coordinate sees no more than
        a coordinate that has no noise at all, or almost none. No step, no test.

        The last counts pairs of places, of one step or of two, at which three neighbouring values are equal
        but for their signs. The magnitude of a normal number that is rounded to float32 has any given value
        with a probability of at most max x f(x) 2^-23 = 0.484 x 2^-23 < 2^-24, f its density. In the order of
        the later place, each of three equalities is one of a new value with one that is given, so two places
        are alike with a probability of at most 2^-72, even if they overlap. By Markov's inequality the
        expected number of such pairs over the number found is a p-value.
        """
        from scipy.stats import chi2

        if not self._steps:
            return dict(self._checks)
        by_tensor = np.add.reduceat(self._by_coordinate, self._starts)
        weak = chi2.cdf(by_tensor, self._steps * self._sizes)
        loud = chi2.sf(by_tensor, self._steps * self._sizes)
        coordinate = chi2.cdf(self._by_coordinate.min(), self._steps)
        found = _equal_pairs(*(np.concatenate(part) for part in zip(*self._kept, strict=True)))
        expected = self._triples * (self._triples - 1) / 2 * _SAME
        return {
            "weakest_tensor": min(1.0, len(self._sizes) * float(weak.min())),
            "loudest_tensor": min(1.0, len(self._sizes) * float(loud.min())),
            "weakest_trained_coordinate": min(1.0, len(self._by_coordinate) * float(coordinate)),
            "repeated_noise": min(1.0, expected / found) if found else 1.0,
            **self._checks,
        }


def _equal_pairs(first: Words, second: Words) -> int:
    """Number of pairs i < j with first[i] = first[j] and second[i] = second[j]."""
    ordered = np.sort(first)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return 0
    suspected = np.isin(first, twice)
    first, second = first[suspected], second[suspected]
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    new = np.flatnonzero((np.diff(first) != 0) | (np.diff(second) != 0)) + 1
    counts = np.diff([0, *new, len(first)])
    return int((counts * (counts - 1) // 2).sum())


def update_norm_p_values(
    norms: Sequence[float], parameters: int | Sequence[int], noise_std: float
) -> dict[str, float]:
    """Whether the update norms of a finished run are smaller than its noise allows; costs no privacy.

    The norm of a noised update is a released value. Let S be the clipped sum and Z the noise of a step. Given
    the steps before, S has some distribution and Z, independent of it, is Gaussian; so |S + Z|^2 over the
    variance has a noncentral chi-square distribution with `parameters` degrees of freedom, mixed over S. It
    is stochastically at least the central one: what the images add can only make it larger. As this holds at
    each step given the ones before, the p-value of each step is valid given those before, and by induction
    the sum over the steps is stochastically at least the central chi-square with all degrees of freedom.

    What it cannot see: less noise where the clipped sum is larger than what is missing.

    Args:
        norms: Euclidean norms of the updates at different steps.
        parameters: number of coordinates that were released, P; or of each update by itself.
        noise_std: standard deviation of the noise on each coordinate of an update, as claimed.
    """
    from scipy.stats import chi2

    if not norms:
        return {}
    # Norms of earlier versions were sums in float32, which come out too small.
    each = np.broadcast_to(np.asarray(parameters), len(norms))
    scaled = np.square(np.asarray(norms) * (1 + _FLOAT32_LOSS * each) / noise_std)
    smallest = float(chi2.cdf(scaled, each).min())
    return {
        "run_update_norms": float(chi2.cdf(scaled.sum(), each.sum())),
        "run_smallest_update_norm": min(1.0, len(norms) * smallest),
    }
