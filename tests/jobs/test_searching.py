"""Private searches: draws, the configuration of a trial, and what counts as the worst."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs import reuse, searching
from dp_lora.jobs.searching import best, draws_of, score_of, strictest, trial_config
from dp_lora.privacy.selection import Search
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import Damaged, read_json, write_json
from tests.builders.tiny import composed

CELL, SCORE = Mechanism(2.0, 0.05, 4), Mechanism(3.7, 1.0, 1)
SEARCH = Search((CELL,) * 3, SCORE, "Poisson", 6.0)


# Draws


def test_cells_are_drawn_uniformly_and_nothing_twice(tmp_path: Path) -> None:
    """Chi-square over 200 searches of about 6 trials; it fails by chance once in 10,000."""
    import numpy as np
    from scipy.stats import chisquare

    drawn, ties, numbers = [], [], []
    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()
        first = draws_of(folder, SEARCH, 3)
        assert draws_of(folder, SEARCH, 3) == first
        assert stat.S_IMODE((folder / "draws.json").stat().st_mode) == 0o600
        drawn += first.cells
        ties += first.ties
        numbers.append(len(first.cells))
    assert chisquare(np.bincount(drawn, minlength=3)).pvalue > 1e-4
    assert len(set(ties)) == len(ties) and abs(sum(numbers) / 200 - 6) < 5 * (6 / 200) ** 0.5


def test_lost_and_damaged_draws_are_not_replaced(tmp_path: Path) -> None:
    draws_of(tmp_path, SEARCH, 3)
    (tmp_path / "trials").mkdir()
    (tmp_path / "draws.json").unlink()
    with pytest.raises(UserError, match=r"draws.json: is missing, and trials have begun"):
        draws_of(tmp_path, SEARCH, 3)
    for wrong in ([], {"cells": [0]}, {"cells": [3], "ties": [1]}, {"cells": [0, 1], "ties": [1]}):
        write_json(tmp_path / "draws.json", wrong)
        with pytest.raises(Damaged, match="expected what this program wrote there"):
            draws_of(tmp_path, SEARCH, 3)


# A trial


def test_each_trial_has_folders_of_its_own(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny("privacy.budget_epsilon=20", "tracking.wandb=offline", "tracking.live=true")
    one, other = (trial_config(config, CELL, tmp_path / name, tmp_path / "cache") for name in "ab")
    assert reuse._paths(one) != reuse._paths(other), "two trials of a cell would be one training"
    for name in ("outputs", "ledger", "index"):
        assert getattr(one.paths, name) != getattr(other.paths, name) != getattr(config.paths, name)
    assert (one.privacy.noise_multiplier, one.privacy.epsilon) == (2.0, None)
    assert one.privacy.budget_epsilon is None and one.search.space is None
    assert one.tracking.wandb == "disabled" and not one.tracking.live


def trial(folder: Path, **changes: Any) -> Path:
    """The run directory of a trial that is as its cell planned, but for `changes`."""
    write_json(folder / "status.json", {"state": changes.get("state", "done")})
    write_json(folder / "result.json", {"metrics": {"dp_accuracy_cnn": changes.get("metric", 0.5)}})
    stated = {
        "noise_multiplier": 2.0, "sample_rate": 0.05, "steps": 4, "complete": True,
        "release": {"noise_multipliers": changes.get("scores", [3.7])},
    }  # fmt: skip
    write_json(folder / "privacy.json", stated | changes.get("stated", {}))
    (folder / "checkpoint").mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "failed"},
        {"metric": float("nan")},
        {"metric": "much"},
        {"stated": {"steps": 5}},
        {"stated": {"noise_multiplier": 1.9}},
        {"stated": {"sample_rate": 0.06}},
        {"stated": {"complete": False}},
        {"scores": [3.7, 3.7]},
        {"scores": [1.0]},
    ],
)
def test_a_trial_that_spent_more_than_its_cell_planned_is_the_worst(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "begun", lambda folder: 4)
    assert score_of(trial(tmp_path), CELL, SCORE, "dp_accuracy_cnn") == 0.5
    assert score_of(trial(tmp_path, **changes), CELL, SCORE, "dp_accuracy_cnn") is None
    # Also by its record of begun steps alone, whatever it states.
    monkeypatch.setattr(searching, "begun", lambda folder: 5)
    assert score_of(trial(tmp_path), CELL, SCORE, "dp_accuracy_cnn") is None


def test_a_trial_without_records_is_the_worst(tmp_path: Path) -> None:
    assert score_of(tmp_path, CELL, SCORE, "dp_accuracy_cnn") is None
    (trial(tmp_path) / "privacy.json").write_text(json.dumps([1]))
    assert score_of(tmp_path, CELL, SCORE, "dp_accuracy_cnn") is None


def test_of_equal_scores_the_place_does_not_decide() -> None:
    assert best([0.4, 0.7, 0.7], [9, 1, 2]) == 2 and best([0.7, 0.7, 0.4], [2, 1, 9]) == 0
    assert best([None, -1.0], [2, 1]) == 1 and best([None, None], [2, 1]) is None


def test_the_target_is_for_whoever_may_be_in_both_sets(tiny: Callable[..., Config]) -> None:
    assert strictest(tiny()) == ("both",)
    persons = composed("experiment=letters_by_writer")
    assert persons.privacy.unit == "person" and strictest(persons) == ("training", "held_out")


def test_a_run_asked_for_alone_is_no_search(tiny: Callable[..., Config]) -> None:
    from dp_lora.jobs.stages import run

    with pytest.raises(UserError, match="expected -m sweep=private_search"):
        run(tiny("search.space={lora.rank:[2,4]}"))


def test_an_adapter_of_a_search_starts_no_training(tmp_path: Path) -> None:
    from dp_lora.jobs.start import _refuse_winner

    write_json(tmp_path / "privacy.json", {"search": {}})
    with pytest.raises(UserError, match="winner of a private search"):
        _refuse_winner(tmp_path)
    assert read_json(tmp_path / "privacy.json") == {"search": {}}
