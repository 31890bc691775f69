"""Private searches before anything runs: what `plan` says, and what is refused in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from dp_lora.__main__ import main
from dp_lora.privacy.search_plan import SearchPlan
from dp_lora.privacy.selection import Search
from dp_lora.privacy.subsampled_gaussian import Mechanism
from sweeps import search_cost
from tests.builders.tiny import TINY, once

SPACE = "search.space={lora.rank:[2,4],train.learning_rate:[0.01,0.02]}"


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., tuple[int, str]]:
    """Runs a search, with `--dry-run` unless told otherwise: the exit status and what was said."""
    monkeypatch.chdir(tmp_path)
    cell, score = Mechanism(2.0, 0.05, 4), Mechanism(3.7, 1.0, 1)
    plan = SearchPlan(Search((cell,) * 4, score, "Poisson", 8.0), (cell,) * 4, 3.0, 10.0, 1e-5)
    monkeypatch.setattr(search_cost, "plan_of_search", lambda *given: plan)

    def call(*given: str, dry: bool = True) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        words = once(*TINY, f"paths.cache={tmp_path}", "sweep=private_search", *given)
        monkeypatch.setattr(sys, "argv", ["dp-lora", "-m", *words, *(["--dry-run"] if dry else [])])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            GlobalHydra.instance().clear()
        return status, capfd.readouterr().err

    return call


def test_the_plan_says_what_it_takes_beside_the_alternatives(
    say: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rate = {"kind": ("tiny8", "cpu", 0, 1), "seconds_per_draw": 1.0, "rest_s": 3600.0}
    monkeypatch.setattr(search_cost, "rates", lambda folder: [rate])
    status, said = say(SPACE)
    assert status == 0 and not (tmp_path / "outputs").exists()
    assert (
        "4 cells; the number of trials is drawn and stays private: Poisson, mean 8, at most 13 in 95 %"
        in said
    )
    numbers = [
        float(n) for n in re.findall(r"epsilon ([\d.]+) for a training|([\d.]+) for somebody", said)[0] if n
    ]
    assert numbers and "instead, all 4 cells once and all of them released: epsilon" in said
    assert "instead, one run of values given beforehand: epsilon 10" in said
    # Four steps of 60 draws, twice each, and an hour: 1.13 h a trial, 8 trials; 13 at most.
    hours = re.search(
        r"time: ([\d.]+) h expected, ([\d.]+) h in 95 % of searches.*once ([\d.]+) h, one run ([\d.]+)", said
    )
    assert hours is not None
    expected, late, grid, one = map(float, hours.groups())
    assert expected == pytest.approx(8 * one, rel=0.01) and grid == pytest.approx(4 * one, rel=0.01)
    assert late == pytest.approx(13 * one, rel=0.01)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ((), "expected search.space too"),
        (("search.space={lora.rank:4}",), "search.space={'lora.rank': 4}: expected options with lists"),
        ((SPACE, "seed=0,1"), "a search is one job"),
        ((SPACE, "lora.rank=8"), "lora.rank=8: search.space draws it"),
        (("search.space={seed:[0,1]}",), "search.space: seed differs between cells"),
        (("search.space={evaluation.release_epsilon:[1,2]}",), "search.space: evaluation differs"),
        ((SPACE, "epsilon=inf"), "expected a finite number, which the whole search meets"),
        (
            (SPACE, "privacy.insecure_seed=1"),
            "privacy.insecure_seed=1 with sweep=private_search: expected null",
        ),
        (
            (SPACE, "evaluation=default"),
            "expected dp, so that no score looks at private images without noise",
        ),
        ((SPACE, "data.public=true"), "public ones need no private search"),
        ((SPACE, "search.score=dp_accuracy_wrn"), "expected one of dp_accuracy_cnn with these settings"),
        ((SPACE, "search.distribution=poisson"), "did you mean 'Poisson'?"),
        ((SPACE, "search.expected_trials=0.5"), "search.expected_trials=0.5: expected at least 1"),
    ],
)
def test_what_makes_no_private_search_is_one_line(
    given: tuple[str, ...], line: str, say: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    status, said = say(*given)
    assert status == 2 and line in said and said.count("\n") == 1, said
    assert not (tmp_path / "outputs").exists()


def test_a_model_that_is_not_there_and_a_search_without_its_driver_are_refused(
    say: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    status, said = say(SPACE, "hydra.launcher.detach=true", dry=False)
    assert status == 2 and "hydra.launcher.detach=true" in said and "expected false" in said
    status, said = say(SPACE, dry=False)
    assert status == 2 and "is not pre-trained yet" in said and "stages=[pretrain]" in said
    assert not list(tmp_path.rglob("draws.json")) and not list(tmp_path.rglob("charge.json"))
