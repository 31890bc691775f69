"""Epsilon against its exact value, at a delta as small as the checks admit, and numbers out of all range.

The exact value is an integral without a grid of losses (`tests/builders/exact_loss.py`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hydra.core.global_hydra import GlobalHydra

from dp_lora.__main__ import main
from dp_lora.privacy.accounting import epsilon, epsilon_by_accountant
from dp_lora.privacy.plan import make_plan
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import read_json
from tests.builders.exact_loss import exact_epsilon
from tests.builders.tiny import once, words

Setting = tuple[float, float, int, float]

DEMONSTRATED = (0.0011896923320504611, 0.9827330177275361, 7850, 1e-12)
"""Where a transform without a tilt is off by some percent; the truth is 1.4026."""


def settings(number: int) -> list[Setting]:
    """(q, sigma, steps, delta): delta from 1e-5 to 1e-12, epsilon from 0.1 to 30."""
    draw, found = np.random.default_rng(20261125), list[Setting]()
    while len(found) < number:
        q, sigma = float(10 ** draw.uniform(-3.3, 0)), float(10 ** draw.uniform(-0.2, 1))
        steps, delta = int(10 ** draw.uniform(1.3, 4.3)), float(10 ** -draw.uniform(5, 12))
        if q * steps >= 8 and 0.003 <= q * math.sqrt(steps) / sigma <= 3:
            found.append((q, sigma, steps, delta))
    return found


ALL = settings(100)


def ratio(setting: Setting) -> float:
    """The reported epsilon over the exact one."""
    q, sigma, steps, delta = setting
    spent = epsilon([Mechanism(sigma, q, steps)], delta).epsilon
    return spent / exact_epsilon(q, sigma, steps, delta, near=spent)


def hold(chosen: list[Setting]) -> None:
    ratios = {setting: ratio(setting) for setting in chosen}
    low, high = min(ratios, key=lambda s: ratios[s]), max(ratios, key=lambda s: ratios[s])
    print(f"lowest {ratios[low]:.7f} at {low}, highest {ratios[high]:.7f} at {high}, of {len(ratios)}")
    # The exact value is good to 1e-7.
    assert ratios[low] >= 1 - 2e-7
    assert ratios[high] <= 1.01


def test_epsilon_is_never_below_the_truth_nor_one_percent_above() -> None:
    hold(ALL[:12])


@pytest.mark.slow
def test_epsilon_is_never_below_the_truth_at_a_hundred_settings() -> None:
    hold([DEMONSTRATED, *ALL])


def test_a_transform_without_a_tilt_is_off() -> None:
    """The broken twin: how far, and to which side, depends on the processor."""
    q, sigma, steps, delta = DEMONSTRATED
    assert epsilon([Mechanism(sigma, q, steps)], delta).epsilon == pytest.approx(1.4026, rel=3e-4)
    errors = []
    for interval in (1e-4, 1.5e-4, 2e-4):
        once = privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=sigma, sampling_prob=q, value_discretization_interval=interval
        )
        errors.append(abs(once.self_compose(steps).get_epsilon_for_delta(delta) / 1.4026 - 1))
    assert max(errors) > 2e-3


@pytest.mark.parametrize("delta", [1e-8, 1e-9, 4.5e-12, 1e-12, 1e-15, 1e-300])
def test_no_accountant_lets_a_valid_plan_be_refused(delta: float) -> None:
    """PRV was 0.2 % below PLD at 4.5e-12, and the preflight then refused the job."""
    from dp_lora.privacy.preflight import check_accountants

    for q, sigma, steps in ((0.0012, 0.98, 7850), (0.0041, 0.85, 40_000), (0.05, 1.2, 400), (1.0, 5.0, 10)):
        bounds = epsilon_by_accountant([Mechanism(sigma, q, steps)], delta)
        check_accountants(bounds)
        assert math.isfinite(bounds["rdp"])
        assert math.isfinite(bounds["pld"]) == (delta >= 1e-12)
        if delta < 1e-9:
            assert bounds["prv"] == math.inf, "it cannot be trusted there"
    plan = make_plan(
        num_examples=1000, expected_batch_size=100, steps=50, noise_multiplier=None, target_epsilon=5.0,
        delta=delta, noise_multiplicity=1, max_grad_norm=1.0,
    )  # fmt: skip
    assert 4.95 <= plan.epsilon <= 5 and plan.accountant == ("pld" if delta >= 1e-12 else "rdp")


# The command


@pytest.fixture
def command(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., Any]:
    def call(*given: str) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["dp-lora", *once(*words(cache, tmp_path / "outputs"), *given)])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            GlobalHydra.instance().clear()
        return status, capfd.readouterr().err

    return call


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["epsilon=none", "privacy.noise_multiplier=1e-9"], "privacy.noise_multiplier=1e-09: expected"),
        (["epsilon=none", "privacy.noise_multiplier=1e300"], "privacy.noise_multiplier=1e+300: expected"),
        (
            ["privacy.noise_multiplier=1e-9", "train.max_steps=null"],
            "privacy.noise_multiplier=1e-09: expected",
        ),
        (["train.max_steps=1000000000000"], "train.max_steps=1000000000000: expected at most 10000000"),
        (["privacy.max_grad_norm=1e-30"], "privacy.max_grad_norm=1e-30: expected"),
        (["privacy.delta=0"], "privacy.delta=0.0: expected"),
        (["privacy.delta=1e-400"], "privacy.delta=0.0: expected"),
    ],
)
def test_a_number_out_of_all_range_is_one_line_and_nothing_is_written(
    given: list[str], named: str, command: Callable[..., Any], tmp_path: Path
) -> None:
    status, said = command(*given)
    assert (status, said.count("\n")) == (2, 1), said
    assert said.startswith("dp-lora: ") and named in said
    assert list(tmp_path.iterdir()) == []


def test_a_job_at_a_delta_without_loss_distributions_says_whose_bound_it_has(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    status, said = command("privacy.delta=1e-15", "stages=[finetune]")
    assert status == 0, said
    (directory,) = (tmp_path / "outputs").glob("*/*/privacy.json")
    privacy = read_json(directory)
    assert privacy["accountant"] == "rdp" and privacy["epsilon_by_accountant"]["pld"] == "inf"
    assert 0.99 * privacy["target_epsilon"] <= privacy["epsilon"] <= privacy["target_epsilon"]
