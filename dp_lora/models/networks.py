"""The networks of a latent diffusion model, as diffusers models, from a configuration.

Layouts are those of CompVis latent diffusion: a UNet with spatial transformers for a class token, a UNet with
attention blocks without one, and an autoencoder with a Gaussian (KL) or a quantised (VQ) latent. Where
diffusers has no setting for a part of them, the part is changed after its network was built and noted in the
network's configuration, so that `complete` can do it again when the network is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ChromaTransformer2DModel,
    DiTTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_chroma import (
    ChromaSingleTransformerBlock,
    ChromaTransformerBlock,
)
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D
from torch import Tensor, cat, nn
from torch.utils.checkpoint import checkpoint

from dp_lora.config.schema import AutoencoderConfig, UNetConfig

EXTRAS = ("num_heads", "resnet_updown")
"""Entries of a saved configuration that diffusers does not know: `complete` reads them."""


# Attention


class SingleTokenAttention:
    """Cross-attention to one token, exactly: the softmax over one key is 1, so the output is the value.

    The queries and keys then change nothing, so they are not computed; their gradient is zero.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert encoder_hidden_states.shape[1] == 1, "one condition token expected"
        value: Tensor = attn.to_out[1](attn.to_out[0](attn.to_v(encoder_hidden_states)))
        return value.expand(-1, hidden_states.shape[1], -1)


def attentions(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every attention of `network` with its name: diffusers' own class, or one of a transformer's."""
    return (
        (name, part)
        for name, part in network.named_modules()
        if isinstance(part, Attention) or all(hasattr(part, end) for end in ("to_q", "to_k", "to_v"))
    )


def shorten_cross_attention(unet: nn.Module) -> None:
    """Gives every cross-attention of a network conditioned on one token the exact shortcut."""
    for _, attention in attentions(unet):
        if getattr(attention, "is_cross_attention", False):
            attention.set_processor(SingleTokenAttention())


def without_effect(unet: nn.Module) -> set[str]:
    """Names of the modules that change nothing of what the network predicts.

    They feed only the queries and keys of attention to one token, or the text after the last block.
    """
    names = _text_at_the_end(unet)
    for name, attention in attentions(unet):
        if isinstance(attention.processor, SingleTokenAttention):
            block = name.rpartition(".")[0]
            names |= {f"{name}.to_q", f"{name}.to_k", f"{block}.norm2"}
    return names


def _text_at_the_end(network: nn.Module) -> set[str]:
    """Names of the modules of the last block that only the text passes, where it goes no further."""
    ends = {
        SD3Transformer2DModel: ("attn.add_q_proj",),
        QwenImageTransformer2DModel: ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"),
    }.get(type(network))
    if ends is None:
        return set()
    blocks = list(network.get_submodule("transformer_blocks").children())
    last = f"transformer_blocks.{len(blocks) - 1}"
    parts = {f"{last}.{end}": network.get_submodule(f"{last}.{end}") for end in ends}
    return {name for root, part in parts.items() for name, _ in part.named_modules(prefix=root)}


def fuses(unet: nn.Module) -> bool:
    """Whether the attention of `unet` has one matrix for queries, keys and values in the CompVis layout."""
    return isinstance(unet, UNet2DModel)


def fuse(attention: Attention) -> None:
    """One matrix `to_qkv` in place of three: the `qkv` of CompVis, which has one adapter."""
    attention.fuse_projections()
    del attention.to_q, attention.to_k, attention.to_v
    attention.set_processor(FusedAttnProcessor2_0())


# Building


def build_autoencoder(config: AutoencoderConfig, channels: int, image_size: int) -> AutoencoderKL | VQModel:
    """An autoencoder for square images. Raises ValueError where its sizes do not fit each other."""
    levels = len(config.block_out_channels)
    attention = config.attention or [False] * levels
    sizes: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": tuple(_named(attention, "AttnDownEncoderBlock2D", "DownEncoderBlock2D")),
        "up_block_types": tuple(_named(attention[::-1], "AttnUpDecoderBlock2D", "UpDecoderBlock2D")),
        "block_out_channels": tuple(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "sample_size": image_size,
        "mid_block_add_attention": config.mid_attention,
        "scaling_factor": 1.0,
    }
    if config.kind == "vq":
        return VQModel(**sizes, num_vq_embeddings=config.num_codes)
    return AutoencoderKL(**sizes)


def build_unet(
    config: UNetConfig, conditioning: str, latent_channels: int, latent_size: int
) -> UNet2DConditionModel | UNet2DModel:
    """A UNet for latents [latent_channels, latent_size, latent_size].

    Raises ValueError where its sizes do not fit each other.
    """
    sizes: dict[str, Any] = {
        "sample_size": latent_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": tuple(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }
    if conditioning == "class":
        return _spatial_transformer_unet(config, sizes)
    return _attention_block_unet(config, sizes)


def _spatial_transformer_unet(config: UNetConfig, sizes: dict[str, Any]) -> UNet2DConditionModel:
    plain = ("Resnet{}sampleBlock2D", "Resnet{}sampleBlock2D") if config.resnet_updown else ("{}Block2D",) * 2
    channels = config.block_out_channels
    heads = [config.num_heads if config.head_dim is None else c // config.head_dim for c in channels]
    unet = UNet2DConditionModel(
        **sizes,
        down_block_types=tuple(_named(config.attention, "CrossAttnDownBlock2D", plain[0].format("Down"))),
        up_block_types=tuple(_named(config.attention[::-1], "CrossAttnUpBlock2D", plain[1].format("Up"))),
        cross_attention_dim=config.cross_attention_dim,
        # What diffusers calls by this name is the number of heads (diffusers issue 2011).
        attention_head_dim=heads[0] if len(set(heads)) == 1 else tuple(heads),
    )
    complete(unet, {"resnet_updown": True} if config.resnet_updown else {})
    return unet


def _attention_block_unet(config: UNetConfig, sizes: dict[str, Any]) -> UNet2DModel:
    resample = "resnet" if config.resnet_updown else "conv"
    plain = ("Resnet{}sampleBlock2D" if config.resnet_updown else "{}Block2D").format
    unet = UNet2DModel(
        **sizes,
        down_block_types=tuple(_named(config.attention, "AttnDownBlock2D", plain("Down"))),
        up_block_types=tuple(_named(config.attention[::-1], "AttnUpBlock2D", plain("Up"))),
        downsample_type=resample,
        upsample_type=resample,
        # None: one head a level.
        attention_head_dim=config.head_dim,
        # Without it the middle attention loses its norm where the timestep scales and shifts.
        attn_norm_num_groups=config.norm_num_groups,
    )
    several = config.head_dim is None and config.num_heads > 1
    complete(unet, {"num_heads": config.num_heads} if several else {})
    return unet


def _named(attention: list[bool], with_attention: str, without: str) -> list[str]:
    return [with_attention if attends else without for attends in attention]


def complete(network: nn.Module, config: Mapping[str, Any]) -> None:
    """Makes of `network`, in place, what the entries `EXTRAS` of its saved configuration ask for.

    num_heads: of every level's attention block; diffusers sets channels a head. resnet_updown: residual
    blocks resample between levels of spatial transformers; diffusers has convolutions there.
    """
    if (heads := config.get("num_heads")) and isinstance(network, UNet2DModel):
        for _, attention in attentions(network):
            attention.heads = heads
        network.register_to_config(num_heads=heads)
    if config.get("resnet_updown") and isinstance(network, UNet2DConditionModel):
        for block in (*network.down_blocks, *network.up_blocks):
            _resample_by_resnets(block, network.config)
        network.register_to_config(resnet_updown=True)


def _resample_by_resnets(block: nn.Module, config: Mapping[str, Any]) -> None:
    """Changes a block with spatial transformers; the others have block types of diffusers for it."""
    down = isinstance(block, CrossAttnDownBlock2D)
    if not down and not isinstance(block, CrossAttnUpBlock2D):
        return
    block.__class__ = _ResnetDownBlock if down else _ResnetUpBlock
    name = "downsamplers" if down else "upsamplers"
    if getattr(block, name) is None:
        return
    channels = block.get_submodule("resnets.0").out_channels
    resnet = ResnetBlock2D(
        in_channels=channels,
        out_channels=channels,
        temb_channels=config["block_out_channels"][0] * 4,
        eps=config["norm_eps"],
        groups=config["norm_num_groups"],
        time_embedding_norm=config["resnet_time_scale_shift"],
        down=down,
        up=not down,
    )
    setattr(block, name, nn.ModuleList([resnet]))


class _ResnetDownBlock(CrossAttnDownBlock2D):  # type: ignore[misc]
    """Its last residual block halves the resolution, and takes the timestep."""

    def forward(
        self, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor, **unused: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        states: tuple[Tensor, ...] = ()
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            hidden_states = resnet(hidden_states, temb)
            hidden_states = attention(hidden_states, encoder_hidden_states, return_dict=False)[0]
            states += (hidden_states,)
        for resnet in self.downsamplers or ():
            hidden_states = resnet(hidden_states, temb)
            states += (hidden_states,)
        return hidden_states, states


class _ResnetUpBlock(CrossAttnUpBlock2D):  # type: ignore[misc]
    """Its last residual block doubles the resolution, and takes the timestep."""

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        encoder_hidden_states: Tensor,
        **unused: Any,
    ) -> Tensor:
        skipped = reversed(res_hidden_states_tuple)
        for resnet, attention, skip in zip(self.resnets, self.attentions, skipped, strict=True):
            hidden_states = resnet(cat([hidden_states, skip], dim=1), temb)
            hidden_states = attention(hidden_states, encoder_hidden_states, return_dict=False)[0]
        for resnet in self.upsamplers or ():
            hidden_states = resnet(hidden_states, temb)
        return hidden_states


# Gradient checkpointing


def keep_less(network: Any) -> None:
    """Gradient checkpointing, in place: a block keeps its inputs alone, and is run again in the backward."""
    if not isinstance(network, ChromaTransformer2DModel):
        network.enable_gradient_checkpointing()
        return
    # Diffusers' own leaves the mask out of the single blocks, so that padding is read as text.
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        block.__class__ = {
            ChromaTransformerBlock: _LeanBlock,
            ChromaSingleTransformerBlock: _LeanSingleBlock,
        }.get(type(block), type(block))


def _run_again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


class _LeanBlock(ChromaTransformerBlock):  # type: ignore[misc]
    """A block that keeps its inputs alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run_again(super().forward, *args, **kwargs)


class _LeanSingleBlock(ChromaSingleTransformerBlock):  # type: ignore[misc]
    """A block that keeps its inputs alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run_again(super().forward, *args, **kwargs)


# Weights that are kept in bfloat16


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16: a CPU without it takes minutes for one convolution."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_in_float32(network: nn.Module) -> None:
    """Lets each layer whose weights are in bfloat16 compute in float32 wherever autocast is off."""
    for part in network.modules():
        if any(p.dtype == torch.bfloat16 for p in part.parameters(recurse=False)):
            part.register_forward_pre_hook(_raise, with_kwargs=True)
            # Also where a forward that is run again stops half-way.
            part.register_forward_hook(_lower, always_call=True)


def _raise(part: nn.Module, args: Any, kwargs: Any) -> Any:
    own = vars(part)["_parameters"]
    if any(torch.is_autocast_enabled(p.device.type) for p in own.values() if p is not None):
        return None
    vars(part)["_kept"] = own
    vars(part)["_parameters"] = {name: _raised(p) for name, p in own.items()}
    return tuple(map(_raised, args)), {name: _raised(value) for name, value in kwargs.items()}


def _raised(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if low else value


def _lower(part: nn.Module, args: Any, out: Any) -> None:
    if (kept := vars(part).pop("_kept", None)) is not None:
        vars(part)["_parameters"] = kept


# The statistics of FLUX.2's autoencoder


class Statistics(nn.Module):
    """The means and variances that a BatchNorm kept, as constants: nothing of a batch enters."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for name, value in norm.named_buffers():
            self.register_buffer(name, value)


def keep_statistics(autoencoder: nn.Module) -> None:
    """Puts `Statistics` in the place of the BatchNorm whose means and variances scale FLUX.2's latents."""
    if isinstance(norm := getattr(autoencoder, "bn", None), nn.BatchNorm2d):
        autoencoder.bn = Statistics(norm)


# A table of class embeddings inside of a network


def take_class_table(network: nn.Module) -> nn.Embedding | None:
    """The class embeddings of a network that adds them to those of the timestep, taken out of it.

    `network` is changed in place: it takes embeddings [B, d] where it took labels. A DiT has a copy in each
    block. Returns None for a network without one; raises ValueError when the copies differ.
    """
    if isinstance(network, DiTTransformer2DModel):
        parts = [block.norm1.emb for block in network.transformer_blocks]
        tables = [part.class_embedder.embedding_table for part in parts]
        if any(t.weight.shape != tables[0].weight.shape for t in tables) or not all(
            t.weight.is_meta or bool((t.weight == tables[0].weight).all()) for t in tables
        ):
            raise ValueError("its blocks have different class embeddings")
        for part in parts:
            part.class_embedder = nn.Identity()
        table: nn.Embedding = tables[0]
        return table
    if isinstance(network, UNet2DModel) and isinstance(network.class_embedding, nn.Embedding):
        table = network.class_embedding
        network.class_embedding = nn.Identity()
        return table
    return None
