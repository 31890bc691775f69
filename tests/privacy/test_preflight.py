"""The preflight passes on a sound engine and stops each broken one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_lora.errors import UserError
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.preflight import PreflightError, check_accountants, preflight


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(
        num_examples=1000,
        expected_batch_size=200,
        steps=10,
        noise_multiplier=2.0,
        target_epsilon=None,
        delta=1e-5,
        noise_multiplicity=3,
        max_grad_norm=0.01,
    )


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_a_sound_engine_passes_and_the_model_is_as_before(
    clipping: str, plan: PrivacyPlan, diffusion: Any, make_batch: Any
) -> None:
    model, (latents, classes, timesteps, noise) = diffusion(), make_batch(4, 3)
    model.unet.conv_in.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]

    def losses(examples: slice) -> Tensor:
        rows = slice(examples.start * 3, examples.stop * 3)
        found: Tensor = model.losses((latents[examples], classes[examples], timesteps[rows], noise[rows]), 3)
        return found

    preflight(model, losses, dataclasses.replace(plan, clipping=clipping))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all("forward" not in vars(module) for module in model.modules())


class Centred(nn.Module):
    """A layer that mixes examples without any buffer that would betray it."""

    def __init__(self, centre: bool) -> None:
        super().__init__()
        self.body, self.centre = nn.Linear(4, 3), centre

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.body(x - x.mean(0) * self.centre))
        return out


def check(model: Centred, plan: PrivacyPlan) -> None:
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))

    def losses(examples: slice) -> Tensor:
        part = rows.view(4, 3, 4)[examples].reshape(-1, 4)
        return model(part).square().sum(1).view(-1, 3).mean(1)

    preflight(model, losses, plan)


def test_a_model_that_mixes_examples_is_stopped(plan: PrivacyPlan) -> None:
    check(Centred(False), plan)
    with pytest.raises(PreflightError, match="mixes the examples"):
        check(Centred(True), plan)
    assert issubclass(PreflightError, UserError)


def test_equal_examples_prove_nothing(plan: PrivacyPlan) -> None:
    """A loss that divides by the mean over the batch, without a gradient, is itself on equal examples."""
    model, rows = Centred(False), torch.ones(4, 3, 4)

    def losses(examples: slice) -> Tensor:
        found = model(rows[examples].reshape(-1, 4)).square().sum(1).view(-1, 3).mean(1)
        return found / found.detach().mean()

    with pytest.raises(PreflightError, match=r"^synthetic_losses: examples 0 and 1 have the same gradient"):
        preflight(model, losses, plan)
    rows[:] = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PreflightError, match="mixes the examples"):
        preflight(model, losses, plan)


def test_an_engine_that_does_not_clip_is_stopped(plan: PrivacyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClippedGradientSum, "_factors", lambda self, norms: torch.ones_like(norms))
    with pytest.raises(PreflightError):
        check(Centred(False), plan)
    with pytest.raises(PreflightError, match="contributes"):
        check(Centred(False), dataclasses.replace(plan, clipping="per_layer"))


def test_an_engine_that_lets_large_gradients_pass_c_a_little_is_stopped(
    plan: PrivacyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = ClippedGradientSum._factors

    def careless(self: ClippedGradientSum, norms: Tensor) -> Tensor:
        found = factors(self, norms)
        return torch.where(norms > 1000, 1.001 * found, found)

    monkeypatch.setattr(ClippedGradientSum, "_factors", careless)
    with pytest.raises(PreflightError, match="contributes"):
        check(Centred(False), plan)


def test_an_engine_that_counts_padding_is_stopped(plan: PrivacyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    add = ClippedGradientSum.add

    def careless(self: ClippedGradientSum, losses: Tensor, weights: Tensor | None = None) -> None:
        if weights is not None and not weights.any():
            losses, weights = losses.detach().nan_to_num() + losses.nan_to_num(), None
            self._total += 1e-9
        add(self, losses, weights)

    monkeypatch.setattr(ClippedGradientSum, "add", careless)
    with pytest.raises(PreflightError, match="padding"):
        check(Centred(False), plan)


def test_accountants_that_disagree_are_stopped() -> None:
    check_accountants({"pld": 5.0, "prv": 5.01, "rdp": 5.4})
    check_accountants({"pld": 5.0, "prv": 4.996, "rdp": 5.4})
    check_accountants({"pld": 5.0, "prv": 5.099, "rdp": 5.4})
    check_accountants({"pld": 5.0, "prv": float("inf"), "rdp": 5.4})
    check_accountants({"pld": 0.5, "prv": 0.529, "rdp": 0.6})
    with pytest.raises(PreflightError, match="accountants disagree"):
        check_accountants({"pld": 0.5, "prv": 0.532, "rdp": 0.6})
    for prv in (4.9, 4.994, 5.101, 5.2):
        with pytest.raises(PreflightError, match="disagree"):
            check_accountants({"pld": 5.0, "prv": prv, "rdp": 5.4})
