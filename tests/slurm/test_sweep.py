"""What a cluster does to jobs, on a real SLURM: nothing finished is lost, and nothing runs twice."""

from __future__ import annotations

import os
import signal

import pytest

from tests.builders.cluster import LARGEST_ARRAY, STEPS, Start, Sweep, how_it_ended, is_right, now, run, until
from tests.builders.counting import starts

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

QUIET, RAISES, KILLS, MEMORY, USR2, REQUEUED, CANCELLED, KILLED_ONCE, TERMINATED = range(9)


@pytest.fixture(scope="module")
def treated(start: Start) -> Sweep:
    """Nine jobs, each of which something else happens to; the driver has ended."""
    holds = ",".join(f"{number}-hold" for number in (USR2, REQUEUED, CANCELLED, KILLED_ONCE, TERMINATED))
    sweep = start(
        f"seed={','.join(map(str, range(9)))}",
        f"train.max_steps={STEPS}",
        f"tracking.tags=[{RAISES}-raise,{KILLS}-kill,{MEMORY}-memory,{holds}]",
        "hydra.launcher.max_kills=1",
    )
    cells = sweep.begun()
    acts = {
        USR2: lambda: run("scancel", "--signal=USR2", sweep.job(USR2)),
        REQUEUED: lambda: run("scontrol", "requeue", sweep.job(REQUEUED)),
        CANCELLED: lambda: run("scancel", sweep.job(CANCELLED)),
        KILLED_ONCE: lambda: os.kill(starts(cells[KILLED_ONCE])[-1]["pid"], signal.SIGKILL),
        TERMINATED: lambda: run("scancel", "--signal=TERM", sweep.job(TERMINATED)),
    }
    for number, act in acts.items():
        until(lambda number=number: now(cells[number]) >= 3, sweep)
        act()
    # SLURM kills seconds after it was asked to; until then these two hold.
    until(lambda: len(starts(cells[REQUEUED])) == 2, sweep)
    until(lambda: sweep.job(CANCELLED) not in run("squeue", "-h", "-r", "-o", "%F_%K").split(), sweep)
    sweep.let_go()
    sweep.wait()
    return sweep


def test_the_others_finish_when_some_fail(treated: Sweep) -> None:
    failed = {RAISES, KILLS, MEMORY, CANCELLED}
    for number, directory in treated.cells().items():
        assert is_right(directory) == (number not in failed), (number, treated.said())
    assert treated.process.returncode == 1


def test_more_cells_than_an_array_takes_are_several_arrays(treated: Sweep) -> None:
    submissions = treated.ledger.submissions.values()
    assert [len(submission.cells) for submission in submissions] == [LARGEST_ARRAY, 9 - LARGEST_ARRAY]
    arrays = [{job.partition("_")[0] for job in submission.jobs or []} for submission in submissions]
    assert [len(numbers) for numbers in arrays] == [1, 1] and arrays[0] != arrays[1]


def test_slurm_calls_a_failed_job_failed(treated: Sweep) -> None:
    assert how_it_ended(treated.job(RAISES)) == "FAILED"
    assert how_it_ended(treated.job(KILLS)) == "FAILED"
    assert how_it_ended(treated.job(MEMORY)) in ("FAILED", "OUT_OF_MEMORY", "CANCELLED")
    assert how_it_ended(treated.job(CANCELLED)).startswith("CANCELLED")
    assert how_it_ended(treated.job(QUIET)) == "COMPLETED"


def test_every_failure_is_reported_with_its_log_and_the_command_that_retries_it(treated: Sweep) -> None:
    said = treated.said()
    assert "4 of 9 cells failed" in said.splitlines()[-1]
    for number in (RAISES, KILLS, MEMORY, CANCELLED):
        (block,) = (part for part in said.split("failed: cell ")[1:] if part.startswith(f"{number} "))
        assert treated.job(number) in block
        assert f"seed={number}" in next(line for line in block.splitlines() if "retry  dp-lora -m" in line)
    assert "| dp-lora: RuntimeError: no such luck" in said
    assert "CANCELLED" in said
    report = (treated.ledger.folder / "table.md").read_text()
    assert report in said
    assert len([line for line in report.splitlines() if line.startswith("- seed=")]) == 4
    assert len((treated.ledger.folder / "runs.csv").read_text().splitlines()) == 1 + 9
    assert "no such luck" not in report, "what an unexpected error says stays in its private log"


def test_a_signal_saves_and_queues_again_under_the_same_number(treated: Sweep) -> None:
    first, second = starts(treated.cells()[USR2])
    assert first["job"] == second["job"] == treated.job(USR2)
    assert second["restart"] == 1
    assert second["from"] >= 3, "not one finished step was lost"


def test_without_a_signal_a_job_goes_on_from_its_last_checkpoint(treated: Sweep) -> None:
    for number in (REQUEUED, KILLED_ONCE):
        first, second = starts(treated.cells()[number])
        assert first["job"] == second["job"] == treated.job(number)
        # SLURM sends SIGTERM before it kills what is queued again, so that one may have saved in between.
        assert second["from"] >= 2 and (number == REQUEUED or second["from"] % 2 == 0)


def test_a_job_that_is_queued_again_leaves_the_others_of_its_array_alone(treated: Sweep) -> None:
    # The last job of an array has the array's own number.
    assert treated.job(KILLED_ONCE).endswith(f"_{LARGEST_ARRAY - 1}")
    for number in (QUIET, RAISES, CANCELLED, TERMINATED):
        assert len(starts(treated.cells()[number])) == 1, number


def test_a_job_that_is_told_to_end_saves_and_goes_on_until_it_is_ended(treated: Sweep) -> None:
    assert len(starts(treated.cells()[TERMINATED])) == 1


def test_a_job_that_kills_itself_is_queued_again_so_often_and_no_more(treated: Sweep) -> None:
    assert len(starts(treated.cells()[KILLS])) == 2
