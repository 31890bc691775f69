"""A gradient canary has the one gradient that it should in every kind of process: eps, v and velocity."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dp_lora.auditing.canaries import GradientCanaries
from dp_lora.config.schema import LoraConfig
from dp_lora.models import adapters
from dp_lora.models.diffusion import per_example_loss
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip
from tests.builders.families import model_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("kind", ["sdxl", "sdxl_v", "sd3", "flux"])
def test_a_canary_has_one_coordinate(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path)
    adapters.attach(model, ["lora"], LoraConfig(rank=2), seed=0)
    canaries, k, first = GradientCanaries(model, 3, 1.0), 2, len(model.classes)
    labels = torch.tensor([first + 1, 0, first + 2])
    latents = torch.randn(3, *model.latent_shape)
    latents[labels >= first] = 0.0
    noise, timesteps = torch.randn(3, k, *model.latent_shape), torch.tensor([[5, 400], [900, 30], [998, 700]])
    engine = ClippedGradientSum(canaries, Clip(k, math.inf))
    losses = per_example_loss(canaries, latents, labels, timesteps, noise)
    with torch.no_grad():
        plain = per_example_loss(model, latents[1:2], labels[1:2], timesteps[1:2], noise[1:2])
    assert torch.allclose(losses[1], plain[0], rtol=1e-5)
    engine.add(losses)
    names = list(engine.parameters)
    sizes = [p.numel() for p in engine.parameters.values()]
    own = engine.total().split(sizes)[names.index("canaries.weight")]
    expected = torch.zeros_like(own)
    expected[[1, 2]] = 100.0
    assert torch.allclose(own, expected, rtol=1e-3, atol=1e-3)
    engine.detach()
