"""The ledger: nothing is lost, nothing is charged twice, an edit is noticed, half a line does no harm."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dp_lora.errors import UserError
from dp_lora.privacy import ledger as ledgers
from dp_lora.privacy.accounting import epsilon_by_accountant
from dp_lora.privacy.ledger import Charge, Ledger, Uncovered, spent
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import read_lines

ROOT = Path(__file__).resolve().parent.parent.parent


def charge(run: str, steps: int = 80, *, private_set: str = "mnist", private: bool = True) -> Charge:
    return Charge(run, private_set, Mechanism(1.5, 0.1, steps), 1e-5, private)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "data" / "privacy_ledger.jsonl")


@pytest.fixture
def three(ledger: Ledger) -> Ledger:
    for name in "abc":
        ledger.enter(charge(name))
    return ledger


def test_the_last_line_of_a_run_is_what_it_is_charged(ledger: Ledger) -> None:
    assert ledger.charges() == []
    ledger.enter(charge("a"))
    ledger.enter(charge("b"))
    ledger.enter(charge("a", 33))
    assert ledger.charges() == [charge("a", 33), charge("b")]
    before = ledger.path.read_bytes()
    assert ledger.enter(charge("a", 33)) == read_lines(ledger.path)[2]["digest"]
    assert ledger.path.read_bytes() == before, "the same charge again is none"


@pytest.mark.parametrize("begun", [False, True])
def test_a_use_that_no_epsilon_covers_is_a_line_of_its_own_and_no_charge(begun: bool, ledger: Ledger) -> None:
    if begun:
        ledger.enter(charge("a"))
    before = ledger.charges()
    uses = [Uncovered("a", "mnist", name, ("fid", "precision")) for name in ("metrics", "others")]
    for use in (*uses, uses[0]):
        ledger.enter_uncovered(use, 1e-5)
    assert ledger.uncovered() == uses and ledger.charges() == before, "each once"
    ledger.enter(charge("b"))
    assert [one.run for one in ledger.charges()] == [*(["a"] if begun else []), "b"]
    ledger.path.write_text(ledger.path.read_text().replace("precision", "recall", 1))
    with pytest.raises(UserError, match="the ledger was edited"):
        ledger.uncovered()


def test_a_ledger_leaves_no_file_open(ledger: Ledger) -> None:
    ledger.enter(charge("a"))
    before = len(os.listdir("/proc/self/fd"))
    for name in "bcdef":
        ledger.enter(charge(name))
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_line_holds_numbers_of_the_mechanism_and_nothing_else(three: Ledger) -> None:
    for line in read_lines(three.path):
        assert line.keys() == {
            "time", "run", "set", "noise_multiplier", "sample_rate", "steps", "delta", "private", "previous",
            "digest",
        }  # fmt: skip


def test_all_together_compose(three: Ledger) -> None:
    together = spent(three.charges(), 1e-5)
    bounds = epsilon_by_accountant([Mechanism(1.5, 0.1, 240)], 1e-5)
    assert together.accountant == "pld" and together.epsilon == pytest.approx(bounds["pld"])
    assert math.isinf(spent([*three.charges(), charge("d", private=False)], 1e-5).epsilon)
    nothing_begun = charge("d", 0, private=False)
    assert spent([*three.charges(), nothing_begun], 1e-5) == together
    assert spent([], 1e-5).epsilon == 0


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


EDITS: dict[str, Callable[[list[str]], list[str]]] = {
    "fewer steps": lambda lines: [lines[0], lines[1].replace('"steps": 80', '"steps": 8'), lines[2]],
    "another set": lambda lines: [lines[0].replace("mnist", "celeba"), *lines[1:]],
    "a line taken out": lambda lines: [lines[0], lines[2]],
    "the first line taken out": lambda lines: lines[1:],
    "two lines changed places": lambda lines: [lines[1], lines[0], lines[2]],
    "a line twice": lambda lines: [*lines, lines[2]],
    "a line of one's own": lambda lines: [*lines, json.dumps({"run": "d", "steps": 0}) + "\n"],
    "no object": lambda lines: [*lines, "3\n"],
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_noticed_and_nothing_is_added_to_it(edit: str, three: Ledger) -> None:
    three.path.write_text("".join(EDITS[edit](lines_of(three.path))))
    edited = three.path.read_bytes()
    for action in (three.charges, lambda: three.enter(charge("e"))):
        with pytest.raises(UserError, match=r"privacy_ledger\.jsonl.*(edited|cannot be read)") as caught:
            action()
        assert "\n" not in str(caught.value)
    assert three.path.read_bytes() == edited


def test_a_new_digest_does_not_hide_an_edit(three: Ledger) -> None:
    lines = read_lines(three.path)
    del lines[0]["digest"]
    lines[0]["steps"] = 1
    lines[0]["digest"] = ledgers._digest(lines[0])
    three.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="line 2: the ledger was edited"):
        three.charges()


def test_a_run_notices_that_its_line_is_gone(three: Ledger) -> None:
    mine = read_lines(three.path)[2]["digest"]
    three.enter(charge("c", 70), known=mine)
    three.path.write_text("".join(lines_of(three.path)[:2]))
    assert len(three.charges()) == 2, "a chain that was cut at its end is whole in itself"
    with pytest.raises(UserError, match=r"line with which this run was charged.*edited or replaced"):
        three.enter(charge("c"), known=mine)
    three.path.unlink()
    with pytest.raises(UserError, match="edited or replaced"):
        three.enter(charge("c"), known=mine)


def test_who_is_not_admitted_leaves_no_trace(three: Ledger) -> None:
    seen: list[Charge] = []

    def refuse(others: Sequence[Charge]) -> None:
        seen.extend(others)
        raise UserError("no")

    three.enter(charge("x", private_set="digits"))
    before = three.path.read_bytes()
    with pytest.raises(UserError, match="no"):
        three.enter(charge("c", 90), refuse)
    assert three.path.read_bytes() == before
    assert [other.run for other in seen] == ["a", "b", "x"], "not the run itself"


# Crashes and company


def test_half_a_line_is_left_out_and_then_removed(three: Ledger) -> None:
    whole = three.path.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (start, start + 1, start + 40, len(whole) - 2):
        three.path.write_bytes(whole[:cut])
        assert [c.run for c in three.charges()] == ["a", "b"]
        three.enter(charge("d"))
        assert [c.run for c in three.charges()] == ["a", "b", "d"]


def test_a_charge_whose_line_lacks_its_end_alone_counts(three: Ledger) -> None:
    three.path.write_bytes(three.path.read_bytes()[:-1])
    assert [c.run for c in three.charges()] == ["a", "b", "c"]
    three.enter(charge("d"))
    assert [c.run for c in three.charges()] == ["a", "b", "c", "d"]


WRITER = """
import sys
from pathlib import Path
from dp_lora.privacy.accounting import Mechanism
from dp_lora.privacy.ledger import Charge, Ledger
ledger = Ledger(Path(sys.argv[1]))
for number in range(100_000):
    ledger.enter(Charge(f"{sys.argv[2]}-{number}", "mnist", Mechanism(1.5, 0.1, 80), 1e-5))
    print(number, flush=True)
"""


def writer(path: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_killed_writers_leave_a_whole_ledger_with_all_that_they_reported(ledger: Ledger) -> None:
    reported: dict[str, int] = {}
    writers = {name: writer(ledger.path, name) for name in "pq"}
    for name, process in writers.items():
        assert process.stdout is not None
        for _ in range(12):
            reported[name] = int(process.stdout.readline())
    for name, process in writers.items():
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        reported[name] = max([reported[name], *map(int, rest.split())])
    held = {c.run for c in ledger.charges()}
    for name, last in reported.items():
        assert {f"{name}-{number}" for number in range(last + 1)} <= held
    assert len(held) <= sum(reported.values()) + 2 * len(writers), "at most one more each, not yet reported"
    ledger.enter(charge("after"))


def at_once(ledger: Ledger, threads: int = 6, each: int = 4) -> None:
    def work(number: int) -> None:
        for turn in range(each):
            # A thread that finds the ledger broken has nothing more to do.
            try:
                Ledger(ledger.path).enter(charge(f"{number}-{turn}"))
            except UserError:
                return

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def test_who_writes_at_once_loses_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    # Time between reading and adding, in which others would come between.
    read = Ledger._entries
    monkeypatch.setattr(Ledger, "_entries", lambda self: [read(self), time.sleep(0.002)][0])
    at_once(ledger)
    assert len(ledger.charges()) == 24
    monkeypatch.setattr(Ledger, "_wait_for", lambda self, descriptor: None)
    ledger.path.unlink()
    at_once(ledger)
    with pytest.raises(UserError, match="edited"):
        assert len(ledger.charges()) == 24


def test_a_ledger_that_somebody_holds_or_that_has_no_place_is_one_line(
    three: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "PATIENCE_S", 0.05)
    with three.path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"privacy_ledger\.jsonl.*cannot be locked.*expected"):
            three.enter(charge("d"))
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "ledger.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"cannot be (locked and written|read).*"):
            Ledger(path).enter(charge("a"))

    def no_locks(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"cannot be locked.*Operation not supported.*paths\.ledger"):
        three.enter(charge("d"))
    assert len(three.charges()) == 3


def test_a_ledger_that_is_let_go_in_time_is_waited_for(three: Ledger) -> None:
    with three.path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        release = threading.Timer(0.1, fcntl.flock, (held, fcntl.LOCK_UN))
        release.start()
        three.enter(charge("d"))
        release.join()
    assert len(three.charges()) == 4


def test_a_charge_knows_its_run_alone() -> None:
    assert {field.name for field in dataclasses.fields(Charge)} == {
        "run", "private_set", "mechanism", "delta", "private", "unit", "search",
    }  # fmt: skip
