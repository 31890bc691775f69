"""One step's loss on the grid against delta in 50-digit arithmetic, far into the tails."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from mpmath import mpf
from numpy.polynomial.hermite_e import hermeval

from dp_lora.privacy.step_loss import (
    _QUADRATURE,
    EPS,
    Step,
    _density,
    _Loss,
    _masses,
    _quadrature_error,
    step_losses,
)


@pytest.fixture(autouse=True)
def _digits() -> None:
    mpmath.mp.dps = 50


def exact_delta(sigma: float, q: float, epsilon: mpf, removed: bool) -> mpf:
    """P(loss > epsilon) - e^epsilon Q(loss > epsilon), P being the side whose loss it is."""
    mu, q = 1 / mpf(sigma), mpf(q)
    inside = (mpmath.expm1(epsilon if removed else -epsilon) + q) / q
    if inside <= 0:
        return 1 - mpmath.exp(epsilon) if removed else mpf(0)
    end, side = mpmath.log(inside) / mu + mu / 2, 1 if removed else -1
    absent = mpmath.erfc(side * end / mpmath.sqrt(2)) / 2
    mixed = (1 - q) * absent + q * mpmath.erfc(side * (end - mu) / mpmath.sqrt(2)) / 2
    return mixed - mpmath.exp(epsilon) * absent if removed else absent - mpmath.exp(epsilon) * mixed


def deltas_of(step: Step, interval: float, points: int) -> list[tuple[mpf, mpf]]:
    """(epsilon, delta) at the uppermost `points` of the grid, the highest first."""
    decay, above, delta = mpmath.exp(-mpf(interval)), mpf(0), mpf(0)
    found = []
    for i in reversed(range(len(step.probs))[-points:]):
        delta = decay * delta + (1 - decay) * above
        found.append(((step.first + i) * mpf(interval), delta + mpf(step.infinite)))
        above += mpf(float(step.probs[i]))
    return found


@pytest.mark.parametrize(
    ("sigma", "q", "interval", "tail"),
    [
        (1.0, 0.01, 0.0625, 1e-15),
        (0.5, 1e-4, 0.5, 1e-200),
        (2.0, 0.5, 0.125, 1e-100),
        (1.0, 0.95, 0.25, 1e-50),
        (1.0, 1e-6, 2.0**-10, 1e-18),
        # Narrow cells, where the error of the quadrature is nothing and rounding all.
        (1.0, 1.0, 2.0**-8, 1e-200),
        (3.0, 1.0, 2.0**-10, 1e-250),
        (0.5, 0.2, 2.0**-6, 1e-200),
        # The least tail; the lowest masses of an added image underflow.
        (0.3, 0.2, 1.0, 1e-290),
        (1.0, 1.0, 0.5, 1e-290),
        # The loss is far below 0, where q exp(...) is nothing beside 1 - q.
        (0.3, 1 - 1e-9, 0.5, 1e-100),
    ],
)
@pytest.mark.parametrize("removed", [True, False])
def test_delta_is_never_below_the_truth_and_hardly_above(
    sigma: float, q: float, interval: float, tail: float, removed: bool
) -> None:
    step = step_losses(sigma, q, interval, tail)[0 if removed else 1]
    found = deltas_of(step, interval, 1000)
    for epsilon, delta in [*found[:10], *found[10 :: len(found) // 25 + 1]]:
        exact = exact_delta(sigma, q, epsilon, removed)
        assert delta >= exact, float(epsilon)
        # Connecting the dots gives no delta away at the dots themselves.
        assert delta <= exact * (1 + mpf("1e-6")) + 4 * mpf(step.infinite), float(epsilon)


@pytest.mark.parametrize(("sigma", "q", "tail"), [(1.0, 0.01, 1e-15), (0.3, 1.0, 1e-290), (5.0, 0.3, 1e-30)])
def test_all_mass_is_there_and_hardly_more(sigma: float, q: float, tail: float) -> None:
    for step in step_losses(sigma, q, 0.125, tail):
        total = math.fsum(step.probs)
        assert total + step.infinite >= 1
        assert total <= 1 + 1e-12
        # More than the tail where that is the least one, since masses underflow there.
        assert step.infinite >= max(tail, 2e-290)


@pytest.mark.parametrize("tail", [1e-15, 1e-18, 1e-30])
@pytest.mark.parametrize(("sigma", "q"), [(1.0, 1e-6), (1.0, 0.01), (0.5, 1e-4), (4.0, 1.0)])
def test_a_loss_may_be_rounded_as_far_as_its_exponent(sigma: float, q: float, tail: float) -> None:
    """The exponent of the largest loss has a rounding of its size times EPS, whatever the loss itself is."""
    from scipy.special import ndtri

    end, mu = -float(ndtri(tail)), 1 / sigma
    exponent = mu * end - mu**2 / 2
    slope = q * math.exp(exponent) / (1 - q + q * math.exp(exponent))
    for step in step_losses(sigma, q, 0.125, tail):
        assert step.slack >= 2 * EPS * slope * exponent
        assert step.slack <= 1e3 * EPS * (1 + exponent)


@pytest.mark.parametrize("q", [1e-9, 0.01, 0.5, 0.9])
def test_a_loss_is_right_beyond_what_exp_can_hold(q: float) -> None:
    mu = 1000.0
    loss = _Loss(mu, q)
    for exponent in (-700.0, -1.0, 1.0, 500.0, 599.9, 600.1, 709.0, 710.0, 899.9, 900.1, 5000.0):
        u = np.array([exponent / mu + mu / 2])
        exact = mpmath.log(1 - mpf(q) + mpf(q) * mpmath.exp(mpf(mu) * (mpf(float(u[0])) - mpf(mu) / 2)))
        found = loss(u)
        assert abs(mpf(float(found[0])) - exact) <= loss.slack(u, found), exponent


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_the_rule_of_four_nodes_is_off_by_what_is_counted_for_it(width: float) -> None:
    """Of x^8, whose eighth derivative is 8! everywhere, by exactly that."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    found = width / 2 * float(weights @ (width / 2 * (1 + nodes)) ** 8)
    error = abs(width**9 / 9 - found)
    assert error == pytest.approx(_QUADRATURE * width**9 * math.factorial(8), rel=1e-9)


@pytest.mark.parametrize("half", [0.015, 0.5])
def test_no_eighth_derivative_of_the_density_is_larger_than_counted(half: float) -> None:
    """At any place of a piece, also far out, where the density falls steeply from one end to the other."""
    middle = np.linspace(-35.0, 35.0, 141)
    at = middle[:, None] + half * np.linspace(-1, 1, 101)
    largest = np.abs(hermeval(at, [0] * 8 + [1]) * _density(at)).max(1)
    counted = _quadrature_error(middle, np.full_like(middle, half))
    assert (counted >= _QUADRATURE * (2 * half) ** 9 * largest).all()


def test_the_exponent_of_a_small_loss_may_be_large() -> None:
    """With a tiny rate: the largest loss is then below 1, and its exponent 27."""
    from scipy.special import ndtri

    q, tail = 1e-12, 1e-173
    exponent = -float(ndtri(tail)) - 0.5
    present = q * math.exp(exponent)
    for step in step_losses(1.0, q, 0.125, tail):
        assert step.slack >= 2 * EPS * exponent * present / (1 + present)


def test_a_cell_without_width_has_no_mass() -> None:
    """Where rounding puts the last edge but one on the last."""
    loss, edges = _Loss(1.0, 0.5), np.array([-1.0, 0.5, 2.0, 2.0])
    found = _masses(loss, edges, loss(edges[:-1]), 0.5)
    for mass in (found.removed, found.added, found.removed_up, found.added_up):
        assert mass.shape == (3,) and mass[-1] == 0
    for mass in (found.removed, found.added):
        assert (mass[:-1] > 0).all()
