"""The latents of an image set, computed once and kept.

Kept are mean and standard deviation, so that the posterior is sampled afresh at every step. The latents of
private images are as private as the images: their cache is readable by its owner only, and no copy of it ever
leaves for a tracker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dp_lora.data.sets import ImageSet
from dp_lora.models import folders
from dp_lora.models.folders import LatentDiffusion
from dp_lora.records.progress import Progress
from dp_lora.storage import arrays
from dp_lora.storage.keyed import keyed_name


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


def encode(model: LatentDiffusion, images: ImageSet, *, batch_size: int = 256) -> Latents:
    """The latents of all images, on the CPU."""
    parts = [(mean, std) for _, mean, std in encoded_batches(model, images, batch_size)]
    means, stds = zip(*parts, strict=True)
    return Latents(torch.cat(means), torch.cat(stds))


def encoded_batches(
    model: LatentDiffusion, images: ImageSet, batch_size: int = 256, progress: Progress | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batch by batch: the number of its first image, mean and standard deviation, on the CPU."""
    device = next(model.parameters()).device
    for first in range(0, len(images), batch_size):
        with torch.inference_mode():
            mean, std = model.encode(to_unit_range(images.images[first : first + batch_size]).to(device))
        yield first, mean.cpu(), std.cpu()
        if progress is not None:
            progress.update(len(mean))


def cached(model: LatentDiffusion, images: ImageSet, cache: Path, progress: str = "off") -> Latents:
    """The latents of all images, mapped from `cache`, computed first if no job has done so.

    Once for each content of images (and so each set and preprocessing) and of the autoencoder: the store has
    a name for both that only the cache's key can make (`dp_lora.storage.keyed`). It is written batch by
    batch, so the latents need not fit into memory. It is verified each time it is opened
    (`dp_lora.storage.arrays`), and readable by its owner only.

    Args:
        model: whose autoencoder encodes.
        images: uint8 [N, C, H, W].
        cache: folder of the stores.
        progress: as `tracking.progress`.
    """
    shape = ("F32", (len(images), *model.latent_shape))

    key = keyed_name(cache, f"latents {_content(model, images)}")
    # Shown whether or not there is something to do, so that the lines do not depend on which set it is.
    with Progress(len(images), "encode", mode=progress, unit="image") as shown:

        def fill(into: dict[str, np.ndarray]) -> None:
            for first, mean, std in encoded_batches(model, images, progress=shown):
                into["mean"][first : first + len(mean)] = mean.numpy()
                into["std"][first : first + len(std)] = std.numpy()

        stored = arrays.shared(cache / "latents", key, {"mean": shape, "std": shape}, fill)
        shown.update(len(images) - shown.done)
    return Latents(torch.from_numpy(stored["mean"]), torch.from_numpy(stored["std"]))


def _content(model: LatentDiffusion, images: ImageSet) -> str:
    """A digest of all that determines the latents. Private: it confirms a guess of the images."""
    digest = hashlib.sha256(str((images.images.shape, model.latent_shape)).encode())
    for first in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images.images[first : first + 4096]).data)
    digest.update(folders.digest(model.autoencoder).encode())
    config = {key: str(value) for key, value in model.autoencoder.config.items() if key[0] != "_"}
    digest.update(type(model.autoencoder).__name__.encode() + json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()
