"""Of epsilon, noise multiplier and steps, two determine the third; nonsense is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dp_lora.errors import PlanError, UserError
from dp_lora.jobs.job import PLAN_FIELDS
from dp_lora.privacy.accounting import epsilon
from dp_lora.privacy.plan import LEAST_NOISE, PrivacyPlan, make_plan
from dp_lora.privacy.renyi import _of_one_step
from dp_lora.privacy.subsampled_gaussian import Mechanism


def planned(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "num_examples": 1000,
        "expected_batch_size": 200,
        "steps": 40,
        "noise_multiplier": None,
        "target_epsilon": 5.0,
        "delta": 1e-5,
        "noise_multiplicity": 4,
        "max_grad_norm": 0.01,
    }
    return make_plan(**values | changes)


HIDDEN: dict[str, Any] = {"adjacency": "add_or_remove", "num_examples": None, "sample_rate": 0.2}
"""The number of images is private."""


@pytest.fixture(scope="module")
def calibrated() -> PrivacyPlan:
    return planned()


def test_two_of_three_determine_the_third(calibrated: PrivacyPlan, tmp_path: Path) -> None:
    sigma = calibrated.noise_multiplier
    assert 4.975 <= calibrated.epsilon <= 5
    assert planned(noise_multiplier=sigma, cache=tmp_path) == calibrated == planned(cache=tmp_path)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    stopped = planned(noise_multiplier=sigma, steps=None)
    assert stopped.steps >= 40 and stopped.epsilon <= 5
    reported = planned(noise_multiplier=sigma, target_epsilon=None)
    assert reported.epsilon == calibrated.epsilon and reported.target_epsilon is None


def test_the_numbers_of_a_plan_belong_together(calibrated: PrivacyPlan) -> None:
    plan = calibrated
    assert plan.private and plan.sample_rate == 0.2 and plan.noise_std == plan.noise_multiplier * 0.01
    assert plan.epsilon == epsilon([plan.mechanism], plan.delta).epsilon
    assert plan.epsilon == plan.epsilon_by_accountant[plan.accountant]
    assert plan.adjacency.startswith("zero out one image, the number of images is public")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.delta = 0.5  # type: ignore[misc]


def test_a_set_of_one_image_and_the_least_noise_have_a_plan() -> None:
    given = {"num_examples": 1, "expected_batch_size": 1, "steps": 1, "target_epsilon": None, "delta": 0.1}
    one = planned(**given, noise_multiplier=1.0)
    assert one.sample_rate == 1 and 0 < one.epsilon < 5
    assert planned(**given, noise_multiplier=LEAST_NOISE, max_grad_norm=1.0).noise_std == 1e-3


def test_multiplicity_clipping_and_relation_do_not_change_epsilon(calibrated: PrivacyPlan) -> None:
    other = planned(noise_multiplicity=32, max_grad_norm=3.0, clipping="automatic", **HIDDEN)
    assert other.epsilon == calibrated.epsilon and other.noise_multiplier == calibrated.noise_multiplier
    assert other.adjacency == "add or remove one image, Poisson sampling"


def test_a_plan_under_add_or_remove_knows_no_number_of_images() -> None:
    plan = planned(**HIDDEN)
    assert plan.num_examples is None and (plan.sample_rate, plan.expected_batch_size) == (0.2, 200)
    assert planned(**HIDDEN | {"expected_batch_size": 7}).noise_multiplier == plan.noise_multiplier


def test_delta_is_checked_against_public_numbers_only() -> None:
    given = {"noise_multiplier": 4.0, "target_epsilon": None, "steps": 1}
    assert planned(**given, delta=0.00099).delta == 0.00099
    with pytest.raises(UserError, match=r"^delta=0.0011: expected a number in \(0, 1/N\)"):
        planned(delta=0.0011)
    # 0.2 / 200: the size of a set for which the rate and the divisor agree.
    assert planned(**HIDDEN, **given, delta=0.00099).delta == 0.00099
    with pytest.raises(UserError, match=r"^delta=0.0011: expected a number in \(0, 0.001\)"):
        planned(**HIDDEN | {"delta": 0.0011})


def test_the_baseline_has_no_noise_no_clip_and_no_guarantee() -> None:
    plan = planned(target_epsilon=math.inf)
    assert not plan.private and plan.epsilon == math.inf and plan.noise_std == 0
    assert plan.max_grad_norm == math.inf and plan.accountant == "none"


@pytest.mark.parametrize("target", [5.0, math.inf])
def test_a_plan_becomes_plain_json(target: float) -> None:
    values = planned(target_epsilon=target).to_dict()
    text = json.dumps(values, allow_nan=False)
    assert json.loads(text) == values
    assert float(values["epsilon"]) == (math.inf if target == math.inf else values["epsilon"])
    names = {field.name for field in dataclasses.fields(PrivacyPlan)}
    assert names <= set(values) and set(values["epsilon_by_accountant"]) == {"prv", "pld", "rdp"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"delta": 0.0}, "privacy.delta"),
        ({"delta": 1e-3}, "privacy.delta"),
        ({"delta": math.nan}, "privacy.delta"),
        ({"target_epsilon": 0.0}, "privacy.epsilon"),
        ({"target_epsilon": -1.0}, "privacy.epsilon"),
        ({"target_epsilon": math.nan}, "privacy.epsilon"),
        ({"target_epsilon": math.inf, "noise_multiplier": 1.0}, "privacy.epsilon"),
        ({"noise_multiplier": 0.0}, "privacy.noise_multiplier"),
        ({"noise_multiplier": math.nan}, "privacy.noise_multiplier"),
        ({"noise_multiplier": math.inf}, "privacy.noise_multiplier"),
        ({"noise_multiplier": 0.1, "steps": None}, "privacy.noise_multiplier"),
        ({"steps": 0}, "train.max_steps"),
        ({"steps": None, "target_epsilon": math.inf}, "train.max_steps"),
        ({"steps": None}, "privacy.epsilon"),
        ({"target_epsilon": None}, "privacy.epsilon"),
        ({"expected_batch_size": 0}, "train.expected_batch_size"),
        ({"expected_batch_size": 1001}, "train.expected_batch_size"),
        ({"expected_batch_size": math.nan}, "train.expected_batch_size"),
        ({"noise_multiplicity": 0}, "privacy.noise_multiplicity"),
        ({"max_grad_norm": 0.0}, "privacy.max_grad_norm"),
        ({"max_grad_norm": math.inf}, "privacy.max_grad_norm"),
        ({"max_grad_norm": 1e300}, "privacy.max_grad_norm"),
        ({"num_examples": 0}, "data"),
        ({"clipping": "none"}, "privacy.clipping"),
        ({"adjacency": "replace"}, "privacy.adjacency"),
        ({"adjacency": "add_or_remove"}, "privacy.adjacency=add_or_remove"),
        (HIDDEN | {"num_examples": 1000}, "privacy.adjacency=add_or_remove"),
        (HIDDEN | {"sample_rate": None}, "privacy.adjacency=add_or_remove"),
        (HIDDEN | {"sample_rate": 1.1}, "train.sample_rate=1.1"),
        (HIDDEN | {"sample_rate": 0.0}, "train.sample_rate=0.0"),
        (HIDDEN | {"expected_batch_size": 0}, "train.expected_batch_size"),
        ({"sample_rate": 0.2}, "train.sample_rate=0.2 with privacy.adjacency=zero_out"),
        ({"num_examples": None}, "data=None with privacy.adjacency=zero_out"),
        ({"noise_multiplier": 0.5}, "privacy.epsilon"),
        ({"noise_multiplier": 20.0}, "privacy.epsilon"),
    ],
)
def test_nonsense_is_refused_in_one_line_that_names_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(PlanError) as refused:
        planned(**changes)
    message = refused.value.named(PLAN_FIELDS)
    assert message.startswith(field) and "\n" not in message and "expected" in message


@pytest.mark.parametrize("kind", [np.float16, np.float32, torch.tensor, np.float64])
def test_numbers_of_other_kinds_are_computed_with_in_double_precision(kind: Any) -> None:
    """1.25 and 512 are the same in every precision; what is computed from them is not."""
    given = {"num_examples": 4000, "expected_batch_size": 512.0, "noise_multiplier": 1.25, "steps": 80}
    others = {name: kind(value) if name != "steps" else np.int16(80) for name, value in given.items()}
    strange = planned(**others, target_epsilon=None, delta=1e-5)
    _of_one_step.cache_clear()
    plain = planned(**given, target_epsilon=None, delta=1e-5)
    assert strange == plain and strange.to_dict() == plain.to_dict()
    assert {type(value) for value in dataclasses.asdict(strange).values()} <= {
        int,
        float,
        str,
        dict,
        type(None),
    }
    assert Mechanism(np.float16(1.25), np.float32(0.5), np.int16(7)) == Mechanism(1.25, 0.5, 7)  # type: ignore[arg-type]
    assert type(Mechanism(np.float16(1.25), 0.5, 7).noise_multiplier) is float  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"steps=2.5: expected a whole number"):
        Mechanism(1.0, 0.5, 2.5)  # type: ignore[arg-type]
