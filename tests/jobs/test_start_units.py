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
