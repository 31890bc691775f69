"""A latent diffusion model: what is computed from images, latents, timesteps and conditions.

Shapes, ranges and dtypes at the boundaries:
    images     float32 [B, C, H, W] in [-1, 1]
    latents    float32 [B, c, h, w], scaled to unit variance over the public set
    labels     int64   [B], an index into `classes`
    conditions float32 [B, tokens, d]; no tokens for an unconditional model; several by name in a family
    timesteps  int64   [B] in [0, T), see `process`
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, UNet2DConditionModel, VQModel
from torch import Tensor, nn

from dp_lora.models.families import Conditions
from dp_lora.models.networks import Statistics, shorten_cross_attention
from dp_lora.models.process import Process, Scheduler
from dp_lora.models.prompts import Prompts
from dp_lora.models.text_to_image import TextToImage

UNCONDITIONAL = ("image",)
"""The one class of a model without conditions."""


class LatentDiffusion(nn.Module):
    """An autoencoder, a denoising network, what it is conditioned on, and the forward process.

    Args:
        autoencoder: with a Gaussian posterior, quantised, or deterministic.
        unet: the network: that of a family, a UNet conditioned on tokens, one that takes class embeddings
            [B, d] beside the timestep or is unconditional, or a DiT that takes class embeddings: see
            `networks.take_class_table`.
        class_embedder: one row a class, and perhaps one more: see `null_class`. None without classes.
        scheduler: of the forward process.
        classes: their names, in the order of the labels.
        prompts: of a text-to-image model, in place of `class_embedder`.
        null_class: whether the last row of `class_embedder` stands for "no class".
        predicts_v: whether the network of a diffusion predicts v in place of eps.
        source: the pipeline, where it is one of `families`.
    """

    def __init__(
        self,
        autoencoder: Any,
        unet: Any,
        class_embedder: nn.Embedding | None,
        scheduler: Scheduler,
        classes: Sequence[str],
        *,
        prompts: Prompts | None = None,
        null_class: bool = False,
        predicts_v: bool = False,
        source: TextToImage | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.unet = unet
        self.class_embedder = class_embedder
        self.prompts = prompts
        self.scheduler = scheduler
        self.process = Process.of(scheduler, predicts_v)
        self.source = source
        self.distribution = "uniform" if source is None else source.family.distribution
        self.classes = tuple(classes)
        self.predicts_v = predicts_v
        self.null_embedding: Tensor | None
        null = None
        if null_class:
            assert class_embedder is not None
            table = class_embedder.weight.detach()
            null, self.class_embedder = (
                table[-1:].clone(),
                nn.Embedding.from_pretrained(table[:-1], freeze=False),
            )
        self.register_buffer("null_embedding", null)
        if prompts is None:
            shorten_cross_attention(unet)

    def sharing_weights(self) -> LatentDiffusion:
        """A copy whose parameters are in the same memory until one of the two gets others.

        The copy may be moved, trained and given adapters, and this model stays as it is: `adapters` gives
        whatever is trained or restored memory of its own. Nothing else may write into a parameter in place.
        """
        memo: dict[int, Any] = {
            id(parameter): nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
            for parameter in self.parameters()
        }
        return copy.deepcopy(self, memo)

    def release_encoders(self) -> None:
        """Gives up the weights of a family's autoencoder and text encoders, for a training.

        The model goes on with latents and with the prompts that it knows or was prepared for. It encodes and
        decodes nothing any more.
        """
        if self.source is not None and self.prompts is not None:
            self.autoencoder.to("meta")
            self.prompts.release()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents of one image."""
        if self.source is not None:
            return self.source.latent_shape(self.unet)
        size = self.unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.unet.config["in_channels"]), int(height), int(width)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        if self.source is not None:
            channels = self.autoencoder.config.get("in_channels", 3)
            return int(channels), self.source.side, self.source.side
        factor = 2 ** (len(self.autoencoder.config["block_out_channels"]) - 1)
        _, height, width = self.latent_shape
        return int(self.autoencoder.config["in_channels"]), height * factor, width * factor

    @property
    def conditional(self) -> bool:
        """Whether an image is drawn for a class or a prompt."""
        return self.class_embedder is not None or self.prompts is not None

    @property
    def learns_classes(self) -> bool:
        """Whether new classes need a trained class embedder: not where prompts say them, or nothing does."""
        return self.class_embedder is not None

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each [B, c, h, w], of images in [-1, 1].

        A quantised autoencoder has no spread: its latents are those before the nearest code is taken, which
        `decode` does, as in CompVis latent diffusion.
        """
        shift, scale = self._scaling()
        encoded = self.autoencoder.encode(images.unsqueeze(2) if self._of_frames else images)
        if not hasattr(encoded, "latent_dist"):
            latents = encoded.latents if isinstance(self.autoencoder, VQModel) else encoded.latent
            return latents * scale, torch.zeros_like(latents)
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        if self._of_frames:
            mean, std = mean.squeeze(2), std.squeeze(2)
        if self._in_squares:
            mean, std = F.pixel_unshuffle(mean, 2), F.pixel_unshuffle(std, 2)
        return (mean if shift is None else mean - shift) * scale, std * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of scaled latents."""
        shift, scale = self._scaling()
        plain = latents / scale if shift is None else latents / scale + shift
        if self._in_squares:
            plain = F.pixel_shuffle(plain, 2)
        images: Tensor = self.autoencoder.decode(plain.unsqueeze(2) if self._of_frames else plain).sample
        images = images.squeeze(2) if self._of_frames else images
        return images.clamp(-1, 1)

    @property
    def _in_squares(self) -> bool:
        """Whether latents are squares of four of the autoencoder's, scaled by statistics of it (FLUX.2)."""
        return isinstance(getattr(self.autoencoder, "bn", None), Statistics)

    @property
    def _of_frames(self) -> bool:
        """Whether the autoencoder takes films, of which an image is one frame (Qwen-Image)."""
        return isinstance(self.autoencoder, AutoencoderKLQwenImage)

    def _scaling(self) -> tuple[Any, Any]:
        """The shift and the scale of latents, each a number or [1, c, 1, 1]; no shift: None."""
        config = self.autoencoder.config
        if self._in_squares:
            mean, variance = self.autoencoder.bn.running_mean, self.autoencoder.bn.running_var
            std = torch.sqrt(variance + config["batch_norm_eps"])
            return mean.view(1, -1, 1, 1), 1 / std.view(1, -1, 1, 1)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return config.get("shift_factor"), config["scaling_factor"]
        shape, device = (1, -1, 1, 1), self.autoencoder.device
        scale = config.get("scaling_factor", 1.0) / torch.tensor(std, device=device).view(shape)
        return torch.tensor(mean, device=device).view(shape), scale

    def condition(self, labels: Tensor) -> Tensor | Conditions:
        """The conditions [B, tokens, d] of `labels` [B]; [B, 0, 0] for an unconditional model."""
        if self.prompts is not None:
            embedded: Tensor | Conditions = self.prompts(labels)
            return embedded
        if self.class_embedder is None:
            return torch.zeros(len(labels), 0, 0, device=labels.device)
        token: Tensor = self.class_embedder(labels)
        return token.unsqueeze(1)

    def neutral_condition(self, count: int) -> Tensor | Conditions:
        """The condition [count, tokens, d] of no class in particular, from which guidance moves away.

        The empty prompt, the null class where the model has one, else the mean of the class embeddings.
        """
        if self.prompts is not None:
            return self.prompts.neutral(count, next(self.unet.parameters()).device)
        assert self.class_embedder is not None, "an unconditional model has no neutral condition"
        mean = self.class_embedder.weight.mean(0)
        return (mean if self.null_embedding is None else self.null_embedding[0]).expand(count, 1, -1)

    def predict_noise(self, noisy_latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """eps_theta(z_t, t, c), of the shape of `noisy_latents`."""
        return self.predict_noise_of(noisy_latents, timesteps, self.condition(labels))

    def predict_noise_of(
        self, noisy_latents: Tensor, timesteps: Tensor, conditions: Tensor | Conditions | None
    ) -> Tensor:
        """The same for conditions [B, tokens, d], as `condition` returns them, in place of labels.

        An unconditional model takes None too.
        """
        predicted = self.predict_of(noisy_latents, timesteps, conditions)
        signal, level = self.process.levels(timesteps[:, None, None, None], noisy_latents)
        return self.process.noise_of(predicted, noisy_latents, signal, level)

    def predict_of(
        self, noisy_latents: Tensor, timesteps: Tensor, conditions: Tensor | Conditions | None
    ) -> Tensor:
        """What the network itself predicts: eps, v or the velocity, see `process`."""
        predicted = self._network(noisy_latents, timesteps, conditions)
        # A network that predicts the variance too has its channels behind those of the mean.
        return predicted[:, : noisy_latents.shape[1]]

    def _network(
        self, noisy_latents: Tensor, timesteps: Tensor, conditions: Tensor | Conditions | None
    ) -> Tensor:
        if self.source is not None:
            assert isinstance(conditions, dict)
            times, scale = self.process.times(timesteps), self.process.scale
            return self.source.predict(self.unet, noisy_latents, times, conditions, scale)
        assert not isinstance(conditions, dict)
        if isinstance(self.unet, UNet2DConditionModel):
            out: Tensor = self.unet(
                noisy_latents, timesteps, encoder_hidden_states=conditions, return_dict=False
            )[0]
            return out
        embeddings = None
        if self.class_embedder is not None:
            assert conditions is not None
            embeddings = conditions[:, 0]
        predicted: Tensor = self.unet(noisy_latents, timesteps, class_labels=embeddings, return_dict=False)[0]
        return predicted

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """The same as `predict_noise`."""
        return self.predict_noise(noisy_latents, timesteps, labels)

    def new_classes(self, classes: Sequence[str], generator: torch.Generator) -> None:
        """Conditions the model on other classes: by prompts, or by one fresh embedding a class.

        An embedding begins at the mean of the public ones with a little noise. Nothing of the new images
        enters: an embedding made from their latents would leak them. An unconditional model stays as it is.
        """
        if self.prompts is not None:
            self.prompts.use_classes(classes)
            self.classes = tuple(classes)
        if self.class_embedder is None:
            return
        old = self.class_embedder.weight.detach()
        # The spread of a single class is not known.
        mean, spread = old.mean(0), old.std(0) if len(old) > 1 else torch.ones_like(old[0])
        noise = torch.randn(len(classes), old.shape[1], generator=generator)
        embedder = nn.Embedding(len(classes), old.shape[1])
        embedder.weight.data = mean + 0.1 * spread * noise.to(old)
        self.class_embedder = embedder.to(old.device)
        self.classes = tuple(classes)
