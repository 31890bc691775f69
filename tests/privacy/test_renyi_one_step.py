"""Renyi divergences of one step against integrals of 25 digits: never below, and hardly above them."""

from __future__ import annotations

import functools
import math

import mpmath
import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp

from dp_lora.privacy import renyi
from dp_lora.privacy.renyi import FEW_ORDERS, ORDERS, divergences_of
from dp_lora.privacy.subsampled_gaussian import Mechanism

STEPS = [(1.355, 0.25), (0.7343, 0.02), (50.0, 0.5), (0.4, 0.999), (0.05, 0.01), (1.0, 1e-6)]
SOME = (1.01, 1.5, 2.0, 10.75, 63.0, 1024.0)


@functools.cache
def log_mean(sigma: float, q: float, alpha: float) -> mpmath.mpf:
    """log E[(1 - q + q exp((2x - 1) / 2 sigma^2))^alpha] over x ~ N(0, sigma^2)."""
    with mpmath.workdps(25):
        s, q, alpha = mpmath.mpf(sigma), mpmath.mpf(q), mpmath.mpf(alpha)
        turn = s**2 * mpmath.log(1 / q - 1) + mpmath.mpf(1) / 2
        points = sorted(
            {turn, *(at + away * s for at in (0, alpha) for away in (-40, -15, -5, 0, 5, 15, 40))}
        )
        return mpmath.log(
            mpmath.quad(
                lambda x: mpmath.npdf(x, 0, s) * (1 - q + q * mpmath.exp((2 * x - 1) / (2 * s * s))) ** alpha,
                points,
            )
        )


def above(sigma: float, q: float) -> list[float]:
    """By how much log A is above the truth at `SOME`, relative where the truth is above 1."""
    found = divergences_of(Mechanism(sigma, q, 1))
    gaps = []
    for alpha in SOME:
        truth, divergence = log_mean(sigma, q, alpha), found[ORDERS.index(alpha)]
        gaps.append(float((mpmath.mpf(float(divergence)) * (alpha - 1) - truth) / max(1, truth)))
    return gaps


@pytest.mark.parametrize(("sigma", "q"), STEPS)
def test_a_step_has_at_least_its_divergence_and_hardly_more(sigma: float, q: float) -> None:
    gaps = above(sigma, q)
    # At order 1024 the logarithms of factorials have thousands, of which the last digit is rounded.
    assert min(gaps) >= 0 and max(gaps[:-1]) < 2e-12 and gaps[-1] < 2e-11


def test_wider_cells_or_no_rounding_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trapezia = renyi._trapezia

    def wide(sigma: float, q: float, largest: float):  # type: ignore[no-untyped-def]
        terms = trapezia(sigma, q, largest)

        def every_twentieth(alpha: float):  # type: ignore[no-untyped-def]
            logs, sizes = terms(alpha)
            return logs[::20] + math.log(20), sizes[::20]

        return every_twentieth

    for name, value in (("_trapezia", wide), ("_EPS", 0.0)):
        with monkeypatch.context() as patched:
            patched.setattr(renyi, name, value)
            renyi._of_one_step.cache_clear()
            gaps = [gap for step in STEPS[:3] for gap in above(*step)]
            assert min(gaps) < 0 or max(gaps) > 1e-9, name
        renyi._of_one_step.cache_clear()


@pytest.mark.parametrize("orders", [ORDERS, FEW_ORDERS], ids=["all", "few"])
@pytest.mark.parametrize(("sigma", "q"), STEPS)
def test_opacus_finds_the_same_to_what_its_series_leave_out(
    sigma: float, q: float, orders: tuple[float, ...]
) -> None:
    theirs = np.asarray(compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=orders))
    ours, orders_less_one = divergences_of(Mechanism(sigma, q, 1), orders), np.asarray(orders) - 1
    assert np.all(np.abs(ours - theirs) * orders_less_one <= 2e-11 + 2e-12 * theirs * orders_less_one)


def test_the_ends_of_the_range() -> None:
    assert np.all(divergences_of(Mechanism(2.0, 0.0, 3)) == 0)
    every = divergences_of(Mechanism(2.0, 1.0, 3))
    assert every == pytest.approx(3 * np.asarray(ORDERS) / 8, rel=1e-15)
    # So little noise: the integer orders are exact, the others those of a step that sees every image.
    tiny = dict(zip(ORDERS, divergences_of(Mechanism(1e-3, 0.01, 1)), strict=True))
    assert tiny[1.5] == 0.75e6 and 0.999e6 < tiny[2.0] <= 1e6
    almost = divergences_of(Mechanism(1.0, math.nextafter(1.0, 0.0), 1))
    assert np.all(almost <= np.asarray(ORDERS) / 2) and almost == pytest.approx(np.asarray(ORDERS) / 2)
    assert np.all(divergences_of(Mechanism(1e6, 1e-12, 1)) < 1e-9)


def test_where_almost_nothing_is_learnt_no_point_of_the_integral_is_off() -> None:
    """log A is about 2e-14 here: points that are not exactly h apart would make it 0."""
    sigma, q = 0.10021832666576062, 1e-13
    found = divergences_of(Mechanism(sigma, q, 1))[ORDERS.index(1.01)]
    assert float(mpmath.mpf(float(found)) * (1.01 - 1) - log_mean(sigma, q, 1.01)) >= 0
