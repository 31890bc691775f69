"""Trainings that start from the values of a released adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from dp_lora.errors import UserError
from dp_lora.models.adapters import (
    ADAPTER,
    PREFIX,
    TRAINED,
    class_names,
    in_three,
    names_in_three,
    plain_name,
    plain_values,
    read_tensors,
    trainable_parameters,
    trained_in,
)
from dp_lora.models.latent_diffusion import LatentDiffusion
from dp_lora.storage.files import read_json

_SAME = {
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "target_modules": "lora.target_modules",
    "rank_pattern": "lora.cap_rank",
    "alpha_pattern": "lora.alpha",
    "peft_type": "trainable.components",
}
"""Fields of adapter_config.json that are alike if a training can start from an adapter; their settings."""


def check_start(folder: Path, model: LatentDiffusion) -> None:
    """Raises UserError unless what is trained of `model` can start from the adapter that `export` wrote."""
    own = plain_values(model.unet.peft_config["default"]) if hasattr(model.unet, "peft_config") else {}
    path = folder / "adapter_config.json"
    found = read_json(path) if path.exists() else {}
    for name, field in _SAME.items():
        if own.get(name) != found.get(name):
            shown = [_short(values.get(name)) for values in (found, own)]
            raise UserError(
                f"{field}: the adapter in {folder} has {name} {shown[0]}, and this training {shown[1]}; "
                "expected the settings with which the adapter was made"
            )
    mine = {plain_name(name) for name in trainable_parameters(model) if ".lora_" not in name}
    theirs = trained_in(folder)
    if left_out := sorted(theirs.keys() - in_three({name: torch.empty(3) for name in mine}).keys()):
        raise UserError(
            f"trainable.components: the adapter in {folder} also holds {_short(left_out)}, which this "
            "training leaves as in the pre-trained model; expected the components with which the adapter was "
            "made"
        )


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def start(model: LatentDiffusion, folder: Path) -> None:
    """Gives the trained parameters of a model the values of the adapter that `export` wrote, in place.

    The class embedding is left as it is: see `start_classes`.

    Args:
        model: after `attach`.
        folder: of an adapter that `check_start` lets through.

    Raises UserError when a tensor has another shape.
    """
    check_start(folder, model)
    if (folder / ADAPTER).exists():
        given = {name.removeprefix(PREFIX): value for name, value in read_tensors(folder / ADAPTER).items()}
        own = get_peft_model_state_dict(model.unet)
        set_peft_model_state_dict(model.unet, _as_one(own, given, folder / ADAPTER))
    trained = trained_in(folder)
    trained.pop("class_embedder.weight", None)
    own = {plain_name(n): p for n, p in trainable_parameters(model).items() if ".lora_" not in n}
    chosen = {name: p for name, p in own.items() if set(names_in_three(name)) <= trained.keys()}
    for name, value in _as_one(chosen, trained, folder / TRAINED).items():
        chosen[name].data.copy_(value)


def start_classes(model: LatentDiffusion, folder: Path) -> None:
    """Gives the model the class embedding of an adapter with its classes, where the adapter has one.

    New classes then begin at the mean of its embeddings (`LatentDiffusion.new_classes`).

    Raises UserError when the embedding does not fit the model.
    """
    trained = trained_in(folder)
    embedding, names = trained.get("class_embedder.weight"), class_names(folder)
    if embedding is None or names is None or model.class_embedder is None:
        return
    if embedding.shape != (len(names), model.class_embedder.embedding_dim):
        raise UserError(
            f"{folder / TRAINED}: class_embedder.weight {tuple(embedding.shape)} does not fit the model; "
            f"expected {(len(names), model.class_embedder.embedding_dim)}"
        )
    model.class_embedder = nn.Embedding.from_pretrained(embedding.clone(), freeze=False)
    model.classes = names


def _as_one(own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The reverse of `in_three`, for the names of `own`. Raises UserError when the shapes do not fit."""
    joined = {}
    for name, value in own.items():
        parts = [given.get(one) for one in names_in_three(name)]
        if any(part is None for part in parts):
            raise UserError(f"{path}: has no {name}; expected the tensors of this model")
        shared = len(parts) == 1 or "lora_A" in name
        found = parts[0] if shared else torch.cat([part for part in parts if part is not None])
        if found is None or found.shape != value.shape:
            raise UserError(f"{path}: {name} does not fit the model; expected {tuple(value.shape)}")
        joined[name] = found
    return joined
