"""Audits of the engine's own step on a linear model, with defects planted in the engine.

`finetune.FinetuneStep` runs as in a job, on a model whose gradients cost nothing: batches, clip, sum, noise
and optimiser are the engine's. Many audits share a training, each with canaries, coins and coordinates of its
own: no gradient of one touches a coordinate of another, inclusions and noise are independent, and so are the
audits.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_lora.auditing import bounds
from dp_lora.auditing.canaries import EMPTY, Trained, Watch, coins, released_noise
from dp_lora.auditing.noise_tests import Verdict, together
from dp_lora.auditing.updates import Followed
from dp_lora.config.schema import TrainConfig
from dp_lora.models.latents import Latents
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip, PrivacyPlan, make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.training import finetune

CLIP = 1e-3
_PULL = 100.0
_BYSTANDERS, _FEATURES = 16, 8


@functools.cache
def plan_of(
    sample_rate: float, steps: int, noise_multiplier: float | None = None, k: int = 1, epsilon: float = 8.0
) -> PrivacyPlan:
    """The plan of a run on 4,000 images at delta 1e-5; without a noise multiplier, the one for `epsilon`."""
    return make_plan(
        num_examples=4000,
        expected_batch_size=4000 * sample_rate,
        steps=steps,
        noise_multiplier=noise_multiplier,
        target_epsilon=epsilon if noise_multiplier is None else None,
        delta=1e-5,
        noise_multiplicity=k,
        max_grad_norm=CLIP,
    )


class LinearModel(nn.Module):
    """A coordinate of its own for each canary, coordinates for nobody, and some that bystanders share.

    Args:
        canaries: [m], the flat coordinate of each canary in the training.
        coordinates: number of them in all.
        order: [m + bystanders], of the examples; by default the bystanders come last.
    """

    def __init__(self, canaries: Tensor, coordinates: int, order: Tensor | None = None) -> None:
        super().__init__()
        columns = math.isqrt(coordinates - 1) + 1
        self.table = nn.Linear(columns, -(-coordinates // columns), bias=False)
        self.shared = nn.Linear(_FEATURES, _FEATURES, bias=False)
        nn.init.zeros_(self.table.weight)
        self.canaries, self.order = canaries, order
        self.features = torch.randn(_BYSTANDERS, _FEATURES, generator=torch.Generator().manual_seed(0))

    def losses(self, indices: Tensor, k: int) -> Tensor:
        """[M, k]: the loss of each draw; in order, examples from `len(canaries)` on are bystanders."""
        if self.order is not None:
            indices = self.order[indices]
        indices = indices.repeat_interleave(k)
        rows, columns = self.table.weight.shape
        own = (indices < len(self.canaries)).float()[:, None]
        place = self.canaries[indices.clamp(max=len(self.canaries) - 1)]
        answer = self.table(F.one_hot(place % columns, columns) * own * _PULL)
        others = self.features[(indices - len(self.canaries)).clamp(min=0)] * (1 - own)
        loss = (answer * F.one_hot(place // columns, rows)).sum(1) + self.shared(others).square().sum(1)
        return loss.view(-1, k)


class LinearStep(finetune.FinetuneStep):
    """The engine's step, with the losses of a linear model, and without the epsilon that it would log."""

    def losses(self, rows: Tensor, draws: algorithm.Draws) -> Tensor:
        return self.sgd.module.losses(rows, self.sgd.plan.noise_multiplicity).mean(1)


def train(
    plan: PrivacyPlan,
    audits: int,
    canaries: int,
    key: Randomness,
    empty: int = EMPTY,
    microbatch: int | None = None,
) -> list[Trained]:
    """What the auditors of `audits` audits of `canaries` canaries each know after one training.

    By default a microbatch holds nearly all batches.
    """
    included, width = coins(key, audits * canaries), canaries + empty
    number = torch.from_numpy(np.flatnonzero(included))
    examples = len(number) + _BYSTANDERS
    order = torch.from_numpy(np.argsort(key.bits64("order", 0, range(examples))[:, 0]))
    model = LinearModel(number // canaries * width + number % canaries, audits * width, order)
    if microbatch is None:
        most = min(1024, max(256, int(1.2 * plan.sample_rate * examples)))
        microbatch = 256 if plan.noise_multiplicity > 1 else most
    watches = [Watch(plan, part, empty) for part in included.reshape(audits, canaries)]
    with tempfile.TemporaryDirectory() as folder:
        step = LinearStep.on(
            model,
            Latents(torch.zeros(examples, 1), torch.zeros(examples, 1)),
            torch.zeros(examples, dtype=torch.int64),
            replace(plan, num_examples=examples),
            key,
            TrainConfig(),
            microbatch,
            Executions(Path(folder) / "executions.jsonl", {}),
        )

        def see(*_: Any) -> None:
            assert model.table.weight.grad is not None
            released = model.table.weight.grad.flatten()[: audits * width].double().numpy()
            values = released * plan.expected_batch_size / plan.max_grad_norm
            for watch, part in zip(watches, values.reshape(audits, width), strict=True):
                watch.add(part)

        step.sgd.epsilon = lambda: math.nan
        followed = Followed(step)
        step.sgd.optimizer.register_step_pre_hook(see)
        for index in range(plan.steps):
            followed(index)
        followed.release()
    checks = followed.p_values()
    found = [watch.trained() for watch in watches]
    return [replace(one, checks={**one.checks, **checks}) for one in found]


def silent(plan: PrivacyPlan, canaries: int, key: Randomness, empty: int = EMPTY) -> dict[str, float]:
    """The p-values of the steps on no example of one audit."""
    with tempfile.TemporaryDirectory() as folder:
        step = LinearStep.on(
            LinearModel(torch.zeros(0, dtype=torch.int64), canaries + empty),
            Latents(torch.zeros(0, 1), torch.zeros(0, 1)),
            torch.zeros(0, dtype=torch.int64),
            plan,
            key.derive("silent steps"),
            TrainConfig(),
            1,
            Executions(Path(folder) / "executions.jsonl", {}),
        )
        step.sgd.epsilon = lambda: math.nan
        return released_noise(step).p_values()


@dataclass(frozen=True)
class Found:
    """What an audit says of an engine."""

    noise: bool
    """The tests of the noise accuse it."""
    bounds: bool
    """A lower bound on epsilon passes the claim."""
    by: tuple[str, ...]

    @property
    def accused(self) -> bool:
        return self.noise or self.bounds


def judge(
    trained: Trained, plan: PrivacyPlan, silent: Mapping[str, float], confidence: float = 0.95
) -> Found:
    """The verdicts of `dp-lora-audit`, without the logged update norms of a run."""
    assert trained.noise is not None
    each = 1 - (1 - confidence) / 2
    verdict = Verdict(together(trained.p_values(), silent))
    at = bounds.thresholds(plan.mechanism, trained.noise_factor)
    outcomes = [bounds.Outcome.of(trained.scores, trained.included, threshold) for threshold in at]
    # What `one_run` would find is above the claim if and only if the claim is refuted.
    order = np.argsort(-np.abs(trained.scores), kind="stable")
    right = ((trained.scores > 0) == trained.included)[order]
    count, level = len(right), (1 - each) / len(bounds.GUESSED_SHARES)
    passes = any(
        bounds.one_run_p_value(count, guesses, int(right[:guesses].sum()), plan.epsilon, plan.delta) < level
        for guesses in (max(1, round(share * count)) for share in bounds.GUESSED_SHARES)
    )
    refuted = passes or bounds.refutes(outcomes, plan.mechanism, plan.delta, each)
    return Found(bool(verdict.accused), refuted, verdict.accused)


# Defects of the engine


def correct() -> AbstractContextManager[object]:
    """None."""
    return contextlib.nullcontext()


def noise_times(factor: float) -> Callable[[], AbstractContextManager[object]]:
    """`factor` times the noise that was accounted."""

    def planted() -> AbstractContextManager[object]:
        noised_mean = algorithm.noised_mean

        def less(total: Tensor, plan: PrivacyPlan, *rest: Any, **named: Any) -> Tensor:
            weaker = replace(plan, noise_multiplier=factor * plan.noise_multiplier)
            return noised_mean(total, weaker, *rest, **named)

        return mock.patch.object(algorithm, "noised_mean", less)

    return planted


def no_clipping() -> AbstractContextManager[object]:
    """C is infinite for the clip, and what it was for the noise."""

    def engine(module: nn.Module, clip: Clip) -> ClippedGradientSum:
        return ClippedGradientSum(module, replace(clip, max_grad_norm=math.inf))

    return mock.patch.object(algorithm, "ClippedGradientSum", engine)


class _Apart(ClippedGradientSum):
    """Takes each draw of an example for an example."""

    def __init__(self, module: nn.Module, clip: Clip) -> None:
        super().__init__(module, replace(clip, noise_multiplicity=1))
        self.k = clip.noise_multiplicity

    def add(self, losses: Tensor, weights: Tensor | None = None) -> None:
        super().add(losses, None if weights is None else weights.repeat_interleave(self.k))


@contextlib.contextmanager
def draws_apart() -> Iterator[None]:
    """The k draws of an image are clipped one by one, as in the code released with the paper."""

    def losses(self: LinearStep, rows: Tensor, *_: Any) -> Tensor:
        draws: Tensor = self.sgd.module.losses(rows, self.sgd.plan.noise_multiplicity).flatten()
        return draws

    with (
        mock.patch.object(algorithm, "ClippedGradientSum", _Apart),
        mock.patch.object(LinearStep, "losses", losses),
    ):
        yield


def whole_batches() -> AbstractContextManager[object]:
    """Every example is in every batch, and a Poisson sample was accounted."""
    return mock.patch.object(
        algorithm, "poisson_batch", lambda randomness, step, count, rate: torch.arange(count)
    )


def noise_of(
    choose: Callable[[int, Tensor, list[Tensor]], Tensor],
) -> Callable[[], AbstractContextManager[object]]:
    """What is released is the sum and `choose(step, noise, the noise of the steps before)`."""

    def planted() -> AbstractContextManager[object]:
        noised_mean, releases = algorithm.noised_mean, defaultdict[int, list[Tensor]](list)

        def other(total: Tensor, plan: PrivacyPlan, *rest: Any, **named: Any) -> Tensor:
            noise = noised_mean(torch.zeros_like(total), plan, *rest, **named)
            # The steps on no example are those of a smaller model.
            before = releases[len(total)]
            chosen = choose(len(before), noise, before)
            before.append(noise)
            return (total / plan.expected_batch_size).float() + chosen

        return mock.patch.object(algorithm, "noised_mean", other)

    return planted


def _twice(step: int, noise: Tensor, before: list[Tensor]) -> Tensor:
    return before[0] if step == 1 else noise


def _always(step: int, noise: Tensor, before: list[Tensor]) -> Tensor:
    return before[0] if before else noise


def _not_once(step: int, noise: Tensor, before: list[Tensor]) -> Tensor:
    return noise if step else torch.zeros_like(noise)


def _not_everywhere(step: int, noise: Tensor, before: list[Tensor]) -> Tensor:
    return noise * (torch.arange(len(noise)) % 10 > 0)


def _not_the_last(step: int, noise: Tensor, before: list[Tensor]) -> Tensor:
    # In the linear model, the tensor that bystanders share.
    return torch.cat([noise[: -(_FEATURES**2)], torch.zeros(_FEATURES**2)])


def _wrapped(step: int, noise: Tensor, before: list[Tensor]) -> Tensor:
    return noise[torch.arange(len(noise)) % 300]


def padding_counts() -> AbstractContextManager[object]:
    """The rows that fill up the last microbatch have weight 1: its first example counts once for each."""
    add = ClippedGradientSum.add

    def full(self: ClippedGradientSum, losses: Tensor, weights: Tensor | None = None) -> None:
        add(self, losses, None if weights is None else torch.ones_like(weights))

    return mock.patch.object(ClippedGradientSum, "add", full)


@contextlib.contextmanager
def clean_descent() -> Iterator[None]:
    """After the optimiser's step on the release, the sum without noise is descended as well."""
    noised_mean, descend, sums = algorithm.noised_mean, algorithm.PrivateStep._descend, list[Tensor]()

    def remembers(total: Tensor, *rest: Any, **named: Any) -> Tensor:
        sums[:] = [total]
        return noised_mean(total, *rest, **named)

    def twice(self: algorithm.PrivateStep, update: Tensor) -> None:
        descend(self, update)
        plan, parameters = self.sgd.plan, self.sgd.parameters
        clean = sums[0][: len(update)] / (plan.max_grad_norm * plan.expected_batch_size)
        rate = self.sgd.optimizer.param_groups[0]["lr"]
        for p, part in zip(parameters, clean.split([p.numel() for p in parameters]), strict=True):
            p.data -= rate * part.view_as(p).to(p)

    with (
        mock.patch.object(algorithm, "noised_mean", remembers),
        mock.patch.object(algorithm.PrivateStep, "_descend", twice),
    ):
        yield


@contextlib.contextmanager
def _sizes() -> Iterator[list[int]]:
    """Of the batches that were drawn, the last one last."""
    poisson_batch, sizes = algorithm.poisson_batch, list[int]()

    def seen(*given: Any) -> Tensor:
        batch = poisson_batch(*given)
        sizes.append(len(batch))
        return batch

    with mock.patch.object(algorithm, "poisson_batch", seen):
        yield sizes


@contextlib.contextmanager
def own_size() -> Iterator[None]:
    """Sum and noise are divided by the size of the batch that was drawn, at least 1."""
    noised_mean = algorithm.noised_mean
    with _sizes() as sizes:

        def divided(total: Tensor, plan: PrivacyPlan, *rest: Any, **named: Any) -> Tensor:
            return noised_mean(total, replace(plan, expected_batch_size=max(1, sizes[-1])), *rest, **named)

        with mock.patch.object(algorithm, "noised_mean", divided):
            yield


@contextlib.contextmanager
def skipped() -> Iterator[None]:
    """A step whose batch is empty releases nothing, which says that it was empty."""
    descend = algorithm.PrivateStep._descend
    with _sizes() as sizes:

        def unless_empty(self: algorithm.PrivateStep, update: Tensor) -> None:
            if sizes[-1]:
                descend(self, update)

        with mock.patch.object(algorithm.PrivateStep, "_descend", unless_empty):
            yield


FACTORS = (0.0, 0.1, 0.3, 0.5, 0.8)
"""Of the noise that was accounted."""

DEFECTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no noise": noise_times(0.0),
    "half of the noise": noise_times(0.5),
    "no clipping": no_clipping,
    "each of 4 draws clipped by itself": draws_apart,
    "every image in every batch": whole_batches,
    "the same noise at every step": noise_of(_always),
    "one step with the noise of another": noise_of(_twice),
    "one step without noise": noise_of(_not_once),
    "every tenth coordinate without noise": noise_of(_not_everywhere),
    "one tensor without noise": noise_of(_not_the_last),
    "noise that repeats every 300 coordinates": noise_of(_wrapped),
    "padding counts as examples": padding_counts,
    "the sum without noise is descended as well": clean_descent,
    "divided by the size of the batch that came": own_size,
    "a step with an empty batch is skipped": skipped,
}

MICROBATCH = {"padding counts as examples": 16}
"""Of the engines for which it matters; then, and where the batch of one audit does, an audit trains alone."""

ALONE = (*MICROBATCH, "divided by the size of the batch that came")
