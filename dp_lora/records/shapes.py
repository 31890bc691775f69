"""The shapes of the larger fields of privacy.json and result.json."""

from __future__ import annotations

from collections.abc import Mapping

from dp_lora.records import field_kinds
from dp_lora.records.field_kinds import Shape, number

SPENT: Mapping[str, Shape] = {"epsilon": number, "delta": number, "accountant": field_kinds.words}
RELEASE: Shape = {
    **SPENT,
    **dict.fromkeys(("target_epsilon", "noise_multiplier", "sensitivity", "releases"), number),
    "noise_multipliers": field_kinds.sequence,
    **dict.fromkeys(("earlier_releases", "earlier_trainings"), field_kinds.list_of_numbers),
    "reference": field_kinds.name,
    "unit": field_kinds.name,
    "reproducible_noise": field_kinds.flag,
    "covers": field_kinds.sentence,
    "with_training": SPENT,
}
"""The shape of `release` in privacy.json."""

CHOICE: Shape = {
    **dict.fromkeys(("by", "candidates"), field_kinds.name), "chosen": field_kinds.names,
    **dict.fromkeys(("share", "number", "of", "scout_steps", "dimension"), number),
    "scores": field_kinds.numbers,
}  # fmt: skip
"""The shape of `choice`: which matrices a run chose."""

SEARCH: Shape = {
    "distribution": field_kinds.name,
    "score": field_kinds.name,
    **dict.fromkeys(("expected_trials", "number_of_cells", "trial_epsilon", "target_epsilon"), number),
    "score_noise_multiplier": number,
    "cells": field_kinds.list_of_numbers,
    "epsilon": field_kinds.numbers,
}
"""The shape of `search` in privacy.json: what a private search spent."""
