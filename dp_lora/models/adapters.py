"""Which parameters the private fine-tuning trains, and how they leave the job.

Everything that is not chosen stays frozen. The components combine: `lora` adds low-rank adapters,
`attention` trains the attention weights themselves (DP-LDM), `embedder` the class embedding (of a model
that has one), `bias` all biases (BitFit), `norm` the normalisation layers, `full` every parameter of the
network and the embedder.

An attention block of CompVis has one matrix `qkv`, diffusers three. An adapter on `qkv` is one on that
matrix, which has 4 r C parameters where three adapters have 6 r C; it leaves the job as three adapters that
share A, so that it loads into diffusers' own model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dp_lora.config.schema import TARGET_GROUPS, LoraConfig
from dp_lora.errors import UserError, did_you_mean
from dp_lora.models.adapter_files import for_other_tools, metadata, save_tensors
from dp_lora.models.latent_diffusion import LatentDiffusion
from dp_lora.models.networks import attentions, fuse, fuses, without_effect
from dp_lora.storage.files import read_json, write_atomic, write_json

ADAPTER = "adapter_model.safetensors"
TRAINED = "trained.safetensors"
"""Parameters that were trained in place, by their name in the model: the class embedding among them."""

PROMPTS = "prompts.json"
"""Of a text-to-image model: the prompt of a class and the names of the classes."""

PREFIX = "base_model.model."
"""The prefix that peft puts before the names of a model's parameters."""

_LORA_LAYERS = (nn.Linear, nn.Conv2d)
_NORMS = (nn.GroupNorm, nn.LayerNorm)
_FUSED = "to_qkv"
_SPLIT = ("to_q", "to_k", "to_v")
_JOINT, _JOINT_OUT = ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"
"""The projections of the text in a joint attention."""
_PARALLEL = ".to_qkv_mlp_proj"


def attach(model: LatentDiffusion, components: Sequence[str], lora: LoraConfig, *, seed: int) -> None:
    """Freezes the model but for the chosen components; the parameters that require a gradient are trained.

    Args:
        model: changed in place.
        components: any of `config.trainable.COMPONENTS`.
        lora: used when `lora` is among the components. A is drawn from N(0, 1 / rank^2) and B is zero, so
            the model's output is unchanged at first.
        seed: of A. It is public: the initial adapter carries nothing of the data.

    Raises UserError for a target that matches no module or a rank beyond a layer's width.
    """
    model.requires_grad_(False)
    if "lora" in components:
        _add_lora(model, lora, seed)
    for name, parameter in _chosen(model, set(components)):
        assert "lora_" not in name
        # In memory of its own: see `LatentDiffusion.sharing_weights`.
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)


def trainable_parameters(model: LatentDiffusion) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count(model: LatentDiffusion) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in trainable_parameters(model).values())


def count_by_component(model: LatentDiffusion, components: Sequence[str]) -> dict[str, int]:
    """Number of trained parameters of each component; one that two ask for counts for the first of them."""
    trained = trainable_parameters(model)
    counts = {}
    for component in components:
        if component == "lora":
            names = [name for name in trained if ".lora_" in name]
        else:
            names = [name for name, _ in _chosen(model, {component}) if name in trained]
        counts[component] = sum(trained.pop(name).numel() for name in names)
    return counts


@dataclass(frozen=True)
class _Layer:
    """The facts about a layer that are known before it has an adapter."""

    sides: tuple[int, int]
    groups: frozenset[str] = frozenset()


def _layers(unet: nn.Module) -> dict[str, _Layer]:
    """The layers that an adapter can have, by name; those that would be fused first are among them."""
    layers = {name: _Layer(_sides(m)) for name, m in unet.named_modules() if isinstance(m, _LORA_LAYERS)}
    for name, part in unet.named_modules():
        if isinstance(part, ResnetBlock2D | Downsample2D | Upsample2D):
            for inner in (f"{name}.{end}" for end in ("conv1", "conv2", "conv_shortcut", "conv")):
                if inner in layers:
                    layers[inner] = _Layer(layers[inner].sides, frozenset({"conv"}))
    for name, attention in attentions(unet):
        joint = [f"{name}.{end}" for end in (*_JOINT, _JOINT_OUT) if f"{name}.{end}" in layers]
        cross = getattr(attention, "is_cross_attention", False)
        # Joint attention of image and text is neither of the two.
        kind = set() if joint else {"cross" if cross else "self"}
        for inner in joint:
            group = "proj" if inner.endswith(_JOINT_OUT) else "qkv"
            layers[inner] = _Layer(layers[inner].sides, frozenset({group}))
        if (out := f"{name}.to_out.0") in layers:
            layers[out] = _Layer(layers[out].sides, frozenset({"proj", *kind}))
        three = [f"{name}.{end}" for end in _SPLIT]
        if three[0] not in layers:
            fused = f"{name}.{_FUSED}"
            layers[fused] = _Layer(layers[fused].sides, frozenset({"qkv", *kind}))
        elif fuses(unet):
            width_in, width_out = layers[three[0]].sides
            layers[f"{name}.{_FUSED}"] = _Layer((width_in, 3 * width_out), frozenset({"qkv", *kind}))
        else:
            for inner in three:
                layers[inner] = _Layer(layers[inner].sides, frozenset({"qkv", *kind}))
    for name in [name for name in layers if name.endswith(_PARALLEL)]:
        # FLUX.2: one matrix for the attention and the layer beside it.
        out = f"{name.removesuffix(_PARALLEL)}.to_out"
        layers[name] = _Layer(layers[name].sides, frozenset({"qkv"}))
        layers[out] = _Layer(layers[out].sides, frozenset({"proj"}))
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
    layers, idle = _layers(unet), without_effect(unet)
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
        if end == _FUSED and any(f"{block}.{other}" in chosen for other in _SPLIT):
            raise UserError(
                f"lora.target_modules={list(target_modules)}: both {_FUSED} and a part of it are meant in "
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


def _is_meant(target: str, name: str, layer: _Layer) -> bool:
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


def _add_lora(model: LatentDiffusion, lora: LoraConfig, seed: int) -> None:
    names = target_names(model.unet, lora.target_modules, lora.rank, cap_rank=lora.cap_rank)
    _fuse_for(model.unet, names)
    layers = _layers(model.unet)
    scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
    capped = {name: w for name in names if (w := min(layers[name].sides)) < lora.rank}
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=scale * lora.rank,
        target_modules=names,
        rank_pattern=capped,
        alpha_pattern={name: scale * width for name, width in capped.items()},
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(config, model.unet)


def _inject(config: PeftLoraConfig, unet: nn.Module) -> None:
    """Adapters in float32, whatever the precision of the frozen weights."""
    inject_adapter_in_model(config, unet)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _fuse_for(unet: nn.Module, names: Iterable[str]) -> None:
    """Fuses the attention of `unet` whose `to_qkv` is among the names of its modules."""
    fused = {name.rpartition(".")[0] for name in names if name.endswith("." + _FUSED)}
    for name, attention in list(attentions(unet)):
        if name in fused and not hasattr(attention, _FUSED):
            fuse(attention)


def _chosen(model: LatentDiffusion, components: set[str]) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained in place."""
    chosen: list[tuple[str, nn.Parameter]] = []
    idle = {f"unet.{name}" for name in without_effect(model.unet)}
    inside = tuple(f"unet.{name}." for name, _ in attentions(model.unet))
    for module_name, module in model.unet.named_modules(prefix="unet"):
        if ".lora_" in module_name or module_name.removesuffix(".base_layer") in idle:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            wanted = (
                "full" in components
                or ("attention" in components and module_name.startswith(inside))
                or ("bias" in components and name == "bias")
                or ("norm" in components and isinstance(module, _NORMS))
            )
            if wanted:
                chosen.append((f"{module_name}.{name}", parameter))
    if components & {"embedder", "full"} and model.class_embedder is not None:
        chosen.append(("class_embedder.weight", model.class_embedder.get_parameter("weight")))
    return chosen


def export(model: LatentDiffusion, folder: Path, *, base_model: str, card: str) -> None:
    """Writes what was trained: PEFT's files for the adapters, `trained.safetensors` for the rest, the card.

    The folder holds nothing that is not a function of released values: no optimiser, no key, no data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.prompts is not None:
        values = {"prompt": model.prompts.template, "classes": list(model.classes)}
        write_json(folder / PROMPTS, values)
    config: PeftLoraConfig | None = getattr(model.unet, "peft_config", {}).get("default")
    if config is not None:
        state = in_three(get_peft_model_state_dict(model.unet))
        prefixed = {PREFIX + name: value.cpu().contiguous() for name, value in state.items()}
        values = plain_values(config) | {"base_model_name_or_path": base_model, "inference_mode": True}
        save_tensors(prefixed, folder / ADAPTER, metadata(values, PREFIX))
        write_json(folder / "adapter_config.json", values)
        if model.prompts is not None:
            for_other_tools(state, values, model.unet, folder)
    trained = {
        plain_name(name): value.detach().cpu().contiguous()
        for name, value in trainable_parameters(model).items()
        if "lora_" not in name
    }
    if trained:
        save_tensors(in_three(trained), folder / TRAINED, {"classes": "\n".join(model.classes)})
    write_atomic(folder / "README.md", card)


def plain_values(config: PeftLoraConfig) -> dict[str, Any]:
    """The fields of adapter_config.json, in an order that is the same in every process."""
    values = {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
    }
    targets = [name for target in values["target_modules"] for name in names_in_three(target)]
    return values | {"target_modules": sorted(targets)}


def names_in_three(name: str) -> list[str]:
    """The names in diffusers' own model of what is called `name` in a fused one."""
    words = name.split(".")
    if _FUSED not in words:
        return [name]
    return [".".join(end if word == _FUSED else word for word in words) for end in _SPLIT]


def in_three(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a fused model as those of diffusers' own: W x + B A x by rows, so A is in all three."""
    split: dict[str, Tensor] = {}
    for name, value in tensors.items():
        names = names_in_three(name)
        shared = len(names) == 1 or "lora_A" in name
        parts = [value] * len(names) if shared else value.chunk(len(names))
        split |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return split


def plain_name(name: str) -> str:
    """The name that the parameter has in a model without adapters."""
    return name.replace(".base_layer.", ".")


def class_names(folder: Path) -> tuple[str, ...] | None:
    """The names of the classes that `export` wrote beside what was trained; None where nothing says them."""
    prompts = conditions(folder)
    if prompts is not None:
        return prompts[1]
    path = folder / TRAINED
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as opened:
            names = (opened.metadata() or {}).get("classes")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return None if names is None else tuple(names.split("\n"))


def conditions(folder: Path) -> tuple[str, tuple[str, ...]] | None:
    """The prompt of a class and the names of the classes, of a text-to-image adapter; None of another one."""
    path = folder / PROMPTS
    if not path.exists():
        return None
    found = read_json(path)
    prompt, classes = (
        (found.get(name) for name in ("prompt", "classes")) if isinstance(found, dict) else [None] * 2
    )
    if not isinstance(prompt, str) or not isinstance(classes, list):
        raise UserError(f"{path}: expected a prompt and a list of classes, as the job wrote it")
    return prompt, tuple(map(str, classes))


def restore(model: LatentDiffusion, folder: Path, classes: Sequence[str]) -> None:
    """Loads what `export` wrote into the pre-trained `model`, in place.

    Args:
        model: without adapters.
        folder: the run's `adapter/`.
        classes: names of the classes that the adapter conditions on.

    Raises UserError when a file cannot be read or does not fit the model.
    """
    if (folder / ADAPTER).exists():
        _restore_lora(model, folder)
    trained = trained_in(folder)
    embedding, embedder = trained.get("class_embedder.weight"), model.class_embedder
    if embedding is not None and embedder is not None:
        if embedding.shape != (len(classes), embedder.embedding_dim):
            raise UserError(
                f"{folder / TRAINED}: class_embedder.weight {tuple(embedding.shape)} does not fit the model; "
                f"expected {(len(classes), embedder.embedding_dim)}: a class embedder of another size"
            )
        model.class_embedder = nn.Embedding.from_pretrained(embedding)
        model.classes = tuple(classes)
    if model.prompts is not None:
        model.prompts.use_classes(classes)
        model.classes = tuple(classes)
    own = {plain_name(name): value for name, value in model.named_parameters()}
    for name, value in trained.items():
        if name not in own or own[name].shape != value.shape:
            raise UserError(f"{folder / TRAINED}: {name} {tuple(value.shape)} does not fit the model")
        # In memory of its own: see `LatentDiffusion.sharing_weights`.
        own[name].data = own[name].data.clone().copy_(value)


def _restore_lora(model: LatentDiffusion, folder: Path) -> None:
    state = {name.removeprefix(PREFIX): value for name, value in read_tensors(folder / ADAPTER).items()}
    try:
        config = PeftLoraConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None  # peft would look it up on the hub
        _inject(config, model.unet)
        fits = {name: value.shape for name, value in get_peft_model_state_dict(model.unet).items()}
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(folder, error) from error
    if fits != {name: value.shape for name, value in state.items()}:
        raise UserError(f"{folder / ADAPTER}: its tensors do not fit the modules of the model")
    set_peft_model_state_dict(model.unet, state)


def trained_in(folder: Path) -> dict[str, Tensor]:
    """The parameters of an adapter that were trained in place, by name; none where there are none."""
    return read_tensors(folder / TRAINED) if (folder / TRAINED).exists() else {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of an adapter. Raises UserError when it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: the adapter cannot be read ({' '.join(str(error).split())})")
