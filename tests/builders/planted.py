"""Matrices of unequal size on data in which known ones carry all signal, and scouting by the real engine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dp_lora.models import candidates
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.scouting import Scout

SIZES = ((32, 32), (64, 32), (32, 64), (64, 64), (96, 64), (64, 96), (128, 32), (32, 128))
"""Inputs and outputs of each matrix."""
PLANTED = ("m1", "m6")
RANK, EXAMPLES, BATCH, STEPS, SCOUTED = 4, 4000, 400, 20, 8


class Planted(nn.Module):
    """One matrix a name, side by side, each with an adapter of rank 4."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            parts = {f"m{i}": nn.Linear(a, b, bias=False) for i, (a, b) in enumerate(SIZES)}
            self.unet = nn.ModuleDict(parts).requires_grad_(False)
            config = LoraConfig(
                r=RANK, lora_alpha=RANK, target_modules=list(parts), init_lora_weights="gaussian"
            )
            inject_adapter_in_model(config, self.unet)

    def losses(self, rows: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """One value an example, whose gradient by a matrix is target x row'."""
        parts = zip(self.unet.values(), rows, targets, strict=True)
        return sum(((layer(x) * y).sum(1) for layer, x, y in parts), torch.zeros(len(rows[0])))


def data(signal: float, seed: int, examples: int = EXAMPLES) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and targets of each matrix: normal, and in the planted ones alone the targets follow the rows.

    The others' gradients have mean 0 and a quarter of the length.

    signal: correlation of a planted matrix's targets with one direction of its rows.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(examples, a, generator=generator) for a, _ in SIZES]
    targets = [torch.randn(examples, b, generator=generator) for _, b in SIZES]
    for i in range(len(SIZES)):
        if f"m{i}" not in PLANTED:
            rows[i] *= 0.25
            continue
        followed = rows[i] @ torch.randn(rows[i].shape[1], generator=generator)
        followed /= followed.std()
        direction = torch.randn(targets[i].shape[1], generator=generator)
        targets[i] = signal * followed[:, None] * direction + (1 - signal**2) ** 0.5 * targets[i]
    return rows, targets


def plan(epsilon: float | None, noise_multiplier: float | None = None) -> PrivacyPlan:
    return make_plan(
        num_examples=EXAMPLES, expected_batch_size=BATCH, steps=STEPS, target_epsilon=epsilon,
        noise_multiplier=noise_multiplier, delta=1e-5, max_grad_norm=1.0,
    )  # fmt: skip


def scout_of(model: Planted, kind: str, given: PrivacyPlan, folder: Path, seed: int | None = None) -> Scout:
    """The engine of scouting steps on the candidates of `model`."""
    candidates.open_for_scouting(model, kind)  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    key = Randomness.from_system() if seed is None else Randomness.from_seed(seed)
    executions = Executions(folder / "executions.jsonl", {}, given.steps)
    return Scout(model, torch.optim.SGD(trained, lr=0.0), given, key, executions, EXAMPLES)


def scouted(
    kind: str, given: PrivacyPlan, signal: float, seed: int, steps: int = SCOUTED
) -> dict[str, float]:
    """The score of each matrix after scouting, by name."""
    model, (rows, targets) = Planted(seed), data(signal, seed)
    with tempfile.TemporaryDirectory() as folder:
        scout = scout_of(model, kind, given, Path(folder), seed)
        for number in range(steps):
            step = scout.begin(number)
            for chosen, weights, _ in step.microbatches(BATCH):
                step.add(model.losses([x[chosen] for x in rows], [y[chosen] for y in targets]), weights)
            assert step.apply()
        scout.detach()
        return dict(zip(model.unet, scout.scores(), strict=True))
