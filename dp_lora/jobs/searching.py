"""A private search on a private set: its charge, its draws, the scores of its trials, and the best of them.

The search lies in a folder that its owner alone can enter. Its `private/` holds

    | file | content |
    |---|---|
    | `plan.json` | the cells and the noise of each, by which the search is known again |
    | `charge.json` | the receipt of the one charge, for the whole search |
    | `draws.json` | K, and the cell and the tie-breaker of each trial |
    | `trials/<number>/` | the run directory of a trial, with a ledger and an index of its own |
    | `failed.json` | the trials that failed for good |
    | `outcome.json` | the trial that is released, if any |

Guarantees:
    * The charge is on disk before anything is drawn, the draws are before any of them is used, and neither is
      made twice, wherever the search is killed. Whoever removes the draws of a search that has begun ends it.
    * The charge follows from the plan alone, and is never taken back.
    * A trial has folders of its own for all that it writes, so that no two trials share a training.
    * A trial without a score, or whose records do not say that it is what its cell planned, is the worst.
    * Of equal scores a random number drawn beforehand decides, so that no place in the order is preferred.
    * What is released holds nothing of K, of other trials, or of when and as which the best one was made.
"""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config.identity import absolute_paths
from dp_lora.config.schema import Config
from dp_lora.config.search import ACCURACY, SearchConfig
from dp_lora.errors import UserError
from dp_lora.jobs.begun import begun
from dp_lora.privacy.ledger import SEARCHED, Charge
from dp_lora.privacy.search_plan import SearchPlan
from dp_lora.privacy.selection import SEARCHED_BY, SETS, Search, drawn_number
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.records.card import with_search
from dp_lora.records.coverage import SEARCH
from dp_lora.records.run_directory import OUTPUTS, keep_adapter, result, state
from dp_lora.storage.files import (
    Damaged,
    private_directory,
    read_json,
    read_lines,
    write_atomic,
    write_json,
    write_lines,
)
from dp_lora.training.receipts import RECEIPT

if TYPE_CHECKING:
    from dp_lora.jobs.spending import Account

TRIALS, DRAWS, OUTCOME = "trials", "draws.json", "outcome.json"

_COPIED = ("samples.npz", "samples.png", "result.json")


@dataclass(frozen=True)
class Draws:
    """The secret of a search."""

    cells: tuple[int, ...]
    """The number of the cell of each trial; there are K of them."""
    ties: tuple[int, ...]
    """A random number for each trial."""


def score_name(config: Config) -> str:
    """The metric by which the best trial is found."""
    return config.search.score or f"{ACCURACY}{config.evaluation.classifiers[0]}"


def strictest(config: Config) -> tuple[str, ...]:
    """The sets of `selection.SETS` that the target of a search is for.

    Where an image is protected, its owner may have another one among the held-out images. Where persons are
    protected, none of them has images in both sets.
    """
    return ("both",) if config.privacy.unit == "image" else ("training", "held_out")


def charge_of_search(config: Config, account: Account, search: Search) -> Charge:
    """The charge for the whole search."""
    receipt, privacy = account.receipt, config.privacy
    return Charge(receipt.run, receipt.private_set, SEARCHED, privacy.delta, unit=privacy.unit, search=search)


def charge_once(account: Account, charge: Charge) -> None:
    """Charges the search, on disk before this returns, unless it is charged already.

    Raises UserError as `Account.enter`: when the budget has no room, or another copy of the search went on.
    """
    if charge in account.books.ledger.charges():
        account.check(account.turn(None))
    else:
        account.enter(charge, account.turn(None))


def draws_of(folder: Path, search: Search, cells: int) -> Draws:
    """K and the cell of each trial, drawn once and on disk before this returns.

    Args:
        folder: the private one of the search.
        search: as planned.
        cells: how many there are to draw from.

    Raises UserError when trials have begun and the draws are gone.
    """
    path = folder / DRAWS
    if not path.exists():
        if (folder / TRIALS).exists():
            raise UserError(
                f"{path}: is missing, and trials have begun; expected it as it was drawn: put it back. The "
                "search stays charged; hydra.launcher.name=<another> begins another one"
            )
        number = drawn_number(search.distribution, search.expected_trials)
        drawn = {
            "cells": [secrets.randbelow(cells) for _ in range(number)],
            "ties": [secrets.randbits(64) for _ in range(number)],
        }
        write_json(path, drawn, mode=0o600)
    found = read_json(path)
    try:
        draws = Draws(tuple(found["cells"]), tuple(found["ties"]))
    except (KeyError, TypeError) as error:
        raise Damaged(f"{path}: no draws of a search; expected what this program wrote there") from error
    if len(draws.cells) != len(draws.ties) or not all(0 <= cell < cells for cell in draws.cells):
        raise Damaged(f"{path}: the draws of another search; expected what this program wrote there")
    return draws


def trial_config(config: Config, mechanism: Mechanism, place: Path, cache: Path) -> Config:
    """The configuration of a trial: that of its cell with the planned noise, in folders of its own.

    Args:
        config: of the cell.
        mechanism: of its training.
        place: the trial's folder, absolute.
        cache: of the search; only what is public is shared with other jobs.
    """
    paths = replace(
        config.paths,
        outputs=str(place),
        cache=str(cache),
        ledger=str(place / "ledger.jsonl"),
        index=str(place / "index"),
    )
    privacy = replace(
        config.privacy, epsilon=None, noise_multiplier=mechanism.noise_multiplier, budget_epsilon=None
    )
    tracking = replace(config.tracking, wandb="disabled", live=False, name=None, folder=None)
    return replace(
        config, paths=paths, privacy=privacy, tracking=tracking, search=SearchConfig(), optimize=None
    )


def score_of(directory: Path, mechanism: Mechanism, score: Mechanism, name: str) -> float | None:
    """The score of the trial in `directory`; None for one that counts as the worst.

    That is one that failed, whose score is no number, or whose records state more than its cell planned: a
    step that was begun twice, or a second sum over the held-out images.
    """
    metric = result(directory).get("metrics", {}).get(name)
    if state(directory) != "done" or isinstance(metric, bool) or not isinstance(metric, int | float):
        return None
    try:
        stated = read_json(directory / "privacy.json")
        spent = (stated["noise_multiplier"], stated["sample_rate"], stated["steps"])
        release = stated["release"]
    except (OSError, UserError, KeyError, TypeError):
        return None
    if spent != (mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps):
        return None
    if stated.get("complete") is not True or begun(directory / "checkpoint") != mechanism.steps:
        return None
    if release["noise_multipliers"] != [score.noise_multiplier]:
        return None
    return float(metric) if math.isfinite(metric) else None


def best(scores: Sequence[float | None], ties: Sequence[int]) -> int | None:
    """The number of the trial with the best score, None where no trial has one.

    >>> best([0.5, None, 0.7, 0.7], [1, 9, 2, 3]), best([None], [4]), best([], [])
    (3, None, None)
    """
    ranked = [
        (score, tie, number)
        for number, (score, tie) in enumerate(zip(scores, ties, strict=True))
        if score is not None
    ]
    return max(ranked)[2] if ranked else None


def statement(plan: SearchPlan, score: str) -> dict[str, Any]:
    """The entry `search` of privacy.json: public numbers, none of which depends on what was drawn."""
    return {
        **plan.search.to_dict(),
        "number_of_cells": len(plan.trials),
        "score": score,
        "trial_epsilon": plan.trial_epsilon,
        "target_epsilon": plan.target_epsilon,
        "epsilon": {of: plan.search.epsilon(plan.delta, of) for of in SETS},
    }


def searched(record: Mapping[str, Any], plan: SearchPlan, score: str) -> dict[str, Any]:
    """The content of privacy.json of the search's winner.

    Args:
        record: that of the trial.
        plan: of the search.
        score: the metric that found it.
    """
    search = statement(plan, score)
    epsilon = search["epsilon"]
    release = {
        **record["release"],
        "epsilon": epsilon["held_out"],
        "accountant": SEARCHED_BY,
        "with_training": {"epsilon": epsilon["both"], "delta": plan.delta, "accountant": SEARCHED_BY},
    }
    # By accountant there is only what the one trial spent.
    kept = {name: value for name, value in record.items() if name != "epsilon_by_accountant"}
    return {
        **kept,
        "epsilon": epsilon["training"],
        "accountant": SEARCHED_BY,
        "does_not_cover": [*record["does_not_cover"], SEARCH],
        "release": {**release, "delta": plan.delta},
        "search": search,
    }


def release(
    trial: Path, directory: Path, config: Config, plan: SearchPlan, account: Account, score: str
) -> None:
    """Makes `directory`, the run directory of the search's winner, which appears whole or not at all.

    Args:
        trial: the run directory of the best trial.
        directory: absolute; its parent is made.
        config: of the trial's cell, with the user's own paths.
        plan, score: of the search.
        account: of the search, whose receipt the winner has from now on.
    """
    from omegaconf import OmegaConf

    partial = private_directory(directory.with_name("partial"))
    shutil.rmtree(partial)
    checkpoint = private_directory(private_directory(partial) / "checkpoint")
    for name in ("content.json", "base.json"):
        write_json(checkpoint / name, read_json(trial / "checkpoint" / name), mode=0o600)
    write_json(checkpoint / RECEIPT, asdict(account.receipt), mode=0o600)
    for name in _COPIED:
        if (trial / name).exists():
            write_atomic(partial / name, (trial / name).read_bytes())
    record = searched(read_json(trial / "privacy.json"), plan, score)
    write_json(partial / "result.json", _result(read_json(trial / "result.json"), record))
    write_json(partial / "privacy.json", record)
    rows = [row for row in read_lines(trial / "metrics.jsonl") if row.get("stage") == "finetune"]
    # The epsilon of a step would be that of one trial alone.
    write_lines(partial / "metrics.jsonl", [_without(row, "time", "epsilon") for row in rows])
    # When it was made would tell as which.
    made = _without(read_json(trial / "provenance.json"), "start", "end", "restarts", "seconds", "slurm")
    write_json(partial / "provenance.json", made)
    settings = replace(config, paths=absolute_paths(config.paths))
    write_atomic(partial / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(settings)))
    _copy_adapter(trial / OUTPUTS["finetune"], partial / OUTPUTS["finetune"], record)
    keep_adapter(partial / OUTPUTS["finetune"], checkpoint)
    write_json(partial / "status.json", {"state": "done"})
    partial.replace(directory)


def _result(found: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """result.json of the winner, with the search's epsilon for a held-out image, and no times."""
    spent = {name: record["release"][name] for name in ("epsilon", "delta", "accountant", "unit")}
    return {**_without(found, "seconds", "peak_memory_bytes"), "release": {**found["release"], **spent}}


def _without(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def _copy_adapter(source: Path, folder: Path, record: Mapping[str, Any]) -> None:
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.name == "README.md":
            write_atomic(folder / path.name, with_search(path.read_text(encoding="utf-8"), record))
        else:
            write_atomic(folder / path.name, path.read_bytes())
