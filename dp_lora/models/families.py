"""The families of text-to-image pipelines of diffusers, one record each.

A record says how a network is called on noisy latents and conditions, and which timesteps diffusers'
training script draws. The rest is diffusers': `encode_prompt` makes the conditions of a prompt, and the
pipeline's call draws images with its own scheduler. Stable Diffusion 1.x and 2.x are in `pipelines`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Conditions = dict[str, Tensor]
"""What an image is conditioned on, [B, ...] each, by the names that the pipeline's call gives them."""

TRAINING_GUIDANCE = 1.0
"""Of a network that was distilled to take its guidance as an input: diffusers' scripts train it at 1."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a network.

    Fields:
        noisy: [B, c, h, w].
        times: [B], those of the process.
        scale: of the times of a flow: they are sigma times it.
        side: of the image, in pixels.
    """

    noisy: Tensor
    times: Tensor
    conditions: Conditions
    scale: int
    side: int


@dataclass(frozen=True)
class Family:
    """The facts about the pipelines of one class.

    Fields:
        pipeline: its name in diffusers.
        network: the class of its network.
        predict: the network's own prediction [B, c or more, h, w].
        returns: the names of what `encode_prompt` returns, in its order.
        conditions: those of them that an image is conditioned on.
        component: under which name the pipeline has the network.
        autoencoder: its class.
        packing: side of the squares of latents that are one token for the caller of the network.
        patch: side of the squares that the network itself makes tokens of.
        length: tokens to which encode_prompt pads a prompt by default; None: CLIP's own length.
        distribution: of the timesteps in diffusers' training script.
        sample_size: side of the published latents, where the network's configuration does not say it.
        neutral: what an image is conditioned on that guidance moves away from: the pipeline's own negative
            conditions, or those of the empty prompt.
        true_guidance: whether the pipeline's call has a number of its own for guidance by neutral conditions.
        pads: whether `encode_prompt` leaves a prompt at its own length: it is padded here, with a mask.
        call: further arguments of the pipeline's call.
    """

    pipeline: str
    network: str
    predict: Callable[[Any, Inputs], Tensor]
    returns: tuple[str, ...]
    conditions: tuple[str, ...]
    component: str = "transformer"
    autoencoder: str = "AutoencoderKL"
    packing: int = 1
    patch: int = 1
    length: int | None = None
    distribution: str = "uniform"
    sample_size: int | None = None
    neutral: str = "negative"
    true_guidance: bool = False
    pads: bool = False
    call: dict[str, Any] = field(default_factory=dict)

    def drawing(self, network: Any, conditions: Conditions, neutral: Conditions, guidance: float) -> Any:
        """The arguments of the pipeline's call that say what to draw, and how far from the neutral."""
        given: dict[str, Any] = {**self.call, **conditions, "guidance_scale": guidance}
        if network.config.get("guidance_embeds"):
            return given
        if self.true_guidance:
            given["true_cfg_scale"] = guidance
        if guidance > 1:
            given |= {f"negative_{name}": value for name, value in neutral.items()}
        return given


def packed(latents: Tensor) -> Tensor:
    """[B, h w / 4, 4 c] of latents [B, c, h, w]: squares of four, as FLUX takes them."""
    count, channels, height, width = latents.shape
    squares = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(count, height // 2 * (width // 2), 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The latents [B, c, height, width] that `packed` made tokens of."""
    count, _, channels = tokens.shape
    squares = tokens.view(count, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(count, channels // 4, height, width)


def places(height: int, width: int, like: Tensor) -> Tensor:
    """[h w / 4, 3]: row and column of each packed token, as FLUX takes them."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(like)


# How each network is called


def _sdxl(network: Any, given: Inputs) -> Tensor:
    # Original and target size, and no crop, as the pipeline has it by default.
    size = (given.side, given.side)
    times = torch.tensor([*size, 0, 0, *size], dtype=given.noisy.dtype, device=given.noisy.device)
    added = {
        "text_embeds": given.conditions["pooled_prompt_embeds"],
        "time_ids": times.expand(len(given.noisy), -1),
    }
    text = given.conditions["prompt_embeds"]
    out: Tensor = network(
        given.noisy, given.times, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
    )[0]
    return out


def _sd3(network: Any, given: Inputs) -> Tensor:
    out: Tensor = network(
        hidden_states=given.noisy,
        timestep=given.times,
        encoder_hidden_states=given.conditions["prompt_embeds"],
        pooled_projections=given.conditions["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    return out


def _flux(network: Any, given: Inputs) -> Tensor:
    height, width = given.noisy.shape[2:]
    text, noisy = given.conditions["prompt_embeds"], given.noisy
    guidance = None
    if network.config["guidance_embeds"]:
        guidance = torch.full((len(noisy),), TRAINING_GUIDANCE, device=noisy.device)
    out: Tensor = network(
        hidden_states=packed(noisy),
        timestep=given.times / given.scale,
        guidance=guidance,
        pooled_projections=given.conditions["pooled_prompt_embeds"],
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3).to(noisy),
        img_ids=places(height, width, noisy),
        return_dict=False,
    )[0]
    return unpacked(out, height, width)


def _masked(given: Inputs) -> dict[str, Tensor]:
    """The text and its mask, as most transformers call them."""
    return {
        "encoder_hidden_states": given.conditions["prompt_embeds"],
        "encoder_attention_mask": given.conditions["prompt_attention_mask"],
    }


def _pixart(network: Any, given: Inputs) -> Tensor:
    added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if network.use_additional_conditions:
        count = len(given.noisy)
        size = torch.tensor([given.side, given.side], dtype=given.noisy.dtype, device=given.noisy.device)
        added = {
            "resolution": size.expand(count, -1),
            "aspect_ratio": torch.ones_like(size[:1]).expand(count, -1),
        }
    out: Tensor = network(
        given.noisy, timestep=given.times, added_cond_kwargs=added, return_dict=False, **_masked(given)
    )[0]
    return out


def _sana(network: Any, given: Inputs) -> Tensor:
    times = given.times * network.config["timestep_scale"]
    out: Tensor = network(given.noisy, timestep=times, return_dict=False, **_masked(given))[0]
    return out


def _lumina2(network: Any, given: Inputs) -> Tensor:
    # Its time runs from the noise to the image, and so does its velocity.
    times = 1 - given.times / given.scale
    out: Tensor = network(given.noisy, timestep=times, return_dict=False, **_masked(given))[0]
    return -out


def _aura_flow(network: Any, given: Inputs) -> Tensor:
    out: Tensor = network(
        given.noisy,
        timestep=given.times / given.scale,
        encoder_hidden_states=given.conditions["prompt_embeds"],
        return_dict=False,
    )[0]
    return out


def _chroma(network: Any, given: Inputs) -> Tensor:
    height, width = given.noisy.shape[2:]
    text, mask = given.conditions["prompt_embeds"], given.conditions["prompt_attention_mask"]
    tokens = packed(given.noisy)
    seen = torch.ones(tokens.shape[:2], dtype=torch.bool, device=mask.device)
    out: Tensor = network(
        hidden_states=tokens,
        timestep=given.times / given.scale,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3).to(given.noisy),
        img_ids=places(height, width, given.noisy),
        attention_mask=torch.cat([mask, seen], dim=1),
        return_dict=False,
    )[0]
    return unpacked(out, height, width)


def _flux2(network: Any, given: Inputs) -> Tensor:
    count, _, height, width = given.noisy.shape
    text, noisy = given.conditions["prompt_embeds"], given.noisy
    guidance = None
    if network.config["guidance_embeds"]:
        guidance = torch.full((count,), TRAINING_GUIDANCE, device=noisy.device)
    zero, length = torch.zeros(1, dtype=torch.int64), torch.arange(text.shape[1])
    text_places = torch.cartesian_prod(zero, zero, zero, length)
    image_places = torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), zero)
    out: Tensor = network(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        timestep=given.times / given.scale,
        guidance=guidance,
        encoder_hidden_states=text,
        txt_ids=text_places.to(noisy.device).expand(count, -1, -1),
        img_ids=image_places.to(noisy.device).expand(count, -1, -1),
        return_dict=False,
    )[0]
    latents: Tensor = out.transpose(1, 2).reshape(count, -1, height, width)
    return latents


def _qwen(network: Any, given: Inputs) -> Tensor:
    count, _, height, width = given.noisy.shape
    out: Tensor = network(
        hidden_states=packed(given.noisy),
        timestep=given.times / given.scale,
        encoder_hidden_states=given.conditions["prompt_embeds"],
        encoder_hidden_states_mask=given.conditions["prompt_embeds_mask"],
        img_shapes=[[(1, height // 2, width // 2)]] * count,
        return_dict=False,
    )[0]
    return unpacked(out, height, width)


# The records

_POOLED = ("prompt_embeds", "pooled_prompt_embeds")
_WITH_NEGATIVE = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)

_MASKED = ("prompt_embeds", "prompt_attention_mask")
_WITH_MASKS = (*_MASKED, "negative_prompt_embeds", "negative_prompt_attention_mask")

FAMILIES = {
    family.pipeline: family
    for family in (
        Family(
            pipeline="StableDiffusionXLPipeline",
            network="UNet2DConditionModel",
            component="unet",
            predict=_sdxl,
            returns=_WITH_NEGATIVE,
            conditions=_POOLED,
        ),
        Family(
            pipeline="StableDiffusion3Pipeline",
            network="SD3Transformer2DModel",
            predict=_sd3,
            returns=_WITH_NEGATIVE,
            conditions=_POOLED,
            patch=2,
            length=256,
            distribution="logit_normal",
        ),
        Family(
            pipeline="FluxPipeline",
            network="FluxTransformer2DModel",
            predict=_flux,
            returns=(*_POOLED, "text_ids"),
            conditions=_POOLED,
            packing=2,
            patch=2,
            length=512,
            sample_size=128,
            neutral="empty",
            true_guidance=True,
        ),
        Family(
            pipeline="Flux2Pipeline",
            network="Flux2Transformer2DModel",
            autoencoder="AutoencoderKLFlux2",
            predict=_flux2,
            returns=("prompt_embeds", "text_ids"),
            conditions=("prompt_embeds",),
            length=512,
            sample_size=64,
            neutral="empty",
        ),
        Family(
            pipeline="Flux2KleinPipeline",
            network="Flux2Transformer2DModel",
            autoencoder="AutoencoderKLFlux2",
            predict=_flux2,
            returns=("prompt_embeds", "text_ids"),
            conditions=("prompt_embeds",),
            length=512,
            sample_size=64,
            neutral="empty",
        ),
        Family(
            pipeline="ChromaPipeline",
            network="ChromaTransformer2DModel",
            predict=_chroma,
            returns=(
                *("prompt_embeds", "text_ids", "prompt_attention_mask"),
                *("negative_prompt_embeds", "negative_text_ids", "negative_prompt_attention_mask"),
            ),
            conditions=_MASKED,
            packing=2,
            patch=2,
            length=512,
            sample_size=128,
        ),
        Family(
            pipeline="QwenImagePipeline",
            network="QwenImageTransformer2DModel",
            autoencoder="AutoencoderKLQwenImage",
            predict=_qwen,
            returns=("prompt_embeds", "prompt_embeds_mask"),
            conditions=("prompt_embeds", "prompt_embeds_mask"),
            packing=2,
            patch=2,
            length=512,
            sample_size=128,
            neutral="empty",
            true_guidance=True,
            pads=True,
        ),
        Family(
            pipeline="PixArtAlphaPipeline",
            network="PixArtTransformer2DModel",
            predict=_pixart,
            returns=_WITH_MASKS,
            conditions=_MASKED,
            patch=2,
            length=120,
            call={"use_resolution_binning": False},
        ),
        Family(
            pipeline="PixArtSigmaPipeline",
            network="PixArtTransformer2DModel",
            predict=_pixart,
            returns=_WITH_MASKS,
            conditions=_MASKED,
            patch=2,
            length=300,
            call={"use_resolution_binning": False},
        ),
        Family(
            pipeline="SanaPipeline",
            network="SanaTransformer2DModel",
            autoencoder="AutoencoderDC",
            predict=_sana,
            returns=_WITH_MASKS,
            conditions=_MASKED,
            length=300,
            call={"use_resolution_binning": False},
        ),
        Family(
            pipeline="Lumina2Pipeline",
            network="Lumina2Transformer2DModel",
            predict=_lumina2,
            returns=_WITH_MASKS,
            conditions=_MASKED,
            patch=2,
            length=256,
        ),
        Family(
            pipeline="AuraFlowPipeline",
            network="AuraFlowTransformer2DModel",
            predict=_aura_flow,
            returns=_WITH_MASKS,
            conditions=_MASKED,
            patch=2,
            length=256,
        ),
    )
}
"""By the name of the pipeline."""
