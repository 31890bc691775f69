"""What holds of epsilon for all settings: hypothesis looks for one that breaks it."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dp_lora.errors import UserError
from dp_lora.privacy.accounting import composed, noise_multiplier_for, privacy_profile, steps_for
from dp_lora.privacy.subsampled_gaussian import Mechanism

# Cells of the loss are a power of two wide, which moves epsilon by less than this.
ROUNDING = 2e-3


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    """10^x for x between the two."""
    return st.floats(low, high).map(lambda x: 10.0**x)


MECHANISMS = st.builds(Mechanism, powers(-0.3, 1.0), powers(-3.0, 0.0), powers(0.0, 4.0).map(int))
DELTAS = powers(-13.0, -4.0)
MORE = st.floats(1.0, 2.0)


def spent(mechanism: Mechanism, delta: float) -> float:
    return composed([mechanism], delta).epsilon


@given(MECHANISMS, DELTAS, MORE)
@settings(max_examples=12)
def test_epsilon_grows_with_sample_rate_steps_less_noise_and_less_delta(
    mechanism: Mechanism, delta: float, more: float
) -> None:
    sigma, q, steps = mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps
    least = spent(mechanism, delta) * (1 - ROUNDING) - 1e-6
    assert spent(Mechanism(sigma, min(1.0, q * more), steps), delta) >= least
    assert spent(Mechanism(sigma, q, int(steps * more)), delta) >= least
    assert spent(Mechanism(sigma / more, q, steps), delta) >= least
    # Below 1e-12 the looser bound stands alone.
    assert spent(mechanism, delta / more) >= least


@given(MECHANISMS, MECHANISMS, DELTAS)
@settings(max_examples=8)
def test_two_together_spend_at_least_each_and_at_most_the_sum(
    one: Mechanism, other: Mechanism, delta: float
) -> None:
    both = composed([one, other], delta).epsilon
    apart = [spent(m, delta) for m in (one, other)]
    assert both >= max(apart) * (1 - ROUNDING) - 1e-6
    # Basic composition, at half of delta each.
    assert both <= sum(spent(m, delta / 2) for m in (one, other)) * 1.15 + 1e-6


@given(powers(-1.0, 1.5), DELTAS, powers(-3.0, 0.0), powers(0.0, 3.5).map(int))
@settings(max_examples=6)
def test_the_noise_for_an_epsilon_meets_it_and_hardly_less_would(
    target: float, delta: float, q: float, steps: int
) -> None:
    sigma = noise_multiplier_for(target, delta, q, steps)
    assert 0.99 * target <= spent(Mechanism(sigma, q, steps), delta) <= target * (1 + 1e-9)
    assert spent(Mechanism(sigma * 0.97, q, steps), delta) > target


@given(powers(-0.5, 1.3), DELTAS, powers(-2.0, 0.0), powers(-0.1, 0.8))
@settings(max_examples=4)
def test_the_last_step_under_an_epsilon_is_the_last(
    target: float, delta: float, q: float, sigma: float
) -> None:
    try:
        steps = steps_for(target, delta, q, sigma)
    except UserError:
        assert spent(Mechanism(sigma, q, 1), delta) > target * (1 - ROUNDING)
        return
    assert spent(Mechanism(sigma, q, steps), delta) <= target * (1 + 1e-9)
    assert spent(Mechanism(sigma, q, steps + max(1, steps // 50)), delta) > target * (1 - ROUNDING)


@given(MECHANISMS, powers(-11.0, -4.0))
@settings(max_examples=6)
def test_the_profile_falls_and_passes_through_epsilon(mechanism: Mechanism, delta: float) -> None:
    epsilon = spent(mechanism, delta)
    assume(epsilon > 1e-3)
    profile = privacy_profile(mechanism, np.array([0.0, epsilon / 2, epsilon, 1.05 * epsilon]), delta)
    assert all(0 <= value <= 1 for value in profile)
    assert np.all(np.diff(profile) <= 1e-9 + 1e-3 * profile[:-1])
    assert 0.9 * delta <= profile[2] <= 1.05 * delta
