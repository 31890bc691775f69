"""Latent diffusion models in diffusers form: built from a configuration, saved, loaded.

Shapes, ranges and dtypes at the boundaries:
    images     float32 [B, C, H, W] in [-1, 1]
    latents    float32 [B, c, h, w], scaled to unit variance over the public set
    labels     int64   [B], an index into `classes`
    timesteps  int64   [B] in [0, num_train_timesteps)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dp_lora.config import AutoencoderConfig, ModelConfig, UNetConfig
from dp_lora.errors import UserError, did_you_mean

WEIGHTS = Path(__file__).parent / "weights"
"""Pre-trained models that ship with the package, one folder each."""


class SingleTokenAttention:
    """Cross-attention to one token, exactly: the softmax over one key is 1, so the output is the value.

    The queries and keys then change nothing, so they are not computed; their gradient is zero.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert encoder_hidden_states.shape[1] == 1, "one condition token expected"
        value: Tensor = attn.to_out[1](attn.to_out[0](attn.to_v(encoder_hidden_states)))
        return value.expand(-1, hidden_states.shape[1], -1)


def shorten_cross_attention(unet: nn.Module) -> None:
    """Gives every cross-attention of a UNet conditioned on one token the exact shortcut."""
    for name, module in unet.named_modules():
        if name.endswith(".attn2") and isinstance(module, Attention):
            module.set_processor(SingleTokenAttention())


WITHOUT_EFFECT = re.compile(r"\.transformer_blocks\.\d+\.(attn2\.to_[qk]|norm2)$")
"""Matches the names of the UNet's modules that only feed the queries and keys that are not computed."""


class LatentDiffusion(nn.Module):
    """An autoencoder, a UNet conditioned on one class token, and the forward diffusion process."""

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        unet: UNet2DConditionModel,
        class_embedder: nn.Embedding,
        scheduler: DDPMScheduler,
        classes: Sequence[str],
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.unet = unet
        self.class_embedder = class_embedder
        self.scheduler = scheduler
        self.classes = tuple(classes)
        shorten_cross_attention(unet)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents of one image."""
        size = int(self.unet.config["sample_size"])
        return int(self.unet.config["in_channels"]), size, size

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each [B, c, h, w], of images in [-1, 1]."""
        posterior = self.autoencoder.encode(images).latent_dist
        scale = self.autoencoder.config["scaling_factor"]
        return posterior.mean * scale, posterior.std * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of scaled latents."""
        images: Tensor = self.autoencoder.decode(latents / self.autoencoder.config["scaling_factor"]).sample
        return images.clamp(-1, 1)

    def predict_noise(self, noisy_latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """eps_theta(z_t, t, c), of the shape of `noisy_latents`."""
        return self.predict_noise_of(noisy_latents, timesteps, self.class_embedder(labels))

    def predict_noise_of(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """The same for class embeddings [B, d] in place of labels."""
        predicted: Tensor = self.unet(
            noisy_latents, timesteps, encoder_hidden_states=conditions.unsqueeze(1), return_dict=False
        )[0]
        return predicted

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """The same as `predict_noise`."""
        return self.predict_noise(noisy_latents, timesteps, labels)

    def new_classes(self, classes: Sequence[str], generator: torch.Generator) -> None:
        """Gives the model one fresh embedding a class: the mean of the public ones and a little noise.

        Nothing of the new images enters: an embedding made from their latents would leak them.
        """
        old = self.class_embedder.weight.detach()
        mean, spread = old.mean(0), old.std(0)
        noise = torch.randn(len(classes), old.shape[1], generator=generator)
        embedder = nn.Embedding(len(classes), old.shape[1])
        embedder.weight.data = mean + 0.1 * spread * noise.to(old)
        self.class_embedder = embedder.to(old.device)
        self.classes = tuple(classes)


def build(model: ModelConfig, *, classes: Sequence[str], channels: int, image_size: int) -> LatentDiffusion:
    """A model with fresh weights, drawn from torch's default generator.

    Raises UserError for sizes that do not fit each other.
    """
    downsampling = 2 ** (len(model.autoencoder.block_out_channels) - 1)
    if image_size % downsampling:
        raise UserError(
            f"public_data.image_size={image_size}: expected a multiple of {downsampling}, by which the "
            "autoencoder (model.autoencoder.block_out_channels) reduces it"
        )
    try:
        autoencoder = _build_autoencoder(model.autoencoder, channels, image_size)
        unet = _build_unet(model.unet, model.autoencoder.latent_channels, image_size // downsampling)
    except ValueError as error:  # diffusers' own checks
        reason = " ".join(str(error).split())
        raise UserError(f"model.name={model.name}: its sizes do not fit each other ({reason})") from error
    embedder = nn.Embedding(len(classes), model.unet.cross_attention_dim)
    scheduler = DDPMScheduler(
        num_train_timesteps=model.scheduler.num_train_timesteps,
        beta_start=model.scheduler.beta_start,
        beta_end=model.scheduler.beta_end,
        beta_schedule=model.scheduler.beta_schedule,
        clip_sample=False,
    )
    return LatentDiffusion(autoencoder, unet, embedder, scheduler, classes)


def _build_autoencoder(config: AutoencoderConfig, channels: int, image_size: int) -> AutoencoderKL:
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=image_size,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def _build_unet(config: UNetConfig, latent_channels: int, latent_size: int) -> UNet2DConditionModel:
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
    )


def save(model: LatentDiffusion, folder: Path, record: dict[str, Any]) -> None:
    """Writes the model in diffusers form and `record.json`: how it was made, with a sha256 for each file."""
    model.autoencoder.save_pretrained(folder / "autoencoder")
    model.unet.save_pretrained(folder / "unet")
    model.scheduler.save_pretrained(folder / "scheduler")
    (folder / "class_embedder").mkdir(parents=True, exist_ok=True)
    save_file(
        {"weight": model.class_embedder.weight.detach().contiguous()},
        folder / "class_embedder" / "model.safetensors",
    )
    text = json.dumps({"classes": list(model.classes)}, indent=2) + "\n"
    (folder / "class_embedder" / "config.json").write_text(text)
    files = {str(path.relative_to(folder)): sha256(path) for path in weight_files(folder)}
    (folder / "record.json").write_text(json.dumps({**record, "sha256": files}, indent=2) + "\n")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, sorted."""
    return sorted(folder.rglob("*.safetensors"))


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find(pretrained: str) -> Path:
    """The folder of a pre-trained model: weights that ship with the package by name, or a path.

    Raises UserError when there is none.
    """
    shipped = WEIGHTS / pretrained
    folder = shipped if shipped.is_dir() else Path(pretrained).expanduser()
    if not (folder / "unet" / "config.json").exists():
        names = sorted(path.name for path in WEIGHTS.iterdir()) if WEIGHTS.is_dir() else []
        raise UserError(
            f"model.pretrained={pretrained!r}: expected a folder in diffusers form (unet/config.json ...) "
            f"or one of {', '.join(names) or 'no shipped weights'}{did_you_mean(pretrained, names)}"
        )
    return folder


def load(folder: Path) -> LatentDiffusion:
    """The model saved in `folder`, on the CPU, in evaluation mode.

    Raises UserError naming the part that is missing, truncated or of another shape.
    """
    autoencoder = _load_part(AutoencoderKL, folder, "autoencoder")
    unet = _load_part(UNet2DConditionModel, folder, "unet")
    scheduler = DDPMScheduler.from_config(_read_config(folder / "scheduler" / "scheduler_config.json"))
    classes = _read_config(folder / "class_embedder" / "config.json").get("classes", [])
    weights = folder / "class_embedder" / "model.safetensors"
    expected = {"weight": (len(classes), int(unet.config["cross_attention_dim"]))}
    embedder = nn.Embedding.from_pretrained(_load_tensors(weights, expected)["weight"], freeze=False)
    return LatentDiffusion(autoencoder, unet, embedder, scheduler, classes).eval()


def _load_part(kind: Any, folder: Path, name: str) -> Any:
    """`kind.from_pretrained`, with whatever is wrong with the files in one line."""
    config = _read_config(folder / name / "config.json")
    try:
        module = kind.from_config(config)
    except (ValueError, TypeError) as error:
        raise _unreadable(folder / name / "config.json", error) from error
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    module.load_state_dict(_load_tensors(folder / name / "diffusion_pytorch_model.safetensors", expected))
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
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            has, wanted = found.get(key, "nothing"), expected.get(key, "nothing")
            raise UserError(f"model.pretrained: {path} has {has} for {key}, expected {wanted}")
    return tensors


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"model.pretrained: {path} cannot be read ({reason}); expected a folder in diffusers form"
    )
