"""Accounting: epsilon of a history of noisy steps, and the noise or the steps that meet a target.

Every function speaks of the Poisson-subsampled Gaussian mechanism under the relation "add or remove one
image", for which zeroing one image out gives the same pair of distributions and the same epsilon.

Three accountants bound the same epsilon from above:
    pld  privacy loss distributions (`dp_lora.privacy.loss_distribution`): never below the truth, within 1 %
         of it down to a delta of `LEAST_DELTA`, below which it gives no bound.
    rdp  Renyi differential privacy (`dp_lora.privacy.renyi`): looser by 5 to 10 %, for every delta.
    prv  Opacus' numerical composition (Gopi et al. 2021): a cross-check by other people's code. It lowers no
         epsilon, and is inf where its own rounding would be felt.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dp_lora.errors import PlanError
from dp_lora.privacy.loss_distribution import delta_bounds, epsilon_bound
from dp_lora.privacy.renyi import (
    FEW_ORDERS,
    ORDERS,
    delta_of_divergences,
    divergences_of,
    epsilon_of_divergences,
    renyi_divergences,
)
from dp_lora.privacy.subsampled_gaussian import Mechanism

MAX_STEPS = 10**7
MANY = 24
"""Different mechanisms that are composed by their privacy loss distributions, a fraction of a second each."""

LEAST_DELTA = 1e-12
"""The smallest delta with bounds from privacy loss distributions."""

# About the most cells of a privacy loss distribution.
_CELLS = 1 << 20
# The longest distribution that the PRV accountant may convolve: about half a second.
_PRV_POINTS = 1 << 19
# The smallest delta at which its bound is looked at: its transform's rounding moved it from 1e-10 down.
_PRV_DELTA = 1e-9


@dataclass(frozen=True)
class Spent:
    """An upper bound on epsilon and the accountant that gave it."""

    epsilon: float
    accountant: str


def epsilon_by_accountant(mechanisms: Sequence[Mechanism], delta: float) -> dict[str, float]:
    """Upper bounds on epsilon of all `mechanisms` together, by accountant: prv, pld, rdp.

    0 for an empty history, inf without noise. prv is inf where that accountant fails, cannot be trusted
    (delta below 1e-9, very many steps) or would take more than about a second (large epsilon, tiny noise,
    full batches); pld is inf below `LEAST_DELTA`.

    >>> bounds = epsilon_by_accountant([Mechanism(1.4899, 4096 / 50000, 1000)], 1e-5)
    >>> {name: round(bound, 1) for name, bound in bounds.items()}
    {'prv': 10.0, 'pld': 10.0, 'rdp': 10.8}
    """
    _check_delta(delta)
    merged, delta = _merged(mechanisms), float(delta)
    if not merged:
        return {"prv": 0.0, "pld": 0.0, "rdp": 0.0}
    if any(m.noise_multiplier == 0 for m in merged):
        return {"prv": math.inf, "pld": math.inf, "rdp": math.inf}
    return {"prv": _prv(merged, delta), "pld": _pld(merged, delta), "rdp": _rdp(merged, delta)}


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> Spent:
    """The smaller of pld and rdp, and whose it is."""
    return smallest(epsilon_by_accountant(mechanisms, delta))


def composed(mechanisms: Sequence[Mechanism], delta: float, cache: Path | None = None) -> Spent:
    """An upper bound on epsilon of many runs together: pld, or rdp where that is smaller at a few orders.

    It holds for runs whose parameters were fixed before the first of them; `renyi.least_budget` is for runs
    that were chosen after seeing what the others released.

    More than `MANY` different mechanisms have the rdp bound alone.

    Args:
        mechanisms: of all runs.
        delta: in (0, 1).
        cache: as of `noise_multiplier_for`.

    >>> ten = Mechanism(1.4899, 4096 / 50000, 1000)
    >>> 10 < composed([ten, ten], 1e-5).epsilon < 2 * composed([ten], 1e-5).epsilon
    True
    """
    _check_delta(delta)
    merged = tuple(sorted(_merged(mechanisms), key=astuple))
    if not merged:
        return Spent(0.0, "pld")
    if any(m.noise_multiplier == 0 for m in merged):
        return Spent(math.inf, "none")
    if len(merged) <= MANY:
        question = {"version": 2, "delta": delta, "mechanisms": [list(astuple(m)) for m in merged]}
        bound = _kept(cache, "composed", question, lambda: _pld_below_rdp(merged, delta))
        if math.isfinite(bound):
            return Spent(bound, "pld")
    return Spent(_rdp(merged, delta), "rdp")


def _pld_below_rdp(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """`_pld`, or inf where rdp at the few orders that it needed anyway is smaller."""
    bound = _pld(mechanisms, delta)
    return bound if bound <= _rdp(mechanisms, delta, FEW_ORDERS) else math.inf


def smallest(bounds: dict[str, float]) -> Spent:
    """The smaller of the two proven bounds of `epsilon_by_accountant`: prv only confirms them."""
    return min((Spent(bounds[name], name) for name in ("pld", "rdp")), key=lambda spent: spent.epsilon)


def privacy_profile(
    mechanism: Mechanism, epsilons: npt.NDArray[np.float64], delta: float
) -> npt.NDArray[np.float64]:
    """Upper bounds on delta at each of `epsilons`, rising: the mechanism is (epsilon, delta)-private at each.

    Args:
        mechanism: with noise.
        epsilons: 0 or more, rising.
        delta: the order of magnitude at which the bounds are to be tight.

    >>> bounds = privacy_profile(Mechanism(1.4899, 4096 / 50000, 1000), np.array([0.0, 9.98]), 1e-5)
    >>> bool(0.5 < bounds[0] < 0.9), bool(0.9e-5 < bounds[1] < 1.1e-5)
    (True, True)
    """
    return profile_of([mechanism], epsilons, delta)


def profile_of(
    mechanisms: Sequence[Mechanism], epsilons: npt.NDArray[np.float64], delta: float
) -> npt.NDArray[np.float64]:
    """`privacy_profile` of all `mechanisms` together, which were fixed beforehand."""
    _check_delta(delta)
    merged = _merged(mechanisms)
    if not merged:
        return np.zeros(len(epsilons))
    divergences = renyi_divergences(merged)
    deltas = np.array([delta_of_divergences(divergences, value) for value in epsilons])
    if delta < LEAST_DELTA:
        return deltas
    return np.asarray(np.minimum(deltas, delta_bounds(merged, epsilons, delta, _interval(merged, delta))))


def noise_multiplier_for(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, cache: Path | None = None
) -> float:
    """The noise multiplier whose epsilon is at most `target_epsilon`, and at least 99.5 % of it.

    Args:
        target_epsilon: finite and above 0.
        delta: in (0, 1).
        sample_rate: probability of an example to be in a batch.
        steps: number of noisy steps.
        cache: folder for results, one small file each, written atomically; None keeps none.

    >>> 1.48 < noise_multiplier_for(10.0, 1e-5, 4096 / 50000, 1000) < 1.50
    True
    """
    _check_delta(delta)
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon={target_epsilon}: expected a finite number above 0")
    question = {
        "version": 2,
        "target_epsilon": target_epsilon,
        "delta": delta,
        "sample_rate": sample_rate,
        "steps": steps,
    }
    return _kept(
        cache, "noise_multipliers", question, lambda: _calibrate(target_epsilon, delta, sample_rate, steps)
    )


def steps_for(target_epsilon: float, delta: float, sample_rate: float, noise_multiplier: float) -> int:
    """The largest number of steps whose epsilon does not pass `target_epsilon`.

    Raises:
        PlanError: one step passes it already, or more than ten million steps do not.
    """
    _check_delta(delta)

    def fits(steps: int) -> bool:
        return _bound((Mechanism(noise_multiplier, sample_rate, steps),), delta) <= target_epsilon

    name = f"<noise_multiplier>={noise_multiplier:g}"
    if noise_multiplier == 0 or not fits(1):
        raise PlanError(f"{name}: one step passes <target_epsilon>={target_epsilon:g}: expected more noise")
    # What RDP allows, PLD allows; and RDP is cheap and not far off.
    once = divergences_of(Mechanism(noise_multiplier, sample_rate, 1))
    low, high = 1, 2
    while high < MAX_STEPS and epsilon_of_divergences(once * high, delta) <= target_epsilon:
        low, high = high, 2 * high
    while high - low > max(low // 64, 1):
        middle = (low + high) // 2
        low, high = (
            (middle, high)
            if epsilon_of_divergences(once * middle, delta) <= target_epsilon
            else (low, middle)
        )
    while high < MAX_STEPS and fits(high):
        low, high = high, high + high // 8 + 1
    if high >= MAX_STEPS:
        raise PlanError(
            f"{name}: {MAX_STEPS} steps stay under <target_epsilon>={target_epsilon:g}: expected "
            "<steps>, or less noise"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class EpsilonCurve:
    """Epsilon after t steps of a mechanism, for every t, cheap enough to log at each step.

    Each value is an upper bound: the smaller of the RDP bound after exactly t steps and of the PLD bound
    after the next of `points` equal parts of the run, which is not below that after t because epsilon
    grows with the number of steps. At the end of a part, and so of the run, it is the PLD bound itself.
    A part's bound is computed when the run reaches it.

    Args:
        mechanism: the whole run.
        delta: in (0, 1).
        before: what the same data has been through already.
        points: number of parts.
    """

    def __init__(
        self, mechanism: Mechanism, delta: float, before: Sequence[Mechanism] = (), points: int = 16
    ) -> None:
        _check_delta(delta)
        self._mechanism, self._delta, self._before = mechanism, delta, _merged(before)
        self._part = max(1, -(-mechanism.steps // points))
        self._pld_after: dict[int, float] = {}
        noiseless = any(m.noise_multiplier == 0 for m in [mechanism, *self._before])
        if noiseless:
            self._rdp, self._rdp_before = None, np.zeros(len(ORDERS))
        else:
            self._rdp = divergences_of(Mechanism(mechanism.noise_multiplier, mechanism.sample_rate, 1))
            self._rdp_before = np.sum([np.zeros(len(ORDERS)), *map(divergences_of, self._before)], axis=0)

    def __call__(self, steps: int) -> float:
        """An upper bound on epsilon after `steps` steps."""
        if steps == 0 and not self._before:
            return 0.0
        if self._rdp is None:
            return math.inf
        end = min(-(-steps // self._part) * self._part, max(self._mechanism.steps, steps))
        if end not in self._pld_after:
            part = Mechanism(self._mechanism.noise_multiplier, self._mechanism.sample_rate, end)
            self._pld_after[end] = _pld(_merged([*self._before, part]), self._delta)
        after = epsilon_of_divergences(self._rdp_before + self._rdp * steps, self._delta)
        return min(self._pld_after[end], after)


# The accountants


def _merged(mechanisms: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """One entry for each (noise multiplier, sample rate), without those that release nothing."""
    steps: dict[tuple[float, float], int] = {}
    for m in mechanisms:
        if m.steps and m.sample_rate:
            key = (m.noise_multiplier, m.sample_rate)
            steps[key] = steps.get(key, 0) + m.steps
    return tuple(Mechanism(sigma, q, count) for (sigma, q), count in steps.items())


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}: expected a number in (0, 1)")


def _rdp(mechanisms: Sequence[Mechanism], delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    divergences = np.sum([divergences_of(m, orders) for m in mechanisms], axis=0)
    return epsilon_of_divergences(divergences, delta, orders)


# The jobs of a sweep that run in one process ask for the same bounds again.
@functools.lru_cache(maxsize=256)
def _pld(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """The bound of the privacy loss distributions; inf where they give none."""
    if delta < LEAST_DELTA:
        return math.inf
    return epsilon_bound(mechanisms, delta, _interval(mechanisms, delta))


def _bound(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """The pld bound, and the rdp bound where there is none."""
    bound = _pld(mechanisms, delta)
    return bound if math.isfinite(bound) else _rdp(mechanisms, delta)


def _interval(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Width of a cell, a power of two: rounding to it adds less than 0.1 % to epsilon, mostly 0.01 %.

    Rounding a step's loss adds about interval^2 to its variance while the interval is small beside the
    loss (the first bound), and about interval to epsilon once a step's loss is far from Gaussian. There are
    about `_CELLS` at most: where epsilon is near 0, its relative error matters to nobody and memory does.
    """
    steps, rough = sum(m.steps for m in mechanisms), _rdp(mechanisms, delta, FEW_ORDERS)
    least = min(m.noise_multiplier for m in mechanisms)
    wanted = min(0.01 * rough / math.sqrt(steps), rough / 2e4, 0.05 / least)
    # Ten standard deviations to each side: of one step's loss and, about, of all steps' together.
    variance = sum(m.steps * (m.sample_rate / m.noise_multiplier) ** 2 for m in mechanisms)
    finest = max(1 / least**2 + 20 / least, variance + 20 * math.sqrt(variance)) / _CELLS
    return float(2.0 ** math.floor(math.log2(max(wanted, finest))))


@functools.lru_cache(maxsize=256)
def _prv(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """Opacus' upper bound, or inf where it fails, is slow, or its transform's rounding is felt."""
    rough, steps = _rdp(mechanisms, delta), sum(m.steps for m in mechanisms)
    # A step adds about one rounding to every probability.
    if delta < _PRV_DELTA or steps * 2.0**-52 > delta / 100 or any(m.sample_rate == 1 for m in mechanisms):
        return math.inf
    delta_error = delta / 1000
    # The accountant's own rule for the size of what it convolves.
    once = [Mechanism(m.noise_multiplier, m.sample_rate, 1) for m in mechanisms]
    single = max(_rdp([m], delta_error / (8 * steps)) for m in once)
    reach = 3 + max(_rdp(mechanisms, delta_error / 4), single)
    finest = 2 * reach / _PRV_POINTS * len(mechanisms) * math.sqrt(steps * math.log(12 / delta_error) / 2)
    error = max(finest, min(0.01, rough / 1000))
    if error > 0.02 * max(rough, 1.0) or error >= 1:
        return math.inf
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [astuple(m) for m in mechanisms]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            bound = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta_error))
    except (RuntimeError, ValueError, OverflowError):
        # Known failures of its discretisation: no bound from it, the two others stand.
        return math.inf
    return bound if bound >= 0 else math.inf


# Calibration


def _calibrate(target: float, delta: float, sample_rate: float, steps: int) -> float:
    """Regula falsi on (log sigma, log epsilon), which is close to a straight line."""

    def log_epsilon(log_sigma: float) -> float:
        spent = _bound((Mechanism(math.exp(log_sigma), sample_rate, steps),), delta)
        return math.log(max(spent, 1e-300))

    wanted = math.log(target * (1 - 2e-3))
    guess = _rdp_sigma(target, delta, sample_rate, steps)
    high, at_high = _step_until(log_epsilon, math.log(guess), 0.05, lambda value: value <= wanted)
    low, at_low = _step_until(log_epsilon, high - 0.1, -0.1, lambda value: value > wanted)
    for attempt in range(60):
        if target * (1 - 4e-3) <= math.exp(at_high) <= target:
            break
        share = (at_low - wanted) / (at_low - at_high) if attempt % 4 < 3 else 0.5
        middle = low + min(max(share, 0.02), 0.98) * (high - low)
        at_middle = log_epsilon(middle)
        if math.exp(at_middle) <= target:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return math.exp(high)


def _step_until(
    function: Callable[[float], float], start: float, step: float, done: Callable[[float], bool]
) -> tuple[float, float]:
    """The first of start, start + step, start + 3 step, ... whose value is `done`, and the value."""
    value = function(start)
    while not done(value):
        start, step = start + step, 2 * step
        value = function(start)
    return start, value


def _rdp_sigma(target: float, delta: float, sample_rate: float, steps: int) -> float:
    """A noise multiplier whose RDP epsilon is near `target`: where the search begins."""
    low, high = math.log(1e-3), math.log(1e6)
    for _ in range(24):
        middle = (low + high) / 2
        spent = _rdp([Mechanism(math.exp(middle), sample_rate, steps)], delta, FEW_ORDERS)
        low, high = (low, middle) if spent <= target else (middle, high)
    return math.exp(high)


def _kept(cache: Path | None, kind: str, question: dict[str, Any], compute: Callable[[], float]) -> float:
    """The answer kept for `question`, else computed and kept.

    A file that is damaged or answers another question counts as none.
    """
    if cache is None:
        return compute()
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / kind / f"{digest}.json"
    try:
        kept = json.loads(path.read_text())
        if kept["question"] == question:
            return float(kept["answer"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    answer = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump({"question": question, "answer": answer}, file)
    os.replace(file.name, path)
    return answer
