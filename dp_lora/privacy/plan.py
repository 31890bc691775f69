"""PrivacyPlan: the one record that ties sampler, clip, noise and accountant to one set of numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from dp_lora.config.bounds import LARGEST_GRAD_NORM
from dp_lora.config.schema import ADJACENCIES, CLIPPINGS, UNITS
from dp_lora.errors import PlanError
from dp_lora.privacy import accounting
from dp_lora.privacy.subsampled_gaussian import Mechanism

LEAST_NOISE, MOST_NOISE = 1e-3, 1e9
"""Where a noise multiplier can be: one step's epsilon is 500,000 at the one, and 0 at the other."""

LEAST_GRAD_NORM = 1e-10
"""The smallest C: below it, gradients whose squares underflow in float32 could be longer than C."""


@dataclass(frozen=True)
class Clip:
    """The bound on what one example adds to the sum, and its form: what the plan gives the engine.

    Args:
        noise_multiplicity: k, the number of consecutive rows of a forward that belong to one example.
        max_grad_norm: C, at least `LEAST_GRAD_NORM`; inf sums without clipping.
        clipping: flat, automatic or per_layer; see `ClippedGradientSum`.
        loss_share: rho in [0, 1), the share of C of the coordinate of the loss; 0 leaves that out.

    Raises PlanError when a value is out of range.
    """

    noise_multiplicity: int
    max_grad_norm: float
    clipping: str = "flat"
    loss_share: float = 0.0

    def __post_init__(self) -> None:
        if self.noise_multiplicity < 1:
            raise PlanError(f"<noise_multiplicity>={self.noise_multiplicity}: expected at least 1")
        if self.clipping not in CLIPPINGS:
            raise PlanError(f"<clipping>={self.clipping!r}: expected one of {', '.join(CLIPPINGS)}")
        if not self.max_grad_norm >= LEAST_GRAD_NORM:
            raise PlanError(
                f"<max_grad_norm>={self.max_grad_norm:g}: expected at least {LEAST_GRAD_NORM:g}, since "
                "norms are taken in float32"
            )

    @property
    def loss_unit(self) -> float:
        """The share of the sum that a loss of 1 has in the last coordinate: rho C, or 1 without a clip."""
        return self.loss_share * self.max_grad_norm if math.isfinite(self.max_grad_norm) else 1.0


@dataclass(frozen=True)
class PrivacyPlan:
    """The numbers of a run, fixed before it begins; every part of the mechanism reads them from here.

    With the `unit` person, read "person" for "image": an example is a person, and each of its draws picks one
    of the person's images. N is then the number of persons; how many images there are is in no field.

    One step: each image joins the batch with probability `sample_rate`; each image's gradient, the mean
    over its `noise_multiplicity` draws, is clipped to `max_grad_norm`; Gaussian noise of std
    `noise_std` = noise_multiplier x max_grad_norm is added to their sum, once.

    Sensitivity: an image that is added, removed or replaced by nothing changes the sum by at most
    `max_grad_norm`, whatever `noise_multiplicity`, `clipping`, the microbatches and the number of processes
    are. It is the sum that is released; dividing by `expected_batch_size`, a constant, is post-processing.
    With a `loss_share` the sum has one more coordinate, an example's clamped loss, inside the same bound and
    the same epsilon.

    Under zero_out the number of images N is the same for neighbours: it is public, `num_examples` says it,
    and `sample_rate` is `expected_batch_size` / N. Under add_or_remove N is private: `num_examples` is None,
    and no field is a function of N.

    `epsilon` is the smallest valid upper bound of `epsilon_by_accountant` after all `steps`, for `delta`,
    and `accountant` is whose it is. A plan with `private` false has neither noise nor clip, epsilon inf.
    """

    num_examples: int | None
    sample_rate: float
    expected_batch_size: float
    steps: int
    noise_multiplier: float
    noise_multiplicity: int
    max_grad_norm: float
    clipping: str
    delta: float
    target_epsilon: float | None
    epsilon: float
    accountant: str
    epsilon_by_accountant: dict[str, float]
    adjacency: str
    loss_share: float = 0.0
    unit: str = "image"

    @property
    def private(self) -> bool:
        """Whether there is a guarantee at all."""
        return math.isfinite(self.epsilon)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the sum."""
        return self.noise_multiplier * self.max_grad_norm if self.noise_multiplier else 0.0

    @property
    def clip(self) -> Clip:
        """The bound on one example's contribution, which `ClippedGradientSum` keeps."""
        return Clip(self.noise_multiplicity, self.max_grad_norm, self.clipping, self.loss_share)

    @property
    def mechanism(self) -> Mechanism:
        """The noisy steps, for the accountant."""
        return Mechanism(self.noise_multiplier, self.sample_rate, self.steps)

    def curve(self) -> accounting.EpsilonCurve:
        """An upper bound on epsilon after any number of the steps, at `delta`."""
        return accounting.EpsilonCurve(self.mechanism, self.delta)

    def check(self) -> None:
        """Raises PlanError unless the numbers belong together, as `make_plan` leaves them.

        A plan that was edited, say by `dataclasses.replace`, states an epsilon that is another plan's.
        """
        if self.private and not (self.noise_multiplier > 0 and math.isfinite(self.max_grad_norm)):
            raise PlanError("<noise_multiplier> and <max_grad_norm>: expected numbers above 0 and finite")
        spent = self.curve()(self.steps)
        if not spent <= self.epsilon * (1 + 1e-6):
            raise PlanError(
                f"<epsilon>={self.epsilon:.4g}: the plan's noise, sample rate and steps spend {spent:.4g}; "
                "expected a plan as make_plan() returned it"
            )
        if self.num_examples is not None and not math.isclose(
            self.sample_rate * self.num_examples, self.expected_batch_size, rel_tol=1e-9
        ):
            raise PlanError(
                f"<sample_rate>={self.sample_rate:.6g}: expected <expected_batch_size> over <num_examples>"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields for privacy.json: plain values, an infinite number as the string 'inf'."""
        values = asdict(self) | {"private": self.private}
        values["epsilon_by_accountant"] = {k: _plain(v) for k, v in self.epsilon_by_accountant.items()}
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) else value


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _in_double_precision(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which gets scalars of NumPy and torch as numbers of Python."""

    @functools.wraps(function)
    def call(*args: _P.args, **given: _P.kwargs) -> _R:
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in given.items()}
        return function(*args, **plain)  # type: ignore[arg-type]

    return call


@_in_double_precision
def make_plan(
    *,
    expected_batch_size: float,
    delta: float,
    max_grad_norm: float,
    steps: int | None = None,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    noise_multiplicity: int = 1,
    num_examples: int | None = None,
    sample_rate: float | None = None,
    clipping: str = "flat",
    adjacency: str = "zero_out",
    unit: str = "image",
    loss_share: float = 0.0,
    cache: Path | None = None,
) -> PrivacyPlan:
    """The plan in which, of epsilon, noise multiplier and steps, two have determined the third.

    Args:
        expected_batch_size: a constant, the divisor of every update; under zero_out it is q N.
        steps: None: as many as `target_epsilon` allows with `noise_multiplier`.
        noise_multiplier: None: the smallest that meets `target_epsilon` in `steps`.
        target_epsilon: None reports what the other two spend; inf is the baseline without privacy.
        delta: under zero_out in (0, 1 / N); under add_or_remove, where N must not decide, in
            (0, sample_rate / expected_batch_size).
        noise_multiplicity: k, draws per example.
        max_grad_norm: C.
        num_examples: N, which zero_out makes public. None under add_or_remove.
        sample_rate: q, a constant that is chosen without a look at the images, under add_or_remove. None
            under zero_out, where it follows from N.
        clipping: flat, automatic or per_layer.
        adjacency: zero_out: one image is replaced by a null that contributes nothing; add_or_remove: one
            image is added or removed. Both have the same epsilon.
        unit: of what an example is: an image, or a person with all of their images.
        loss_share: rho, the share of C that the coordinate of the loss may take; 0: no such coordinate.
        cache: folder for calibrated noise multipliers.

    Raises:
        PlanError: a value out of range, too few of the three, or three that disagree: epsilon of the
            noise multiplier and the steps passes the target, or stays below 99 % of it.
    """
    _check_relation(adjacency, num_examples, sample_rate, unit)
    _check(num_examples, sample_rate, expected_batch_size, steps, noise_multiplier, target_epsilon, unit)
    _check_delta(delta, num_examples, sample_rate, expected_batch_size, unit)
    _check_clip(max_grad_norm, loss_share)
    private = target_epsilon != math.inf
    clip = Clip(noise_multiplicity, max_grad_norm if private else math.inf, clipping, loss_share)
    mechanism = mechanism_of(
        num_examples=num_examples,
        sample_rate=sample_rate,
        expected_batch_size=expected_batch_size,
        steps=steps,
        noise_multiplier=noise_multiplier,
        target_epsilon=target_epsilon,
        delta=delta,
        cache=cache,
    )
    num_examples = None if num_examples is None else int(num_examples)
    bounds = accounting.epsilon_by_accountant([mechanism], delta)
    spent = accounting.smallest(bounds)
    if target_epsilon is not None and private:
        _check_agreement(target_epsilon, spent.epsilon, mechanism)
    return PrivacyPlan(
        num_examples=num_examples,
        sample_rate=mechanism.sample_rate,
        expected_batch_size=expected_batch_size,
        steps=mechanism.steps,
        noise_multiplier=mechanism.noise_multiplier,
        noise_multiplicity=clip.noise_multiplicity,
        max_grad_norm=clip.max_grad_norm,
        clipping=clip.clipping,
        delta=delta,
        target_epsilon=target_epsilon,
        epsilon=spent.epsilon,
        accountant=spent.accountant if private else "none",
        epsilon_by_accountant=bounds,
        adjacency=ADJACENCIES[adjacency].format(unit=unit),
        loss_share=loss_share,
        unit=unit,
    )


@functools.lru_cache(maxsize=256)
def mechanism_of(
    *,
    expected_batch_size: float,
    steps: int | None,
    noise_multiplier: float | None,
    target_epsilon: float | None,
    delta: float,
    num_examples: int | None = None,
    sample_rate: float | None = None,
    cache: Path | None = None,
) -> Mechanism:
    """The noisy steps of the plan that `make_plan` makes of these, without the bounds on what they spend.

    Args, Raises: as of `make_plan`; of `num_examples` and `sample_rate` one is given.
    """
    _check(num_examples, sample_rate, expected_batch_size, steps, noise_multiplier, target_epsilon)
    if sample_rate is None:
        assert num_examples is not None
        sample_rate = expected_batch_size / num_examples
    if target_epsilon == math.inf:
        noise_multiplier = 0.0
    elif steps is None:
        assert noise_multiplier is not None and target_epsilon is not None
        steps = accounting.steps_for(target_epsilon, delta, sample_rate, noise_multiplier)
    elif noise_multiplier is None:
        assert target_epsilon is not None
        noise_multiplier = accounting.noise_multiplier_for(target_epsilon, delta, sample_rate, steps, cache)
    assert noise_multiplier is not None and steps is not None
    return Mechanism(noise_multiplier, sample_rate, steps)


def _check_relation(adjacency: str, num_examples: int | None, sample_rate: float | None, unit: str) -> None:
    if unit not in UNITS:
        raise PlanError(f"<unit>={unit!r}: expected one of {', '.join(UNITS)}")
    if adjacency not in ADJACENCIES:
        raise PlanError(f"<adjacency>={adjacency!r}: expected one of {', '.join(ADJACENCIES)}")
    if unit == "person" and num_examples == 1:
        raise PlanError(
            "<num_examples>=1 with <unit>=person: there is one person, whom no other one hides; expected at "
            "least 2"
        )
    if adjacency == "add_or_remove" and (sample_rate is None or num_examples is not None):
        raise PlanError(
            f"<adjacency>=add_or_remove: the number of {unit}s is private, so that neither the sample "
            "rate nor the noise may follow from it; expected <sample_rate> beside "
            "<expected_batch_size>, or <adjacency>=zero_out"
        )
    if adjacency == "zero_out" and num_examples is None:
        raise PlanError(
            "<num_examples>=None with <adjacency>=zero_out: expected the number of training examples, "
            "which gives the sample rate and is public"
        )
    if adjacency == "zero_out" and sample_rate is not None:
        raise PlanError(
            f"<sample_rate>={sample_rate} with <adjacency>=zero_out: expected null, since the rate "
            f"is <expected_batch_size> over the public number of {unit}s"
        )


def _check(
    num_examples: int | None,
    sample_rate: float | None,
    expected_batch_size: float,
    steps: int | None,
    noise_multiplier: float | None,
    target_epsilon: float | None,
    unit: str = "image",
) -> None:
    if num_examples is not None and num_examples < 1:
        raise PlanError(f"<num_examples>={num_examples}: expected at least 1")
    if num_examples is not None and not 0 < expected_batch_size <= num_examples:
        raise PlanError(
            f"<expected_batch_size>={expected_batch_size:g}: expected a number in (0, {num_examples}], "
            f"the number of training {unit}s"
        )
    if not 0 < expected_batch_size < math.inf:
        raise PlanError(f"<expected_batch_size>={expected_batch_size}: expected a finite number above 0")
    if sample_rate is not None and not 0 < sample_rate <= 1:
        raise PlanError(f"<sample_rate>={sample_rate}: expected a number in (0, 1]")
    if steps is not None and int(steps) != steps:
        raise PlanError(f"<steps>={steps}: expected a whole number")
    if num_examples is not None and int(num_examples) != num_examples:
        raise PlanError(f"<num_examples>={num_examples}: expected a whole number")
    if steps is not None and not 1 <= steps <= accounting.MAX_STEPS:
        raise PlanError(f"<steps>={steps}: expected 1 to {accounting.MAX_STEPS}")
    if noise_multiplier is not None and not LEAST_NOISE <= noise_multiplier <= MOST_NOISE:
        raise PlanError(
            f"<noise_multiplier>={noise_multiplier:g}: expected a number from {LEAST_NOISE:g} to "
            f"{MOST_NOISE:g}"
        )
    if target_epsilon is not None and not target_epsilon > 0:
        raise PlanError(f"<target_epsilon>={target_epsilon}: expected a number above 0, inf or none")
    if target_epsilon == math.inf and noise_multiplier is not None:
        raise PlanError(
            f"<target_epsilon>=inf with <noise_multiplier>={noise_multiplier:g}: expected null, since "
            "the baseline has no noise; epsilon=none reports what a noise multiplier spends"
        )
    if target_epsilon == math.inf and steps is None:
        raise PlanError("<steps>=null with <target_epsilon>=inf: expected a number of steps")
    if target_epsilon != math.inf and (steps, noise_multiplier, target_epsilon).count(None) > 1:
        raise PlanError(
            "<target_epsilon>, <noise_multiplier>, <steps>: expected at least two of the three, "
            "which determine the third"
        )


def _check_delta(
    delta: float, num_examples: int | None, sample_rate: float | None, expected_batch_size: float, unit: str
) -> None:
    if num_examples is not None:
        if not 0 < delta < 1 / num_examples:
            raise PlanError(
                f"<delta>={delta:g}: expected a number in (0, 1/N) = (0, {1 / num_examples:.3g}), or "
                f"one {unit} in N may be given away whole"
            )
        return
    assert sample_rate is not None
    # Not against N: whether a job is refused would tell it.
    bound = sample_rate / expected_batch_size
    if not 0 < delta < bound:
        raise PlanError(
            f"<delta>={delta:g}: expected a number in (0, {bound:.3g}), <sample_rate> over "
            f"<expected_batch_size>: one over the number of {unit}s that these two were chosen for"
        )


def _check_clip(max_grad_norm: float, loss_share: float) -> None:
    if not 0 <= loss_share < 1:
        raise PlanError(f"<loss_share>={loss_share}: expected a number in [0, 1)")
    if not LEAST_GRAD_NORM <= max_grad_norm <= LARGEST_GRAD_NORM:
        raise PlanError(
            f"<max_grad_norm>={max_grad_norm}: expected a number from {LEAST_GRAD_NORM:g} to "
            f"{LARGEST_GRAD_NORM:g}"
        )


def _check_agreement(target: float, spent: float, mechanism: Mechanism) -> None:
    if not 0.99 * target <= spent <= target:
        raise PlanError(
            f"<target_epsilon>={target:g} with <noise_multiplier>={mechanism.noise_multiplier:g} and "
            f"<steps>={mechanism.steps}: these two spend {spent:.4g}, expected 99 to 100 % of the "
            "target; leave out one of the three"
        )
