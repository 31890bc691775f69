"""What was spent: epsilon of a history of noisy steps, and the noise or the steps that meet a target.

Every function speaks of the Poisson-subsampled Gaussian mechanism under the relation "add or remove one
image", for which zeroing one image out gives the same pair of distributions and the same epsilon.

Three accountants bound the same epsilon from above:
    pld  dp-accounting's privacy loss distributions, connect-the-dots discretisation, both directions of
         the relation (Doroshenko et al. 2022): rigorous for every interval, the tightest in practice.
    prv  Opacus' numerical composition (Gopi et al. 2021), its upper bound; an independent cross-check.
    rdp  Renyi differential privacy (Mironov et al. 2019): looser by 5 to 10 %, and never fails.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dp_lora.errors import UserError

ADJACENCIES = {
    "add_or_remove": "add or remove one image, Poisson sampling",
    "zero_out": "zero out one image, the number of images is public, Poisson sampling",
}
"""The relations of neighbours, in words; both have the same epsilon."""

MAX_STEPS = 10**7
MANY = 24
"""Different mechanisms that are composed by their privacy loss distributions, a fraction of a second each."""

ORDERS: tuple[float, ...] = (
    *(1.01, 1.02, 1.05),
    *(1 + x / 10 for x in range(1, 60)),
    *(7 + x / 4 for x in range(16)),
    *range(11, 64),
    *(64, 80, 96, 128, 192, 256, 512, 1024),
)
"""Where Renyi divergences are computed."""

# Enough for an order of magnitude: the orders take most of an accountant's time.
_FEW_ORDERS: tuple[float, ...] = (1.05, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
# Wider cells for a whole profile: measured, they raise delta by 6e-5 at most and take a tenth of the time.
_COARSER = 16.0
# About the most cells of a privacy loss distribution.
_CELLS = 1 << 22
# The longest distribution that the PRV accountant may convolve: about half a second.
_PRV_POINTS = 1 << 19


@dataclass(frozen=True)
class Mechanism:
    """`steps` releases of a Poisson batch's clipped sum with noise of std noise_multiplier times C."""

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier={self.noise_multiplier}: expected 0 or more")
        if not 0 <= self.sample_rate <= 1:
            raise ValueError(f"sample_rate={self.sample_rate}: expected a number in [0, 1]")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: expected 0 or more")


@dataclass(frozen=True)
class Spent:
    """An upper bound on epsilon and the accountant that gave it."""

    epsilon: float
    accountant: str


def epsilon_by_accountant(mechanisms: Sequence[Mechanism], delta: float) -> dict[str, float]:
    """Upper bounds on epsilon of all `mechanisms` together, by accountant: prv, pld, rdp.

    0 for an empty history, inf without noise. prv is inf where that accountant fails or would take more
    than about a second (large epsilon, tiny noise, full batches).

    >>> bounds = epsilon_by_accountant([Mechanism(1.4899, 4096 / 50000, 1000)], 1e-5)
    >>> {name: round(bound, 1) for name, bound in bounds.items()}
    {'prv': 10.0, 'pld': 10.0, 'rdp': 10.8}
    """
    _check_delta(delta)
    merged = _merged(mechanisms)
    if not merged:
        return {"prv": 0.0, "pld": 0.0, "rdp": 0.0}
    if any(m.noise_multiplier == 0 for m in merged):
        return {"prv": math.inf, "pld": math.inf, "rdp": math.inf}
    return {"prv": _prv(merged, delta), "pld": _pld(merged, delta), "rdp": _rdp(merged, delta)}


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> Spent:
    """The smallest valid bound of the three, and whose it is.

    A prv below pld by more than its own error cannot be valid and is left aside.
    """
    return smallest(epsilon_by_accountant(mechanisms, delta))


def composed(mechanisms: Sequence[Mechanism], delta: float, cache: Path | None = None) -> Spent:
    """An upper bound on epsilon of many runs together: pld, or rdp where that is smaller at a few orders.

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
    merged = sorted(_merged(mechanisms), key=astuple)
    if not merged:
        return Spent(0.0, "pld")
    if any(m.noise_multiplier == 0 for m in merged):
        return Spent(math.inf, "none")
    if len(merged) <= MANY:
        question = {"version": 1, "delta": delta, "mechanisms": [list(astuple(m)) for m in merged]}
        bound = _kept(cache, "composed", question, lambda: _pld_below_rdp(merged, delta))
        if math.isfinite(bound):
            return Spent(bound, "pld")
    return Spent(_rdp(merged, delta), "rdp")


def _pld_below_rdp(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """`_pld`, or inf where rdp at the few orders that it needed anyway is smaller."""
    bound = _pld(mechanisms, delta)
    return bound if bound <= _rdp(mechanisms, delta, _FEW_ORDERS) else math.inf


def smallest(bounds: dict[str, float]) -> Spent:
    """The smallest valid of the bounds of `epsilon_by_accountant`."""
    valid = {"pld": bounds["pld"], "rdp": bounds["rdp"]}
    if bounds["prv"] >= bounds["pld"] * (1 - 1e-3):
        valid["prv"] = bounds["prv"]
    accountant = min(valid, key=lambda name: valid[name])
    return Spent(valid[accountant], accountant)


def renyi_divergences(mechanisms: Sequence[Mechanism]) -> npt.NDArray[np.float64]:
    """Renyi divergences of all `mechanisms` together, at `ORDERS`; inf where one has no noise."""
    merged = _merged(mechanisms)
    if any(m.noise_multiplier == 0 for m in merged):
        return np.full(len(ORDERS), math.inf)
    return np.asarray(np.sum([np.zeros(len(ORDERS)), *map(_rdp_of, merged)], axis=0))


def epsilon_of_divergences(divergences: npt.NDArray[np.float64], delta: float) -> float:
    """Epsilon that Renyi divergences at `ORDERS` give for `delta` (Canonne, Kamath and Steinke 2020)."""
    _check_delta(delta)
    return _spent(divergences, delta)


def delta_of_divergences(divergences: npt.NDArray[np.float64], epsilon: float) -> float:
    """Delta that Renyi divergences at `ORDERS` give for `epsilon`; it inverts `epsilon_of_divergences`."""
    alpha = np.asarray(ORDERS)
    exponents = (alpha - 1) * (divergences - epsilon + np.log((alpha - 1) / alpha)) - np.log(alpha)
    return min(1.0, math.exp(min(0.0, float(np.min(exponents)))))


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
    _check_delta(delta)
    composed = _composed([mechanism], delta, coarser=_COARSER)
    deltas: npt.NDArray[np.float64] = np.asarray(composed.get_delta_for_epsilon(epsilons), dtype=np.float64)
    return deltas


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
        "version": 1,
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
        UserError: one step passes it already, or more than ten million steps do not.
    """
    _check_delta(delta)

    def fits(steps: int) -> bool:
        return _pld([Mechanism(noise_multiplier, sample_rate, steps)], delta) <= target_epsilon

    name = f"privacy.noise_multiplier={noise_multiplier:g}"
    if noise_multiplier == 0 or not fits(1):
        raise UserError(f"{name}: one step passes privacy.epsilon={target_epsilon:g}: expected more noise")
    # What RDP allows, PLD allows; and RDP is cheap and not far off.
    once = _rdp_of(Mechanism(noise_multiplier, sample_rate, 1))
    low, high = 1, 2
    while high < MAX_STEPS and _spent(once * high, delta) <= target_epsilon:
        low, high = high, 2 * high
    while high - low > max(low // 64, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if _spent(once * middle, delta) <= target_epsilon else (low, middle)
    while high < MAX_STEPS and fits(high):
        low, high = high, high + high // 8 + 1
    if high >= MAX_STEPS:
        raise UserError(
            f"{name}: {MAX_STEPS} steps stay under privacy.epsilon={target_epsilon:g}: expected "
            "train.max_steps, or less noise"
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
            self._rdp = _rdp_of(Mechanism(mechanism.noise_multiplier, mechanism.sample_rate, 1))
            self._rdp_before = np.sum([np.zeros(len(ORDERS)), *map(_rdp_of, self._before)], axis=0)

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
        return min(self._pld_after[end], _spent(self._rdp_before + self._rdp * steps, self._delta))


# The accountants


def _merged(mechanisms: Sequence[Mechanism]) -> list[Mechanism]:
    """One entry for each (noise multiplier, sample rate), without those that release nothing."""
    steps: dict[tuple[float, float], int] = {}
    for m in mechanisms:
        if m.steps and m.sample_rate:
            key = (m.noise_multiplier, m.sample_rate)
            steps[key] = steps.get(key, 0) + m.steps
    return [Mechanism(sigma, q, count) for (sigma, q), count in steps.items()]


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}: expected a number in (0, 1)")


@functools.lru_cache(maxsize=256)
def _rdp_of_one_step(
    noise_multiplier: float, sample_rate: float, orders: tuple[float, ...]
) -> npt.NDArray[np.float64]:
    """Renyi divergences at `orders`, by Opacus."""
    divergences = _opacus_rdp().compute_rdp(
        q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders
    )
    return np.asarray(divergences)


@functools.cache
def _opacus_rdp() -> Any:
    """`opacus.accountants.analysis.rdp`, which needs numpy alone, without the two seconds of the rest."""
    name = "opacus.accountants.analysis.rdp"
    package = importlib.util.find_spec("opacus")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "accountants" / "analysis" / "rdp.py"
    if name in sys.modules or not path.exists():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"_{name.replace('.', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rdp_of(mechanism: Mechanism, orders: tuple[float, ...] = ORDERS) -> npt.NDArray[np.float64]:
    """Renyi divergences at `orders`; they add up over the steps."""
    return mechanism.steps * _rdp_of_one_step(mechanism.noise_multiplier, mechanism.sample_rate, orders)


def _spent(rdp: npt.NDArray[np.float64], delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    """Epsilon of Renyi divergences at `orders` (Canonne, Kamath and Steinke 2020, proposition 12)."""
    alpha = np.asarray(orders)
    bounds = rdp - (math.log(delta) + np.log(alpha)) / (alpha - 1) + np.log((alpha - 1) / alpha)
    return max(0.0, float(np.min(bounds)))


def _rdp(mechanisms: Sequence[Mechanism], delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    return _spent(np.sum([_rdp_of(m, orders) for m in mechanisms], axis=0), delta, orders)


@functools.lru_cache(maxsize=16)
def _pld_of_one_step(noise_multiplier: float, sample_rate: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        sampling_prob=sample_rate,
        value_discretization_interval=interval,
        pessimistic_estimate=True,
    )


def _interval(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Width of a cell, a power of two: rounding to it adds less than 0.1 % to epsilon, mostly 0.01 %.

    Rounding a step's loss adds about interval^2 to its variance while the interval is small beside the
    loss (the first bound), and about interval to epsilon once a step's loss is far from Gaussian. There are
    about `_CELLS` at most: where epsilon is near 0, its relative error matters to nobody and memory does.
    """
    steps, rough = sum(m.steps for m in mechanisms), _rdp(mechanisms, delta, _FEW_ORDERS)
    least = min(m.noise_multiplier for m in mechanisms)
    wanted = min(0.01 * rough / math.sqrt(steps), rough / 2e4, 0.05 / least)
    # Ten standard deviations to each side: of one step's loss and, about, of all steps' together.
    variance = sum(m.steps * (m.sample_rate / m.noise_multiplier) ** 2 for m in mechanisms)
    finest = max(1 / least**2 + 20 / least, variance + 20 * math.sqrt(variance)) / _CELLS
    return float(2.0 ** math.floor(math.log2(max(wanted, finest))))


def _composed(mechanisms: Sequence[Mechanism], delta: float, coarser: float = 1.0) -> Any:
    """The pessimistic privacy loss distribution of all together, on cells made for a bound at `delta`."""
    interval = _interval(mechanisms, delta) * coarser
    parts = [
        _pld_of_one_step(m.noise_multiplier, m.sample_rate, interval).self_compose(m.steps)
        for m in mechanisms
    ]
    return functools.reduce(lambda one, other: one.compose(other), parts)


def _pld(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """dp-accounting's pessimistic bound; valid for every interval."""
    return float(_composed(mechanisms, delta).get_epsilon_for_delta(delta))


def _prv(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Opacus' upper bound, or inf where it fails or is slow."""
    from opacus.accountants import PRVAccountant

    if any(m.sample_rate == 1 for m in mechanisms):
        return math.inf
    rough, steps = _rdp(mechanisms, delta), sum(m.steps for m in mechanisms)
    delta_error = delta / 1000
    # The accountant's own rule for the size of what it convolves.
    once = [Mechanism(m.noise_multiplier, m.sample_rate, 1) for m in mechanisms]
    single = max(_spent(_rdp_of(m), delta_error / (8 * steps)) for m in once)
    reach = 3 + max(_rdp(mechanisms, delta_error / 4), single)
    finest = 2 * reach / _PRV_POINTS * len(mechanisms) * math.sqrt(steps * math.log(12 / delta_error) / 2)
    error = max(finest, min(0.01, rough / 1000))
    if error > 0.02 * max(rough, 1.0) or error >= 1:
        return math.inf
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
        spent = _pld([Mechanism(math.exp(log_sigma), sample_rate, steps)], delta)
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
        spent = _rdp([Mechanism(math.exp(middle), sample_rate, steps)], delta, _FEW_ORDERS)
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
