"""Private fine-tuning: DP-SGD on the chosen parameters of a pre-trained latent diffusion model.

Guarantee: what leaves this module (the adapter, and for each step the update's norm, its
signal-to-noise and epsilon) is a function of the public model, the public configuration and the noised
sums of `privacy.mechanism.noised_mean`, so epsilon of the plan covers it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dp_lora.config.schema import Config, TrainConfig
from dp_lora.models.diffusion import per_example_loss
from dp_lora.models.folders import LatentDiffusion
from dp_lora.models.latents import Latents
from dp_lora.models.networks import keep_less
from dp_lora.privacy.collectives import agreed, largest, rank, size
from dp_lora.privacy.executions import Executions, Spent
from dp_lora.privacy.persons import Persons
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.preflight import preflight
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.scouting import AfterScouting, Kept, Scout
from dp_lora.privacy.step import DPSGD, Draws, PrivateStep
from dp_lora.records.progress import Progress
from dp_lora.training import tuning
from dp_lora.training.divergence import Watch
from dp_lora.training.inputs import digest
from dp_lora.training.loop import learning_rate, run_steps
from dp_lora.training.numerics import numerics
from dp_lora.training.objective import Objective
from dp_lora.training.private_training import PrivateTraining
from dp_lora.training.scouting import Choice, Phases, Scouting
from dp_lora.training.steps_left import spent

_BFLOAT16_TOLERANCE = 0.1
"""Relative error of a gradient in bfloat16, whose numbers have eight bits."""


class FinetuneStep:
    """A private step on latents: the losses of the latent diffusion model, then `PrivateStep.apply`.

    Args:
        sgd: the engine on the model.
        latents: of the private images, on the CPU.
        labels: int64 [N].
        train: learning rate, schedule and the like; nothing that touches privacy.
        microbatch: examples per forward and backward, halved when memory runs out.
        halved: called with the new microbatch after that.
        persons: whose each image is, where an example is a person; None: an example is an image.
        first: the number of the first step that trains; the schedule of the learning rate begins with it.
    """

    def __init__(
        self,
        sgd: DPSGD,
        latents: Latents,
        labels: Tensor,
        train: TrainConfig,
        microbatch: int,
        halved: Callable[[int], None] = lambda microbatch: None,
        persons: Persons | None = None,
        first: int = 0,
    ) -> None:
        self.sgd, self.latents, self.labels, self.train = sgd, latents, labels, train
        self.microbatch, self.halved, self.persons, self.first = microbatch, halved, persons, first

    @classmethod
    def on(
        cls,
        model: nn.Module,
        latents: Latents,
        labels: Tensor,
        plan: PrivacyPlan,
        randomness: Randomness,
        train: TrainConfig,
        microbatch: int,
        executions: Executions,
        learning_rate_factor: float = 1.0,
        persons: Persons | None = None,
    ) -> Self:
        """The step on a fresh engine, as an audit takes it: with any key and any record.

        Args:
            model: its trainable parameters chosen, on its device.
            latents, labels, train, microbatch, persons: as of the class.
            plan: the numbers of the run.
            randomness: a key.
            executions: the write-ahead record.
            learning_rate_factor: over `train.learning_rate`, of all parameters but the class embedding.
        """
        optimizer = optimizer_of(model, train, learning_rate_factor)
        examples, decay = len(labels if persons is None else persons), train.ema_decay
        sgd = DPSGD(model, optimizer, plan, randomness, executions, examples, ema_decay=decay)
        return cls(sgd, latents, labels, train, microbatch, persons=persons)

    def __call__(self, number: int) -> dict[str, float]:
        step = self.sgd.begin(number)
        while not step.applied:
            if largest(not self._added(step)):
                self._in_smaller_microbatches(step)
                continue
            rate = self._set_rates(number)
            step.apply()
            if step.spent:
                raise Spent(f"step {number} has another sum than before, and every step was begun")
        return {**step.values, "learning_rate": rate}

    def _added(self, step: PrivateStep) -> bool:
        """Adds this process's part of the batch; False when its memory ran out."""
        try:
            for rows, weights, draws in step.microbatches(self.microbatch):
                step.add(self.losses(rows, draws), weights)
        except torch.OutOfMemoryError:
            return False
        return True

    def _in_smaller_microbatches(self, step: PrivateStep) -> None:
        if self.microbatch == 1:
            raise tuning.too_large()
        tuning.free_memory()
        self.microbatch //= 2
        self.halved(self.microbatch)
        step._give_up(microbatch=self.microbatch)

    @functools.cached_property
    def objective(self) -> Objective:
        """The timesteps and the noise that are drawn, and the weights."""
        return Objective(cast(LatentDiffusion, self.sgd.module), self.train)

    def losses(self, rows: Tensor, draws: Draws) -> Tensor:
        """Losses [M] of the examples `rows`, each the mean over its k draws of timestep and noise.

        An example is an image; or a person, of whose images each draw has one.
        """
        k, train = self.sgd.plan.noise_multiplicity, self.train
        model = cast(LatentDiffusion, self.sgd.module)
        device = self.sgd.parameters[0].device
        images, shape = rows, model.latent_shape
        if self.persons is None:
            latents = self.latents.sample(images, draws.normal("posterior", *shape))
        else:
            images = self.persons.draw(rows, draws, k)
            noise = draws.normal("posterior", k, *shape).flatten(0, 1)
            latents = self.latents.sample(images.flatten(), noise).view(-1, k, *shape)
        timesteps, noise = self.objective.timesteps(draws, k), self.objective.noise(draws, k)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
            return per_example_loss(
                model,
                latents.to(device),
                self.labels[images].to(device),
                timesteps.to(device),
                noise.to(device),
                self.objective.weights,
            )

    def _set_rates(self, number: int) -> float:
        """Sets the learning rates of step `number` and returns the one that the factors multiply."""
        train, done, total = self.train, number - self.first, self.sgd.plan.steps - self.first
        rate = 0.0
        if done >= 0:
            rate = learning_rate(train.learning_rate, train.schedule, done, total, train.warmup_steps)
        for group in self.sgd.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        return rate

    def release(self) -> None:
        """Ends the training: the moving average takes the place of the trained parameters."""
        self.sgd.release()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on but the key."""
        return self.sgd.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`. Raises UserError when it belongs to other parameters."""
        self.sgd.load_state_dict(state)


def optimizer_of(
    model: nn.Module, train: TrainConfig, learning_rate_factor: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, each with the factor of its learning rate.

    Args:
        model: its trainable parameters chosen.
        train: learning rate, weight decay and the class embedding's factor.
        learning_rate_factor: over `train.learning_rate`, of all parameters but the class embedding.
    """

    def factor(name: str) -> float:
        embedder = name.startswith("class_embedder")
        return train.embedder_learning_rate_factor if embedder else learning_rate_factor

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p], "factor": factor(name)} for name, p in trained]
    return torch.optim.AdamW(groups, lr=train.learning_rate, weight_decay=train.weight_decay)


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
    persons: Persons | None = None,
    chosen: Callable[[Choice], None] = lambda choice: None,
) -> int:
    """Trains the chosen parameters of `model` in place and returns the number of executed steps.

    Args:
        config: the job.
        model: its trainable parameters chosen, on the device to train on. A family's autoencoder and text
            encoders lose their weights, see `LatentDiffusion.release_encoders`.
        latents, labels: of the private images.
        plan: the numbers of the run.
        folder: the run's private `checkpoint/`; an earlier start of the run is continued from it.
        log: called with the number of finished steps and what may be logged.
        started: called with the number of finished steps before the first new one.
        captions: of the private images, which then take the place of the labels as conditions of a model
            with a text encoder. It knows its classes again when the training ends.
        begun: called with the number of executions begun and an upper bound on their epsilon, before the
            batch of a new one is drawn: what has to be said of a run that ends at any later moment.
        persons: whose each image is, where the plan's examples are persons.
        chosen: called with the matrices that trainable.choice=salient has chosen; `model`, in which all
            candidates have adapters, keeps those of the chosen ones.

    Every execution begun counts towards the plan's steps: where redone steps could not be replayed, as many
    fewer follow, so epsilon never passes the plan's. On several processes of one job the first writes
    `folder` and the others read it.
    """
    first = rank() == 0
    watch = _watch(config, model, plan)
    assert (persons is not None) == (plan.unit == "person"), "the plan's examples are those of the sampler"
    begun = begun if first else _silent
    private = _Finetuning(config, model, latents, labels, plan, folder, captions, begun, persons, chosen)
    try:
        conditions = labels if captions is None else torch.arange(len(captions))
        step = FinetuneStep(
            private.sgd, latents, conditions, config.train, private.microbatch, private.keep, persons,
            first=private._scouted,
        )  # fmt: skip
        if first:
            started(private.finished)

        def watched(number: int, values: dict[str, float]) -> None:
            (log if first else _silent)(number, values)
            watch.after(number, private.total, values["epsilon"])

        mode, public = config.tracking.progress, config.data.public
        with Progress(
            private.total, "finetune", initial=private.finished, mode=mode, public=public
        ) as progress:
            try:
                phases = Phases(step, private._scouted, private.after_choice)
                run_steps(phases, private.total, private.checkpoint, progress, watched)
            except Spent:
                # A step that was to be replayed has another sum, and there is no execution left for it.
                private.end_early(progress.done)
        private.finish()
        if captions is not None and model.prompts is not None:
            model.prompts.use_classes(model.classes)
    finally:
        private.close()
    watch.at_the_end(model, private.epsilon())
    return private.sgd.executions.count


class _Finetuning(PrivateTraining):
    """The private training of a job, new or as an earlier start left it; the engine is on the model.

    Nothing private has been computed on when it is constructed, and the engine has passed its preflight.

    Args: as of `finetune`.

    Attributes:
        microbatch: examples per forward and backward.
    """

    _foreign_losses = False

    def __init__(
        self,
        config: Config,
        model: LatentDiffusion,
        latents: Latents,
        labels: Tensor,
        plan: PrivacyPlan,
        folder: Path,
        captions: Sequence[str] | None,
        begun: Callable[[int, float], None],
        persons: Persons | None = None,
        chosen: Callable[[Choice], None] = lambda choice: None,
    ) -> None:
        self._config, self._model, self._images = config, model, (latents, labels, captions)
        self._persons = persons
        self._scouting: Scouting | None = None
        if config.trainable.choice == "salient":
            self._scouting = Scouting(config, model, chosen)
            self._scouted = self._scouting.steps
        self.microbatch = 1
        super().__init__(
            model,
            self._optimizer(),
            plan,
            folder,
            synthetic_losses=None,
            num_examples=len(labels if persons is None else persons),
            ema_decay=config.train.ema_decay,
            insecure_seed=config.privacy.insecure_seed,
            checkpoint_minutes=config.train.checkpoint_minutes,
            begun=begun,
        )
        if self._scouted and self.total <= self._scouted:
            self.close()
            raise spent(self.sgd.executions, self.finished, plan)

    def _prepared(self, randomness: Randomness) -> Mapping[str, Any]:
        config, model, plan = self._config, self._model, self.plan
        latents, labels, captions = self._images
        inputs = digest(model, latents, labels, plan, randomness, captions, self._persons)
        if config.train.gradient_checkpointing:
            # Before the engine is checked and the microbatch is chosen: both run with it.
            keep_less(model.unet)
        if captions is not None and model.prompts is not None:
            model.prompts.prepare(captions)
        model.release_encoders()
        check_engine(config, model, plan)
        self.microbatch = agreed(_microbatch(config, model, plan, self.folder))
        tuning.arrange(model, plan, config.train, self.microbatch)
        scouting = {}
        if self._scouting is not None:
            # After what is for all that any choice trains: a part that is frozen now may be trained later.
            self.optimizer = self._scouting.open()
            check_engine(config, model, plan)
            scouting = {"scouting": asdict(config.trainable)}
        if captions is not None and model.prompts is not None:
            # After everything that tries the engine on synthetic examples, which never meet a caption.
            model.prompts.use(captions)
        self.keep(self.microbatch)
        return agreed({**numerics(config, self._device, self.microbatch, inputs), **scouting})

    def _optimizer(self) -> torch.optim.Optimizer:
        return optimizer_of(self._model, self._config.train, self._config.trainable.learning_rate_factor)

    def _engine(self, kind: type[DPSGD] = DPSGD, **more: Any) -> DPSGD:
        scouts = kind is DPSGD and self._scouting is not None
        return super()._engine(Scout if scouts else kind, **more)

    def _resumed(self) -> int:
        found = self.checkpoint.load()
        if found is not None and self._scouting is not None:
            kept = Kept.of(found[1]["scouted"])
            if kept.chosen is not None:
                self.after_choice(kept)
        return super()._resumed()

    def after_choice(self, kept: Kept | None = None) -> DPSGD:
        """The engine of the steps that train the chosen matrices, in place of the scout.

        kept: the scouting of a checkpoint, with its choice; None: the one that has just ended.
        """
        assert isinstance(self.sgd, Scout) and self._scouting is not None
        lineage = self.sgd.lineage
        kept = self._scouting.narrow(self.sgd, self.sgd.kept if kept is None else kept)
        self.optimizer = self._optimizer()
        self.sgd = self._engine(AfterScouting, kept=kept, lineage=lineage)
        return self.sgd

    def keep(self, microbatch: int) -> None:
        """Notes the microbatch in the private folder, so that a resumed run rounds alike."""
        if rank() == 0:
            tuning.keep_microbatch(microbatch, self._device, self.folder)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.unet.parameters()).device
        return device


def _microbatch(config: Config, model: LatentDiffusion, plan: PrivacyPlan, folder: Path) -> int:
    cache = Path(config.paths.cache).expanduser()
    return tuning.choose_microbatch(model, plan, config.train, size(), folder, cache)


def _watch(config: Config, model: LatentDiffusion, plan: PrivacyPlan) -> Watch:
    """The watch that ends a training that diverges, and says what it has spent."""
    spends = plan.private and not config.data.public
    spent = f"epsilon {{}} at delta {plan.delta:g} is spent" if spends else ""
    trained = [p for p in model.parameters() if p.requires_grad]
    return Watch(trained, config, plan.noise_multiplier, spent)


def _silent(number: int, values: Any) -> None:
    """Does nothing: only the first process logs."""


def check_engine(config: Config, model: LatentDiffusion, plan: PrivacyPlan) -> None:
    """Preflight on synthetic latents: stops the run unless the engine does here what the plan says.

    In float32, where errors of the engine stand out from those of rounding, and in the run's own precision.
    """
    examples, device = 4, next(model.unet.parameters()).device
    apart = plan.unit == "person"
    losses = tuning.synthetic_losses(model, examples, plan.noise_multiplicity, config.seed, apart=apart)
    low = model.source is not None and model.source.computes_low(device)
    preflight(model, losses, plan, examples, **({"tolerance": _BFLOAT16_TOLERANCE} if low else {}))
    if config.train.precision == "bfloat16":

        def in_bfloat16(chosen: slice) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return losses(chosen)

        preflight(model, in_bfloat16, plan, examples, tolerance=_BFLOAT16_TOLERANCE)
