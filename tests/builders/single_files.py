"""Pipelines of diffusers as their authors publish them in one file, under the original names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
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


_OPENCLIP = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    (".self_attn.", ".attn."),
    ("embeddings.token_embedding.", "token_embedding."),
    ("final_layer_norm.", "ln_final."),
)


def _openclip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """A text encoder under OpenCLIP's names, with one matrix for queries, keys and values."""
    values = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    found = {"logit_scale": torch.tensor(4.6)}
    found["positional_embedding"] = values.pop("embeddings.position_embedding.weight")
    if "text_projection.weight" in values:
        found["text_projection"] = values.pop("text_projection.weight").T
    for name in [name for name in values if ".q_proj." in name]:
        three = [values.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        layer, kind = name.split(".q_proj.")
        values[f"{layer}.in_proj_{kind}"] = torch.cat(three)
    for key, value in values.items():
        for ours, theirs in (*_OPENCLIP, (".self_attn", ".attn")):
            key = key.replace(ours, theirs)
        found[key] = value
    return {prefix + name: value.contiguous() for name, value in found.items()}


def stable_diffusion_2(pipe: Any) -> dict[str, Tensor]:
    """Stable Diffusion 2.x, whole: its text encoder has one more block, which is not used."""
    text = _openclip(pipe.text_encoder, "cond_stage_model.model.")
    block = "cond_stage_model.model.transformer.resblocks."
    unused = {
        name.replace(f"{block}0.", f"{block}23."): torch.randn(value.shape)
        for name, value in text.items()
        if name.startswith(f"{block}0.")
    }
    width = pipe.text_encoder.config.hidden_size
    projection = {"cond_stage_model.model.text_projection": torch.randn(width, width)}
    return {
        **_ldm(pipe.unet, "model.diffusion_model."),
        **_ldm(pipe.vae, "first_stage_model."),
        **text,
        **unused,
        **projection,
    }


def sdxl(pipe: Any) -> dict[str, Tensor]:
    """SDXL without its text encoders."""
    return {**_ldm(pipe.unet, "model.diffusion_model."), **_ldm(pipe.vae, "first_stage_model.")}


def sdxl_whole(pipe: Any) -> dict[str, Tensor]:
    """SDXL with both of its text encoders, as it is published."""
    prefix = "conditioner.embedders.0.transformer.text_model."
    text = pipe.text_encoder.state_dict().items()
    return {
        **sdxl(pipe),
        **{prefix + name.removeprefix("text_model."): value.contiguous() for name, value in text},
        **_openclip(pipe.text_encoder_2, "conditioner.embedders.1.model."),
    }


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


_FLUX = (
    (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_(q|k)\.weight", r"double_blocks.\1.img_attn.norm.\2.scale"),
    (
        r"^transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)\.weight",
        r"double_blocks.\1.txt_attn.norm.\2.scale",
    ),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_(q|k)\.weight", r"single_blocks.\1.norm.\2.scale"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"\.norm\.q\.scale$", ".norm.query_norm.scale"),
    (r"\.norm\.k\.scale$", ".norm.key_norm.scale"),
)
_FLUX_JOINED = (
    ("transformer_blocks", "double_blocks", "img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    (
        "transformer_blocks",
        "double_blocks",
        "txt_attn.qkv",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    (
        "single_transformer_blocks",
        "single_blocks",
        "linear1",
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ),
)
"""Blocks of ours, those of the original, and its matrix that several of ours are parts of."""


def flux_transformer(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of FLUX.1's transformer under their original names."""
    values, found = dict(values), {}
    for ours, theirs, joined, parts in _FLUX_JOINED:
        for first in [name for name in values if re.match(rf"{ours}\.\d+\.{parts[0]}\.", name)]:
            number, kind = first.split(".")[1], first.rpartition(".")[2]
            rows = [values.pop(f"{ours}.{number}.{part}.{kind}") for part in parts]
            found[f"{theirs}.{number}.{joined}.{kind}"] = torch.cat(rows)
    for key, value in values.items():
        if key.startswith("norm_out"):
            # The original has the shift before the scale.
            value = torch.cat(value.chunk(2)[::-1])
        for pattern, original in _FLUX:
            key = re.sub(pattern, original, key)
        found[key] = value
    return found


def flux(pipe: Any) -> dict[str, Tensor]:
    """FLUX.1's transformer alone, as it is published."""
    return {
        name: value.contiguous() for name, value in flux_transformer(pipe.transformer.state_dict()).items()
    }


def flux_converter(width: int) -> Any:
    """Diffusers' converter of FLUX.1, which has the published width 3072 as a constant, for another width."""
    code = convert_flux_transformer_checkpoint_to_diffusers.__code__
    assert 3072 in code.co_consts, code.co_consts
    narrow = tuple(width if constant == 3072 else constant for constant in code.co_consts)
    return FunctionType(
        code.replace(co_consts=narrow), convert_flux_transformer_checkpoint_to_diffusers.__globals__
    )


ORIGINALS = {
    "sd1": stable_diffusion,
    "sd2": stable_diffusion_2,
    "sdxl": sdxl,
    "sdxl_whole": sdxl_whole,
    "sd3": sd3,
    "flux": flux,
}


def in_one_file(kind: str, pipe: Any, saved: Path, folder: Path) -> tuple[Path, Path]:
    """The file, and the settings with the weights of what it lacks, of a pipeline that is in `saved`."""
    path = folder / f"{kind}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone() for name, value in ORIGINALS[kind](pipe).items()}, path)
    settings = shutil.copytree(saved, folder / f"{kind}-settings")
    inside = {
        "sd1": ("unet", "vae", "text_encoder"),
        "sd2": ("unet", "vae", "text_encoder"),
        "sdxl": ("unet", "vae"),
        "sdxl_whole": ("unet", "vae", "text_encoder", "text_encoder_2"),
        "sd3": ("transformer", "vae"),
        "flux": ("transformer",),
    }
    for part in inside[kind]:
        for weights in (settings / part).glob("*.safetensors"):
            weights.unlink()
    return path, settings
