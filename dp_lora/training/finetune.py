"""Private fine-tuning: DP-SGD on the chosen parameters of a pre-trained latent diffusion model.

Guarantee: what leaves this module (the adapter, and for each step the update's norm, its
signal-to-noise and epsilon) is a function of the public model, the public configuration and the noised
sums of `privacy.mechanism.noised_mean`, so epsilon of the plan covers it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dp_lora.config.schema import Config, TrainConfig
from dp_lora.errors import UserError
from dp_lora.models.diffusion import per_example_loss
from dp_lora.models.folders import LatentDiffusion
from dp_lora.models.latents import Latents
from dp_lora.privacy.accounting import EpsilonCurve
from dp_lora.privacy.batches import poisson_batch
from dp_lora.privacy.executions import ORIGIN, Execution, Executions, Spent
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.mechanism import (
    all_reduced,
    microbatches,
    noised_mean,
    private_loss,
    signal_to_noise,
    slice_of_batch,
    sum_digest,
)
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.preflight import preflight
from dp_lora.privacy.randomness import KEY_BYTES, Randomness
from dp_lora.records.progress import Progress
from dp_lora.storage.files import private_directory, write_atomic, write_json
from dp_lora.training import tuning
from dp_lora.training.divergence import Watch
from dp_lora.training.loop import Checkpoint, average_decay, learning_rate, resume, run_steps
from dp_lora.training.numerics import digest, numerics
from dp_lora.training.processes import agreed, everyone, largest
from dp_lora.training.receipts import PLAN, check_begun, check_lineage, check_same_plan

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
        begun: called with the number of executions begun and their epsilon, before the batch of a new one.
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
        begun: Callable[[int, float], None] = lambda executions, epsilon: None,
    ) -> None:
        self.model, self.latents, self.labels, self.plan = model, latents, labels, plan
        self.randomness, self.train, self.microbatch = randomness, train, microbatch
        self.executions, self.lineage, self.halved = executions, ORIGIN, halved
        self.learning_rate_factor, self.begun, self._told = learning_rate_factor, begun, 0
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
        # 0. Record that the step begins, and its sum: both are replayed only if they are the same once more.
        # 1. to 3. Sample the batch; per-example gradients of the mean over k draws; clip each to C and sum.
        total, randomness, lineage = self._recorded_sum(step)
        # 4. and 5. Add Gaussian noise of std sigma C, once; divide by the expected batch size.
        released = noised_mean(total, plan, randomness, step)
        update = released[:size]
        # 6. Optimiser step on the released value.
        self._descend(update, step)
        # 7. Moving average of the weights, once per batch.
        self._average(step)
        # 8. Account for every execution begun.
        self.lineage = lineage
        return {
            "epsilon": self.epsilon(),
            "update_norm": float(torch.linalg.vector_norm(update, dtype=torch.float64)),
            "signal_to_noise": signal_to_noise(update, plan),
            "learning_rate": self._rate(step),
            **({"private_loss": private_loss(released, plan)} if plan.loss_share else {}),
        }

    def _recorded_sum(self, step: int) -> tuple[Tensor, Randomness, str]:
        """The clipped sum of the whole batch, on record before any noise is drawn for it.

        With the randomness of this execution of the step, and the lineage of the state after it. A sum that
        is not the one that the execution had before is thrown away, with its batch.

        Raises Spent when the plan accounts for no further execution.
        """
        state = self._state()
        execution = self.executions.begin(step, self.lineage)
        while True:
            self._tell_begun()
            randomness = self._randomness(execution, state)
            part = self._clipped_sum(step, randomness)
            if part is None:
                execution = self._in_smaller_microbatches(execution)
                continue
            total = all_reduced(part, self.group)
            digest = _same_everywhere(randomness.keyed_digest("sum", sum_digest(total, self.plan)))
            lineage = self.executions.keep_sum(execution, digest)
            if lineage is not None:
                return total, randomness, lineage
            execution = self.executions.begin_anew(execution)

    def _state(self) -> str:
        """A hash of the parameters of all processes: all of the state that a sum depends on."""
        hashed = hashlib.sha256()
        for parameter in self.parameters:
            hashed.update(parameter.detach().cpu().contiguous().numpy().data)
        return hashlib.sha256("/".join(everyone(hashed.hexdigest())).encode()).hexdigest()

    def _randomness(self, execution: Execution, state: str) -> Randomness:
        """What batch, draws and noise of one execution come from, and of no other.

        That of a seed, whose run has no privacy, is the same for every state and numerics.
        """
        if self.randomness.secure:
            return self.randomness.derive(f"execution {execution.name} from state {state}")
        generation = execution.generation
        return self.randomness.derive(f"generation {generation}") if generation else self.randomness

    def _tell_begun(self) -> None:
        """Tells `begun` how many executions there are, when another one has begun."""
        if self._told != self.executions.count:
            self._told = self.executions.count
            self.begun(self._told, self.epsilon())

    def _clipped_sum(self, step: int, randomness: Randomness) -> Tensor | None:
        """The clipped sum of this process's part of the batch; None when memory ran out on any process."""
        # Every image joins by itself with probability q.
        batch = poisson_batch(randomness, step, len(self.labels), self.plan.sample_rate)
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

    def _in_smaller_microbatches(self, execution: Execution) -> Execution:
        """Halves the microbatch and begins the step again, of which nothing has been released."""
        if self.microbatch == 1:
            raise tuning.too_large()
        tuning.free_memory()
        self.microbatch //= 2
        self.halved(self.microbatch)
        return self.executions.begin_again(execution, microbatch=self.microbatch)

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
        decay = average_decay(self.train.ema_decay, step)
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
        self.lineage = str(state.get("lineage"))  # `check_lineage` knows no such one as None


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
    begun: Callable[[int, float], None] = lambda executions, epsilon: None,
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
        begun: called with the number of executions begun and an upper bound on their epsilon, before the
            batch of a new one is drawn: what has to be said of a run that ends at any later moment.

    Every execution begun counts towards the plan's steps: where redone steps could not be replayed, as many
    fewer follow, so epsilon never passes the plan's. On several processes of one job the first writes
    `folder` and the others read it.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    device = next(model.unet.parameters()).device
    randomness, microbatch, executions = _opened(config, model, latents, labels, plan, folder, captions)

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
        model, latents, labels, plan, randomness, config.train, microbatch, executions, halved=keep,
        learning_rate_factor=config.trainable.learning_rate_factor, begun=begun if first else _silent,
    )  # fmt: skip
    watch = _watch(config, step)
    checkpoint = Checkpoint(folder, config.train.checkpoint_minutes, writes=first)
    finished = resume(step, checkpoint)
    check_lineage(executions, finished, step.lineage, folder)
    total = steps_to_finish(plan, executions, finished, step.lineage)
    if first:
        started(finished)

    def watched(number: int, values: dict[str, float]) -> None:
        (log if first else _silent)(number, values)
        watch.after(number, total, values["epsilon"])

    with Progress(
        total, "finetune", initial=finished, mode=config.tracking.progress, public=config.data.public
    ) as progress:
        try:
            run_steps(step, total, checkpoint, progress, watched)
        except Spent:
            # A step that was to be replayed has another sum, and there is no execution left for it.
            if not progress.done:
                raise _spent(executions, 0, plan) from None
            checkpoint.save(progress.done, step.state_dict())
    step.release()
    if captions is not None and model.prompts is not None:
        model.prompts.use_classes(model.classes)
    if first:
        forget_key(folder)
    watch.at_the_end(model, step.epsilon())
    return executions.count


def _opened(
    config: Config,
    model: LatentDiffusion,
    latents: Latents,
    labels: Tensor,
    plan: PrivacyPlan,
    folder: Path,
    captions: Sequence[str] | None,
) -> tuple[Randomness, int, Executions]:
    """The key, the microbatch and the write-ahead record of a run, new or as an earlier start left them.

    Nothing private has been computed on when it returns, and the engine has passed its preflight.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        private_directory(folder)
        _same_plan(plan, folder)
        check_begun(folder)
        run_key(config, folder)
    if dist.is_initialized():
        dist.barrier()
    randomness = run_key(config, folder)
    inputs = digest(model, latents, labels, plan, randomness, captions)
    check_engine(config, model, plan)
    microbatch = agreed(_microbatch(config, model, plan, folder))
    tuning.arrange(model, plan, config.train, microbatch)
    same = agreed(numerics(config, next(model.unet.parameters()).device, microbatch, inputs))
    executions = Executions(folder / "executions.jsonl", same, plan.steps, writes=first)
    if dist.is_initialized():
        dist.barrier()  # before the first process writes to it
    return randomness, microbatch, executions


def _microbatch(config: Config, model: LatentDiffusion, plan: PrivacyPlan, folder: Path) -> int:
    processes = dist.get_world_size() if dist.is_initialized() else 1
    cache = Path(config.paths.cache).expanduser()
    return tuning.choose_microbatch(model, plan, config.train, processes, folder, cache)


def _watch(config: Config, step: PrivateStep) -> Watch:
    """What ends a training that diverges, and says what it has spent."""
    spends = step.plan.private and not config.data.public
    spent = f"epsilon {{}} at delta {step.plan.delta:g} is spent" if spends else ""
    return Watch(step.parameters, config, step.plan.noise_multiplier, spent)


def _silent(number: int, values: Any) -> None:
    """What the other processes log."""


def _same_everywhere(digest: str) -> str:
    """The `digest` that all processes have. Raises RuntimeError, on all of them, when they differ."""
    if len(set(everyone(digest))) > 1:
        raise RuntimeError("the processes of this job hold different sums of one batch: nothing was released")
    return digest


def steps_to_finish(plan: PrivacyPlan, executions: Executions, finished: int, lineage: str) -> int:
    """Number of steps after which the run ends: its executions, begun and to come, are the plan's steps.

    It ends earlier when a step begun before turns out to have another sum: see `Executions`.

    Args:
        plan: of the run.
        executions: all that were begun.
        finished: number of steps behind the checkpoint.
        lineage: of the checkpoint's state.

    Raises UserError when all were begun and there is no checkpoint to go on from.
    """
    total = finished + executions.replayable(finished, lineage) + plan.steps - executions.count
    if total < max(1, finished):
        raise _spent(executions, finished, plan)
    return total


def _spent(executions: Executions, finished: int, plan: PrivacyPlan) -> UserError:
    return UserError(
        f"checkpoint: {executions.count} steps of {plan.steps} were begun and none can be replayed from "
        f"the {finished} that were kept; the privacy of this run is spent. Remove the run directory to "
        "start again, and count what was spent"
    )


def _same_plan(plan: PrivacyPlan, folder: Path) -> None:
    """Keeps the plan of the run's first start. Raises UserError when the run goes on under another one."""
    check_same_plan(plan, folder)
    if not (folder / PLAN).exists():
        # Whether the images have a record beside it, so that its removal is found (`outputs.check_records`).
        recorded = (folder / "content.json").exists()
        write_json(folder / PLAN, plan.to_dict() | {"content": recorded}, mode=0o600)


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
