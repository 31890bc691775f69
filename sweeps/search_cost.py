"""What a private search will take and spend, beside a fixed grid and one run, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

from dp_lora.config.schema import Config
from dp_lora.data.sets import expected_train_size
from dp_lora.errors import PlanError, UserError
from dp_lora.jobs import searching
from dp_lora.jobs.job import public_number, steps_of
from dp_lora.privacy.accounting import composed, noise_multiplier_for
from dp_lora.privacy.plan import mechanism_of
from dp_lora.privacy.search_plan import SearchPlan, noise_of_trial, plan_search
from dp_lora.privacy.selection import drawn_number, largest_number
from dp_lora.privacy.subsampled_gaussian import Mechanism
from sweeps.cluster.cells import Cell
from sweeps.plan import hours, rates

_FIELDS = {
    "target_epsilon": "privacy.epsilon",
    "release_epsilon": "evaluation.release_epsilon",
    "expected_trials": "search.expected_trials",
    "distribution": "search.distribution",
}

_SIMULATIONS = 4000


def score_mechanism(base: Config) -> Mechanism:
    """The noised sum over held-out images by which a trial is scored, as `evaluation.release=dp` makes it."""
    evaluation, cache = base.evaluation, Path(base.paths.cache).expanduser()
    delta = base.privacy.delta if evaluation.release_delta is None else evaluation.release_delta
    found = noise_multiplier_for(evaluation.release_epsilon, delta, 1.0, 1, cache if cache.is_dir() else None)
    return Mechanism(found, 1.0, 1)


def plan_of_search(base: Config, cells: Sequence[Cell], number: int | None) -> SearchPlan:
    """The plan of the search on so many training images or persons; None where the number is not known.

    Raises UserError when no noise meets the target.
    """
    schedules = []
    for cell in cells:
        config = cell.config
        once = mechanism_of(
            num_examples=public_number(config, number),
            sample_rate=config.train.sample_rate,
            expected_batch_size=config.train.expected_batch_size,
            steps=steps_of(config, number),
            noise_multiplier=1.0,
            target_epsilon=None,
            delta=config.privacy.delta,
        )
        schedules.append((once.sample_rate, once.steps))
    assert base.privacy.epsilon is not None
    search = base.search
    try:
        return plan_search(
            schedules,
            score_mechanism(base),
            distribution=search.distribution,
            expected_trials=search.expected_trials,
            target_epsilon=base.privacy.epsilon,
            delta=base.privacy.delta,
            strictest=searching.strictest(base),
        )
    except PlanError as error:
        raise UserError(error.named(_FIELDS)) from None


def lines(base: Config, cells: Sequence[Cell]) -> list[str]:
    """The privacy and the time of the search, and of what could be done instead.

    Args:
        base: the search's configuration.
        cells: what its trials draw from.
    """
    search, unit = base.search, base.privacy.unit
    most = largest_number(search.distribution, search.expected_trials, 0.95)
    said = [
        f"{len(cells)} cells; the number of trials is drawn and stays private: {search.distribution}, mean "
        f"{search.expected_trials:g}, at most {most} in 95 % of searches; only the best one is released"
    ]
    number = expected_train_size(base.data) if unit == "image" else None
    if base.train.sample_rate is None and number is None:
        told = f"epsilon {base.privacy.epsilon:g}" if base.privacy.epsilon is not None else "its target"
        said.append(
            f"privacy: {told}; the noise of a trial follows from the number of images, which only data tell"
        )
    else:
        said += _privacy(base, plan_of_search(base, cells, number))
    return [*said, *_time(base, cells), "nothing was submitted"]


def _privacy(base: Config, plan: SearchPlan) -> list[str]:
    delta, unit = plan.delta, base.privacy.unit
    training, held_out, both = (plan.search.epsilon(delta, of) for of in ("training", "held_out", "both"))
    sigmas = sorted({one.noise_multiplier for one in plan.trials})
    noise = f"{sigmas[0]:g}" if len(sigmas) == 1 else f"{sigmas[0]:g} to {sigmas[-1]:g}"
    grid = [*plan.trials, *[plan.search.score] * len(plan.trials)]
    return [
        f"privacy of the search at delta {delta:g} (rdp; Papernot and Steinke 2022): epsilon "
        f"{training:.4g} for a training {unit}, {held_out:.4g} for a held-out one, "
        f"{both:.4g} for somebody in both",
        f"one trial: epsilon {plan.trial_epsilon:.4g} (rdp), noise multiplier {noise}; its score: "
        f"epsilon {base.evaluation.release_epsilon:g}",
        f"instead, all {len(plan.trials)} cells once and all of them released: epsilon "
        f"{composed(grid, delta).epsilon:.4g} with this noise, or {_of_grid(plan)} for epsilon "
        f"{plan.target_epsilon:g}",
        f"instead, one run of values given beforehand: epsilon {plan.target_epsilon:g} for itself",
    ]


def _of_grid(plan: SearchPlan) -> str:
    """The epsilon of each run with which a grid that is released whole would meet the search's target."""
    low, high = 0.0, plan.target_epsilon
    for _ in range(12):
        middle = (low + high) / 2
        try:
            runs = [
                Mechanism(
                    noise_of_trial(middle, plan.delta, one.sample_rate, one.steps), one.sample_rate, one.steps
                )
                for one in plan.trials
            ]
            grid = [*runs, *[plan.search.score] * len(runs)]
            fits = composed(grid, plan.delta).epsilon <= plan.target_epsilon
        except PlanError:
            fits = False
        low, high = (middle, high) if fits else (low, middle)
    return f"epsilon {low:.3g} each" if low else "no noise at all suffices, because of the scores,"


def _time(base: Config, cells: Sequence[Cell]) -> list[str]:
    """Hours one after another: the mean and the 95 % quantile over the draws, and of the alternatives."""
    try:
        measured = rates(Path(base.paths.outputs) / base.experiment)
    except (UserError, OSError):
        measured = []
    each = [hours(cell.config, measured) for cell in cells]
    known = [one for one in each if one is not None]
    if len(known) < len(each):
        return [
            "time: no finished run to go by; it is that of the trials, which run as the jobs of a sweep do"
        ]
    mean, random = sum(known) / len(known), Random(0)
    search = base.search

    def simulated() -> float:
        number = drawn_number(search.distribution, search.expected_trials, random.getrandbits)
        return sum(random.choice(known) for _ in range(number))

    totals = sorted(simulated() for _ in range(_SIMULATIONS))
    late = totals[math.ceil(0.95 * _SIMULATIONS) - 1]
    return [
        f"time: {mean * search.expected_trials:.2f} h expected, {late:.2f} h in 95 % of searches, one "
        f"trial after another; all cells once {sum(known):.2f} h, one run {mean:.2f} h; "
        f"by {len(measured)} finished runs"
    ]
