"""The parameters have to follow from the releases: what else moves them is found, a correct step is not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.linear_audit import LinearModel, LinearStep, plan_of
from dp_lora.auditing.updates import Followed
from dp_lora.config.schema import TrainConfig
from dp_lora.models.latents import Latents
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.step import DPSGD, PrivateStep

RIGHT = {"missing_release": 1.0, "unreleased_update": 1.0}
STRAYED = {"missing_release": 1.0, "unreleased_update": 0.0}
STEPS = 4


def _step(folder: Path, train: TrainConfig | None = None) -> LinearStep:
    """Of 24 examples, with a layer and a buffer that are not trained."""
    folder.mkdir(exist_ok=True)
    model = LinearModel(torch.arange(8), 20)
    model.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    model.register_buffer("table_of_noise", torch.ones((), dtype=torch.bfloat16))
    examples = 8 + len(model.features)
    return LinearStep.on(
        model,
        Latents(torch.zeros(examples, 1), torch.zeros(examples, 1)),
        torch.zeros(examples, dtype=torch.int64),
        plan_of(0.25, STEPS, 1.0),
        Randomness.from_seed(0),
        train or TrainConfig(ema_decay=0.5),
        8,
        Executions(folder / "executions.jsonl", {}),
        learning_rate_factor=0.3,
    )


def _followed(step: LinearStep) -> dict[str, float]:
    followed = Followed(step)
    for index in range(STEPS):
        followed(index)
    followed.release()
    return followed.p_values()


@pytest.mark.parametrize(
    "train",
    [
        TrainConfig(),
        TrainConfig(schedule="cosine", warmup_steps=2, weight_decay=0.1, ema_decay=0.5),
        TrainConfig(learning_rate=math.inf),
    ],
    ids=["default", "other", "not finite"],
)
def test_a_correct_step_follows_from_its_releases(train: TrainConfig, tmp_path: Path) -> None:
    assert _followed(_step(tmp_path, train)) == RIGHT


def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path) -> None:
    """The optimiser's moments are part of it: without them the twin strays."""
    first = Followed(_step(tmp_path))
    first(0)
    first(1)
    state = copy.deepcopy(first.state_dict())
    again = Followed(_step(tmp_path / "again"))
    again.load_state_dict(copy.deepcopy(state))
    again(2)
    assert again.p_values() == RIGHT
    twin = Followed(_step(tmp_path / "twin"))
    twin.step.load_state_dict(state["step"])
    twin._start()
    twin(2)
    assert twin.p_values() == STRAYED
    state["strayed"] = True
    again.load_state_dict(state)
    assert again.p_values() == STRAYED, "what was found stays found"


def _nudge(tensor: Tensor) -> None:
    """By as little as there is, in one value."""
    flat = tensor.data.view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(1.0))


def _before(sgd: DPSGD, number: int, descend: Callable[[Tensor], None], update: Tensor) -> None:
    _nudge(sgd.parameters[0])
    descend(update)


def _after(sgd: DPSGD, number: int, descend: Callable[[Tensor], None], update: Tensor) -> None:
    descend(update)
    if number == STEPS - 1:
        _nudge(sgd.parameters[1])


def _twice(sgd: DPSGD, number: int, descend: Callable[[Tensor], None], update: Tensor) -> None:
    descend(update)
    descend(2 * update)


def _average(sgd: DPSGD, number: int, descend: Callable[[Tensor], None], update: Tensor) -> None:
    descend(update)
    sgd.average.values[0] += 1e-6


def _rate(sgd: DPSGD, number: int, descend: Callable[[Tensor], None], update: Tensor) -> None:
    sgd.optimizer.register_step_pre_hook(lambda *_: sgd.optimizer.param_groups[0].update(lr=1e-5))
    descend(update)


def _weight(sgd: DPSGD, number: int, descend: Callable[[Tensor], None], update: Tensor) -> None:
    descend(update)
    _nudge(sgd.module.frozen.weight)


def _buffer(sgd: DPSGD, number: int, descend: Callable[[Tensor], None], update: Tensor) -> None:
    descend(update)
    if number == STEPS - 1:  # the engine itself refuses a batch after it
        sgd.module.table_of_noise += 1


def _undone(sgd: DPSGD, number: int, descend: Callable[[Tensor], None], update: Tensor) -> None:
    """A second release of the step, which leaves no trace in the parameters."""
    before = [p.detach().clone() for p in sgd.parameters]
    moments = copy.deepcopy(sgd.optimizer.state_dict())
    descend(2 * update)
    for parameter, value in zip(sgd.parameters, before, strict=True):
        parameter.data.copy_(value)
    sgd.optimizer.load_state_dict(moments)
    descend(update)


PLANTED = [_before, _after, _twice, _undone, _average, _rate, _weight, _buffer]


@pytest.mark.parametrize("planted", PLANTED, ids=lambda one: one.__name__)
def test_what_moves_a_parameter_besides_the_release_is_found(
    planted: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descend = PrivateStep._descend

    def other(step: PrivateStep, update: Tensor) -> None:
        planted(step.sgd, step.number, lambda given: descend(step, given), update)

    monkeypatch.setattr(PrivateStep, "_descend", other)
    assert _followed(_step(tmp_path)) == STRAYED


def test_other_parameters_at_the_end_than_the_average_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = LinearStep.release

    def other(step: LinearStep) -> None:
        release(step)
        _nudge(step.sgd.parameters[0])

    monkeypatch.setattr(LinearStep, "release", other)
    assert _followed(_step(tmp_path)) == STRAYED


@pytest.mark.parametrize("averages", [False, True])
def test_a_step_that_is_skipped_is_missed_and_nothing_else(
    averages: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = LinearStep.__call__

    def other(step: LinearStep, number: int) -> dict[str, Any]:
        if number != 1:
            return call(step, number)
        if averages:
            step.sgd.average.update(number)
        return {}

    monkeypatch.setattr(LinearStep, "__call__", other)
    assert _followed(_step(tmp_path)) == {"missing_release": 0.0, "unreleased_update": 1.0}


def test_a_skipped_step_that_moves_a_parameter_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinearStep, "__call__", lambda step, number: _nudge(step.sgd.parameters[0]) or {})
    assert _followed(_step(tmp_path)) == {"missing_release": 0.0, "unreleased_update": 0.0}
