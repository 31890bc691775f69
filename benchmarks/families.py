"""Networks of the families with random weights: small ones for a CPU, and at their published size.

The published sizes have a base in bfloat16 and gradient checkpointing; the small ones are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dp_lora.models.adapters import target_names
from dp_lora.models.families import FAMILIES, Inputs
from dp_lora.models.networks import compute_in_float32, has_bfloat16, keep_less

_PROMPTS = 10


@dataclass(frozen=True)
class Network:
    """A network of a family.

    Fields:
        pipeline: the name of the family.
        config: of the network.
        latent: channels and side of the latents, before they are packed.
        conditions: the shape of each for one prompt; masks are all ones.
        published: whether it has its published size.
    """

    pipeline: str
    config: dict[str, Any]
    latent: tuple[int, int]
    conditions: dict[str, tuple[int, ...]]
    published: bool = False


_SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
_SD35: dict[str, Any] = {"patch_size": 2, "in_channels": 16, "out_channels": 16, "qk_norm": "rms_norm"}

NETWORKS = {
    "sdxl_small": Network(
        "StableDiffusionXLPipeline",
        {
            **_SDXL,
            "sample_size": 32,
            "block_out_channels": (64, 128, 256),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 1, 2),
            "cross_attention_dim": 256,
            "attention_head_dim": (2, 4, 8),
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 32 + 128,
        },
        (4, 32),
        {"prompt_embeds": (77, 256), "pooled_prompt_embeds": (128,)},
    ),
    "sd35_small": Network(
        "StableDiffusion3Pipeline",
        {
            **_SD35,
            "sample_size": 32,
            "num_layers": 6,
            "attention_head_dim": 32,
            "num_attention_heads": 8,
            "joint_attention_dim": 256,
            "caption_projection_dim": 256,
            "pooled_projection_dim": 128,
            "pos_embed_max_size": 32,
            "dual_attention_layers": (0, 1, 2),
        },
        (16, 32),
        {"prompt_embeds": (96, 256), "pooled_prompt_embeds": (128,)},
    ),
    "flux_small": Network(
        "FluxPipeline",
        {
            "in_channels": 64,
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 8,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 128,
            "axes_dims_rope": (8, 12, 12),
            "guidance_embeds": True,
        },
        (16, 32),
        {"prompt_embeds": (96, 256), "pooled_prompt_embeds": (128,)},
    ),
    "sana_small": Network(
        "SanaPipeline",
        {
            "in_channels": 32,
            "out_channels": 32,
            "num_layers": 6,
            "num_attention_heads": 8,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 8,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 256,
            "caption_channels": 256,
            "sample_size": 16,
        },
        (32, 16),
        {"prompt_embeds": (96, 256), "prompt_attention_mask": (96,)},
    ),
    "flux2_small": Network(
        "Flux2Pipeline",
        {
            "in_channels": 64,
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 8,
            "joint_attention_dim": 256,
            "timestep_guidance_channels": 64,
            "axes_dims_rope": (8, 8, 8, 8),
        },
        (64, 16),
        {"prompt_embeds": (96, 256)},
    ),
    "chroma_small": Network(
        "ChromaPipeline",
        {
            "in_channels": 64,
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 8,
            "joint_attention_dim": 256,
            "axes_dims_rope": (8, 12, 12),
            "approximator_hidden_dim": 256,
            "approximator_layers": 2,
        },
        (16, 32),
        {"prompt_embeds": (96, 256), "prompt_attention_mask": (96,)},
    ),
    "qwen_small": Network(
        "QwenImagePipeline",
        {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 6,
            "attention_head_dim": 32,
            "num_attention_heads": 8,
            "joint_attention_dim": 256,
            "axes_dims_rope": (8, 12, 12),
        },
        (16, 32),
        {"prompt_embeds": (96, 256), "prompt_embeds_mask": (96,)},
    ),
    "pixart_small": Network(
        "PixArtSigmaPipeline",
        {
            "sample_size": 32,
            "num_layers": 6,
            "patch_size": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 8,
            "cross_attention_dim": 256,
            "caption_channels": 256,
            "in_channels": 4,
            "out_channels": 8,
            "norm_type": "ada_norm_single",
        },
        (4, 32),
        {"prompt_embeds": (96, 256), "prompt_attention_mask": (96,)},
    ),
    "lumina2_small": Network(
        "Lumina2Pipeline",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 256,
            "num_layers": 6,
            "num_refiner_layers": 1,
            "num_attention_heads": 8,
            "num_kv_heads": 4,
            "multiple_of": 64,
            "axes_dim_rope": (8, 12, 12),
            "axes_lens": (256, 32, 32),
            "cap_feat_dim": 256,
        },
        (16, 32),
        {"prompt_embeds": (96, 256), "prompt_attention_mask": (96,)},
    ),
    "aura_flow_small": Network(
        "AuraFlowPipeline",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 8,
            "joint_attention_dim": 256,
            "caption_projection_dim": 256,
            "out_channels": 4,
            "pos_embed_max_size": 1024,
        },
        (4, 32),
        {"prompt_embeds": (96, 256)},
    ),
    "sdxl": Network(
        "StableDiffusionXLPipeline",
        {
            **_SDXL,
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (4, 128),
        {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)},
        published=True,
    ),
    "sd35_large": Network(
        "StableDiffusion3Pipeline",
        {
            **_SD35,
            "sample_size": 128,
            "num_layers": 38,
            "attention_head_dim": 64,
            "num_attention_heads": 38,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        (16, 128),
        {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},
        published=True,
    ),
    "flux": Network(
        "FluxPipeline",
        {"guidance_embeds": True},
        (16, 128),
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        published=True,
    ),
    "sana": Network(
        "SanaPipeline",
        {},
        (32, 32),
        {"prompt_embeds": (300, 2304), "prompt_attention_mask": (300,)},
        published=True,
    ),
}
"""By the word for `--sizes`."""


@contextmanager
def _in_precision(dtype: torch.dtype) -> Iterator[None]:
    """While this holds, what is made has `dtype`: the weights never lie there in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class FamilyModel(nn.Module):
    """LoRA on all attention projections of a network of a family; B is not zero.

    Args:
        network: its size.
        rank: of the adapters.
        device: on which it is made.
        side: of the latents, in place of the network's own.
    """

    def __init__(self, network: Network, rank: int, device: str = "cpu", side: int | None = None) -> None:
        super().__init__()
        self.family = FAMILIES[network.pipeline]
        self.low, self.channels = network.published, network.latent[0]
        with torch.device(device):
            with _in_precision(torch.bfloat16 if self.low else torch.float32):
                self.unet: Any = getattr(diffusers, self.family.network)(**network.config)
            self.unet.requires_grad_(False)
            names = target_names(self.unet, ["qkv", "proj"], rank)
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights="gaussian")
            inject_adapter_in_model(config, self.unet)
            for name, parameter in self.unet.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
                    if "lora_B" in name:
                        nn.init.normal_(parameter, std=0.05)
            for name, shape in network.conditions.items():
                masks = name.endswith("mask")
                value = torch.ones(_PROMPTS, *shape) if masks else torch.randn(_PROMPTS, *shape)
                self.register_buffer(name, value.bool() if masks else value)
        self.names = tuple(network.conditions)
        self.side = 8 * (side or network.latent[1])
        if self.low:
            compute_in_float32(self.unet)
            keep_less(self.unet)
        self.eval()

    def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        conditions = {name: self.get_buffer(name)[labels] for name in self.names}
        low = self.low and has_bfloat16(noisy.device)
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=low):
            given = Inputs(noisy, timesteps.float(), conditions, 1000, self.side)
            return self.family.predict(self.unet, given)[:, : self.channels].float()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
