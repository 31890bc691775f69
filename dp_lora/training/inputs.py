"""A digest of all that a fine-tuning begins from: model, images, whose they are, and plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dp_lora.models import folders
from dp_lora.models.folders import LatentDiffusion
from dp_lora.models.latents import Latents
from dp_lora.privacy.persons import Persons
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness


def digest(
    model: LatentDiffusion,
    latents: Latents,
    labels: Tensor,
    plan: PrivacyPlan,
    randomness: Randomness,
    captions: Sequence[str] | None = None,
    persons: Persons | None = None,
) -> str:
    """A hash of all that a training begins from. Private: it tells whether a guess of the images is right.

    Of the model it covers the weights, and what is no weight: the networks' and the scheduler's settings, the
    noise schedule itself, what the network predicts and how the tokenizer reads the prompts.
    """
    hashed = hashlib.sha256(randomness.key)
    hashed.update(json.dumps([plan.to_dict(), captions, _settings(model)], sort_keys=True).encode())
    hashed.update(folders.digest(model).encode())
    whose = () if persons is None else (persons.offsets, persons.order)
    for tensor in (latents.mean, latents.std, labels, *_constants(model, captions), *whose):
        hashed.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().numpy().data)
    return hashed.hexdigest()


def _settings(model: LatentDiffusion) -> dict[str, Any]:
    """The settings in the files beside the weights."""
    encoder = None if model.prompts is None else model.prompts.settings()
    return {
        "unet": _plain(model.unet.config),
        "autoencoder": _plain(model.autoencoder.config),
        "scheduler": _plain(model.scheduler.config),
        "text_encoder": None if encoder is None else _plain(encoder),
        "predicts_v": model.predicts_v,
        "classes": list(model.classes),
    }


def _plain(settings: Mapping[str, Any]) -> dict[str, str]:
    # Names with an underscore say where a part lies and who wrote it.
    return {name: repr(value) for name, value in settings.items() if not name.startswith("_")}


def _constants(model: LatentDiffusion, captions: Sequence[str] | None) -> Iterable[Tensor]:
    yield model.process.table
    if model.prompts is not None:
        yield from model.prompts.constants(captions)
