"""Canary persons: an audit accuses an engine that takes each image of a person for an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dp_lora.auditing import bounds, canaries
from dp_lora.auditing.canaries import RECORDS, Trained, train_with_canaries
from dp_lora.auditing.membership import draw, examples, losses_of
from dp_lora.auditing.noise_tests import Verdict
from dp_lora.config.schema import Config
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.models import adapters
from dp_lora.models.folders import LatentDiffusion, load
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.records.progress import Progress
from dp_lora.training.finetune import FinetuneStep
from tests.builders.tiny import TINY, composed


@pytest.fixture(scope="module")
def config() -> Config:
    return composed(*TINY, "lora.rank=2", "train.microbatch=128")


def _plan() -> PrivacyPlan:
    return make_plan(
        num_examples=2000, expected_batch_size=1000, steps=2, target_epsilon=8.0, delta=1e-5,
        noise_multiplicity=2, max_grad_norm=1e-3, unit="person",
    )  # fmt: skip


@pytest.fixture
def audited(pretrained: Path, config: Config, tmp_path: Path) -> Callable[[int], Trained]:
    def run(seed: int) -> Trained:
        model: LatentDiffusion = load(pretrained)
        adapters.attach(model, config.trainable.components, config.lora, seed=0)
        return train_with_canaries(
            config, model, _plan(), kind="gradient", count=300, randomness=Randomness.from_seed(seed),
            folder=tmp_path / str(seed),
        )  # fmt: skip

    return run


def _one_by_one(patched: pytest.MonkeyPatch) -> None:
    """The broken twin: every image is an example, sampled and clipped by itself."""
    on = FinetuneStep.on.__func__  # type: ignore[attr-defined]

    def apart(cls: Any, *given: Any, persons: Any = None, **named: Any) -> Any:
        step = on(cls, *given, **named)
        assert persons is None or step.sgd.num_examples == RECORDS * len(persons)
        return step

    patched.setattr(canaries.FinetuneStep, "on", classmethod(apart))


def _found(trained: Trained) -> bool:
    """Whether the audit accuses the engine, by a lower bound above the claim or by the tests of the noise."""
    plan = _plan()
    at = bounds.thresholds(plan.mechanism, trained.noise_factor)
    outcomes = [bounds.Outcome.of(trained.scores, trained.included, threshold) for threshold in at]
    lower = bounds.one_run(trained.scores, trained.included, plan.delta, 0.975).epsilon
    refuted = bounds.refutes(outcomes, plan.mechanism, plan.delta, 0.975)
    return bool(lower > plan.epsilon or refuted or Verdict(trained.p_values()).accused)


def test_correct_runs_for_persons_are_not_accused(audited: Callable[[int], Trained]) -> None:
    """Each may be accused with a probability of 6 %: more than three of six are a chance of 2 in 10,000."""
    assert sum(_found(audited(seed)) for seed in range(6)) <= 3


def test_images_that_are_sampled_one_by_one_are_found(
    audited: Callable[[int], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of six; 60 of 60 did, so that the probability is 95 % at least, with a confidence of 95 %."""
    _one_by_one(monkeypatch)
    assert all(_found(audited(seed)) for seed in range(10, 16))


def test_members_are_persons_by_the_mean_over_their_images(digits: ImageSplits, pretrained: Path) -> None:
    owners = np.array([f"p{i % 7}" for i in range(40)], dtype=object)
    images: ImageSet = replace(digits.train.subset(np.arange(40)), persons=owners)
    some = draw(images, 3, seed=1)
    assert examples(images) == 7 and examples(some) == 3
    assert some.persons is not None
    for person in set(some.persons):
        assert (some.persons == person).sum() == (owners == person).sum()
    models = (load(pretrained), load(pretrained))
    with Progress(4 * 40, "membership", mode="off") as progress:
        found = losses_of(images, *models, draws=2, seed=0, progress=progress)
        apart = losses_of(replace(images, persons=None), *models, draws=2, seed=0, progress=progress)
    assert len(found.before) == 7 and len(apart.before) == 40
    first = apart.before[owners == "p0"].mean()
    assert found.before[0] == pytest.approx(first)
    assert torch.isfinite(torch.from_numpy(found.after)).all()
