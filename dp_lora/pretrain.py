"""Public pre-training: the autoencoder on images, then the diffusion model on its latents.

Public images only. Nothing here is private, so losses may be shown.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dp_lora.config import Config, PretrainConfig
from dp_lora.data import ImageSet, ImageSplits
from dp_lora.diffusion import per_example_loss
from dp_lora.latents import Latents, encode, to_unit_range
from dp_lora.models import LatentDiffusion, build, save
from dp_lora.progress import Progress
from dp_lora.provenance import hardware, versions
from dp_lora.train import Checkpoint, Step, learning_rate, resume, run_steps

WARMUP_STEPS = 100


class _PublicStep(ABC):
    """AdamW on a mean loss, with warm-up, cosine decay and gradients clipped to norm 1 for stability.

    Every random number of step s comes from a generator seeded with (seed, stage, s), so a resumed
    training takes the same steps.
    """

    def __init__(self, module: nn.Module, base_rate: float, total: int, seed: int) -> None:
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=base_rate, weight_decay=1e-4)
        self.base_rate, self.total, self.seed = base_rate, total, seed

    def __call__(self, step: int) -> dict[str, float]:
        rate = learning_rate(self.base_rate, "cosine", step, self.total, WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(_generator(self.seed, type(self).__name__, step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return {"loss": loss.item()}

    @abstractmethod
    def loss(self, generator: torch.Generator) -> Tensor:
        """Of one public batch, drawn by `generator`."""

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


class AutoencoderStep(_PublicStep):
    """Mean squared error of the reconstruction, plus the posterior's weighted divergence from N(0, I)."""

    def __init__(self, model: LatentDiffusion, images: ImageSet, config: PretrainConfig, seed: int) -> None:
        rate, steps = config.autoencoder_learning_rate, config.autoencoder_steps
        super().__init__(model.autoencoder, rate, steps, seed)
        self.images, self.config = images.images, config

    def loss(self, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.images), (self.config.autoencoder_batch_size,), generator=generator)
        images = to_unit_range(self.images[chosen.numpy()]).to(self.parameters[0].device)
        posterior = self.module.encode(images).latent_dist  # type: ignore[operator]
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images)
        decoded = self.module.decode(posterior.mean + posterior.std * noise).sample  # type: ignore[operator]
        divergence = posterior.kl().mean() / images[0].numel()
        loss: Tensor = (decoded - images).square().mean() + self.config.kl_weight * divergence
        return loss


class DiffusionStep(_PublicStep):
    """The loss of `diffusion.per_example_loss`, averaged; keeps a moving average of the weights."""

    def __init__(
        self, model: LatentDiffusion, latents: Latents, labels: Tensor, config: PretrainConfig, seed: int
    ) -> None:
        model.autoencoder.requires_grad_(False)
        super().__init__(model, config.unet_learning_rate, config.unet_steps, seed)
        self.model, self.latents, self.labels, self.config = model, latents, labels, config
        self.average = [p.detach().clone() for p in self.parameters]

    def __call__(self, step: int) -> dict[str, float]:
        values = super().__call__(step)
        # A short average at first, so that the random start is forgotten: Karras et al. 2024 call it a ramp.
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        for averaged, parameter in zip(self.average, self.parameters, strict=True):
            averaged.lerp_(parameter.detach(), 1 - decay)
        return values

    def loss(self, generator: torch.Generator) -> Tensor:
        size, device = self.config.unet_batch_size, self.parameters[0].device
        shape = (size, *self.model.latent_shape)
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        latents = self.latents.sample(chosen, torch.randn(shape, generator=generator)).to(device)
        # One timestep from each of `size` equal parts of the range: the same expectation, less variance.
        uniform = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        timesteps = (uniform * len(self.model.scheduler.alphas_cumprod)).long()[:, None].to(device)
        noise = torch.randn(shape, generator=generator)[:, None].to(device)
        labels = self.labels[chosen].to(device)
        return per_example_loss(self.model, latents, labels, timesteps, noise).mean()

    def averaged(self) -> LatentDiffusion:
        """A copy of the model with the averaged weights."""
        model = copy.deepcopy(self.model)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter, averaged in zip(trained, self.average, strict=True):
            parameter.data.copy_(averaged)
        return model

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for averaged, saved in zip(self.average, state["average"], strict=True):
            averaged.copy_(saved)


class DecoderStep(_PublicStep):
    """Mean squared error of the decoder alone, free to pass the ends of the range.

    Images are clamped to [-1, 1] after decoding, so an output beyond an end that the pixel has is no error:
    plain backgrounds become exactly plain, instead of nearly, which feature extractors notice.
    """

    def __init__(self, model: LatentDiffusion, images: ImageSet, config: PretrainConfig, seed: int) -> None:
        model.requires_grad_(False)
        for part in (model.autoencoder.decoder, model.autoencoder.post_quant_conv):
            part.requires_grad_(True)
        super().__init__(model.autoencoder, config.autoencoder_learning_rate, config.decoder_steps, seed)
        self.images, self.config = images.images, config

    def loss(self, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.images), (self.config.autoencoder_batch_size,), generator=generator)
        images = to_unit_range(self.images[chosen.numpy()]).to(self.parameters[0].device)
        with torch.no_grad():
            posterior = self.module.encode(images).latent_dist  # type: ignore[operator]
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images)
        decoded: Tensor = self.module.decode(posterior.mean + posterior.std * noise).sample  # type: ignore[operator]
        beyond = ((images <= -1) & (decoded < -1)) | ((images >= 1) & (decoded > 1))
        return (decoded - images).masked_fill(beyond, 0.0).square().mean()


def _generator(seed: int, stage: str, step: int) -> torch.Generator:
    words = np.random.SeedSequence([seed, *stage.encode(), step]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def pretrain(
    config: Config,
    images: ImageSplits,
    folder: Path,
    *,
    device: torch.device,
    log: Callable[[int, dict[str, float]], None],
    source: Mapping[str, Any],
) -> None:
    """Trains the model of `config` on public images, into `folder`, which appears whole or not at all.

    Args:
        config: `config.model` and `config.seed` say what is trained.
        images: public; the test part, if any, measures the reconstruction.
        folder: must not exist.
        device: to train on.
        log: called with the number of finished steps and what may be logged.
        source: where the images come from, for the record.
    """
    assert images.train.public, "pre-training has no privacy"
    work = folder.with_name(folder.name + ".partial")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        train = images.train
        model = build(
            config.model,
            classes=train.classes,
            channels=train.images.shape[1],
            image_size=train.images.shape[2],
        ).to(device)
    _train_autoencoder(model, train, config, work, log)
    model = _train_diffusion(model, train, config, work, log)
    train_decoder(model, train, config, work, log)
    quality = {}
    if len(images.test):
        quality["reconstruction_mse_on_public_test"] = reconstruction_error(model, images.test)
    record = {
        "made_by": "dp-lora stages=[pretrain]",
        "model": dataclasses.asdict(config.model),
        "public_data": {**dataclasses.asdict(config.public_data), **source},
        "seed": config.seed,
        **quality,
        "hardware": hardware(),
        "versions": versions(),
    }
    save(model.cpu(), work / "model", record)
    os.replace(work / "model", folder)
    shutil.rmtree(work)


def _train_autoencoder(
    model: LatentDiffusion,
    images: ImageSet,
    config: Config,
    work: Path,
    log: Callable[[int, dict[str, float]], None],
) -> None:
    """Trains the autoencoder and sets its scaling factor."""
    settings = config.model.pretrain
    step = AutoencoderStep(model, images, settings, config.seed)
    _take(step, settings.autoencoder_steps, work, "autoencoder", config, log)
    model.autoencoder.eval()
    latents = encode(model, images)
    # Unit variance over the public set (Rombach et al. 2022): a constant of public images only.
    scale = 1 / float((latents.mean.var() + latents.std.square().mean()).sqrt())
    model.autoencoder.register_to_config(scaling_factor=scale)


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


def _train_diffusion(
    model: LatentDiffusion,
    images: ImageSet,
    config: Config,
    work: Path,
    log: Callable[[int, dict[str, float]], None],
) -> LatentDiffusion:
    settings = config.model.pretrain
    labels = torch.from_numpy(images.labels)
    step = DiffusionStep(model, encode(model, images), labels, settings, config.seed)
    _take(step, settings.unet_steps, work, "diffusion", config, log, offset=settings.autoencoder_steps)
    return step.averaged()


def train_decoder(
    model: LatentDiffusion,
    images: ImageSet,
    config: Config,
    work: Path,
    log: Callable[[int, dict[str, float]], None],
) -> None:
    """Trains the decoder alone; the latents, and so the diffusion model, stay as they are."""
    settings = config.model.pretrain
    step = DecoderStep(model, images, settings, config.seed)
    before = settings.autoencoder_steps + settings.unet_steps
    _take(step, settings.decoder_steps, work, "decoder", config, log, offset=before)


def _take(
    step: Step,
    total: int,
    work: Path,
    name: str,
    config: Config,
    log: Callable[[int, dict[str, float]], None],
    offset: int = 0,
) -> None:
    checkpoint = Checkpoint(work, config.train.checkpoint_minutes, name)
    finished = resume(step, checkpoint)
    with Progress(
        total, f"pretrain {name}", initial=finished, mode=config.tracking.progress, public=True
    ) as progress:
        run_steps(step, total, checkpoint, progress, lambda number, values: log(offset + number, values))
