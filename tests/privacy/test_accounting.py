"""Epsilon against an independent, finer computation; calibration; what was published."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution

from dp_lora.errors import UserError
from dp_lora.privacy import accounting
from dp_lora.privacy.accounting import (
    EpsilonCurve,
    Spent,
    composed,
    epsilon,
    epsilon_by_accountant,
    noise_multiplier_for,
    smallest,
    steps_for,
)
from dp_lora.privacy.subsampled_gaussian import Mechanism

# (q, sigma, steps, delta, interval of the reference): epsilon from 0.1 to beyond 1000.
GRID = [
    (0.001, 0.4, 10, 1e-5, 2e-4),
    (0.001, 0.5, 20_000, 1e-6, 5e-4),
    (0.001, 0.8, 100_000, 1e-6, 2e-4),
    (0.001, 2.0, 20_000, 1e-5, 1e-5),
    (0.004, 0.6, 5_000, 1e-6, 2e-4),
    (0.004, 1.1, 15_000, 1e-5, 2e-4),
    (0.01, 0.11, 1000, 1e-5, 1e-2),
    (0.01, 0.2, 1000, 1e-5, 5e-3),
    (0.01, 0.5, 1, 1e-5, 2e-4),
    (0.01, 0.7, 1000, 1e-7, 2e-4),
    (0.01, 1.0, 10_000, 1e-5, 2e-4),
    (0.01, 4.0, 10_000, 1e-5, 5e-5),
    (0.01, 50.0, 25_000, 1e-5, 1e-6),
    (0.0333, 0.5, 300, 1e-5, 1e-3),
    (0.0333, 0.9778, 1800, 1e-5, 2e-4),
    (0.0333, 9.7, 6000, 1e-5, 2e-5),
    (0.05, 0.4, 1000, 1e-5, 1e-3),
    (0.05, 0.83, 400, 1e-6, 5e-4),
    (0.05, 20.0, 400, 1e-6, 1e-6),
    (0.0819, 1.4899, 1000, 1e-5, 2e-4),
    (0.0819, 3.0, 1000, 1e-5, 5e-5),
    (0.1638, 13.9, 500, 1e-5, 1e-5),
    (0.2, 0.2, 50, 1e-5, 2e-3),
    (0.2, 0.73, 80, 1e-5, 5e-4),
    (0.2, 1.16, 80, 1e-5, 2e-4),
    (0.2, 55.0, 80, 1e-5, 1e-6),
    (0.5, 1.0, 20, 1e-4, 5e-4),
    (0.5, 5.0, 200, 1e-4, 2e-5),
    (1.0, 0.5, 1, 1e-5, 1e-3),
    (1.0, 20.0, 100, 1e-5, 2e-5),
]


def reference(q: float, sigma: float, steps: int, delta: float, interval: float) -> float:
    """dp-accounting at a fixed fine interval, whatever ours chooses."""
    once = privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma, sampling_prob=q, value_discretization_interval=interval
    )
    return float(once.self_compose(steps).get_epsilon_for_delta(delta))


def bounds_of(q: float, sigma: float, steps: int, delta: float) -> dict[str, float]:
    return epsilon_by_accountant([Mechanism(sigma, q, steps)], delta)


def test_the_grid_spans_what_it_claims() -> None:
    assert len(GRID) == 30
    spent = [smallest(bounds_of(*setting[:4])).epsilon for setting in GRID]
    assert min(spent) < 0.1 and max(spent) > 900


@pytest.mark.parametrize("setting", GRID)
def test_epsilon_is_at_most_one_percent_above_the_truth(
    setting: tuple[float, float, int, float, float],
) -> None:
    bounds = bounds_of(*setting[:4])
    true = reference(*setting)
    spent = smallest(bounds)
    assert true * (1 - 1e-3) <= spent.epsilon <= true * 1.01
    assert bounds[spent.accountant] == spent.epsilon
    assert true * (1 - 1e-3) <= min(bounds.values())
    if math.isfinite(bounds["prv"]):
        assert bounds["pld"] * (1 - 1e-3) <= bounds["prv"] <= bounds["pld"] + max(0.02, 0.02 * true)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "prv", "pld", "rdp"),
    [
        (2000 / 60_000, 0.9778, 1800, 1e-5, 9.9932, 9.9827, 10.8701),
        (4096 / 50_000, 1.4899, 1000, 1e-5, 9.9945, 9.9840, 10.7975),
        (8192 / 50_000, 13.9062, 500, 1e-5, 0.9974, 0.9874, 1.0797),
        (8192 / 162_770, 1.1212, 1000, 1e-6, 9.9930, 9.9826, 10.7591),
        (2048 / 162_770, 1.1206, 5000, 1e-6, 4.9927, 4.9825, 5.3605),
        (2048 / 30_000, 11.4062, 1500, 1e-6, 0.9941, 0.9841, 1.0615),
    ],
)
def test_values_of_the_libraries_themselves(
    q: float, sigma: float, steps: int, delta: float, prv: float, pld: float, rdp: float
) -> None:
    """opacus 1.6.0 (PRV with error 0.01, RDP) and dp-accounting 0.6.0 (PLD, interval 1e-4), run apart."""
    bounds = epsilon_by_accountant([Mechanism(sigma, q, steps)], delta)
    assert bounds["pld"] == pytest.approx(pld, rel=2e-4, abs=2e-4)
    assert bounds["rdp"] == pytest.approx(rdp, rel=1e-3)
    # Ours asks PRV for a smaller error where epsilon is small.
    assert pld <= bounds["prv"] <= prv + 1e-3


def test_published_epsilon_of_abadi_et_al() -> None:
    """Deep learning with differential privacy (2016), section 3.2: q = 0.01, sigma = 4, delta = 1e-5 and
    E = 100 epochs (T = 10,000) give epsilon 1.26 with the moments accountant; exact bounds are below."""
    bounds = epsilon_by_accountant([Mechanism(4.0, 0.01, 10_000)], 1e-5)
    assert bounds["pld"] <= bounds["prv"] <= bounds["rdp"] <= 1.26
    assert bounds["rdp"] > 0.9


def test_edge_cases() -> None:
    assert epsilon_by_accountant([], 1e-5) == {"prv": 0.0, "pld": 0.0, "rdp": 0.0}
    assert epsilon([Mechanism(1.0, 0.1, 0), Mechanism(0.0, 0.0, 5)], 1e-5).epsilon == 0
    assert epsilon([Mechanism(0.0, 0.1, 1)], 1e-5).epsilon == math.inf
    assert epsilon([Mechanism(1.0, 0.1, 5), Mechanism(0.0, 0.1, 1)], 1e-5).epsilon == math.inf
    assert 0 < epsilon([Mechanism(1000.0, 0.01, 1000)], 1e-5).epsilon < 1e-3
    for delta in (0.0, 1.0, -1e-5, math.nan):
        for history in ([Mechanism(1.0, 0.1, 1)], []):
            with pytest.raises(ValueError, match="delta"):
                epsilon(history, delta)
    for wrong in ((-1.0, 0.1, 1), (1.0, 1.1, 1), (1.0, 0.1, -1), (math.nan, 0.1, 1)):
        with pytest.raises(ValueError, match="expected"):
            Mechanism(*wrong)


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.01, 0.05, 1000), (0.2, 0.1, 100), (0.05, 0.2, 100_000)])
def test_tiny_noise_has_a_bound_without_the_accountant_that_would_take_long(
    q: float, sigma: float, steps: int
) -> None:
    bounds = epsilon_by_accountant([Mechanism(sigma, q, steps)], 1e-5)
    assert math.isfinite(smallest(bounds).epsilon) and bounds["prv"] == math.inf


def test_prv_lowers_no_epsilon() -> None:
    assert smallest({"prv": 4.0, "pld": 5.0, "rdp": 6.0}).epsilon == 5.0
    assert smallest({"prv": 4.999, "pld": 5.0, "rdp": 6.0}) == Spent(5.0, "pld"), "only confirms"
    assert smallest({"prv": math.inf, "pld": math.inf, "rdp": 6.0}).accountant == "rdp"


def test_prv_gives_no_bound_where_the_rounding_of_its_transform_is_felt() -> None:
    """A step adds a rounding of 2^-52 to each probability: beyond a hundredth of delta it counts."""
    delta = 1e-9
    most = math.floor(delta / 100 / 2.0**-52)
    few, many = (epsilon_by_accountant([Mechanism(40.0, 0.01, steps)], delta) for steps in (most, most + 1))
    assert few["pld"] <= few["prv"] < math.inf == many["prv"] and many["pld"] >= few["pld"]


def test_composition_over_runs() -> None:
    one, other = Mechanism(1.2, 0.05, 200), Mechanism(2.0, 0.1, 100)
    delta = 1e-5
    both = epsilon([one, other], delta).epsilon
    assert both == pytest.approx(epsilon([other, one], delta).epsilon, rel=1e-6)
    apart = [epsilon([m], delta).epsilon for m in (one, other)]
    assert max(apart) < both < sum(apart)
    halves = [Mechanism(1.2, 0.05, 120), Mechanism(1.2, 0.05, 80)]
    assert epsilon(halves, delta) == epsilon([one], delta)


CALIBRATIONS = [
    (1.0, 1e-5, 1 / 30, 6000),
    (10.0, 1e-5, 1 / 30, 1800),
    (5.0, 1e-5, 80 / 50_000, 12_500),
    (10.0, 1e-6, 8192 / 162_770, 400),
    (0.1, 1e-5, 0.2, 80),
    (300.0, 1e-5, 0.05, 500),
]


@pytest.mark.parametrize("setting", CALIBRATIONS)
def test_calibration_never_passes_the_target_and_comes_within_half_a_percent(
    setting: tuple[float, float, float, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, delta, q, steps = setting
    sigma = noise_multiplier_for(target, delta, q, steps, tmp_path)
    spent = epsilon([Mechanism(sigma, q, steps)], delta).epsilon
    assert target * 0.995 <= spent <= target
    # The broken twin: one percent less noise.
    assert epsilon([Mechanism(sigma * 0.99, q, steps)], delta).epsilon > target
    with monkeypatch.context() as patched:
        patched.setattr(accounting, "_calibrate", lambda *_: pytest.fail("calibrated again"))
        assert noise_multiplier_for(target, delta, q, steps, tmp_path) == sigma
    assert noise_multiplier_for(target * 1.1, delta, q, steps, tmp_path) < sigma


def test_a_damaged_or_foreign_cache_file_is_not_believed(tmp_path: Path) -> None:
    sigma = noise_multiplier_for(2.0, 1e-5, 0.2, 50, tmp_path)
    (file,) = tmp_path.rglob("*.json")
    kept = json.loads(file.read_text())
    for damage in (
        "",
        "{",
        "[]",
        json.dumps(kept | {"question": {}}),
        json.dumps({"question": kept["question"]}),
    ):
        file.write_text(damage)
        assert noise_multiplier_for(2.0, 1e-5, 0.2, 50, tmp_path) == sigma
        assert json.loads(file.read_text()) == kept
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []
    for target in (0.0, math.inf):
        with pytest.raises(ValueError, match="target_epsilon"):
            noise_multiplier_for(target, 1e-5, 0.2, 50)


def test_a_folder_for_what_is_kept_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    assert accounting._kept(folder, "kind", {"asked": 1}, lambda: 3.0) == 3.0
    assert accounting._kept(folder, "kind", {"asked": 1}, lambda: pytest.fail("computed again")) == 3.0
    assert accounting._kept(folder, "kind", {"asked": 2}, lambda: 4.0) == 4.0


def test_what_runs_spend_together_is_kept_for_the_same_mechanisms_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Mechanism(1.2, 0.05, 40), Mechanism(2.0, 0.1, 30)
    spent = composed([one, other], 1e-5, tmp_path)
    assert spent == composed([one, other], 1e-5)
    with monkeypatch.context() as patched:
        patched.setattr(accounting, "_pld", lambda *_: pytest.fail("computed again"))
        assert composed([other, one], 1e-5, tmp_path) == spent
        rest = Mechanism(1.2, 0.05, 20)
        assert composed([rest, other, rest], 1e-5, tmp_path) == spent
    assert composed([one, other], 1e-6, tmp_path).epsilon > spent.epsilon
    assert composed([one, one, other], 1e-5, tmp_path).epsilon > spent.epsilon


def test_the_smaller_bound_is_what_runs_spend_together(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Mechanism(1.2, 0.05, 40), Mechanism(2.0, 0.1, 30)]
    by_pld = composed(runs, 1e-5)
    assert by_pld.accountant == "pld"
    for worse in (100.0, math.inf):
        monkeypatch.setattr(accounting, "_pld", lambda *_, worse=worse: worse)
        by_rdp = composed(runs, 1e-5)
        assert by_rdp.accountant == "rdp"
        assert by_pld.epsilon < by_rdp.epsilon < 1.5 * by_pld.epsilon


@pytest.mark.parametrize("sigma", [0.5, 100.0, 1e4])
def test_an_epsilon_near_0_takes_no_more_memory_than_another(sigma: float) -> None:
    step = 1 / sigma**2 + 20 / sigma
    for delta in (1e-2, 0.5):
        assert step / accounting._interval([Mechanism(sigma, 1e-3, 1000)], delta) < 2**24
    assert composed([Mechanism(100.0, 1e-3, 1000)], 1e-2).epsilon < 1e-3


@pytest.mark.parametrize(
    ("target", "delta", "q", "sigma"),
    [(10.0, 1e-5, 0.2, 1.2), (1.0, 1e-5, 0.0333, 6.0), (200.0, 1e-5, 0.05, 0.4)],
)
def test_steps_for_is_the_last_step_under_the_target(
    target: float, delta: float, q: float, sigma: float
) -> None:
    steps = steps_for(target, delta, q, sigma)
    assert epsilon([Mechanism(sigma, q, steps)], delta).epsilon <= target
    assert epsilon([Mechanism(sigma, q, steps + 1)], delta).epsilon > target


def test_steps_for_is_one_where_two_would_pass_the_target() -> None:
    delta, q, sigma = 1e-5, 0.2, 1.0
    once = epsilon([Mechanism(sigma, q, 1)], delta).epsilon
    assert steps_for(1.0001 * once, delta, q, sigma) == 1


def test_steps_for_refuses_what_no_number_of_steps_meets() -> None:
    for sigma in (0.0, 0.2):
        with pytest.raises(UserError, match="one step passes"):
            steps_for(1.0, 1e-5, 0.5, sigma)
    with pytest.raises(UserError, match="expected steps"):
        steps_for(10.0, 1e-5, 1e-4, 1000.0)


def test_the_curve_is_an_upper_bound_that_grows_and_ends_at_the_plan() -> None:
    run, delta = Mechanism(1.2, 0.2, 50), 1e-5
    curve = EpsilonCurve(run, delta, points=5)
    values = [curve(t) for t in range(61)]
    assert values[0] == 0 and values == sorted(values)
    for t in (1, 9, 10, 11, 37, 50, 55):
        exact = reference(0.2, 1.2, t, delta, 2e-4)
        assert exact * (1 - 1e-3) <= values[t] <= 1.6 * exact
    assert values[50] == epsilon_by_accountant([run], delta)["pld"]
    before = Mechanism(2.0, 0.1, 30)
    composed = EpsilonCurve(run, delta, before=[before], points=5)
    assert composed(0) >= epsilon([before], delta).epsilon * (1 - 1e-6)
    assert composed(50) == pytest.approx(epsilon([before, run], delta).epsilon, rel=1e-3)
    assert EpsilonCurve(Mechanism(0.0, 0.1, 5), delta)(1) == math.inf


def test_the_curve_composes_once_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    composed_steps: list[int] = []

    def counted(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
        composed_steps.append(mechanisms[0].steps)
        return 1.0

    monkeypatch.setattr(accounting, "_pld", counted)
    curve = EpsilonCurve(Mechanism(0.98, 1 / 30, 1800), 1e-5, points=16)
    for t in range(1, 1801):
        curve(t)
    assert composed_steps == [*range(113, 1800, 113), 1800]
