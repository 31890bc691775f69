"""Copies of a run, and copies of its images: neither trains for free."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_lora.errors import UserError
from dp_lora.jobs.job import prepare
from dp_lora.privacy import step as algorithm
from dp_lora.storage.files import read_json, read_lines
from dp_lora.training import finetune
from sweeps.bill import bill
from tests.builders.commands import FOLDER, dp_lora, interrupted, state_of
from tests.builders.image_sets import pixels, write_folder
from tests.builders.tiny import composed, words

pytestmark = pytest.mark.usefixtures("unchecked")

FINETUNE = "stages=[finetune]"
PIXELS = pixels(1, 24)


def charges(root: Path) -> dict[str, int]:
    """The steps that each run is charged, by the lines of the ledger."""
    return {line["run"]: line["steps"] for line in read_lines(root / "outputs.privacy_ledger.jsonl")}


def test_two_copies_of_a_run_are_not_charged_as_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    images = write_folder(tmp_path / "set", PIXELS)
    given = [*words(cache, tmp_path / "outputs"), *FOLDER, f"data.source={images}", FINETUNE]
    with monkeypatch.context() as patched:
        patched.setattr(algorithm, "noised_mean", interrupted(2))
        assert dp_lora(*given, "train.checkpoint_minutes=0") == 130
    shutil.copytree(tmp_path / "outputs", tmp_path / "copy")
    in_copy = [*given, f"paths.outputs={tmp_path / 'copy'}"]
    assert dp_lora(*given) == 0 and list(charges(tmp_path).values()) == [3]
    before = state_of(tmp_path)
    capsys.readouterr()
    assert dp_lora(*in_copy) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dp-lora: ") and "has gone on elsewhere" in line and "charged in full" in line
    assert state_of(tmp_path) == before, "nothing was written or charged"
    # The way out that the line names.
    (copy,) = (tmp_path / "copy" / "default").iterdir()
    shutil.rmtree(copy / "checkpoint")
    assert dp_lora(*in_copy) == 0
    assert list(charges(tmp_path).values()) == [3, 3]
    assert read_json(copy / "privacy.json")["complete"] is True
    (original,) = (tmp_path / "outputs" / "default").iterdir()
    (found,) = bill([original, copy]).sets
    assert (found.runs, found.steps, found.ledger_runs) == (2, 6, 2)


# Copies of the images


class Charged:
    """A folder of images on which one run was made, and the words of another run that exceeds a budget."""

    def __init__(self, cache: Path, root: Path) -> None:
        self.root, self.images = root, write_folder(root / "set", PIXELS)
        given = [*words(cache, root / "outputs"), *FOLDER, FINETUNE]
        # Each set's own ledger, beside it.
        self.words = [word for word in given if not word.startswith("paths.ledger=")] + ["paths.ledger=null"]
        assert dp_lora(*self.words, f"data.source={self.images}") == 0
        (run,) = (root / "outputs" / "default").iterdir()
        self.epsilon = float(read_json(run / "privacy.json")["epsilon"])

    def again(self, images: Path) -> int:
        """Another run, within a budget that only a set without earlier charges allows."""
        budget = f"privacy.budget_epsilon={self.epsilon * 1.01}"
        return dp_lora(*self.words, f"data.source={images}", "seed=1", budget)


@pytest.fixture(scope="module")
def charged(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Charged]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "check_engine", lambda *args: None)
        yield Charged(cache, tmp_path_factory.mktemp("charged"))


def moved(images: Path, into: Path) -> Path:
    shutil.copytree(images, into / "moved")
    return into / "moved"


def wrapped(images: Path, into: Path) -> Path:
    shutil.copytree(images, into / "a" / "b" / "train")
    shutil.copytree(write_folder(into / "others", pixels(2, 4)), into / "a" / "b" / "test")
    return into / "a" / "b"


def other_names(images: Path, into: Path) -> Path:
    for number, path in enumerate(sorted(images.rglob("*.png"), reverse=True)):
        target = into / "named" / f"x{number % 2}" / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return into / "named"


def other_format(images: Path, into: Path) -> Path:
    return write_folder(into / "bmp", PIXELS, suffix=".bmp")


def one_of_them(images: Path, into: Path) -> Path:
    return write_folder(into / "mixed", np.concatenate([pixels(3, 23), PIXELS[:1]]))


@pytest.mark.parametrize("act", [moved, wrapped, other_names, other_format, one_of_them])
def test_a_copy_of_the_images_has_no_budget_of_its_own(
    act: Callable[[Path, Path], Path], charged: Charged, tmp_path: Path, capsys: Any
) -> None:
    copy = act(charged.images, tmp_path)
    before = state_of(tmp_path, charged.root)
    capsys.readouterr()
    assert charged.again(copy) == 2
    said = capsys.readouterr().err
    assert "1 run on imagefolder spent epsilon " in said
    assert state_of(tmp_path, charged.root) == before
    assert not copy.with_name(f"{copy.name}.privacy_ledger.jsonl").exists()


def test_an_index_that_knows_nothing_lets_a_copy_train(charged: Charged, tmp_path: Path) -> None:
    """The same copy and an empty index, which is what another user has: nothing is refused."""
    copy = moved(charged.images, tmp_path)
    budget = f"privacy.budget_epsilon={charged.epsilon * 1.01}"
    given = [*charged.words, f"data.source={copy}", "seed=1", budget]
    with pytest.raises(UserError, match="1 run on imagefolder"):
        prepare(composed(*given), tmp_path / "run")
    prepare(composed(*given, f"paths.index={tmp_path / 'index'}"), tmp_path / "run")


def test_nothing_of_the_index_is_among_the_files_of_a_run(charged: Charged) -> None:
    index = charged.root / "outputs.image_index"
    assert index.stat().st_mode & 0o777 == 0o700
    key = (index / "key").read_bytes()
    sets = [line["set"].encode() for line in read_lines(index / "sets.jsonl")]
    assert (index / "key").stat().st_mode & 0o777 == 0o600 and sets
    for path in (charged.root / "outputs").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert key not in content and not any(name in content for name in sets), path
