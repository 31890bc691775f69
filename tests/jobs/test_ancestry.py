"""What an adapter descends from, by the records of its run: whatever is not known counts in full."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dp_lora.commands import evaluate as evaluate_command
from dp_lora.commands.export import export
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs.stages import run
from dp_lora.privacy.renyi import least_budget, renyi_divergences
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import read_json
from sweeps.bill import bill
from tests.builders.image_sets import pixels, write_folder
from tests.builders.starts import counted, mechanism, on, trained

pytestmark = pytest.mark.usefixtures("unchecked")

RELEASE = (
    "stages=[finetune,sample,evaluate]", "evaluation=release", "evaluation.classifiers=[cnn]",
    "evaluation.extractors=[]", "evaluation.release_epsilon=8", "evaluation.release_delta=1e-3",
    "sampler.num_samples=8", "data.test_size=0.4",
)  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two sets of private images that have none in common."""
    return tuple(write_folder(tmp_path / f"set{i}", pixels(i, 40)) for i in range(2))  # type: ignore[return-value]


def test_an_adapter_given_without_its_run_stays_unknown_to_all_that_descend_from_it(
    tiny: Callable[..., Config], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """The images of one set, another set by way of the adapter's folder, and the first set again."""
    first = trained(tiny(*on(folders[0])))
    given = shutil.copytree(first / "adapter", tmp_path / "given")
    between = trained(tiny(*on(folders[1], f"model.adapter={given}")))
    again = trained(tiny(*on(folders[1], f"train.continue_from={between}", "train.max_steps=2")))
    assert counted(between) == [] and counted(again) == [mechanism(between)]
    for number, last in enumerate((between, again)):
        back = trained(tiny(*on(folders[0], f"model.adapter={last}", f"privacy.epsilon={3 - number / 4}")))
        assert mechanism(first) in counted(back)


@pytest.mark.parametrize("goes_on", [True, False])
def test_the_lost_record_of_a_start_is_refused(
    goes_on: bool, tiny: Callable[..., Config], folders: tuple[Path, Path]
) -> None:
    first = trained(tiny(*on(folders[0])))
    named = f"train.continue_from={first}" if goes_on else f"model.adapter={first}"
    second = trained(tiny(*on(folders[0] if goes_on else folders[1], named)))
    (second / "checkpoint" / "start.json").unlink()
    with pytest.raises(UserError, match=r"start\.json: is missing, and the run started from"):
        run(tiny(*on(folders[0], f"model.adapter={second}", "privacy.epsilon=1")))


def test_an_exported_folder_is_an_adapter_without_its_run(
    tiny: Callable[..., Config], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    first = trained(tiny(*on(folders[0])))
    second = trained(tiny(*on(folders[0], f"train.continue_from={first}", "train.max_steps=2")))
    exported = export(second, tmp_path / "export")
    for number, place in enumerate((exported, exported / "adapter")):
        words = on(folders[0], f"model.adapter={place}", f"privacy.epsilon={3 - number / 4}")
        found = counted(trained(tiny(*words)))
        assert mechanism(first) in found and mechanism(second) in found
    with pytest.raises(UserError, match=r"^train\.continue_from=.*or has no record of them"):
        run(tiny(*on(folders[0], f"train.continue_from={exported}", "privacy.epsilon=1")))


def test_a_run_from_an_adapter_without_its_run_is_taken_by_one_of_another_sampler(
    tiny: Callable[..., Config], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """All runs on its images count, this one among them; that is no reason to train again."""
    first = trained(tiny(*on(folders[0])))
    given = shutil.copytree(first / "adapter", tmp_path / "given")
    words = on(folders[0], f"model.adapter={given}")
    second = trained(tiny(*words))
    third = trained(tiny(*words, "sampler.guidance=2"))
    assert third != second and not (third / "checkpoint" / "executions.jsonl").exists()
    assert read_json(third / "privacy.json") == read_json(second / "privacy.json")


# Releases


def test_a_release_on_images_that_are_trained_on_afterwards_counts(
    tiny: Callable[..., Config], folders: tuple[Path, Path]
) -> None:
    first = trained(tiny(*on(folders[0], *RELEASE)))
    release = Mechanism(read_json(first / "privacy.json")["release"]["noise_multiplier"], 1.0, 1)
    # On all images, those among them that were held out.
    last = trained(tiny(*on(folders[0], f"model.adapter={first}", "privacy.epsilon=3")))
    assert counted(last) == [release, mechanism(first)]
    expected = least_budget(renyi_divergences([release, mechanism(first), mechanism(last)]), 1e-3)
    for runs in ([last], [first, last]):
        # Each of the three once, whether the run that released is billed too or told of by the other one.
        assert bill(runs).sets[0].adaptive_epsilon == pytest.approx(expected, rel=1e-9)
    assert read_json(last / "privacy.json")["epsilon"] == pytest.approx(expected, rel=1e-9)


def test_a_release_after_another_one_on_the_same_held_out_images_states_both(
    tiny: Callable[..., Config], folders: tuple[Path, Path]
) -> None:
    first = trained(tiny(*on(folders[0], *RELEASE)))
    second = trained(tiny(*on(folders[0], *RELEASE, f"train.continue_from={first}", "privacy.epsilon=3")))
    of_first, of_second = (read_json(one / "privacy.json")["release"] for one in (first, second))
    # The training images of both are the same, and no held-out image is among them.
    assert counted(second) == [mechanism(first)]
    both = [Mechanism(one["noise_multiplier"], 1.0, 1) for one in (of_first, of_second)]
    assert [Mechanism(**one) for one in of_second["earlier_releases"]] == both[:1]
    assert not {"earlier_releases", "earlier_trainings"} & of_first.keys() and of_second["releases"] == 1
    assert "earlier_trainings" not in of_second
    assert of_second["epsilon"] == pytest.approx(least_budget(renyi_divergences(both), 1e-3), rel=1e-9)
    everything = [mechanism(first), mechanism(second), *both]
    assert of_second["with_training"]["epsilon"] == pytest.approx(
        least_budget(renyi_divergences(everything), read_json(second / "privacy.json")["delta"]), rel=1e-9
    )


def test_a_release_counts_what_was_spent_on_its_images_before(
    tiny: Callable[..., Config], folders: tuple[Path, Path]
) -> None:
    """A training on all images, then a run that holds some of them out; and a later release of the first."""
    first = trained(tiny(*on(folders[0])))
    held = trained(tiny(*on(folders[0], *RELEASE, f"model.adapter={first}", "privacy.epsilon=3")))
    stated = read_json(held / "privacy.json")["release"]
    own = Mechanism(stated["noise_multiplier"], 1.0, 1)
    assert [Mechanism(**one) for one in stated["earlier_trainings"]] == [mechanism(first)]
    assert stated["epsilon"] == pytest.approx(
        least_budget(renyi_divergences([mechanism(first), own]), 1e-3), rel=1e-9
    )
    copied = export(held, held.parent / "export")
    assert read_json(copied / "privacy.json")["release"] == stated


def test_a_release_counts_one_that_an_ancestor_made_later(
    tiny: Callable[..., Config], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = on(folders[0], *RELEASE[-2:], "stages=[finetune,sample]")
    first = trained(tiny(*words))
    second = trained(tiny(*words, f"train.continue_from={first}", "train.max_steps=2"))
    for number, run_ in enumerate((first, second)):
        asked = [*RELEASE[1:4], f"evaluation.release_epsilon={2 + number}", RELEASE[5]]
        monkeypatch.setattr("sys.argv", ["dp-lora-evaluate", str(run_), *asked])
        evaluate_command.main()
    stated = read_json(second / "privacy.json")["release"]
    before = read_json(first / "privacy.json")["release"]["noise_multiplier"]
    assert [Mechanism(**one) for one in stated["earlier_releases"]] == [Mechanism(before, 1.0, 1)]
    assert stated["epsilon"] > read_json(first / "privacy.json")["release"]["epsilon"] + 1


def test_a_run_that_took_its_training_counts_by_its_own_record(
    tiny: Callable[..., Config], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """The run that trained is gone, and ledger and index know nothing."""
    first = trained(tiny(*on(folders[0])))
    variant = trained(tiny(*on(folders[0], "sampler.guidance=2")))
    assert not (variant / "checkpoint" / "executions.jsonl").exists()
    plan = mechanism(first)
    shutil.rmtree(first)
    books = (f"paths.ledger={tmp_path / 'other.jsonl'}", f"paths.index={tmp_path / 'other'}")
    for named in ("model.adapter", "train.continue_from"):
        last = trained(tiny(*on(folders[0], f"{named}={variant}", "privacy.epsilon=3", *books)))
        assert plan in counted(last)


def test_what_an_unknown_adapter_saw_counts_on_the_same_images_too(
    tiny: Callable[..., Config], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """A run that began where ledger and index did not know its images goes on where they do."""
    first = trained(tiny(*on(folders[0])))
    given = shutil.copytree(first / "adapter", tmp_path / "given")
    books = (f"paths.ledger={tmp_path / 'other.jsonl'}", f"paths.index={tmp_path / 'other'}")
    second = trained(tiny(*on(folders[0], f"model.adapter={given}", *books)))
    assert counted(second) == []
    third = trained(tiny(*on(folders[0], f"train.continue_from={second}", "privacy.epsilon=3")))
    assert counted(third) == [mechanism(first), mechanism(second)]


def test_a_release_whose_record_was_lost_is_still_stated(
    tiny: Callable[..., Config], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(tiny(*on(folders[0], *RELEASE)))
    (first / "checkpoint" / "releases.json").unlink()
    words = ["evaluation=release", "evaluation.classifiers=[cnn]", "evaluation.extractors=[]"]
    words += ["evaluation.release_epsilon=2", "evaluation.release_delta=1e-3"]
    monkeypatch.setattr("sys.argv", ["dp-lora-evaluate", str(first), *words])
    evaluate_command.main()
    stated = read_json(first / "privacy.json")["release"]
    assert stated["releases"] == 2
    both = [Mechanism(sigma, 1.0, 1) for sigma in stated["noise_multipliers"]]
    assert stated["epsilon"] == pytest.approx(least_budget(renyi_divergences(both), 1e-3), rel=1e-9)
