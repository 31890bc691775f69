"""Pipelines of diffusers as their authors publish them in one file, under the original names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dp_lora.models import compvis


def _ldm(network: Any, prefix: str) -> dict[str, Tensor]:
    """A UNet or an autoencoder under the names of latent diffusion."""
    values = network.state_dict()
    # SDXL's sizes of the image are embedded where other models have labels.
    added = {
        f"label_emb.0.{place}.{kind}": values.pop(f"add_embedding.linear_{number}.{kind}")
        for number, place in ((1, 0), (2, 2))
        for kind in ("weight", "bias")
        if f"add_embedding.linear_{number}.{kind}" in values
    }
    layers = dict(
        compvis._autoencoder_layers(network) if hasattr(network, "encoder") else compvis._unet_layers(network)
    )
    found = dict(added)
    for key, value in values.items():
        layer, _, kind = key.rpartition(".")
        original = f"{compvis._renamed(layer, layers)}.{kind}"
        squares = hasattr(network, "encoder") and value.ndim == 2
        found[original] = value[:, :, None, None] if squares else value
    return {prefix + name: value.contiguous() for name, value in found.items()}


def stable_diffusion(pipe: Any) -> dict[str, Tensor]:
    """Stable Diffusion 1.x, whole."""
    text = pipe.text_encoder.state_dict()
    return {
        **_ldm(pipe.unet, "model.diffusion_model."),
        **_ldm(pipe.vae, "first_stage_model."),
        **{
            f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value.contiguous()
            for name, value in text.items()
        },
    }


def sdxl(pipe: Any) -> dict[str, Tensor]:
    """SDXL without its text encoders."""
    return {**_ldm(pipe.unet, "model.diffusion_model."), **_ldm(pipe.vae, "first_stage_model.")}


_SD3 = (
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0", r"joint_blocks.\1.x_block.attn.proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (
        r"^transformer_blocks\.(\d+)\.norm1_context\.linear",
        r"joint_blocks.\1.context_block.adaLN_modulation.1",
    ),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
)


def sd3(pipe: Any) -> dict[str, Tensor]:
    """SD 3 without its text encoders."""
    values = pipe.transformer.state_dict()
    last = len(pipe.transformer.transformer_blocks) - 1
    halves = {
        "x_block": ("to_q", "to_k", "to_v"),
        "context_block": ("add_q_proj", "add_k_proj", "add_v_proj"),
    }
    found = {}
    for block in range(last + 1):
        for half, names in halves.items():
            for kind in ("weight", "bias"):
                three = [values.pop(f"transformer_blocks.{block}.attn.{name}.{kind}") for name in names]
                found[f"joint_blocks.{block}.{half}.attn.qkv.{kind}"] = torch.cat(three)
    for key, value in values.items():
        if key.startswith(("norm_out", f"transformer_blocks.{last}.norm1_context")):
            # The original has the shift before the scale.
            value = torch.cat(value.chunk(2)[::-1])
        for pattern, original in _SD3:
            key = re.sub(pattern, original, key)
        found[key] = value
    prefixed = {f"model.diffusion_model.{name}": value.contiguous() for name, value in found.items()}
    return {**prefixed, **_ldm(pipe.vae, "first_stage_model.")}


ORIGINALS = {"sd1": stable_diffusion, "sdxl": sdxl, "sd3": sd3}


def in_one_file(kind: str, pipe: Any, saved: Path, folder: Path) -> tuple[Path, Path]:
    """The file, and the settings with the weights of what it lacks, of a pipeline that is in `saved`."""
    path = folder / f"{kind}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone() for name, value in ORIGINALS[kind](pipe).items()}, path)
    settings = shutil.copytree(saved, folder / f"{kind}-settings")
    inside = {"sd1": ("unet", "vae", "text_encoder"), "sdxl": ("unet", "vae"), "sd3": ("transformer", "vae")}
    for part in inside[kind]:
        for weights in (settings / part).glob("*.safetensors"):
            weights.unlink()
    return path, settings
