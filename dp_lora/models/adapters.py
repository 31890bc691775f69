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

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dp_lora.config.schema import LoraConfig
from dp_lora.errors import UserError
from dp_lora.models.latent_diffusion import LatentDiffusion
from dp_lora.models.networks import attentions, fuse, without_effect
from dp_lora.models.targets import FUSED, SPLIT, layers_of, target_names
from dp_lora.storage.files import write_atomic, write_json

ADAPTER = "adapter_model.safetensors"
TRAINED = "trained.safetensors"
"""Parameters that were trained in place, by their name in the model: the class embedding among them."""

_PREFIX = "base_model.model."
"""The prefix that peft puts before the names of a model's parameters."""

_NORMS = (nn.GroupNorm, nn.LayerNorm)


def attach(model: LatentDiffusion, components: Sequence[str], lora: LoraConfig, *, seed: int) -> None:
    """Freezes the model but for the chosen components; the parameters that require a gradient are trained.

    Args:
        model: changed in place.
        components: any of `config.COMPONENTS`.
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


def _add_lora(model: LatentDiffusion, lora: LoraConfig, seed: int) -> None:
    names = target_names(model.unet, lora.target_modules, lora.rank, cap_rank=lora.cap_rank)
    _fuse_for(model.unet, names)
    layers = layers_of(model.unet)
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
    fused = {name.rpartition(".")[0] for name in names if name.endswith("." + FUSED)}
    for name, attention in list(attentions(unet)):
        if name in fused and not hasattr(attention, FUSED):
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
    config: PeftLoraConfig | None = getattr(model.unet, "peft_config", {}).get("default")
    if config is not None:
        state = _in_three(get_peft_model_state_dict(model.unet))
        prefixed = {_PREFIX + name: value.cpu().contiguous() for name, value in state.items()}
        values = _plain_values(config) | {"base_model_name_or_path": base_model, "inference_mode": True}
        # Where diffusers looks for the rank and alpha.
        metadata = {"lora_adapter_metadata": json.dumps({_PREFIX + name: v for name, v in values.items()})}
        _save(prefixed, folder / ADAPTER, metadata)
        write_json(folder / "adapter_config.json", values)
    trained = {
        _plain_name(name): value.detach().cpu().contiguous()
        for name, value in trainable_parameters(model).items()
        if "lora_" not in name
    }
    if trained:
        _save(_in_three(trained), folder / TRAINED, {"classes": "\n".join(model.classes)})
    write_atomic(folder / "README.md", card)


def _plain_values(config: PeftLoraConfig) -> dict[str, Any]:
    """The fields of adapter_config.json, in an order that is the same in every process."""
    values = {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
    }
    targets = [name for target in values["target_modules"] for name in _names_in_three(target)]
    return values | {"target_modules": sorted(targets)}


def _names_in_three(name: str) -> list[str]:
    """The names in diffusers' own model of what is called `name` in a fused one."""
    words = name.split(".")
    if FUSED not in words:
        return [name]
    return [".".join(end if word == FUSED else word for word in words) for end in SPLIT]


def _in_three(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a fused model as those of diffusers' own: W x + B A x by rows, so A is in all three."""
    split: dict[str, Tensor] = {}
    for name, value in tensors.items():
        names = _names_in_three(name)
        shared = len(names) == 1 or "lora_A" in name
        parts = [value] * len(names) if shared else value.chunk(len(names))
        split |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return split


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    partial = path.with_name(path.name + ".partial")
    # One entry at most: safetensors writes several in an order that changes from call to call.
    assert metadata is None or len(metadata) == 1
    save_file(dict(tensors), partial, metadata=dict(metadata or {"format": "pt"}))
    # safetensors writes for its owner only; an adapter is there to be given away, like the card beside it.
    partial.chmod(0o666 & ~_umask())
    partial.replace(path)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def _plain_name(name: str) -> str:
    """The name that the parameter has in a model without adapters."""
    return name.replace(".base_layer.", ".")


def class_names(folder: Path) -> tuple[str, ...] | None:
    """The names of the classes that `export` wrote beside what was trained; None where nothing says them."""
    path = folder / TRAINED
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as opened:
            names = (opened.metadata() or {}).get("classes")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return None if names is None else tuple(names.split("\n"))


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
    trained = _read(folder / TRAINED) if (folder / TRAINED).exists() else {}
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
    own = {_plain_name(name): value for name, value in model.named_parameters()}
    for name, value in trained.items():
        if name not in own or own[name].shape != value.shape:
            raise UserError(f"{folder / TRAINED}: {name} {tuple(value.shape)} does not fit the model")
        # In memory of its own: see `LatentDiffusion.sharing_weights`.
        own[name].data = own[name].data.clone().copy_(value)


def _restore_lora(model: LatentDiffusion, folder: Path) -> None:
    state = {name.removeprefix(_PREFIX): value for name, value in _read(folder / ADAPTER).items()}
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


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: the adapter cannot be read ({' '.join(str(error).split())})")
