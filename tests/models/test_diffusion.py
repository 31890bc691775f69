"""The loss against a naive double loop, and the samplers against a target that is known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from dp_lora.config.schema import SamplerConfig
from dp_lora.data.sets import ImageSplits
from dp_lora.models.diffusion import (
    class_balanced,
    in_batches,
    initial_noise,
    per_example_loss,
    sample_latents,
)
from dp_lora.models.folders import LatentDiffusion


def _draws(model: LatentDiffusion, examples: int, k: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shape = model.latent_shape
    return (
        torch.randn(examples, *shape, generator=generator),
        torch.randint(len(model.classes), (examples,), generator=generator),
        torch.randint(1000, (examples, k), generator=generator),
        torch.randn(examples, k, *shape, generator=generator),
    )


def naive_loss(model: LatentDiffusion, *draws: torch.Tensor) -> torch.Tensor:
    """The same by one forward for each draw of each example."""
    latents, labels, timesteps, noise = draws
    a = model.scheduler.alphas_cumprod
    losses = []
    for i in range(len(latents)):
        errors = []
        for j in range(timesteps.shape[1]):
            t = int(timesteps[i, j])
            noisy = a[t] ** 0.5 * latents[i] + (1 - a[t]) ** 0.5 * noise[i, j]
            predicted = model.predict_noise(noisy[None], torch.tensor([t]), labels[i : i + 1])[0]
            errors.append(((predicted - noise[i, j]) ** 2).mean())
        losses.append(sum(errors) / len(errors))
    return torch.stack(losses)


@torch.inference_mode()
@pytest.mark.parametrize("k", [1, 4])
def test_the_loss_of_an_example_is_its_mean_over_k_draws(model: LatentDiffusion, k: int) -> None:
    draws = _draws(model, 3, k)
    losses = per_example_loss(model, *draws)
    assert losses.shape == (3,)
    assert torch.allclose(losses, naive_loss(model, *draws), rtol=1e-5)
    # The broken twin: draws of different examples mixed up.
    latents, labels, timesteps, noise = draws
    assert not torch.allclose(
        losses, per_example_loss(model, latents, labels, timesteps, noise.flip(0)), rtol=1e-3
    )


class Gaussian:
    """A model of data N(mean_c, std^2) whose eps is known: sqrt(1-a) (z - sqrt(a) m) / (a std^2 + 1 - a)."""

    latent_shape = (1, 2, 2)
    std = 0.5

    def __init__(self) -> None:
        self.scheduler = DDPMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
        )
        self.means = torch.tensor([-1.0, 2.0])

    def predict_noise(self, latents: Any, timesteps: Any, labels: Any) -> torch.Tensor:
        a = self.scheduler.alphas_cumprod[timesteps][:, None, None, None]
        mean = self.means[labels][:, None, None, None]
        return (1 - a).sqrt() * (latents - a.sqrt() * mean) / (a * self.std**2 + 1 - a)


# (sampler, largest error of mean and std). Both of 4,000 x 4 numbers: the standard errors are 0.004 and
# 0.003, the rest is room for the discretisation.
SAMPLERS = [
    (SamplerConfig(name="ddim", steps=200, eta=0.0), 0.03),
    (SamplerConfig(name="ddim", steps=200, eta=1.0), 0.03),
    (SamplerConfig(name="dpmsolver++", steps=12), 0.03),
]


@pytest.mark.parametrize(("sampler", "tolerance"), SAMPLERS, ids=["ddim0", "ddim1", "dpmsolver"])
def test_samplers_draw_from_a_gaussian_of_known_mean_and_std(
    sampler: SamplerConfig, tolerance: float
) -> None:
    target: Any = Gaussian()
    labels = class_balanced(8000, 2)
    latents = sample_latents(target, labels, sampler, seed=1)
    for label, mean in enumerate(target.means):
        drawn = latents[labels == label]
        assert abs(float(drawn.mean() - mean)) < tolerance
        assert abs(float(drawn.std()) - target.std) < tolerance


def test_without_eta_the_map_from_noise_is_the_exact_flow() -> None:
    """The probability flow of a Gaussian is linear: z -> mean + std z for nearly pure noise at first."""
    target: Any = Gaussian()
    labels = class_balanced(200, 2)
    noise = initial_noise(3, 0, 200, (1, *target.latent_shape))[:, 0]
    exact = target.means[labels][:, None, None, None] + target.std * noise
    for sampler in (
        SamplerConfig(name="ddim", steps=500, eta=0.0),
        SamplerConfig(name="dpmsolver++", steps=40),
    ):
        drawn = sample_latents(target, labels, sampler, seed=3)
        assert float((drawn - exact).abs().max()) < 0.15 and float((drawn - exact).abs().mean()) < 0.03
    stochastic = sample_latents(target, labels, SamplerConfig(name="ddim", steps=500, eta=1.0), seed=3)
    assert float((stochastic - exact).abs().mean()) > 0.2


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(name="ddim", steps=4, eta=1.0),
        SamplerConfig(name="ddim", steps=4),
        SamplerConfig(steps=4),
    ],
)
def test_an_image_does_not_depend_on_its_batch(model: LatentDiffusion, sampler: SamplerConfig) -> None:
    labels = class_balanced(12, 10)
    whole = sample_latents(model, labels, sampler, seed=7)
    parts = [
        sample_latents(model, labels[b.start : b.stop], sampler, seed=7, first=b.start)
        for b in in_batches(12, 5)
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4)
    assert not torch.allclose(sample_latents(model, labels, sampler, seed=8), whole, atol=1e-2)
    # The broken twin: every batch begins with the first image's noise.
    again = [sample_latents(model, labels[b.start : b.stop], sampler, seed=7) for b in in_batches(12, 5)]
    assert not torch.allclose(torch.cat(again), whole, atol=1e-2)


def test_initial_noise_is_standard_normal_and_of_its_image() -> None:
    noise = initial_noise(0, 0, 3000, (4, 2))
    # Five standard errors: false failures below 1e-5.
    assert abs(float(noise.mean())) < 5 / 24000**0.5 and abs(float(noise.var()) - 1) < 5 * (2 / 24000) ** 0.5
    assert torch.equal(initial_noise(0, 17, 3, (4, 2)), noise[17:20])


def test_labels_are_balanced_and_batches_cover_everything() -> None:
    counts = class_balanced(43, 10).bincount()
    assert counts.sum() == 43 and counts.max() - counts.min() == 1
    assert [list(b) for b in in_batches(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_sampling_leaves_no_trace_in_the_model(model: LatentDiffusion, digits: ImageSplits) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample_latents(model, class_balanced(4, 10), SamplerConfig(steps=3), seed=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
