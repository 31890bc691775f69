"""The bill counts every step begun on a set, says what has no guarantee, and refuses what it cannot read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dp_lora.errors import UserError
from dp_lora.privacy.accounting import composed
from dp_lora.privacy.ledger import Charge, Ledger
from dp_lora.privacy.selection import best_of
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import append_line, read_json, write_json
from dp_lora.training.receipts import Receipt
from sweeps.bill import Bill, SetBill, bill, planned
from tests.builders.bill_runs import DELTA, RATE, SIGMA, make


def spent(*steps: int, sigma: float = SIGMA) -> float:
    return composed([Mechanism(sigma, RATE, sum(steps))], DELTA).epsilon


def only(found: Bill) -> SetBill:
    (one,) = found.sets
    return one


def test_all_runs_on_a_set_compose(tmp_path: Path) -> None:
    runs = [make(tmp_path / f"{n}", name=name) for n, name in enumerate(("mnist5k", "mnist", "mnist5k"))]
    found = only(bill(runs))
    assert (found.private_set, found.runs, found.steps) == ("mnist", 3, 240)
    assert found.epsilon == found.private_epsilon == pytest.approx(spent(240))
    assert found.largest_epsilon == pytest.approx(spent(80)) and found.accountant == "pld"
    assert found.best_of_epsilon == best_of([[Mechanism(SIGMA, RATE, 80)]] * 3, DELTA).epsilon
    assert spent(80) < found.best_of_epsilon
    assert bill([*runs, runs[0], tmp_path / "never begun"]) == bill(runs)


def test_failed_and_partial_runs_count_with_what_they_began(tmp_path: Path) -> None:
    runs = [
        make(tmp_path / "done", begun=80),
        make(tmp_path / "killed", 30, begun=33),
        make(tmp_path / "killed before its first step ended", None, begun=1),
        make(tmp_path / "killed before its first step", None, begun=0),
        make(tmp_path / "without its private folder", 50),
    ]
    shutil.rmtree(runs[-1] / "checkpoint")
    found = only(bill(runs))
    assert (found.runs, found.steps) == (4, 80 + 33 + 1 + 51)
    assert found.epsilon == pytest.approx(spent(80, 33, 1, 51))


def test_a_run_without_privacy_makes_the_whole_infinite_and_is_told_apart(tmp_path: Path) -> None:
    private = [make(tmp_path / f"{n}") for n in range(2)]
    found = only(bill([*private, make(tmp_path / "inf", sigma=0.0), make(tmp_path / "seeded", seeded=True)]))
    assert math.isinf(found.epsilon) and found.runs_without_privacy == 2 and found.runs == 4
    assert found.private_epsilon == pytest.approx(spent(160))
    text = "\n".join(found.lines())
    assert "2 without privacy" in text and "epsilon inf" in text
    assert f"the other 2 together: epsilon {spent(160):.4g} at delta 1e-05 (pld" in text
    nothing = only(bill([tmp_path / "inf"]))
    assert math.isinf(nothing.epsilon) and nothing.best_of_epsilon is None
    assert nothing.private_epsilon == 0 and "together: epsilon" not in "\n".join(nothing.lines())


def test_public_data_costs_nothing_and_sets_are_apart(tmp_path: Path) -> None:
    mine, yours = tmp_path / "mine", tmp_path / "yours"
    found = bill(
        [
            make(tmp_path / "0", name="letters", public=True),
            make(tmp_path / "1", name="digits"),
            make(tmp_path / "2", name="imagefolder", source=mine),
            make(tmp_path / "3", name="imagefolder", source=yours),
            make(tmp_path / "4", name="imagefolder", source=mine),
        ]
    )
    assert [(one.private_set, one.runs) for one in found.sets] == [
        ("digits", 1), ("imagefolder 1", 2), ("imagefolder 2", 1),
    ]  # fmt: skip
    assert not any(str(tmp_path) in line for line in found.lines())
    assert bill([tmp_path / "0"]).lines() == ["no run has taken a step on private data"]


def test_different_mechanisms_compose_at_the_smallest_delta(tmp_path: Path) -> None:
    quiet, loud = make(tmp_path / "quiet", sigma=3.0), make(tmp_path / "loud", sigma=1.0)
    record = read_json(loud / "privacy.json")
    write_json(loud / "privacy.json", {**record, "delta": 1e-6})
    found = only(bill([quiet, loud]))
    mechanisms = [Mechanism(3.0, RATE, 80), Mechanism(1.0, RATE, 80)]
    assert found.delta == 1e-6
    assert found.epsilon == pytest.approx(composed(mechanisms, 1e-6).epsilon)
    assert found.largest_epsilon == pytest.approx(composed(mechanisms[1:], 1e-6).epsilon)
    assert found.best_of_epsilon == best_of([[one] for one in mechanisms], 1e-6).epsilon


def test_many_different_mechanisms_have_the_renyi_bound(tmp_path: Path) -> None:
    charges = [Charge(f"{n}", "mnist", Mechanism(2 + n / 100, RATE, 10), DELTA) for n in range(30)]
    found = only(planned(charges))
    assert found.accountant == "rdp" and (found.runs, found.steps) == (30, 300)
    # Between the pld bounds of the quietest and of the loudest, had all runs been alike; rdp is looser.
    low, high = (composed([Mechanism(sigma, RATE, 300)], DELTA).epsilon for sigma in (2.29, 2.0))
    assert low < found.epsilon < 1.1 * high


def test_releases_on_held_out_images_are_part_of_what_a_run_costs(tmp_path: Path) -> None:
    run = make(tmp_path / "a")
    record = read_json(run / "privacy.json")
    write_json(run / "privacy.json", {**record, "release": {"noise_multiplier": 4.0, "releases": 2}})
    found = only(bill([run]))
    everything = [Mechanism(SIGMA, RATE, 80), Mechanism(4.0, 1.0, 2)]
    assert (found.runs, found.steps) == (1, 80)
    assert found.epsilon == found.largest_epsilon == pytest.approx(composed(everything, DELTA).epsilon)
    assert found.epsilon > spent(80) and found.best_of_epsilon == best_of([everything], DELTA).epsilon


def charge(directory: Path, ledger: Ledger, number: str, steps: int = 80) -> Path:
    digest = ledger.enter(Charge(number, "mnist", Mechanism(SIGMA, RATE, steps), DELTA))
    receipt = Receipt(number, "mnist", str(ledger.path), digest)
    write_json(directory / "checkpoint" / "charge.json", receipt.__dict__)
    return directory


def test_the_ledger_counts_what_is_not_among_the_directories(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "privacy_ledger.jsonl")
    runs = [charge(make(tmp_path / name), ledger, name) for name in "ab"]
    charge(make(tmp_path / "removed since"), ledger, "c", 40)
    ledger.enter(Charge("d", "digits", Mechanism(SIGMA, RATE, 80), DELTA))
    found = only(bill(runs))
    assert (found.runs, found.ledger, found.ledger_runs) == (2, "privacy_ledger.jsonl", 3)
    assert found.ledger_epsilon == pytest.approx(spent(80, 80, 40))
    assert f"counts 3 runs over all time: epsilon {found.ledger_epsilon:.4g}" in "\n".join(found.lines())
    shutil.copytree(runs[0], tmp_path / "copy")
    assert only(bill([*runs, tmp_path / "copy"])) == found, "a copy is no second run"


def test_an_edited_ledger_is_one_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "privacy_ledger.jsonl")
    runs = [charge(make(tmp_path / name), ledger, name) for name in "ab"]
    lines = ledger.path.read_text().splitlines(keepends=True)
    for text in (lines[0], lines[0] + lines[1].replace("80", "8"), ""):
        ledger.path.write_text(text)
        with pytest.raises(UserError, match=r"privacy_ledger\.jsonl.*edited"):
            bill(runs)


@pytest.mark.parametrize("name", ["privacy.json", "config.yaml", "checkpoint/plan.json"])
def test_half_written_and_foreign_files_are_one_line(name: str, tmp_path: Path) -> None:
    directory = make(tmp_path / "run", None if "plan" in name else 80, begun=3)
    for content in ("{", "[]", "{}"):
        (directory / name).write_text(content)
        if content == "{}" and name != "config.yaml":
            continue
        with pytest.raises(UserError, match=r"run: what this run spent cannot be read .*expected"):
            bill([directory])


def test_an_adapter_without_its_privacy_is_refused(tmp_path: Path) -> None:
    directory = make(tmp_path / "run", None)
    assert bill([directory]).sets == ()
    (directory / "adapter").mkdir()
    with pytest.raises(UserError, match=r"holds an adapter and no privacy\.json"):
        bill([directory])


def test_the_words_and_the_record_say_the_same(tmp_path: Path) -> None:
    found = bill([make(tmp_path / "a"), make(tmp_path / "b", sigma=0.0)])
    record = found.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["sets"][0]["epsilon"] == "inf"
    lines: Sequence[str] = found.lines()
    assert all(line.startswith("mnist: ") for line in lines)
    told: list[Any] = [line for line in lines if "epsilon" in line and "inf" not in line]
    assert told and all("delta" in line for line in told)


def executed(directory: Path, steps: range, name: str) -> None:
    for step in steps:
        record = {"step": step, "execution": f"{name}{step}"}
        append_line(directory / "checkpoint" / "executions.jsonl", record)


def test_copies_of_a_run_are_one_run_with_all_that_each_of_them_did(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "privacy_ledger.jsonl")
    first = charge(make(tmp_path / "a", 30, begun=30), ledger, "a", 60)
    copies = [Path(shutil.copytree(first, tmp_path / name)) for name in "bc"]
    executed(first, range(30, 60), "first")
    executed(copies[0], range(30, 60), "second")
    found = only(bill([first, *copies]))
    # 30 that all three have in common, and 30 more in each of two.
    assert (found.runs, found.steps) == (1, 90)
    assert found.epsilon == pytest.approx(spent(90)) and found.epsilon > spent(60)
    assert only(bill([first, copies[1]])).steps == 60 == only(bill([first])).steps


def test_releases_of_copies_count_each_unless_they_are_the_same(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "privacy_ledger.jsonl")
    first = charge(make(tmp_path / "a"), ledger, "a")
    second = Path(shutil.copytree(first, tmp_path / "b"))
    one, other = ({"inputs": name, "noise_multiplier": 4.0, "metrics": {"m": 1.0}} for name in "xy")
    for directory, releases in ((first, [one]), (second, [one, other])):
        write_json(directory / "checkpoint" / "releases.json", releases)
    found = only(bill([first, second]))
    assert (found.runs, found.steps) == (1, 80)
    everything = [Mechanism(SIGMA, RATE, 80), Mechanism(4.0, 1.0, 2)]
    assert found.epsilon == pytest.approx(composed(everything, DELTA).epsilon)


def test_a_copy_that_was_charged_to_another_ledger_is_not_lost(tmp_path: Path) -> None:
    ledgers = [Ledger(tmp_path / name / "privacy_ledger.jsonl") for name in "xy"]
    runs = [
        charge(make(tmp_path / name, begun=80), one, "a") for name, one in zip("ab", ledgers, strict=True)
    ]
    found = only(bill(runs))
    assert found.ledger_runs == 2 and found.ledger_epsilon == pytest.approx(spent(160))
