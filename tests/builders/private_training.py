"""A training of a small network in a loop of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_lora import PrivacyPlan, PrivateTraining, make_plan

N, STEPS = 60, 6
IMAGES = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 3


class Crash(BaseException):
    """The process dies here."""


class Counter:
    """Has a state that nothing else of a checkpoint tells."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])


def plan_of(**changes: Any) -> PrivacyPlan:
    settings = {
        "num_examples": N, "expected_batch_size": 15, "steps": STEPS, "noise_multiplier": 1.0, "delta": 1e-3,
        "max_grad_norm": 0.5,
    }  # fmt: skip
    return make_plan(**(settings | changes))  # type: ignore[arg-type]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def synthetic(model: nn.Module) -> Callable[[slice], Tensor]:
    inputs = torch.eye(4, 5)
    labels = torch.arange(4) % 3
    return lambda chosen: F.cross_entropy(model(inputs[chosen]), labels[chosen], reduction="none")


def training(
    folder: Path, model: nn.Module | None = None, plan: PrivacyPlan | None = None, **named: Any
) -> PrivateTraining:
    model = model or network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"synthetic_losses": synthetic(model), "insecure_seed": 3} | named
    return PrivateTraining(model, optimizer, plan or plan_of(), folder, **settings)


def losses(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(IMAGES[rows]), LABELS[rows], reduction="none")


def run(private: PrivateTraining, size: int = 4, stop_in: int | None = None) -> list[dict[str, float]]:
    """Takes all steps, or dies before step `stop_in` is applied; the values of those taken."""
    values = []
    for step in private.steps():
        for rows, weights, _ in step.microbatches(size):
            step.add(losses(private.sgd.module, rows), weights)
        if step.number == stop_in:
            raise Crash
        if step.apply():
            values.append(step.values)
    return values


def parameters(private: PrivateTraining) -> Tensor:
    return torch.cat([p.detach().flatten() for p in private.sgd.parameters])
