"""The losses of diffusers' own training scripts, for one example and one draw, with a plain pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ChromaPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    QwenImagePipeline,
)
from torch import Tensor

LENGTH, LUMINA_LENGTH, QWEN_LENGTH = 12, 200, 280
"""Tokens of a prompt, where the pipeline asks; those of two have an instruction around them."""


def loss(pipe: Any, latents: Tensor, prompt: str, timestep: int, noise: Tensor, side: int) -> Tensor:
    """The loss of latents [1, c, h, w] at a timestep that counts from the clean end."""
    name = type(pipe).__name__
    if name == "StableDiffusionXLPipeline":
        return _sdxl(pipe, latents, prompt, timestep, noise, side)
    if name.startswith("PixArt"):
        return _pixart(pipe, latents, prompt, timestep, noise, side)
    config = dict(pipe.scheduler.config)
    # Sana's script reads the shift of its sampler of diffusion as none; the model was trained with it.
    config = {"shift": config.get("flow_shift", 1.0), **config}
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


def _masked(pipe: Any, prompt: str, length: int = LENGTH) -> dict[str, Tensor]:
    embeds, mask, _, _ = pipe.encode_prompt(prompt, max_sequence_length=length)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _pixart(pipe: Any, latents: Tensor, prompt: str, timestep: int, noise: Tensor, side: int) -> Tensor:
    """examples/research_projects/pixart/train_pixart_controlnet_hf.py, without the control"""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    timesteps = torch.tensor([timestep])
    noisy = scheduler.add_noise(latents, noise, timesteps)
    added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.use_additional_conditions:
        added = {"resolution": torch.tensor([[side, side]]).float(), "aspect_ratio": torch.tensor([[1.0]])}
    predicted = pipe.transformer(noisy, timestep=timesteps, added_cond_kwargs=added, **_masked(pipe, prompt))
    return (predicted.sample.chunk(2, dim=1)[0] - noise).square().mean()


def _sana(pipe: Any, noisy: Tensor, prompt: str, timesteps: Tensor) -> Tensor:
    predicted: Tensor = pipe.transformer(noisy, timestep=timesteps, **_masked(pipe, prompt)).sample
    return predicted


def _lumina2(pipe: Any, noisy: Tensor, prompt: str, timesteps: Tensor) -> Tensor:
    # examples/dreambooth/train_dreambooth_lora_lumina2.py; it flips noise and image, so signs are other.
    times = 1 - timesteps / 1000
    text = _masked(pipe, prompt, LUMINA_LENGTH)
    predicted: Tensor = pipe.transformer(noisy, timestep=times, **text).sample
    return -predicted


def _aura_flow(pipe: Any, noisy: Tensor, prompt: str, timesteps: Tensor) -> Tensor:
    text = _masked(pipe, prompt)["encoder_hidden_states"]
    predicted: Tensor = pipe.transformer(noisy, timestep=timesteps / 1000, encoder_hidden_states=text).sample
    return predicted


def _flux2(pipe: Any, noisy: Tensor, prompt: str, timesteps: Tensor) -> Tensor:
    embeds, text_ids = pipe.encode_prompt(prompt, max_sequence_length=LENGTH)
    ids = pipe._prepare_latent_ids(noisy)
    predicted = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy),
        timestep=timesteps / 1000,
        guidance=torch.tensor([1.0]) if pipe.transformer.config.guidance_embeds else None,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=ids,
    ).sample
    unpacked: Tensor = pipe._unpack_latents_with_ids(predicted, ids)
    return unpacked


def _qwen(pipe: Any, noisy: Tensor, prompt: str, timesteps: Tensor) -> Tensor:
    # Its prompt has its own length and no mask.
    embeds, mask = pipe.encode_prompt(prompt)
    count, channels, height, width = noisy.shape
    predicted = pipe.transformer(
        hidden_states=QwenImagePipeline._pack_latents(noisy, count, channels, height, width),
        timestep=timesteps / 1000,
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,
        img_shapes=[(1, height // 2, width // 2)] * count,
    ).sample
    factor = pipe.vae_scale_factor
    unpacked = QwenImagePipeline._unpack_latents(predicted, height * factor, width * factor, factor)
    latents: Tensor = unpacked[:, :, 0]
    return latents


def _chroma(pipe: Any, noisy: Tensor, prompt: str, timesteps: Tensor) -> Tensor:
    embeds, text_ids, mask, *_ = pipe.encode_prompt(prompt, max_sequence_length=LENGTH)
    count, channels, height, width = noisy.shape
    tokens = ChromaPipeline._pack_latents(noisy, count, channels, height, width)
    ids = ChromaPipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype)
    predicted = pipe.transformer(
        hidden_states=tokens,
        timestep=timesteps / 1000,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=ids,
        attention_mask=pipe._prepare_attention_mask(count, tokens.shape[1], noisy.dtype, mask),
    ).sample
    factor = pipe.vae_scale_factor
    unpacked: Tensor = ChromaPipeline._unpack_latents(predicted, height * factor, width * factor, factor)
    return unpacked


_PREDICT = {
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "Flux2Pipeline": _flux2,
    "Flux2KleinPipeline": _flux2,
    "ChromaPipeline": _chroma,
    "QwenImagePipeline": _qwen,
    "SanaPipeline": _sana,
    "Lumina2Pipeline": _lumina2,
    "AuraFlowPipeline": _aura_flow,
}
