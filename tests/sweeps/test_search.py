"""Private searches from end to end: what they release and charge, and what no kill changes."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dp_lora.commands.export import export
from dp_lora.config.load import read_config
from dp_lora.config.schema import Config
from dp_lora.errors import SweepFailed, UserError
from dp_lora.jobs import searching, stages
from dp_lora.jobs.release import release_in
from dp_lora.privacy.ledger import Ledger, spent
from dp_lora.privacy.selection import SEARCHED_BY, Search
from dp_lora.storage.files import read_json, write_json
from sweeps import search as driver
from sweeps.bill import bill
from sweeps.folders import find
from sweeps.search import PrivateSearch
from tests.builders.searches import RANKS, Inline, copying, search_in
from tests.builders.tiny import composed, words


class Killed(BaseException):
    """The end of a process at any place."""


@pytest.fixture(scope="module")
def configure(cache: Path) -> Callable[[Path], Config]:
    """The configuration of a search in a folder of its own."""

    def of(folder: Path) -> Config:
        return composed(*words(cache, folder / "outputs"), "evaluation=release", "train.max_steps=2")

    return of


@pytest.fixture(scope="module")
def made(
    configure: Callable[[Path], Config], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PrivateSearch, dict[int, Path]]]:
    """A search whose trials were really trained, one of each rank, and their directories."""
    search = search_in(configure(tmp_path_factory.mktemp("made")))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(driver, "cluster_of", lambda settings, ledger: Inline(ledger, stages.run))
        patched.setattr(searching, "drawn_number", lambda *given: len(RANKS))
        patched.setattr(searching.secrets, "randbelow", _in_turn())
        search.run()
        trials = search.private / "trials"
        directories = {rank: next((trials / str(i) / "default").iterdir()) for i, rank in enumerate(RANKS)}
        yield search, directories


def _in_turn() -> Callable[[int], int]:
    turn = iter(range(100))
    return lambda cells: next(turn) % cells


@pytest.fixture
def quick(
    made: tuple[PrivateSearch, dict[int, Path]],
    configure: Callable[[Path], Config],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., PrivateSearch]:
    """A search in a new folder whose trials take the trainings of `made`, with scores of their own."""
    images = made[0]._images()
    plan = functools.cache(lambda: driver.plan_of_search(made[0].base, made[0].cells, len(images.train)))
    planned = plan()
    monkeypatch.setattr(driver, "plan_of_search", lambda *given: planned)
    monkeypatch.setattr(PrivateSearch, "_images", lambda self: images)

    def of(*scores: float, name: str = "search", **privacy: Any) -> PrivateSearch:
        config = configure(tmp_path / name)
        config = replace(config, privacy=replace(config.privacy, **privacy))
        job = copying(made[1], lambda trial: scores[int(trial)])
        monkeypatch.setattr(driver, "cluster_of", lambda settings, ledger: Inline(ledger, job))
        monkeypatch.setattr(searching, "drawn_number", lambda *given: len(scores))
        return search_in(config)

    return of


def released(search: PrivateSearch) -> Path:
    return search.folder / str(read_json(search.private / "outcome.json")["released"])


def charges(search: PrivateSearch) -> list[Any]:
    assert search.base.paths.ledger is not None
    return Ledger(Path(search.base.paths.ledger)).charges()


# What comes out


def test_the_winner_states_what_the_search_spent(
    made: tuple[PrivateSearch, dict[int, Path]], tmp_path: Path
) -> None:
    search, _ = made
    directory = released(search)
    (charge,) = charges(search)
    record = read_json(directory / "privacy.json")
    epsilon = record["search"]["epsilon"]
    assert charge.search == Search.from_dict(record["search"]) and charge.private
    assert {of: charge.search.epsilon(1e-5, of) for of in epsilon} == pytest.approx(epsilon)
    assert record["epsilon"] == epsilon["training"] < epsilon["both"] <= 10 < epsilon["both"] * 1.01
    assert record["release"]["epsilon"] == epsilon["held_out"]
    assert record["release"]["with_training"]["epsilon"] == epsilon["both"]
    assert "epsilon_by_accountant" not in record and record["accountant"] == SEARCHED_BY
    card = (directory / "adapter" / "README.md").read_text()
    assert f"epsilon {epsilon['training']:.2f}"[:-1] in card and "best of a private search" in card
    # What leaves has all of it too.
    left = export(directory, tmp_path / "exported")
    assert read_json(left / "privacy.json")["search"]["epsilon"] == epsilon
    assert read_json(left / "result.json")["metrics"].keys() == {"dp_accuracy_cnn"}
    # It is a run as any other: its settings can be read, and the noise in them is that of a trial.
    noise = {cell["noise_multiplier"] for cell in record["search"]["cells"]}
    assert read_config(directory / "config.yaml").privacy.noise_multiplier in noise
    with pytest.raises(UserError, match="winner of a private search"):
        release_in(directory, None, None, None, device="cpu", say=print)  # type: ignore[arg-type]


def test_the_bill_counts_a_search_as_a_whole(made: tuple[PrivateSearch, dict[int, Path]]) -> None:
    search, trials = made
    (found,) = bill([released(search)]).sets
    (charge,) = charges(search)
    assert found.searches == 1 and found.runs == 1 and found.best_of_epsilon is None
    assert found.private_epsilon == found.largest_epsilon == spent([charge], 1e-5).epsilon
    assert found.ledger_runs == 1 and found.ledger_epsilon == found.private_epsilon
    assert any("1 private search among them" in line for line in bill([released(search)]).lines())
    # One trial alone would be less, and no table has a row of it.
    assert bill([trials[2]]).sets[0].private_epsilon != found.private_epsilon
    with pytest.raises(UserError, match="trials of a private search"):
        find([search.private / "launch"])
    with pytest.raises(UserError, match="no sweep and no run"):
        find([search.folder])


def test_nothing_released_tells_the_number_the_losers_or_the_place(
    quick: Callable[..., PrivateSearch], capfd: pytest.CaptureFixture[str]
) -> None:
    scores = (0.123456789, 0.987654321, 0.23456789, -1.0, 0.345678912)
    search = quick(*scores)
    search.run()
    said = "".join(capfd.readouterr())
    content = {path: path.read_bytes() for path in released(search).rglob("*") if path.is_file()}
    content[Path("said")] = said.encode()
    ledger = Path(str(search.base.paths.ledger))
    content[ledger] = ledger.read_bytes()
    assert read_json(released(search) / "result.json")["metrics"]["dp_accuracy_cnn"] == scores[1]
    for path, found in content.items():
        for private in (
            b"0.1234567",
            b"0.2345678",
            b"0.3456789",
            b"trials/",
            b"trial1",
            b"draws.json",
            b"/private",
        ):
            assert private not in found, (path, private)
    # One and the same for any number of trials, but for what is random in it.
    other = quick(0.987654321, name="other")
    other.run()

    def outline(one: PrivateSearch) -> list[str]:
        files = sorted(
            str(path.relative_to(one.folder / "released")) for path in (one.folder / "released").rglob("*")
        )
        return [name.replace("rank=2", "").replace("rank=4", "")[:-8] for name in files if "/" not in name]

    lines = [Path(str(one.base.paths.ledger)).read_text().count("\n") for one in (search, other)]
    assert outline(search) == outline(other) and lines == [2, 2]
    assert said.count("\n") == "".join(capfd.readouterr()).count("\n")


def test_what_is_private_can_be_entered_by_its_owner_alone(
    made: tuple[PrivateSearch, dict[int, Path]],
) -> None:
    search, _ = made
    for folder in (search.folder, search.private, released(search)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(search.folder.rglob("wandb"))
    for path in search.private.glob("*.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


# What counts as the worst, and what releases nothing


def test_a_failed_trial_is_the_worst_and_is_never_run_again(quick: Callable[..., PrivateSearch]) -> None:
    search = quick(-1.0, 0.2, -1.0)
    search.run()
    assert read_json(released(search) / "result.json")["metrics"]["dp_accuracy_cnn"] == 0.2
    assert read_json(search.private / "failed.json") == ["trial0", "trial2"]


@pytest.mark.parametrize("scores", [(), (-1.0, -1.0), (float("nan"),)])
def test_a_search_without_a_winner_releases_nothing_and_stays_charged(
    quick: Callable[..., PrivateSearch], scores: tuple[float, ...]
) -> None:
    for _ in range(2):
        search = quick(*scores)
        with pytest.raises(SweepFailed, match=r"releases nothing: .*; it stays charged$"):
            search.run()
    assert not (search.folder / "released").exists()
    (charge,) = charges(search)
    assert charge.search is not None and spent([charge], 1e-5).epsilon > 9


def test_a_budget_without_room_is_refused_before_anything_is_drawn(
    quick: Callable[..., PrivateSearch],
) -> None:
    search = quick(0.5, budget_epsilon=9.0)
    with pytest.raises(UserError, match=r"privacy.budget_epsilon=9"):
        search.run()
    assert not charges(search) and not (search.private / "draws.json").exists()
    # The bound of the search itself is what a budget asks for.
    quick(0.5, budget_epsilon=10.0).run()


def test_draws_that_are_gone_end_the_search(quick: Callable[..., PrivateSearch]) -> None:
    search = quick(0.5, 0.6)
    search.run()
    (search.private / "draws.json").unlink()
    (search.private / "outcome.json").unlink()
    with pytest.raises(UserError, match=r"draws.json: is missing, and trials have begun"):
        search.run()


def test_a_copy_of_a_search_releases_nothing(quick: Callable[..., PrivateSearch], tmp_path: Path) -> None:
    import shutil

    search = quick(0.5, 0.6)
    before = tmp_path / "before"
    real = search._run_trials

    def copied(trials: Any) -> Any:
        shutil.copytree(search.private, before)
        return real(trials)

    search._run_trials = copied  # type: ignore[method-assign]
    search.run()
    shutil.rmtree(search.folder)
    before.parent.mkdir(exist_ok=True)
    search.folder.mkdir()
    shutil.copytree(before, search.private)
    with pytest.raises(UserError, match="gone on elsewhere"):
        quick(0.5, 0.6).run()
    assert not (search.folder / "released").exists()


def test_another_configuration_is_another_search(quick: Callable[..., PrivateSearch]) -> None:
    quick(0.5).run()
    search = quick(0.5)
    (search.private / "outcome.json").unlink()
    record = read_json(search.private / "plan.json")
    write_json(search.private / "plan.json", {**record, "expected_trials": 9.0})
    with pytest.raises(UserError, match=r"begun with another configuration.*hydra.launcher.name"):
        search.run()


# Kills


KILLED_AT = (
    "plan.json", "charge.json", "sets.jsonl", "head", "draws.json", "sweep.json", "trial0.json",
    "trial1.json",
    "privacy.json", "README.md", "status.json", "lora.rank=4", "outcome.json",
)  # fmt: skip
"""Files, and a folder, that a search writes, in their order."""


@pytest.mark.parametrize("name", KILLED_AT)
@pytest.mark.parametrize("late", [False, True])
def test_whatever_dies_nothing_is_drawn_or_charged_twice(
    quick: Callable[..., PrivateSearch], name: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill just before and just after each of the writes, and the same command again."""
    real, scores, dies = os.replace, (0.3, 0.7), [True]

    def replace_or_die(source: Any, target: Any, **options: Any) -> None:
        at = dies[0] and Path(target).name.startswith(name)
        dies[0] = dies[0] and not at
        if not at or late:
            real(source, target, **options)
        if at:
            raise Killed

    search = quick(*scores)
    monkeypatch.setattr(searching.secrets, "randbelow", lambda cells: next(ranks) % cells)
    ranks = iter(range(100))
    monkeypatch.setattr(os, "replace", replace_or_die)
    with pytest.raises(Killed):
        search.run()
    draws = search.private / "draws.json"
    before = draws.read_bytes() if draws.exists() else None
    if before is None:
        assert not (search.private / "trials").exists()
    else:
        assert len(charges(search)) == 1, "drawn before it was charged"
    again = quick(*scores)
    # What would be drawn now is not what was drawn.
    ranks = iter(range(1, 100)) if before is not None else iter(range(100))
    again.run()
    assert before is None or draws.read_bytes() == before
    (charge,) = charges(search)
    assert charge.search is not None
    for number, cell in enumerate(read_json(draws)["cells"]):
        starts = (search.private / "trials" / str(number) / "starts.jsonl").read_text().splitlines()
        assert set(starts) == {f'{{"rank": {RANKS[cell]}}}'}
    assert read_json(released(search) / "result.json")["metrics"]["dp_accuracy_cnn"] == 0.7
    assert len(list((search.folder / "released" / "default").iterdir())) == 1
