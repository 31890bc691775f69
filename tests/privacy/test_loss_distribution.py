"""The sum of the losses by a transform against one by plain convolution, all of whose terms are positive."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from dp_lora.privacy import loss_distribution
from dp_lora.privacy.loss_distribution import delta_bounds, epsilon_bound
from dp_lora.privacy.step_loss import Array, Step, step_losses
from dp_lora.privacy.subsampled_gaussian import Mechanism

CASES = [
    ([Mechanism(1.0, 0.1, 1)], 1e-5, 0.25),
    ([Mechanism(2.0, 1.0, 3)], 1e-6, 0.125),
    ([Mechanism(0.8, 0.3, 4), Mechanism(2.0, 0.5, 3)], 1e-10, 0.0625),
    ([Mechanism(0.7, 0.002, 12)], 1e-7, 0.0625),
]


class Convolved:
    """The sum of all steps' losses when the image is removed, or added: mass `probs[i]` at points[i]."""

    def __init__(self, mechanisms: Sequence[Mechanism], interval: float, side: int) -> None:
        probs, first, self.infinite = np.ones(1), 0, 0.0
        for m in mechanisms:
            step = step_losses(m.noise_multiplier, m.sample_rate, interval, 1e-20)[side]
            for _ in range(m.steps):
                probs, first = np.convolve(probs, step.probs), first + step.first
            self.infinite += m.steps * step.infinite
        self.probs, self.points = probs, interval * (first + np.arange(len(probs)))

    def delta(self, epsilon: float) -> float:
        gains = -np.expm1(np.minimum(epsilon - self.points, 0.0))
        return float(self.probs @ gains) + self.infinite

    def epsilon(self, delta: float) -> float:
        """Delta falls linearly in exp(epsilon) between two points."""
        deltas = np.array([self.delta(x) for x in self.points])
        i = int(np.nonzero(deltas <= delta)[0][0])
        share = (deltas[i - 1] - delta) / (deltas[i - 1] - deltas[i])
        below, above = np.exp(self.points[i - 1 : i + 1])
        return math.log(below + share * (above - below))


@pytest.mark.parametrize(("mechanisms", "delta", "interval"), CASES)
def test_epsilon_is_that_of_the_convolved_losses(
    mechanisms: list[Mechanism], delta: float, interval: float
) -> None:
    expected = max(Convolved(mechanisms, interval, side).epsilon(delta) for side in (0, 1))
    found = epsilon_bound(mechanisms, delta, interval)
    assert expected <= found <= expected * (1 + 1e-5)


@pytest.mark.parametrize(("mechanisms", "delta", "interval"), CASES)
def test_delta_is_that_of_the_convolved_losses_and_never_less(
    mechanisms: list[Mechanism], delta: float, interval: float
) -> None:
    sides = [Convolved(mechanisms, interval, side) for side in (0, 1)]
    # Up to where nothing but the tails is left.
    epsilons: Array = np.linspace(0, 1.5 * sides[0].epsilon(1e-9 * delta), 60)
    expected = np.array([max(side.delta(epsilon) for side in sides) for epsilon in epsilons])
    found = delta_bounds(mechanisms, epsilons, delta, interval)
    assert (found >= np.minimum(expected, 1.0)).all()
    near = expected <= 1e3 * delta
    assert (found <= expected * (1 + 1e-3) + 1e-4 * delta)[near].all()
    assert (found[-5:] >= 1e-6 * delta).all()


@pytest.mark.parametrize("theta", [0.02, 0.5, 5.0, 80.0])
@pytest.mark.parametrize("interval", [2.0**-10, 0.03, 0.5])
def test_the_error_of_the_transform_is_weighted_by_no_less_than_the_norm(
    theta: float, interval: float
) -> None:
    size = 200_000
    at = interval * np.arange(1, size + 1)
    exact = float(np.linalg.norm(np.exp(-theta * at) * -np.expm1(-at)))
    found = loss_distribution._norm_of_weights(theta, interval, size)
    assert exact * (1 - 1e-12) <= found <= 30 * exact


@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
@pytest.mark.parametrize(("mechanisms", "delta", "interval"), CASES)
def test_no_tilt_gives_an_epsilon_at_which_its_own_delta_is_larger(
    mechanisms: list[Mechanism], delta: float, interval: float, share: float
) -> None:
    """Also where the error of the transform, which both of them count, is most of delta."""
    for steps in loss_distribution._directions(mechanisms, delta, interval):
        saddle = loss_distribution._saddle(steps, delta, interval)
        top = loss_distribution._top(steps, delta, interval)
        composed = loss_distribution._compose(steps, share * saddle.theta, top, delta, interval)
        assert composed is not None
        for smaller in (1.0, 1e-3, 1e-6):
            wanted = composed.infinite + smaller * (delta - composed.infinite)
            if math.isfinite(epsilon := composed.epsilon(wanted)):
                assert composed.deltas(np.array([epsilon]))[0] <= wanted * (1 + 1e-6)


def tilted(
    mechanisms: Sequence[Mechanism], delta: float, interval: float, above: int = 0
) -> Iterator[tuple[Sequence[Step], float, float, loss_distribution._Composed]]:
    """Steps, theta, top and the composed losses in both directions; the top is `above` cells higher."""
    for steps in loss_distribution._directions(mechanisms, delta, interval):
        theta = 0.8 * loss_distribution._saddle(steps, delta, interval).theta
        top = loss_distribution._top(steps, delta, interval) + above * interval
        composed = loss_distribution._compose(steps, theta, top, delta, interval)
        assert composed is not None
        yield steps, theta, top, composed


@pytest.mark.parametrize(("mechanisms", "delta", "interval"), CASES)
def test_losses_that_may_be_rounded_move_epsilon_by_as_much(
    mechanisms: list[Mechanism], delta: float, interval: float
) -> None:
    for *_, composed in tilted(mechanisms, delta, interval):
        moved = dataclasses.replace(composed, slack=composed.slack + 0.25)
        epsilon = composed.epsilon(delta)
        assert moved.epsilon(delta) == pytest.approx(epsilon + 0.25, rel=1e-9)
        at = epsilon * np.linspace(0.5, 1.5, 20)
        assert np.allclose(moved.deltas(at + 0.25), composed.deltas(at), rtol=1e-9)


@pytest.mark.parametrize(("mechanisms", "delta", "interval"), CASES)
def test_the_window_reaches_up_to_what_is_counted_as_infinite(
    mechanisms: list[Mechanism], delta: float, interval: float
) -> None:
    """Above it a loss would come back at the lower end, as one that costs nothing."""
    for above in range(30):
        for _, _, top, composed in tilted(mechanisms, delta, interval, above):
            assert composed.points[-1] >= top


@pytest.mark.parametrize(("mechanisms", "delta", "interval"), CASES)
def test_the_rounding_of_the_tilt_is_counted_once_a_step(
    mechanisms: list[Mechanism], delta: float, interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = [composed for *_, composed in tilted(mechanisms, delta, interval)]
    monkeypatch.setattr(loss_distribution, "_tilt_rounding", lambda *given: 0.01)
    rounded = [composed for *_, composed in tilted(mechanisms, delta, interval)]
    number = sum(m.steps for m in mechanisms)
    for before, after in zip(exact, rounded, strict=True):
        assert after.log_scale == pytest.approx(before.log_scale + 0.01 * number, rel=1e-9)
        assert after.epsilon(delta) >= before.epsilon(delta)


@pytest.mark.parametrize(("mechanisms", "delta", "interval"), CASES[1:])
def test_the_error_of_the_transform_is_untilted_like_the_masses(
    mechanisms: list[Mechanism], delta: float, interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mass e of the tilted distribution at x is e M(theta) exp(-theta x) of the distribution itself."""
    spectrum, error = loss_distribution._spectrum, 1e-3
    monkeypatch.setattr(loss_distribution, "_transform_rounding", lambda size: 0.0)
    monkeypatch.setattr(loss_distribution, "_spectrum", lambda *given: (spectrum(*given)[0], error))
    for steps, theta, _, composed in tilted(mechanisms, delta, interval):
        norm = loss_distribution._norm_of_weights(theta, interval, len(composed.points))
        moment = loss_distribution._log_moment(steps, theta, interval)
        expected = math.log(error * norm) + moment - theta * composed.points
        found = np.log(composed.error) + composed.log_scale
        assert np.allclose(found, expected, rtol=1e-9, atol=1e-6) and (found >= expected - 1e-9).all()


@pytest.mark.parametrize("size", [64, 1000, 4096])
def test_a_frequency_may_be_off_by_the_error_of_the_whole_transform(size: int) -> None:
    """The rounding is a part of the norm of the transform, which is sqrt(size) that of the masses."""
    for step in step_losses(1.0, 0.1, 0.25, 1e-20):
        _, error = loss_distribution._spectrum([step], [step.probs], size)
        norm = math.sqrt(size) * float(np.linalg.norm(step.probs))
        assert error >= loss_distribution._transform_rounding(size) * norm
