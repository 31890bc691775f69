"""Private training of any torch module in a loop of the caller's own: what `dp_lora.PrivateTraining` is.

The folder of a training holds its key, its plan, the record of every step begun and the last checkpoint.
It is private: whoever reads the key can take the noise away.
"""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dp_lora.errors import UserError
from dp_lora.privacy.collectives import agreed, barrier, everyone, rank, size
from dp_lora.privacy.executions import Executions, Spent
from dp_lora.privacy.layers import refuse_sharded
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.preflight import preflight
from dp_lora.privacy.randomness import KEY_BYTES, Randomness
from dp_lora.privacy.refusals import check_optimizer, refuse_steered
from dp_lora.privacy.step import DPSGD, PrivateStep
from dp_lora.storage.files import private_directory, read_json, write_atomic, write_json
from dp_lora.storage.tensors import digest
from dp_lora.training.loop import Checkpoint, plain
from dp_lora.training.numerics import process, start
from dp_lora.training.receipts import PLAN, check_begun, check_lineage, check_same_plan
from dp_lora.training.statement import Statement
from dp_lora.training.steps_left import spent, steps_to_finish

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")


class HasState(Protocol):
    """An object with a state, such as a scheduler of the learning rate."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Restores what `state_dict` returned."""
        ...


class PrivateTraining:
    """DP-SGD on the trainable parameters of a module, with a loop that the caller writes.

        for step in private.steps():
            for rows, weights, draws in step.microbatches(8):
                step.add(losses(rows, draws), weights)
            step.apply()

    Guarantees:
        * What the parameters become is (epsilon, delta)-differentially private as the plan says, with respect
          to one of the N examples, if the caller's loss of an example is a function of that example, the
          module and numbers drawn apart from the data. A loss that uses other rows of the batch, as mixup or
          a mean over the batch do, has no guarantee. The preflight finds it where `synthetic_losses` is the
          same function, and the first microbatch where the gradient reaches other examples. Nothing else
          may train or release from private data.
        * Every step is on disk before its batch is drawn. A training that is interrupted at any moment and
          constructed again with the same folder continues from its last checkpoint; steps that it cannot
          repeat to the bit count anew, and as many fewer follow, so epsilon never passes the plan's.
        * Noise is used for one sum only, in every run, copy and process.

    On several processes of torch.distributed, every process constructs the same with the same arguments and
    a folder that all of them see. Each computes its part of a batch; do not wrap the module.

    Args:
        module: with `requires_grad` set on what is trained. Its layers have to be those that
            `ClippedGradientSum` knows. Two trainings of one module at a time are refused.
        optimizer: any torch optimiser over the trainable parameters. It is stepped by `apply` alone.
        plan: from `make_plan`.
        folder: of this training, on a local or shared disk; made with mode 0700.
        synthetic_losses: the losses [n] of a slice of four or more synthetic examples, which the preflight
            compares with a loop over single ones: a forward of `module` on n k rows, and draws that do
            not depend on the slice. None leaves the preflight out, and the statement says so.
        num_examples: N, where the plan keeps it private (add_or_remove); else the plan's.
        ema_decay: the largest decay of the moving average of the weights, which takes the place of the
            parameters at the end; 0 keeps the last parameters.
        insecure_seed: makes batches and noise reproducible, for tests; there is no privacy then.
        checkpoint_minutes: time between two checkpoints.
        also: objects whose state belongs to a checkpoint, such as `{"schedule": scheduler}`. Their state must
            not depend on private data other than through the parameters.
        begun: called with the number of steps begun and an upper bound on their epsilon, before the batch
            of a new one is drawn.
        tolerance: relative error of a gradient that the preflight accepts; 0.1 for autocast to bfloat16.

    Raises:
        PlanError: `plan` is not as `make_plan` made it.
        UserError: the folder is open elsewhere, a wrapped module, an optimiser over other parameters, a layer
            without per-example gradients or with batch statistics, a folder of another plan or without its
            plan, key or record, or a plan whose steps were all begun without a checkpoint to go on from.
        PreflightError: the gradients of the synthetic examples are not what they should be.
    """

    _foreign_losses = True
    """The loss is written by the caller: what mixes examples in it is looked for in the first microbatch."""
    _scouted = 0  # the number of the first steps that train nothing: see `privacy.scouting`

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: PrivacyPlan,
        folder: str | Path,
        *,
        synthetic_losses: Callable[[slice], Tensor] | None,
        num_examples: int | None = None,
        ema_decay: float = 0.0,
        insecure_seed: int | None = None,
        checkpoint_minutes: float = 10.0,
        also: Mapping[str, HasState] | None = None,
        begun: Callable[[int, float], None] = lambda executions, epsilon: None,
        tolerance: float = 1e-4,
    ) -> None:
        _refuse_wrapped(module)
        check_optimizer(optimizer, module)
        refuse_steered(also or {})
        plan.check()
        examples = _number_of_examples(plan, num_examples)
        self.module, self.optimizer, self.plan = module, optimizer, plan
        self.folder, self._also, self._first = Path(folder), dict(also or {}), rank() == 0
        self._synthetic_losses, self._tolerance = synthetic_losses, tolerance
        self._step: PrivateStep | None = None
        self._looping = self._ended = False
        self._frozen: dict[str, str] = {}
        self._unlock = _locked(self, self.folder) if self._first else None
        try:
            randomness = open_folder(plan, self.folder, insecure_seed)
            self._seeded = not randomness.secure
            known = self._prepared(randomness)
            executions = Executions(self.folder / "executions.jsonl", known, plan.steps, writes=self._first)
            barrier()  # before the first process writes to it
            self._given: dict[str, Any] = {
                "plan": plan, "randomness": randomness, "executions": executions, "num_examples": examples,
                "ema_decay": ema_decay, "begun": begun, "foreign_losses": self._foreign_losses,
            }  # fmt: skip
            self.sgd = self._engine()
            self.checkpoint = Checkpoint(self.folder, checkpoint_minutes, writes=self._first)
            self.finished = self._resumed()
            left = steps_to_finish(plan, executions, self.finished, self.sgd.lineage)
            self.total = self.finished if self.complete else left
        except BaseException:
            self.close()
            raise

    def _prepared(self, randomness: Randomness) -> Mapping[str, Any]:
        """Tries the engine; returns all that is known to change how a step rounds or what it starts from.

        Nothing is begun yet. A job, which knows more of its model, has its own.
        """
        self._frozen = _frozen_digests(self.module)
        if self._synthetic_losses is not None:
            preflight(self.module, self._synthetic_losses, self.plan, tolerance=self._tolerance)
            if changed := self._changed():
                raise UserError(
                    f"module: {changed[0]} changed in the preflight, though it is not trained: what changes "
                    "with a forward may remember private examples, without any noise; expected a module "
                    "whose forward changes nothing"
                )
        return _known(self.module, self.optimizer, self._frozen, randomness)

    def _engine(self, kind: type[DPSGD] = DPSGD, **more: Any) -> DPSGD:
        return kind(self.module, self.optimizer, **self._given, **more)

    def _resumed(self) -> int:
        found = self.checkpoint.load()
        finished = 0
        if found is not None:
            finished, state = found
            self.sgd.load_state_dict(state)
            if forgotten := sorted(state.get("also", {}).keys() - self._also.keys()):
                raise UserError(
                    f"also: lacks {forgotten[0]!r}, whose state is in the checkpoint in {self.folder}; "
                    "expected the same names as at the start"
                )
            for name, part in self._also.items():
                if name not in state.get("also", {}):
                    raise UserError(f"also: the checkpoint in {self.folder} has no state of {name!r}")
                part.load_state_dict(state["also"][name])
        check_lineage(self.sgd.executions, finished, self.sgd.lineage, self.folder)
        return finished

    def steps(self) -> Iterator[PrivateStep]:
        """The steps that are left, each to be filled with `add` and taken with `apply`.

        A step comes a second time when `apply` returned False, with another batch. The
        state is saved every `checkpoint_minutes` and after the last step. Then the training ends: the moving
        average takes the place of the parameters, and the key is deleted.

        Raises RuntimeError when a step was not applied, or the training was closed.
        """
        if not self.sgd.attached:
            raise RuntimeError("this training was closed: construct it again to resume")
        if self._looping:
            raise RuntimeError("steps() twice at once: expected one loop over the steps")
        self._looping = True
        try:
            while self.finished < self.total:
                try:
                    step = self._step = self._begin()
                except Spent:
                    self.end_early(self.finished)
                    break
                while not step.applied and not step.spent:
                    attempt = step.attempt
                    yield step
                    if not step.applied and not step.spent and step.attempt == attempt:
                        raise RuntimeError(
                            f"step {step.number} was begun: expected apply() in the loop's body"
                        )
                if step.spent:
                    self.end_early(self.finished)
                    break
                self.finished, self._step = self.finished + 1, None
                if self.checkpoint.due() or self.finished == self.total:
                    self.save()
            self.finish()
        finally:
            self.close()

    def _begin(self) -> PrivateStep:
        step = self.sgd.begin(self.finished)
        if not self.checkpoint.path.exists():
            # From here on a folder without its record of steps is refused.
            self.save()
        return step

    def _changed(self) -> list[str]:
        """The tensors that are not trained and are not what they were at the start, by name."""
        now = _frozen_digests(self.module) if self._frozen else {}
        return sorted(name for name, digest in self._frozen.items() if now.get(name) != digest)

    def _refuse_changed(self) -> None:
        """Raises UserError when the plan, or a tensor that is not trained, is not that of the start."""
        self.sgd.refuse_edited()
        if changed := self._changed():
            raise UserError(
                f"module: {changed[0]} changed during the training, though it is not trained: what changed "
                "it may have read private examples, and no noise was added. The result has no guarantee"
            )

    def save(self) -> None:
        """Saves the state after the last step that was applied.

        Raises UserError when a tensor that is not trained has changed: such a state is never saved.
        """
        self._refuse_changed()
        applied = self._step is not None and self._step.applied
        self.checkpoint.save(self.finished + applied, self.state_dict())

    def close(self) -> None:
        """Takes the engine off the module and lets others open the folder. The training can be resumed."""
        if hasattr(self, "sgd"):
            self.sgd.detach()
        if self._unlock is not None:
            self._unlock()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on but the key."""
        also = {"also": {name: part.state_dict() for name, part in self._also.items()}} if self._also else {}
        found: dict[str, Any] = plain({**self.sgd.state_dict(), **also})
        return found

    def end_early(self, finished: int) -> None:
        """Ends a training of whose plan every step was begun, after its `finished` steps.

        Raises UserError when there is none to end with.
        """
        if finished <= self._scouted:
            raise spent(self.sgd.executions, finished, self.plan)
        self._refuse_changed()
        self.checkpoint.save(finished, self.state_dict())

    def finish(self) -> None:
        """Ends the training: the moving average takes the place of the parameters, the key is deleted.

        After the loop was left early, the state is saved first. Raises UserError as `save` does.
        """
        if self._step is not None:
            self.save()
        self._refuse_changed()
        self.sgd.release()
        if self._first:
            forget_key(self.folder)
        self._ended = True
        self.close()

    @property
    def complete(self) -> bool:
        """Whether the training has ended."""
        return (self.folder / "finished").exists()

    def epsilon(self) -> float:
        """An upper bound on the epsilon of all steps begun so far, at the plan's delta."""
        return self.sgd.epsilon()

    def statement(self) -> Statement:
        """The guarantee of what was trained: the whole plan's epsilon, and what that covers.

        Before its end as well: the bound of fewer steps, `epsilon()`, does not hold if a release may have
        decided where to stop. Raises UserError if the plan, or a tensor that is not trained, changed.
        """
        if not self._ended:
            self._refuse_changed()
        plan = self.sgd.planned  # a copy, which nobody edits
        return Statement.of(
            plan,
            epsilon=plan.epsilon if self.sgd.executions.count else 0.0,
            steps=self.sgd.executions.count,
            complete=self.complete,
            seeded=self._seeded,
            checked=self._synthetic_losses is not None,
        )


def _locked(owner: object, folder: Path) -> Callable[[], None]:
    """Locks the folder until the function that it returns is called, or `owner` or the process is gone.

    Raises UserError when a training is open there.
    """
    descriptor = os.open(private_directory(folder) / "training.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"folder={folder}: a training is open there, in this process or another one; expected one at a "
            "time: call close() on it, or wait until it has ended"
        ) from None
    except OSError:
        pass  # a file system without locks
    return weakref.finalize(owner, os.close, descriptor)


def _frozen_digests(module: nn.Module) -> dict[str, str]:
    """SHA-256 of each parameter and buffer of `module` that is not trained, by name."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: digest(tensor) for name, tensor in tensors if not tensor.requires_grad}


def _refuse_wrapped(module: nn.Module) -> None:
    refuse_sharded(module)
    if os.environ.get("WORLD_SIZE", "1") != "1" and size() == 1:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: expected torch.distributed.init_process_group() before "
            "PrivateTraining, or each process would train, and spend, by itself"
        )
    wrapper = next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS), None)
    if wrapper is not None:
        raise UserError(
            f"module={wrapper}: expected the module inside it; the processes of a job add up their parts by "
            "themselves, and layers with trainable parameters cannot be compiled"
        )
    for name, layer in module.named_modules():
        if "forward" in vars(layer) and any(p.requires_grad for p in layer.parameters()):
            raise UserError(
                f"module: the forward of {name or 'it'} is replaced, by another training or by hooks; "
                "expected the module as it was made: close() takes a training off"
            )


def _number_of_examples(plan: PrivacyPlan, given: int | None) -> int:
    if plan.num_examples is None and given is None:
        raise UserError("num_examples=None: expected the number of examples, which this plan keeps private")
    if plan.num_examples is not None and given not in (None, plan.num_examples):
        raise UserError(f"num_examples={given}: expected {plan.num_examples}, for which the plan was made")
    number = plan.num_examples if plan.num_examples is not None else given
    assert number is not None
    return number


def _known(
    module: nn.Module, optimizer: torch.optim.Optimizer, frozen: Mapping[str, str], randomness: Randomness
) -> dict[str, Any]:
    """All that is known of this training to change its bits, the same on every process.

    What is trained is not in it: a step's batch depends on the parameters themselves.
    """
    if len(set(everyone(digest(*module.state_dict().values())))) > 1:
        raise UserError("module: the processes of this job hold different parameters; expected the same ones")
    # Private: without the key it would tell whether a guess of the weights is right.
    inputs = randomness.keyed_digest("inputs", json.dumps(frozen, sort_keys=True).encode())
    device = next(p for p in module.parameters() if p.requires_grad).device
    settings = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    return {
        "inputs": inputs,
        "start": agreed(start(device)),
        "optimizer": f"{type(optimizer).__name__} {settings}",
        "processes": everyone(process(device)),
    }


# The folder of a training


def open_folder(plan: PrivacyPlan, folder: Path, insecure_seed: int | None = None) -> Randomness:
    """The key of the training in `folder`, new or as an earlier start left it; its plan is kept there.

    Raises UserError when the training goes on under another plan, or its key or record is gone.
    """
    if rank() == 0:
        private_directory(folder)
        check_begun(folder)
        _same_plan(plan, folder, seeded=insecure_seed is not None)
        run_key(insecure_seed, folder)
    barrier()
    return run_key(insecure_seed, folder)


def _same_plan(plan: PrivacyPlan, folder: Path, *, seeded: bool) -> None:
    """Keeps the plan of the run's first start, and whether its noise came from a seed.

    A training of which no step was begun may begin with another plan. Raises UserError when one goes on under
    another plan, with another kind of noise, or without the plan.
    """
    record = folder / "executions.jsonl"
    is_begun = record.exists() and record.stat().st_size > 0
    if is_begun:
        check_same_plan(plan, folder)
    if not is_begun or not (folder / PLAN).exists():
        if is_begun:
            raise UserError(
                f"{folder / PLAN}: is missing, and steps were begun under it; expected the folder as it was. "
                "Bring it back, or begin in another folder and count what was spent here"
            )
        # Whether the images have a record beside it, so that its removal is found (`outputs.check_records`).
        recorded = (folder / "content.json").exists()
        kept = plan.to_dict() | {"content": recorded, "seeded": seeded}
        write_json(folder / PLAN, kept, mode=0o600)
    before = read_json(folder / PLAN).get("seeded", seeded)
    if before != seeded:
        raise UserError(
            f"insecure_seed: the training in {folder} began {'with' if before else 'without'} a seed; "
            "expected it to go on that way, or another folder"
        )


def run_key(insecure_seed: int | None, folder: Path) -> Randomness:
    """The run's randomness: its key is made once and kept in `folder` until the training has ended.

    Raises UserError when steps were begun with a key that is gone.
    """
    if insecure_seed is not None:
        return Randomness.from_seed(insecure_seed)
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
