"""The Renyi filter against an adversary who picks each mechanism by what the earlier ones released."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from dp_lora.privacy.accounting import composed
from dp_lora.privacy.ledger import Charge, fills, fits, spent, spent_adaptively
from dp_lora.privacy.renyi import (
    FEW_ORDERS,
    ORDERS,
    admits,
    divergences_of,
    epsilon_of_divergences,
    filter_orders,
    least_budget,
    renyi_divergences,
)
from dp_lora.privacy.subsampled_gaussian import Mechanism

ALPHA = np.asarray(ORDERS)


@dataclass(frozen=True)
class Toy:
    """A mechanism of a few outcomes, by their probabilities with the image and without it."""

    present: tuple[float, ...]
    absent: tuple[float, ...]

    @functools.cache  # noqa: B019
    def divergences(self) -> np.ndarray:
        """Exact, at `ORDERS`, the larger of both directions."""
        p, q = np.array(self.present), np.array(self.absent)
        return np.maximum(_renyi(p, q), _renyi(q, p))

    def losses(self) -> list[tuple[float, float]]:
        """(probability with the image, privacy loss) of each outcome."""
        pairs = zip(self.present, self.absent, strict=True)
        return [(p, math.log(p / q) if q else math.inf) for p, q in pairs if p]


def _renyi(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    log_p, log_q = np.log(p)[:, None], np.log(q)[:, None]
    found: np.ndarray = np.logaddexp.reduce(ALPHA * log_p + (1 - ALPHA) * log_q) / (ALPHA - 1)
    return found


def response(epsilon: float) -> Toy:
    """Randomised response."""
    yes = math.exp(epsilon) / (1 + math.exp(epsilon))
    return Toy((yes, 1 - yes), (1 - yes, yes))


def rare(chance: float, loss: float) -> Toy:
    """Says with a small chance almost for certain that the image is there."""
    low = chance * math.exp(-loss)
    return Toy((chance, 1 - chance), (low, 1 - low))


Rule = Callable[[Sequence[Toy]], bool]
MENU = [response(0.15), response(0.4), rare(0.1, 0.7), rare(0.01, 1.3), rare(0.004, 2.0), rare(0.0005, 2.5)]


def most(
    menu: Sequence[Toy], rule: Rule, value: Callable[[float], float], depth: int, loss: float = 0.0,
    made: tuple[Toy, ...] = (),
) -> float:  # fmt: skip
    """The largest mean of `value` of the total loss, over all ways to pick mechanisms that `rule` admits."""
    best = value(loss)
    if not depth:
        return best
    for toy in menu:
        if rule((*made, toy)):
            rest = [(p, most(menu, rule, value, depth - 1, loss + x, (*made, toy))) for p, x in toy.losses()]
            best = max(best, sum(p * v for p, v in rest))
    return best


def delta_at(epsilon: float) -> Callable[[float], float]:
    """The part of delta that an outcome of a loss adds, at `epsilon`."""
    return lambda loss: max(0.0, -math.expm1(epsilon - loss))


def the_filter(budget: float, delta: float) -> Rule:
    return lambda made: admits(np.sum([toy.divergences() for toy in made], axis=0), budget, delta)


@pytest.mark.parametrize(("budget", "delta"), [(0.5, 0.05), (1.0, 0.01), (1.5, 1e-3)])
def test_the_best_adaptive_adversary_stays_inside_the_budget(budget: float, delta: float) -> None:
    worst = most(MENU, the_filter(budget, delta), delta_at(budget), depth=3)
    assert 0 < worst <= delta


def test_at_each_order_the_adversary_stays_under_the_divergence_allowed() -> None:
    """Feldman and Zrnic 2021, theorem 3.1, one order at a time."""
    for index, allowed in [part for part in filter_orders(1.0, 0.01) if part[1] > 0]:
        order = ORDERS[index]

        def rule(made: Sequence[Toy], index: int = index, allowed: float = allowed) -> bool:
            return bool(sum(toy.divergences()[index] for toy in made) <= allowed)

        def moment(loss: float, order: float = order) -> float:
            return math.exp((order - 1) * loss)

        reached = math.log(most(MENU, rule, moment, depth=3)) / (order - 1)
        assert reached <= allowed * (1 + 1e-9)


def test_composition_of_fixed_plans_as_a_filter_is_broken() -> None:
    """The broken twin: admit what the exact composition of the mechanisms picked so far would allow."""
    budget, delta = 1.9, 0.051
    menu = [response(1.0), Toy((delta, 1 - delta), (0.0, 1.0))]

    def fixed(made: Sequence[Toy]) -> bool:
        totals = [(1.0, 0.0)]
        for toy in made:
            totals = [(p * r, x + y) for p, x in totals for r, y in toy.losses()]
        return sum(p * delta_at(budget)(x) for p, x in totals) <= delta

    assert most(menu, fixed, delta_at(budget), depth=2) > 1.2 * delta


def test_what_the_filter_admits_any_order_would() -> None:
    """It is stricter than the best order picked afterwards, whose proof is missing, and not by much."""
    for sigma, q, steps in ((1.355, 0.25, 80), (0.64, 0.0016, 12_500), (5.4, 0.0333, 1800), (3.0, 1.0, 1)):
        divergences = renyi_divergences([Mechanism(sigma, q, steps)])
        afterwards = epsilon_of_divergences(divergences, 1e-5)
        assert afterwards <= least_budget(divergences, 1e-5) <= 1.25 * afterwards


def test_orders_rise_and_have_a_divergence() -> None:
    """`selection` takes a bound at an order for those below it, and 1 is no order."""
    for orders in (ORDERS, FEW_ORDERS):
        assert list(orders) == sorted(set(orders)) and orders[0] > 1
    assert set(FEW_ORDERS) <= set(ORDERS)
    one = Mechanism(1.0, 0.1, 3)
    everywhere = dict(zip(ORDERS, divergences_of(one), strict=True))
    assert np.isfinite(list(everywhere.values())).all()
    assert divergences_of(one, FEW_ORDERS).tolist() == [everywhere[order] for order in FEW_ORDERS]


def test_the_parts_of_delta_add_up_to_delta() -> None:
    """Each order's divergence gives the budget at its part: the parts, by the formula itself, sum to one."""
    for budget, delta in ((1.0, 1e-5), (10.0, 1e-7), (50.0, 1e-12)):
        parts = 0.0
        for index, allowed in filter_orders(budget, delta):
            order = ORDERS[index]
            exponent = (order - 1) * (allowed - budget + math.log((order - 1) / order)) - math.log(order)
            parts += math.exp(exponent)
        assert parts <= delta * (1 + 1e-9)


def test_the_least_budget_is_where_the_filter_begins_to_admit() -> None:
    divergences = renyi_divergences([Mechanism(1.2, 0.05, 200), Mechanism(2.0, 0.1, 100)])
    least = least_budget(divergences, 1e-5)
    assert admits(divergences, least, 1e-5) and not admits(divergences, least * 0.999, 1e-5)
    assert composed([Mechanism(1.2, 0.05, 200), Mechanism(2.0, 0.1, 100)], 1e-5).epsilon < least
    assert least_budget(np.zeros(len(ORDERS)), 1e-5) == 0
    assert least_budget(np.full(len(ORDERS), math.inf), 1e-5) == math.inf
    assert least_budget(divergences, 1e-5, above=2 * least) > 2 * least


# Runs of a ledger


def charge(steps: int, private: bool = True) -> Charge:
    return Charge(f"{steps}", "digits", Mechanism(1.355, 0.25, steps), 1e-5, private)


def test_a_budget_admits_its_own_first_run_and_then_no_other() -> None:
    budget = spent([charge(80)], 1e-5).epsilon
    assert fills(charge(80), budget) and fits(charge(80), [], budget)
    assert not fits(charge(80), [], budget * 0.999)
    for other in (1, 40, 80):
        assert not fits(charge(other), [charge(80)], budget)
    assert not fills(charge(20), budget), "the filter has room for it, and for another one"
    assert fits(charge(20), [charge(21)], budget) and fits(charge(80), [charge(0)], budget)


def test_a_run_without_privacy_fits_into_no_budget() -> None:
    assert not fits(charge(80, private=False), [], 1e6)
    assert not fits(charge(80), [charge(1, private=False)], 1e6)
    assert spent_adaptively([charge(80), charge(1, private=False)], 1e-5) == math.inf
    one, both = (spent_adaptively([charge(80)] * n, 1e-5) for n in (1, 2))
    assert spent([charge(80)] * 2, 1e-5).epsilon < both < 2 * one
