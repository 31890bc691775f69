"""The settings of a private search: many trials, of which only the best is released."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from dp_lora.errors import UserError, did_you_mean

NUMBERS_OF_TRIALS = ("Poisson", "geometric", "logarithmic")
"""The distributions of the number of trials."""

PUBLIC_SCORE = "inception_score"
"""A score of generated images alone, which looks at no held-out image."""

ACCURACY = "dp_accuracy_"
"""How the names of the scores begin that a noised sum over held-out images tells."""


@dataclass
class SearchConfig:
    """`sweep=private_search`: a random number of trials, each of a cell of the space drawn at random."""

    space: Any = None
    """Options with the values that a trial may draw, such as {lora.rank: [4, 8], train.max_steps: [40, 80]}:
    every combination is a cell. null: no search."""
    expected_trials: float = 8.0
    """The mean of the number of trials, which is drawn and stays private."""
    distribution: str = "Poisson"
    """Of that number: Poisson (near its mean, but it can be 0), geometric or logarithmic."""
    score: str | None = None
    """The metric by which the best trial is found: dp_accuracy_<classifier>, or inception_score. null: the
    private accuracy of the first of `evaluation.classifiers`."""


def refuse_one_job(search: SearchConfig) -> None:
    """Raises UserError for a job by itself whose settings are those of a search."""
    if search.space is not None:
        raise UserError(
            f"search.space={search.space}: is for a search of many trials; expected "
            "-m sweep=private_search with hydra/launcher=local or slurm"
        )


def check_search(search: SearchConfig) -> None:
    """Raises UserError for the first value that cannot be right."""
    if not 1 <= search.expected_trials < math.inf:
        raise UserError(f"search.expected_trials={search.expected_trials:g}: expected at least 1")
    if search.distribution not in NUMBERS_OF_TRIALS:
        hint = did_you_mean(search.distribution, NUMBERS_OF_TRIALS)
        raise UserError(
            f"search.distribution={search.distribution!r}: expected one of {', '.join(NUMBERS_OF_TRIALS)}"
            f"{hint}"
        )
    if search.score is not None and not re.fullmatch(rf"{ACCURACY}\w+|{PUBLIC_SCORE}", search.score):
        raise UserError(
            f"search.score={search.score}: expected {ACCURACY}<classifier>, {PUBLIC_SCORE}, or null"
        )
    if search.space is None:
        return
    whole = isinstance(search.space, dict) and search.space
    if not whole or not all(isinstance(values, list) and values for values in search.space.values()):
        raise UserError(
            f"search.space={search.space}: expected options with lists of values, such as "
            "'{lora.rank:[4,8],train.max_steps:[40,80]}'"
        )
