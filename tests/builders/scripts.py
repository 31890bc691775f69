"""The losses of diffusers' own training scripts, for one example and one draw, with a plain pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

LENGTH = 12
"""Tokens of a prompt, where the pipeline asks."""


def loss(pipe: Any, latents: Tensor, prompt: str, timestep: int, noise: Tensor, side: int) -> Tensor:
    """The loss of latents [1, c, h, w] at a timestep that counts from the clean end."""
    name = type(pipe).__name__
    if name == "StableDiffusionXLPipeline":
        return _sdxl(pipe, latents, prompt, timestep, noise, side)
    config = dict(pipe.scheduler.config)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    # examples/dreambooth/train_dreambooth_lora_{sd3,flux,sana}.py; SD3's with precondition_outputs=0
    index = torch.tensor([len(scheduler.timesteps) - 1 - timestep])
    timesteps, sigmas = scheduler.timesteps[index], scheduler.sigmas[index]
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    predicted = _PREDICT[name](pipe, noisy, prompt, timesteps)
    return (predicted - (noise - latents)).square().mean()


def _sdxl(pipe: Any, latents: Tensor, prompt: str, timestep: int, noise: Tensor, side: int) -> Tensor:
    """examples/text_to_image/train_text_to_image_lora_sdxl.py"""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    timesteps = torch.tensor([timestep])
    noisy = scheduler.add_noise(latents, noise, timesteps)
    embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    added = {"time_ids": torch.tensor([[side, side, 0, 0, side, side]]), "text_embeds": pooled}
    predicted = pipe.unet(noisy, timesteps, embeds, added_cond_kwargs=added).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    return (predicted - target).square().mean()


def _sd3(pipe: Any, noisy: Tensor, prompt: str, timesteps: Tensor) -> Tensor:
    embeds, _, pooled, _ = pipe.encode_prompt(prompt, None, None, max_sequence_length=LENGTH)
    predicted: Tensor = pipe.transformer(
        hidden_states=noisy, timestep=timesteps, encoder_hidden_states=embeds, pooled_projections=pooled
    ).sample
    return predicted


def _flux(pipe: Any, noisy: Tensor, prompt: str, timesteps: Tensor) -> Tensor:
    embeds, pooled, text_ids = pipe.encode_prompt(prompt, None, max_sequence_length=LENGTH)
    count, channels, height, width = noisy.shape
    predicted = pipe.transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
        timestep=timesteps / 1000,
        guidance=torch.tensor([1.0]) if pipe.transformer.config.guidance_embeds else None,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=FluxPipeline._prepare_latent_image_ids(
            count, height // 2, width // 2, noisy.device, noisy.dtype
        ),
    ).sample
    factor = pipe.vae_scale_factor
    unpacked: Tensor = FluxPipeline._unpack_latents(predicted, height * factor, width * factor, factor)
    return unpacked


_PREDICT = {"StableDiffusion3Pipeline": _sd3, "FluxPipeline": _flux}
