"""The privacy statement of a training in a loop of the caller's own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.storage.files import write_json

COVERS = (
    "The trained parameters, and everything computed from them alone, are (epsilon, delta)-differentially "
    "private with respect to one private example.",
    "The values of the steps: the epsilon spent, the norm of the noised update, the signal-to-noise "
    "estimated from it and, where asked for, the private loss.",
)

DOES_NOT_COVER = (
    "Metrics computed on private or held-out examples.",
    "Hyper-parameters chosen by looking at such metrics: every further training on the same examples spends "
    "its own epsilon.",
    "Parameters that were not trained, and the data that they were trained on before.",
    "A person with several examples: the unit of privacy is one example; for n examples of one person "
    "epsilon grows n times and delta by more than that.",
    'The number of examples, where the adjacency is "zero out one image" or "zero out one person".',
    "How long steps take and how much memory they use, and what the caller's own code prints, saves or logs.",
    "Steps that a copy of the training's folder took, and losses that use other examples of a batch.",
    "The training's folder, which holds the noise key and must stay private.",
)

COVERS_PERSONS = (
    "The trained parameters, and everything computed from them alone, are (epsilon, delta)-differentially "
    "private with respect to one person, provided that all data of a person are in one example.",
    COVERS[1],
)
"""The coverage of a plan whose unit is a person."""

UNCHECKED = "The engine on this module: the preflight was left out."


@dataclass(frozen=True)
class Statement:
    """The guarantee of one training.

    Attributes:
        record: the fields of privacy.json: the plan's, with `epsilon` and `steps` as they were spent,
            `complete`, `covers` and `does_not_cover`.
    """

    record: Mapping[str, Any]

    @classmethod
    def of(
        cls, plan: PrivacyPlan, *, epsilon: float, steps: int, complete: bool, seeded: bool, checked: bool
    ) -> Statement:
        """The statement after `steps` steps were begun.

        Args:
            plan: of the training.
            epsilon: an upper bound at the plan's delta; inf without noise.
            steps: that were begun, finished or not.
            complete: whether the training has ended.
            seeded: whether the noise came from a seed, so that there is no guarantee.
            checked: whether the preflight ran.
        """
        if not math.isfinite(epsilon):
            covers: Any = "No privacy guarantee: there was no noise."
        elif seeded:
            covers = (
                "No privacy guarantee: the noise came from a seed, and whoever knows it can take it away."
            )
        else:
            covers = COVERS_PERSONS if plan.unit == "person" else COVERS
        limits = [
            one for one in DOES_NOT_COVER if plan.unit == "image" or not one.startswith("A person with")
        ]
        return cls(
            {
                **plan.to_dict(),
                "epsilon": epsilon if math.isfinite(epsilon) else "inf",
                "steps": steps,
                "planned_steps": plan.steps,
                "complete": complete,
                "reproducible_noise": seeded,
                "covers": covers,
                "does_not_cover": (*limits, *(() if checked else (UNCHECKED,))),
            }
        )

    @property
    def epsilon(self) -> float:
        """The epsilon spent, at `delta`; inf where there is no guarantee."""
        return math.inf if isinstance(self.record["covers"], str) else float(self.record["epsilon"])

    @property
    def delta(self) -> float:
        """The plan's delta."""
        return float(self.record["delta"])

    def save(self, path: str | Path) -> None:
        """Writes the record to a JSON file, as a whole or not at all."""
        write_json(Path(path), self.record)

    def __str__(self) -> str:
        return json.dumps(self.record, indent=2, default=str)
