"""Plain lines at the start, at the end and every ten seconds; a bar on a terminal; nothing private."""

from __future__ import annotations

import contextlib
import io

import pytest

from dp_lora.records.progress import Progress, duration, rate
from dp_lora.records.tracker import PrivateValueError


class Clock:
    """Seconds that move only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_stage(clock: Clock, seconds: float, steps: int, initial: int = 0) -> list[str]:
    stream = io.StringIO()
    with Progress(steps, "finetune", initial, stream=stream, clock=clock) as progress:
        for step in range(initial, steps):
            clock.now += seconds
            progress.update(epsilon=step / 10)
    return stream.getvalue().splitlines()


def test_lines_come_at_the_start_the_end_and_at_most_every_ten_seconds() -> None:
    lines = run_stage(Clock(), seconds=2.1, steps=80)
    assert lines[0] == "finetune 0/80"
    assert lines[1] == "finetune 5/80, 2.1 s/step, 2:38 left, epsilon 0.4"
    assert lines[-1] == "finetune 80/80, 2.1 s/step, took 2:48, epsilon 7.9"
    assert [int(line.split()[1].split("/")[0]) for line in lines[1:-1]] == list(range(5, 80, 5))


def test_fast_steps_give_two_lines() -> None:
    lines = run_stage(Clock(), seconds=0.01, steps=400)
    assert len(lines) == 2
    assert lines[-1].startswith("finetune 400/400, 100 steps/s, took 0:04")


def test_a_resumed_stage_counts_its_rate_from_its_own_steps() -> None:
    lines = run_stage(Clock(), seconds=4.0, steps=80, initial=70)
    assert lines[0] == "finetune 70/80, resumed at 70"
    assert lines[1].startswith("finetune 73/80, 4.0 s/step, 0:28 left")
    assert lines[-1].startswith("finetune 80/80, 4.0 s/step, took 0:40")


def test_an_interrupted_stage_says_where_it_stopped() -> None:
    stream, clock = io.StringIO(), Clock()
    with contextlib.suppress(KeyboardInterrupt), Progress(9, "finetune", stream=stream, clock=clock) as bar:
        clock.now += 3
        bar.update()
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1] == "finetune 1/9, 3.0 s/step, stopped after 0:03"


def test_a_terminal_gets_a_bar_with_the_fields() -> None:
    stream = Terminal()
    with Progress(8, "finetune", 2, stream=stream) as progress:
        for _ in range(6):
            progress.update(epsilon=6.314, signal_to_noise=0.25)
    shown = stream.getvalue()
    assert "\r" in shown
    assert "finetune: 100%" in shown
    assert "8/8" in shown
    assert "epsilon 6.31, signal to noise 0.25" in shown


@pytest.mark.parametrize(("mode", "bar"), [("lines", False), ("bar", True)])
def test_a_mode_that_is_asked_for_wins_over_the_kind_of_stream(mode: str, bar: bool) -> None:
    stream = io.StringIO() if bar else Terminal()
    with Progress(1, "sample", mode=mode, unit="image", stream=stream) as progress:
        progress.update()
    assert ("\r" in stream.getvalue()) == bar


def test_off_and_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    for mode, rank in (("off", 0), ("bar", 1), ("lines", 3)):
        with Progress(1, "finetune", mode=mode, rank=rank, stream=stream) as progress:
            progress.update()
    monkeypatch.setenv("RANK", "2")
    with Progress(1, "finetune", stream=stream) as progress:
        progress.update()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("mode", ["bar", "lines", "off"])
def test_a_private_loss_cannot_be_shown_and_a_public_one_can(mode: str) -> None:
    stream = io.StringIO()
    refused = pytest.raises(PrivateValueError, match="loss may not leave stage finetune")
    with refused, Progress(1, "finetune", mode=mode, stream=stream) as progress:
        progress.update(loss=0.731)
    assert "0.731" not in stream.getvalue()
    for name, public in (("pretrain", False), ("finetune", True)):
        with Progress(1, name, mode="lines", public=public, stream=stream) as progress:
            progress.update(loss=0.731)
        assert stream.getvalue().endswith("loss 0.731\n")


def test_rates_and_durations_read_well() -> None:
    assert [rate(s) for s in (0.004, 0.4, 0.999, 1.0, 12.34)] == [
        "250 steps/s",
        "2.5 steps/s",
        "1.0 steps/s",
        "1.0 s/step",
        "12 s/step",
    ]
    assert [duration(s) for s in (0, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]
