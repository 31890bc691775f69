"""Private fine-tuning: DP-SGD on the chosen parameters of a pre-trained latent diffusion model.

Guarantee: what leaves this module (the adapter, and for each step the update's norm, its
signal-to-noise and epsilon) is a function of the public model, the public configuration and the noised
sums of `privacy.mechanism.noised_mean`, so epsilon of the plan covers it.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dp_lora import models, tuning
from dp_lora.config import Config, TrainConfig
from dp_lora.diffusion import per_example_loss
from dp_lora.errors import UserError
from dp_lora.files import private_directory, read_json, write_atomic, write_json
from dp_lora.latents import Latents
from dp_lora.models import LatentDiffusion
from dp_lora.privacy.accounting import EpsilonCurve
from dp_lora.privacy.batches import poisson_batch
from dp_lora.privacy.executions import ORIGIN, Executions
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.mechanism import (
    microbatches,
    noised_mean,
    private_loss,
    signal_to_noise,
    slice_of_batch,
)
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.preflight import preflight
from dp_lora.privacy.randomness import KEY_BYTES, Randomness
from dp_lora.processes import agreed, largest
from dp_lora.progress import Progress
from dp_lora.provenance import hardware, versions
from dp_lora.train import Checkpoint, learning_rate, resume, run_steps

_ROUND = ("dp-lora", "torch", "diffusers", "peft", "numpy", "cryptography")
"""Packages whose version can change how a step rounds."""

_BFLOAT16_TOLERANCE = 0.1
"""Relative error of a gradient in bfloat16, whose numbers have eight bits."""


class PrivateStep:
    """One step of DP-SGD (Abadi et al. 2016) with noise multiplicity, in the order of the paper's algorithm.

    Args:
        model: with its trainable parameters chosen, on its device.
        latents: of the private images, on the CPU.
        labels: int64 [N].
        plan: the numbers of the run.
        randomness: the run's key.
        train: learning rate, schedule and the like; nothing that touches privacy.
        microbatch: examples per forward and backward, halved when memory runs out.
        executions: the write-ahead record.
        halved: called with the new microbatch after that.
        learning_rate_factor: over `train.learning_rate`, of all parameters but the class embedding.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        latents: Latents,
        labels: Tensor,
        plan: PrivacyPlan,
        randomness: Randomness,
        train: TrainConfig,
        microbatch: int,
        executions: Executions,
        halved: Callable[[int], None] = lambda microbatch: None,
        learning_rate_factor: float = 1.0,
    ) -> None:
        self.model, self.latents, self.labels, self.plan = model, latents, labels, plan
        self.randomness, self.train, self.microbatch = randomness, train, microbatch
        self.executions, self.lineage, self.halved = executions, ORIGIN, halved
        self.learning_rate_factor = learning_rate_factor
        self.gradients = ClippedGradientSum(
            model, plan.noise_multiplicity, plan.max_grad_norm, plan.clipping, plan.loss_share
        )
        self.parameters = list(self.gradients.parameters.values())
        self.average = [p.detach().clone() for p in self.parameters]
        factors = [self._factor(name) for name in self.gradients.parameters]
        self.optimizer = torch.optim.AdamW(
            [{"params": [p], "factor": factor} for p, factor in zip(self.parameters, factors, strict=True)],
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
        )
        self.curve = EpsilonCurve(plan.mechanism, plan.delta)
        self.group = dist.group.WORLD if dist.is_initialized() else None

    def __call__(self, step: int) -> dict[str, float]:
        plan, size = self.plan, self.gradients.num_parameters
        # 0. Record that the step begins; randomness is replayed only if it is the same step once more.
        generation, execution = self.executions.begin(step, self.lineage)
        # 1. to 3. Sample the batch; per-example gradients of the mean over k draws; clip each to C and sum.
        while (total := self._clipped_sum(step, generation)) is None:
            generation, execution = self._in_smaller_microbatches(step)
        # 4. and 5. Add Gaussian noise of std sigma C, once; divide by the expected batch size.
        released = noised_mean(total, plan, self._randomness(generation), step, self.group)
        update = released[:size]
        # 6. Optimiser step on the released value.
        self._descend(update, step)
        # 7. Moving average of the weights, once per batch.
        self._average(step)
        # 8. Account for every execution begun.
        self.lineage = execution
        return {
            "epsilon": self.epsilon(),
            "update_norm": float(torch.linalg.vector_norm(update, dtype=torch.float64)),
            "signal_to_noise": signal_to_noise(update, plan),
            "learning_rate": self._rate(step),
            **({"private_loss": private_loss(released, plan)} if plan.loss_share else {}),
        }

    def _randomness(self, generation: int) -> Randomness:
        return self.randomness.derive(f"generation {generation}") if generation else self.randomness

    def _clipped_sum(self, step: int, generation: int) -> Tensor | None:
        """The clipped sum of this process's part of the batch; None when memory ran out on any process."""
        randomness = self._randomness(generation)
        # Every image joins by itself with probability q.
        batch = poisson_batch(randomness, step, self.plan.num_examples, self.plan.sample_rate)
        self.gradients.reset()
        enough = True
        try:
            for positions, weights in microbatches(self._positions(len(batch)), self.microbatch):
                losses = self.losses(batch[positions], positions, randomness, step)
                self.gradients.add(losses, weights.to(losses.device))
        except torch.OutOfMemoryError:
            enough = False
        total = self.gradients.total()
        self.gradients.reset()
        return None if largest(not enough) else total

    def _in_smaller_microbatches(self, step: int) -> tuple[int, str]:
        """Halves the microbatch and begins `step` again, of which nothing has been released."""
        if self.microbatch == 1:
            raise tuning.too_large()
        tuning.free_memory()
        self.microbatch //= 2
        self.halved(self.microbatch)
        return self.executions.begin_again(step, self.lineage, microbatch=self.microbatch)

    def losses(self, indices: Tensor, positions: Tensor, randomness: Randomness, step: int) -> Tensor:
        """Losses [M] of the images `indices`, whose draws belong to their `positions` in the batch."""
        k, shape = self.plan.noise_multiplicity, self.model.latent_shape
        device = self.parameters[0].device
        first, rows = int(positions[0]), len(positions)
        latents = self.latents.sample(indices, randomness.normal("posterior", step, (rows, *shape), first))
        timesteps = randomness.timesteps(
            step, rows, k, len(self.model.scheduler.alphas_cumprod), self.train.stratified_timesteps, first
        )
        noise = randomness.normal("diffusion", step, (rows, k, *shape), first)
        low = self.train.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return per_example_loss(
                self.model,
                latents.to(device),
                self.labels[indices].to(device),
                timesteps.to(device),
                noise.to(device),
            )

    def epsilon(self) -> float:
        """An upper bound on epsilon of all executions so far."""
        return self.curve(self.executions.count)

    def _positions(self, size: int) -> Tensor:
        """The positions in the batch that this process sums."""
        if self.group is None:
            return torch.arange(size)
        return slice_of_batch(torch.arange(size), dist.get_rank(), dist.get_world_size())

    def _factor(self, name: str) -> float:
        if name.startswith("class_embedder"):
            return self.train.embedder_learning_rate_factor
        return self.learning_rate_factor

    def _rate(self, step: int) -> float:
        train = self.train
        return learning_rate(train.learning_rate, train.schedule, step, self.plan.steps, train.warmup_steps)

    def _descend(self, update: Tensor, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step) * group["factor"]
        self.gradients.write_gradients(update)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _average(self, step: int) -> None:
        # A short average at first, so that the start is forgotten.
        decay = min(self.train.ema_decay, (1 + step) / (10 + step))
        for averaged, parameter in zip(self.average, self.parameters, strict=True):
            averaged.lerp_(parameter.detach(), 1 - decay)

    def release(self) -> None:
        """Puts the moving average in place of the trained parameters and takes the engine off the model."""
        self.gradients.detach()
        for parameter, averaged in zip(self.parameters, self.average, strict=True):
            parameter.data.copy_(averaged)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on but the key; every part is a function of released values."""
        return {
            "parameters": [p.detach().cpu() for p in self.parameters],
            "average": [p.cpu() for p in self.average],
            "optimizer": self.optimizer.state_dict(),
            "lineage": self.lineage,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`. Raises UserError when it belongs to other parameters."""
        saved = [*state["parameters"], *state["average"]]
        own = [*self.parameters, *self.average]
        if [p.shape for p in saved] != [p.shape for p in own]:
            raise UserError("checkpoint: its parameters have other shapes than this configuration's")
        for parameter, value in zip(own, saved, strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lineage = state["lineage"]


def finetune(
    config: Config,
    model: LatentDiffusion,
    latents: Latents,
    labels: Tensor,
    plan: PrivacyPlan,
    folder: Path,
    log: Callable[[int, dict[str, float]], None],
    started: Callable[[int], None],
    captions: Sequence[str] | None = None,
) -> int:
    """Trains the chosen parameters of `model` in place and returns the number of executed steps.

    Args:
        config: the job.
        model: its trainable parameters chosen, on the device to train on.
        latents, labels: of the private images.
        plan: the numbers of the run.
        folder: the run's private `checkpoint/`; an earlier start of the run is continued from it.
        log: called with the number of finished steps and what may be logged.
        started: called with the number of finished steps before the first new one.
        captions: of the private images, which then take the place of the labels as conditions of a model
            with a text encoder. It knows its classes again when the training ends.

    Every execution begun counts towards the plan's steps: where redone steps could not be replayed, as many
    fewer follow, so epsilon never passes the plan's. On several processes of one job the first writes
    `folder` and the others read it.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    device = next(model.unet.parameters()).device
    if first:
        private_directory(folder)
        _same_plan(plan, folder / "plan.json")
        run_key(config, folder)
    if dist.is_initialized():
        dist.barrier()
    randomness = run_key(config, folder)
    inputs = digest(model, latents, labels, plan, randomness, captions)
    check_engine(config, model, plan)
    microbatch = agreed(_microbatch(config, model, plan, folder))
    tuning.arrange(model, plan, config.train, microbatch)
    same = agreed(numerics(config, device, microbatch, inputs))
    executions = Executions(folder / "executions.jsonl", same, writes=first)

    def keep(microbatch: int) -> None:
        if first:
            tuning.keep_microbatch(microbatch, device, folder)

    keep(microbatch)
    # After everything that tries the engine on synthetic examples, which never meet a caption.
    if captions is not None:
        assert model.prompts is not None
        model.prompts.use(captions)
        labels = torch.arange(len(captions))
    step = PrivateStep(
        model,
        latents,
        labels,
        plan,
        randomness,
        config.train,
        microbatch,
        executions,
        keep,
        config.trainable.learning_rate_factor,
    )
    checkpoint = Checkpoint(folder, config.train.checkpoint_minutes, writes=first)
    finished = resume(step, checkpoint)
    total = steps_to_finish(plan, executions, finished, step.lineage)
    if first:
        started(finished)
    with Progress(
        total, "finetune", initial=finished, mode=config.tracking.progress, public=config.data.public
    ) as progress:
        run_steps(step, total, checkpoint, progress, log if first else _silent)
    step.release()
    if captions is not None and model.prompts is not None:
        model.prompts.use_classes(model.classes)
    if first:
        forget_key(folder)
    return executions.count


def _microbatch(config: Config, model: LatentDiffusion, plan: PrivacyPlan, folder: Path) -> int:
    processes = dist.get_world_size() if dist.is_initialized() else 1
    cache = Path(config.paths.cache).expanduser()
    return tuning.choose_microbatch(model, plan, config.train, processes, folder, cache)


def _silent(step: int, values: dict[str, float]) -> None:
    """What the other processes log."""


def steps_to_finish(plan: PrivacyPlan, executions: Executions, finished: int, lineage: str) -> int:
    """Number of steps after which the run ends: its executions, begun and to come, are the plan's steps.

    Args:
        plan: of the run.
        executions: all that were begun.
        finished: number of steps behind the checkpoint.
        lineage: of the checkpoint's state.

    Raises UserError when all were begun and there is no checkpoint to go on from.
    """
    total = finished + executions.replayable(finished, lineage) + plan.steps - executions.count
    if total < max(1, finished):
        raise UserError(
            f"checkpoint: {executions.count} steps of {plan.steps} were begun and none can be replayed from "
            f"the {finished} that were kept; the privacy of this run is spent. Remove the run directory to "
            "start again, and count what was spent"
        )
    return total


def _same_plan(plan: PrivacyPlan, path: Path) -> None:
    """Keeps the plan of the run's first start. Raises UserError when the run goes on under another one."""
    values = plan.to_dict()
    if not path.exists():
        write_json(path, values, mode=0o600)
    before = read_json(path)
    for name in ("num_examples", "steps", "noise_multiplier"):
        if not math.isclose(float(values[name]), float(before[name]), rel_tol=1e-6):
            raise UserError(
                f"data: this run began with {name}={before[name]} and now has {values[name]}: the private "
                "images have changed since; expected the same ones, or another paths.outputs"
            )


def run_key(config: Config, folder: Path) -> Randomness:
    """The run's randomness: its key is made once and kept in `folder` until the training has ended.

    Raises UserError when steps were begun with a key that is gone.
    """
    if config.privacy.insecure_seed is not None:
        return Randomness.from_seed(config.privacy.insecure_seed)
    if (folder / "finished").exists():
        return Randomness.from_system()  # no step is left that could draw from it
    path = folder / "key"
    if not path.exists():
        if (folder / "executions.jsonl").exists():
            raise UserError(
                f"{path}: the noise key of the steps begun is missing; without it they cannot be replayed. "
                "Remove the run directory to start again, and count what was spent (privacy.json)"
            )
        write_atomic(path, Randomness.from_system().key, mode=0o600)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise UserError(f"{path}: {len(key)} bytes, expected the {KEY_BYTES} of a noise key")
    return Randomness(key, secure=True)


def forget_key(folder: Path) -> None:
    """Removes the noise key of a finished training: whoever finds it could take the noise away."""
    write_atomic(folder / "finished", "")
    (folder / "key").unlink(missing_ok=True)


def digest(
    model: LatentDiffusion,
    latents: Latents,
    labels: Tensor,
    plan: PrivacyPlan,
    randomness: Randomness,
    captions: Sequence[str] | None = None,
) -> str:
    """A hash of all that a training begins from. Private: it tells whether a guess of the images is right."""
    hashed = hashlib.sha256(randomness.key)
    hashed.update(json.dumps([plan.to_dict(), captions], sort_keys=True).encode())
    hashed.update(models.digest(model).encode())
    for tensor in (latents.mean, latents.std, labels):
        hashed.update(str(tuple(tensor.shape)).encode())
        hashed.update(tensor.contiguous().numpy().data)
    return hashed.hexdigest()


def numerics(config: Config, device: torch.device, microbatch: int, inputs: str) -> dict[str, Any]:
    """All that can change how a step rounds or what it starts from, for the write-ahead record.

    CUDA adds up in no fixed order unless torch is told to, so there every start is one of its own.
    """
    packages = versions()
    repeatable = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    return {
        "inputs": inputs,
        "start": None if repeatable else secrets.token_hex(8),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"],
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "precision": config.train.precision,
        "microbatch": microbatch,
        "channels_last": config.train.channels_last,
        "compile": config.train.compile,
        "versions": {name: packages[name] for name in _ROUND},
    }


def check_engine(config: Config, model: LatentDiffusion, plan: PrivacyPlan) -> None:
    """Preflight on synthetic latents: stops the run unless the engine does here what the plan says.

    In float32, where errors of the engine stand out from those of rounding, and in the run's own precision.
    """
    examples, device = 4, next(model.unet.parameters()).device
    losses = tuning.synthetic_losses(model, examples, plan.noise_multiplicity, config.seed)
    preflight(model, losses, plan, examples)
    if config.train.precision == "bfloat16":

        def in_bfloat16(chosen: slice) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return losses(chosen)

        preflight(model, in_bfloat16, plan, examples, tolerance=_BFLOAT16_TOLERANCE)
