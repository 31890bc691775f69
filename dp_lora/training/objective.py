"""What a step of the fine-tuning draws for its examples, and how a timestep's error is weighed.

Nothing of it depends on the data: timesteps, noise and weights follow from the configuration, the model's
process and random numbers.
"""

from __future__ import annotations

from torch import Tensor

from dp_lora.config.schema import TrainConfig
from dp_lora.models.latent_diffusion import LatentDiffusion
from dp_lora.privacy.step import Draws


class Objective:
    """The draws of a model's training, as `train` asks for them.

    Attributes:
        weights: [T], of the error at each timestep; None: 1.
    """

    def __init__(self, model: LatentDiffusion, train: TrainConfig) -> None:
        self._train, self._shape = train, model.latent_shape
        self._count = model.process.num_timesteps
        self._spread = model.process.spread(train.timesteps or model.distribution, train.timestep_shift)
        self.weights = None if train.snr_gamma is None else model.process.min_snr_weights(train.snr_gamma)

    def timesteps(self, draws: Draws, k: int) -> Tensor:
        """int64 [M, k] on the CPU."""
        drawn = draws.timesteps(k, self._count, self._train.stratified_timesteps)
        return drawn if self._spread is None else self._spread[drawn]

    def noise(self, draws: Draws, k: int) -> Tensor:
        """The diffusion noise float32 [M, k, c, h, w] on the CPU."""
        noise = draws.normal("diffusion", k, *self._shape)
        if self._train.noise_offset:
            offset = draws.normal("noise offset", k, self._shape[0])
            noise += self._train.noise_offset * offset[..., None, None]
        return noise
