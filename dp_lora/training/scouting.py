"""How a job chooses the matrices that get adapters: by scouting steps, by the public set, or by a seed.

| trainable.choice | reads | costs |
|---|---|---|
| salient | the first `scout_steps` noised sums of the run (`privacy.scouting`) | these steps, of the plan's |
| salient_public | gradients of `public_data`, without noise | no privacy |
| random | the seed | no privacy |
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dp_lora.config.schema import Config
from dp_lora.config.trainable import TrainableConfig
from dp_lora.models import candidates
from dp_lora.models.folders import LatentDiffusion
from dp_lora.privacy.scouting import Kept, Scout, best, number_of, scores
from dp_lora.privacy.step import DPSGD


@dataclass(frozen=True)
class Choice:
    """The matrices that were chosen, and by what."""

    trainable: TrainableConfig
    """The settings of the choice."""
    matrices: tuple[str, ...]
    """All candidates, in the model's order."""
    chosen: tuple[str, ...]
    """Those that are trained, in the same order."""
    scores: Mapping[str, float] | None = None
    """Of all candidates; None where nothing was measured."""
    dimension: int = 0
    """Coordinates that a scouting step released; 0 where there was none."""

    def record(self) -> dict[str, Any]:
        """For privacy.json, result.json and the card: settings, or functions of released or public values."""
        given = self.trainable
        found = {
            "by": given.choice,
            "share": given.share,
            "number": len(self.chosen),
            "of": len(self.matrices),
            "chosen": list(self.chosen),
        }
        if self.scores is not None:
            found |= {
                "scout_steps": given.scout_steps,
                "candidates": given.candidates,
                "scores": dict(self.scores),
            }
        return found | ({"dimension": self.dimension} if self.dimension else {})


class Scouting:
    """The first steps of a private fine-tuning, on the candidates of `model`, and the choice after them.

    Args:
        config: the job, with trainable.choice=salient.
        model: with everything trainable that any choice can train; `Scouting.open` leaves the candidates.
        chosen: called with the choice as soon as it is made, or found in a checkpoint.
    """

    def __init__(self, config: Config, model: LatentDiffusion, chosen: Callable[[Choice], None]) -> None:
        self.trainable, self.train, self._model, self._tell = config.trainable, config.train, model, chosen
        self.steps = config.trainable.scout_steps
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self.names: tuple[str, ...] = ()

    def open(self) -> torch.optim.Optimizer:
        """Leaves the candidates alone trainable; returns an optimiser over them that never steps."""
        self.names = tuple(candidates.open_for_scouting(self._model, self.trainable.candidates))
        opened = [p for p in self._model.parameters() if p.requires_grad]
        return torch.optim.SGD([{"params": opened, "factor": 0.0}], lr=0.0)

    def choice_of(self, scout: Scout, kept: Kept) -> Choice:
        """The choice of a `kept` scouting, a function of what was released."""
        by_name = dict(zip(self.names, scores(kept, scout.sizes, scout.plan), strict=True))
        chosen = best(by_name, self.trainable.share) if kept.chosen is None else kept.chosen
        return Choice(self.trainable, self.names, chosen, by_name, sum(scout.sizes))

    def narrow(self, scout: Scout, kept: Kept) -> Kept:
        """Takes the scout off the model, which keeps the chosen adapters alone and trains them.

        Returns `kept` with the choice, which is made of it unless it has one already.
        """
        choice = self.choice_of(scout, kept)
        scout.detach()
        self._model.requires_grad_(False)
        candidates.keep(self._model, choice.chosen)
        there = {id(p) for p in self._model.parameters()}
        for parameter in self._trained:
            # Those of adapters that are gone may not be taken for trained ones.
            parameter.requires_grad_(id(parameter) in there)
        self._tell(choice)
        return replace(kept, chosen=choice.chosen)


class Phases:
    """The steps of a training that begins with scouting: one numbering, one record, two engines.

    Args:
        step: a step of the fine-tuning, such as `FinetuneStep`, on the engine of its first phase.
        steps: S.
        choose: makes the choice and returns the engine on the chosen matrices.
    """

    def __init__(self, step: Any, steps: int, choose: Callable[[], DPSGD]) -> None:
        self.step, self.steps, self._choose = step, steps, choose

    def __call__(self, number: int) -> dict[str, float]:
        if number >= self.steps and isinstance(self.step.sgd, Scout):
            self.step.sgd = self._choose()
        found: dict[str, float] = self.step(number)
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on but the key."""
        found: dict[str, Any] = self.step.state_dict()
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict` of the phase that the step is in."""
        self.step.load_state_dict(state)


def random_choice(trainable: TrainableConfig, names: Sequence[str], seed: int) -> Choice:
    """As many of the candidates `names` as the share says, drawn by the seed alone."""
    drawn = set(
        random.Random(f"choice of matrices {seed}").sample(names, number_of(trainable.share, len(names)))
    )
    return Choice(trainable, tuple(names), tuple(name for name in names if name in drawn))
