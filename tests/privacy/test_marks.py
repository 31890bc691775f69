"""The mark of a run under way: one start of it goes on, and no record that is shorter than what was noted."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dp_lora.errors import UserError
from dp_lora.privacy import marks
from dp_lora.privacy.marks import Mark, Superseded


@pytest.fixture
def mark(tmp_path: Path) -> Mark:
    """Of a run whose record had 10 bytes when it began."""
    mark = Mark(tmp_path / "ledger.jsonl.run")
    mark.begin("first", 10)
    return mark


def test_a_mark_is_for_its_owner_alone_and_leaves_no_file_open(mark: Mark) -> None:
    assert mark.path.stat().st_mode & 0o777 == 0o600
    before = len(os.listdir("/proc/self/fd"))
    for progress in range(11, 16):
        mark.begin("second", progress)
        mark.note("second", progress)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_the_last_start_alone_goes_on(mark: Mark) -> None:
    mark.note("first", 20)
    mark.begin("second", 20)
    with pytest.raises(Superseded, match="another start of this run goes on"):
        mark.note("first", 30)
    mark.note("second", 30)
    mark.end()
    mark.end()
    with pytest.raises(Superseded, match="another start of this run has ended it"):
        mark.note("second", 40)


def test_a_record_that_is_shorter_than_what_was_noted_does_not_go_on(mark: Mark) -> None:
    mark.note("first", 30)
    mark.note("first", 20)  # what was noted stays noted
    for call in (lambda: mark.check(29, expected=True), lambda: mark.begin("second", 29)):
        with pytest.raises(Superseded, match="steps were taken that this record does not have"):
            call()
    mark.check(30, expected=True)
    mark.begin("second", 30)


def test_a_mark_that_is_missed_or_was_edited_is_an_error(mark: Mark) -> None:
    for content in ("{}", "[1]", '{"nonce": "first", "progress": "many"}'):
        mark.path.write_text(content)
        with pytest.raises(UserError, match="was edited; expected the file as it was written"):
            mark.check(10, expected=False)
    mark.end()
    mark.check(0, expected=False)
    with pytest.raises(UserError, match="is not there, though its run has not ended"):
        mark.check(0, expected=True)


def test_what_is_noted_reaches_the_disk_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, synced = [100.0], list[float]()
    monkeypatch.setattr(marks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(now[0]))
    mark = Mark(tmp_path / "mark")
    mark.begin("first", 0)
    for progress, seconds in enumerate((100.5, 101.5, 102.0, 103.0), start=1):
        now[0] = seconds
        mark.note("first", progress)
    assert synced == [100.0, 101.5, 103.0]
