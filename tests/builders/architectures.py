"""Every kind of model at a size for tests: built from a configuration, or from a pipeline written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dp_lora.config.schema import AutoencoderConfig, ModelConfig, UNetConfig
from dp_lora.models.folders import LatentDiffusion, build, load

CLASSES = ("cat", "dog", "fox")

AUTOENCODER = AutoencoderConfig(
    latent_channels=3,
    block_out_channels=[8, 16],
    norm_num_groups=4,
    attention=[False, True],
    mid_attention=True,
)
VQ = AutoencoderConfig(
    kind="vq",
    latent_channels=3,
    block_out_channels=[8, 16],
    norm_num_groups=4,
    mid_attention=True,
    num_codes=24,
)
SPATIAL_TRANSFORMER = ModelConfig(
    name="spatial_transformer",
    autoencoder=VQ,
    unet=UNetConfig(
        block_out_channels=[8, 16],
        attention=[False, True],
        layers_per_block=2,
        cross_attention_dim=5,
        head_dim=4,
        norm_num_groups=4,
    ),
)
RESNET_UPDOWN = ModelConfig(
    name="resnet_updown",
    autoencoder=AUTOENCODER,
    unet=UNetConfig(
        block_out_channels=[8, 16],
        attention=[True, False],
        cross_attention_dim=5,
        num_heads=2,
        norm_num_groups=4,
        scale_shift_norm=True,
        resnet_updown=True,
    ),
)
ATTENTION_BLOCK = ModelConfig(
    name="attention_block",
    conditioning="none",
    autoencoder=AUTOENCODER,
    unet=UNetConfig(
        block_out_channels=[8, 16],
        attention=[True, True],
        layers_per_block=2,
        num_heads=2,
        norm_num_groups=4,
        scale_shift_norm=True,
        resnet_updown=True,
    ),
)
PLAIN_ATTENTION_BLOCK = ModelConfig(
    name="plain_attention_block",
    conditioning="none",
    autoencoder=VQ,
    unet=UNetConfig(block_out_channels=[8, 16], attention=[False, True], head_dim=4, norm_num_groups=4),
)
BUILT = {
    config.name: config
    for config in (SPATIAL_TRANSFORMER, RESNET_UPDOWN, ATTENTION_BLOCK, PLAIN_ATTENTION_BLOCK)
}


def built(config: ModelConfig, seed: int = 0) -> LatentDiffusion:
    """A model for 3 x 8 x 8 images, latents 3 x 4 x 4, every parameter random: none is zero at first."""
    torch.manual_seed(seed)
    return shaken(build(config, classes=CLASSES, channels=3, image_size=8)).eval()


def shaken(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return module


def stable_diffusion(folder: Path, prediction_type: str = "epsilon", *, second: bool = False) -> Path:
    """A text-to-image pipeline with four tokens a prompt; as version 2.x has its UNet, if `second`."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=(2, 4) if second else 2,
        use_linear_projection=second,
        norm_num_groups=4,
    )
    text = CLIPTextConfig(
        vocab_size=64,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=shaken(CLIPTextModel(text)),
        tokenizer=_tokenizer(folder),
        unet=shaken(unet),
        scheduler=_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer of single letters, as CLIP's files say them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    files = folder.with_name(f"{folder.name}-tokens")
    files.mkdir()
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(
        files,
        model_max_length=8,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def dit(folder: Path) -> Path:
    """A class-conditional diffusion transformer that predicts the variance too."""
    torch.manual_seed(0)
    transformer = shaken(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=3,
            out_channels=6,
            num_layers=2,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=len(CLASSES),
        )
    )
    blocks = [block.norm1.emb for block in transformer.transformer_blocks]
    for block in blocks:
        # As every published DiT: each block has a copy of one table and one embedding of the timestep.
        block.load_state_dict(blocks[0].state_dict())
    DiTPipeline(transformer, _vae(), _scheduler()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    # As in the published ones: the pipeline reads it and does not write it.
    index["id2label"] = {str(i): name for i, name in enumerate(CLASSES)}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def ldm(folder: Path, classes: int | None = None) -> Path:
    """An LDM pipeline, without classes or with embeddings of them beside the timestep's."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=classes,
    )
    vqvae = shaken(
        VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            latent_channels=3,
            norm_num_groups=4,
            num_vq_embeddings=24,
            sample_size=8,
            scaling_factor=0.5,
        )
    )
    LDMPipeline(vqvae, shaken(unet), _scheduler()).save_pretrained(folder)
    return folder


def _vae() -> AutoencoderKL:
    return shaken(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            latent_channels=3,
            norm_num_groups=4,
            sample_size=8,
            scaling_factor=0.3,
        )
    )


def _scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


PIPELINES: dict[str, Callable[[Path], Path]] = {
    "stable_diffusion": stable_diffusion,
    "dit": dit,
    "ldm": ldm,
    "ldm_classes": lambda folder: ldm(folder, classes=len(CLASSES)),
}
ARCHITECTURES = (*BUILT, *PIPELINES)


def model_of(kind: str, folder: Path) -> LatentDiffusion:
    """A fresh model of one of `ARCHITECTURES`; a pipeline is written below `folder` and loaded."""
    if kind in BUILT:
        return built(BUILT[kind])
    place = folder / kind
    # Eight tokens of a letter each: only the name of a class fits.
    model = load(place if place.exists() else PIPELINES[kind](place), prompt="{}")
    if model.prompts is not None:
        model.new_classes(CLASSES, torch.Generator().manual_seed(0))
    return model


def one_tensor_less(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)
