"""Which parameters the private fine-tuning trains, and how they leave the job.

Everything that is not chosen stays frozen. The components combine: `lora` adds low-rank adapters,
`attention` trains the attention weights themselves (DP-LDM), `embedder` the class embedding, `bias` all
biases (BitFit), `norm` the normalisation layers, `full` every parameter of the UNet and the embedder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dp_lora.config import LoraConfig
from dp_lora.errors import UserError, did_you_mean
from dp_lora.files import write_atomic, write_json
from dp_lora.models import WITHOUT_EFFECT, LatentDiffusion

ADAPTER = "adapter_model.safetensors"
TRAINED = "trained.safetensors"
"""Parameters that were trained in place, by their name in the model: the class embedding among them."""

_PREFIX = "base_model.model."
"""What peft puts before the names of a model's parameters."""

_LORA_LAYERS = (nn.Linear, nn.Conv2d)
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
        parameter.requires_grad_(True)


def trainable_parameters(model: LatentDiffusion) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count(model: LatentDiffusion) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in trainable_parameters(model).values())


def target_names(unet: nn.Module, target_modules: Sequence[str], rank: int) -> list[str]:
    """Full names of the modules that get an adapter: those whose name ends in a target.

    Queries and keys of the cross-attention to one token are left out: they have no effect.

    Raises UserError when a target matches no linear or convolution layer, naming the nearest that would,
    when none has an effect, and when `rank` is larger than the smaller side of a layer that is meant.
    """
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, _LORA_LAYERS)}
    chosen: list[str] = []
    for target in target_modules:
        found = [name for name in layers if name == target or name.endswith("." + target)]
        if not found:
            ends = sorted({_last_words(name) for name in layers})
            raise UserError(
                f"lora.target_modules: {target!r} matches no linear or convolution layer of the UNet; "
                f"expected ends of names such as {', '.join(ends)}{did_you_mean(target, ends)}"
            )
        chosen += [name for name in found if not WITHOUT_EFFECT.search(name) and name not in chosen]
    if not chosen:
        raise UserError(
            f"lora.target_modules={list(target_modules)}: has no effect, since attention to one token does "
            "not depend on its queries and keys; expected other targets too, such as to_v"
        )
    for name in chosen:
        width = min(_sides(layers[name]))
        if rank > width:
            raise UserError(
                f"lora.rank={rank}: beyond the width of {name}, expected 1 to {width}; a higher rank adds "
                "parameters and noise but nothing that the layer can express"
            )
    return chosen


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
    alpha = lora.rank if lora.alpha is None else lora.alpha
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        target_modules=target_names(model.unet, lora.target_modules, lora.rank),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.unet.add_adapter(config)


def _chosen(model: LatentDiffusion, components: set[str]) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained in place."""
    chosen: list[tuple[str, nn.Parameter]] = []
    for module_name, module in model.unet.named_modules(prefix="unet"):
        if ".lora_" in module_name or WITHOUT_EFFECT.search(module_name.removesuffix(".base_layer")):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            wanted = (
                "full" in components
                or ("attention" in components and (".attn1." in module_name or ".attn2." in module_name))
                or ("bias" in components and name == "bias")
                or ("norm" in components and isinstance(module, _NORMS))
            )
            if wanted:
                chosen.append((f"{module_name}.{name}", parameter))
    if components & {"embedder", "full"}:
        chosen.append(("class_embedder.weight", model.class_embedder.get_parameter("weight")))
    return chosen


def export(model: LatentDiffusion, folder: Path, *, base_model: str, card: str) -> None:
    """Writes what was trained: PEFT's files for the adapters, `trained.safetensors` for the rest, the card.

    The folder holds nothing that is not a function of released values: no optimiser, no key, no data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: PeftLoraConfig | None = getattr(model.unet, "peft_config", {}).get("default")
    if config is not None:
        state = get_peft_model_state_dict(model.unet)
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
        _save(trained, folder / TRAINED, {"classes": "\n".join(model.classes)})
    write_atomic(folder / "README.md", card)


def _plain_values(config: PeftLoraConfig) -> dict[str, Any]:
    """The fields of adapter_config.json, in an order that is the same in every process."""
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
    }


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
    embedding = trained.get("class_embedder.weight")
    if embedding is not None and embedding.shape == (len(classes), model.class_embedder.embedding_dim):
        model.class_embedder = nn.Embedding.from_pretrained(embedding)
        model.classes = tuple(classes)
    own = {_plain_name(name): value for name, value in model.named_parameters()}
    for name, value in trained.items():
        if name not in own or own[name].shape != value.shape:
            raise UserError(f"{folder / TRAINED}: {name} {tuple(value.shape)} does not fit the model")
        own[name].data.copy_(value)


def _restore_lora(model: LatentDiffusion, folder: Path) -> None:
    state = {name.removeprefix(_PREFIX): value for name, value in _read(folder / ADAPTER).items()}
    try:
        model.unet.add_adapter(PeftLoraConfig.from_pretrained(str(folder)))
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
