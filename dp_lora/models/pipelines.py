"""Diffusers pipelines as latent diffusion models: a folder with `model_index.json`, or its name on the hub.

| pipeline | network | condition |
|---|---|---|
| LDMPipeline (unet, vqvae or vae) | UNet2DModel | none, or a class where the UNet has class embeddings |
| DiTPipeline (transformer, vae) | DiTTransformer2DModel | a class |
| StableDiffusionPipeline 1.x, 2.x (unet, vae, text_encoder, tokenizer) | UNet2DConditionModel | a prompt |
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import nn

from dp_lora.errors import UserError
from dp_lora.models.latent_diffusion import UNCONDITIONAL, LatentDiffusion
from dp_lora.models.networks import take_class_table
from dp_lora.models.process import Scheduler, scheduler_of
from dp_lora.models.prompts import Prompts

_NETWORKS = {kind.__name__: kind for kind in (UNet2DConditionModel, UNet2DModel, DiTTransformer2DModel)}
_AUTOENCODERS = {kind.__name__: kind for kind in (AutoencoderKL, VQModel)}
_WANTED = (
    "an unconditional or class-conditional latent diffusion pipeline, a DiT or Stable Diffusion 1.x or 2.x"
)


def is_pipeline(folder: Path) -> bool:
    """Whether `folder` holds a diffusers pipeline."""
    return (folder / "model_index.json").is_file()


@functools.cache
def from_hub(name: str) -> Path | None:
    """The folder in the hub's cache of the pipeline `name`, fetched first where it is not there.

    Returns None when `name` is not of the form owner/name. Raises UserError when it cannot be had.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        return None
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of what is said below in one line
    try:
        # Of each part the one copy of its weights that is loaded here; the checker of images is not.
        return Path(DiffusionPipeline.download(name, safety_checker=None, feature_extractor=None))
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_fetched(name, error) from error
    except Exception as error:
        # The client's own errors of transport derive from Exception alone.
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "huggingface_hub"):
            raise
        raise _not_fetched(name, error) from error
    finally:
        logging.set_verbosity(before)


def _not_fetched(name: str, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return UserError(
        f"model.pretrained={name!r}: no such folder, and the hub's copy cannot be had ({reason}); expected "
        "the pipeline's folder (model_index.json, unet/ or transformer/, vae/ or vqvae/, scheduler/, and "
        "text_encoder/ and tokenizer/ for prompts) in a place given as model.pretrained=PATH"
    )


def load_pipeline(folder: Path, prompt: str, *, weights: bool) -> LatentDiffusion:
    """The pipeline in `folder` as a model.

    Args:
        folder: with `model_index.json`.
        prompt: of a class, with {} for its name.
        weights: false leaves the model on the meta device, as torch's default then has to be.

    Raises UserError for a pipeline of another kind, or a part that is missing or broken.
    """
    index = _read(folder / "model_index.json")
    network = "transformer" if "transformer" in index else "unet"
    vae = "vqvae" if "vqvae" in index else "vae"
    unet = _part(folder, index, network, _NETWORKS, weights)
    autoencoder = _part(folder, index, vae, _AUTOENCODERS, weights)
    scheduler, predicts_v = _scheduler(folder, index)
    if not isinstance(scheduler, DDPMScheduler):
        raise UserError(
            f"model.pretrained: {folder / 'scheduler'} is {type(scheduler).__name__}, expected one with betas"
        )
    _check_fit(folder, unet, autoencoder)
    if isinstance(unet, UNet2DConditionModel):
        prompts = _prompts(folder, index, unet, prompt, weights)
        return LatentDiffusion(autoencoder, unet, None, scheduler, (), prompts=prompts, predicts_v=predicts_v)
    try:
        table = take_class_table(unet)
    except ValueError as error:
        raise UserError(f"model.pretrained: {folder / network}: {error}; expected a DiT") from error
    if table is None:
        return LatentDiffusion(autoencoder, unet, None, scheduler, UNCONDITIONAL, predicts_v=predicts_v)
    null_class = isinstance(unet, DiTTransformer2DModel)
    classes = _class_names(index, table.num_embeddings - null_class)
    return LatentDiffusion(
        autoencoder, unet, table, scheduler, classes, null_class=null_class, predicts_v=predicts_v
    )


def _part(folder: Path, index: dict[str, Any], name: str, kinds: dict[str, Any], weights: bool) -> Any:
    """A network of the pipeline, by diffusers' own loader: it knows old names, several files and formats."""
    kind = kinds.get(str((index.get(name) or [None, None])[1]))
    if kind is None:
        found = index.get(name, "nothing")
        raise UserError(
            f"model.pretrained: {folder / 'model_index.json'} has {found} for {name}, expected "
            f"{' or '.join(kinds)}: {_WANTED}"
        )
    if not (folder / name / "config.json").is_file():
        raise UserError(f"model.pretrained: {folder / name / 'config.json'} is missing; expected {_WANTED}")
    try:
        if not weights:
            return kind.from_config(kind.load_config(folder / name, local_files_only=True))
        module, report = kind.from_pretrained(
            folder / name,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # a reader of another format each
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.pretrained: {folder / name} cannot be read ({reason}); expected diffusers' files"
        ) from error
    for what in ("missing_keys", "unexpected_keys"):
        if names := report.get(what):
            kind_of, listed = what.removesuffix("_keys"), ", ".join(sorted(names)[:8])
            raise UserError(
                f"model.pretrained: {folder / name} has {len(names)} {kind_of} tensors ({listed}); "
                "expected those of its config.json"
            )
    return module


def _check_fit(folder: Path, unet: Any, autoencoder: Any) -> None:
    """Raises UserError where the sizes of network and autoencoder do not fit or are not said."""
    channels = unet.config["in_channels"], autoencoder.config["latent_channels"]
    if channels[0] != channels[1]:
        raise UserError(
            f"model.pretrained: {folder}: a network for {channels[0]} channels on latents of {channels[1]}; "
            f"expected {_WANTED}"
        )
    if unet.config["sample_size"] is None:
        raise UserError(
            f"model.pretrained: {folder}: the network's config.json has no sample_size, expected one"
        )


def _scheduler(folder: Path, index: dict[str, Any]) -> tuple[Scheduler, bool]:
    """The forward process, and whether the network predicts v."""
    config = _read(folder / "scheduler" / "scheduler_config.json")
    named = str((index.get("scheduler") or [None, None])[1])
    return scheduler_of({"_class_name": named, **config}, folder / "scheduler")


def _prompts(folder: Path, index: dict[str, Any], unet: Any, template: str, weights: bool) -> Prompts:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("text_encoder", "tokenizer"):
        if not (folder / name).is_dir():
            raise UserError(f"model.pretrained: {folder / name} is missing; expected {_WANTED}")
    found = (index.get("text_encoder") or [None, None])[1]
    if found != "CLIPTextModel" or unet.config["num_class_embeds"] or unet.config["addition_embed_type"]:
        raise UserError(
            f"model.pretrained: {folder}: a text encoder {found} with further conditions; expected {_WANTED}"
        )
    try:
        with torch.device("cpu"):
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        encoder: nn.Module
        if weights:
            encoder = CLIPTextModel.from_pretrained(
                folder / "text_encoder", local_files_only=True, dtype=torch.float32
            )
        else:
            encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.pretrained: {folder / 'text_encoder'} or tokenizer cannot be read ({reason}); "
            "expected CLIP's"
        ) from error
    return Prompts(encoder, tokenizer, template)


def _class_names(index: dict[str, Any], count: int) -> list[str]:
    names = index.get("id2label") or {}
    return [str(names.get(str(i), i)) for i in range(count)]


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.pretrained: {path} cannot be read ({reason}); expected a diffusers pipeline"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"model.pretrained: {path} holds no JSON object; expected a diffusers pipeline")
    return config
