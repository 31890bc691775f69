"""The audit finds an engine that adds too little noise: a small version of the tables in docs/auditing.md.

The engine's own step on a linear model (`benchmarks.linear_audit`), with the defects planted in the engine.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.linear_audit import (
    DEFECTS,
    MICROBATCH,
    Found,
    correct,
    judge,
    noise_times,
    plan_of,
    silent,
    train,
)
from dp_lora.auditing import bounds
from dp_lora.auditing.canaries import Trained, Watch
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness

PLANS = {"two steps": (0.5, 2, None), "default job": (0.25, 80, 1.355)}


def _plan(name: str, k: int = 1) -> PrivacyPlan:
    sample_rate, steps, sigma = PLANS[name]
    return plan_of(sample_rate, steps, sigma, k)


def _audits(plan: PrivacyPlan, audits: int, seed: int = 0) -> tuple[list[Trained], list[Found]]:
    key = Randomness.from_seed(seed)
    trained = train(plan, audits, 400, key)
    steps = [silent(plan, 400, key.derive(str(i))) for i in range(audits)]
    return trained, [judge(one, plan, own) for one, own in zip(trained, steps, strict=True)]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("factor", [0.0, 0.3, 0.8])
def test_too_little_noise_is_found_at_every_sample_rate(factor: float, name: str) -> None:
    """At the least (two steps, 0.8) the variance is 10 standard deviations below where the test accuses.

    Seeded; an estimate is 5 standard deviations away from the factor by chance in 2 of 10^6 audits.
    """
    plan = _plan(name)
    with noise_times(factor)():
        trained, found = _audits(plan, 4)
    assert all(one.noise and "variance" in one.by for one in found)
    for one in trained:
        assert one.noise is not None and one.noise.ratio() == pytest.approx(factor, abs=0.08)
    if factor < 0.5:
        assert all(one.bounds for one in found), "canaries are scored for the noise that there is"


@pytest.mark.parametrize("name", PLANS)
def test_correct_engines_are_not_accused(name: str) -> None:
    """The tests of the noise accuse 1 % at most: more than four of twelve is a chance of 8 in 10^8.

    The bounds fail in 5 % at most: more than eight of twelve is a chance of 5 in 10^10.
    """
    with correct():
        _, found = _audits(_plan(name), 12, seed=1)
    assert not {"missing_release", "unreleased_update"} & {test for one in found for test in one.by}
    assert sum(one.noise for one in found) <= 4 and sum(one.bounds for one in found) <= 8


BY_BOUNDS = ("no clipping", "each of 4 draws clipped by itself", "every image in every batch")
BY_ONE_TEST = {
    "padding counts as examples": {"largest_contribution"},
    "the sum without noise is descended as well": {"unreleased_update"},
    "divided by the size of the batch that came": {
        "variance_above",
        "largest_contribution",
        "loudest_tensor",
    },
    "a step with an empty batch is skipped": {"missing_release"},
}
"""Defects that pass all other tests and both bounds."""


@pytest.mark.parametrize(
    "defect",
    [name for name in DEFECTS if name not in ("no noise", "half of the noise") and name not in BY_ONE_TEST],
)
def test_each_defect_is_found_on_the_default_jobs_plan(defect: str) -> None:
    """Missing or repeated noise by the tests of the noise, the others by the bounds; seeded."""
    with DEFECTS[defect]():
        _, found = _audits(_plan("default job", k=4 if "draws" in defect else 1), 2)
    assert all(one.bounds if defect in BY_BOUNDS else one.noise for one in found)


@pytest.mark.parametrize("defect", BY_ONE_TEST)
def test_a_defect_that_only_one_kind_of_test_sees_is_found_by_it(defect: str) -> None:
    """Two audits, each in a training of its own; seeded."""
    plan = _plan("default job")
    for seed in (0, 1):
        key = Randomness.from_seed(seed)
        with DEFECTS[defect]():
            (trained,) = train(plan, 1, 400, key, microbatch=MICROBATCH.get(defect))
            found = judge(trained, plan, silent(plan, 400, key.derive("0")))
        assert set(found.by) == BY_ONE_TEST[defect] and not found.bounds


def test_a_correct_engine_in_small_microbatches_is_not_accused() -> None:
    """With padding in most batches; seeded, a false alarm has a chance of 1 %."""
    plan, key = _plan("default job"), Randomness.from_seed(0)
    (trained,) = train(plan, 1, 400, key, microbatch=16)
    assert trained.p_values()["largest_contribution"] > 0.01
    assert judge(trained, plan, silent(plan, 400, key.derive("0"))).by == ()


def test_scores_for_the_claimed_noise_say_nothing_where_there_is_none() -> None:
    """What this is for: at a sample rate of 0.25 a canary that is in scores below 0 when noise is missing.

    Under a tenth of the noise a canary's coordinate is near 0 or near 1 at every step. The evidence for the
    claimed noise, the twin, takes the 60 absences of 80 for proof that it is out.
    """
    plan, random = _plan("default job"), np.random.default_rng(0)
    included = np.arange(400) % 2 == 0
    watch, twin = Watch(plan, included, 512), np.zeros(400)
    for _ in range(plan.steps):
        noise = 0.1 * plan.noise_multiplier * random.standard_normal(912)
        noise[:400] += included & (random.random(400) < plan.sample_rate)
        watch.add(noise)
        twin += bounds.evidence(noise[:400], plan.noise_multiplier, plan.sample_rate)
    scores = watch.trained().scores
    assert np.array_equal(scores > 0, included)
    assert _right(twin, included) < 0.7


def _right(scores: np.ndarray, included: np.ndarray) -> float:
    return float(np.mean((scores > 0) == included))
