"""A CompVis latent-diffusion checkpoint as a model of ours: what `dp-lora-import` does.

A checkpoint holds the UNet (`model.diffusion_model.*`, and `model_ema.*` with its moving average, which is
preferred), the autoencoder (`first_stage_model.*`), for classes `cond_stage_model.embedding.weight`, and
perhaps `scale_factor`. diffusers' converters know no matrix `qkv`, no residual blocks that resample, no
codebook and no attention between an autoencoder's blocks, so the names are mapped here: by walking our own
network and saying where each of its layers is in the original.
"""

from __future__ import annotations

import functools
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dp_lora.config.load import config_directory
from dp_lora.config.schema import ModelConfig
from dp_lora.errors import UserError
from dp_lora.models.folders import LatentDiffusion, build, save, sha256
from dp_lora.models.inert import stand_ins
from dp_lora.models.layouts import LAYOUTS, Layout
from dp_lora.models.networks import attentions, build_unet

_UNET, _EMA = "model.diffusion_model.", "model_ema.diffusion_model"
_AUTOENCODER, _CLASSES = "first_stage_model.", "cond_stage_model.embedding.weight"
_LISTED = 6


# Where a tensor of ours is in the original


@dataclass(frozen=True)
class Source:
    """A tensor of the original: its name and shape, and how ours is made of it."""

    name: str
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor]


def sources(network: nn.Module) -> dict[str, Source]:
    """For each tensor of a UNet or an autoencoder, the one of the original, by its name there."""
    is_autoencoder = hasattr(network, "encoder")
    layers = dict(_autoencoder_layers(network) if is_autoencoder else _unet_layers(network))
    heads = {name: attention.heads for name, attention in attentions(network)}
    found: dict[str, Source] = {}
    for key, value in network.state_dict().items():
        layer, _, kind = key.rpartition(".")
        original = _renamed(layer, layers)
        block = layer.removesuffix(".to_out.0") if layer.endswith(".to_out.0") else layer.rpartition(".")[0]
        if isinstance(network, UNet2DModel) and block in heads:
            found[key] = _of_attention_block(key, value, original, heads[block])
        elif is_autoencoder and value.ndim == 2 and layer != "quantize.embedding":
            found[key] = Source(f"{original}.{kind}", (*value.shape, 1, 1), lambda t: t[:, :, 0, 0])
        else:
            found[key] = Source(f"{original}.{kind}", tuple(value.shape), lambda t: t)
    return found


def _renamed(layer: str, layers: Mapping[str, str]) -> str:
    """The original name of a layer, from that of the block it is in and its name there."""
    blocks = [block for block in layers if layer == block or layer.startswith(block + ".")]
    block = max(blocks, key=len)
    inner = layer[len(block) + 1 :]
    return f"{layers[block]}.{_INNER.get(inner, inner)}" if inner else layers[block]


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_INNER = {
    # Of attention: a block of an autoencoder, and what the two kinds of UNet share.
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _unet_layers(unet: Any) -> Iterator[tuple[str, str]]:
    """Pairs of a block or layer of ours and of the original's, for a UNet."""
    yield "conv_in", "input_blocks.0.0"
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    number = 1
    for level, block in enumerate(unet.down_blocks):
        ours = f"down_blocks.{level}"
        for i in range(len(block.resnets)):
            yield from _resnet(f"{ours}.resnets.{i}", f"input_blocks.{number}.0")
            yield f"{ours}.attentions.{i}", f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers is not None:
            yield from _resnet(f"{ours}.downsamplers.0", f"input_blocks.{number}.0")
            yield f"{ours}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _resnet("mid_block.resnets.1", "middle_block.2")
    number = 0
    for level, block in enumerate(unet.up_blocks):
        ours = f"up_blocks.{level}"
        for i in range(len(block.resnets)):
            yield from _resnet(f"{ours}.resnets.{i}", f"output_blocks.{number}.0")
            yield f"{ours}.attentions.{i}", f"output_blocks.{number}.1"
            number += 1
        # The resampler is the last part of the level's last block, behind its attention.
        place = 2 if getattr(block, "attentions", None) else 1
        yield from _resnet(f"{ours}.upsamplers.0", f"output_blocks.{number - 1}.{place}")
        yield f"{ours}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv"
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


def _resnet(ours: str, original: str) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{inner}", f"{original}.{name}") for inner, name in _RESNET.items())


def _autoencoder_layers(autoencoder: Any) -> Iterator[tuple[str, str]]:
    """Pairs of a block or layer of ours and of the original's, for an autoencoder."""
    for name in ("quant_conv", "post_quant_conv", "quantize.embedding"):
        yield name, name
    levels = len(autoencoder.encoder.down_blocks)
    for half, original in (("encoder", "down"), ("decoder", "up")):
        for name, there in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            yield f"{half}.{name}", f"{half}.{there}"
        for i, there in ((0, "block_1"), (1, "block_2")):
            yield from _autoencoder_resnet(f"{half}.mid_block.resnets.{i}", f"{half}.mid.{there}")
        yield f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        for level in range(levels):
            ours = f"{half}.{original}_blocks.{level}"
            # The original counts levels from the full resolution, on the way up too.
            there = f"{half}.{original}.{level if half == 'encoder' else levels - 1 - level}"
            for i in range(len(autoencoder.get_submodule(ours).resnets)):
                yield from _autoencoder_resnet(f"{ours}.resnets.{i}", f"{there}.block.{i}")
                yield f"{ours}.attentions.{i}", f"{there}.attn.{i}"
            yield f"{ours}.{original}samplers.0", f"{there}.{original}sample"


def _autoencoder_resnet(ours: str, original: str) -> Iterator[tuple[str, str]]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{ours}.{name}", f"{original}.{name}"
    yield f"{ours}.conv_shortcut", f"{original}.nin_shortcut"


def _of_attention_block(key: str, value: Tensor, original: str, heads: int) -> Source:
    """A tensor of an attention block: its norm, or a part of `qkv` or `proj_out`, convolutions of size 1."""
    block, _, end = original.rpartition(".")
    kind = key.rpartition(".")[2]
    if end == "norm":
        return Source(f"{original}.{kind}", tuple(value.shape), lambda t: t)
    if end == "proj_out":
        wide = (1,) if value.ndim == 2 else ()
        return Source(f"{original}.{kind}", (*value.shape, *wide), lambda t: t.reshape(value.shape))
    part = "qkv".index(end)

    def take(t: Tensor) -> Tensor:
        # Head after head, each with its queries, keys and values.
        return t.reshape(heads, 3, -1, *value.shape[1:])[:, part].reshape(value.shape)

    rows = (3 * value.shape[0], *value.shape[1:])
    return Source(f"{block}.qkv.{kind}", (*rows, 1) if value.ndim == 2 else rows, take)


# Reading


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, mapped from the file where its format allows.

    Nothing that is pickled in it is executed; what Lightning writes beside the tensors is passed over, see
    `inert`. Raises UserError when it would have to be executed, or cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        saved = _load(path)
    except pickle.UnpicklingError as error:
        needed = str(error).split("Please use")[0].split("\n")
        reason = " ".join(
            next((line for line in needed if "GLOBAL" in line or "global" in line), needed[0]).split()
        )
        raise UserError(
            f"{path}: refused, since to read it pickled code would have to run ({reason[:200]}); expected "
            "tensors and plain values only, as {'state_dict': ...} saved by whoever trusts the file"
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read ({reason}); expected a CompVis checkpoint") from error
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _load(path: Path) -> Any:
    with stand_ins():
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


# Importing


def model_config(preset: str) -> ModelConfig:
    """The configuration of a preset of the group `model`."""
    loaded = OmegaConf.load(config_directory() / "model" / f"{preset}.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), loaded))
    assert isinstance(config, ModelConfig)
    return config


def convert(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    layout: Layout,
    name: str = "",
    scale_factor: float | None = None,
) -> LatentDiffusion:
    """The model in the tensors of a checkpoint; they are taken as they are, not copied.

    Args:
        state: by their original names.
        config: the sizes.
        layout: image size and scale.
        name: of the layout, for messages.
        scale_factor: of the latents, in place of the checkpoint's.

    Raises UserError for another layout, missing or unexpected tensors, other betas or an absent scale.
    """
    classes = _class_names(state, config, layout, name)
    with torch.device("meta"):
        model = build(config, classes=classes or ["?"], channels=3, image_size=layout.image_size)
    ema = any(key.startswith(_EMA) for key in state)
    unet = _named(model.unet, lambda key: _EMA + key.replace(".", "") if ema else _UNET + key)
    autoencoder = _named(model.autoencoder, lambda key: _AUTOENCODER + key)
    _check(state, [*unet.values(), *autoencoder.values()], name)
    _check_betas(state, model, name)
    _fill(model.unet, state, unet)
    _fill(model.autoencoder, state, autoencoder)
    if model.class_embedder is not None:
        table = state[_CLASSES].float()
        if len(classes) < len(table):
            model.null_embedding = table[len(classes) :]
        model.class_embedder = nn.Embedding.from_pretrained(table[: len(classes)], freeze=False)
    model.autoencoder.register_to_config(scaling_factor=_scale(state, layout, name, scale_factor))
    return model.eval()


def _named(network: nn.Module, name_of: Callable[[str], str]) -> dict[str, Source]:
    """The sources of a network's tensors, by their names in the whole checkpoint."""
    return {
        key: Source(name_of(source.name), source.shape, source.take)
        for key, source in sources(network).items()
    }


def _fill(network: nn.Module, state: Mapping[str, Tensor], named: Mapping[str, Source]) -> None:
    tensors = {key: source.take(state[source.name]).float() for key, source in named.items()}
    network.load_state_dict(tensors, assign=True)


def _check(state: Mapping[str, Tensor], wanted: Sequence[Source], name: str) -> None:
    """Raises UserError unless the checkpoint has the wanted tensors in their shapes, and no others."""
    shapes = {source.name: source.shape for source in wanted}
    found = {key: tuple(value.shape) for key, value in state.items() if _belongs(key, shapes)}
    if found == shapes:
        return
    missing = sorted(shapes.keys() - found.keys())
    unexpected = sorted(found.keys() - shapes.keys())
    other = sorted(key for key in shapes.keys() & found.keys() if shapes[key] != found[key])
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing tensors ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected tensors ({_some(unexpected)})")
    if other:
        wrong = [f"{key} {found[key]}, expected {shapes[key]}" for key in other]
        parts.append(f"{len(other)} of another shape ({_some(wrong)})")
    raise UserError(f"--layout={name}: {'; '.join(parts)}{_looks_like(state)}")


def _belongs(key: str, shapes: Mapping[str, Any]) -> bool:
    """Whether a tensor is of the UNet, the autoencoder or the classes: the rest are schedules and losses."""
    if key in shapes:
        return True
    if key.startswith(_UNET):
        # Beside a moving average lies the network of the last step.
        return not any(name.startswith(_EMA) for name in shapes)
    return key.startswith((_EMA, _AUTOENCODER)) and not key.startswith(f"{_AUTOENCODER}loss.")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _looks_like(state: Mapping[str, Tensor]) -> str:
    """`; it looks like ...`: the layouts whose UNet is in the checkpoint, or what else it may be."""
    if any(".lora_" in key for key in state):
        return "; it holds LoRA matrices: expected the weights before the fine-tuning, or merged"
    found = {name: tuple(value.shape) for name, value in state.items() if name.startswith(_UNET)}
    same = [name for name, layout in LAYOUTS.items() if _unet_shapes(layout.preset).items() <= found.items()]
    if same:
        return f"; the UNet looks like that of --layout={' or '.join(same)}"
    if any(key.startswith("cond_stage_model.transformer.") for key in state):
        return "; it looks like a text-to-image model: expected its diffusers form as model.pretrained"
    if not any(key.startswith(_UNET) for key in state):
        return f"; expected names that begin with {_UNET}, as latent diffusion writes them"
    return ""


@functools.cache
def _unet_shapes(preset: str) -> dict[str, tuple[int, ...]]:
    config = model_config(preset)
    with torch.device("meta"):
        unet = build_unet(config.unet, config.conditioning, config.autoencoder.latent_channels, 8)
    return {_UNET + source.name: source.shape for source in sources(unet).values()}


def _class_names(state: Mapping[str, Tensor], config: ModelConfig, layout: Layout, name: str) -> list[str]:
    """One name a class of the checkpoint; none for an unconditional layout.

    A last row of the table that stands for no class has no name.
    """
    table = state.get(_CLASSES)
    if config.conditioning == "none":
        return []
    width = config.unet.cross_attention_dim
    if table is None or table.ndim != 2 or table.shape[1] != width:
        found = "nothing" if table is None else tuple(table.shape)
        raise UserError(
            f"--layout={name}: {_CLASSES} is {found}, expected (classes, {width}): a class embedder of "
            f"another size{_looks_like(state)}"
        )
    # A table without the row for none is of classes alone.
    count = len(table) - (layout.null_after == len(table) - 1)
    return list(layout.classes) if len(layout.classes) == count else [str(i) for i in range(count)]


def _check_betas(state: Mapping[str, Tensor], model: LatentDiffusion, name: str) -> None:
    betas = state.get("betas")
    if betas is None:
        return
    expected = model.scheduler.betas
    if betas.shape != expected.shape or not torch.allclose(betas.float(), expected.float(), atol=1e-5):
        ends = f"{len(betas)} betas from {float(betas[0]):.4g} to {float(betas[-1]):.4g}"
        raise UserError(
            f"--layout={name}: {ends}, expected {len(expected)} from {float(expected[0]):.4g} to "
            f"{float(expected[-1]):.4g}, linear in their square roots"
        )


def _scale(state: Mapping[str, Tensor], layout: Layout, name: str, scale_factor: float | None) -> float:
    if scale_factor is not None:
        return scale_factor
    if "scale_factor" in state:
        return float(state["scale_factor"])
    if layout.scaled:
        raise UserError(
            f"--layout={name}: the checkpoint has no scale_factor, by which its latents were scaled; "
            "expected it, or --scale-factor=NUMBER"
        )
    return 1.0


def import_checkpoint(path: Path, layout: str, out: Path, scale_factor: float | None = None) -> None:
    """Writes the model in the checkpoint `path` to the new folder `out`, whole or not at all.

    Raises UserError, see `read` and `convert`; or when `out` cannot be written.
    """
    chosen = LAYOUTS[layout]
    model = convert(read(path), model_config(chosen.preset), chosen, layout, scale_factor)
    with written_whole(path, out) as partial:
        record = {"made_by": "dp-lora-import", "layout": layout, "checkpoint_sha256": sha256(path)}
        save(model, partial, record)


@contextmanager
def written_whole(path: Path, out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` if all goes well. Raises UserError when it cannot.

    path: the checkpoint that is imported, whose size says how much room is needed.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except OSError as error:
        size = path.stat().st_size / 1e9
        raise UserError(
            f"--out={out}: cannot be written ({error.strerror}); expected a place with {size:.1f} GB free"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
