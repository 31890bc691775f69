"""Canaries: examples put into a training by fair coins, to see whether what it releases tells them apart.

The training is the real one: the run's model, plan and loop, from `finetune.FinetuneStep` on. Canaries enter
where an image's data enters, as latents with a label, so their loss is the mean over k draws, their gradient
is clipped, summed and noised, and their batches are drawn by the engine's own code.

Where the plan protects persons, a canary is a person with `RECORDS` images that are all alike: the worst case
of the proof, of which an engine that takes each image for an example adds several.

No private image takes part: the other examples are noise with the shape of latents. A claim about all data
sets can be refuted on any of them, so this costs no privacy, and what comes out may be shown to anybody.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_lora.auditing.bounds import Bools, Floats, evidence, noise_factor
from dp_lora.auditing.membership import losses
from dp_lora.auditing.noise_tests import TESTS, ReleasedNoise, SilentNoise, largest_contribution
from dp_lora.auditing.updates import Followed
from dp_lora.config.schema import Config
from dp_lora.models.diffusion import in_batches
from dp_lora.models.families import Conditions
from dp_lora.models.latent_diffusion import LatentDiffusion
from dp_lora.models.latents import Latents, to_unit_range
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.persons import Persons
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.records.progress import Progress
from dp_lora.training import tuning
from dp_lora.training.finetune import FinetuneStep
from dp_lora.training.loop import Checkpoint, Step, resume, run_steps

BYSTANDERS = 128
"""Examples of noise beside the canaries, so that batches and microbatches are mixed."""

RECORDS = 3
"""Images of each example where an example is a person."""

EMPTY = 512
"""Coordinates at least where no example has a gradient: what is released there is noise and nothing else."""

SILENT_STEPS = 4
"""Steps on no example at all, of which every trained coordinate is looked at."""

_TOKENS, _CANARY, _COORDINATE = "tokens", "canary", "coordinate"
"""The parts of a condition."""

_PULL = 100.0
"""Norm of a gradient canary before the clip, in units of max(C, 1): far beyond what may pass."""


class GradientCanaries(LatentDiffusion):
    """`model` with one more layer, in which each canary has a coordinate of its own (a Dirac canary).

    Canary j is an example with the label `first_label` + j and zero latents. Its gradient is `_PULL` times
    max(C, 1) in coordinate j of `canaries.weight` and zero everywhere else, at every draw and wherever the
    parameters are. The gradient of every other example is zero there. So coordinate j of the noisy sum holds
    the noise and canary j alone: the worst case of the proof. The coordinates from `count` on,
    `EMPTY` of them at least, belong to nobody.

    Args:
        model: its trainable parameters chosen; its networks are shared, not copied.
        count: number of canaries.
        max_grad_norm: C.
    """

    def __init__(self, model: LatentDiffusion, count: int, max_grad_norm: float) -> None:
        super().__init__(
            model.autoencoder,
            model.unet,
            model.class_embedder,
            model.scheduler,
            model.classes,
            prompts=model.prompts,
            predicts_v=model.predicts_v,
            source=model.source,
        )
        self.null_embedding = model.null_embedding
        self.count, self.first_label = count, len(model.classes)
        # A table that is about square: the gradient of one draw then is a product of two short rows.
        columns = math.isqrt(count + EMPTY - 1) + 1
        self.canaries = nn.Linear(columns, -(-(count + EMPTY) // columns), bias=False)
        nn.init.zeros_(self.canaries.weight)
        self.to(model.unet.device)
        self._error = math.sqrt(_PULL * max(max_grad_norm, 1.0) / 2)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.canaries.weight.device

    def condition(self, labels: Tensor) -> Conditions:
        """The model's own condition, and [B, 1] each: whether it is a canary, the canary's coordinate."""
        own = labels < self.first_label
        inner = super().condition(labels.where(own, 0))
        number = (labels - self.first_label).clamp(min=0)
        rows, columns = self.canaries.weight.shape
        mask = (~own).to(torch.float32)[:, None]
        chosen = F.one_hot(number % columns, columns) * mask
        answer = self.canaries(chosen) * F.one_hot(number // columns, rows) * mask
        # Zero, with the gradient of the coordinate.
        coordinate = (answer - answer.detach()).sum(1, keepdim=True)
        own_parts = inner if isinstance(inner, dict) else {_TOKENS: inner}
        return {**own_parts, _CANARY: mask, _COORDINATE: coordinate}

    def predict_of(
        self, noisy_latents: Tensor, timesteps: Tensor, conditions: Tensor | Conditions | None
    ) -> Tensor:
        """What the network predicts; for a canary what it should, and an error with one gradient."""
        assert isinstance(conditions, dict)
        inner: Any = dict(conditions)
        canary, coordinate = inner.pop(_CANARY), inner.pop(_COORDINATE)
        shape = (-1, 1, 1, 1)
        predicted = super().predict_of(noisy_latents, timesteps, inner.get(_TOKENS, inner))
        signal, level = self.process.levels(timesteps.view(shape), noisy_latents)
        # Of zero latents the noise is known. The mean squared error is e^2 (1 + x)^2, its gradient 2 e^2.
        noise = noisy_latents / level
        target = self.process.target(torch.zeros_like(noise), noise, signal, level)
        error = self._error * (1 + coordinate.float().view(shape))
        return torch.where(canary.view(shape) > 0, target + error, predicted.float())


@dataclass(frozen=True)
class Trained:
    """The knowledge of an auditor after the training: a score for each canary, the coins, and the noise."""

    scores: Floats
    """Above 0 says "in"."""
    included: Bools
    noise_factor: float = 1.0
    """The share of the claimed noise that the scores are the evidence for."""
    noise: SilentNoise | None = None
    """The noise released where no example took part; None for canaries that have no coordinates."""
    checks: Mapping[str, float] = field(default_factory=dict)
    """The p-values of other tests than those of the noise."""

    def p_values(self) -> dict[str, float]:
        """The p-values of all tests that look at this training, by their names in `noise_tests.TESTS`."""
        return {**({} if self.noise is None else self.noise.p_values()), **self.checks}

    def arrays(self) -> dict[str, Any]:
        """All of it, for a file that `from_arrays` reads."""
        noise = {} if self.noise is None else self.noise.arrays()
        own = {"scores": self.scores, "included": self.included, "noise_factor": self.noise_factor}
        return {**own, **noise, **self.checks}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Trained:
        """The training whose `arrays` these are."""
        noise = SilentNoise.from_arrays(arrays) if "noise_by_step" in arrays else None
        checks = {name: float(arrays[name]) for name in TESTS if name in arrays}
        return cls(arrays["scores"], arrays["included"], float(arrays["noise_factor"]), noise, checks)


def coins(randomness: Randomness, count: int) -> Bools:
    """A fair coin for each canary, from a stream of its own."""
    return np.asarray(randomness.bits64("canaries", 0, range(count))[:, 0] >> np.uint64(63), dtype=np.bool_)


def train_with_canaries(
    config: Config,
    model: LatentDiffusion,
    plan: PrivacyPlan,
    *,
    kind: str,
    count: int,
    randomness: Randomness,
    folder: Path,
) -> Trained:
    """Trains `model` in place, as the run was trained, on canaries and noise; the run's images stay out.

    A training that is interrupted continues from `folder` when it is called again with the same arguments.

    Args:
        config: of the run.
        model: its trainable parameters chosen, as at the start of the run.
        plan: of the run, private; noise, sample rate, steps, k and C are taken as they are.
        kind: `gradient` (a coordinate of its own, seen at every step) or `image` (an odd image, seen by its
            loss under the final parameters).
        count: number of canaries, at least 2.
        randomness: a key of the audit's own.
        folder: private.
    """
    training = _Training(config, model, plan, coins(randomness, count), randomness, folder)
    return training.on_images() if kind == "image" else training.on_gradients()


# Steps on no example


def silent_noise(
    config: Config, model: LatentDiffusion, plan: PrivacyPlan, randomness: Randomness
) -> ReleasedNoise:
    """Releases of the run's own step on no example: noise alone, at every coordinate that is trained.

    Canaries have coordinates of their own; this looks at those of the run. `model` is left as it was.

    Args:
        config: of the run.
        model: its trainable parameters chosen, as at the start of the run.
        plan: of the run, private.
        randomness: a key of the audit's own.
    """
    nothing = torch.zeros(0, *model.latent_shape)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        executions = Executions(Path(folder) / "executions.jsonl", {"audit": True})
        step = FinetuneStep.on(
            model, Latents(nothing, nothing), torch.zeros(0, dtype=torch.int64), plan, randomness,
            config.train, 1, executions, config.trainable.learning_rate_factor,
        )  # fmt: skip
        noise = released_noise(step)
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data.copy_(before[name])
    return noise


def released_noise(step: FinetuneStep) -> ReleasedNoise:
    """The releases of `SILENT_STEPS` steps to the optimiser, and the loss that they log; ends the training.

    Args:
        step: has no example.
    """
    plan, seen, followed = step.sgd.plan, list[np.ndarray](), Followed(step)
    trained = [p for group in step.sgd.optimizer.param_groups for p in group["params"]]

    def see(*_: Any) -> None:
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in trained)
        seen[:] = [gradient.flatten().float().cpu().numpy() for gradient in gradients]

    step.sgd.optimizer.register_step_pre_hook(see)
    sizes = [p.numel() for p in trained] + [1] * (plan.loss_share > 0)
    noise = ReleasedNoise(sizes, plan.noise_std / plan.expected_batch_size, SILENT_STEPS)
    for index in range(SILENT_STEPS):
        seen.clear()
        logged = followed(index)
        if not seen:
            continue
        if plan.loss_share:
            loss = logged["private_loss"] * plan.clip.loss_unit
            seen.append(np.array([loss], dtype=np.float32))
        noise.add(np.concatenate(seen))
    followed.release()
    noise.checked(followed.p_values())
    return noise


# Gradient canaries


class Watch:
    """The auditor's record of the noised sums at the coordinates of gradient canaries.

    Args:
        plan: of the run.
        included: [m], the coins.
        empty: number of coordinates that belong to no canary, at least 1.
        amplitude: what a canary in the batch adds to its coordinate, in units of C.
    """

    def __init__(self, plan: PrivacyPlan, included: Bools, empty: int, amplitude: float = 1.0) -> None:
        self._plan, self._included, self._amplitude = plan, included, amplitude
        self._left_out = np.flatnonzero(~included)
        self._scores, self._factor, self._largest = np.zeros(len(included)), 0.0, 0.0
        self._noise = SilentNoise(empty + len(self._left_out))

    def add(self, values: Floats) -> None:
        """Takes what one step released.

        Args:
            values: [m + empty], in units of C: the canaries' coordinates, then those of nobody.
        """
        plan, count = self._plan, len(self._included)
        own, silent = values[:count], np.concatenate([values[count:], values[self._left_out]])
        self._noise.add(silent / plan.noise_multiplier)
        # What is not finite is no value of a right engine.
        self._largest = max(self._largest, float(np.abs(np.where(np.isfinite(own), own, np.inf)).max()))
        if self._noise.steps == 1:
            # Of the coordinates of nobody alone, so that the canaries have no say in how they are scored.
            self._factor = noise_factor(self._noise.ratio(stop=len(values) - count))
        sigma = self._factor * plan.noise_multiplier
        self._scores += evidence(own, sigma, plan.sample_rate, amplitude=self._amplitude)

    def trained(self) -> Trained:
        """The outcome, after the last step."""
        values = self._noise.steps * len(self._included)
        sigma = self._plan.noise_multiplier
        p_value = largest_contribution(self._largest, values, sigma, self._amplitude)
        checks = {"largest_contribution": p_value}
        return Trained(self._scores, self._included, self._factor, self._noise, checks)

    def state_dict(self) -> dict[str, Any]:
        """All of it, so that an interrupted audit goes on."""
        numbers = {"factor": np.array(self._factor), "largest": np.array(self._largest)}
        arrays = {"scores": self._scores, **numbers, **self._noise.arrays()}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state_dict(self, state: Any) -> None:
        """Restores what `state_dict` returned."""
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        self._scores, self._factor = arrays["scores"].copy(), float(arrays["factor"])
        self._largest = float(arrays["largest"])
        self._noise = SilentNoise.from_arrays(arrays)


class _Watched:
    """A training step of which the auditor sees what the optimiser sees: the noised gradient.

    Its state has what was seen so far, so that an interrupted audit goes on.
    """

    def __init__(
        self, step: FinetuneStep, model: GradientCanaries, plan: PrivacyPlan, included: Bools
    ) -> None:
        self._followed, self._model, self._plan, self._seen = Followed(step), model, plan, False
        amplitude = math.sqrt(1 - plan.loss_share**2)
        if plan.clipping == "per_layer":
            amplitude /= math.sqrt(step.sgd.gradients.num_layers)
        empty = model.canaries.weight.numel() - model.count
        self.watch = Watch(plan, included, empty, amplitude)
        step.sgd.optimizer.register_step_pre_hook(self._see)

    def _see(self, *_: Any) -> None:
        weight, self._seen = self._model.canaries.weight, True
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        released = gradient.flatten().double().cpu().numpy()
        self.watch.add(released * self._plan.expected_batch_size / self._plan.max_grad_norm)

    def __call__(self, step: int) -> dict[str, float]:
        self._seen = False
        logged = self._followed(step)
        if not self._seen:
            # What was not released is no noise.
            self.watch.add(np.zeros(self._model.canaries.weight.numel()))
        return logged

    def trained(self) -> Trained:
        """The outcome; the training ends."""
        self._followed.release()
        trained = self.watch.trained()
        return replace(trained, checks={**trained.checks, **self._followed.p_values()})

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._followed.state_dict(), "watch": self.watch.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self._followed.load_state_dict(state["step"])
        self.watch.load_state_dict(state["watch"])


# Image canaries


def odd_images(shape: tuple[int, int, int], count: int, randomness: Randomness) -> np.ndarray:
    """uint8 [count, C, H, W]: images like no other, each of random blocks of a quarter of its side."""
    channels, height, width = shape
    block = max(1, min(height, width) // 4)
    coarse = (channels, -(-height // block), -(-width // block))
    words = randomness.bits64("canary images", 0, range(count), math.prod(coarse))
    blocks = (words >> np.uint64(56)).astype(np.uint8).reshape(count, *coarse)
    return np.repeat(np.repeat(blocks, block, axis=2), block, axis=3)[:, :, :height, :width]


# The training


@dataclass(frozen=True)
class _Training:
    """A training on canaries and noise, as the run was trained: see `train_with_canaries`."""

    config: Config
    model: LatentDiffusion
    plan: PrivacyPlan
    included: Bools
    """The coins."""
    randomness: Randomness
    folder: Path

    def on_gradients(self) -> Trained:
        """Scores from the canaries' coordinates in each noised sum."""
        canaries = GradientCanaries(self.model, len(self.included), self.plan.max_grad_norm)
        chosen = torch.from_numpy(np.flatnonzero(self.included))
        latents, labels = self._bystanders()
        latents = torch.cat([torch.zeros(len(chosen), *latents.shape[1:]), latents])
        labels = torch.cat([canaries.first_label + chosen, labels])
        # Mixed, so that a canary comes first and last in batches and microbatches as often as any example.
        order = torch.from_numpy(np.argsort(self.randomness.bits64("order", 0, range(len(labels)))[:, 0]))
        step = self._step(canaries, latents[order], labels[order])
        watched = _Watched(step, canaries, self.plan, self.included)
        self._run(watched)
        return watched.trained()

    def on_images(self) -> Trained:
        """Scores from how much the losses of the canaries fell."""
        model, seed = self.model, self.config.seed
        device = next(model.unet.parameters()).device
        images = to_unit_range(odd_images(model.image_shape, len(self.included), self.randomness))
        with torch.inference_mode():
            parts = [
                model.encode(images[b.start : b.stop].to(device))[0] for b in in_batches(len(images), 250)
            ]
        odd = torch.cat(parts).cpu().clone()
        odd_labels = torch.arange(len(self.included)) % len(model.classes)
        before = losses(model, odd, odd_labels, draws=16, seed=seed)
        chosen = torch.from_numpy(self.included)
        latents, labels = self._bystanders()
        latents, labels = torch.cat([odd[chosen], latents]), torch.cat([odd_labels[chosen], labels])
        followed = Followed(self._step(model, latents, labels))
        self._run(followed)
        followed.release()
        learnt = before - losses(model, odd, odd_labels, draws=16, seed=seed)
        # What all images gained says nothing of a single one.
        return Trained(learnt - np.median(learnt), self.included, checks=followed.p_values())

    def _bystanders(self) -> tuple[Tensor, Tensor]:
        latents = self.randomness.normal("bystanders", 0, (BYSTANDERS, *self.model.latent_shape))
        return latents, torch.arange(BYSTANDERS) % len(self.model.classes)

    def _step(self, model: LatentDiffusion, latents: Tensor, labels: Tensor) -> FinetuneStep:
        """The step of the run's own fine-tuning, on other examples."""
        train, plan = self.config.train, replace(self.plan, num_examples=len(latents))
        persons = None
        # Nothing private takes part, so that a step that is taken again may be the same one.
        executions = Executions(self.folder / "executions.jsonl", {"audit": True})
        # The divisor of the sum stays the run's; the batches are smaller.
        sizes = replace(plan, expected_batch_size=plan.sample_rate * len(latents))
        cache = Path(self.config.paths.cache).expanduser()
        microbatch = tuning.choose_microbatch(model, sizes, train, 1, self.folder, cache)
        if plan.unit == "person":
            persons = Persons(torch.arange(len(latents)).repeat_interleave(RECORDS))
            latents, labels = (part.repeat_interleave(RECORDS, 0) for part in (latents, labels))
        return FinetuneStep.on(
            model,
            Latents(latents, torch.zeros_like(latents)),
            labels,
            plan,
            self.randomness,
            train,
            microbatch,
            executions,
            learning_rate_factor=self.config.trainable.learning_rate_factor,
            persons=persons,
        )

    def _run(self, step: Step) -> None:
        """Takes the steps of the plan that are not finished yet."""
        checkpoint = Checkpoint(self.folder, self.config.train.checkpoint_minutes)
        finished, steps = resume(step, checkpoint), self.plan.steps
        mode = self.config.tracking.progress
        with Progress(steps, "canaries", initial=finished, mode=mode, public=True) as progress:
            run_steps(step, steps, checkpoint, progress, lambda step, values: None)
