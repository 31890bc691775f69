"""The draws of a training step: their distribution, and that none looks at the data."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dp_lora.config.schema import TrainConfig
from dp_lora.models.folders import LatentDiffusion
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.step import Draws
from dp_lora.training.objective import Objective

ROWS, K = 400, 4


def draws(first: int = 0, rows: int = ROWS) -> Draws:
    return Draws(Randomness.from_seed(0), 3, first, rows)


def test_by_default_the_draws_are_those_of_the_step(model: LatentDiffusion) -> None:
    objective = Objective(model, TrainConfig())
    count = model.process.num_timesteps
    assert torch.equal(objective.timesteps(draws(), K), draws().timesteps(K, count))
    assert torch.equal(objective.noise(draws(), K), draws().normal("diffusion", K, *model.latent_shape))
    assert objective.weights is None


@pytest.mark.parametrize("shift", [None, 4.0])
def test_timesteps_are_drawn_as_asked_and_stay_stratified(
    model: LatentDiffusion, shift: float | None
) -> None:
    train = TrainConfig(timesteps="logit_normal", timestep_shift=shift)
    drawn = Objective(model, train).timesteps(draws(), K)
    assert drawn.shape == (ROWS, K) and drawn.dtype == torch.int64
    u = torch.special.ndtri((torch.arange(1, K) / K).double()).sigmoid()
    u = u if shift is None else shift * u / (1 + (shift - 1) * u)
    edges = torch.cat([torch.zeros(1), u * model.process.num_timesteps, torch.tensor([1000.0])])
    for j in range(K):
        assert (drawn[:, j] >= edges[j].floor()).all() and (drawn[:, j] <= edges[j + 1].ceil()).all()
    # A row's timesteps are its own, whatever the microbatch.
    assert torch.equal(Objective(model, train).timesteps(draws(7, 5), K), drawn[7:12])


def test_the_noise_offset_is_one_number_a_channel(model: LatentDiffusion) -> None:
    plain, moved = (
        Objective(model, TrainConfig(noise_offset=offset)).noise(draws(), K) for offset in (0.0, 0.1)
    )
    added = (moved - plain).flatten(3)
    assert torch.allclose(added, added[..., :1].expand_as(added), atol=1e-6)
    # Of 4,800 numbers the standard deviation is known to 1 %: five times that.
    assert float(added[..., 0].std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(Objective(model, TrainConfig(noise_offset=0.1)).noise(draws(7, 5), K), moved[7:12])


def test_weights_are_a_function_of_the_timestep(model: LatentDiffusion) -> None:
    weights = Objective(model, dataclasses.replace(TrainConfig(), snr_gamma=5.0)).weights
    assert weights is not None and torch.equal(weights, model.process.min_snr_weights(5.0))
