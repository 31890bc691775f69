"""Whether the parameters follow from the releases: each step is taken a second time, from its release alone.

What is released may be used in any way. But a parameter that moves by anything else, such as the sum before
the noise, gives that away, and no test of the noise sees it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dp_lora.privacy.moving_average import average_decay
from dp_lora.privacy.step import DPSGD
from dp_lora.storage.tensors import as_bytes
from dp_lora.training.finetune import FinetuneStep
from dp_lora.training.loop import learning_rate


class Followed:
    """The engine's step, and parameters of the auditor's own that descend the same releases.

    Guarantee: `unreleased_update` is 0 unless after every step the trained parameters and their moving
    average are, bit for bit, what AdamW with the run's settings makes of the gradients that the engine's
    optimiser was given, one each step; and unless all that is not trained is what it was at the start.
    Computed on the same device by the same operations, a correct engine's are.

    Args:
        step: before its first step, or with the state of its last one still to be loaded here.
    """

    def __init__(self, step: FinetuneStep) -> None:
        self.step, self.sgd = step, step.sgd
        self._factors = [group["factor"] for group in self.sgd.optimizer.param_groups]
        self._frozen = _frozen(self.sgd)
        self._releases, self._missed, self._strayed = 0, False, False
        self._start()
        self.sgd.optimizer.register_step_pre_hook(self._see)

    def _start(self) -> None:
        """Takes parameters and average as they are."""
        self._parameters = [p.detach().clone() for p in self.sgd.parameters]
        self._average = [p.clone() for p in self.sgd.average.values]
        self._optimizer = torch.optim.AdamW([{"params": [p]} for p in self._parameters])

    def _see(self, *_: Any) -> None:
        self._releases += 1
        for own, parameter in zip(self._parameters, self.sgd.parameters, strict=True):
            own.grad = None if parameter.grad is None else parameter.grad.detach().clone()

    def __call__(self, step: int) -> dict[str, float]:
        """Takes step number `step`, follows it and returns what it returns."""
        self._releases = 0
        logged = self.step(step)
        if self._releases:
            self._descend(step)
        else:
            self._missed = True
        same = _equal(self.sgd.parameters, self._parameters) and _equal(
            self.sgd.average.values, self._average
        )
        self._strayed |= self._releases > 1 or not (same or (not self._releases and self._unmoved()))
        return logged

    def _unmoved(self) -> bool:
        """Whether a step that released nothing left the parameters alone; their average may come nearer."""
        self._average = [p.clone() for p in self.sgd.average.values]
        return _equal(self.sgd.parameters, self._parameters)

    def _descend(self, step: int) -> None:
        train, steps = self.step.train, self.sgd.plan.steps
        rate = learning_rate(train.learning_rate, train.schedule, step, steps, train.warmup_steps)
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            group.update(lr=rate * factor, weight_decay=train.weight_decay)
        self._optimizer.step()
        for averaged, parameter in zip(self._average, self._parameters, strict=True):
            averaged.lerp_(parameter, 1 - average_decay(train.ema_decay, step))

    def release(self) -> None:
        """Ends the training: `FinetuneStep.release`, and a last look at all parameters."""
        self.step.release()
        self._strayed |= not _equal(self.sgd.parameters, self._average) or _frozen(self.sgd) != self._frozen

    def p_values(self) -> dict[str, float]:
        """The p-values of the two tests in which chance plays no part: 0 once something was wrong, else 1."""
        return {
            "missing_release": 0.0 if self._missed else 1.0,
            "unreleased_update": 0.0 if self._strayed else 1.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """The step's, and what was found so far."""
        return {"step": self.step.state_dict(), "missed": self._missed, "strayed": self._strayed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.step.load_state_dict(state["step"])
        self._missed, self._strayed = bool(state["missed"]), bool(state["strayed"])
        self._start()
        self._optimizer.load_state_dict(copy.deepcopy(self.sgd.optimizer.state_dict()))


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all values are the same; what is no number equals what is none."""
    return all(
        bool(((one == other) | (one.isnan() & other.isnan())).all())
        for one, other in zip(some, others, strict=True)
    )


def _frozen(sgd: DPSGD) -> str:
    """A hash of all parameters and buffers that are not trained."""
    trained, hashed = {id(p) for p in sgd.parameters}, hashlib.sha256()
    for name, tensor in [*sgd.module.named_parameters(), *sgd.module.named_buffers()]:
        if id(tensor) not in trained:
            hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            hashed.update(as_bytes(tensor))
    return hashed.hexdigest()
