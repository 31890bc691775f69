"""Diffusers pipelines as latent diffusion models: a folder with `model_index.json`, or its name on the hub.

| pipeline | network | condition |
|---|---|---|
| LDMPipeline (unet, vqvae or vae) | UNet2DModel | none, or a class where the UNet has class embeddings |
| DiTPipeline (transformer, vae) | DiTTransformer2DModel | a class |
| StableDiffusionPipeline 1.x, 2.x (unet, vae, text_encoder, tokenizer) | UNet2DConditionModel | a prompt |
| those of `families` | of the family | a prompt |
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
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

from dp_lora.config.schema import QUANTISED
from dp_lora.errors import UserError
from dp_lora.models.families import FAMILIES, Family
from dp_lora.models.latent_diffusion import UNCONDITIONAL, LatentDiffusion
from dp_lora.models.networks import compute_in_float32, keep_statistics, take_class_table
from dp_lora.models.process import Scheduler, scheduler_of
from dp_lora.models.prompts import Prompts
from dp_lora.models.quantised import functions, quantise
from dp_lora.models.text_to_image import PipelinePrompts, TextToImage, sides, silent

_NETWORKS = {kind.__name__: kind for kind in (UNet2DConditionModel, UNet2DModel, DiTTransformer2DModel)}
_AUTOENCODERS = {kind.__name__: kind for kind in (AutoencoderKL, VQModel)}
_PIPELINES = (
    "LDMPipeline",
    "LatentDiffusionUncondPipeline",
    "DiTPipeline",
    "StableDiffusionPipeline",
)
"""Those with a fixed list of networks; the first two are one, by its name of today and of 2022."""
_WANTED = (
    "an unconditional or class-conditional latent diffusion pipeline, a DiT, Stable Diffusion 1.x or 2.x, or "
    f"one of {', '.join(FAMILIES)}"
)


_LONGEST = 10**6
"""Tokens of a prompt; a tokenizer that does not know its length says 10^30."""


def is_pipeline(folder: Path) -> bool:
    """Whether `folder` holds a diffusers pipeline."""
    return (folder / "model_index.json").is_file()


def pipeline_name(folder: Path) -> str:
    """The class of the pipeline in `folder`."""
    return str(_read(folder / "model_index.json").get("_class_name", "pipeline"))


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


@dataclass(frozen=True)
class Given:
    """How a pipeline is to be loaded.

    Fields:
        prompt: of a class, with {} for its name.
        weights: false leaves the model on the meta device, as torch's default then has to be.
        image_size: of a model that takes several; None: the published one.
        prompt_length: tokens of a prompt; None: as many as the pipeline.
        precision: of the weights of a pipeline of `families`, see `folders.load`.
    """

    prompt: str
    weights: bool
    image_size: int | None = None
    prompt_length: int | None = None
    precision: str = "float32"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not quantised."""
        found: torch.dtype = torch.bfloat16 if self.precision != "float32" else torch.float32
        return found


def load_pipeline(folder: Path, given: Given) -> LatentDiffusion:
    """The pipeline in `folder`, with `model_index.json`, as a model.

    Raises UserError for a pipeline of another kind, or a part that is missing or broken.
    """
    prompt, weights, prompt_length = given.prompt, given.weights, given.prompt_length
    index = _read(folder / "model_index.json")
    family = FAMILIES.get(str(index.get("_class_name")))
    if family is not None:
        return _of_family(family, folder, index, given)
    if index.get("_class_name", _PIPELINES[0]) not in _PIPELINES:
        raise UserError(f"model.pretrained: {folder} is a {index['_class_name']}; expected {_WANTED}")
    if prompt_length is not None:
        raise UserError(
            f"model.prompt_length={prompt_length}: {folder} has a length of its own; expected null"
        )
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


def _part(
    folder: Path,
    index: dict[str, Any],
    name: str,
    kinds: dict[str, Any],
    weights: bool,
    dtype: torch.dtype = torch.float32,
) -> Any:
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
    _refuse_quantised(folder / name / "config.json")
    try:
        if not weights:
            return kind.from_config(kind.load_config(folder / name, local_files_only=True))
        module, report = kind.from_pretrained(
            folder / name,
            torch_dtype=dtype,
            # Without it some classes stay in float32.
            low_cpu_mem_usage=dtype != torch.float32,
            local_files_only=True,
            output_loading_info=True,
            variant=_variant(folder / name),
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
    _refuse_not_finite(module, folder / name)
    return module


def _refuse_quantised(path: Path) -> None:
    """Refuses files with weights in fewer than 16 bits; `quantised` makes such weights of others."""
    found = _read(path).get("quantization_config")
    if found is not None:
        package = found.get("quant_method") if isinstance(found, dict) else found
        raise UserError(
            f"model.pretrained: {path} has weights that {package} quantised, which is not supported here; "
            "expected weights in 16 or 32 bits, with model.base_precision=bfloat16, int8 or nf4 where they "
            "must be small"
        )


def _variant(folder: Path) -> str | None:
    """fp16 or bf16, where the folder has weights of that variant alone."""
    names = [path.name for path in folder.glob("*model*") if path.suffix in (".safetensors", ".bin")]
    for variant in ("fp16", "bf16"):
        if names and all(f".{variant}" in name for name in names):
            return variant
    return None


def _refuse_not_finite(module: nn.Module, folder: Path) -> None:
    for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        if value.is_floating_point() and not value.is_meta and not bool(value.isfinite().all()):
            raise UserError(
                f"model.pretrained: {folder}: {name} holds numbers that are not finite; expected none"
            )


def _of_family(family: Family, folder: Path, index: dict[str, Any], given: Given) -> LatentDiffusion:
    """A pipeline of a family: diffusers loads and connects its parts."""
    if given.prompt_length is not None and family.length is None:
        raise UserError(
            f"model.prompt_length={given.prompt_length}: {family.pipeline} has its own length; expected null"
        )
    if given.precision in QUANTISED:
        functions(given.precision)
    kinds = {name: {name: getattr(diffusers, name)} for name in (family.network, family.autoencoder)}
    weights = given.weights
    network = _part(folder, index, family.component, kinds[family.network], weights, given.dtype)
    if given.precision in QUANTISED:
        quantise(network, given.precision)
    compute_in_float32(network)
    autoencoder = _part(folder, index, "vae", kinds[family.autoencoder], weights)
    keep_statistics(autoencoder)
    scheduler, predicts_v = _scheduler(folder, index)
    squares = math.prod(autoencoder.config.get("patch_size") or (1,)) * family.packing**2
    latents = autoencoder.config.get("latent_channels") or autoencoder.config["z_dim"]
    channels = network.config["in_channels"], latents * squares
    if channels[0] != channels[1]:
        raise UserError(
            f"model.pretrained: {folder}: a network for {channels[0]} channels on latents of {channels[1]}; "
            f"expected {_WANTED}"
        )
    if isinstance(network, UNet2DConditionModel):
        _refuse_conditions(folder, network, "text_time")
    try:
        side, factor = sides(network, autoencoder, family, given.image_size)
    except ValueError as error:
        raise UserError(
            f"data.image_size={given.image_size}: expected a multiple of {error} for the {family.pipeline} "
            "that model.pretrained names"
        ) from error
    parts = {family.component: network, "vae": autoencoder}
    pipe = _connected(family, folder, index, parts, given.dtype) if weights else None
    prompts = PipelinePrompts(family, pipe, given.prompt, given.prompt_length)
    source = TextToImage(family, side, factor, pipe, low=given.dtype != torch.float32)
    return LatentDiffusion(
        autoencoder, network, None, scheduler, (), prompts=prompts, predicts_v=predicts_v, source=source
    )


def _connected(
    family: Family, folder: Path, index: dict[str, Any], parts: dict[str, nn.Module], dtype: torch.dtype
) -> Any:
    """The pipeline of diffusers with `parts`, and its text encoders in `dtype`."""
    from diffusers.utils import logging

    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] not in (None, "diffusers", "transformers"):
            raise UserError(
                f"model.pretrained: {folder / 'model_index.json'} has {entry} for {name}; expected those of "
                "diffusers and transformers, since no other code is run"
            )
    for name in (name for name in index if name.startswith("text_encoder") and index[name][1] is not None):
        parts[name] = part_of_text(folder / name, str(index[name][1]), dtype)
    kind = getattr(diffusers, family.pipeline)
    optional = ("image_encoder", "feature_extractor")
    unused = {name: None for name in optional if name in kind._optional_components}
    # SD 3 without its third encoder, for one.
    unused |= {name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    logging.disable_progress_bar()
    with silent():
        try:
            pipe = kind.from_pretrained(folder, local_files_only=True, **parts, **unused)
        except Exception as error:  # a reader of another format each
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"model.pretrained: {folder} cannot be read ({reason}); expected {family.pipeline}"
            ) from error
    _check_tokenizers(family, folder, pipe)
    return pipe


def part_of_text(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The text encoder in `folder`, of transformers' class `name`, with all of its weights."""
    import transformers
    from transformers.utils import logging

    kind = getattr(transformers, name, None)
    if kind is None or not folder.is_dir():
        raise UserError(f"model.pretrained: {folder} is missing, expected {name}")
    _refuse_quantised(folder / "config.json")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with silent():
        try:
            module, report = kind.from_pretrained(
                folder,
                local_files_only=True,
                dtype=dtype,
                output_loading_info=True,
                variant=_variant(folder),
            )
        except Exception as error:  # transformers raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"model.pretrained: {folder} cannot be read ({reason}); expected a {kind.__name__}"
            ) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model.pretrained: {folder} has {len(missing)} missing tensors ({', '.join(missing[:8])}); "
            "expected those of its config.json"
        )
    _refuse_not_finite(module, folder)
    return module.eval().requires_grad_(False)


def _check_tokenizers(family: Family, folder: Path, pipe: Any) -> None:
    """Refuses tokenizers that do not say to which length a prompt is padded, where the family does not."""
    for name in (name for name in pipe.components if name.startswith("tokenizer")):
        tokenizer = getattr(pipe, name)
        if tokenizer is not None and "CLIP" in type(tokenizer).__name__:
            _check_length(tokenizer, folder / name)


def _check_length(tokenizer: Any, folder: Path) -> None:
    if tokenizer.model_max_length > _LONGEST:
        raise UserError(
            f"model.pretrained: {folder / 'tokenizer_config.json'} has no model_max_length; expected the "
            "number of tokens that the text encoder takes"
        )


def _refuse_conditions(folder: Path, unet: UNet2DConditionModel, added: str | None) -> None:
    """Refuses a UNet with conditions that would be left out: of classes, guidance or places."""
    known = {
        "addition_embed_type": added,
        "class_embed_type": None,
        "num_class_embeds": None,
        "time_cond_proj_dim": None,
        "encoder_hid_dim_type": None,
        "encoder_hid_dim": None,
        "attention_type": "default",
    }
    for name, wanted in known.items():
        if unet.config.get(name, wanted) != wanted:
            raise UserError(
                f"model.pretrained: {folder}: its UNet has {name}={unet.config[name]!r}, a condition that "
                f"is not known here; expected {wanted if wanted is not None else 'null'}"
            )


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
    if found != "CLIPTextModel":
        raise UserError(f"model.pretrained: {folder}: a text encoder {found}; expected {_WANTED}")
    _refuse_conditions(folder, unet, None)
    try:
        with torch.device("cpu"):
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        encoder: nn.Module
        if weights:
            encoder = CLIPTextModel.from_pretrained(
                folder / "text_encoder",
                local_files_only=True,
                dtype=torch.float32,
                variant=_variant(folder / "text_encoder"),
            )
        else:
            encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.pretrained: {folder / 'text_encoder'} or tokenizer cannot be read ({reason}); "
            "expected CLIP's"
        ) from error
    _check_length(tokenizer, folder / "tokenizer")
    _refuse_not_finite(encoder, folder / "text_encoder")
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
