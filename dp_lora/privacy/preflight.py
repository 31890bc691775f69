"""A few seconds of proof, on synthetic examples, that the engine does on this model what the plan says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from dp_lora.errors import UserError
from dp_lora.privacy.gradients import AUTOMATIC_GAMMA, ClippedGradientSum
from dp_lora.privacy.plan import Clip, PrivacyPlan


class PreflightError(UserError):
    """The engine or the accountants do not do on this model what the guarantee needs."""


def preflight(
    module: nn.Module,
    losses: Callable[[slice], Tensor],
    plan: PrivacyPlan,
    examples: int = 4,
    tolerance: float = 1e-4,
) -> None:
    """Returns when all of this holds, and raises PreflightError at the first that does not.

        * the examples have different gradients: what mixes equal ones would change nothing;
        * the engine's gradient of each example is that of a loop over single examples, up to `tolerance`;
        * one example contributes at most C (1 + 1e-6), however large its gradient is;
        * padding contributes exactly zero, even when its loss is not a number;
        * PLD <= PRV <= PLD + 2 % (at least 0.03), for the plan's noise, sample rate and steps.

    The trainable parameters are moved a little meanwhile, since a fresh adapter has zero gradients that
    would hide errors, and dropout is off; both are as before afterwards. Every other layer keeps its mode.

    Args:
        module: the model with its trainable parameters, no engine attached.
        losses: the losses [n] of the synthetic examples of a slice, mean over their k draws, from a
            forward of `module` on n k rows. An example's draws may not depend on the slice.
        plan: the numbers of the run.
        examples: how many synthetic examples `losses` knows.
        tolerance: relative error of a gradient; wider for bfloat16.
    """
    with _disturbed(module):
        expected = _gradients_one_by_one(module, losses, examples)
        # Without a clip, which would hide how long a gradient is.
        with _engine(module, replace(plan.clip, loss_share=0.0, max_grad_norm=math.inf)) as engine:
            _check_gradients(engine, losses, expected, tolerance)
        if plan.clipping != "per_layer":
            with _engine(module, replace(plan.clip, loss_share=0.0)) as engine:
                _check_gradients(engine, losses, expected, tolerance)
        _refuse_equal(expected)
        with _engine(module, plan.clip) as engine:
            _check_sensitivity(engine, losses, examples)
            _check_padding(engine, losses, examples)
    check_accountants(plan.epsilon_by_accountant)


def check_accountants(bounds: dict[str, float]) -> None:
    """Raises PreflightError unless PLD <= PRV <= PLD + 2 % (at least 0.03), where PRV has a bound."""
    pld, prv = bounds["pld"], bounds["prv"]
    if math.isfinite(prv) and not pld * (1 - 1e-3) <= prv <= pld + max(0.03, 0.02 * pld):
        raise PreflightError(f"privacy: the accountants disagree: pld {pld:.4g}, prv {prv:.4g}")


@contextmanager
def _engine(module: nn.Module, clip: Clip) -> Iterator[ClippedGradientSum]:
    engine = ClippedGradientSum(module, clip)
    try:
        yield engine
    finally:
        engine.detach()


@contextmanager
def _disturbed(module: nn.Module) -> Iterator[None]:
    trained = [p for p in module.parameters() if p.requires_grad]
    before, modes = [p.detach().clone() for p in trained], [m.training for m in module.modules()]
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.training = False
    try:
        with torch.no_grad():
            for p in trained:
                p.add_((0.02 * torch.randn(p.shape, generator=generator)).to(p))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(trained, before, strict=True):
                p.copy_(value)
        for part, mode in zip(module.modules(), modes, strict=True):
            part.training = mode


def _gradients_one_by_one(
    module: nn.Module, losses: Callable[[slice], Tensor], examples: int
) -> list[Tensor]:
    """The gradient [P] of each example by itself, from stock autograd."""
    trained = [p for p in module.parameters() if p.requires_grad]
    found = []
    for i in range(examples):
        loss = losses(slice(i, i + 1))
        if loss.shape != (1,):
            raise PreflightError(
                f"losses of shape {list(loss.shape)} for one example: expected [1], the mean over its k draws"
            )
        gradients = torch.autograd.grad(loss.sum(), trained, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]
        found.append(torch.cat([part.flatten().double() for part in parts]))
    return found


def _refuse_equal(gradients: list[Tensor]) -> None:
    for i, j in itertools.combinations(range(len(gradients)), 2):
        if float((gradients[i] - gradients[j]).norm()) <= 1e-6 * float(gradients[i].norm()):
            raise PreflightError(
                f"synthetic_losses: examples {i} and {j} have the same gradient, so that a loss which mixes "
                "examples would not be noticed; expected examples that differ, such as noise from a seed"
            )


def _check_gradients(
    engine: ClippedGradientSum, losses: Callable[[slice], Tensor], expected: list[Tensor], tolerance: float
) -> None:
    """The engine's gradient of each example among the others, clipped, against the clipped expected one."""
    bound = engine.clip.max_grad_norm
    for i, gradient in enumerate(expected):
        norm = float(gradient.norm())
        if engine.clip.clipping == "automatic" and math.isfinite(bound):
            clipped = gradient * bound / (norm + AUTOMATIC_GAMMA)
        else:
            clipped = gradient * min(1.0, bound / norm) if norm else gradient
        weights = torch.zeros(len(expected), device=gradient.device)
        weights[i] = 1.0
        engine.reset()
        engine.add(losses(slice(0, len(expected))), weights)
        error = float((engine.total() - clipped).norm() / clipped.norm().clamp(min=1e-30))
        if not error <= tolerance:
            raise PreflightError(
                f"privacy: an example's gradient among others differs from its own by {error:.1e}, expected "
                f"{tolerance:.0e} or less: the model or the loss mixes the examples of a batch, the draws of "
                "synthetic_losses are not fixed, a layer is unsupported, or bfloat16 needs a wider tolerance"
            )


def _check_sensitivity(engine: ClippedGradientSum, losses: Callable[[slice], Tensor], examples: int) -> None:
    for scale in (1.0, 1e4):
        for i in range(2):
            weights = torch.zeros(examples)
            weights[i % examples] = 1.0
            engine.reset()
            batch = losses(slice(0, examples)) * scale
            engine.add(batch, weights.to(batch.device))
            norm = float(engine.total().norm())
            if not norm <= engine.clip.max_grad_norm * (1 + 1e-6):
                raise PreflightError(
                    f"privacy: one example contributes {norm:.6g}, expected at most max_grad_norm "
                    f"{engine.clip.max_grad_norm:g}"
                )


def _check_padding(engine: ClippedGradientSum, losses: Callable[[slice], Tensor], examples: int) -> None:
    engine.reset()
    batch = losses(slice(0, examples)) * math.nan
    engine.add(batch, torch.zeros(examples, device=batch.device))
    if torch.count_nonzero(engine.total()):
        raise PreflightError("privacy: padding contributes to the sum, expected exactly zero")
