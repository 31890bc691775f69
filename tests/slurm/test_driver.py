"""The driver of a sweep: killed, started twice, detached, and told things that cannot be."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest

from dp_lora.storage.files import read_json
from sweeps.__main__ import main as sweeps
from tests.builders.cluster import Start, Sweep, is_right, now, run, until
from tests.builders.counting import starts

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]


def submitted_jobs(sweep: Sweep) -> list[str]:
    """Every job that SLURM was ever given under the names of this sweep, apart from the reports."""
    names = ",".join(sweep.ledger.submissions)
    lines = run("sacct", "-X", "-n", "-P", "--name", names, "-o", "JobID").split()
    return sorted(lines)


@pytest.fixture(scope="module", autouse=True)
def limited(start: Start) -> Sweep:
    """A job whose time limit comes before its end, while the other tests run. Its driver is no fork."""
    return start(
        "train.max_steps=10", "resources.time_limit_min=1", "hydra.launcher.preemption_notice_s=45", "seed=0",
        "tracking.tags=[0-hold]", forked=False,
    )  # fmt: skip


def test_a_killed_driver_is_replaced_by_the_next_and_no_job_comes_twice(start: Start) -> None:
    words = ("seed=0,1,2", "train.max_steps=10", "tracking.tags=[0-hold,1-hold,2-hold]")
    first = start(*words)
    cells = first.begun()
    until(lambda: min(map(now, cells.values())) >= 1, first)
    os.killpg(first.process.pid, signal.SIGKILL)
    first.wait()
    second = start(*words, outputs=first.outputs)
    until(lambda: "under way" in second.said() or second.process.poll() is not None, second)
    assert "0 done, 3 under way, 0 to submit" in second.said()
    third = start(*words, outputs=first.outputs)
    assert third.wait() == 2
    (line,) = third.said().splitlines()
    assert f"process {second.process.pid}" in line and "driving this sweep already" in line
    second.let_go()
    assert second.wait() == 0, second.said()
    assert all(is_right(directory, 10) for directory in cells.values())
    assert len(submitted_jobs(second)) == 3
    assert [len(starts(directory)) for directory in cells.values()] == [1, 1, 1]
    last = start(*words, outputs=first.outputs)
    assert last.wait() == 0 and "3 done, 0 under way, 0 to submit" in last.said()
    assert len(submitted_jobs(last)) == 3


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_driver_killed_around_its_submission_submits_nothing_twice(
    moment: str, start: Start, tmp_path: Path
) -> None:
    sbatch = shutil.which("sbatch")
    script = tmp_path / "sbatch"
    kill = 'case "$*" in *submission_file*) kill -9 $PPID; exit 1;; esac'
    lines = {"before": [kill, f'exec {sbatch} "$@"'], "after": [f'{sbatch} "$@"', kill]}[moment]
    script.write_text("\n".join(["#!/bin/sh", *lines]))
    script.chmod(0o755)
    words = ("seed=0,1", "train.max_steps=10", "tracking.tags=[0-hold,1-hold]")
    first = start(*words, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert first.wait() == -signal.SIGKILL
    # As if the driver had died a minute ago: by then no sbatch is on its way any more.
    path = first.ledger.folder / "jobs.jsonl"
    path.write_text(re.sub(r'"time": (\d+)', lambda found: f'"time": {int(found[1]) - 60}', path.read_text()))
    second = start(*words, outputs=first.outputs)
    until(lambda: "to submit" in second.said() or second.process.poll() is not None, second)
    second.let_go()
    assert second.wait() == 0, second.said()
    expected = {"before": "0 under way, 2 to submit", "after": "2 under way, 0 to submit"}[moment]
    assert expected in second.said()
    assert len(submitted_jobs(second)) == 2
    assert all(is_right(directory, 10) for directory in second.cells().values())
    assert [len(starts(directory)) for directory in second.cells().values()] == [1, 1]


def test_cancel_takes_a_sweep_and_its_report_off_the_cluster(start: Start) -> None:
    words = ("seed=0,1", "train.max_steps=10", "tracking.tags=[0-hold,1-hold]")
    first = start(*words)
    cells = first.begun()
    until(lambda: min(map(now, cells.values())) >= 1, first)
    assert sweeps(["cancel", str(first.ledger.folder)]) == 0
    assert first.wait() == 130, first.said()
    names = {*first.ledger.submissions, first.ledger.report_name}
    until(lambda: not names & set(run("squeue", "-h", "-o", "%j").split()), first)
    assert max(map(now, cells.values())) < 10
    first.let_go()
    again = start(*words, outputs=first.outputs)
    assert again.wait() == 0, again.said()
    assert all(is_right(directory, 10) for directory in cells.values())
    assert [len(starts(directory)) for directory in cells.values()] == [2, 2]


def test_edits_after_the_submission_change_nothing(start: Start, tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    (conf / "train").mkdir(parents=True)
    mine = conf / "train" / "mine.yaml"
    mine.write_text("max_steps: 10\nexpected_batch_size: 60\n")
    words = ("seed=0,1", "train=mine", f"--config-dir={conf}", "+resources.sbatch.hold=''")
    left_out = ("train.max_steps", "train.expected_batch_size")
    first = start(*words, "hydra.launcher.detach=true", without=left_out)
    assert first.wait() == 0, first.said()
    assert "detached" in first.said()
    mine.write_text("max_steps: 20\nexpected_batch_size: 60\n")
    refused = start(*words, outputs=first.outputs, without=left_out)
    assert refused.wait() == 2
    (line,) = refused.said().splitlines()
    assert "train.max_steps=10, now 20" in line and "hydra.launcher.name=" in line
    arrays = {job.partition("_")[0] for job in first.ledger.jobs().values()}
    for array in arrays:
        run("scontrol", "release", array)
    cells = first.cells()
    until(lambda: all(is_right(directory, 10) for directory in cells.values()), first)
    assert [row["max_steps"] for directory in cells.values() for row in starts(directory)] == [10, 10]
    # Nobody waited: the table comes from the job that SLURM started after the others.
    report = first.ledger.folder / "runs.csv"
    until(report.exists, first)
    assert report.read_text().count(",done,") == 2


def test_another_version_of_the_code_is_refused_and_can_be_accepted(start: Start) -> None:
    first = start("seed=0", "train.max_steps=4")
    assert first.wait() == 0, first.said()
    record = first.ledger.folder / "sweep.json"
    record.write_text(record.read_text().replace(read_json(record)["code"], "0123456789ab"))
    refused = start("seed=0", "train.max_steps=4", outputs=first.outputs)
    assert refused.wait() == 2
    (line,) = refused.said().splitlines()
    assert "other code (0123456789ab" in line and "hydra.launcher.any_code=true" in line
    again = start("seed=0", "train.max_steps=4", "hydra.launcher.any_code=true", outputs=first.outputs)
    assert again.wait() == 0 and "1 done" in again.said()


def test_a_job_gets_gpus_of_its_own(start: Start) -> None:
    # The same run with other resources is the same run.
    sweep = start("seed=0,1", "train.max_steps=4", "resources.cpus=1,2")
    assert sweep.wait() == 2
    (line,) = sweep.said().splitlines()
    assert "resources.cpus=1,2: both ask for the same run" in line
    gpus = start("seed=0,1", "train.max_steps=4", "resources.gpus=2", "tracking.tags=[0-hold,1-hold]")
    cells = gpus.begun()
    until(lambda: min(map(now, cells.values())) >= 1, gpus)
    gpus.let_go()
    assert gpus.wait() == 0, gpus.said()
    rows = [starts(directory)[0] for directory in gpus.cells().values()]
    assert sorted(row["gpus"] for row in rows) == ["0,1", "2,3"]


def test_a_time_limit_is_no_end(limited: Sweep) -> None:
    (directory,) = limited.cells().values()
    until(lambda: len(starts(directory)) >= 2, limited)
    limited.let_go()
    assert limited.wait() == 0, limited.said()
    rows = starts(directory)
    assert is_right(directory, 10)
    assert [row["from"] for row in rows[1:]] != [0] * (len(rows) - 1)
    assert len({row["job"] for row in rows}) == 1


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("resources.partition=nowhere", "nowhere"),
        ("resources.account=nobody", "account"),
        ("resources.gpus=64", "Requested node configuration is not available"),
        ("resources.memory_gb=4000", "Requested node configuration is not available"),
    ],
)
def test_what_slurm_refuses_is_one_line_in_its_words(word: str, expected: str, start: Start) -> None:
    refused = start("seed=0", word)
    assert refused.wait() == 2
    (line,) = refused.said().splitlines()
    assert line.startswith("dp-lora: resources: SLURM refuses") and expected in line
    assert not (refused.outputs / "sweeps").exists()


def test_the_daemons_listen_on_this_machine_only(slurm: None) -> None:
    folder = Path(os.environ["SLURM_BOX"])
    pids = [int(path.read_text()) for path in (folder / "run").glob("*.pid")]
    assert len(pids) == 5
    inodes = {
        os.readlink(link).removeprefix("socket:[").removesuffix("]")
        for pid in pids
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink() and os.path.lexists(link)
    }
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        rows = (
            [line.split() for line in Path(table).read_text().splitlines()[1:]]
            if Path(table).exists()
            else []
        )
        for row in rows:
            if row[3] == "0A" and row[9] in inodes:
                address = socket.inet_ntoa(bytes.fromhex(row[1].split(":")[0])[::-1])
                assert address == "127.0.0.1"
