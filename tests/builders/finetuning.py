"""A fine-tuning of the tiny model: what it starts from, and processes that die in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_lora.config.schema import Config
from dp_lora.data.sets import ImageSplits
from dp_lora.models import adapters, latents
from dp_lora.models.folders import LatentDiffusion, load
from dp_lora.models.latents import Latents
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.training import finetune
from tests.builders.tiny import TINY, composed

SHORT = ("train.expected_batch_size=20", "train.max_steps=5", "noise_multiplicity=k2", "lora.rank=2")


SEEDED = "privacy.insecure_seed=7"


@dataclasses.dataclass
class Given:
    """What a fine-tuning starts from."""

    config: Config
    plan: PrivacyPlan
    latents: Latents
    labels: torch.Tensor
    pretrained: Path

    def model(self) -> LatentDiffusion:
        model = load(self.pretrained)
        adapters.attach(model, self.config.trainable.components, self.config.lora, seed=0)
        return model

    def run(self, folder: Path, model: LatentDiffusion | None = None) -> tuple[dict[str, Any], torch.Tensor]:
        """(executed steps, logged rows, ...), and the released parameters."""
        model = model or self.model()
        rows: dict[int, dict[str, float]] = {}
        starts: list[int] = []
        executed = finetune.finetune(
            self.config, model, self.latents, self.labels, self.plan, folder, rows.__setitem__, starts.append
        )
        released = [p.detach().flatten() for p in adapters.trainable_parameters(model).values()]
        return {"executed": executed, "rows": rows, "started": starts}, torch.cat(released)


def given(pretrained: Path, digits: ImageSplits, *overrides: str, seeded: bool = True) -> Given:
    config = composed(*TINY, *SHORT, "train.checkpoint_minutes=0", *([SEEDED] if seeded else []), *overrides)
    images = digits.train.subset(range(400))  # type: ignore[arg-type]
    encoded = latents.encode(load(pretrained), images)
    return Given(config, plan_of(config), encoded, torch.from_numpy(images.labels), pretrained)


def plan_of(config: Config, num_examples: int = 400) -> PrivacyPlan:
    return make_plan(
        num_examples=num_examples,
        expected_batch_size=config.train.expected_batch_size,
        steps=config.train.max_steps,
        noise_multiplier=0.8,
        target_epsilon=None,
        delta=1e-4,
        noise_multiplicity=config.privacy.noise_multiplicity,
        max_grad_norm=0.1,
    )


class Crash(BaseException):
    """The process dies here."""


def crashing(function: Callable[..., Any], after: int, *, late: bool) -> Callable[..., Any]:
    """`function`, of which call number `after` dies before or after its work."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after and not late:
            raise Crash
        result = function(*args, **kwargs)
        if calls == after and late:
            raise Crash
        return result

    return call


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int, after: int = 0) -> None:
    """Makes every microbatch of more than `most` examples fail, but for the first `after` ones."""
    add, calls = ClippedGradientSum.add, 0

    def short(self: ClippedGradientSum, losses: torch.Tensor, weights: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        add(self, losses, weights)
        if calls > after and len(losses) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ClippedGradientSum, "add", short)


def a_step(job: Given, folder: Path, microbatch: int = 8, *overrides: str) -> finetune.FinetuneStep:
    config = composed(*TINY, *SHORT, *overrides)
    record = Executions(folder / f"{microbatch}.jsonl", {})
    key = Randomness.from_seed(3)
    return finetune.FinetuneStep.on(
        job.model(), job.latents, job.labels, job.plan, key, config.train, microbatch, record
    )
