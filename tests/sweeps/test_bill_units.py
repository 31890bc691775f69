"""The bill says whom its epsilons are for, and what runs spend on those whom they do not protect."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dp_lora.privacy.accounting import composed
from dp_lora.privacy.ledger import Charge, Ledger
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.privacy.units import epsilon_of_image, epsilon_of_person
from dp_lora.storage.files import read_json, read_lines, write_json
from sweeps.__main__ import main
from sweeps.bill import SetBill, bill, of_rows, planned
from tests.builders.bill_runs import DELTA, RATE, SIGMA, make

RUN = Mechanism(SIGMA, RATE, 80)


def run(folder: Path, unit: str) -> Path:
    """A run that says whom it protects; one of an earlier version says nothing."""
    directory = make(folder)
    if unit != "image":
        write_json(directory / "privacy.json", read_json(directory / "privacy.json") | {"unit": unit})
    return directory


def only(directories: list[Path], most: int | None = None) -> SetBill:
    (one,) = bill(directories, most).sets
    return one


def test_runs_for_persons_are_billed_for_a_person_and_for_one_image(tmp_path: Path) -> None:
    found = only([run(tmp_path / "a", "person"), run(tmp_path / "b", "person")])
    assert found.unit == "person" and found.adjacency.startswith("zero out one person")
    assert found.epsilon == composed([RUN, RUN], DELTA).epsilon
    assert found.other_epsilon == epsilon_of_image([], [RUN, RUN], DELTA).epsilon > found.epsilon
    assert any(line.startswith("mnist: for one image: epsilon") for line in found.lines())


def test_runs_for_images_say_nothing_of_a_person_but_with_a_stated_number(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", "image")]
    assert only(runs).other_epsilon is None and "person" not in "\n".join(only(runs).lines())
    found = only(runs, 2)
    assert found.epsilon == composed([RUN], DELTA).epsilon
    assert found.other_epsilon == epsilon_of_person([RUN], [], DELTA, 2).epsilon > found.epsilon
    assert any("for a person with at most 2 images, as stated: epsilon" in line for line in found.lines())


def test_runs_of_both_kinds_are_billed_for_either(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", "image"), run(tmp_path / "b", "person")]
    found = only(runs)
    assert (found.unit, found.runs_for_persons, found.best_of_epsilon) == ("image", 1, None)
    assert (
        found.epsilon == epsilon_of_image([RUN], [RUN], DELTA).epsilon > composed([RUN, RUN], DELTA).epsilon
    )
    assert found.adaptive_epsilon is not None and found.adaptive_epsilon > found.epsilon
    assert found.other_epsilon == math.inf
    said = "\n".join(found.lines())
    assert "runs for persons (1) count for one image as the replacement of that person's record" in said
    assert "for a person with all of their images: not bounded, because of runs for single images (1)" in said
    assert only(runs, 2).other_epsilon == epsilon_of_person([RUN], [RUN], DELTA, 2).epsilon < math.inf


def test_plans_and_rows_know_their_unit() -> None:
    (of_plans,) = planned([Charge("a", "set", RUN, DELTA, unit="person")]).sets
    assert of_plans.unit == "person"
    row = {
        "steps": 80, "planned_steps": 80, "state": "done", "sample_rate": RATE, "noise_multiplier": SIGMA,
        "reproducible_noise": False, "data": "set", "delta": DELTA,
    }  # fmt: skip
    words = "zero out one person, the number of persons is public, Poisson sampling"
    assert of_rows([row | {"adjacency": words}]).sets == (of_plans,)
    assert of_rows([row]).sets[0].unit == "image"


def test_a_line_of_the_ledger_says_whom_a_run_protects_if_it_is_no_image(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    charges = [Charge("a", "set", RUN, DELTA), Charge("b", "set", RUN, DELTA, unit="person")]
    for charge in charges:
        ledger.enter(charge)
    assert ledger.charges() == charges
    image, person = read_lines(ledger.path)
    assert "unit" not in image and person["unit"] == "person"


def test_the_number_is_given_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "runs/a", "image")
    assert main(["bill", str(tmp_path / "runs"), "--images-per-person", "2"]) == 0
    assert "at most 2 images, as stated" in capsys.readouterr().out
    assert main(["bill", str(tmp_path / "runs"), "--images-per-person", "0"]) == 2
    assert capsys.readouterr().err == "sweeps: --images-per-person=0: expected 1 to 10000\n"
