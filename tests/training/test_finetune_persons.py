"""Fine-tuning with persons as examples: what each draw is made of, and that nothing else decides it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_lora.data.sets import ImageSplits
from dp_lora.models import adapters
from dp_lora.models.diffusion import per_example_loss
from dp_lora.models.folders import load
from dp_lora.models.latents import Latents
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.persons import Persons
from dp_lora.privacy.plan import make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.training import finetune, tuning
from dp_lora.training.inputs import digest
from tests.builders.architectures import stable_diffusion
from tests.builders.finetuning import SEEDED, SHORT, Crash, Given, crashing, given
from tests.builders.tiny import TINY, composed

pytestmark = pytest.mark.usefixtures("unchecked")

IMAGES, PEOPLE = 400, 60
CHECK_ENGINE = finetune.check_engine


def _owners() -> Tensor:
    """Whose each of 400 images is: one person has 150 of them."""
    owners = torch.randint(0, PEOPLE, (IMAGES,), generator=torch.Generator().manual_seed(2))
    owners[:PEOPLE] = torch.arange(PEOPLE)
    owners[200:350] = 5
    return owners


@pytest.fixture
def job(pretrained: Path, digits: ImageSplits) -> Given:
    job = given(pretrained, digits)
    plan = make_plan(
        num_examples=PEOPLE, expected_batch_size=20, steps=5, noise_multiplier=0.8, delta=1e-4,
        noise_multiplicity=4, max_grad_norm=0.1, unit="person",
    )  # fmt: skip
    return dataclasses.replace(job, plan=plan)


def _step(job: Given, folder: Path, microbatch: int = 8, name: str = "record") -> finetune.FinetuneStep:
    model = job.model()
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.02  # else B is zero and A has no gradient
    return finetune.FinetuneStep.on(
        model, job.latents, job.labels, job.plan, Randomness.from_seed(3), job.config.train, microbatch,
        Executions(folder / f"{name} {microbatch}.jsonl", {}), persons=Persons(_owners()),
    )  # fmt: skip


def _sum(step: finetune.FinetuneStep, left_out: int | None = None) -> Tensor:
    taken = step.sgd.begin(0)
    for rows, weights, draws in taken.microbatches(step.microbatch):
        losses = step.losses(rows, draws)
        taken.add(losses if left_out is None else losses * (rows != left_out), weights)
    found = step.sgd.gradients.total().clone()
    step.sgd.detach()
    return found


def test_each_draw_has_latents_and_label_of_one_image_of_the_person(job: Given, tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    def loss(model: Any, latents: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        seen.append((latents, labels))
        return per_example_loss(model, latents, labels, *rest)

    exact = Latents(job.latents.mean, torch.zeros_like(job.latents.std))
    step = _step(dataclasses.replace(job, latents=exact), tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "per_example_loss", loss)
        taken = step.sgd.begin(0)
        persons, owners, images = Persons(_owners()), _owners(), set[int]()
        for rows, weights, draws in taken.microbatches(8):
            taken.add(step.losses(rows, draws), weights)
            latents, labels = seen[-1]
            chosen = persons.draw(rows, draws, 4)
            assert latents.shape == (8, 4, *step.latents.mean.shape[1:]) and labels.shape == (8, 4)
            assert torch.equal(latents, exact.mean[chosen]) and torch.equal(labels, job.labels[chosen])
            first = persons.order[persons.offsets[rows]]
            assert torch.equal(owners[chosen], owners[first][:, None].expand(-1, 4))
            images |= set(chosen.flatten().tolist())
    assert len(images) > 20


def test_a_row_is_what_it_would_be_alone(job: Given) -> None:
    """The loss of k draws of several images is the mean of the losses of one draw of each."""
    model = job.model()
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, *model.latent_shape, generator=generator)
    labels = torch.randint(0, 10, (3, 4), generator=generator)
    timesteps = torch.randint(0, 1000, (3, 4), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    with torch.no_grad():
        together = per_example_loss(model, latents, labels, timesteps, noise)
        apart = [
            per_example_loss(model, latents[:, j], labels[:, j], timesteps[:, j : j + 1], noise[:, j : j + 1])
            for j in range(4)
        ]
    assert torch.allclose(together, torch.stack(apart).mean(0), rtol=1e-5)
    assert not torch.allclose(together, apart[0], rtol=1e-2)


def test_a_person_moves_the_sum_by_c_at_most_whatever_the_microbatch(job: Given, tmp_path: Path) -> None:
    """The person with 150 images, and others with few, in a batch of all."""
    job = dataclasses.replace(job, plan=dataclasses.replace(job.plan, sample_rate=1.0))
    whole = _sum(_step(job, tmp_path))
    assert torch.allclose(_sum(_step(job, tmp_path, 3)), whole, rtol=1e-4, atol=1e-7)
    moved = [
        float((whole - _sum(_step(job, tmp_path, 8, f"without {person}"), person)).norm())
        for person in (0, 5, 7)
    ]
    assert min(moved) > 0 and max(moved) <= job.plan.max_grad_norm * (1 + 1e-6)


def _run(job: Given, folder: Path) -> Tensor:
    model = job.model()
    finetune.finetune(
        job.config, model, job.latents, job.labels, job.plan, folder, lambda step, values: None,
        lambda finished: None, persons=Persons(_owners()),
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in adapters.trainable_parameters(model).values()])


def test_a_killed_run_draws_the_same_images_again(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = _run(job, tmp_path / "quiet")
    with monkeypatch.context() as patched:
        patched.setattr(algorithm, "noised_mean", crashing(algorithm.noised_mean, 3, late=False))
        with pytest.raises(Crash):
            _run(job, tmp_path / "killed")
    assert torch.equal(_run(job, tmp_path / "killed"), quiet)
    # The broken twin draws by a clock.
    with monkeypatch.context() as patched:
        calls = iter(range(10**6))
        choices = algorithm.Draws.choices
        patched.setattr(
            algorithm.Draws,
            "choices",
            lambda own, counts, k: (choices(own, counts, k) + next(calls)) % counts[:, None],
        )
        assert not torch.equal(_run(job, tmp_path / "twin"), quiet)


def test_whose_the_images_are_is_part_of_what_a_training_begins_from(job: Given) -> None:
    model, key = job.model(), Randomness.from_seed(1)
    changed = _owners()
    changed[0] = 1
    found = {
        digest(model, job.latents, job.labels, job.plan, key, None, persons)
        for persons in (None, Persons(_owners()), Persons(changed))
    }
    assert len(found) == 3


def test_the_preflight_tries_draws_of_several_images(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set[int]()
    loss = tuning.per_example_loss

    def seen(model: Any, latents: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        shapes.add(latents.dim())
        assert labels.dim() == latents.dim() - 3
        return loss(model, latents, labels, *rest)

    monkeypatch.setattr(tuning, "per_example_loss", seen)
    CHECK_ENGINE(job.config, job.model(), job.plan)
    assert shapes == {5}
    CHECK_ENGINE(job.config, job.model(), dataclasses.replace(job.plan, unit="image"))
    assert shapes == {4, 5}


def test_the_plan_and_the_sampler_speak_of_the_same_examples(job: Given, tmp_path: Path) -> None:
    image = dataclasses.replace(job.plan, unit="image")
    with pytest.raises(AssertionError):
        _run(dataclasses.replace(job, plan=image), tmp_path)
    assert ClippedGradientSum is algorithm.ClippedGradientSum


def test_a_caption_follows_the_image_that_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions are told by the numbers of their images: those that the latents of the same rows have."""
    captions = [f"scan {i}" for i in range(30)]
    config = composed(
        *TINY, *SHORT, SEEDED, "trainable=lora_alone", "train.max_steps=2", "noise_multiplicity=k4"
    )
    config.lora.target_modules = ["to_k", "to_v"]
    model = load(stable_diffusion(tmp_path / "sd"), "a {}")
    model.new_classes(["cat", "dog"], torch.Generator())
    adapters.attach(model, config.trainable.components, config.lora, seed=0)
    # The latents of image i are i everywhere.
    mean = torch.arange(30.0).view(-1, 1, 1, 1).expand(30, *model.latent_shape).contiguous()
    plan = make_plan(
        num_examples=6, expected_batch_size=3, steps=2, noise_multiplier=0.8, delta=1e-4, max_grad_norm=0.1,
        noise_multiplicity=4, unit="person",
    )  # fmt: skip
    seen = list[Tensor]()

    def loss(model: Any, latents: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        assert torch.equal(latents[:, :, 0, 0, 0].long(), labels)
        seen.append(labels)
        return per_example_loss(model, latents, labels, *rest)

    monkeypatch.setattr(finetune, "per_example_loss", loss)
    finetune.finetune(
        config, model, Latents(mean, torch.zeros_like(mean)), torch.zeros(30, dtype=torch.int64), plan,
        tmp_path / "checkpoint", lambda step, values: None, lambda finished: None, captions=captions,
        persons=Persons(torch.arange(30) % 6),
    )  # fmt: skip
    assert len(torch.cat(seen).unique()) > 6
