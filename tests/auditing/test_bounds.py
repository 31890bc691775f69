"""The lower bounds of the audit, the intervals and the membership, against exact cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import beta, binom, norm

from dp_lora.auditing import bounds
from dp_lora.auditing.bounds import Outcome
from dp_lora.privacy.subsampled_gaussian import Mechanism

# The bound of Steinke, Nasr and Jagielski


def test_without_delta_the_p_value_is_the_tail_of_randomised_response() -> None:
    """Randomised response is the worst case: each guess is right with probability e^eps / (1 + e^eps)."""
    guesses = 6
    for epsilon, correct in itertools.product((0.0, 0.7, 3.0), range(guesses + 1)):
        q = math.exp(epsilon) / (1 + math.exp(epsilon))
        outcomes = itertools.product((False, True), repeat=guesses)
        exact = sum(
            q ** sum(right) * (1 - q) ** (guesses - sum(right)) for right in outcomes if sum(right) >= correct
        )
        assert bounds.one_run_p_value(9, guesses, correct, epsilon, 0.0) == pytest.approx(exact, rel=1e-12)


def test_without_delta_all_right_gives_the_closed_form() -> None:
    q = 0.05 ** (1 / 100)
    bound = bounds.one_run_lower_bound(100, 100, 100, 0.0)
    assert bound == pytest.approx(math.log(q / (1 - q)), abs=1e-6)


@pytest.mark.parametrize(
    ("guesses", "correct", "confidence", "published"),
    [
        (100, 100, 0.95, 3.4791953936219215),
        (100, 100, 0.99, 3.023197554051876),
        (100, 60, 0.95, 0.05073561053723097),
        (35, 23, 0.95, 0.014548719860613346),
        (100, 60, 0.99, 0.0),
    ],
)
def test_bounds_published_with_the_papers_own_function(
    guesses: int, correct: int, confidence: float, published: float
) -> None:
    """Of 500 canaries at delta 1e-5: audit_results.json of codedp-ase26/codedp-cpt-models on the hub."""
    bound = bounds.one_run_lower_bound(500, guesses, correct, 1e-5, confidence)
    assert bound == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("delta", [1e-3, 0.02])
def test_with_delta_the_p_value_covers_the_mechanisms_that_use_it(epsilon: float, delta: float) -> None:
    """Two exact mechanisms: each coin is given away with probability delta by itself, or all are at once."""
    m = 20
    q = 1 / (1 + math.exp(-epsilon))
    uncovered = False
    for guesses, correct in itertools.product((5, m), range(1, m + 1)):
        if correct > guesses:
            continue
        one_by_one = binom.sf(correct - 1, guesses, delta + (1 - delta) * q)
        at_once = delta + (1 - delta) * binom.sf(correct - 1, guesses, q)
        bound = bounds.one_run_p_value(m, guesses, correct, epsilon, delta)
        assert bound >= max(one_by_one, at_once) * (1 - 1e-12)
        uncovered |= bounds.one_run_p_value(m, guesses, correct, epsilon, 0.0) < at_once
    assert uncovered, "without the term of delta the bound would be wrong"


def _gaussian(mu: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins of canaries that a Gaussian mechanism of sensitivity over noise mu releases."""
    random = np.random.default_rng(seed)
    included = random.random(count) < 0.5
    values = mu * included + random.standard_normal(count)
    return bounds.evidence(values / mu, 1 / mu, 1.0), included


def _epsilon_of_gaussian(mu: float, delta: float) -> float:
    """The exact epsilon of mu-GDP (Dong, Roth and Su 2022, corollary 2.13), by bisection."""
    low, high = 0.0, 200.0
    for _ in range(60):
        e = (low + high) / 2
        spent = norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu)
        low, high = (e, high) if spent > delta else (low, e)
    return high


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_a_gaussian_mechanism_is_not_accused(mu: float) -> None:
    """Each bound may pass the truth with 5 % at most; more than 6 of 40 has a chance below 1 %."""
    delta, runs = 1e-5, 40
    true = _epsilon_of_gaussian(mu, delta)
    found = [bounds.one_run(*_gaussian(mu, 400, seed), delta).epsilon for seed in range(runs)]
    assert sum(bound > true for bound in found) <= 6
    assert np.mean(found) > 0.05 * true, "a bound that says nothing cannot be wrong"


@pytest.mark.parametrize("steps", [1, 4])
def test_the_gaussian_family_is_not_accused_and_close(steps: int) -> None:
    """The same with the other bound; with 1,000 canaries it comes within a third of the truth."""
    delta, runs, mu = 1e-5, 40, 1.5
    mechanism = Mechanism(math.sqrt(steps) / mu, 1.0, steps)
    outcomes = [Outcome.of(*_gaussian(mu, 1000, seed)) for seed in range(runs)]
    assert sum(bounds.refutes([outcome], mechanism, delta) for outcome in outcomes) <= 6
    bound = bounds.gaussian_family(outcomes[:1], mechanism, delta)
    assert 0.66 < bound / _epsilon_of_gaussian(mu, delta) < 1


def test_the_gaussian_family_finds_less_noise_than_claimed() -> None:
    claimed, real = Mechanism(2.0, 1.0, 1), 1.5
    outcome = Outcome.of(*_gaussian(real, 1000, 3))
    bound = bounds.gaussian_family([outcome], claimed, 1e-5)
    assert bounds.refutes([outcome], claimed, 1e-5)
    assert _epsilon_of_gaussian(1 / 2.0, 1e-5) < bound < _epsilon_of_gaussian(real, 1e-5)
    nothing = Outcome(250, 500, 250, 500)
    assert bounds.gaussian_family([nothing], claimed, 1e-5) == 0.0


def test_a_high_threshold_helps_where_most_canaries_are_in_no_batch() -> None:
    """The noise of the released scores is that of the claim, so the thresholds hold what they promise."""
    claimed, random, count = Mechanism(0.4, 0.025, 10), np.random.default_rng(1), 20_000
    included = np.arange(count) % 2 == 0
    scores = np.zeros(count)
    for _ in range(claimed.steps):
        values = included * (random.random(count) < claimed.sample_rate) + 0.4 * random.standard_normal(count)
        scores += bounds.evidence(values, 0.4, 0.025)
    outcomes = [Outcome.of(scores, included, at) for at in bounds.thresholds(claimed)]
    for outcome, rate in zip(outcomes[1:], bounds.FALSE_POSITIVES, strict=True):
        assert outcome.false_positives / outcome.negatives == pytest.approx(rate, rel=0.5)
    found = [bounds.gaussian_family(kept, claimed, 1e-5) for kept in (outcomes[:1], outcomes)]
    assert found[0] < found[1] and not bounds.refutes(outcomes, claimed, 1e-5)


def test_the_evidence_is_the_ratio_of_the_densities() -> None:
    values, sigma, q, a = np.linspace(-3, 4, 29), 0.8, 0.3, 0.7
    inside = (1 - q) * norm.pdf(values, 0, sigma) + q * norm.pdf(values, a, sigma)
    expected = np.log(inside / norm.pdf(values, 0, sigma))
    assert np.allclose(bounds.evidence(values, sigma, q, amplitude=a), expected, atol=1e-12)
    # One image adds C at most, so that is what a canary adds unless the caller says otherwise.
    assert np.array_equal(bounds.evidence(values, sigma, q), bounds.evidence(values, sigma, q, amplitude=1.0))
    full = bounds.evidence(values, sigma, 1.0, amplitude=a)
    assert np.allclose(full, norm.logpdf(values, a, sigma) - norm.logpdf(values, 0, sigma), atol=1e-12)


def test_abstaining_helps_and_the_number_of_guesses_is_paid_for() -> None:
    scores, included = _gaussian(1.5, 1000, 0)
    all_of_them = bounds.one_run(scores, included, 1e-5, shares=(1.0,))
    chosen = bounds.one_run(scores, included, 1e-5, shares=(0.1,))
    several = bounds.one_run(scores, included, 1e-5, shares=(1.0, 0.1))
    assert chosen.guesses == 100 and chosen.epsilon > several.epsilon > all_of_them.epsilon
    assert (
        several.correct
        == chosen.correct
        == int(((scores > 0) == included)[np.argsort(-abs(scores))][:100].sum())
    )


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    """Also where each of several bounds would have one of its own between 0 and 1."""
    scores = np.arange(4.0)
    for call in (
        lambda: bounds.one_run(scores, scores > 1, 1e-5, confidence),
        lambda: bounds.membership(scores, scores, confidence, at=()),
    ):
        with pytest.raises(ValueError, match="confidence"):
            call()


@pytest.mark.parametrize("seldom", ["false positives", "false negatives"])
def test_a_claim_is_refuted_by_what_happens_almost_never(seldom: str) -> None:
    """At a rate near 0 only a large epsilon of the profile bounds the other one: of mu = 4 a rate of 5e-5
    allows 0.55, while the distance in variation, which is the profile at epsilon 0, allows 0.95."""
    claimed = Mechanism(0.25, 1.0, 1)
    outcome = Outcome(800, 1000, 0, 100_000)
    allowed = Outcome(450, 1000, 0, 100_000)
    if seldom == "false negatives":
        outcome, allowed = (
            Outcome(100_000, 100_000, 1000 - one.true_positives, 1000) for one in (outcome, allowed)
        )
    assert bounds.refutes([outcome], claimed, 1e-5)
    assert not bounds.refutes([allowed], claimed, 1e-5)


# Intervals and membership


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (3, 7), (7, 7), (40, 1000)])
def test_clopper_pearson_is_made_of_beta_quantiles(successes: int, trials: int) -> None:
    low, high = bounds.clopper_pearson(successes, trials, 0.9)
    assert low == pytest.approx(beta.ppf(0.05, successes, trials - successes + 1) if successes else 0.0)
    assert high == pytest.approx(
        beta.ppf(0.95, successes + 1, trials - successes) if successes < trials else 1.0
    )
    assert bounds.clopper_pearson(0, 0) == (0.0, 1.0)


def test_membership_is_what_counting_gives() -> None:
    random = np.random.default_rng(0)
    members, others = np.round(random.normal(1, 1, 60), 1), np.round(random.normal(0, 1, 40), 1)
    found = bounds.membership(members, others, at=(0.1, 0.01))
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert found.auc == pytest.approx(np.mean(pairs))
    for rate in found.rates:
        thresholds = [t for t in members if np.mean(others >= t) <= rate.at]
        assert rate.tpr == pytest.approx(max((np.mean(members >= t) for t in thresholds), default=0.0))
        assert rate.low <= rate.tpr <= rate.high and rate.false_positives <= rate.at * 40
    table = np.array(pairs).reshape(60, 40)
    error = math.sqrt(table.mean(1).var(ddof=1) / 60 + table.mean(0).var(ddof=1) / 40)
    assert found.auc_high - found.auc == pytest.approx(1.959964 * error, rel=1e-6)
    assert found.roc[0] == (0, 0) and found.roc[-1] == (1, 1)


def test_membership_of_the_same_images_is_a_coin_and_of_others_certain() -> None:
    values = np.linspace(0, 1, 50)
    same = bounds.membership(values, values)
    assert same.auc == pytest.approx(0.5) and same.auc_low < 0.5 < same.auc_high
    certain = bounds.membership(values + 2, values)
    assert certain.auc == 1 and all(rate.tpr == 1 for rate in certain.rates)


def test_two_images_of_each_kind_have_a_membership() -> None:
    found = bounds.membership(np.array([2.0, 3.0]), np.array([0.0, 1.0]))
    assert found.auc == 1 and found.rates[0].tpr == 1


@pytest.mark.parametrize(("members", "others"), [(1, 9), (9, 1), (0, 2)])
def test_membership_of_a_single_image_is_refused(members: int, others: int) -> None:
    with pytest.raises(ValueError, match=f"{members} members and {others} others: expected at least 2"):
        bounds.membership(np.arange(members, dtype=float), np.arange(others, dtype=float))
