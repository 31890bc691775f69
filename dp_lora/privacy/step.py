"""The algorithm: one step of DP-SGD (Abadi et al. 2016) with noise multiplicity, as in the DP-LoRA paper.

    0. Record that the step begins, so that whatever happens it is accounted for.
    1. Sample the batch: each example joins by itself with probability q.
    2. Compute each example's gradient of its mean loss over k draws of timestep and noise.
    3. Clip each gradient to norm C and sum them. Record a digest of the sum.
    4. Add Gaussian noise of standard deviation sigma C to the sum, once.
    5. Divide by the expected batch size, a constant.
    6. Take a step of the optimiser with the result.
    7. Update the moving average of the weights.
    8. Account for every step begun.

`PrivateStep` takes them in this order: 0 and 1 when it begins, 2 and 3 in `add`, the rest in `apply`. The
numbers come from the plan, and nothing else passes one of them. Beneath them, `batches` samples (1),
`gradients` clips and sums (2, 3), `mechanism` adds noise and divides (4, 5), and `accounting` bounds
epsilon (8).

An execution is one time that a step was begun: a step that was interrupted has several, and each is
accounted for unless it repeats an earlier one to the bit. The lineage is the executions whose updates the
parameters hold.

Guarantee: the parameters after a step, and its `values`, are functions of the parameters before it and of
`noised_mean`'s result. Steps 2 and 3 alone see private data, and what they compute leaves through step 4.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dp_lora.errors import UserError
from dp_lora.privacy.batches import poisson_batch
from dp_lora.privacy.collectives import everyone
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
from dp_lora.privacy.moving_average import MovingAverage
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.refusals import check_optimizer, refuse_outside

_OF_THE_STEP = ("batch", "noise", "timesteps", "choices")
"""Streams that the step itself draws from."""


class Draws:
    """Random numbers for the examples of one microbatch.

    They belong to an example's position in the batch and come from the execution's key. So they do not
    depend on the size of the microbatches or the number of processes, and a step that is taken again after
    a crash has the same ones. A forward that draws its noise elsewhere computes another sum when it is
    repeated: the step is then begun anew, which costs one step of the plan.

    Args:
        randomness: of the execution.
        step: its number.
        first: position of the first example in the batch.
        rows: M, the number of examples, padding included.
    """

    def __init__(self, randomness: Randomness, step: int, first: int, rows: int) -> None:
        self._randomness, self._step, self._first, self._rows = randomness, step, first, rows

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers float32 [M, *shape] on the CPU; each `purpose` has its own.

        Raises ValueError for a purpose that the step itself draws for.
        """
        if purpose in _OF_THE_STEP:
            raise ValueError(f"purpose={purpose!r}: expected a name other than {', '.join(_OF_THE_STEP)}")
        return self._randomness.normal(purpose, self._step, (self._rows, *shape), self._first)

    def choices(self, counts: Tensor, noise_multiplicity: int) -> Tensor:
        """Choices int64 [M, k] on the CPU, each uniform in [0, counts[i]); see `Randomness.choices`."""
        return self._randomness.choices("choices", self._step, counts, noise_multiplicity, self._first)

    def timesteps(self, noise_multiplicity: int, num_train_timesteps: int, stratified: bool = True) -> Tensor:
        """Timesteps int64 [M, k] in [0, T) on the CPU; see `Randomness.timesteps`."""
        return self._randomness.timesteps(
            self._step, self._rows, noise_multiplicity, num_train_timesteps, stratified, self._first
        )


class Microbatch(NamedTuple):
    """The examples of one forward and backward.

    Fields:
        rows: int64 [M], indices of the examples in the data. The last microbatch of a batch is filled up
            with its first example.
        weights: float32 [M], 1 for an example and 0 for padding; a copy, which changes nothing.
        draws: random numbers for them.
    """

    rows: Tensor
    weights: Tensor
    draws: Draws


class PrivateStep:
    """One step, begun by `DPSGD.begin`: `add` the losses of each microbatch, then `apply`.

    Attributes:
        sgd: the state that it shares with the other steps.
        number: of the step, from 0.
        attempt: how often it was begun: more than once when `apply` returned False.
        applied: whether the optimiser has taken the step.
        spent: whether it cannot be taken any more, because the plan accounts for no further step.
        values: what may be logged of it, once applied: an upper bound on the epsilon of all steps begun, the
            norm of the noised update, an estimate of its signal-to-noise ratio and, with a `loss_share`, the
            private loss. All are functions of released values.
    """

    def __init__(self, sgd: DPSGD, number: int) -> None:
        self.sgd, self.number = sgd, number
        self.attempt, self.applied, self.spent = 0, False, False
        self.values: dict[str, float] = {}
        self._state = sgd.state_digest()
        # 0. Record that the step begins: it is replayed only if it and its sum are the same once more.
        self._begin(sgd.executions.begin(number, sgd.lineage))

    def _begin(self, execution: Execution) -> None:
        sgd = self.sgd
        self.attempt += 1
        sgd.tell_begun()
        self._execution, self._randomness = execution, sgd.randomness_of(execution, self._state)
        # 1. Sample the batch: every example joins by itself with probability q.
        self._batch = poisson_batch(self._randomness, self.number, sgd.num_examples, sgd.plan.sample_rate)
        sgd.gradients.reset()
        # The weights of the microbatch whose losses are still to come. Each is added once: twice, and an
        # example would count twice; not at all, and one example could take the others of its microbatch away.
        self._open: Tensor | None = None
        self._divided, self._left = False, len(sgd.positions(len(self._batch)))

    def microbatches(self, size: int) -> Iterator[Microbatch]:
        """The batch in microbatches of `size` examples; nothing for an empty batch, which is applied too.

        On several processes, this process's part of it.

        Raises RuntimeError when the batch was divided before: its examples would count twice.
        """
        if self._divided:
            raise RuntimeError(f"step {self.number}: microbatches() twice for one batch; expected it once")
        self._divided = True
        return self._parts(size)

    def _parts(self, size: int) -> Iterator[Microbatch]:
        attempt = self.attempt
        for positions, weights in microbatches(self.sgd.positions(len(self._batch)), size):
            if self.attempt != attempt:
                raise RuntimeError(
                    f"step {self.number}: microbatches() of an earlier batch; expected them anew"
                )
            self._refuse_left_out(self._open is not None)
            draws = Draws(self._randomness, self.number, int(positions[0]), len(positions))
            self._open = weights
            yield Microbatch(self._batch[positions], weights.clone(), draws)

    def _refuse_left_out(self, left_out: bool) -> None:
        if left_out:
            raise RuntimeError(
                f"step {self.number}: the losses of a microbatch were not added; what one example makes of "
                "its microbatch would change the sum by more than C. Expected add() for each: an example "
                "whose loss is not finite adds nothing, and 0 * loss leaves one out"
            )

    def add(self, losses: Tensor, weights: Tensor | None = None) -> None:
        """Adds the clipped gradients of the microbatch in hand to the sum of the batch, once.

        Args:
            losses: [M], one value for each example: the mean over its k draws.
            weights: [M], those of the `Microbatch`, which None stands for. An example is left out by
                0 * loss, which has to depend on that example alone.

        Raises:
            UserError: losses of another shape, weights other than the microbatch's, and as
                `ClippedGradientSum.add` says.
            RuntimeError: no microbatch is in hand, or its losses were added already.
        """
        self._refuse_ended("add()")
        if self._open is None:
            raise RuntimeError(
                f"step {self.number}: add() without a microbatch, or twice for one; expected it once in the "
                "loop over microbatches()"
            )
        own, examples = self._open, int(self._open.count_nonzero())
        if weights is not None and not torch.equal(weights.to(own), own):
            raise UserError(
                f"weights of shape {list(weights.shape)}: expected those of the microbatch, 1 for an example "
                "and 0 for padding; a weight that depends on an example belongs in its loss, before the clip"
            )
        self.sgd.refuse_others(losses, len(own), examples, self.number)
        self._open = None
        # 2. Per-example gradients of the mean over k draws. 3. Clip each to C, and sum.
        self.sgd.gradients.add(losses, own.to(losses.device))
        self._left -= examples

    def apply(self) -> bool:
        """Adds the noise and takes the step of the optimiser; returns whether it did.

        False when this step was begun before a crash, and its sum is now another one: the sum is thrown away
        and the step begins anew with a fresh batch, so that no two sums share their noise. The caller then
        adds the losses of the new batch and applies again, unless the step is `spent`.
        """
        self._refuse_ended("apply()")
        self._refuse_left_out(self._divided and self._left != 0)
        sgd, plan, number = self.sgd, self.sgd.plan, self.number
        sgd.refuse_changed()
        total = all_reduced(sgd.gradients.total(), sgd.group)
        sgd.gradients.reset()
        # The sum is on record before any noise is drawn for it.
        digest = _same_everywhere(self._randomness.keyed_digest("sum", sum_digest(total, plan)))
        lineage = sgd.executions.keep_sum(self._execution, digest)
        if lineage is None:
            self._begin_anew()
            return False
        # 4. and 5. Add Gaussian noise of std sigma C, once; divide by the expected batch size.
        released = noised_mean(total, plan, self._randomness, number)
        update = released[: sgd.gradients.num_parameters]
        # 6. Optimiser step on the released value.
        self._descend(update)
        # 7. Moving average of the weights, once per batch.
        sgd.average.update(number)
        # 8. Account for every execution begun.
        sgd.lineage, self.applied = lineage, True
        self.values = {
            "epsilon": sgd.epsilon(),
            "update_norm": float(torch.linalg.vector_norm(update, dtype=torch.float64)),
            "signal_to_noise": signal_to_noise(update, plan),
            **({"private_loss": private_loss(released, plan)} if plan.loss_share else {}),
        }
        return True

    def _give_up(self, **numerics: Any) -> None:
        """Throws the sum away and begins the step again with a fresh batch, because `numerics` changed.

        Nothing was released, so the step is not counted. Whoever gave up for a reason that depends on the
        examples would choose among batches: this is for a job that ran out of memory, whose microbatches
        have one size whatever the batch is. On several processes, every one has to call it.
        """
        self.sgd.gradients.reset()
        self._begin(self.sgd.executions.begin_again(self._execution, **numerics))

    def _refuse_ended(self, call: str) -> None:
        if self.applied or self.spent or not self.sgd.attached:
            what = "step" if self.applied or self.spent else "loop over the steps"
            raise RuntimeError(f"step {self.number}: {call} after the {what} has ended")
        self.sgd.refuse_forked()  # a step that was in hand at the fork would be released by both
        if self.sgd.current is not self:
            raise RuntimeError(f"step {self.number}: {call} after another step was begun; expected that one")

    def _begin_anew(self) -> None:
        try:
            execution = self.sgd.executions.begin_anew(self._execution)
        except Spent:
            self.spent = True
        else:
            self._begin(execution)

    def _descend(self, update: Tensor) -> None:
        sgd = self.sgd
        sgd.gradients.write_gradients(update)
        with sgd.descending():
            sgd.optimizer.step()
        sgd.optimizer.zero_grad(set_to_none=True)


class DPSGD:
    """The state that private steps share: the engine on the module, the optimiser and the record.

    Args:
        module: its trainable parameters are trained, all others stay as they are.
        optimizer: any torch optimiser over the trainable parameters; frozen ones of the module may be in it.
        plan: the numbers of the run.
        randomness: the run's key.
        executions: the write-ahead record.
        num_examples: N, the number of private examples.
        ema_decay: the largest decay of the moving average of the weights; 0 keeps none.
        begun: called with the number of steps begun and an upper bound on their epsilon, before the batch of
            a new one is drawn.
        foreign_losses: the loss is the caller's, so the first ones are looked at: one backward more.

    Raises UserError when the optimiser has other parameters, or as `ClippedGradientSum` does.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: PrivacyPlan,
        randomness: Randomness,
        executions: Executions,
        num_examples: int,
        *,
        ema_decay: float = 0.0,
        begun: Callable[[int, float], None] = lambda executions, epsilon: None,
        foreign_losses: bool = False,
    ) -> None:
        self.module, self.optimizer, self.plan, self.num_examples = module, optimizer, plan, num_examples
        self.planned = copy.deepcopy(plan)
        self.executions, self.lineage, self.begun, self._look = executions, ORIGIN, begun, 0
        self._randomness, self._told, self._descending = randomness, 0, False
        self.foreign_losses, self._looked_at = foreign_losses, 1
        check_optimizer(optimizer, module)
        self.gradients = ClippedGradientSum(module, plan.clip)
        self.parameters = list(self.gradients.parameters.values())
        self.average = MovingAverage(self.parameters, ema_decay)
        self.curve = plan.curve()
        self.group = dist.group.WORLD if dist.is_initialized() else None
        self.attached = True
        self.current: PrivateStep | None = None
        """The step in hand: the one begun last."""
        self._process = os.getpid()
        self._hook = optimizer.register_step_pre_hook(self._refuse_outside)

    def begin(self, number: int) -> PrivateStep:
        """Begins step `number`: it is on record, and its batch is drawn, when this returns.

        It takes the place of a step that was begun before, which cannot be added to or applied any more.

        Raises Spent when the plan accounts for no further step, and RuntimeError in a process that was forked
        from the one of the training: each would release sums of its own under one record.
        """
        self.refuse_forked()
        self.current = PrivateStep(self, number)
        return self.current

    def refuse_forked(self) -> None:
        """Raises RuntimeError in a process that was forked from the one of the training."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this training belongs to the process that made it; expected a training of its own, in a "
                "folder of its own, in a forked process"
            )

    def epsilon(self) -> float:
        """An upper bound on the epsilon of all steps begun so far."""
        return self.curve(self.executions.count)

    def refuse_edited(self) -> None:
        """Raises UserError when the plan is no longer that of the start."""
        if self.plan != self.planned:
            raise UserError("plan: was edited after the training began; expected make_plan() and a new one")

    def refuse_changed(self) -> None:
        """Raises UserError when plan, trainable parameters or the optimiser's are not those of the start."""
        self.refuse_edited()
        trained = {id(p) for p in self.module.parameters() if p.requires_grad}
        if trained != {id(p) for p in self.parameters}:
            raise UserError(
                "module: other parameters are trainable than when the training began; what was added would "
                "move without noise. Expected the same ones"
            )
        check_optimizer(self.optimizer, self.module)

    def refuse_others(self, losses: Tensor, rows: int, examples: int, number: int) -> None:
        """Raises UserError when `losses` depend on what is trained outside the module too.

        Looked for in the first microbatch of the first step and of each step whose number has doubled. Or, in
        a caller's own loss, when an example's depends on others: at twice the examples seen so far.
        """
        if number >= self._look:
            self._look = max(1, 2 * number)
            refuse_outside(losses, {id(p) for p in self.parameters})
        fit = self.foreign_losses and losses.requires_grad and losses.shape == (rows,)
        if fit and examples >= 2 * self._looked_at and self.gradients.refuse_mixed(losses):
            self._looked_at = examples

    def state_digest(self) -> str:
        """A hash of the parameters of all processes: all of the state that a sum depends on."""
        hashed = hashlib.sha256()
        for parameter in self.parameters:
            hashed.update(parameter.detach().cpu().contiguous().numpy().data)
        return hashlib.sha256("/".join(everyone(hashed.hexdigest())).encode()).hexdigest()

    def randomness_of(self, execution: Execution, state: str) -> Randomness:
        """The source of batch, draws and noise of one execution, and of no other.

        That of a seed, whose run has no privacy, is the same for every state and numerics.
        """
        if self._randomness.secure:
            return self._randomness.derive(f"execution {execution.name} from state {state}")
        generation = execution.generation
        return self._randomness.derive(f"generation {generation}") if generation else self._randomness

    def tell_begun(self) -> None:
        """Tells `begun` how many executions there are, when another one has begun."""
        if self._told != self.executions.count:
            self._told = self.executions.count
            self.begun(self._told, self.epsilon())

    def positions(self, size: int) -> Tensor:
        """The positions in a batch of `size` examples that this process sums."""
        if self.group is None:
            return torch.arange(size)
        return slice_of_batch(torch.arange(size), dist.get_rank(), dist.get_world_size())

    @contextmanager
    def descending(self) -> Iterator[None]:
        """Lets the optimiser step, which it may do nowhere else."""
        self._descending = True
        try:
            yield
        finally:
            self._descending = False

    def _refuse_outside(self, *_: Any) -> None:
        if not self._descending:
            raise RuntimeError(
                "optimizer.step() outside PrivateStep.apply(): the gradients there are not private; expected "
                "apply() alone, without a GradScaler, accelerator.backward() or a step of your own"
            )

    def detach(self) -> None:
        """Takes the engine off the module and the optimiser."""
        self.attached = False
        self.gradients.detach()
        self._hook.remove()

    def release(self) -> None:
        """Takes the engine off, and puts the moving average in place of the trained parameters."""
        self.detach()
        self.average.copy_to(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on but the key; every part is a function of released values."""
        return {
            "parameters": [p.detach().cpu() for p in self.parameters],
            "average": [p.cpu() for p in self.average.values],
            "optimizer": self.optimizer.state_dict(),
            "optimizer_kind": type(self.optimizer).__qualname__,
            "lineage": self.lineage,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`. Raises UserError for that of other parameters or another optimiser."""
        saved = [*state["parameters"], *state["average"]]
        own = [*self.parameters, *self.average.values]
        if [p.shape for p in saved] != [p.shape for p in own]:
            raise UserError("checkpoint: its parameters have other shapes than this configuration's")
        kind = type(self.optimizer).__qualname__
        if (before := state.get("optimizer_kind", kind)) != kind:
            raise UserError(f"optimizer={kind}: this training began with {before}; expected that one")
        for parameter, value in zip(own, saved, strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lineage = str(state.get("lineage"))  # `check_lineage` knows no such one as None


def _same_everywhere(digest: str) -> str:
    """The `digest` that all processes have. Raises RuntimeError, on all of them, when they differ."""
    if len(set(everyone(digest))) > 1:
        raise RuntimeError("the processes of this job hold different sums of one batch: nothing was released")
    return digest
