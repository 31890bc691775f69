"""The loop: learning rates, atomic checkpoints, and that an interrupted training ends like any other."""

from __future__ import annotations

import errno
import io
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_lora.errors import UserError
from dp_lora.records.progress import Progress
from dp_lora.storage import files
from dp_lora.training.loop import Checkpoint, learning_rate, resume, run_steps
from dp_lora.training.signals import Interrupted


class Counting:
    """A step whose state is a running hash, so that a step lost or taken twice shows."""

    def __init__(self) -> None:
        self.value = torch.zeros(3, dtype=torch.float64)
        self.at: dict[int, Any] = {}

    def __call__(self, step: int) -> dict[str, float]:
        self.value = torch.sin(self.value * 1.7 + step + 1)
        if step in self.at:
            self.at.pop(step)()
        return {"loss": float(self.value[0])}

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


def take(step: Counting, folder: Path, total: int = 12, minutes: float = 0.0) -> list[int]:
    """The numbers of the steps that were logged."""
    logged: list[int] = []
    checkpoint = Checkpoint(folder, minutes)
    finished = resume(step, checkpoint)
    with Progress(total, "test", initial=finished, public=True, mode="off", stream=io.StringIO()) as progress:
        run_steps(step, total, checkpoint, progress, lambda number, values: logged.append(number))
    return logged


def test_learning_rates() -> None:
    assert [learning_rate(2.0, "constant", s, 10) for s in (0, 5, 9)] == [2.0] * 3
    linear = [learning_rate(2.0, "linear", s, 10) for s in range(10)]
    assert linear == pytest.approx([2.0 - 0.2 * s for s in range(10)])
    cosine = [learning_rate(2.0, "cosine", s, 10) for s in range(10)]
    assert cosine == pytest.approx([1 + math.cos(math.pi * s / 10) for s in range(10)])
    warm = [learning_rate(2.0, "linear", s, 10, warmup_steps=3) for s in range(10)]
    assert warm[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0]) and warm[-1] == pytest.approx(2 / 7)
    assert all(rate > 0 for rate in linear + cosine + warm)


def test_a_checkpoint_is_private_and_reads_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint", minutes=1)
    assert checkpoint.load() is None
    checkpoint.save(3, {"a": torch.arange(4), "word": "x"})
    finished, state = checkpoint.load() or (0, {})
    assert finished == 3 and torch.equal(state["a"], torch.arange(4)) and state["word"] == "x"
    assert (tmp_path / "checkpoint").stat().st_mode & 0o777 == 0o700
    assert checkpoint.path.stat().st_mode & 0o777 == 0o600
    Checkpoint(tmp_path / "checkpoint", 1, writes=False).save(9, {})
    assert (checkpoint.load() or (0,))[0] == 3


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_crash_at_any_stage_of_a_write_leaves_the_old_checkpoint(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path, minutes=1)
    checkpoint.save(1, {"a": torch.zeros(2000)})

    def die(*args: Any, **kwargs: Any) -> None:
        raise Crash

    class Half:
        def __init__(self, descriptor: int, mode: str) -> None:
            self.file = os.fdopen(descriptor, mode)

        def __enter__(self) -> Half:
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise Crash

    class Os:
        def __getattr__(self, name: str) -> Any:
            if name == call:
                return die
            return Half if name == "fdopen" and call == "write" else getattr(os, name)

    with monkeypatch.context() as patched:
        patched.setattr(files, "os", Os())
        # Nor is anything cleaned up by a process that has died.
        patched.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(Crash):
            checkpoint.save(2, {"a": torch.ones(2000)})
    finished, state = Checkpoint(tmp_path, minutes=1).load() or (0, {})
    assert finished == 1 and not state["a"].any()
    checkpoint.save(2, {"a": torch.ones(2000)})
    assert (checkpoint.load() or (0,))[0] == 2


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_full_disk_is_one_clear_line_and_loses_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Os:
        def __getattr__(self, name: str) -> Any:
            # A folder's entry is read, not written.
            return full if name == call else getattr(os, name)

    step = Counting()
    with monkeypatch.context() as patched:
        step.at[5] = lambda: patched.setattr(files, "os", Os())
        with pytest.raises(
            UserError, match=r"no room for the checkpoint after step 6 .*same command"
        ) as caught:
            take(step, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert (Checkpoint(tmp_path, minutes=1).load() or (0,))[0] == 5
    again, whole = Counting(), Counting()
    assert take(again, tmp_path) == list(range(6, 13))
    take(whole, tmp_path / "whole")
    assert torch.equal(again.value, whole.value)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path: Path, keep: float) -> None:
    checkpoint = Checkpoint(tmp_path, minutes=1)
    checkpoint.save(1, {"a": torch.zeros(2000)})
    data = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(UserError, match="the checkpoint cannot be read") as caught:
        checkpoint.load()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="the checkpoint cannot be read"):
        Checkpoint(tmp_path, minutes=1).load()


@pytest.mark.parametrize("at", range(12))
def test_a_training_that_dies_anywhere_ends_like_one_that_does_not(at: int, tmp_path: Path) -> None:
    def die() -> None:
        raise Crash

    whole = Counting()
    assert take(whole, tmp_path / "whole") == list(range(1, 13))
    dying = Counting()
    dying.at[at] = die
    with pytest.raises(Crash):
        take(dying, tmp_path / "dying")
    again = Counting()
    assert take(again, tmp_path / "dying") == list(range(at + 1, 13))
    assert torch.equal(again.value, whole.value)
    # The broken twin: the step that died is skipped.
    assert not torch.equal(dying.value, whole.value) or at == 11
    assert take(Counting(), tmp_path / "dying") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_in_hand(number: signal.Signals, tmp_path: Path) -> None:
    step = Counting()
    step.at[4] = lambda: os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped after step 5 of 12"):
        take(step, tmp_path, minutes=60)
    assert signal.getsignal(number) is before
    again, whole = Counting(), Counting()
    assert take(again, tmp_path, minutes=60) == list(range(6, 13))
    take(whole, tmp_path / "whole")
    assert torch.equal(again.value, whole.value)


def test_a_signal_in_the_last_step_ends_the_training(tmp_path: Path) -> None:
    step = Counting()
    step.at[11] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert take(step, tmp_path, minutes=60)[-1] == 12
    assert (Checkpoint(tmp_path, 1).load() or (0,))[0] == 12


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    step = Counting()
    step.at[4] = twice
    with pytest.raises(KeyboardInterrupt) as caught:
        take(step, tmp_path, minutes=60)
    assert not isinstance(caught.value, Interrupted)


def test_checkpoints_come_when_they_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Checkpoint, "save", lambda self, finished, state: saved.append(finished))
    take(Counting(), tmp_path, minutes=60)
    assert saved == [12]
    saved.clear()
    take(Counting(), tmp_path, minutes=0)
    assert saved == list(range(1, 13))
