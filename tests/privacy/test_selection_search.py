"""Private searches: the number of trials, the bound with scores, and what a ledger keeps of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dp_lora.errors import PlanError
from dp_lora.privacy.accounting import noise_multiplier_for
from dp_lora.privacy.ledger import SEARCHED, Charge, fits, spent, spent_adaptively
from dp_lora.privacy.renyi import ORDERS, renyi_divergences
from dp_lora.privacy.search_plan import SearchPlan, plan_search
from dp_lora.privacy.selection import (
    BOUNDS,
    SETS,
    Search,
    drawn_number,
    gamma_of,
    largest_number,
    probabilities,
    uniform_mixture,
)
from dp_lora.privacy.subsampled_gaussian import Mechanism

ALPHA = np.asarray(ORDERS)
SCORE = Mechanism(3.7, 1.0, 1)
SEARCH = Search((Mechanism(2.0, 0.05, 200), Mechanism(3.0, 0.1, 100)), SCORE, "Poisson", 6.0)


# The number of trials


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("runs", [1.0, 1.5, 8.0])
def test_the_probabilities_add_up_and_have_the_mean(name: str, runs: float) -> None:
    found = np.array([float(p) for p in itertools.islice(probabilities(name, runs), 2000)])
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found @ np.arange(len(found)) == pytest.approx(runs, rel=1e-9)
    assert found[0] == pytest.approx(math.exp(-runs) if name == "Poisson" else 0)
    if name == "logarithmic" and runs > 1:
        rest = 1 - gamma_of(runs, 0.0)
        assert found[1:6] == pytest.approx([-(rest**k) / k / math.log1p(-rest) for k in range(1, 6)])


@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_are_drawn_with_these_probabilities(name: str) -> None:
    """Chi-square of 3,000 draws in cells of 30 and more; it fails by chance once in 10,000."""
    from scipy.stats import chisquare

    drawn = np.bincount([drawn_number(name, 4.0) for _ in range(3000)], minlength=400)
    expected = 3000 * np.array([float(p) for p in itertools.islice(probabilities(name, 4.0), len(drawn))])
    large = expected >= 30

    def p_value(counts: np.ndarray) -> float:
        rest = [counts.sum() - counts[large].sum()]
        of = [expected.sum() - expected[large].sum()]
        return float(chisquare([*counts[large], *rest], [*expected[large], *of], sum_check=False).pvalue)

    assert p_value(drawn) > 1e-4
    # A number that is cut off at 8 is not of this distribution.
    assert (
        p_value(np.bincount(np.minimum(np.repeat(np.arange(len(drawn)), drawn), 5), minlength=len(drawn)))
        < 1e-4
    )


@pytest.mark.parametrize("name", BOUNDS)
def test_there_is_no_largest_number(name: str) -> None:
    least, most = (drawn_number(name, 8.0, lambda bits, low=low: 0 if low else 2**bits - 1) for low in (1, 0))
    assert least == (0 if name == "Poisson" else 1) and most > 70
    assert largest_number(name, 8.0, 0.5) <= largest_number(name, 8.0, 0.95) < most


# The bound


def exact(outcomes: np.ndarray, runs: float) -> np.ndarray:
    """Distribution of the best of K outcomes, later is better, K Poisson; the first is none at all."""
    cumulative = np.exp(runs * (np.concatenate([[0.0], np.cumsum(outcomes)]) - 1))
    return np.diff(cumulative, prepend=0.0)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    both = []
    with np.errstate(all="ignore"):
        for one, other in ((p, q), (q, p)):
            terms = ALPHA[:, None] * np.log(one) + (1 - ALPHA[:, None]) * np.log(other)
            largest = terms.max(axis=1, keepdims=True)
            both.append((np.log(np.exp(terms - largest).sum(axis=1)) + largest[:, 0]) / (ALPHA - 1))
    return np.maximum(*both)


def tilted(rng: np.random.Generator, outcome: np.ndarray) -> np.ndarray:
    other = outcome * np.exp(0.4 * rng.uniform(-1, 1, len(outcome)))
    return other / other.sum()


def test_the_bound_holds_for_searches_that_can_be_enumerated() -> None:
    """A trial draws a cell, trains, and is scored; whoever is in both sets moves training and score."""
    rng, runs, more_than_training = np.random.default_rng(3), 3.0, False
    for _ in range(40):
        trained = [rng.dirichlet(np.ones(3)) for _ in range(2)]
        scores = rng.dirichlet(np.ones(3))
        others, other_scores = [tilted(rng, one) for one in trained], tilted(rng, scores)
        # (score, cell, adapter): the better score is the better trial, and ties go by a fixed order.
        outcomes = np.concatenate([s * p / 2 for s in scores for p in trained])
        twins = np.concatenate([s * p / 2 for s in other_scores for p in others])
        found = divergence(exact(outcomes, runs), exact(twins, runs))
        training = [divergence(p, q) for p, q in zip(trained, others, strict=True)]
        score = divergence(scores, other_scores)
        bound = BOUNDS["Poisson"](uniform_mixture([one + score for one in training]), runs)
        known = np.isfinite(found)
        assert (found[known] <= bound[known] * (1 + 1e-9)).all()
        alone = BOUNDS["Poisson"](uniform_mixture(training), runs)
        more_than_training |= bool((found[known] > alone[known]).any())
    assert more_than_training, "a bound that forgets the scores would pass here too"


def test_the_divergences_of_training_and_score_are_added_before_the_theorem() -> None:
    both, training, held_out = (SEARCH.divergences(of) for of in ("both", "training", "held_out"))
    one = uniform_mixture([renyi_divergences([cell, SCORE]) for cell in SEARCH.cells])
    assert both == pytest.approx(BOUNDS["Poisson"](one, 6.0))
    assert held_out == pytest.approx(BOUNDS["Poisson"](renyi_divergences([SCORE]), 6.0))
    epsilons = [SEARCH.epsilon(1e-5, of) for of in ("held_out", "training", "both")]
    assert epsilons == sorted(set(epsilons)) and (both >= training).all()
    with pytest.raises(ValueError, match="expected one of training"):
        SEARCH.divergences("all")


def test_a_search_is_known_again_by_its_numbers() -> None:
    cells = (Mechanism(3.0, 0.1, 100), Mechanism(2.0, 0.05, 200), Mechanism(3.0, 0.1, 100))
    search = Search(cells, SCORE, "geometric", 4.0)
    assert Search.from_dict(search.to_dict()) == search == Search(cells[::-1], SCORE, "geometric", 4.0)
    for wrong in ({"distribution": "normal"}, {"cells": []}, {"expected_trials": 0.5}):
        with pytest.raises(ValueError, match="trials"):
            Search.from_dict({**search.to_dict(), **wrong})


# The plan


def planned(target: float = 10.0, strictest: tuple[str, ...] = ("both",), epsilon: float = 1.0) -> SearchPlan:
    score = Mechanism(noise_multiplier_for(epsilon, 1e-5, 1.0, 1), 1.0, 1)
    return plan_search(
        [(0.2, 40), (0.1, 80), (0.2, 40)], score, distribution="Poisson", expected_trials=5.0,
        target_epsilon=target, delta=1e-5, strictest=strictest,
    )  # fmt: skip


def test_the_strictest_statement_meets_the_target_and_hardly_more() -> None:
    plan, apart = planned(), planned(strictest=("training", "held_out"))
    assert 9.95 < plan.search.epsilon(1e-5) <= 10
    assert all(plan.search.epsilon(1e-5, of) <= 10 for of in SETS)
    assert 9.95 < apart.search.epsilon(1e-5, "training") <= 10 < apart.search.epsilon(1e-5)
    assert plan.trial_epsilon < apart.trial_epsilon < 10
    # Equal epsilon, so that cells of other sizes have other noise.
    assert plan.trials[0] == plan.trials[2] != plan.trials[1]
    assert sorted(plan.trials, key=lambda m: m.noise_multiplier) == list(plan.search.cells)


def test_scores_that_pass_the_target_alone_are_refused() -> None:
    with pytest.raises(PlanError, match="scores of the trials alone come to epsilon"):
        planned(2.0, epsilon=3.0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"distribution": "normal"}, "expected one of"), ({"expected_trials": 0.9}, "at least 1"),
     ({"target_epsilon": math.inf}, "finite")],
)  # fmt: skip
def test_numbers_that_make_no_search_are_refused(wrong: dict[str, object], says: str) -> None:
    given = {"distribution": "Poisson", "expected_trials": 5.0, "target_epsilon": 5.0, "delta": 1e-5}
    with pytest.raises(PlanError, match=says):
        plan_search([(0.1, 10)], SCORE, **(given | wrong))  # type: ignore[arg-type]


# In a ledger


def of_search(run: str = "s", unit: str = "image") -> Charge:
    return Charge(run, "mnist", SEARCHED, 1e-5, unit=unit, search=SEARCH)


def of_run(run: str = "r", unit: str = "image") -> Charge:
    return Charge(run, "mnist", Mechanism(2.0, 0.05, 200), 1e-5, unit=unit)


def test_a_search_composes_with_other_runs_by_its_divergences() -> None:
    alone, both = spent([of_search()], 1e-5), spent([of_search(), of_run()], 1e-5)
    assert alone.epsilon == SEARCH.epsilon(1e-5)
    single = spent([of_run()], 1e-5).epsilon
    assert max(alone.epsilon, single) < both.epsilon < alone.epsilon + single + 1
    assert both.epsilon < spent_adaptively([of_search(), of_run()], 1e-5) < math.inf
    budget = spent_adaptively([of_search(), of_run()], 1e-5)
    assert fits(of_run(), [of_search()], budget * 1.01)
    assert not fits(of_run(), [of_search()], budget * 0.99)
    assert fits(of_search(), [], alone.epsilon * 1.001) and not fits(of_search(), [], alone.epsilon * 0.99)


def test_a_search_for_persons_counts_for_an_image_as_the_replacement_of_a_record() -> None:
    search, run = of_search(unit="person"), of_run(unit="person")
    person = spent([search, run], 1e-5, unit="person").epsilon
    image = spent([search, run], 1e-5, unit="image").epsilon
    assert person < image < math.inf and image > 2 * person
    # And a search for images has no epsilon for a person.
    assert spent([of_search(), run], 1e-5, unit="person").epsilon == math.inf


def test_who_does_not_know_of_searches_counts_an_infinite_epsilon() -> None:
    assert spent([Charge("s", "mnist", SEARCHED, 1e-5)], 1e-5).epsilon == math.inf
