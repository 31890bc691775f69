"""Private fine-tuning: frozen weights, all steps accounted, the step itself."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_lora.data.sets import ImageSplits
from dp_lora.jobs import job as jobs
from dp_lora.models import adapters
from dp_lora.models.latents import Latents
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import make_plan
from dp_lora.privacy.preflight import PreflightError
from dp_lora.privacy.randomness import Randomness
from dp_lora.records.tracker import RELEASED
from dp_lora.training import finetune, tuning
from dp_lora.training.divergence import Diverged, Watch
from dp_lora.training.inputs import digest
from tests.builders.finetuning import Crash, Given, a_step, given
from tests.builders.tiny import TINY, composed

pytestmark = pytest.mark.usefixtures("unchecked")


CHECK_ENGINE = finetune.check_engine


def test_every_step_is_logged_with_released_values_alone(
    uninterrupted: tuple[dict[str, Any], torch.Tensor], job: Given
) -> None:
    told, _ = uninterrupted
    assert told["executed"] == 5 and list(told["rows"]) == [1, 2, 3, 4, 5] and told["started"] == [0]
    epsilons = [row["epsilon"] for row in told["rows"].values()]
    assert epsilons == sorted(epsilons) and epsilons[-1] <= job.plan.epsilon * 1.001
    assert all(row.keys() <= RELEASED for row in told["rows"].values())


@pytest.mark.parametrize("components", ["lora,embedder", "norm", "full"])
def test_frozen_weights_are_bit_identical_and_chosen_ones_move(
    components: str, pretrained: Path, digits: ImageSplits, tmp_path: Path
) -> None:
    job = given(pretrained, digits, f"trainable.components=[{components}]", "train.max_steps=2")
    model = job.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = set(adapters.trainable_parameters(model))
    job.run(tmp_path / "checkpoint", model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name in chosen), name


def test_the_weights_are_looked_at_after_every_step(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that diverges ends there, on a model without an engine, in a folder that others can open."""
    seen: list[tuple[int, int]] = []

    def look(watch: Watch, step: int, total: int, epsilon: float) -> None:
        seen.append((step, total))
        if step == 2:
            raise Diverged("of no use any more")

    model = job.model()
    with monkeypatch.context() as patched:
        patched.setattr(Watch, "after", look)
        with pytest.raises(Diverged) as kept:
            job.run(tmp_path / "checkpoint", model)
    assert kept.tb is not None and seen == [(1, 5), (2, 5)]
    assert all("forward" not in vars(part) for part in model.modules())
    assert job.run(tmp_path / "checkpoint", model)[0]["executed"] == 5


def test_the_engine_is_checked_before_a_step_begins(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise Crash

    monkeypatch.setattr(finetune, "preflight", fail)
    monkeypatch.setattr(finetune, "check_engine", CHECK_ENGINE)
    with pytest.raises(Crash):
        job.run(tmp_path)
    assert not (tmp_path / "executions.jsonl").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_preflight_runs_in_the_precision_of_the_run(
    pretrained: Path, digits: ImageSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    low: list[bool] = []
    loss = tuning.per_example_loss

    def seen(*args: Any) -> torch.Tensor:
        low.append(torch.is_autocast_enabled("cpu"))
        return loss(*args)

    monkeypatch.setattr(tuning, "per_example_loss", seen)
    monkeypatch.setattr(finetune, "check_engine", CHECK_ENGINE)
    given(pretrained, digits, f"train.precision={precision}", "train.max_steps=1").run(tmp_path)
    assert set(low) == ({False} if precision == "float32" else {False, True})
    # The broken twin: an engine that clips in float32 only.
    factors = ClippedGradientSum._factors

    def careless(self: ClippedGradientSum, norms: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(norms) if low[-1] else factors(self, norms)

    monkeypatch.setattr(ClippedGradientSum, "_factors", careless)
    other = given(pretrained, digits, f"train.precision={precision}", "train.max_steps=1")
    with contextlib.nullcontext() if precision == "float32" else pytest.raises(PreflightError):
        other.run(tmp_path / "twin")


def test_learning_rates_have_factors_by_component(
    pretrained: Path, digits: ImageSplits, tmp_path: Path
) -> None:
    moved = []
    for number, factor in enumerate((1.0, 0.5)):
        job = given(
            pretrained, digits, "train.max_steps=1", "train.schedule=constant",
            f"trainable.learning_rate_factor={factor}", "train.embedder_learning_rate_factor=3",
        )  # fmt: skip
        model = job.model()
        before = {n: p.detach().clone() for n, p in adapters.trainable_parameters(model).items()}
        job.run(tmp_path / str(number), model)
        moved.append({n: p.detach() - before[n] for n, p in adapters.trainable_parameters(model).items()})
    for name, full in moved[0].items():
        rate = 3.0 if name.startswith("class_embedder") else 0.5
        # Adam's first step is the learning rate in every coordinate, whatever the gradient.
        expected = full if name.startswith("class_embedder") else full * rate
        assert torch.allclose(moved[1][name], expected, rtol=1e-3, atol=1e-7), name
    rates = {name: float(change.abs().median()) for name, change in moved[0].items()}
    embedder = rates.pop("class_embedder.weight")
    assert embedder == pytest.approx(3 * max(rates.values()), rel=1e-2)


def test_an_empty_batch_takes_a_noisy_step_that_is_accounted(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = a_step(job, tmp_path)
    monkeypatch.setattr(algorithm, "poisson_batch", lambda *args: torch.empty(0, dtype=torch.int64))
    seen: list[torch.Tensor] = []
    descend = algorithm.PrivateStep._descend
    monkeypatch.setattr(
        algorithm.PrivateStep, "_descend", lambda own, update: (seen.append(update), descend(own, update))
    )
    rows = [step(0), step(1)]
    assert rows[0].keys() == rows[1].keys() and 0 < rows[0]["epsilon"] < rows[1]["epsilon"]
    std = job.plan.noise_std / job.plan.expected_batch_size
    for update in seen:
        # A mean of n squares of standard normals: six deviations, which fails once in 5e8 keys.
        assert float((update / std).square().mean()) == pytest.approx(
            1, abs=6 * math.sqrt(2 / update.numel())
        )
    assert not torch.equal(*seen)


@pytest.mark.parametrize("microbatch", [1, 20])
def test_the_moving_average_moves_once_a_batch(microbatch: int, job: Given, tmp_path: Path) -> None:
    step = a_step(job, tmp_path, microbatch, "train.ema_decay=0.5")
    expected = [p.detach().clone() for p in step.sgd.parameters]
    for number in range(3):
        step(number)
        decay = min(0.5, (1 + number) / (10 + number))
        for averaged, parameter in zip(expected, step.sgd.parameters, strict=True):
            averaged.copy_(decay * averaged + (1 - decay) * parameter.detach())
    for averaged, own in zip(expected, step.sgd.average.values, strict=True):
        assert torch.allclose(averaged, own, atol=1e-7)
    assert not torch.allclose(step.sgd.average.values[0], step.sgd.parameters[0], atol=1e-7)


def test_the_private_loss_is_logged_when_asked_for_alone(job: Given, tmp_path: Path) -> None:
    asked = dataclasses.replace(job, plan=dataclasses.replace(job.plan, loss_share=jobs.LOSS_SHARE))
    step = a_step(asked, tmp_path)
    row = step(0)
    assert row.keys() - a_step(job, tmp_path, 4)(0).keys() == {"private_loss"}
    assert row.keys() <= RELEASED
    # Its noise has a standard deviation of 0.8 / (0.1 x 20) = 0.4: five of them beside a loss in [0, 1].
    assert -2 < row["private_loss"] < 3.5


def test_what_a_step_starts_from_is_part_of_its_lineage(job: Given) -> None:
    model, key = job.model(), Randomness.from_seed(1)
    own = digest(model, job.latents, job.labels, job.plan, key)
    assert own == digest(job.model(), job.latents, job.labels, job.plan, key)
    shifted = Latents(job.latents.mean + 1e-6, job.latents.std)
    noisier = dataclasses.replace(job.plan, noise_multiplier=job.plan.noise_multiplier + 1e-9)
    others = [
        digest(model, shifted, job.labels, job.plan, key),
        digest(model, job.latents, job.labels.flip(0), job.plan, key),
        digest(model, job.latents, job.labels, noisier, key),
        digest(model, job.latents, job.labels, job.plan, Randomness.from_seed(2)),
    ]
    next(model.parameters()).data += 1
    others.append(digest(model, job.latents, job.labels, job.plan, key))
    assert len({own, *others}) == 6


def test_the_baseline_without_privacy_trains(pretrained: Path, digits: ImageSplits, tmp_path: Path) -> None:
    job = given(pretrained, digits)
    plan = make_plan(
        num_examples=400, expected_batch_size=20, steps=2, noise_multiplier=None, target_epsilon=math.inf,
        delta=1e-4, noise_multiplicity=2, max_grad_norm=0.1,
    )  # fmt: skip
    told, _ = dataclasses.replace(job, plan=plan).run(tmp_path / "checkpoint")
    assert all(row["epsilon"] == math.inf for row in told["rows"].values())


def test_steps_of() -> None:
    def steps(*overrides: str) -> int | None:
        return jobs.steps_of(composed(*TINY, "train.expected_batch_size=100", *overrides), 1050)

    assert steps("train.max_steps=7") == 7
    assert steps("train.max_steps=null", "train.epochs=2") == 21
    assert steps("train.max_steps=7", "train.epochs=2") == 7
    assert steps("train.max_steps=null", "privacy.noise_multiplier=1") is None
