"""The images changed under the same words: no stage goes on with others than the run was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dp_lora.commands import audit as audit_command
from dp_lora.commands import neighbours
from dp_lora.evaluation.evaluate import Evaluation
from dp_lora.jobs import job, stages
from dp_lora.privacy import step as algorithm
from dp_lora.records import manifest
from dp_lora.storage.files import read_json
from dp_lora.training import finetune
from tests.builders.commands import FOLDER, dp_lora, state_of
from tests.builders.image_sets import pixels, write_folder
from tests.builders.tiny import words

pytestmark = pytest.mark.usefixtures("unchecked")

STAGES = "stages=[finetune,sample]"


class Done:
    """A finished run on a folder of images, and the words that made it."""

    def __init__(self, cache: Path, root: Path) -> None:
        self.root, self.images = root, write_folder(root / "set", pixels(1, 24))
        self.words = [*words(cache, root / "outputs"), *FOLDER, f"data.source={self.images}", STAGES]

    @property
    def directory(self) -> Path:
        (found,) = (self.root / "outputs" / "default").iterdir()
        return found

    def state(self) -> dict[str, str]:
        return state_of(self.root)


@pytest.fixture(scope="module")
def done(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    made = Done(cache, tmp_path_factory.mktemp("done"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "check_engine", lambda *args: None)
        assert dp_lora(*made.words) == 0
    return made


@pytest.fixture
def run(done: Done) -> Iterator[Done]:
    """The finished run, whose images and files are as they were again afterwards."""
    backup = done.root.with_name("backup")
    shutil.copytree(done.root, backup)
    yield done
    shutil.rmtree(done.root)
    backup.rename(done.root)


def other_pixels(images: Path) -> None:
    Image.fromarray(255 - np.asarray(Image.open(images / "c0" / "004.png"))).save(images / "c0" / "004.png")


def more(images: Path) -> None:
    Image.fromarray(pixels(9, 1)[0, 0]).save(images / "c1" / "999.png")


def fewer(images: Path) -> None:
    (images / "c0" / "004.png").unlink()


def renamed_class(images: Path) -> None:
    (images / "c0").rename(images / "z0")


def swapped_labels(images: Path) -> None:
    for first, second in (("c0/000.png", "c1/000.png"), ("c1/023.png", "c0/023.png")):
        (images / first).rename(images / second)


def other_order(images: Path) -> None:
    (images / "c0" / "000.png").rename(images / "c0" / "zzz.png")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "other pixels": (other_pixels, "data: the pixels changed"),
    "more": (more, "data: the number of images changed"),
    "fewer": (fewer, "data: the number of images changed"),
    "renamed class": (renamed_class, "the names of the classes"),
    "swapped labels": (swapped_labels, "the labels"),
    "other order": (other_order, "data: the order of the images changed"),
}


def refused(capsys: Any, said: str) -> None:
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("dp-lora")]
    assert said in line and "since this run began" in line and "another paths.outputs" in line


@pytest.mark.parametrize("change", CHANGES)
def test_no_stage_goes_on_with_changed_images(change: str, run: Done, capsys: Any) -> None:
    act, said = CHANGES[change]
    act(run.images)
    before = run.state()
    for word in (STAGES, "stages=[evaluate]")[: 2 if change == "other pixels" else 1]:
        capsys.readouterr()
        assert dp_lora(*run.words, word) == 2
        refused(capsys, said)
    assert run.state() == before, "nothing was written or charged"


def test_no_command_about_a_run_looks_at_changed_images(run: Done, capsys: Any) -> None:
    other_pixels(run.images)
    before = run.state()
    for command in (audit_command.main, neighbours.main):
        capsys.readouterr()
        assert dp_lora(str(run.directory), command=command) == 2
        refused(capsys, "the pixels")
    after = run.state()
    assert {name for name in after if after[name] != before.get(name)} <= {
        str(run.directory / "checkpoint" / "lock")
    }


def test_images_that_are_back_are_the_same_again(run: Done, capsys: Any) -> None:
    kept = run.root / "kept"
    run.images.rename(kept)
    shutil.copytree(kept, run.images, copy_function=shutil.copyfile)
    for path in run.images.rglob("*.png"):
        Image.open(path).save(path, compress_level=0)
    assert dp_lora(*run.words) == 0, "the same pixels in other bytes, with other times"
    assert "done already" in capsys.readouterr().err


def test_a_run_that_was_cut_off_does_not_mix_two_sets(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run, calls = Done(cache, tmp_path), 0
    noised = algorithm.noised_mean

    def stop(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return noised(*args)

    given = [*run.words, "train.checkpoint_minutes=0", "stages=[finetune]"]
    with monkeypatch.context() as patched:
        patched.setattr(algorithm, "noised_mean", stop)
        assert dp_lora(*given) == 130
    backup = tmp_path / "backup"
    shutil.copytree(run.images, backup)
    other_pixels(run.images)
    before = run.state()
    capsys.readouterr()
    assert dp_lora(*given) == 2
    refused(capsys, "the pixels")
    assert run.state() == before
    shutil.rmtree(run.images)
    backup.rename(run.images)
    assert dp_lora(*given) == 0
    assert read_json(run.directory / "privacy.json")["complete"] is True


def without_record(run: Done) -> None:
    """As earlier versions left a run."""
    checkpoint = run.directory / "checkpoint"
    (checkpoint / "content.json").unlink()
    plan = read_json(checkpoint / "plan.json")
    assert plan.pop("content") is True
    (checkpoint / "plan.json").write_text(json.dumps(plan))


def test_a_record_that_was_removed_is_missed(run: Done, capsys: Any) -> None:
    """Without it, other images would be taken for those that the run was made from."""
    (run.directory / "checkpoint" / "content.json").unlink()
    other_pixels(run.images)
    before = run.state()
    capsys.readouterr()
    assert dp_lora(*run.words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "content.json: is missing; expected the record of the images" in said
    assert run.state() == before


def test_samples_have_the_names_that_were_trained(run: Done) -> None:
    """A run of an earlier version, which kept no record of its images."""
    without_record(run)
    (run.directory / "samples.npz").unlink()
    for old, new in (("c0", "y"), ("c1", "x")):
        (run.images / old).rename(run.images / new)
    assert dp_lora(*run.words, "stages=[sample]") == 0
    with np.load(run.directory / "samples.npz") as samples:
        assert samples["classes"].tolist() == ["c0", "c1"] and samples["labels"].tolist() == [0, 1, 0, 1]


def test_a_summary_says_what_was_trained(run: Done, capsys: Any) -> None:
    without_record(run)
    trained = read_json(run.directory / "privacy.json")
    assert trained["sample_rate"] == 6 / 24
    for number, image in enumerate(pixels(5, 24)):
        Image.fromarray(image[0]).save(run.images / f"c{number % 2}" / f"more{number}.png")
    capsys.readouterr()
    assert dp_lora(*run.words) == 0
    said = capsys.readouterr().out
    assert "3 steps, sample rate 0.25" in said and f"epsilon            {trained['epsilon']:.4g}" in said


@pytest.mark.parametrize("recorded", [True, False])
def test_a_result_says_whether_its_images_were_compared(
    recorded: bool, run: Done, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    # The metrics themselves, for which this set is too small.
    monkeypatch.setattr(job, "_check_evaluation", lambda *args: None)
    monkeypatch.setattr(stages, "_compared", lambda job: Evaluation({"accuracy_cnn": 0.5}, {}))
    if not recorded:
        without_record(run)
    capsys.readouterr()
    assert dp_lora(*run.words, "stages=[evaluate]") == 0
    result, said = read_json(run.directory / "result.json"), capsys.readouterr().out
    assert result["images_compared"] is recorded
    assert ("could not be compared with those that the run was made from" in said) is not recorded
    assert manifest.result(result, public=False, released=False, with_uncovered=False)["images_compared"] is (
        recorded
    )


def test_the_record_of_the_images_is_the_owners_alone(done: Done) -> None:
    path = done.directory / "checkpoint" / "content.json"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    key = read_json(path)["key"].encode()
    for other in done.root.rglob("*"):
        if other.is_file() and other != path:
            assert key not in other.read_bytes(), other
