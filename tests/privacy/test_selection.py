"""Releasing the best of K private runs: the bounds against exact cases, closed forms, another library."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from dp_lora.privacy import selection
from dp_lora.privacy.renyi import ORDERS, delta_of_divergences, epsilon_of_divergences, renyi_divergences
from dp_lora.privacy.selection import (
    BOUNDS,
    best_of,
    best_of_truncated_negative_binomial,
    expected_runs_of,
    gamma_of,
    uniform_mixture,
)
from dp_lora.privacy.subsampled_gaussian import Mechanism

Array = np.ndarray
ALPHA = np.asarray(ORDERS)
RUN = Mechanism(2.0, 0.05, 200)


def divergences(p: Array, q: Array) -> Array:
    """Renyi divergences of two distributions over a few outcomes, the larger of both directions."""
    both = []
    with np.errstate(all="ignore"):
        for one, other in ((p, q), (q, p)):
            terms = ALPHA[:, None] * np.log(one) + (1 - ALPHA[:, None]) * np.log(other)
            largest = terms.max(axis=1, keepdims=True)
            both.append((np.log(np.exp(terms - largest).sum(axis=1)) + largest[:, 0]) / (ALPHA - 1))
    return np.maximum(*both)


def generating(name: str, runs: float) -> Callable[[Array], Array]:
    """x -> E[x^K] for the distribution of K, from its definition."""
    if name == "Poisson":
        return lambda x: np.exp(runs * (x - 1))
    if name == "geometric":
        gamma = 1 / runs
        return lambda x: gamma * x / (1 - (1 - gamma) * x)
    gamma = gamma_of(runs, 0.0)
    return lambda x: np.log(1 - (1 - gamma) * x) / math.log(gamma)


def best(outcome: Array, name: str, runs: float) -> Array:
    """Exact distribution of the best of K draws from `outcome`, later is better; first: no draw at all."""
    cumulative = generating(name, runs)(np.concatenate([[0.0], np.cumsum(outcome)]))
    return np.diff(cumulative, prepend=0.0)[0 if name == "Poisson" else 1 :]


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("runs", [1.5, 4.0, 30.0])
def test_the_bound_holds_for_mechanisms_whose_selection_is_known_exactly(name: str, runs: float) -> None:
    rng, more_than_one_run = np.random.default_rng(0), False
    for scale in (0.05, 0.3, 1.0):
        for _ in range(15):
            outcome = rng.dirichlet(np.ones(4))
            other = outcome * np.exp(scale * rng.uniform(-1, 1, 4))
            other /= other.sum()
            one = divergences(outcome, other)
            exact = divergences(best(outcome, name, runs), best(other, name, runs))
            bound = BOUNDS[name](one, runs)
            # A probability that numpy rounds to nothing has no divergence.
            known = np.isfinite(exact)
            assert (exact[known] <= bound[known] * (1 + 1e-9)).all()
            more_than_one_run |= bool((exact[known] > one[known] * 1.05).any())
    assert more_than_one_run, "a bound that forgets the selection would pass here too"


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [3.0, 8.0])
def test_the_bound_for_the_gaussian_mechanism_is_the_papers_closed_form(eta: float, sigma: float) -> None:
    # Corollary 4, for a mechanism of rho zero-concentrated privacy: theorem 2 with the best second order.
    rho, runs = 1 / (2 * sigma**2), 12.0
    log_mean, log_inverse_gamma = math.log(runs), -math.log(gamma_of(runs, eta))
    one = renyi_divergences([Mechanism(sigma, 1.0, 1)])
    assert one == pytest.approx(rho * ALPHA, rel=1e-9)
    found = best_of_truncated_negative_binomial(one, runs, eta)
    constant = 2 * (1 + eta) * math.sqrt(rho * log_inverse_gamma) - eta * rho
    turn = 1 + math.sqrt(log_mean / rho)
    for order, value in zip(ORDERS, found, strict=True):
        if order <= turn:
            expected = 2 * math.sqrt(rho * log_mean) + constant
        else:
            expected = rho * (order - 1) + log_mean / (order - 1) + constant
        # The orders tried are a grid, and each of them gives a bound.
        assert expected * (1 - 1e-9) <= value <= expected * 1.01


def test_the_best_of_many_costs_two_or_three_times_a_pure_run() -> None:
    # For pure epsilon, with every order in reach: (2 + eta) epsilon, whatever the number of runs.
    one = np.minimum(0.1 * ALPHA, 0.1)
    for eta in (0.0, 1.0):
        last = best_of_truncated_negative_binomial(one, 5.0, eta)[-1]
        assert last == pytest.approx((2 + eta) * 0.1, rel=0.05)


@pytest.mark.parametrize(("name", "shape"), [("logarithmic", 0.0), ("geometric", 1.0), ("Poisson", math.inf)])
@pytest.mark.parametrize("runs", [3, 24])
def test_the_bound_is_that_of_dp_accounting(name: str, shape: float, runs: int) -> None:
    import dp_accounting as dp

    step = dp.PoissonSampledDpEvent(RUN.sample_rate, dp.GaussianDpEvent(RUN.noise_multiplier))
    event = dp.dp_event.RepeatAndSelectDpEvent(dp.SelfComposedDpEvent(step, RUN.steps), runs, shape)
    theirs = dp.rdp.RdpAccountant(ORDERS).compose(event).get_epsilon(1e-5)
    bound = BOUNDS[name](renyi_divergences([RUN]), float(runs))
    assert epsilon_of_divergences(bound, 1e-5) == pytest.approx(theirs, rel=2e-3)


def test_the_number_of_runs_has_the_mean_asked_for() -> None:
    assert expected_runs_of(0.25, 1.0) == 4.0
    for eta in (0.0, 0.5, 1.0, 3.0):
        for runs in (1.001, 2.0, 50.0, 1e4):
            gamma = gamma_of(runs, eta)
            assert 0 < gamma < 1 and expected_runs_of(gamma, eta) == pytest.approx(runs, rel=1e-6)


def test_simulated_selections_come_out_as_computed() -> None:
    # Five standard errors each way: false failures 6 in ten million.
    rng, runs, success, trials = np.random.default_rng(1), 6.0, 0.07, 200_000
    numbers = rng.logseries(1 - gamma_of(runs, 0.0), trials)
    assert abs(numbers.mean() - runs) < 5 * numbers.std() / math.sqrt(trials)
    found = (rng.binomial(numbers, success) > 0).mean()
    expected = best(np.array([1 - success, success]), "logarithmic", runs)[-1]
    assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / trials)


def test_a_cell_drawn_at_random_has_the_divergence_of_the_pair() -> None:
    rng = np.random.default_rng(2)
    pairs = [(rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3))) for _ in range(3)]
    # One direction: the pair (cell, outcome) under both data sets.
    one_way = []
    with np.errstate(all="ignore"):
        for p, q in [*pairs, tuple(np.concatenate(side) / 3 for side in zip(*pairs, strict=True))]:
            one_way.append(
                np.log((p ** ALPHA[:, None] * q ** (1 - ALPHA[:, None])).sum(axis=1)) / (ALPHA - 1)
            )
    *cells, joint = (np.where(ALPHA < 100, values, 0) for values in one_way)
    assert uniform_mixture(cells) == pytest.approx(joint, rel=1e-9)


def test_different_cells_cost_at_most_what_the_worst_would() -> None:
    quiet, loud = Mechanism(4.0, 0.05, 200), Mechanism(1.0, 0.05, 200)
    epsilons = [
        best_of([[cell] for cell in cells], 1e-5, 4).epsilon
        for cells in ([quiet] * 4, [quiet, quiet, quiet, loud], [loud] * 4)
    ]
    assert epsilons == sorted(epsilons) and epsilons[0] < epsilons[1] < epsilons[2]
    assert math.isinf(best_of([[quiet], [Mechanism(0.0, 0.05, 200)]], 1e-5).epsilon)


def test_more_runs_cost_more_and_one_costs_itself() -> None:
    alone = epsilon_of_divergences(renyi_divergences([RUN]), 1e-5)
    assert best_of([[RUN]], 1e-5).epsilon == pytest.approx(alone)
    epsilons = [best_of([[RUN]] * runs, 1e-5).epsilon for runs in (1, 2, 10, 100)]
    assert epsilons == sorted(set(epsilons))
    assert selection.best_of([[RUN]] * 10, 1e-5) == best_of([[RUN]], 1e-5, expected_runs=10)
    for cells, runs in (([], 3.0), ([[RUN]], 0.5), ([[RUN]], math.inf)):
        with pytest.raises(ValueError, match="expected_runs"):
            best_of(cells, 1e-5, runs)


def test_delta_and_epsilon_of_divergences_are_inverse() -> None:
    one = renyi_divergences([RUN])
    for delta in (1e-8, 1e-5, 1e-2):
        assert delta_of_divergences(one, epsilon_of_divergences(one, delta)) == pytest.approx(delta, rel=1e-6)
    assert delta_of_divergences(one, 0.0) <= 1
