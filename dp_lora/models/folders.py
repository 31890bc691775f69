"""Latent diffusion models in diffusers form: built from a configuration, saved, found, loaded.

A folder of ours holds `autoencoder/`, `unet/`, `scheduler/`, `record.json`, and for a class-conditional model
`class_embedder/`, with a condition of no class where one was trained. A folder with `model_index.json` is a
diffusers pipeline: `pipelines` reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dp_lora.config.load import WEIGHTS
from dp_lora.config.schema import PROMPT, ModelConfig
from dp_lora.errors import UserError, did_you_mean
from dp_lora.models.families import FAMILIES
from dp_lora.models.latent_diffusion import UNCONDITIONAL, LatentDiffusion
from dp_lora.models.networks import EXTRAS, build_autoencoder, build_unet, complete, shorten_cross_attention
from dp_lora.models.pipelines import Given, from_hub, is_pipeline, load_pipeline, pipeline_name
from dp_lora.storage.files import expanded

__all__ = [
    "LatentDiffusion",
    "build",
    "find",
    "load",
    "outline",
    "save",
    "sha256",
    "shorten_cross_attention",
    "weight_files",
]

_PARTS = {kind.__name__: kind for kind in (AutoencoderKL, VQModel, UNet2DConditionModel, UNet2DModel)}


def build(model: ModelConfig, *, classes: Sequence[str], channels: int, image_size: int) -> LatentDiffusion:
    """A model with fresh weights, drawn from torch's default generator, on torch's default device.

    Args:
        model: the sizes.
        classes: of a class-conditional model; not used by an unconditional one.
        channels, image_size: of the images.

    Raises UserError for sizes that do not fit each other.
    """
    downsampling = 2 ** (len(model.autoencoder.block_out_channels) - 1)
    if image_size % downsampling:
        raise UserError(
            f"public_data.image_size={image_size}: expected a multiple of {downsampling}, by which the "
            "autoencoder (model.autoencoder.block_out_channels) reduces it"
        )
    try:
        autoencoder = build_autoencoder(model.autoencoder, channels, image_size)
        unet = build_unet(
            model.unet, model.conditioning, model.autoencoder.latent_channels, image_size // downsampling
        )
    except ValueError as error:  # diffusers' own checks
        reason = " ".join(str(error).split())
        raise UserError(f"model.name={model.name}: its sizes do not fit each other ({reason})") from error
    embedder = None
    if model.conditioning == "class":
        embedder = nn.Embedding(len(classes), model.unet.cross_attention_dim)
    with torch.device("cpu"):
        scheduler = DDPMScheduler(
            num_train_timesteps=model.scheduler.num_train_timesteps,
            beta_start=model.scheduler.beta_start,
            beta_end=model.scheduler.beta_end,
            beta_schedule=model.scheduler.beta_schedule,
            clip_sample=False,
        )
    return LatentDiffusion(autoencoder, unet, embedder, scheduler, classes if embedder else UNCONDITIONAL)


def save(model: LatentDiffusion, folder: Path, record: dict[str, Any]) -> None:
    """Writes a model of `build` in diffusers form, and `record.json`: how it was made, the files' sha256."""
    assert model.source is None and model.prompts is None, "pipelines stay as they are"
    model.autoencoder.save_pretrained(folder / "autoencoder")
    model.unet.save_pretrained(folder / "unet")
    model.scheduler.save_pretrained(folder / "scheduler")
    if model.class_embedder is not None:
        (folder / "class_embedder").mkdir(parents=True, exist_ok=True)
        tensors = {"weight": model.class_embedder.weight.detach().contiguous()}
        if model.null_embedding is not None:
            tensors["null"] = model.null_embedding.contiguous()
        save_file(tensors, folder / "class_embedder" / "model.safetensors")
        null = {} if model.null_embedding is None else {"null_class": True}
        text = json.dumps({"classes": list(model.classes), **null}, indent=2) + "\n"
        (folder / "class_embedder" / "config.json").write_text(text)
    files = {str(path.relative_to(folder)): sha256(path) for path in weight_files(folder)}
    (folder / "record.json").write_text(json.dumps({**record, "sha256": files}, indent=2) + "\n")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, sorted."""
    return sorted(folder.rglob("*.safetensors"))


def digest(model: nn.Module) -> str:
    """Hexadecimal sha256 of the names and values of all parameters and persistent buffers."""
    hashed = hashlib.sha256()
    for name, value in model.state_dict().items():
        hashed.update(name.encode())
        # As bytes: numpy knows no bfloat16.
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(pretrained: str) -> Path:
    """The folder of a pre-trained model: shipped weights by name, a path, or a pipeline on the hub by name.

    Raises UserError when there is none.
    """
    shipped = WEIGHTS / pretrained
    folder = shipped if shipped.is_dir() else expanded(pretrained, f"model.pretrained={pretrained}")
    if (folder / "unet" / "config.json").exists() or is_pipeline(folder):
        return folder
    if folder.is_file():
        raise UserError(
            f"model.pretrained={pretrained!r}: is a file; expected the folder that `dp-lora-import "
            f"{pretrained} --out=DIR --config=PIPELINE` makes of it, or --layout=NAME for one of CompVis"
        )
    if not folder.exists() and (downloaded := from_hub(pretrained)) is not None:
        return downloaded
    names = sorted(path.name for path in WEIGHTS.iterdir()) if WEIGHTS.is_dir() else []
    raise UserError(
        f"model.pretrained={pretrained!r}: expected a folder in diffusers form (unet/config.json ... or "
        "model_index.json; dp-lora-import makes one of a CompVis checkpoint), the name of a pipeline on the "
        "hub (owner/name) or one of "
        f"{', '.join(names) or 'no shipped weights'}{did_you_mean(pretrained, names)}"
    )


def sha256_of_weights(folder: Path) -> str:
    """Hexadecimal sha256 of the weight files of a saved model, in their order."""
    files = weight_files(folder) or sorted(folder.rglob("*.bin"))
    return hashlib.sha256("\n".join(sha256(path) for path in files).encode()).hexdigest()


def load(
    folder: Path,
    prompt: str = PROMPT,
    *,
    image_size: int | None = None,
    prompt_length: int | None = None,
    precision: str = "float32",
) -> LatentDiffusion:
    """The model in `folder`, on the CPU and in evaluation mode.

    Args:
        folder: of ours, or of a diffusers pipeline.
        prompt: of a class, with {} for its name: for text-to-image pipelines.
        image_size: of a pipeline that takes several; None: the published one.
        prompt_length: tokens of a prompt; None: as many as the pipeline.
        precision: of the weights; other than float32 for pipelines of `families` alone. int8 and nf4 are
            those of the network's linear layers; its other parts and the text encoders are in bfloat16 then.

    Raises UserError naming the part that is missing, truncated or of another shape.
    """
    if precision != "float32" and not (is_pipeline(folder) and pipeline_name(folder) in FAMILIES):
        raise UserError(
            f"model.base_precision={precision}: {folder} is no {', '.join(FAMILIES)}; expected float32"
        )
    return _load(
        folder,
        prompt,
        weights=True,
        image_size=image_size,
        prompt_length=prompt_length,
        precision=precision,
    )


def outline(
    folder: Path, *, image_size: int | None = None, prompt_length: int | None = None
) -> LatentDiffusion:
    """The model in `folder` without its weights, on torch's meta device: its names, shapes and classes.

    Raises UserError as `load` does, as far as that can be told from the headers of the files.
    """
    with torch.device("meta"):
        return _load(folder, PROMPT, weights=False, image_size=image_size, prompt_length=prompt_length)


def _load(
    folder: Path,
    prompt: str,
    *,
    weights: bool,
    image_size: int | None,
    prompt_length: int | None,
    precision: str = "float32",
) -> LatentDiffusion:
    if is_pipeline(folder):
        given = Given(prompt, weights, image_size, prompt_length, precision)
        return load_pipeline(folder, given).eval()
    autoencoder = _load_part(folder, "autoencoder", weights)
    unet = _load_part(folder, "unet", weights)
    place = folder / "scheduler" / "scheduler_config.json"
    config = _read_config(place)
    named = config.get("_class_name"), config.get("prediction_type", "epsilon")
    if named != ("DDPMScheduler", "epsilon"):
        raise UserError(
            f"model.pretrained: {place} has {named}, expected a DDPMScheduler, which predicts epsilon"
        )
    with torch.device("cpu"):
        scheduler = DDPMScheduler.from_config(config)
    if isinstance(unet, UNet2DModel):
        return LatentDiffusion(autoencoder, unet, None, scheduler, UNCONDITIONAL).eval()
    saved = _read_config(folder / "class_embedder" / "config.json")
    classes, width = saved.get("classes", []), int(unet.config["cross_attention_dim"])
    file = folder / "class_embedder" / "model.safetensors"
    expected = {"weight": (len(classes), width), **({"null": (1, width)} if saved.get("null_class") else {})}
    if weights:
        tensors = _load_tensors(file, expected)
    else:
        _check_tensors(file, expected)
        tensors = {name: torch.empty(shape) for name, shape in expected.items()}
    embedder = nn.Embedding.from_pretrained(tensors["weight"], freeze=False)
    model = LatentDiffusion(autoencoder, unet, embedder, scheduler, classes).eval()
    model.null_embedding = tensors.get("null")
    return model


def _load_part(folder: Path, name: str, weights: bool) -> Any:
    """A network of ours, with whatever is wrong with its files in one line."""
    path = folder / name / "config.json"
    config = _read_config(path)
    kind = _PARTS.get(str(config.get("_class_name")))
    if kind is None:
        raise UserError(
            f"model.pretrained: {path} has _class_name {config.get('_class_name')!r}; expected one of "
            f"{', '.join(_PARTS)}"
        )
    extras = {key: config.pop(key) for key in EXTRAS if key in config}
    try:
        with torch.device("meta"):
            module = kind.from_config(config)
            complete(module, extras)
    except (ValueError, TypeError) as error:
        raise _unreadable(path, error) from error
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    file = folder / name / "diffusion_pytorch_model.safetensors"
    if weights:
        module.load_state_dict(_load_tensors(file, expected), assign=True)
    else:
        _check_tensors(file, expected)
    return module


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(config, dict):
        raise UserError(f"model.pretrained: {path} holds no JSON object; expected a diffusers folder")
    return config


def _load_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError unless they have the expected names and shapes."""
    _check_tensors(path, expected)
    return load_file(path, device="cpu")


def _check_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless the header of a safetensors file has the expected names and shapes."""
    try:
        with safe_open(path, "pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            has, wanted = found.get(key, "nothing"), expected.get(key, "nothing")
            raise UserError(f"model.pretrained: {path} has {has} for {key}, expected {wanted}")


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"model.pretrained: {path} cannot be read ({reason}); expected a folder in diffusers form"
    )
