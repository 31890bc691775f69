"""The matrices among which a run chooses: those that have adapters once all targets of LoRA have them.

A candidate is a linear or convolution layer of the network with a fresh adapter (A random, B zero). The ones
that are not chosen lose theirs, so the adapter that leaves has the chosen ones alone and lists them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peft.tuners.lora import LoraLayer

from dp_lora.models.latent_diffusion import LatentDiffusion


def candidates(model: LatentDiffusion) -> dict[str, Any]:
    """The layers of the network with an adapter, by name, in the model's order; after `adapters.attach`."""
    return {name: part for name, part in model.unet.named_modules() if isinstance(part, LoraLayer)}


def open_for_scouting(model: LatentDiffusion, kind: str) -> list[str]:
    """Leaves one matrix of each candidate trainable and freezes all else; returns the candidates' names.

    The trainable parameters are then in the order of the names.

    Args:
        model: after `adapters.attach`, changed in place.
        kind: lora: B, whose gradient at B = 0 is that of the whole matrix seen through A', while that of A is
            zero; matrices: the whole matrix that the adapter is on.
    """
    model.requires_grad_(False)
    found = candidates(model)
    for layer in found.values():
        if kind == "lora":
            matrix = layer.lora_B[layer.active_adapters[0]].weight
        else:
            matrix = layer.get_base_layer().weight
            # In memory of its own: see `LatentDiffusion.sharing_weights`.
            matrix.data = matrix.data.clone()
        matrix.requires_grad_(True)
    return list(found)


def keep(model: LatentDiffusion, chosen: Collection[str]) -> None:
    """Takes the adapters off all candidates but the `chosen` ones, in place."""
    for name, layer in candidates(model).items():
        if name not in chosen:
            parent, _, last = name.rpartition(".")
            model.unet.get_submodule(parent)._modules[last] = layer.get_base_layer()
    config = model.unet.peft_config["default"]
    config.target_modules = set(chosen)
    for pattern in (config.rank_pattern, config.alpha_pattern):
        for name in pattern.keys() - set(chosen):
            del pattern[name]
