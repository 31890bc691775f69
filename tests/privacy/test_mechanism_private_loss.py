"""The loss that rides in the noised sum: inside the bound, read without bias, at no more epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_lora.privacy import gradients
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.mechanism import noised_mean, private_loss
from dp_lora.privacy.plan import Clip, PrivacyPlan, make_plan
from dp_lora.privacy.randomness import Randomness

SHARE, BOUND = 0.1, 1e-2


def planned(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "num_examples": 1000, "expected_batch_size": 200, "steps": 10, "noise_multiplier": 1.0,
        "target_epsilon": None, "delta": 1e-5, "noise_multiplicity": 2, "max_grad_norm": BOUND,
        "loss_share": SHARE,
    }  # fmt: skip
    return make_plan(**values | changes)


@pytest.fixture
def contribution(diffusion: Any, make_batch: Any) -> Callable[..., Tensor]:
    """What each example adds to the sum [M, P + 1], its loss and gradient scaled up."""

    def measure(clipping: str, k: int, scale: float = 1e4) -> Tensor:
        model, batch = diffusion(), make_batch(3, k)
        engine = ClippedGradientSum(model, Clip(k, BOUND, clipping, SHARE))
        rows = []
        for i in range(3):
            engine.reset()
            engine.add(scale * model.losses(batch, k), torch.eye(3)[i])
            rows.append(engine.total())
        engine.detach()
        return torch.stack(rows)

    return measure


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_gradient_and_loss_together_stay_within_c(
    clipping: str, k: int, contribution: Callable[..., Tensor]
) -> None:
    rows = contribution(clipping, k)
    assert float(rows.norm(dim=1).max()) <= BOUND * (1 + 1e-6)
    assert torch.allclose(rows[:, -1], torch.full((3,), SHARE * BOUND, dtype=torch.float64))
    # The bound is reached: nothing of it is given away.
    assert clipping == "per_layer" or float(rows.norm(dim=1).min()) > 0.999 * BOUND


def test_a_loss_on_top_of_the_whole_bound_passes_c(
    contribution: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: the gradient keeps all of C, as if the loss came for nothing."""
    monkeypatch.setattr(gradients.math, "sqrt", lambda value: 1.0)
    assert float(contribution("flat", 2).norm(dim=1).min()) > BOUND * (1 + 1e-3)


@pytest.mark.parametrize("bound", [BOUND, math.inf])
def test_the_reading_is_the_mean_loss(bound: float, diffusion: Any, make_batch: Any) -> None:
    model, batch = diffusion(), make_batch(4, 2)
    engine = ClippedGradientSum(model, Clip(2, bound, loss_share=SHARE))
    losses = 0.2 * model.losses(batch, 2)
    expected = float(losses.detach().clamp(0, 1).sum()) / 200
    engine.add(losses)
    plan = planned(target_epsilon=math.inf, noise_multiplier=None, max_grad_norm=BOUND)
    assert plan.max_grad_norm == math.inf
    silent = plan if bound == math.inf else planned()
    key = Randomness.from_seed(1)
    noise = key.secure_normal("noise", 0, engine.num_parameters + 1)[-1] if bound == BOUND else 0.0
    reading = private_loss(noised_mean(engine.total(), silent, key, 0), silent)
    # The noise of the reading is sigma / (rho B) times a standard normal, as its docstring says.
    assert reading == pytest.approx(expected + float(noise) / (SHARE * 200), rel=1e-4)


def test_padding_and_spoilt_examples_add_no_loss(diffusion: Any, make_batch: Any) -> None:
    model, batch = diffusion(), make_batch(4, 1)
    engine = ClippedGradientSum(model, Clip(1, BOUND, loss_share=SHARE))
    scale = torch.tensor([0.1, math.nan, math.inf, 0.1])
    losses = model.losses(batch, 1) * scale
    engine.add(losses, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    total = engine.total()
    assert engine.nonfinite == 2
    first = float(losses[0].detach())
    assert total.isfinite().all() and 0 < first < 1
    # That of the first example alone, and not that of the padding.
    assert float(total[-1]) == pytest.approx(SHARE * BOUND * first, rel=1e-6)


def test_the_loss_costs_no_epsilon() -> None:
    assert planned().epsilon == planned(loss_share=0.0).epsilon
    assert planned().noise_std == planned(loss_share=0.0).noise_std
