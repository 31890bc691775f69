"""A training goes on from an adapter of the same unit only, and a budget holds for one unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dp_lora.errors import UserError
from dp_lora.jobs.spending import admit
from dp_lora.privacy.ledger import Charge, spent_adaptively
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import read_json
from tests.builders.commands import FOLDER, dp_lora
from tests.builders.patients import patients
from tests.builders.tiny import TINY, composed, words

pytestmark = pytest.mark.usefixtures("unchecked")

PERSONS = ("data.person_column=patient", "privacy.unit=person")


@pytest.fixture
def job(cache: Path, tmp_path: Path) -> Callable[..., int]:
    place = f"data.source={patients(tmp_path / 'set', {f'P{i}': 1 + i % 4 for i in range(20)})}"
    given = (*words(cache, tmp_path / "outputs"), *FOLDER, place, "stages=[finetune]")
    return lambda *more: dp_lora(*given, *more)


def ledger(folder: Path, name: str) -> str:
    return f"paths.ledger={folder / name}.jsonl"


@pytest.mark.parametrize("setting", ["train.continue_from", "model.adapter"])
def test_a_training_for_images_does_not_go_on_from_one_for_persons(
    setting: str, job: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job(*PERSONS) == 0
    (run,) = (tmp_path / "outputs/default").iterdir()
    capsys.readouterr()
    assert job(f"{setting}='{run}'") == 2
    said = capsys.readouterr().err
    assert "an earlier training on these images was under privacy.unit=person; expected" in said
    # The same unit goes on, and counts both.
    assert job(f"{setting}='{run}'", *PERSONS) == 0


@pytest.mark.parametrize(("unit", "code"), [("person", 2), ("image", 0)])
def test_new_images_of_the_same_persons_compose_for_a_person(
    unit: str, code: int, job: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In another folder, with a ledger of its own: one image is in one of them only, a person in both."""
    later = f"data.source={patients(tmp_path / 'later', {f'P{i}': 3 for i in range(4, 24)}, seed=1)}"
    given = PERSONS if unit == "person" else ()
    assert job(*given, ledger(tmp_path, "first")) == 0
    (first,) = (tmp_path / "outputs/default").iterdir()
    one = read_json(first / "privacy.json")["epsilon"]
    capsys.readouterr()
    assert job(*given, later, ledger(tmp_path, "second"), f"privacy.budget_epsilon={1.5 * one}") == code
    assert ("would make it" in capsys.readouterr().err) == bool(code)
    if unit == "person":
        assert job(*given, later, ledger(tmp_path, "second"), f"model.adapter='{first}'") == 0
        (second,) = set((tmp_path / "outputs/default").iterdir()) - {first}
        stated = read_json(second / "privacy.json")
        assert len(stated["earlier_trainings"]) == 1
        assert stated["epsilon"] > 1.1 * stated["epsilon_of_this_training"]


def test_other_persons_compose_with_nobody(job: Callable[..., int], tmp_path: Path) -> None:
    later = f"data.source={patients(tmp_path / 'later', {f'Q{i}': 3 for i in range(20)}, seed=1)}"
    assert job(*PERSONS, ledger(tmp_path, "first")) == 0
    (first,) = (tmp_path / "outputs/default").iterdir()
    budget = f"privacy.budget_epsilon={1.5 * read_json(first / 'privacy.json')['epsilon']}"
    assert job(*PERSONS, budget, later, ledger(tmp_path, "second")) == 0


def test_a_budget_for_persons_is_refused_beside_runs_for_images() -> None:
    config = composed(*TINY, "privacy.budget_epsilon=50")
    mine = Charge("a", "set", Mechanism(4.0, 0.05, 20), 1e-5, unit="person")
    others = [replace(mine, run="b")]
    admit(config, mine, others)
    with pytest.raises(UserError, match="earlier runs on set protect single images"):
        admit(config, mine, [replace(others[0], unit="image")])
    # A run for persons counts for one image with what two persons cost.
    image = replace(mine, unit="image")
    admit(config, image, others)
    both = [spent_adaptively([image, other], 1e-5) for other in (image, mine)]
    config.privacy.budget_epsilon = sum(both) / 2
    admit(config, image, [replace(others[0], unit="image")])
    with pytest.raises(UserError, match="would make it"):
        admit(config, image, others)
