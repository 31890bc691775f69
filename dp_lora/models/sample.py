"""Labelled images from a model: the released use of an adapter.

Labels come from a public prior, as many of each class, never from the private label counts.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import Config, SamplerConfig
from dp_lora.errors import UserError, did_you_mean
from dp_lora.models.diffusion import class_balanced, in_batches, initial_noise, sample_latents
from dp_lora.models.folders import LatentDiffusion
from dp_lora.models.latents import to_bytes
from dp_lora.models.text_to_image import seeds
from dp_lora.records.progress import Progress
from dp_lora.storage.files import write_atomic

_FLAT = 2
"""Levels of 255 between the darkest and the brightest pixel of an image that is called plain."""


@dataclass(frozen=True)
class Samples:
    """Generated images uint8 [N, C, H, W] and the labels int64 [N] they were generated for."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def generate(model: LatentDiffusion, config: Config, description: str = "sample") -> Samples:
    """The images that `config.sampler` asks for, by default of every class as many."""
    labels = labels_of(model.classes, config.sampler.num_samples, config.sampler.counts)
    return draw(model, labels, config.sampler, config.seed, config.tracking.progress, description)


def labels_of(
    classes: Sequence[str], number: int, counts: Mapping[str, int] | None, field: str = "sampler.classes"
) -> Tensor:
    """int64 [N]: the class of each image: `counts` of each, in the order of `classes`, or as many of each.

    Args:
        classes: of the model.
        number: N, without counts.
        counts: a public choice.
        field: the setting that gives the counts, for errors.

    Raises UserError for a class that the model does not have.
    """
    if counts is None:
        return class_balanced(number, len(classes))
    for name, count in counts.items():
        if name not in classes:
            raise UserError(
                f"{field}: {name!r} is none of the adapter's; expected some of {', '.join(classes[:12])}"
                f"{did_you_mean(name, classes)}"
            )
        if count < 1:
            raise UserError(f"{field}: {name}: {count}: expected a whole number of images, at least 1")
    return torch.repeat_interleave(
        torch.arange(len(classes)), torch.tensor([counts.get(name, 0) for name in classes])
    )


@torch.inference_mode()
def draw(
    model: LatentDiffusion,
    labels: Tensor,
    sampler: SamplerConfig,
    seed: int,
    progress_mode: str = "auto",
    description: str = "sample",
) -> Samples:
    """One image for each of `labels` int64 [N].

    Image i depends on the model, its label, `seed`, the sampler and i alone, not on the batches.
    """
    refuse_sampler(model, sampler.name)
    model.eval()
    device = next(model.unet.parameters()).device
    images = []
    # Generated images only, so what the bar shows is public.
    with Progress(len(labels), description, mode=progress_mode, unit="image", public=True) as progress:
        for batch in in_batches(len(labels), sampler.batch_size):
            chosen = labels[batch.start : batch.stop].to(device)
            images.append(to_bytes(_images(model, chosen, sampler, seed, batch.start)))
            progress.update(len(batch))
    return Samples(np.concatenate(images), labels.numpy(), model.classes)


def _images(model: LatentDiffusion, labels: Tensor, sampler: SamplerConfig, seed: int, first: int) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] of `labels` [B], of which the first is image `first`."""
    if sampler.name != "pipeline":
        return model.decode(sample_latents(model, labels, sampler, seed=seed, first=first))
    assert model.source is not None
    noise = initial_noise(seed, first, len(labels), model.latent_shape).to(labels.device)
    conditions, neutral = model.condition(labels), model.neutral_condition(len(labels))
    assert isinstance(conditions, dict) and isinstance(neutral, dict)
    return model.source.draw(noise, conditions, neutral, sampler, seeds(seed, first, len(labels)))


def refuse_sampler(model: LatentDiffusion, name: str) -> None:
    """UserError where the sampler `name` cannot draw from `model`."""
    if name == "pipeline" and model.source is None:
        raise UserError(
            "sampler.name=pipeline: the model is no pipeline with a scheduler of its own here; expected ddim "
            "or dpmsolver++"
        )
    if name != "pipeline" and model.process.flows:
        raise UserError(
            f"sampler.name={name}: the model is a flow; expected pipeline, which draws with its own scheduler"
        )


def save(samples: Samples, folder: Path, rows: int = 10) -> None:
    """Writes `samples.npz` (images, labels, classes) and `samples.png`, a grid with one column a class."""
    write_atomic(folder / "samples.png", grid(samples, rows))
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, images=samples.images, labels=samples.labels, classes=np.array(samples.classes)
    )
    write_atomic(folder / "samples.npz", buffer.getvalue())


def load(folder: Path) -> Samples:
    """Loads the samples that `save` wrote. Raises UserError if the file is damaged."""
    path = folder / "samples.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            samples = Samples(saved["images"], saved["labels"], tuple(map(str, saved["classes"])))
        if not _fits(samples):
            raise ValueError
        return samples
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: the samples cannot be read ({type(error).__name__}); remove the file, and the same "
            "command draws them again from the adapter"
        ) from error


def _fits(samples: Samples) -> bool:
    """Whether these are images with a label of a class each."""
    images, labels = samples.images, samples.labels
    return (
        images.dtype == np.uint8
        and labels.dtype == np.int64
        and images.ndim == 4
        and labels.shape == images.shape[:1]
        and bool(((labels >= 0) & (labels < len(samples.classes))).all())
    )


def plain(samples: Samples) -> int:
    """How many of the images are of one colour, as those of a model that was trained to nothing are."""
    pixels = samples.images.reshape(*samples.images.shape[:2], -1)
    return int((np.ptp(pixels, axis=2) <= _FLAT).all(axis=1).sum())


def grid(samples: Samples, rows: int = 10, scale: int = 2) -> bytes:
    """A PNG with the first `rows` images of each class, one column a class, enlarged `scale` times.

    Images of a single class fill as many columns as there are rows.
    """
    from PIL import Image

    channels, height, width = samples.images.shape[1:]
    single = len(samples.classes) == 1
    # An unconditional model has no classes to sort by.
    columns = np.arange(len(samples.labels)) % rows if single else samples.labels
    number = rows if single else len(samples.classes)
    sheet = np.zeros((rows * height, number * width, channels), np.uint8)
    for column in range(number):
        for row, image in enumerate(samples.images[columns == column][:rows]):
            place = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
            sheet[place] = image.transpose(1, 2, 0)
    picture = Image.fromarray(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
