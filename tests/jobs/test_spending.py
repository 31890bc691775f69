"""A job is charged before it begins and only once; public data never; a budget refuses what would pass it."""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from dp_lora.__main__ import main
from dp_lora.config.checks import check
from dp_lora.config.identity import fingerprint, run_directory
from dp_lora.config.schema import Config, DataConfig, PathsConfig
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.jobs import spending, stages, summary
from dp_lora.jobs.spending import charge_release, charged, ledger_path, refusal
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.renyi import least_budget, renyi_divergences
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import append_line, read_json, read_lines
from dp_lora.training.receipts import read_receipt
from dp_lora.training.signals import Interrupted, Preempted
from tests.builders.image_sets import private_images
from tests.builders.tiny import once, words

FINETUNE = "stages=[finetune]"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    places = {name: str(tmp_path / name) for name in ("outputs", "data", "index")}
    paths = PathsConfig(**places)
    return Config(data=DataConfig("mnist5k"), paths=paths)


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(
        num_examples=1000, expected_batch_size=100, steps=80, noise_multiplier=1.0, target_epsilon=None,
        delta=1e-5, noise_multiplicity=1, max_grad_norm=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def images() -> ImageSplits:
    return private_images()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoint"
    path.mkdir(parents=True)
    return path


def begin_steps(folder: Path, number: int) -> None:
    for step in range(number):
        append_line(folder / "executions.jsonl", {"step": step, "execution": f"x{step}"})


def steps_of(config: Config) -> list[int]:
    return [charge.mechanism.steps for charge in Ledger(ledger_path(config)).charges()]


# Where the ledger is


def test_the_ledger_is_beside_the_data(tmp_path: Path) -> None:
    config = Config(data=DataConfig("mnist"), paths=PathsConfig(data=str(tmp_path / "data")))
    assert ledger_path(config) == tmp_path / "data" / "privacy_ledger.jsonl"
    config.data = DataConfig("imagefolder", source=str(tmp_path / "patients"))
    (tmp_path / "patients").mkdir()
    assert ledger_path(config) == tmp_path / "patients.privacy_ledger.jsonl"
    (tmp_path / "link").symlink_to(tmp_path / "patients")
    config.data.source = str(tmp_path / "link")
    assert ledger_path(config) == tmp_path / "patients.privacy_ledger.jsonl", (
        "the same images, the same ledger"
    )
    config.data = DataConfig("mnist", source="ylecun/mnist")
    assert ledger_path(config) == tmp_path / "data" / "privacy_ledger.jsonl", "a name on the hub"
    config.paths.ledger = str(tmp_path / "elsewhere.jsonl")
    assert ledger_path(config) == tmp_path / "elsewhere.jsonl"


def test_a_ledger_is_of_one_set_where_it_lies_beside_the_images(tmp_path: Path) -> None:
    source, path = str(tmp_path / "patients"), tmp_path / "patients.privacy_ledger.jsonl"
    assert spending.is_beside(path, source) and not spending.is_beside(path, None)
    assert not spending.is_beside(tmp_path / "privacy_ledger.jsonl", source)


def test_ledger_and_budget_do_not_change_which_run_it_is(config: Config) -> None:
    before, directory = fingerprint(config), run_directory(config, [])
    config.privacy.budget_epsilon, config.paths.ledger = 3.0, "/elsewhere"
    assert fingerprint(config) == before
    assert run_directory(config, ["privacy.budget_epsilon=3", "paths.ledger=/elsewhere"]) == directory
    for wrong in (0.0, -1.0, math.inf, math.nan):
        config.privacy.budget_epsilon = wrong
        with pytest.raises(UserError, match=r"privacy\.budget_epsilon=.*expected a finite number above 0"):
            check(dataclasses.replace(config, public_data=DataConfig("letters", public=True)))


# Charging


def test_a_run_is_charged_its_plan_first_and_what_it_began_at_last(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    with charged(config, plan, folder, images):
        assert steps_of(config) == [80]
        begin_steps(folder, 80)
    assert steps_of(config) == [80]
    (line,) = Ledger(ledger_path(config)).charges()
    assert (line.private_set, line.private, line.mechanism) == ("mnist", True, plan.mechanism)


@pytest.mark.parametrize(
    ("error", "charge"), [(ValueError, 30), (Interrupted, 30), (Preempted, 80), (SystemExit, 30)]
)
def test_a_run_that_ends_early_is_charged_what_it_began_unless_it_will_go_on(
    error: type[BaseException],
    charge: int,
    config: Config,
    plan: PrivacyPlan,
    folder: Path,
    images: ImageSplits,
) -> None:
    def stop() -> None:
        begin_steps(folder, 30)
        raise error

    with pytest.raises(error), charged(config, plan, folder, images):
        stop()
    assert steps_of(config) == [charge]
    with charged(config, plan, folder, images):
        assert steps_of(config) == [80], "the same run, with all that it may still begin"
        begin_steps(folder, 80)
    assert steps_of(config) == [80]


def test_a_run_whose_directory_was_removed_is_another_run(
    config: Config, plan: PrivacyPlan, tmp_path: Path, images: ImageSplits
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with charged(config, plan, tmp_path / name, images):
            begin_steps(tmp_path / name, 80)
    assert steps_of(config) == [80, 80]


@pytest.mark.parametrize("boundary", ["before the charge", "after the charge"])
def test_a_crash_around_the_charge_charges_once(
    boundary: str,
    config: Config,
    plan: PrivacyPlan,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    images: ImageSplits,
) -> None:
    enter = Ledger.enter

    def crash(*args: Any) -> str:
        if boundary == "after the charge":
            enter(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "enter", crash)
        with pytest.raises(KeyboardInterrupt), charged(config, plan, folder, images):
            raise AssertionError("nothing may begin that was not charged")
    with charged(config, plan, folder, images):
        begin_steps(folder, 80)
    assert steps_of(config) == [80]


def test_public_data_is_not_charged(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    config.data.public = True
    config.privacy.budget_epsilon = 1e-3
    assert refusal(config, plan, folder.parent, images) is None
    with charged(config, plan, folder, images):
        pass
    assert not ledger_path(config).exists() and not list(folder.iterdir())
    assert summary.line_of_all_runs(config, 1e-5, images) is None


def test_noise_that_a_seed_gives_away_is_charged_as_no_privacy(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    config.privacy.insecure_seed = 3
    with charged(config, plan, folder, images):
        begin_steps(folder, 80)
    (line,) = Ledger(ledger_path(config)).charges()
    assert not line.private
    config.privacy.insecure_seed, config.privacy.budget_epsilon = None, 1e6
    reason = refusal(config, plan, folder.parent / "another", images)
    assert reason is not None and "1 run on mnist spent epsilon inf" in reason


def test_a_release_on_held_out_images_is_charged_once_and_asks_the_budget(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    release = Mechanism(4.0, 1.0, 1)
    with charged(config, plan, folder, images):
        begin_steps(folder, 80)
    for number in (0, 0, 1):
        with charge_release(config, release, 1e-6, folder, number, images):
            pass
    assert [c.mechanism for c in Ledger(ledger_path(config)).charges()] == [plan.mechanism, release, release]
    config.privacy.budget_epsilon = 0.1
    with charge_release(config, release, 1e-6, folder, 1, images):
        pass
    third = charge_release(config, release, 1e-6, folder, 2, images)
    with pytest.raises(UserError, match=r"privacy\.budget_epsilon=0\.1: 3 runs on mnist"), third:
        raise AssertionError("it was made")
    config.data.public = True
    with charge_release(config, release, 1e-6, folder, 2, images):
        pass
    assert len(Ledger(ledger_path(config)).charges()) == 3


def test_a_run_that_moves_to_another_ledger_is_charged_there_too(
    config: Config, plan: PrivacyPlan, folder: Path, tmp_path: Path, images: ImageSplits
) -> None:
    with pytest.raises(Preempted), charged(config, plan, folder, images):
        raise Preempted
    receipt = read_receipt(folder)
    config.paths.ledger = str(tmp_path / "elsewhere.jsonl")
    with charged(config, plan, folder, images):
        begin_steps(folder, 80)
    moved = read_receipt(folder)
    assert receipt is not None and moved is not None and receipt.run == moved.run
    assert steps_of(config) == [80]


def test_a_run_whose_line_was_cut_off_does_not_go_on(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    with pytest.raises(Preempted), charged(config, plan, folder, images):
        raise Preempted
    ledger_path(config).write_text("")
    with pytest.raises(UserError, match="edited or replaced"), charged(config, plan, folder, images):
        raise AssertionError("it went on")


# The budget


def epsilon_of(plan: PrivacyPlan, runs: int) -> float:
    from dp_lora.privacy.accounting import composed

    return composed(
        [Mechanism(plan.noise_multiplier, plan.sample_rate, plan.steps * runs)], plan.delta
    ).epsilon


def budget_for(plan: PrivacyPlan, runs: int, above: float = 0.0) -> float:
    """The smallest with room for so many runs that are chosen one after the other."""
    one = Mechanism(plan.noise_multiplier, plan.sample_rate, plan.steps)
    return least_budget(renyi_divergences([one] * runs), plan.delta, above)


def test_a_budget_for_two_runs_refuses_the_third_before_anything_is_written(
    config: Config, plan: PrivacyPlan, tmp_path: Path, images: ImageSplits
) -> None:
    config.privacy.budget_epsilon = budget_for(plan, 2)
    assert epsilon_of(plan, 2) < budget_for(plan, 2) < 1.25 * epsilon_of(plan, 2)
    for name in ("one", "two"):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        assert refusal(config, plan, tmp_path / name, images) is None
        with charged(config, plan, tmp_path / name / "checkpoint", images):
            begin_steps(tmp_path / name / "checkpoint", 80)
    before = ledger_path(config).read_bytes()
    reason = refusal(config, plan, tmp_path / "three", images)
    assert reason is not None and "\n" not in reason
    for word in (
        "privacy.budget_epsilon=",
        "2 runs on mnist",
        f"would make it {budget_for(plan, 3, above=budget_for(plan, 2)):.4g}",
        "1e-05",
        "expected",
    ):
        assert word in reason
    assert not (tmp_path / "three").exists() and ledger_path(config).read_bytes() == before
    assert refusal(config, plan, tmp_path / "two", images) is None, "a run that is charged already"
    other = dataclasses.replace(config, data=DataConfig("digits"))
    assert refusal(other, plan, tmp_path / "three", private_images(1)) is None, "another set in this ledger"
    config.privacy.budget_epsilon = None
    assert refusal(config, plan, tmp_path / "three", images) is None


def test_of_two_that_begin_at_once_one_finds_the_budget_spent(
    config: Config, plan: PrivacyPlan, tmp_path: Path, images: ImageSplits
) -> None:
    config.privacy.budget_epsilon = epsilon_of(plan, 1) * 1.01
    outcomes: list[str] = []
    ready = threading.Barrier(2)

    def work(name: str) -> None:
        (tmp_path / name).mkdir()
        assert refusal(config, plan, tmp_path / name, images) is None
        ready.wait()
        try:
            with charged(config, plan, tmp_path / name, images):
                begin_steps(tmp_path / name, 80)
                outcomes.append("ran")
        except UserError:
            outcomes.append("refused")

    workers = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(outcomes) == ["ran", "refused"] and steps_of(config) == [80]


def test_an_edited_ledger_refuses_a_job(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    with charged(config, plan, folder, images):
        begin_steps(folder, 80)
    path = ledger_path(config)
    path.write_text(path.read_text().replace('"steps": 80', '"steps": 8'))
    reason = refusal(config, plan, folder.parent / "another", images)
    assert reason is not None and "line 1: the ledger was edited" in reason


def test_a_ledger_that_has_no_place_refuses_a_job_before_it_begins(
    config: Config, plan: PrivacyPlan, tmp_path: Path, images: ImageSplits
) -> None:
    (tmp_path / "file").touch()
    config.paths.ledger = str(tmp_path / "file" / "ledger.jsonl")
    reason = refusal(config, plan, tmp_path / "run", images)
    assert reason is not None and reason.startswith(f"paths.ledger={config.paths.ledger}: ")


# The whole job


def call(*given: str) -> None:
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["dp-lora", *once(*given)])
        main()
    GlobalHydra.instance().clear()


@pytest.mark.usefixtures("unchecked")
def test_jobs_of_one_set_add_up_and_a_budget_stops_them(cache: Path, tmp_path: Path, capsys: Any) -> None:
    given = [*words(cache, tmp_path / "outputs"), FINETUNE, f"paths.ledger={tmp_path / 'ledger.jsonl'}"]
    given += ["train.max_steps=2", "epsilon=none", "privacy.noise_multiplier=2"]
    call(*given)
    assert "all runs" not in capsys.readouterr().out
    call(*given, "seed=1")
    assert "of 2 runs on digits together" in capsys.readouterr().out
    lines = read_lines(tmp_path / "ledger.jsonl")
    told = [(line["steps"], line["set"], line["open"]) for line in lines]
    assert told == [(2, "digits", True), (2, "digits", False)] * 2, "each start and each end"
    call(*given, "seed=1")
    assert read_lines(tmp_path / "ledger.jsonl") == lines, "a finished job is not charged again"
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(*given, "seed=2", "privacy.budget_epsilon=0.1")
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in said
    assert said.startswith("dp-lora: privacy.budget_epsilon=0.1: 2 runs on digits spent epsilon 0.")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("unchecked")
def test_a_failing_job_is_charged_the_steps_that_it_began(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calls = (
        tiny(FINETUNE, "train.checkpoint_minutes=0", "epsilon=none", "privacy.noise_multiplier=2"),
        0,
    )
    noised = algorithm.noised_mean

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        return noised(*args)

    with monkeypatch.context() as patched:
        patched.setattr(algorithm, "noised_mean", fail)
        with pytest.raises(MemoryError):
            stages.run(config)
    (charge,) = Ledger(ledger_path(config)).charges()
    assert charge.mechanism.steps == 3
    directory = Path(stages.run(config)["directory"])
    (charge,) = Ledger(ledger_path(config)).charges()
    assert charge.mechanism.steps == 4 == read_json(directory / "privacy.json")["steps"]
    assert (directory / "checkpoint" / "charge.json").stat().st_mode & 0o777 == 0o600
