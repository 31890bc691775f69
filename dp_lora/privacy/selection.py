"""The cost of releasing only the best of many private runs (Papernot and Steinke 2022, arXiv 2110.03620).

The theorems speak of one algorithm: draw a number of runs K, make K independent runs of one mechanism, each
of which also yields a score, and release the one of the best score and nothing of the others. Their bounds
need that

    * K is random, with the distribution named here, and is not released itself;
    * every run is the same mechanism: here, draw a cell of the grid uniformly and run it;
    * the score is computed from what the run releases, or has been paid for: a score on private images that
      no noise protects is outside of all of this.

A sweep that runs every cell of its grid once and shows the table is no such algorithm: it pays for the
composition of all its runs. `Search` is one: `sweep=private_search` runs it, and draws K by `drawn_number`.
"""

from __future__ import annotations

import functools
import itertools
import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from decimal import Context, Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from dp_lora.privacy.renyi import ORDERS, delta_of_divergences, epsilon_of_divergences, renyi_divergences
from dp_lora.privacy.subsampled_gaussian import Mechanism

Divergences = npt.NDArray[np.float64]
"""At the orders of `renyi.ORDERS`."""


@dataclass(frozen=True)
class Selection:
    """An upper bound on epsilon of releasing the best of K runs, and the distribution of K that has it."""

    epsilon: float
    distribution: str
    """logarithmic, geometric or Poisson."""
    expected_runs: float


def best_of(
    cells: Sequence[Sequence[Mechanism]], delta: float, expected_runs: float | None = None
) -> Selection:
    """The smallest bound of the three distributions of K with mean `expected_runs`.

    The choice looks at the mechanisms only, which are public.

    Args:
        cells: all that a run of each cell releases; a run draws one of them uniformly. Where they differ the
            bound is that of the drawing and the run together, which is exact.
        delta: in (0, 1).
        expected_runs: mean of K, 1 or more; None: as many as there are cells.

    >>> run = Mechanism(noise_multiplier=2.0, sample_rate=0.05, steps=200)
    >>> alone = epsilon_of_divergences(renyi_divergences([run]), 1e-5)
    >>> together = epsilon_of_divergences(renyi_divergences([run] * 12), 1e-5)
    >>> alone < best_of([[run]] * 12, 1e-5).epsilon < together
    True
    """
    runs = float(len(cells) if expected_runs is None else expected_runs)
    if not cells or not 1 <= runs < math.inf:
        raise ValueError(f"expected_runs={runs:g} of {len(cells)} cells: expected at least 1 of each")
    one = uniform_mixture([renyi_divergences(cell) for cell in cells])
    bounds = {name: epsilon_of_divergences(bound(one, runs), delta) for name, bound in BOUNDS.items()}
    name = min(bounds, key=lambda name: bounds[name])
    return Selection(bounds[name], name, runs)


def uniform_mixture(divergences: Sequence[Divergences]) -> Divergences:
    """Divergences of a run that draws one of several mechanisms uniformly and tells which.

    The draw does not depend on the data, so exp((order - 1) divergence) is the mean of the mechanisms'.
    """
    rates = np.asarray(ORDERS) - 1
    exponents = rates * np.stack(divergences)
    largest = exponents.max(axis=0)
    with np.errstate(invalid="ignore"):
        mean = np.log(np.mean(np.exp(exponents - largest), axis=0)) + largest
    return np.where(np.isfinite(largest), mean / rates, np.inf)


def best_of_truncated_negative_binomial(one: Divergences, expected_runs: float, eta: float) -> Divergences:
    """Theorem 2: divergences of the best of K runs, K from the truncated negative binomial of shape eta.

    Args:
        one: of a single run.
        expected_runs: mean of K, at least 1.
        eta: 0 is the logarithmic distribution, 1 the geometric one; any number above -1 has the theorem, 0
            and more are taken here.
    """
    if expected_runs == 1:
        return one  # K is 1, always
    orders, log_inverse_gamma = np.asarray(ORDERS), -math.log(gamma_of(expected_runs, eta))
    # The theorem's second order is free.
    extra = (1 + eta) * float(np.min((1 - 1 / orders) * one + log_inverse_gamma / orders))
    bound = one + extra + math.log(expected_runs) / (orders - 1)
    # A divergence grows with its order, so that each bounds the ones below it.
    return np.minimum.accumulate(bound[::-1])[::-1]


def best_of_poisson(one: Divergences, expected_runs: float) -> Divergences:
    """Theorem 6: divergences of the best of K runs, K from the Poisson distribution; nothing when K is 0.

    The (epsilon, delta) of a single run that the theorem asks for at each order are those of `one`.
    """
    orders = np.asarray(ORDERS)
    deltas = [delta_of_divergences(one, math.log1p(1 / (order - 1))) for order in ORDERS]
    bound = one + expected_runs * np.asarray(deltas) + math.log(expected_runs) / (orders - 1)
    return np.minimum.accumulate(bound[::-1])[::-1]


BOUNDS: dict[str, Callable[[Divergences, float], Divergences]] = {
    "logarithmic": functools.partial(best_of_truncated_negative_binomial, eta=0.0),
    "geometric": functools.partial(best_of_truncated_negative_binomial, eta=1.0),
    "Poisson": best_of_poisson,
}


def expected_runs_of(gamma: float, eta: float) -> float:
    """Mean of K of the truncated negative binomial (definition 1), for gamma in (0, 1).

    >>> expected_runs_of(0.25, eta=1.0)
    4.0
    """
    if eta == 0:
        return (1 / gamma - 1) / math.log(1 / gamma)
    return eta * (1 - gamma) / (gamma * (1 - math.pow(gamma, eta)))


def gamma_of(expected_runs: float, eta: float) -> float:
    """The gamma whose K has this mean, at most: a smaller gamma costs more. 1 for a mean of 1.

    >>> round(expected_runs_of(gamma_of(10.0, eta=0.0), eta=0.0), 6)
    10.0
    """
    if expected_runs == 1:
        return 1.0
    # In log(1 / gamma), in which the mean grows from 1 without end.
    low, high = 0.0, 1.0
    while expected_runs_of(math.exp(-high), eta) < expected_runs:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if middle > 0 and expected_runs_of(math.exp(-middle), eta) >= expected_runs:
            high = middle
        else:
            low = middle
    return math.exp(-high)


# A search

SEARCHED_BY = "rdp of a private search"
"""Stands where the accountant of an epsilon is named."""

SETS = ("training", "held_out", "both")
"""Whom a statement of a search is for: whoever has an image in the training, among the held-out images that
trials are scored on, or in both."""


@dataclass(frozen=True)
class Search:
    """A private search: K trials, each of a cell drawn uniformly; only the best of them is released.

    Guarantee: let K be drawn by `drawn_number`, each trial draw one of `cells` uniformly, train by its noisy
    steps, and be scored by one sum over the held-out images with noise; let a trial that fails count as the
    worst; and let the best one be released with its cell and score, and nothing that depends on K or on the
    other trials. Then `divergences` bounds the Renyi divergences of what is released.
    """

    cells: tuple[Mechanism, ...]
    """The training of each cell, as often as there are cells of it."""
    score: Mechanism
    """The noised sum over the held-out images, which is made once a trial."""
    distribution: str
    """Of K: a name in `BOUNDS`."""
    expected_trials: float
    """The mean of K, at least 1."""

    def __post_init__(self) -> None:
        # In one order: the search that a ledger gives back equals the one that was written.
        object.__setattr__(self, "cells", tuple(sorted(self.cells, key=astuple)))

    def divergences(self, of: str = "both") -> Divergences:
        """Of everything that the search releases, for one of `SETS`."""
        return _divergences_of(self, of)

    def epsilon(self, delta: float, of: str = "both") -> float:
        """An upper bound on the search's epsilon, for one of `SETS`."""
        return epsilon_of_divergences(self.divergences(of), delta)

    def to_dict(self) -> dict[str, Any]:
        """The search for a ledger or a statement: numbers from which its divergences are computed."""
        return {
            "distribution": self.distribution,
            "expected_trials": self.expected_trials,
            "score_noise_multiplier": self.score.noise_multiplier,
            "cells": [
                {
                    "noise_multiplier": one.noise_multiplier,
                    "sample_rate": one.sample_rate,
                    "steps": one.steps,
                    "cells": count,
                }
                for one, count in Counter(self.cells).items()
            ],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Search:
        """The search of which `to_dict` gave `record`. Raises KeyError, TypeError or ValueError otherwise."""
        cells = [
            Mechanism(row["noise_multiplier"], row["sample_rate"], row["steps"])
            for row in record["cells"]
            for _ in range(row["cells"])
        ]
        name, runs = record["distribution"], float(record["expected_trials"])
        if name not in BOUNDS or not cells or not 1 <= runs < math.inf:
            raise ValueError(f"{name}, {len(cells)} cells, {runs:g} trials")
        return cls(tuple(cells), Mechanism(record["score_noise_multiplier"], 1.0, 1), name, runs)


@functools.lru_cache(maxsize=64)
def _divergences_of(search: Search, of: str) -> Divergences:
    if of not in SETS:
        raise ValueError(f"of={of}: expected one of {', '.join(SETS)}")
    counts = Counter(search.cells)
    score = renyi_divergences([] if of == "training" else [search.score])
    trained = {
        cell: renyi_divergences([]) if of == "held_out" else renyi_divergences([cell]) for cell in counts
    }
    # Added before the theorem: somebody in both sets is seen twice by one and the same trial.
    one = uniform_mixture([trained[cell] + score for cell in search.cells])
    return BOUNDS[search.distribution](one, search.expected_trials)


_DIGITS = Context(prec=60)


def probabilities(distribution: str, expected_runs: float) -> Iterator[Decimal]:
    """P(K = 0), P(K = 1), ... of a distribution in `BOUNDS` with the mean `expected_runs`, to 50 digits.

    Definition 1 of the paper for the truncated negative binomial, whose shape is 0 for the logarithmic
    distribution and 1 for the geometric one.

    >>> [float(p) for p in itertools.islice(probabilities("geometric", 4.0), 4)]
    [0.0, 0.25, 0.1875, 0.140625]
    """
    if distribution == "Poisson":
        mean = Decimal(expected_runs)
        value = _DIGITS.exp(_DIGITS.minus(mean))
        yield value
        for k in itertools.count(1):
            value = _DIGITS.divide(_DIGITS.multiply(value, mean), Decimal(k))
            yield value
    eta = {"logarithmic": 0, "geometric": 1}[distribution]
    gamma = Decimal(gamma_of(expected_runs, float(eta)))
    rest = _DIGITS.subtract(Decimal(1), gamma)
    value = gamma if eta == 1 or gamma == 1 else _DIGITS.divide(rest, _DIGITS.minus(_DIGITS.ln(gamma)))
    yield Decimal(0)
    for k in itertools.count(1):
        yield value
        value = _DIGITS.divide(
            _DIGITS.multiply(_DIGITS.multiply(value, rest), Decimal(k + eta)), Decimal(k + 1)
        )


def drawn_number(
    distribution: str, expected_runs: float, random_bits: Callable[[int], int] = secrets.randbits
) -> int:
    """K, drawn by inversion from 160 secure random bits; there is no largest value.

    Args:
        distribution, expected_runs: as of `probabilities`.
        random_bits: uniform number of so many bits; tests give their own.
    """
    return _number_at(distribution, expected_runs, _DIGITS.divide(Decimal(random_bits(160)), Decimal(2**160)))


def largest_number(distribution: str, expected_runs: float, share: float) -> int:
    """The smallest number that K does not pass with probability `share`, in (0, 1).

    >>> largest_number("Poisson", 8.0, 0.95)
    13
    """
    return _number_at(distribution, expected_runs, Decimal(share))


def _number_at(distribution: str, expected_runs: float, level: Decimal) -> int:
    total = Decimal(0)
    for number, probability in enumerate(probabilities(distribution, expected_runs)):
        total = _DIGITS.add(total, probability)
        if total > level:
            return number
    raise AssertionError("the probabilities add up to 1")
