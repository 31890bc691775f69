"""The layers of a network that can have an adapter, and those that `lora.target_modules` means.

The groups: qkv and proj are the projections into and out of all attention, also of a text in joint attention;
self and cross are those of one kind of attention; conv the convolutions of residual blocks and resamplers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dp_lora.config.schema import TARGET_GROUPS
from dp_lora.errors import UserError, did_you_mean
from dp_lora.models.networks import attentions, fuses, without_effect

_LORA_LAYERS = (nn.Linear, nn.Conv2d)
FUSED = "to_qkv"
SPLIT = ("to_q", "to_k", "to_v")
_JOINT, _JOINT_OUT = ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"
"""The projections of the text in a joint attention."""
_PARALLEL = ".to_qkv_mlp_proj"


@dataclass(frozen=True)
class Layer:
    """The facts about a layer that are known before it has an adapter."""

    sides: tuple[int, int]
    groups: frozenset[str] = frozenset()


def layers_of(unet: nn.Module) -> dict[str, Layer]:
    """The layers that an adapter can have, by name; those that would be fused first are among them."""
    layers = {name: Layer(_sides(m)) for name, m in unet.named_modules() if isinstance(m, _LORA_LAYERS)}
    for name, part in unet.named_modules():
        if isinstance(part, ResnetBlock2D | Downsample2D | Upsample2D):
            for inner in (f"{name}.{end}" for end in ("conv1", "conv2", "conv_shortcut", "conv")):
                if inner in layers:
                    layers[inner] = Layer(layers[inner].sides, frozenset({"conv"}))
    for name, attention in attentions(unet):
        joint = [f"{name}.{end}" for end in (*_JOINT, _JOINT_OUT) if f"{name}.{end}" in layers]
        cross = getattr(attention, "is_cross_attention", False)
        # Joint attention of image and text is neither of the two.
        kind = set() if joint else {"cross" if cross else "self"}
        for inner in joint:
            group = "proj" if inner.endswith(_JOINT_OUT) else "qkv"
            layers[inner] = Layer(layers[inner].sides, frozenset({group}))
        if (out := f"{name}.to_out.0") in layers:
            layers[out] = Layer(layers[out].sides, frozenset({"proj", *kind}))
        three = [f"{name}.{end}" for end in SPLIT]
        if three[0] not in layers:
            fused = f"{name}.{FUSED}"
            layers[fused] = Layer(layers[fused].sides, frozenset({"qkv", *kind}))
        elif fuses(unet):
            width_in, width_out = layers[three[0]].sides
            layers[f"{name}.{FUSED}"] = Layer((width_in, 3 * width_out), frozenset({"qkv", *kind}))
        else:
            for inner in three:
                layers[inner] = Layer(layers[inner].sides, frozenset({"qkv", *kind}))
    for name in [name for name in layers if name.endswith(_PARALLEL)]:
        # FLUX.2: one matrix for the attention and the layer beside it.
        out = f"{name.removesuffix(_PARALLEL)}.to_out"
        layers[name] = Layer(layers[name].sides, frozenset({"qkv"}))
        layers[out] = Layer(layers[out].sides, frozenset({"proj"}))
    return layers


def target_names(
    unet: nn.Module, target_modules: Sequence[str], rank: int, *, cap_rank: bool = False
) -> list[str]:
    """Full names of the modules that get an adapter: those of a group, or whose name ends in a target.

    Layers without an effect are left out, such as queries and keys of the cross-attention to one token.

    Args:
        unet: the network; its attention may still have to be fused for a name that ends in `to_qkv`.
        target_modules: of `config.TARGET_GROUPS`, or ends of names.
        rank: of the adapters.
        cap_rank: lower the rank of narrower layers in place of refusing it.

    Raises UserError when a target matches no linear or convolution layer, naming the nearest that would,
    when none has an effect, and when `rank` is larger than the smaller side of a layer that is meant.
    """
    layers, idle = layers_of(unet), without_effect(unet)
    chosen: list[str] = []
    for target in target_modules:
        found = [name for name, layer in layers.items() if _is_meant(target, name, layer)]
        if not found:
            ends = [*TARGET_GROUPS, *sorted({_last_words(name) for name in layers})]
            raise UserError(
                f"lora.target_modules: {target!r} matches no linear or convolution layer of the "
                f"{type(unet).__name__}; expected groups or ends of names such as {', '.join(ends)}"
                f"{did_you_mean(target, ends)}"
            )
        chosen += [name for name in found if name not in idle and name not in chosen]
    if not chosen:
        raise UserError(
            f"lora.target_modules={list(target_modules)}: has no effect, since attention to one token does "
            "not depend on its queries and keys; expected other targets too, such as to_v"
        )
    for name in chosen:
        block, _, end = name.rpartition(".")
        if end == FUSED and any(f"{block}.{other}" in chosen for other in SPLIT):
            raise UserError(
                f"lora.target_modules={list(target_modules)}: both {FUSED} and a part of it are meant in "
                f"{block}; expected qkv, or ends of names"
            )
        width = min(layers[name].sides)
        if rank > width and not cap_rank:
            raise UserError(
                f"lora.rank={rank}: beyond the width of {name}, expected 1 to {width}; a higher rank adds "
                "parameters and noise but nothing that the layer can express; lora.cap_rank=true gives such "
                "layers their width"
            )
    return chosen


def _is_meant(target: str, name: str, layer: Layer) -> bool:
    if target in TARGET_GROUPS:
        return target in layer.groups
    return name == target or name.endswith("." + target)


def _last_words(name: str) -> str:
    """`to_out.0` of `....attn1.to_out.0`: the shortest end of a name that begins with a word."""
    words = name.split(".")
    first = next(i for i in reversed(range(len(words))) if not words[i].isdigit())
    return ".".join(words[first:])


def _sides(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features
