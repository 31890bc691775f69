"""Differentially private LoRA fine-tuning of latent diffusion models.

The names below are for training loops of your own; `docs/library.md` shows them at work. The command is
`dp-lora`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_lora.errors import PlanError as PlanError
    from dp_lora.errors import UserError as UserError
    from dp_lora.privacy.persons import Persons as Persons
    from dp_lora.privacy.plan import PrivacyPlan as PrivacyPlan
    from dp_lora.privacy.plan import make_plan as make_plan
    from dp_lora.privacy.preflight import PreflightError as PreflightError
    from dp_lora.privacy.step import Draws as Draws
    from dp_lora.privacy.step import Microbatch as Microbatch
    from dp_lora.privacy.step import PrivateStep as PrivateStep
    from dp_lora.training.private_training import PrivateTraining as PrivateTraining
    from dp_lora.training.statement import Statement as Statement

__version__ = "0.1.0"

_HOMES = {
    "Draws": "privacy.step",
    "Microbatch": "privacy.step",
    "Persons": "privacy.persons",
    "PlanError": "errors",
    "PreflightError": "privacy.preflight",
    "PrivacyPlan": "privacy.plan",
    "PrivateStep": "privacy.step",
    "PrivateTraining": "training.private_training",
    "Statement": "training.statement",
    "UserError": "errors",
    "make_plan": "privacy.plan",
}
"""The module of each name. It is imported when the name is asked for, so that `import dp_lora` stays fast."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
