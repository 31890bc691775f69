"""A sweep of real jobs in a cluster where everything goes wrong."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dp_lora.jobs.begun import begun
from dp_lora.storage.files import read_json, read_lines
from tests.builders.cluster import Start, Sweep, run, until
from tests.builders.forked import Nursery
from tests.builders.paced import is_allowed, let_end
from tests.builders.quiet import REAL, STEPS, Quiet, released, twin

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

BLOWS = ["kill -9", "USR2", "requeue"]


@dataclass(frozen=True)
class Scale:
    """How large a sweep, and how much happens to it."""

    multiplicities: tuple[str, ...]
    grid: tuple[str, ...]
    strikes: Sequence[tuple[str, bool]]
    """What happens, and whether to a job that trains, in any order."""
    parallel: int
    """Jobs at once."""
    restarts: int
    """How often jobs have to go on from a checkpoint."""
    blows: int
    """How many there are at least, with those that hit until jobs went on so often."""
    holds: bool = False
    """Whether jobs wait in their last step for the blows; of many, they would keep out the killed ones."""


SMALL = Scale(
    ("k2",),
    ("epsilon=eps1,eps3,eps10", "lora_rank=r2"),
    [("kill -9", False), ("USR2", True), ("requeue", True), ("urgent", True), ("node down", True),
     ("driver", False)],
    parallel=2, restarts=2, blows=8, holds=True,
)  # fmt: skip
LARGE = Scale(
    ("k1", "k2"),
    ("epsilon=eps1,eps3,eps5,eps10", "lora_rank=r2,r4,r8"),
    [*((how, training) for training in (True, False) for how in [*BLOWS, *BLOWS, "kill -9"]),
     ("urgent", True), ("node down", True), ("driver", False)],
    parallel=3, restarts=3, blows=20,
)  # fmt: skip


def processes(job: str | None = None) -> list[int]:
    """Processes on the node that train: of one job; or of all, with the daemons that watch them."""
    wanted = {f"SLURM_CONF={os.environ['SLURM_CONF']}".encode()}
    if job is not None:
        array, _, task = job.partition("_")
        wanted |= {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = set((folder / "environ").read_bytes().split(b"\0"))
        except OSError:  # it has ended
            continue
        trains = b"submitit.core._submit" in words and b"python" in words[0]
        watches = job is None and words[0].startswith(b"slurmstepd")
        if (trains or watches) and wanted <= environment:
            found.append(int(folder.name))
    return found


def _trains(directory: Path) -> bool:
    return (directory / "checkpoint" / "state.pt").exists() and not (directory / "adapter").exists()


class Havoc:
    """Kills and disturbs the jobs of a sweep, and its driver."""

    def __init__(self, sweep: Sweep, again: Callable[[], Sweep]) -> None:
        self.sweep, self.again = sweep, again
        self.random = random.Random(0)
        self.done: list[str] = []

    def job(self, training: bool) -> str | None:
        """A running job; if so asked one that has begun to train and has not ended."""
        running = run("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%F_%K|%j").splitlines()
        ours = [line.split("|")[0] for line in running if line.split("|")[1] in self.sweep.ledger.submissions]
        cells = {job: cell for cell, job in self.sweep.ledger.jobs().items()}
        directories = {row["identity"]: Path(row["directory"]) for row in self._cells()}
        if training:
            ours = [job for job in ours if _trains(directories[cells[job]])]
        return self.random.choice(ours) if ours else None

    @staticmethod
    def _fails(*words: str) -> bool:
        """Whether SLURM refuses: the job may have ended in between."""
        said = subprocess.run(words, capture_output=True, text=True)
        return bool(said.returncode or said.stderr)

    def _cells(self) -> list[dict[str, Any]]:
        cells: list[dict[str, Any]] = read_json(self.sweep.ledger.folder / "sweep.json")["cells"]
        return cells

    def restarts(self) -> int:
        """How often jobs have gone on from a checkpoint so far."""
        records = (Path(row["directory"]) / "provenance.json" for row in self._cells())
        return sum(read_json(record)["restarts"] for record in records if record.exists())

    def let_one_end(self) -> None:
        """Lets a job end, unless fewer than two would be left for the blows to come."""
        held = [path for row in self._cells() if not is_allowed(path := Path(row["directory"]))]
        if len(held) > 2:
            let_end(self.random.choice([path for path in held if path.exists()] or held))

    def let_all_end(self) -> None:
        for row in self._cells():
            let_end(Path(row["directory"]))

    def strike(self, how: str, *, training: bool) -> None:
        job = until(lambda: self.job(training), self.sweep)
        if how == "kill -9":
            if not (found := processes(job)):
                return
            for process in found:
                os.kill(process, signal.SIGKILL)
        elif how == "USR2":
            if self._fails("scancel", "--signal=USR2", job):
                return
        elif how == "requeue":
            if self._fails("scontrol", "requeue", job):
                return
        elif how == "urgent":
            run("sbatch", "-p", "urgent", "-c", "16", "--mem=1G", "-o", "/dev/null", "--wrap", "sleep 1")
            until(
                lambda: job not in run("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%F_%K").split(),
                self.sweep,
            )
        elif how == "node down":
            node = run("sinfo", "-h", "-o", "%n").strip()
            run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
            # A node that is back before its jobs have died is sent them again, refuses, and is drained.
            until(lambda: not processes(), self.sweep)
            run("scontrol", "update", f"nodename={node}", "state=resume")
            until(
                lambda: run("sinfo", "-h", "-o", "%T").strip() in ("idle", "mixed", "allocated"), self.sweep
            )
        elif how == "driver":
            os.killpg(self.sweep.process.pid, signal.SIGKILL)
            self.sweep.wait()
            self.sweep = self.again()
        self.done.append(how)


def wreak(sweep: Sweep, again: Callable[[], Sweep], scale: Scale) -> Havoc:
    """Kills until jobs went on often enough from a checkpoint, then until there were enough blows."""
    havoc = Havoc(sweep, again)
    if not scale.holds:
        havoc.let_all_end()
    strikes = list(scale.strikes)
    havoc.random.shuffle(strikes)
    while (before := havoc.restarts()) < scale.restarts:
        havoc.strike("kill -9", training=True)
        # The next blow could fall before this job has gone on.
        end = time.monotonic() + 30
        while havoc.restarts() == before and time.monotonic() < end:
            time.sleep(0.2)
    for how, training in strikes:
        havoc.let_one_end()
        time.sleep(havoc.random.uniform(0, 2))
        assert havoc.sweep.process.poll() is None, havoc.sweep.said()
        havoc.strike(how, training=training)
    while len(havoc.done) < scale.blows:  # those that came too late do not count
        havoc.strike("requeue", training=False)
    havoc.let_all_end()
    havoc.sweep.wait(1800)
    return havoc


@pytest.mark.parametrize(
    "scale", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["three cells", "24 cells"]
)
def test_a_sweep_through_havoc_ends_like_a_quiet_one(
    scale: Scale, start: Start, nursery: Nursery, cache: Path, tmp_path: Path
) -> None:
    grid = (f"noise_multiplicity={','.join(scale.multiplicities)}", *scale.grid)
    given = (*REAL, *grid, f"paths.cache={cache}", f"hydra.launcher.max_parallel={scale.parallel}",
             "hydra.launcher.max_kills=100", "hydra.launcher.job=tests.builders.paced:paced",
             "resources.memory_gb=1.5")  # fmt: skip
    sweep = start(*given, counting=False)
    sweep.begun()
    ended = wreak(sweep, lambda: start(*given, outputs=sweep.outputs, counting=False), scale)
    assert ended.sweep.process.returncode == 0, ended.sweep.said()
    assert len(ended.done) >= scale.blows, ended.done
    quiet = [
        Quiet(nursery, cache, tmp_path, [f"noise_multiplicity={k}", *scale.grid])
        for k in scale.multiplicities
    ]
    (outputs,) = {part() for part in quiet}
    cells = ended.sweep.cells()
    assert len(cells) == math.prod(1 + words.count(",") for words in grid)
    for directory in cells.values():
        assert released(directory) == released(twin(directory, outputs)), directory
        rows = read_lines(directory / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert begun(directory / "checkpoint") == STEPS, "no step was paid for twice"
    assert ended.restarts() >= scale.restarts, "some were hit while they trained"
    report = (ended.sweep.ledger.folder / "runs.csv").read_text()
    assert report.count(",done,") == len(cells)
