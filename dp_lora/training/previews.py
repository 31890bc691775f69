"""Previews of a public pre-training: its reconstruction error, and pictures of public images."""

from __future__ import annotations

import numpy as np
import torch

from dp_lora.config.schema import Config
from dp_lora.data.sets import ImageSet
from dp_lora.models.diffusion import class_balanced, sample_latents
from dp_lora.models.latent_diffusion import LatentDiffusion
from dp_lora.models.latents import encode, to_bytes, to_unit_range
from dp_lora.models.sample import Samples, grid

PICTURED = 64
"""Images in a picture of reconstructions."""


@torch.inference_mode()
def reconstruction_error(model: LatentDiffusion, images: ImageSet) -> float:
    """Mean squared error, in the range [-1, 1], of images decoded from the mean of their latents."""
    latents = encode(model, images)
    device = next(model.parameters()).device
    error = 0.0
    for first in range(0, len(images), 256):
        decoded = model.decode(latents.mean[first : first + 256].to(device)).cpu()
        original = to_unit_range(images.images[first : first + 256])
        error += float((decoded - original).square().mean((1, 2, 3)).sum())
    return error / len(images)


@torch.inference_mode()
def reconstructions(model: LatentDiffusion, images: ImageSet) -> bytes:
    """A PNG of public images, each row of eight above the row of their reconstructions."""
    assert images.public
    device = next(model.parameters()).device
    mean, _ = model.encode(to_unit_range(images.images).to(device))
    pairs = np.stack([images.images, to_bytes(model.decode(mean))], 1)
    columns = np.tile(np.arange(8), (len(pairs) + 7) // 8)[: len(pairs)]
    labels = np.repeat(columns, 2)
    flat = pairs.reshape(-1, *images.images.shape[1:])
    return grid(Samples(flat, labels, tuple("12345678")), rows=2 * ((len(pairs) + 7) // 8))


@torch.inference_mode()
def samples(model: LatentDiffusion, config: Config) -> bytes:
    """A PNG of images drawn with the job's sampler, of at most ten classes, one a column."""
    device = next(model.parameters()).device
    classes = model.classes[:10]
    labels = class_balanced(8 * len(classes), len(classes))
    latents = sample_latents(model, labels.to(device), config.sampler, seed=config.seed)
    return grid(Samples(to_bytes(model.decode(latents)), labels.numpy(), classes), rows=8)
