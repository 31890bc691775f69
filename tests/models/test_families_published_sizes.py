"""Each family's network at its published size, on the meta device: its size, its targets, its adapters."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from dp_lora.models.adapters import target_names
from dp_lora.models.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

RANK = 8

Layers = dict[tuple[int, int], int]
"""The number of layers of each width (in, out)."""


class Published(NamedTuple):
    """A published network: its parameters, and the projections of its attention by hand."""

    pipeline: str
    config: dict[str, Any]
    parameters: int
    layers: Layers


_SD3: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}

PUBLISHED = {
    # 10 blocks of 640 channels and 60 of 1280, each with attention to the image and to the text of 2048.
    "stable-diffusion-xl-base-1.0": Published(
        "StableDiffusionXLPipeline",
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
        {(640, 640): 6 * 10, (2048, 640): 2 * 10, (1280, 1280): 6 * 60, (2048, 1280): 2 * 60},
    ),
    # Four projections of the image and four of the text a block. The text does not leave the last one,
    # which has no projection out of it, and whose queries of the text have no effect.
    "stable-diffusion-3-medium": Published(
        "StableDiffusion3Pipeline",
        {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
         "pos_embed_max_size": 192},
        2_028_328_000,
        {(1536, 1536): 8 * 24 - 2},
    ),
    # 13 blocks have a second attention to the image.
    "stable-diffusion-3.5-medium": Published(
        "StableDiffusion3Pipeline",
        {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
         "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        2_243_171_520,
        {(1536, 1536): 8 * 24 - 2 + 4 * 13},
    ),
    "stable-diffusion-3.5-large": Published(
        "StableDiffusion3Pipeline",
        {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
         "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
        8_056_627_520,
        {(2432, 2432): 8 * 38 - 2},
    ),
    # 19 blocks with eight projections, 38 with three.
    "FLUX.1-dev": Published(
        "FluxPipeline", {"guidance_embeds": True}, 11_901_408_320, {(3072, 3072): 8 * 19 + 3 * 38}
    ),
    # 8 blocks with eight projections; 48 with one matrix into queries, keys, values and both halves of the
    # gated layer (3 x 6,144 and 2 x 18,432), and one out of them.
    "FLUX.2-dev": Published(
        "Flux2Pipeline",
        {},
        32_223_281_152,
        {(6144, 6144): 8 * 8, (6144, 55296): 48, (24576, 6144): 48},
    ),
    "Chroma1-HD": Published("ChromaPipeline", {}, 8_899_983_424, {(3072, 3072): 8 * 19 + 3 * 38}),
    # As SD 3, but the last block has a projection out of the text, without an effect.
    "Qwen-Image": Published("QwenImagePipeline", {}, 20_430_401_088, {(3072, 3072): 8 * 60 - 2}),
    "PixArt-Sigma-XL-2-1024-MS": Published(
        "PixArtSigmaPipeline",
        {"caption_channels": 4096, "cross_attention_dim": 1152, "use_additional_conditions": False},
        610_856_096,
        {(1152, 1152): 8 * 28},
    ),
    "Sana_1600M_1024px": Published("SanaPipeline", {}, 1_604_462_752, {(2240, 2240): 8 * 20}),
    # 26 blocks and four of the refiners; keys and values of a third of the heads.
    "Lumina-Image-2.0": Published(
        "Lumina2Pipeline",
        {"cap_feat_dim": 2304},
        2_609_769_152,
        {(2304, 2304): 2 * 30, (2304, 768): 2 * 30},
    ),
    "AuraFlow": Published("AuraFlowPipeline", {}, 6_833_439_744, {(3072, 3072): 8 * 4 + 4 * 32}),
}  # fmt: skip


def test_every_family_has_a_published_network() -> None:
    # These two have the network of another one.
    others = {"PixArtAlphaPipeline", "Flux2KleinPipeline"}
    assert {published.pipeline for published in PUBLISHED.values()} | others == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_adapters_at_the_published_size(name: str) -> None:
    published = PUBLISHED[name]
    with torch.device("meta"):
        network = getattr(diffusers, FAMILIES[published.pipeline].network)(**published.config)
        assert sum(p.numel() for p in network.parameters()) == published.parameters
        names = target_names(network, ["qkv", "proj"], RANK)
        layers = [network.get_submodule(layer) for layer in names]
        assert Counter((layer.in_features, layer.out_features) for layer in layers) == published.layers
        inject_adapter_in_model(LoraConfig(r=RANK, target_modules=names), network)
    adapters = sum(p.numel() for name, p in network.named_parameters() if "lora_" in name)
    assert adapters == RANK * sum(sum(sides) * count for sides, count in published.layers.items())
