"""The latents of an image set, computed once and kept.

The latents of private images are as private as the images: their cache is readable by its owner only,
and no copy of it ever leaves for a tracker.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dp_lora.data import ImageSet
from dp_lora.files import private_directory, write_atomic
from dp_lora.models import LatentDiffusion


@dataclass(frozen=True, repr=False)
class Latents:
    """Mean and standard deviation of the scaled latents of N images, float32 [N, c, h, w] each."""

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, indices: Tensor, noise: Tensor) -> Tensor:
        """Draws of the posterior of the images `indices` [B], for standard normal `noise` [B, c, h, w]."""
        return self.mean[indices] + self.std[indices] * noise

    def to(self, device: torch.device) -> Latents:
        """The same on `device`."""
        return Latents(self.mean.to(device), self.std.to(device))


def to_unit_range(images: np.ndarray) -> Tensor:
    """uint8 [B, C, H, W] in 0..255 as float32 in [-1, 1]."""
    return torch.from_numpy(images).float() / 127.5 - 1


def to_bytes(images: Tensor) -> np.ndarray:
    """float [B, C, H, W] in [-1, 1] as uint8 in 0..255, rounded."""
    return np.asarray(((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())


@torch.inference_mode()
def encode(model: LatentDiffusion, images: ImageSet, *, batch_size: int = 256) -> Latents:
    """The latents of all images, on the CPU."""
    device = next(model.parameters()).device
    means, stds = [], []
    for first in range(0, len(images), batch_size):
        mean, std = model.encode(to_unit_range(images.images[first : first + batch_size]).to(device))
        means.append(mean.cpu())
        stds.append(std.cpu())
    return Latents(torch.cat(means).clone(), torch.cat(stds).clone())


def cached(model: LatentDiffusion, images: ImageSet, cache: Path) -> Latents:
    """The latents of all images, from `cache` when the same autoencoder has encoded the same images before.

    The file is named by the content of both, appears as a whole, so that many jobs may start together, and
    is readable by its owner only.
    """
    path = private_directory(cache / "latents") / f"{_content(model, images)}.npy"
    if not path.exists():
        latents = encode(model, images)
        buffer = io.BytesIO()
        np.save(buffer, torch.stack([latents.mean, latents.std]).numpy())
        write_atomic(path, buffer.getvalue(), mode=0o600)
    mean, std = torch.from_numpy(np.load(path))
    return Latents(mean, std)


def _content(model: LatentDiffusion, images: ImageSet) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(images.images).data)
    digest.update(str(images.images.shape).encode())
    for name, value in model.autoencoder.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    digest.update(str(model.autoencoder.config["scaling_factor"]).encode())
    return digest.hexdigest()[:32]
