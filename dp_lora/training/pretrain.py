"""Public pre-training: the autoencoder on images, then the diffusion model on its latents.

Public images only, and public randomness only: every random number of a step comes from (seed, stage, step).
Nothing here is private, so losses may be shown.

Several processes of one job (torchrun) share every batch: all draw the same batch and the same noise, each
takes its slice, and gradients are summed, so the result is that of one process up to rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import VQModel
from torch import Tensor, nn

from dp_lora.config.schema import Config, PretrainConfig
from dp_lora.data.digests import SEEN, both
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.models.diffusion import per_example_loss
from dp_lora.models.folders import LatentDiffusion, build, save
from dp_lora.models.latents import Latents, cached, encoded_batches, to_unit_range
from dp_lora.privacy.collectives import rank
from dp_lora.privacy.moving_average import MovingAverage
from dp_lora.records.progress import Progress
from dp_lora.records.provenance import hardware, versions
from dp_lora.storage.files import write_atomic
from dp_lora.training.loop import Checkpoint, Step, learning_rate, resume, run_steps
from dp_lora.training.perceptual import (
    FeatureDistance,
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    load_distance,
)
from dp_lora.training.previews import PICTURED, reconstruction_error, reconstructions, samples

Log = Callable[[int, dict[str, float]], None]


# --- several processes


def own_slice(batch: Tensor) -> Tensor:
    """The part of a batch that this process computes: consecutive rows, sizes equal to within one."""
    if not dist.is_initialized():
        return batch
    return batch.tensor_split(dist.get_world_size())[dist.get_rank()]


def summed(tensors: Sequence[Tensor]) -> None:
    """Adds each tensor over the processes, in place and in one message."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


# --- steps


class _PublicStep(ABC):
    """AdamW on a mean loss, with warm-up, a schedule and gradients clipped to norm 1 for stability.

    Every random number of step s comes from a generator seeded with (seed, stage, s), so a resumed
    training takes the same steps.
    """

    def __init__(
        self, module: nn.Module, base_rate: float, total: int, config: PretrainConfig, seed: int
    ) -> None:
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=base_rate, weight_decay=1e-4)
        self.base_rate, self.total, self.config, self.seed = base_rate, total, config, seed
        self.device = self.parameters[0].device

    def __call__(self, step: int) -> dict[str, float]:
        values = self.loss(_generator(self.seed, type(self).__name__, step), step)
        self.descend(values["loss"], self.parameters, self.optimizer, step)
        # This process's shares; those of all make up the means over the batch.
        shares = torch.stack([value.detach().float() for value in values.values()])
        summed([shares])
        return dict(zip(values, shares.tolist(), strict=True))

    def descend(
        self, loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """One step of `optimizer` along the gradient of `loss`, of which each process has its share."""
        schedule, warmup = self.config.schedule, self.config.warmup_steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.base_rate, schedule, step, self.total, warmup)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient  # None, and so left alone, where a parameter has no effect
        summed([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> torch.autocast:
        """bfloat16 where it is safe, if the configuration says so."""
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @abstractmethod
    def loss(self, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """`loss`, and its parts that may be shown: this process's shares of one public batch's means."""

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


class _ImageStep(_PublicStep):
    """A step on a batch of images that are encoded and decoded."""

    def __init__(
        self, model: LatentDiffusion, images: ImageSet, total: int, config: PretrainConfig, seed: int
    ) -> None:
        super().__init__(model.autoencoder, config.autoencoder_learning_rate, total, config, seed)
        self.images, self.autoencoder = images.images, model.autoencoder

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Images [b, C, H, W] of this process, and what draws noise in the shape of their latents."""
        size = self.config.autoencoder_batch_size
        chosen = own_slice(torch.randint(len(self.images), (size,), generator=generator))

        def noise_like(latents: Tensor) -> Tensor:
            noise = torch.randn((size, *latents.shape[1:]), generator=generator)
            return own_slice(noise).to(latents)

        return to_unit_range(self.images[chosen.numpy()]).to(self.device), noise_like

    def encoded(self, images: Tensor, noise_like: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Latents to decode, and the divergence [b] of their posterior from N(0, I); zero where quantised."""
        if isinstance(self.autoencoder, VQModel):
            return self.autoencoder.encode(images).latents, torch.zeros(len(images), device=images.device)
        posterior = self.autoencoder.encode(images).latent_dist
        return posterior.mean + posterior.std * noise_like(posterior.mean), posterior.kl()

    def share(self, per_image: Tensor) -> Tensor:
        """The share of this process in the batch's mean of values [b, ...]."""
        return per_image.float().flatten(1).mean(1).sum() / self.config.autoencoder_batch_size


class AutoencoderStep(_ImageStep):
    """The loss of latent diffusion's first stage (Rombach et al. 2022, appendix G).

    The error of the pixels; the posterior's divergence from N(0, I), or the distance to the codes; and if
    they have a weight, a distance of features and a discriminator that is trained in turn.
    """

    def __init__(self, model: LatentDiffusion, images: ImageSet, config: PretrainConfig, seed: int) -> None:
        super().__init__(model, images, config.autoencoder_steps, config, seed)
        self.distance: FeatureDistance | None = None
        if config.perceptual_weight:
            self.distance = load_distance(config.perceptual_network).to(self.device)
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 1)
                shape = images.images.shape
                self.discriminator = PatchDiscriminator(shape[1], shape[2]).to(self.device)
            self.opponent = list(self.discriminator.parameters())
            # The decays of Esser et al. 2021, without which the two run away from each other.
            self.opponent_optimizer = torch.optim.Adam(self.opponent, betas=(0.5, 0.9))
        if config.compile:
            model.autoencoder.encoder.compile()
            model.autoencoder.decoder.compile()

    def __call__(self, step: int) -> dict[str, float]:
        values = super().__call__(step)
        if self.discriminator is not None and step >= self.config.adversarial_start:
            with self.autocast():
                real, decoded = self.discriminator(self._real), self.discriminator(self._decoded)
            loss = self.share(hinge_loss(real.float(), decoded.float())[:, None])
            self.descend(loss, self.opponent, self.opponent_optimizer, step)
            shown = loss.detach()
            summed([shown])
            values["discriminator"] = shown.item()
        return values

    def loss(self, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        config = self.config
        images, noise_like = self.draw(generator)
        with self.autocast():
            latents, divergence = self.encoded(images, noise_like)
            output = self.autoencoder.decode(latents)
        decoded: Tensor = output.sample.float()
        error = decoded - images
        pixels = self.share(error.square() if config.reconstruction == "mse" else error.abs())
        parts = {"reconstruction": pixels}
        if self.distance is not None:
            with self.autocast():
                distance = self.distance(images, decoded)
            parts["perceptual"] = config.perceptual_weight * self.share(distance[:, None])
        reconstruction = sum(parts.values(), torch.zeros((), device=self.device))
        if isinstance(self.autoencoder, VQModel):
            own = len(images) / config.autoencoder_batch_size
            parts["codebook"] = config.codebook_weight * output.commit_loss.float().mean() * own
        else:
            parts["divergence"] = config.kl_weight * self.share(divergence[:, None]) / images[0].numel()
        if self.discriminator is not None and step >= config.adversarial_start:
            parts["adversarial"] = self._adversarial(reconstruction, decoded)
            self._real, self._decoded = images, decoded.detach()
        return {"loss": sum(parts.values(), torch.zeros((), device=self.device)), **parts}

    def _adversarial(self, reconstruction: Tensor, decoded: Tensor) -> Tensor:
        """The share of the generator's loss, at its adaptive weight."""
        assert self.discriminator is not None
        with self.autocast():
            logits = self.discriminator(decoded)
        fooled = -self.share(logits)
        last = self.autoencoder.decoder.conv_out.weight
        gradients = [
            torch.autograd.grad(loss, last, retain_graph=True)[0].clone() for loss in (reconstruction, fooled)
        ]
        summed(gradients)
        return self.config.adversarial_weight * adaptive_weight(*gradients) * fooled

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["opponent_optimizer"] = self.opponent_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.opponent_optimizer.load_state_dict(state["opponent_optimizer"])


class DiffusionStep(_PublicStep):
    """The loss of `diffusion.per_example_loss`, averaged; keeps a moving average of the weights."""

    def __init__(
        self, model: LatentDiffusion, latents: Latents, labels: Tensor, config: PretrainConfig, seed: int
    ) -> None:
        model.autoencoder.requires_grad_(False)
        super().__init__(model, config.unet_learning_rate, config.unet_steps, config, seed)
        self.model, self.latents, self.labels = model, latents, labels
        self.average = MovingAverage(self.parameters, config.ema_decay)
        if config.compile:
            model.unet.compile()

    def __call__(self, step: int) -> dict[str, float]:
        values = super().__call__(step)
        self.average.update(step)
        return values

    def loss(self, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        size, device = self.config.unet_batch_size, self.device
        shape = (size, *self.model.latent_shape)
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        posterior = torch.randn(shape, generator=generator)
        # One timestep from each of `size` equal parts of the range: the same expectation, less variance.
        uniform = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        timesteps = (uniform * self.model.process.num_timesteps).long()[:, None]
        noise = torch.randn(shape, generator=generator)[:, None]
        chosen, posterior, timesteps, noise = map(own_slice, (chosen, posterior, timesteps, noise))
        latents = self.latents.sample(chosen, posterior).to(device)
        labels = self.labels[chosen].to(device)
        with self.autocast():
            losses = per_example_loss(self.model, latents, labels, timesteps.to(device), noise.to(device))
        return {"loss": losses.sum() / size}

    def averaged(self) -> LatentDiffusion:
        """A copy of the model with the averaged weights."""
        model = copy.deepcopy(self.model)
        self.average.copy_to(p for p in model.parameters() if p.requires_grad)
        return model

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "average": self.average.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.average.load(state["average"])


class DecoderStep(_ImageStep):
    """Mean squared error of the decoder alone, free to pass the ends of the range.

    Images are clamped to [-1, 1] after decoding, so an output beyond an end that the pixel has is no error:
    plain backgrounds become exactly plain, instead of nearly, which feature extractors notice.
    """

    def __init__(self, model: LatentDiffusion, images: ImageSet, config: PretrainConfig, seed: int) -> None:
        model.requires_grad_(False)
        for part in (model.autoencoder.decoder, model.autoencoder.post_quant_conv):
            part.requires_grad_(True)
        super().__init__(model, images, config.decoder_steps, config, seed)

    def loss(self, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        images, noise_like = self.draw(generator)
        with self.autocast():
            with torch.no_grad():
                latents, _ = self.encoded(images, noise_like)
            decoded: Tensor = self.autoencoder.decode(latents).sample.float()
        beyond = ((images <= -1) & (decoded < -1)) | ((images >= 1) & (decoded > 1))
        return {"loss": self.share((decoded - images).masked_fill(beyond, 0.0).square())}


def _generator(seed: int, stage: str, step: int) -> torch.Generator:
    words = np.random.SeedSequence([seed, *stage.encode(), step]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


# --- stages


def pretrain(
    config: Config,
    images: ImageSplits,
    folder: Path,
    *,
    device: torch.device,
    log: Log,
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

    Raises UserError for a feature network that cannot be read, or a batch with less images than processes.
    """
    assert images.train.public, "pre-training has no privacy"
    _check_batches(config.model.pretrain)
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
    stages = _Stages(config, images, work, log)
    stages.autoencoder(model)
    model = stages.diffusion(model)
    stages.decoder(model)
    if rank() == 0:
        quality = {}
        if len(images.test):
            quality["reconstruction_mse_on_public_test"] = reconstruction_error(model, images.test)
        record = {
            "made_by": "dp-lora stages=[pretrain]",
            "model": dataclasses.asdict(config.model),
            "public_data": {**dataclasses.asdict(config.public_data), **source},
            "seed": config.seed,
            **quality,
            "digests": SEEN,
            "hardware": hardware(),
            "versions": versions(),
        }
        save(model.cpu(), work / "model", record)
        seen = [both(part.images, part.digests) for part in images]
        np.save(work / "model" / SEEN, np.concatenate(seen))
        for kept in ("samples", "metrics.jsonl"):
            if (work / kept).exists():
                os.replace(work / kept, work / "model" / kept)
        os.replace(work / "model", folder)
        shutil.rmtree(work)
    if dist.is_initialized():
        dist.barrier()


def _check_batches(settings: PretrainConfig) -> None:
    count = dist.get_world_size() if dist.is_initialized() else 1
    for name in ("autoencoder_batch_size", "unet_batch_size"):
        if getattr(settings, name) < count:
            raise UserError(
                f"model.pretrain.{name}={getattr(settings, name)}: expected at least one image for each of "
                f"the {count} processes"
            )


class _Stages:
    """The three trainings, each resumed from its checkpoint, with their log and their pictures."""

    def __init__(self, config: Config, images: ImageSplits, work: Path, log: Log) -> None:
        self.config, self.images, self.work, self.log = config, images, work, log
        self.settings = config.model.pretrain

    def autoencoder(self, model: LatentDiffusion) -> None:
        """Trains the autoencoder and sets its scaling factor."""
        step = AutoencoderStep(model, self.images.train, self.settings, self.config.seed)
        shown = self.images.test if len(self.images.test) else self.images.train

        def picture() -> bytes:
            return reconstructions(model, shown.subset(np.arange(min(PICTURED, len(shown)))))

        self._take(step, self.settings.autoencoder_steps, "autoencoder", 0, picture)
        model.autoencoder.eval()
        _same_on_all(model)
        # Unit variance over the public set (Rombach et al. 2022): a constant of public images only.
        model.autoencoder.register_to_config(scaling_factor=1 / self._spread(model))

    def _spread(self, model: LatentDiffusion) -> float:
        """Standard deviation of latents drawn from the posteriors of all images, in one pass over them."""
        images, mode = self.images.train, self.config.tracking.progress
        count, total, squares = 0, 0.0, 0.0
        with Progress(len(images), "pretrain scale", mode=mode, unit="image", public=True) as progress:
            for _, mean, std in encoded_batches(model, images, progress=progress):
                mean, std = mean.double(), std.double()
                count, total = count + mean.numel(), total + float(mean.sum())
                squares += float(mean.square().sum() + std.square().sum())
        return float((squares / count - (total / count) ** 2) ** 0.5)

    def diffusion(self, model: LatentDiffusion) -> LatentDiffusion:
        """Trains the diffusion model on cached latents; returns the one with the averaged weights."""
        train = self.images.train
        cache = Path(self.config.paths.cache).expanduser()
        latents = cached(model, train, cache, self.config.tracking.progress)
        step = DiffusionStep(model, latents, torch.from_numpy(train.labels), self.settings, self.config.seed)

        def picture() -> bytes:
            return samples(step.averaged().eval(), self.config)

        self._take(step, self.settings.unet_steps, "diffusion", self.settings.autoencoder_steps, picture)
        averaged = step.averaged()
        _same_on_all(averaged)
        return averaged

    def decoder(self, model: LatentDiffusion) -> None:
        """Trains the decoder alone; the latents, and so the diffusion model, stay as they are."""
        if self.settings.decoder_steps:
            step = DecoderStep(model, self.images.train, self.settings, self.config.seed)
            before = self.settings.autoencoder_steps + self.settings.unet_steps
            self._take(step, self.settings.decoder_steps, "decoder", before, None)
            _same_on_all(model)

    def _take(
        self, step: Step, total: int, name: str, before: int, picture: Callable[[], bytes] | None
    ) -> None:
        first, every = rank() == 0, self.settings.samples_every
        checkpoint = Checkpoint(self.work, self.config.train.checkpoint_minutes, name, writes=first)
        finished = resume(step, checkpoint)

        def log(number: int, values: dict[str, float]) -> None:
            if not first:
                return
            if number % self.config.tracking.log_every == 0 or number == total:
                self.log(before + number, values)
            if picture is not None and every and (number % every == 0 or number == total):
                (self.work / "samples").mkdir(exist_ok=True)
                write_atomic(self.work / "samples" / f"{name}-{number:07}.png", picture())

        with Progress(
            total, f"pretrain {name}", initial=finished, mode=self.config.tracking.progress, public=True
        ) as progress:
            run_steps(step, total, checkpoint, progress, log)


def _same_on_all(model: nn.Module) -> None:
    """Every process gets the weights of the first, so that what depends on their bits is the same."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
