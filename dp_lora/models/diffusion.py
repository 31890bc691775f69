"""The loss of one example, and the samplers of diffusion models; `process` has the forward process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from dp_lora.config.schema import SamplerConfig
from dp_lora.models.families import Conditions
from dp_lora.models.folders import LatentDiffusion


def per_example_loss(
    model: LatentDiffusion,
    latents: Tensor,
    labels: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """One loss per example: the mean over its k draws of the mean squared error of what the network predicts.

    The mean over draws is taken here, before any gradient is clipped, so that an example has one gradient
    whatever k is (noise multiplicity, Dockhorn et al. 2023).

    Args:
        latents: [B, c, h, w], or [B, k, c, h, w] where each draw has an image of its own.
        labels: [B], or [B, k].
        timesteps: [B, k].
        noise: [B, k, c, h, w], standard normal.
        weights: [T], of the error at each timestep; None: 1.

    Returns:
        [B], in the order of the examples. The network sees B * k rows; row i * k + j is draw j of example i.
    """
    k = timesteps.shape[1]
    signal, level = model.process.levels(timesteps[:, :, None, None, None], latents)
    drawn = latents if latents.dim() == noise.dim() else latents[:, None]
    noisy = signal * drawn + level * noise
    condition = _repeated(model, labels, k)
    predicted = model.predict_of(noisy.flatten(0, 1), timesteps.flatten(), condition)
    target = model.process.target(drawn, noise, signal, level)
    errors = (predicted.float().view_as(noise) - target).square()
    if weights is not None:
        errors = errors * weights.to(errors)[timesteps][:, :, None, None, None]
    return errors.flatten(1).mean(1)


def _repeated(model: LatentDiffusion, labels: Tensor, k: int) -> Tensor | Conditions:
    """The conditions of `labels` [B], k rows of each; or of [B, k], a row each."""
    if labels.dim() == 2:
        return model.condition(labels.flatten())
    condition = model.condition(labels)
    parts = condition if isinstance(condition, dict) else {"": condition}
    if any(part.requires_grad for part in parts.values()):
        # A row each: the engine sees M k rows of every layer that is trained.
        return model.condition(labels.repeat_interleave(k))
    repeated = {name: part.repeat_interleave(k, 0) for name, part in parts.items()}
    return repeated if isinstance(condition, dict) else repeated[""]


def initial_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal [count, *shape]; image i has a stream of its own, so batches do not change images."""
    streams = (np.random.Generator(np.random.Philox(key=[seed, first + i])) for i in range(count))
    return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))


@torch.inference_mode()
def sample_latents(
    model: LatentDiffusion, labels: Tensor, sampler: SamplerConfig, *, seed: int, first: int = 0
) -> Tensor:
    """Latents [B, c, h, w] drawn from the model for `labels` [B].

    Args:
        model: in evaluation mode.
        labels: on the model's device.
        sampler: `ddim` (Song et al. 2021) with `eta`, or `dpmsolver++` (Lu et al. 2022, order 2).
        seed: of the public randomness.
        first: number of the first image, so that image i is the same in whatever batch it is drawn.
    """
    scheduler = _scheduler(model, sampler)
    scheduler.set_timesteps(sampler.steps)
    stochastic = sampler.name == "ddim" and sampler.eta > 0
    draws = 1 + (sampler.steps if stochastic else 0)
    noise = initial_noise(seed, first, len(labels), (draws, *model.latent_shape)).to(labels.device)
    latents = noise[:, 0]
    for i, timestep in enumerate(scheduler.timesteps):
        timesteps = timestep.expand(len(labels)).to(labels.device)
        predicted = guided_noise(model, latents, timesteps, labels, sampler.guidance)
        extra: dict[str, Any] = {"eta": sampler.eta} if sampler.name == "ddim" else {}
        if stochastic:
            extra["variance_noise"] = noise[:, 1 + i]
        latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
    return latents


def guided_noise(
    model: LatentDiffusion, latents: Tensor, timesteps: Tensor, labels: Tensor, guidance: float
) -> Tensor:
    """The predicted noise, moved away from that of the neutral condition by the factor `guidance`.

    Classifier-free guidance (Ho and Salimans 2022). Where no null class was trained, the mean of the class
    embeddings takes its place; an unconditional model has none. 1 is no guidance. A function of the released
    model, so it costs no privacy.
    """
    predicted = model.predict_noise(latents, timesteps, labels)
    if guidance == 1 or not model.conditional:
        return predicted
    neutral = model.predict_noise_of(latents, timesteps, model.neutral_condition(len(labels)))
    return neutral + guidance * (predicted - neutral)


def _scheduler(model: LatentDiffusion, sampler: SamplerConfig) -> Any:
    config = model.scheduler.config
    if sampler.name == "ddim":
        return DDIMScheduler.from_config(config, set_alpha_to_one=True, steps_offset=0)
    # Steps equal in log signal-to-noise: with equal steps in time the last one is so long that a Gaussian
    # of std 0.5 comes out with 0.38 after 12 steps, and with 0.51 this way.
    return DPMSolverMultistepScheduler.from_config(
        config,
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
        use_lu_lambdas=True,
    )


def class_balanced(num_samples: int, num_classes: int) -> Tensor:
    """Labels [num_samples], each class as often as the others to within one: a public, uniform prior."""
    return torch.arange(num_samples) % num_classes


def in_batches(total: int, size: int) -> Iterator[range]:
    """Ranges of at most `size` that cover `range(total)` in order."""
    return (range(first, min(first + size, total)) for first in range(0, total, size))
