"""One folder of private images under several presets: it stays private, and one set."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import words
from image_sets import pixels, write_folder

from attacks.commands import FOLDER, dp_lora, state_of
from dp_lora.privacy.ledger import Ledger, spent
from dp_lora.storage.files import read_json, read_lines
from dp_lora.training import finetune
from sweeps.bill import bill

FINETUNE = "stages=[finetune]"
LEDGER = "set.privacy_ledger.jsonl"


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the preflight, which costs as much as ten steps; tests of its own check it."""
    monkeypatch.setattr(finetune, "check_engine", lambda *args: None)


class Place:
    """A folder of images, and the words of a job on it with outputs and an index of its user's own."""

    def __init__(self, cache: Path, root: Path) -> None:
        self.cache, self.root, self.images = cache, root, write_folder(root / "set", pixels(5, 24))

    def words(self, user: str, *more: str, ledger: str = "null") -> list[str]:
        return [
            *words(self.cache, self.root / user), *FOLDER, FINETUNE, f"data.source={self.images}",
            f"paths.ledger={ledger}", *more,
        ]  # fmt: skip

    def run_of(self, user: str) -> Path:
        (run,) = (self.root / user / "default").iterdir()
        return run

    def epsilon_of(self, user: str) -> float:
        return float(read_json(self.run_of(user) / "privacy.json")["epsilon"])


@pytest.fixture
def place(cache: Path, tmp_path: Path) -> Place:
    return Place(cache, tmp_path)


AS_CELEBA = ("data=celeba32", "data.attribute=null", "data.image_size=8", "data.channels=1")


def test_a_folder_is_one_set_under_every_preset(place: Place, capsys: Any) -> None:
    """Two users share the folder and its ledger; the index of the second has never seen the images."""
    assert dp_lora(*place.words("one")) == 0
    budget = f"privacy.budget_epsilon={place.epsilon_of('one') * 1.01}"
    for preset in ((), AS_CELEBA, ("data=cifar10",)):
        before = state_of(place.root)
        capsys.readouterr()
        assert dp_lora(*place.words("two", *preset, "seed=1", budget)) == 2, preset
        assert " spent epsilon " in capsys.readouterr().err
        assert state_of(place.root) == before
    assert dp_lora(*place.words("two", *AS_CELEBA, "seed=1")) == 0
    said = capsys.readouterr().out
    assert "of 2 runs on celeba together" in said
    lines = read_lines(place.root / LEDGER)
    assert {line["set"] for line in lines} == {"imagefolder", "celeba"}
    charges = Ledger(place.root / LEDGER).charges()
    (found,) = bill([place.run_of("one"), place.run_of("two")]).sets
    assert (found.runs, found.ledger_runs) == (2, 2)
    assert found.ledger_epsilon == spent(charges, found.delta).epsilon
    shutil.rmtree(place.root / "one.image_index")
    (found,) = bill([place.run_of("two")]).sets
    assert (found.runs, found.ledger_runs) == (1, 2), "the ledger counts what is not among the directories"


def test_images_of_ones_own_in_a_shared_ledger_are_told_apart_by_the_index_alone(
    place: Place, capsys: Any
) -> None:
    shared = str(place.root / "shared.jsonl")
    assert dp_lora(*place.words("one", ledger=shared)) == 0
    budget = f"privacy.budget_epsilon={place.epsilon_of('one') * 1.01}"
    given = [*AS_CELEBA, "seed=1", budget]
    assert dp_lora(*place.words("two", *given, ledger=shared)) == 2, (
        "the images may be those of the other run"
    )
    assert "1 run on celeba spent epsilon" in capsys.readouterr().err
    others = write_folder(place.root / "others", pixels(6, 24))
    assert dp_lora(*place.words("two", *given, f"data.source={others}", ledger=shared)) == 2
    index = f"paths.index={place.root / 'one.image_index'}"
    assert dp_lora(*place.words("two", *given, index, ledger=shared)) == 2, "the index knows that they are"
    given += [f"data.source={others}", index]
    assert dp_lora(*place.words("two", *given, ledger=shared)) == 0, "the index knows that they are not"


def test_a_run_that_the_index_knows_by_a_ledger_alone_is_not_told_apart(place: Place) -> None:
    """A colleague's line was entered for the first images that met it; it may be on the second ones too."""
    shared = str(place.root / "shared.jsonl")
    assert dp_lora(*place.words("colleague", ledger=shared)) == 0
    budget = f"privacy.budget_epsilon={place.epsilon_of('colleague') * 1.01}"
    mine = write_folder(place.root / "mine", pixels(7, 24))
    assert dp_lora(*place.words("me", f"data.source={mine}", ledger=shared)) == 0
    assert dp_lora(*place.words("me", *AS_CELEBA, "seed=1", budget, ledger=shared)) == 2
