"""Epsilon of the Poisson-subsampled Gaussian mechanism without a grid of losses: the yardstick of the tests.

For the loss S of all steps, with M(z) = E exp(z S) and any theta > 0,

    delta(epsilon) = (1 / 2 pi) integral exp(log M(z) - z epsilon) / (z (z + 1)) dw,   z = theta + i w,

the inverse of a Laplace transform, taken by the trapezoidal rule along the line through the saddle point,
where nothing is lost to rounding however small delta is. M is a power of one step's, which is an integral
over the noise, again by the trapezoidal rule: both integrands are smooth, so that the rule converges at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar

Array = np.ndarray


@dataclass(frozen=True)
class ExactLoss:
    """The loss of `steps` steps: sample rate q, noise multiplier sigma; the image removed, or added."""

    q: float
    sigma: float
    steps: int
    removed: bool = True

    def log_moment(self, z: Array, points: int = 3000) -> Array:
        """log E exp(z loss) of one step, for an array of complex z with real part above -1."""
        mu = 1 / self.sigma
        reach = 12 + (float(np.max(z.real)) + 2) * mu
        u = np.linspace(-reach, reach + mu, points)
        exponent = mu * u - mu * mu / 2
        if self.q == 1:
            loss = exponent
        else:
            loss = np.logaddexp(math.log1p(-self.q), math.log(self.q) + exponent)
            small = np.abs(exponent) < 30
            loss[small] = np.log1p(self.q * np.expm1(exponent[small]))
        # E_P exp(z L) = E_Q exp((z + 1) L) of the removed image, and E_Q exp(-z L) of the added one.
        power = np.asarray(z) + 1 if self.removed else -np.asarray(z)
        log_density = -u * u / 2 - math.log(2 * math.pi) / 2
        found = np.empty(power.shape, dtype=complex)
        for i, p in enumerate(power.flat):
            inner = p * loss + log_density
            top = inner.real.max()
            found.flat[i] = top + np.log(np.sum(np.exp(inner - top)) * (u[1] - u[0]))
        return found

    def log_delta(self, epsilon: float, points: int = 3000) -> float:
        """log delta at `epsilon`, refined until two steps of the rule agree to 1e-8."""

        def exponent(theta: float) -> float:
            moment = float(self.log_moment(np.array([theta + 0j]), points)[0].real)
            return self.steps * moment - theta * epsilon - math.log(theta) - math.log1p(theta)

        best = minimize_scalar(lambda t: exponent(math.exp(t)), bounds=(-9, 12), method="bounded")
        theta = math.exp(float(best.x))
        height = exponent(theta)
        here = self.steps * self.log_moment(np.array([theta, theta * 1.001, theta * 0.999]) + 0j, points).real
        curvature = max((here[1] + here[2] - 2 * here[0]) / (theta * 1e-3) ** 2, 1e-12)
        width = min(1 / math.sqrt(curvature + 2 / theta**2), theta)

        def value(w: Array) -> Array:
            z = theta + 1j * w
            terms = self.steps * self.log_moment(z, points) - z * epsilon - np.log(z) - np.log1p(z)
            return np.exp(terms - height).real

        stride, before = width, math.inf
        while True:
            total, start, block = 0.5 * float(value(np.zeros(1))[0]), 1, 64
            while True:
                part = value(stride * np.arange(start, start + block))
                total += float(part.sum())
                start += block
                if np.abs(part).max() < 1e-12 * abs(total):
                    break
                assert start < 20_000, "the integral does not end: steps x q is too small for it"
            found = total * stride / math.pi
            if abs(found - before) < 1e-8 * abs(found):
                return height + math.log(found)
            stride, before = stride / 2, found

    def epsilon(self, delta: float, near: float) -> float:
        """Epsilon for `delta`, found close to `near`."""
        low, high = near, near
        while self.log_delta(high) > math.log(delta):
            low, high = high, high * 1.02
        while self.log_delta(low) <= math.log(delta):
            low, high = low / 1.02, low
        root = brentq(lambda e: self.log_delta(e) - math.log(delta), low, high, xtol=1e-12, rtol=1e-7)
        return float(root)


def exact_epsilon(q: float, sigma: float, steps: int, delta: float, near: float) -> float:
    """Epsilon under "add or remove one image": the larger of the two directions."""
    removed = ExactLoss(q, sigma, steps).epsilon(delta, near)
    if q < 1 and -steps * math.log1p(-q) <= removed:
        return removed  # No loss of an added image is larger.
    added = ExactLoss(q, sigma, steps, removed=False)
    # Adding an image mostly costs less: then one look is enough.
    return removed if added.log_delta(removed) <= math.log(delta) else added.epsilon(delta, removed)
