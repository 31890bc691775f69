"""The installation of what tests need: one at a time, tried again, and a lost lock is no reason to skip."""

from __future__ import annotations

import multiprocessing
import subprocess
import time
from pathlib import Path

import pytest

from tests.builders import packages


def held(folder: Path) -> None:
    """What two processes of the tests do at once; the file tells whether they ever met."""
    packages.LOCK = folder / "lock"

    def run(*words: str) -> None:
        (folder / "busy").mkdir()  # fails when somebody else is in here
        time.sleep(0.05)
        (folder / "busy").rmdir()
        if words[0] == "install":
            (folder / "there").touch()
            with (folder / "log").open("a") as log:
                log.write("installed\n")

    packages.install(("x",), (folder / "there").exists, run)


def test_two_at_once_install_once_and_never_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=held, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(600)
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "installed\n"


def answers(*lines: str) -> tuple[list[str], object]:
    """A stand-in for apt-get that says these lines in turn; an empty one is a success."""
    left, given = list(lines), []

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        given.append(words[0])
        line = left.pop(0) if left else ""
        return subprocess.CompletedProcess(words, 100 if line else 0, "", line)

    return given, run


LOST = "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7 (apt-get)"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(packages.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("CI", raising=False)


def test_a_lost_lock_is_tried_again() -> None:
    given, run = answers(LOST, "", LOST, "", "")
    packages.install(("x",), lambda: given.count("install") == 2, run)  # type: ignore[arg-type]
    assert given == ["update", "update", "install", "update", "install"]


def test_a_lock_that_stays_lost_fails_and_does_not_skip() -> None:
    _, run = answers(*[LOST] * 20)
    with pytest.raises(pytest.fail.Exception, match=r"the tests need x, .*Could not get lock"):
        packages.install(("x",), lambda: False, run)  # type: ignore[arg-type]


def test_what_the_machine_cannot_have_is_skipped_but_not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    given, run = answers("E: are you root?", "E: are you root?")
    with pytest.raises(pytest.skip.Exception, match="no x here: E: are you root"):
        packages.install(("x",), lambda: False, run)  # type: ignore[arg-type]
    assert given == ["update"]
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception):
        packages.install(("x",), lambda: False, run)  # type: ignore[arg-type]
