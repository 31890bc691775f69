"""Copies of runs and of sets, as their charges see them: each is charged, and what is no copy goes on."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from dp_lora.config.identity import fingerprint, pretrained_fingerprint
from dp_lora.config.schema import Config, DataConfig, PathsConfig
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.jobs.begun import begun_by_all
from dp_lora.jobs.spending import (
    charge_release,
    charged,
    ledger_path,
    refusal,
)
from dp_lora.jobs.summary import line_of_all_runs
from dp_lora.privacy.accounting import composed
from dp_lora.privacy.ledger import Charge, Ledger
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import append_line, read_json, read_lines, write_json
from dp_lora.training.receipts import RECEIPT, read_receipt
from dp_lora.training.signals import Preempted
from sweeps.bill import bill
from tests.builders.image_sets import pixels, private_images, splits_of

pytestmark = pytest.mark.usefixtures("unchecked")

RELEASE = Mechanism(4.0, 1.0, 1)
IMAGES = private_images(7)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    places = {name: str(tmp_path / name) for name in ("outputs", "data", "index")}
    return Config(data=DataConfig("mnist5k"), paths=PathsConfig(**places))


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(
        num_examples=1000, expected_batch_size=100, steps=80, noise_multiplier=1.0, target_epsilon=None,
        delta=1e-5, noise_multiplicity=1, max_grad_norm=0.1,
    )  # fmt: skip


def preempted(config: Config, plan: PrivacyPlan, folder: Path, steps: int = 30, first: int = 0) -> None:
    """A run that a cluster takes off its machine."""

    def train() -> None:
        with charged(config, plan, folder, IMAGES) as note:
            executions(folder, range(first, steps))
            note()
            raise Preempted

    with pytest.raises(Preempted):
        train()


def executions(folder: Path, numbers: range, name: str = "x") -> None:
    for step in numbers:
        append_line(folder / "executions.jsonl", {"step": step, "execution": f"{name}{step}"})


@pytest.mark.parametrize("ends", [KeyboardInterrupt, None])
@pytest.mark.parametrize("how", ["moved", "removed", "cut"])
def test_a_record_that_is_lost_under_way_stays_charged_with_the_whole_plan(
    how: str, ends: type[BaseException] | None, config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    """What was logged of the steps has left already."""
    folder = tmp_path / "run" / "checkpoint"
    folder.mkdir(parents=True)

    def train() -> None:
        with charged(config, plan, folder, IMAGES) as note:
            for step in range(30):
                executions(folder, range(step, step + 1))
                note()
            record = folder / "executions.jsonl"
            if how == "moved":
                folder.parent.rename(tmp_path / "elsewhere")
            elif how == "removed":
                record.unlink()
            else:
                record.write_bytes(record.read_bytes()[:40])
            if ends is not None:
                raise ends
            with pytest.raises(UserError, match="was moved, removed or cut while the run went on"):
                note()

    with nullcontext() if ends is None else pytest.raises(ends):
        train()
    (charge,) = charges(config)
    assert charge.mechanism.steps == plan.steps
    assert how != "moved" or not folder.exists()


def trained(config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits = IMAGES) -> Path:
    """A run that has ended."""
    folder.mkdir(parents=True)
    with charged(config, plan, folder, images):
        executions(folder, range(80))
    return folder


def charges(config: Config) -> list[Charge]:
    return Ledger(ledger_path(config)).charges()


# Releases


def test_of_two_copies_one_releases_and_the_other_is_refused(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    first = trained(config, plan, tmp_path / "a" / "checkpoint")
    second = tmp_path / "b" / "checkpoint"
    shutil.copytree(first, second)
    with charge_release(config, RELEASE, 1e-5, first, 0, IMAGES):
        pass
    config.evaluation.release = "dp"
    (second.parent / "adapter").mkdir()
    reason = refusal(config, plan, second.parent, IMAGES)
    assert reason is not None and "gone on elsewhere" in reason and "\n" not in reason
    with (
        pytest.raises(UserError, match="gone on elsewhere"),
        charge_release(config, RELEASE, 1e-5, second, 0, IMAGES),
    ):
        raise AssertionError("it was made")
    shutil.rmtree(second)
    with charge_release(config, RELEASE, 1e-5, second, 0, IMAGES):
        pass
    assert [c.mechanism for c in charges(config)] == [plan.mechanism, RELEASE, RELEASE]


def test_of_two_copies_that_release_at_once_one_may_show_what_it_made(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    first = trained(config, plan, tmp_path / "a" / "checkpoint")

    def release() -> None:
        with charge_release(config, RELEASE, 1e-5, first, 0, IMAGES):
            shutil.copytree(first, tmp_path / "b")
            with charge_release(config, RELEASE, 1e-5, tmp_path / "b", 0, IMAGES):
                pass

    with pytest.raises(UserError, match="gone on elsewhere"):
        release()
    assert [c.mechanism for c in charges(config)] == [plan.mechanism, RELEASE]


# What is no copy


def test_runs_and_ledgers_of_before_go_on(config: Config, plan: PrivacyPlan, tmp_path: Path) -> None:
    """A line without a nonce, and a receipt without one, as they were written before there were any."""
    folder, path = tmp_path / "run" / "checkpoint", ledger_path(config)
    folder.mkdir(parents=True)
    digest = Ledger(path).enter(Charge("0123456789abcdef", "mnist", plan.mechanism, 1e-5))
    assert "nonce" not in read_lines(path)[0]
    receipt = {"run": "0123456789abcdef", "private_set": "mnist", "ledger": str(path), "digest": digest}
    write_json(folder / "charge.json", receipt)
    executions(folder, range(30))
    shutil.copytree(folder, tmp_path / "copy")
    assert refusal(config, plan, folder.parent, IMAGES) is None
    with charged(config, plan, folder, IMAGES):
        executions(folder, range(30, 80))
    assert [(c.run, c.mechanism.steps) for c in charges(config)] == [("0123456789abcdef", 80)]
    with (
        pytest.raises(UserError, match="gone on elsewhere"),
        charged(config, plan, tmp_path / "copy", IMAGES),
    ):
        raise AssertionError("a copy of an old run is a copy too")


def test_a_directory_that_is_moved_goes_on(config: Config, plan: PrivacyPlan, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    preempted(config, plan, folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    with charged(config, plan, tmp_path / "elsewhere", IMAGES) as note:
        executions(tmp_path / "elsewhere", range(30, 80))
        note()
    assert [c.mechanism.steps for c in charges(config)] == [80]
    assert not list(ledger_path(config).parent.glob("*.jsonl.*")), "the mark is gone with the end of the run"


def test_a_mark_that_was_removed_or_edited_is_noticed(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    preempted(config, plan, tmp_path / "run", 0)
    (mark,) = ledger_path(config).parent.glob("*.jsonl.*")
    for act in (lambda: mark.write_text("{}"), mark.unlink):
        act()
        reason = refusal(config, plan, tmp_path / "no", IMAGES)
        assert reason is None, "other runs go on"
        with pytest.raises(UserError, match="edited"), charged(config, plan, tmp_path / "run", IMAGES):
            raise AssertionError("it went on")


def with_paths(config: Config, **paths: Path) -> Config:
    """The same job with other paths."""
    places = {**vars(config.paths), **{name: str(path) for name, path in paths.items()}}
    return Config(data=config.data, paths=PathsConfig(**places))


@pytest.mark.parametrize("place", ["ledger", "data"])
def test_a_copy_under_another_ledger_is_refused_by_the_index(
    place: str, config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    preempted(config, plan, first)
    shutil.copytree(first, second)
    with charged(config, plan, first, IMAGES):
        executions(first, range(30, 80))
    other = with_paths(config, **{place: tmp_path / "l"})
    elsewhere = pytest.raises(UserError, match=r"gone on elsewhere.*Its last charge is in .*paths\.ledger")
    with elsewhere, charged(other, plan, second, IMAGES):
        raise AssertionError("it trained for free")
    assert refusal(other, plan, tmp_path / "new", IMAGES) is None and not charges(other)
    # Who has neither the ledger nor the index cannot know, and charges the whole run.
    stranger = with_paths(config, **{place: tmp_path / "l", "index": tmp_path / "another index"})
    with charged(stranger, plan, second, IMAGES):
        executions(second, range(30, 80), "y")
    assert [c.mechanism.steps for c in (*charges(config), *charges(stranger))] == [80, 80]


def test_of_two_copies_with_their_ledgers_one_trains(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    """A project is copied as a whole: run, ledger and mark."""
    one, two = (with_paths(config, data=tmp_path / name / "data") for name in ("one", "two"))
    first, second = (tmp_path / name / "run" for name in ("one", "two"))
    preempted(one, plan, first)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with charged(one, plan, first, IMAGES):
        executions(first, range(30, 80))
    reason = refusal(two, plan, tmp_path / "two", IMAGES)
    assert reason is None, "another run of that project"
    with pytest.raises(UserError, match="gone on elsewhere"), charged(two, plan, second, IMAGES):
        raise AssertionError("it trained for free")
    shutil.rmtree(second)
    with charged(two, plan, second, IMAGES):
        executions(second, range(80))
    # Of both, as a third place on the same images sees them.
    found = line_of_all_runs(with_paths(config, data=tmp_path / "three"), 1e-5, IMAGES)
    assert found is not None and "of 2 runs" in found


def test_of_two_copies_with_their_ledgers_one_releases(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    one, two = (with_paths(config, data=tmp_path / name / "data") for name in ("one", "two"))
    first, second = (tmp_path / name / "run" for name in ("one", "two"))
    trained(one, plan, first)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with charge_release(one, RELEASE, 1e-5, first, 0, IMAGES):
        pass
    elsewhere = pytest.raises(UserError, match="gone on elsewhere")
    with elsewhere, charge_release(two, RELEASE, 1e-5, second, 0, IMAGES):
        raise AssertionError("it was made")


def test_a_backup_of_run_and_ledger_does_not_go_on_from_where_it_was(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    here = with_paths(config, data=tmp_path / "p" / "data")
    preempted(here, plan, tmp_path / "p" / "run")
    shutil.copytree(tmp_path / "p", tmp_path / "backup")
    preempted(here, plan, tmp_path / "p" / "run", 40, first=30)
    shutil.rmtree(tmp_path / "p")
    shutil.copytree(tmp_path / "backup", tmp_path / "p")
    elsewhere = pytest.raises(UserError, match="gone on elsewhere")
    with elsewhere, charged(here, plan, tmp_path / "p" / "run", IMAGES):
        raise AssertionError("it trained for free")


def test_a_record_that_lacks_steps_is_refused_before_the_job_begins(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    record = tmp_path / "run" / "checkpoint"
    preempted(config, plan, record)
    before = (record / "executions.jsonl").read_bytes()
    assert refusal(config, plan, tmp_path / "run", IMAGES) is None
    preempted(config, plan, record, 40, first=30)
    assert refusal(config, plan, tmp_path / "run", IMAGES) is None
    # The receipt of the last start beside the record of an earlier one.
    (record / "executions.jsonl").write_bytes(before)
    assert "gone on elsewhere" in str(refusal(config, plan, tmp_path / "run", IMAGES))


def test_a_run_goes_on_under_an_index_that_is_new(config: Config, plan: PrivacyPlan, tmp_path: Path) -> None:
    preempted(config, plan, tmp_path / "run")
    shutil.rmtree(tmp_path / "index")
    with charged(config, plan, tmp_path / "run", IMAGES) as note:
        executions(tmp_path / "run", range(30, 80))
        note()
    assert [c.mechanism.steps for c in charges(config)] == [80]


def test_the_lines_that_records_have_in_common_count_once(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abcd"]
    for folder in folders:
        folder.mkdir()
        executions(folder, range(30))
    executions(folders[1], range(30, 50))
    shutil.rmtree(folders[2])
    shutil.copytree(folders[1], folders[2])
    executions(folders[1], range(50, 60), "b")
    executions(folders[2], range(50, 60), "c")
    # 30 in all four, 20 in two of them, and ten more in each of those.
    assert begun_by_all(folders) == 30 + 20 + 10 + 10
    assert begun_by_all(folders[:1]) == 30 and begun_by_all([folders[0], folders[3]]) == 30


# Sets


def test_the_bill_of_a_set_and_its_moved_copy_is_one(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    """Three runs, each beside a ledger of its own: two on one set, the third on another one."""
    directories = []
    for name, seed in (("a", 41), ("moved", 41), ("other", 42)):
        directory = tmp_path / name
        images = splits_of(np.concatenate([pixels(seed, 9), pixels(50 + len(directories), 1)]))
        config.data = DataConfig("imagefolder", source=str(tmp_path / f"set_{name}"))
        (tmp_path / f"set_{name}").mkdir()
        trained(config, plan, directory / "checkpoint", images)
        told = {"planned_steps": 80, "complete": True, "reproducible_noise": False}
        write_json(directory / "privacy.json", {**plan.to_dict(), **told})
        write_json(directory / "config.yaml", {})
        directories.append(directory)
    both, other = bill(directories).sets
    assert (both.runs, both.ledger_runs, other.runs) == (2, 2, 1)
    assert both.epsilon == pytest.approx(composed([plan.mechanism] * 2, 1e-5).epsilon)


def test_another_place_for_the_data_is_the_same_set(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    trained(config, plan, tmp_path / "a")
    config.paths.data = str(tmp_path / "another")
    trained(config, plan, tmp_path / "b")
    assert len(charges(config)) == 1, "the ledger beside the data knows one"
    line, both = line_of_all_runs(config, 1e-5, IMAGES), composed([plan.mechanism] * 2, 1e-5).epsilon
    assert line is not None
    assert (
        f"epsilon {both:.4g}" in line and "of 2 runs on mnist and on sets that share images with it" in line
    )
    # Room for two runs that were chosen one after the other, not for three.
    config.privacy.budget_epsilon = both * 1.25
    reason = refusal(config, plan, tmp_path / "c", IMAGES)
    assert reason is not None and "2 runs on mnist" in reason
    assert refusal(config, plan, tmp_path / "c", private_images(8)) is None


def test_a_ledger_of_before_is_known_where_the_set_is_moved_to(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    Ledger(ledger_path(config)).enter(Charge("old", "mnist", plan.mechanism, 1e-5))
    trained(config, plan, tmp_path / "a")
    config.paths.data, config.privacy.budget_epsilon = str(tmp_path / "another"), 1e-3
    reason = refusal(config, plan, tmp_path / "b", IMAGES)
    assert reason is not None and "2 runs on mnist" in reason


def test_what_spent_on_two_sets_is_composed_where_they_meet(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    a, b = pixels(31, 10), pixels(32, 10)
    for name, images in (("a", a), ("b", b)):
        config.paths.data = str(tmp_path / f"data_{name}")
        trained(config, plan, tmp_path / name, splits_of(images))
    config.paths.data, config.privacy.budget_epsilon = str(tmp_path / "both"), 1e-3
    for images, runs in ((np.concatenate([a[:1], b[:1]]), 2), (a, 1), (a[:3], 1), (pixels(33, 10), 0)):
        reason = refusal(config, plan, tmp_path / "new", splits_of(images))
        assert reason is not None and f"{runs} run{'s' * (runs != 1)} on mnist" in reason


def test_an_index_that_cannot_be_used_refuses_a_job_before_it_begins(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    config.paths.index = str(tmp_path / "file" / "index")
    reason = refusal(config, plan, tmp_path / "run", IMAGES)
    assert reason is not None and reason.startswith(f"paths.index={config.paths.index}: ")
    assert not ledger_path(config).exists()


def test_one_spelling_of_a_place_is_one_run(config: Config) -> None:
    def of(source: str) -> tuple[str, str]:
        config.data.source = config.public_data.source = config.model.pretrained = source
        config.public_data.name = config.model.name = "x"
        return fingerprint(config), pretrained_fingerprint(config)

    assert of("set") == of("set/") == of("./set") == of("set//.")
    assert of("a/set") == of("a//set/") != of("set")
    assert of("/a/set") != of("a/set")


def test_a_receipt_is_the_owners_alone_and_holds_no_digest_of_an_image(
    config: Config, plan: PrivacyPlan, tmp_path: Path
) -> None:
    folder = trained(config, plan, tmp_path / "a")
    receipt = read_json(folder / RECEIPT)
    assert (folder / RECEIPT).stat().st_mode & 0o777 == 0o600
    assert receipt.keys() == {
        "run",
        "private_set",
        "ledger",
        "digest",
        "nonce",
        "previous",
        "index",
        "index_previous",
    }
    found = read_receipt(folder)
    assert found is not None and len(found.nonce or "") == 16 and found.nonce != found.previous
    assert json.loads(json.dumps(receipt)) == receipt
