"""Rigorous bounds from privacy loss distributions, at a delta as small as 1e-12.

`dp_lora.privacy.step_loss` puts the loss of one step on a grid of cells of width d; here the losses of all
steps are added by a discrete Fourier transform, and delta(epsilon) = E (1 - exp(epsilon - loss))+ is read.

Why the result bounds delta from above:

    * A step's loss on the grid does; how far it may be rounded is added to epsilon once a step.
    * A transform of the losses themselves has an absolute error of about steps x 1e-16, more than a small
      delta. So each loss is tilted first, p(x) exp(theta x) / M(theta), which moves the middle of the sum
      to the epsilon that is looked for; untilted again, the error is as small beside delta as it was beside
      1. It is bounded (Higham 2002, theorem 24.2, with room for a mixed radix; through the power by
      |x^n - y^n| <= n |x - y| max(|x|, |y|)^(n - 1); in the sum by Cauchy and Schwarz) and added.
    * What wraps around into the window of the transform only adds to delta; what lies above the window, or
      above the last cell, is counted as an infinite loss (Chernoff).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dp_lora.privacy.step_loss import EPS, Array, Step, step_losses

if TYPE_CHECKING:
    from dp_lora.privacy.subsampled_gaussian import Mechanism

MAX_POINTS = 1 << 24
"""The longest transform: above it there is no bound."""

# The part of delta that may be given up for the tails above the last cell, and above the window.
_TAILS = 1e-6
# The smallest noise multiplier whose pieces are worth their time: epsilon is beyond 10,000 there.
_LEAST_NOISE = 1e-3


def epsilon_bound(mechanisms: Sequence[Mechanism], delta: float, interval: float) -> float:
    """An upper bound on epsilon of all `mechanisms` together; valid for every `interval`.

    Args:
        mechanisms: with noise, different ones, at least one.
        delta: in (0, 1).
        interval: d, the width of a cell of the loss.

    inf where the transform would be too long, or the noise is next to nothing.
    """
    worst = -math.inf
    for steps in _directions(mechanisms, delta, interval):
        saddle = _saddle(steps, delta, interval)
        # Where the moments alone say clearly that the other direction is worse, it is.
        if saddle.epsilon > 0.999 * worst:
            worst = max(worst, _epsilon_of(steps, saddle, delta, interval))
    return worst if worst >= 0 else math.inf


def delta_bounds(mechanisms: Sequence[Mechanism], epsilons: Array, delta: float, interval: float) -> Array:
    """Upper bounds on delta at each of `epsilons`: all `mechanisms` together are (epsilon, delta)-private.

    Args:
        mechanisms, interval: as of `epsilon_bound`.
        epsilons: 0 or more, rising.
        delta: the order of magnitude at which the bounds are to be tight.
    """
    worst = np.zeros(len(epsilons))
    directions = _directions(mechanisms, delta, interval)
    for steps in directions:
        saddle, top = _saddle(steps, delta, interval), _top(steps, delta, interval)
        found = np.ones(len(epsilons))
        for share in (1.3, 1.0, 0.7, 0.45, 0.25, 0.1, 0.02):
            composed = _compose(steps, share * saddle.theta, top, delta, interval)
            if composed is not None:
                found = np.minimum(found, composed.deltas(epsilons))
        worst = np.maximum(worst, found)
    return worst if directions else np.ones(len(epsilons))


# Both directions


def _directions(mechanisms: Sequence[Mechanism], delta: float, interval: float) -> list[list[Step]]:
    """The steps of all mechanisms when the image is removed, and when it is added.

    Nothing with next to no noise.
    """
    if min(m.noise_multiplier for m in mechanisms) < _LEAST_NOISE:
        return []
    # A power of ten, so that a step's distribution is found again for another number of steps.
    tail = 10.0 ** math.floor(math.log10(delta * _TAILS / sum(m.steps for m in mechanisms)))
    both = [
        (step_losses(m.noise_multiplier, m.sample_rate, interval, max(tail, 1e-290)), m.steps)
        for m in mechanisms
    ]
    return [[_repeated(pair[side], steps) for pair, steps in both] for side in (0, 1)]


def _repeated(step: Step, times: int) -> Step:
    return Step(step.first, step.probs, step.log_probs, step.infinite, step.slack, times)


# All steps


@dataclass(frozen=True, eq=False)
class _Composed:
    """Delta at every epsilon of a window, of all steps together, without the common factor exp(log_scale).

    At a point x of the grid, with the weight w(s) of each sum of losses s: `above` is the sum of w over
    s > x, `delta` that of w(s) (1 - exp(x - s)), `error` a bound on the transform's part in the latter.
    """

    points: Array
    log_scale: float
    above: Array
    delta: Array
    error: Array
    infinite: float
    slack: float

    def deltas(self, epsilons: Array) -> Array:
        """At most 1, and 1 below the window."""
        at = epsilons - self.slack
        i = np.searchsorted(self.points, at, side="right") - 1
        inside = np.maximum(i, 0)
        # Above the window there is only the infinite loss.
        further = np.minimum(np.expm1(np.minimum(at - self.points[inside], 1.0)), 1e3)
        falls = further * (self.above[inside] - self.delta[inside])
        part = np.maximum(self.delta[inside] - falls, 0.0) + self.error[inside]
        with np.errstate(over="ignore", divide="ignore"):
            found = np.exp(self.log_scale + np.log(part)) + self.infinite
        return np.where((i >= 0) & np.isfinite(found), np.minimum(found, 1.0), 1.0)

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon of the window whose delta is at most `delta`; inf where none is."""
        if not self.infinite < delta:
            return math.inf
        wanted = math.exp(min(math.log(delta - self.infinite) - self.log_scale, 700.0))
        (fits,) = np.nonzero(self.delta + self.error <= wanted)
        if not len(fits):
            return math.inf
        i = int(fits[0])
        best = float(self.points[i])
        if i:
            # Between two points delta falls linearly in exp(epsilon), and the error is that of the lower one.
            falls = float(self.above[i - 1] - self.delta[i - 1])
            excess = float(self.delta[i - 1] + self.error[i - 1]) - wanted
            if falls > 0:
                best = min(best, float(self.points[i - 1]) + math.log1p(excess / falls))
        return max(0.0, best + self.slack)


@dataclass(frozen=True)
class _Saddle:
    """A tilt, and the bound on epsilon that the moment at it gives, without any transform."""

    theta: float
    epsilon: float


def _epsilon_of(steps: Sequence[Step], saddle: _Saddle, delta: float, interval: float) -> float:
    """The smallest of the bounds that a few tilts give: each is valid, and rarely are two of them loose.

    The tilted loss of very rare and very large losses has two peaks, neither of which is at epsilon.
    """
    top, smallest = _top(steps, delta, interval), math.inf
    for share in (0.8, 0.65, 0.95, 0.5):
        composed = _compose(steps, share * saddle.theta, top, delta, interval)
        found = math.inf if composed is None else composed.epsilon(delta)
        before, smallest = smallest, min(smallest, found)
        if math.isfinite(before) and abs(found - before) <= 1e-5 * before:
            break
    return smallest


def _log_moment(steps: Sequence[Step], theta: float, interval: float) -> float:
    """log E exp(theta loss) of all steps together."""
    return sum(s.times * (s.tilted(theta, interval)[0] + theta * interval * s.first) for s in steps)


def _saddle(steps: Sequence[Step], delta: float, interval: float) -> _Saddle:
    """About the theta with which the moments bound epsilon best: there the tilted loss is near epsilon."""

    def bound(log_theta: float) -> float:
        # Canonne, Kamath and Steinke 2020, proposition 12, at the order 1 + theta.
        theta = math.exp(log_theta)
        moment = _log_moment(steps, theta, interval) - math.log(delta)
        return (moment + theta * math.log(theta) - (1 + theta) * math.log1p(theta)) / theta

    variance = sum(s.times * _moments(s.tilted(0.0, interval)[1], interval)[1] for s in steps)
    middle = 0.5 * math.log(2 * math.log(2 / delta) / max(variance, 1e-300))
    stride = 0.5
    here, above, below = bound(middle), bound(middle + stride), bound(middle - stride)
    for _ in range(200):
        if here <= min(above, below):
            stride /= 2
            if stride < 0.05:
                break
            above, below = bound(middle + stride), bound(middle - stride)
        elif above < below:
            middle, below, here = middle + stride, here, above
            above = bound(middle + stride)
        else:
            middle, above, here = middle - stride, here, below
            below = bound(middle - stride)
    return _Saddle(math.exp(middle), here)


def _top(steps: Sequence[Step], delta: float, interval: float) -> float:
    """A loss that all steps together pass with a probability of at most delta `_TAILS` (Chernoff)."""
    theta = _saddle(steps, delta * _TAILS, interval).theta
    return (_log_moment(steps, theta, interval) - math.log(delta * _TAILS)) / theta


def _moments(probs: Array, interval: float) -> tuple[float, float]:
    """Mean, from the first point, and variance of a distribution on the grid."""
    at = np.arange(len(probs))
    mean = float(probs @ at)
    return mean * interval, float(probs @ (at - mean) ** 2) * interval**2


def _window(
    steps: Sequence[Step], theta: float, tilted: Sequence[Array], top: float, interval: float
) -> tuple[int, int]:
    """First and last point of the window, as multiples of d: up to `top`, and down to no tilted mass."""
    moments = [_moments(probs, interval) for probs in tilted]
    std = math.sqrt(sum(s.times * m[1] for s, m in zip(steps, moments, strict=True))) + interval
    here = _log_moment(steps, theta, interval)
    least = sum(s.times * s.first for s in steps)
    low = least * interval
    for shift in (2.0, 4.0, 7.0, 10.0, 16.0):
        below = _log_moment(steps, theta - shift / std, interval)
        low = max(low, (here - below + math.log(1e-12)) * std / shift)
    first = math.floor(low / interval)
    return first, max(math.ceil(top / interval), first + 1)


def _compose(
    steps: Sequence[Step], theta: float, top: float, delta: float, interval: float
) -> _Composed | None:
    """Delta around the epsilon that `theta` looks at; None where the transform would be too long."""
    from scipy import fft

    tilts = [s.tilted(theta, interval) for s in steps]
    first, last = _window(steps, theta, [t[1] for t in tilts], top, interval)
    if last - first + 1 > MAX_POINTS:
        return None
    size = fft.next_fast_len(last - first + 1, real=True)
    spectrum, error = _spectrum(steps, [t[1] for t in tilts], size)
    found = fft.irfft(spectrum, size)
    error += _transform_rounding(size) * float(np.linalg.norm(found))
    origin = sum(s.times * s.first for s in steps)
    found = np.maximum(np.roll(found, -((first - origin) % size)), 0.0)
    points = interval * (first + np.arange(size))
    middle = sum(
        s.times * (s.first * interval + _moments(t[1], interval)[0])
        for s, t in zip(steps, tilts, strict=True)
    )
    log_scale = _log_moment(steps, theta, interval) - theta * middle
    # Rounding of the exponents of the tilt, in every step.
    log_scale += sum(s.times * _tilt_rounding(s, theta, interval) for s in steps)
    # Further below the middle the weights are no numbers any more.
    seen = theta * (points - middle) >= -600.0
    if not seen.any():
        return None
    sums = _sums(points[seen] - middle, found[seen], theta, interval)
    wrong = error * _norm_of_weights(theta, interval, size) * np.exp(-theta * (points[seen] - middle))
    return _Composed(
        points=points[seen],
        log_scale=log_scale,
        above=sums[0],
        delta=sums[1],
        error=wrong + 8 * size * EPS * sums[1],
        infinite=sum(s.times * s.infinite for s in steps) + delta * _TAILS,
        slack=sum(s.times * s.slack for s in steps),
    )


def _sums(points: Array, probs: Array, theta: float, interval: float) -> tuple[Array, Array]:
    """At each point x: the sum of probs(s) w(s) over s > x, and that of probs(s) w(s) (1 - exp(x - s)).

    w(s) = exp(-theta s), and the points rise by `interval`.
    """
    from scipy.signal import lfilter

    held = probs * np.exp(np.maximum(-theta * points, -600.0))
    above = np.append(np.cumsum(held[:0:-1])[::-1], 0.0)
    # Without a difference: the second is exp(-d) times that of the next point, and a part of the first.
    decay = math.exp(-interval)
    return above, np.asarray(lfilter([-math.expm1(-interval)], [1.0, -decay], above[::-1])[::-1])


def _spectrum(
    steps: Sequence[Step], tilted: Sequence[Array], size: int
) -> tuple[npt.NDArray[np.complex128], float]:
    """The transform of the sum of all losses, and the norm of its error as a distribution on the grid."""
    from scipy import fft

    log_size, angle, log_bound, relative = (np.zeros(size // 2 + 1) for _ in range(4))
    for step, probs in zip(steps, tilted, strict=True):
        folded = np.resize(
            np.append(probs, np.zeros(-len(probs) % size)), (-(-len(probs) // size), size)
        ).sum(0)
        once = fft.rfft(folded)
        absolute = np.abs(once)
        error = _transform_rounding(size) * math.sqrt(size) * float(np.linalg.norm(folded)) + 20 * EPS
        with np.errstate(divide="ignore"):
            log_size += step.times * np.log(absolute)
        angle += step.times * np.angle(once)
        log_bound += step.times * np.log(absolute + error)
        relative += step.times * error / (absolute + error)
    spectrum = np.exp(log_size) * np.exp(1j * angle)
    # Each of the frequencies but one or two stands for two.
    wrong = np.exp(log_bound) * relative
    return spectrum, math.sqrt(2 / size) * float(np.linalg.norm(wrong))


def _transform_rounding(size: int) -> float:
    """The relative error of a transform in the Euclidean norm, at most."""
    return 2.0**-48 * math.log2(size)


def _tilt_rounding(step: Step, theta: float, interval: float) -> float:
    """By how much the logarithm of a step's tilted masses may be off."""
    largest = theta * interval * (len(step.probs) + abs(step.first)) + float(
        np.abs(step.log_probs[step.probs > 0]).max()
    )
    return EPS * (64 + 8 * largest)


def _norm_of_weights(theta: float, interval: float, size: int) -> float:
    """An upper bound on the norm of exp(-theta x) (1 - exp(-x)) at x = d, 2 d, ..."""
    ratio = math.exp(-2 * theta * interval)
    rest = -math.expm1(-2 * theta * interval)
    square = min(size, ratio / rest, interval**2 * ratio * (1 + ratio) / rest**3)
    return math.sqrt(square)
