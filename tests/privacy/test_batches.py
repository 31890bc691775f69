"""Every example joins every batch by itself with probability q."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from dp_lora.privacy.batches import poisson_batch
from dp_lora.privacy.randomness import Randomness

# Of each test, when the code is right; the seed is fixed, so that the outcome never changes.
FALSE_FAILURE_RATE = 1e-6
EXAMPLES, STEPS, RATE = 300, 2000, 0.1
SEED = Randomness.from_seed(5)


def poisson_inclusion() -> npt.NDArray[np.float64]:
    """[steps, examples] of 0 and 1."""
    included = np.zeros((STEPS, EXAMPLES))
    for step in range(STEPS):
        included[step, poisson_batch(SEED, step, EXAMPLES, RATE).numpy()] = 1
    return included


def shuffled_inclusion() -> npt.NDArray[np.float64]:
    """The broken twin: shuffled epochs in batches of the same mean size."""
    generator, size = np.random.default_rng(0), int(RATE * EXAMPLES)
    included = np.zeros((STEPS, EXAMPLES))
    for step in range(STEPS):
        place = step % (EXAMPLES // size)
        if place == 0:
            order = generator.permutation(EXAMPLES)
        included[step, order[place * size : (place + 1) * size]] = 1
    return included


def p_values(included: npt.NDArray[np.float64]) -> dict[str, float]:
    """Two-sided p-values of what independent Bernoulli(q) inclusions imply."""
    standard = (included - RATE) / np.sqrt(RATE * (1 - RATE))
    per_example = standard.sum(0) / np.sqrt(STEPS)
    per_step = standard.sum(1) / np.sqrt(EXAMPLES)
    lag = (standard[1:] * standard[:-1]).sum() / np.sqrt((STEPS - 1) * EXAMPLES)
    pairs = (standard[:, 1:] * standard[:, :-1]).sum() / np.sqrt(STEPS * (EXAMPLES - 1))

    def chi_square(values: npt.NDArray[np.float64]) -> float:
        below = stats.chi2(len(values)).cdf((values**2).sum())
        return float(2 * min(below, 1 - below))

    return {
        "rate": float(2 * stats.norm.sf(abs(standard.sum()) / np.sqrt(standard.size))),
        "count of an example": chi_square(per_example),
        "size of a batch": chi_square(per_step),
        "consecutive steps": float(2 * stats.norm.sf(abs(lag))),
        "neighbouring examples": float(2 * stats.norm.sf(abs(pairs))),
    }


def test_inclusions_are_independent_bernoulli() -> None:
    found = p_values(poisson_inclusion())
    assert min(found.values()) > FALSE_FAILURE_RATE / len(found), found


def test_shuffled_epochs_are_told_apart() -> None:
    found = p_values(shuffled_inclusion())
    for name in ("count of an example", "size of a batch", "consecutive steps"):
        assert found[name] < FALSE_FAILURE_RATE


def test_batches_are_sorted_replayed_and_depend_on_the_example_alone() -> None:
    batch = poisson_batch(SEED, 3, 1000, 0.2)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, batch.unique())
    assert torch.equal(batch, poisson_batch(Randomness.from_seed(5), 3, 1000, 0.2))
    assert torch.equal(batch[batch < 900], poisson_batch(SEED, 3, 900, 0.2))
    assert not torch.equal(batch, poisson_batch(SEED, 4, 1000, 0.2))


def test_extreme_rates() -> None:
    assert torch.equal(poisson_batch(SEED, 0, 10, 1.0), torch.arange(10))
    assert sum(len(poisson_batch(SEED, step, 10, 1e-3)) == 0 for step in range(100)) > 90
    for rate in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="sample_rate"):
            poisson_batch(SEED, 0, 10, rate)


# Properties of any batch

RATES = st.floats(2**-20, 1, exclude_min=True)
SIZES = st.integers(0, 2000)
LABELS = st.text(max_size=8)
STEPS_BEGUN = st.integers(0, 2**40)


def two_sided(successes: int, trials: int, rate: float) -> float:
    """A bound on the probability of so many or so few successes among independent trials (exact, doubled)."""
    law = stats.binom(trials, rate)
    return float(2 * min(law.cdf(successes), law.sf(successes - 1)))


@given(RATES, STEPS_BEGUN, LABELS)
@settings(max_examples=25)
def test_a_batch_has_as_many_examples_as_independent_coins_give(rate: float, step: int, label: str) -> None:
    """Each of the 25 rates fails by chance once in 10^8; keys and rates are fixed."""
    batch = poisson_batch(SEED.derive(label), step, 20_000, rate)
    assert two_sided(len(batch), 20_000, rate) > 1e-8
    # The broken twin: a quarter more than asked for.
    more = poisson_batch(SEED.derive(label), step, 20_000, min(1.0, 1.25 * rate))
    assert not 0.02 < rate <= 0.8 or two_sided(len(more), 20_000, rate) < 1e-8


@given(RATES, SIZES, SIZES, STEPS_BEGUN, LABELS)
def test_who_is_in_a_batch_does_not_depend_on_how_many_there_are(
    rate: float, fewer: int, more: int, step: int, label: str
) -> None:
    fewer, more = sorted((fewer, more))
    large, small = (poisson_batch(SEED.derive(label), step, size, rate) for size in (more, fewer))
    assert torch.equal(large[large < fewer], small)
    assert torch.equal(large, large.unique()) and (not len(large) or int(large[-1]) < more)


@given(RATES, STEPS_BEGUN, st.integers(0, 99))
def test_an_example_is_in_exactly_when_its_word_is_below_the_rate(
    rate: float, step: int, example: int
) -> None:
    """Never more often than the rate: it is rounded down to a multiple of 2^-64."""
    word = int(SEED.bits64("batch", step, range(example, example + 1))[0, 0])
    threshold = math.floor(Fraction(rate) * 2**64)
    assert Fraction(threshold, 2**64) <= Fraction(rate) < Fraction(threshold + 1, 2**64)
    assert (example in poisson_batch(SEED, step, 100, rate).tolist()) == (word < threshold)


@given(LABELS, LABELS, STEPS_BEGUN, STEPS_BEGUN)
@settings(max_examples=25)
def test_batches_of_two_executions_are_independent(one: str, other: str, step: int, later: int) -> None:
    """Both in: a coin of q^2. Fails by chance once in 10^8 for each of the 25 pairs, which are fixed."""
    assume((one, step) != (other, later))
    a = poisson_batch(SEED.derive(one), step, 20_000, 0.3)
    b = poisson_batch(SEED.derive(other), later, 20_000, 0.3)
    assert two_sided(len(set(a.tolist()) & set(b.tolist())), 20_000, 0.09) > 1e-8
    # The broken twin: the same batch once more.
    assert two_sided(len(a), 20_000, 0.09) < 1e-8
