"""Jobs of a sweep as processes of this machine, as many at a time as it has cores and GPUs for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import JobPaths

from dp_lora.errors import UserError
from sweeps.cluster.cells import Cell
from sweeps.cluster.ledger import Ledger, Submission
from sweeps.cluster.node import run_cell

STOP_S = 300.0
"""How long the driver waits for its jobs to save when it is interrupted."""

FOREVER_MIN = 60 * 24 * 365


class Pool:
    """The processes of one sweep on this machine.

    Args:
        ledger: of the sweep.
        max_parallel: jobs at the same time; null takes as many as there are cores for, at least one.
        max_kills: how often a job that was killed from outside is started again.
        python: shell words that start Python.
    """

    def __init__(self, ledger: Ledger, max_parallel: int | None, max_kills: int, python: str | None) -> None:
        self.ledger, self.max_kills, self.python = ledger, max_kills, python
        self.max_parallel = max_parallel
        self.gpus = visible_gpus()
        self._waiting: list[Cell] = []
        self._running: dict[str, tuple[Cell, list[int]]] = {}
        self._cells: dict[str, Cell] = {}
        self._started: dict[str, submitit.LocalJob[Any]] = {}
        self._kills: dict[str, int] = {}

    @staticmethod
    def check(cells: Sequence[Cell]) -> None:
        """Raises UserError when this machine cannot give one of the requests."""
        gpus = visible_gpus()
        for cell in cells:
            resources = cell.config.resources
            if resources.nodes > 1:
                raise UserError(f"resources.nodes={resources.nodes}: expected 1 with hydra/launcher=local")
            if resources.gpus > len(gpus):
                raise UserError(
                    f"resources.gpus={resources.gpus}: expected at most {len(gpus)}, which this machine has"
                )

    def settle(self) -> None:
        """Looks into starts during which a driver died: records the process, or that there is none."""
        for submission in self.ledger.open_submissions():
            folder = os.fsencode(self._folder(submission))
            found = [
                pid for pid, words in _processes() if b"submitit.local._local" in words and folder in words
            ]
            if found:
                self.ledger.submitted(submission, [str(found[0])])
            else:
                self.ledger.give_up(submission)

    def finally_report(self) -> None:
        """The driver writes the report itself: without it no job would start."""

    def adopt(self, jobs: Mapping[str, Cell]) -> None:
        """Takes back jobs that an earlier driver left running: they hold their cores and GPUs."""
        self._cells.update(jobs)
        for job, cell in jobs.items():
            devices = _environment(int(job)).get("CUDA_VISIBLE_DEVICES", "")
            self._running[job] = (cell, [int(word) for word in devices.split(",") if word.isdigit()])

    def submit(self, cells: Sequence[Cell]) -> Iterator[tuple[Submission, str]]:
        """Starts as many of the cells as there is room for; the rest follow as others end."""
        self._waiting += cells
        yield from self.fill()

    def fill(self) -> Iterator[tuple[Submission, str]]:
        """Starts waiting cells in the room that ended jobs have left."""
        while self._waiting:
            live = self.live()
            self._running = {job: held for job, held in self._running.items() if job in live}
            cell = self._waiting[0]
            taken = [device for _, devices in self._running.values() for device in devices]
            free = [device for device in self.gpus if device not in taken]
            if len(self._running) >= self._limit(cell) or cell.config.resources.gpus > len(free):
                return
            self._waiting.pop(0)
            yield self._start(cell, free[: cell.config.resources.gpus])

    def _limit(self, cell: Cell) -> int:
        if self.max_parallel is not None:
            return self.max_parallel
        asked = cell.config.resources.cpus * cell.config.resources.processes_per_node
        return max(1, len(os.sched_getaffinity(0)) // asked)

    def _start(self, cell: Cell, gpus: list[int]) -> tuple[Submission, str]:
        resources = cell.config.resources
        self.ledger.freeze(cell)
        self.ledger.failure(cell.identity).unlink(missing_ok=True)
        submission = self.ledger.submitting([cell.identity])
        executor = submitit.LocalExecutor(self._folder(submission), python=self.python)
        executor.update_parameters(
            timeout_min=FOREVER_MIN,
            tasks_per_node=resources.processes_per_node,
            gpus_per_node=len(gpus),
            visible_gpus=tuple(gpus),
            stderr_to_stdout=True,
            setup=list(resources.setup),
        )
        # A terminal's Ctrl-C is for the driver, which then stops its jobs.
        earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            job: Any = executor.submit(run_cell, str(self.ledger.folder), cell.identity)
        finally:
            signal.signal(signal.SIGINT, earlier)
        self.ledger.submitted(submission, [job.job_id])
        self._started[job.job_id] = job
        self._running[job.job_id] = (cell, gpus)
        self._cells[job.job_id] = cell
        return submission, f"GPUs {gpus}" if gpus else "no GPU"

    def live(self) -> dict[str, str]:
        """State by job of those that still run."""
        known = {*self.ledger.jobs().values(), *self._running}
        return {job: "RUNNING" for job in known if self._is_alive(job)}

    def release(self, live: Mapping[str, str]) -> list[str]:
        """Frees jobs that are held: nothing holds one here."""
        return []

    def _is_alive(self, job: str) -> bool:
        if (started := self._started.get(job)) is not None:
            return not started.done()
        # Of an earlier driver: its number may belong to another process by now.
        return any(pid == int(job) and os.fsencode(self.ledger.logs) in words for pid, words in _processes())

    def ended(self, jobs: Sequence[str]) -> dict[str, str]:
        """How each of these jobs ended; one that was killed is started again, and left out."""
        answer = {}
        for job in jobs:
            cell = self._cells.get(job)
            if cell is not None and not self.ledger.failure(cell.identity).exists() and not cell.is_done():
                self._kills[cell.identity] = self._kills.get(cell.identity, 0) + 1
                if self._kills[cell.identity] <= self.max_kills:
                    self._waiting.append(cell)
                    continue
                answer[job] = "killed"
            else:
                answer[job] = "ended"
        return answer

    def log(self, job: str) -> Path:
        """The file with the output of the job's first process."""
        submission = next(s for s in self.ledger.submissions.values() if s.jobs and job in s.jobs)
        return JobPaths(self._folder(submission), job).stdout

    def _folder(self, submission: Submission) -> Path:
        """The folder of submitit's files, by which a process of this job is known."""
        return self.ledger.logs / submission.name

    def drop(self) -> set[str]:
        """Gives up the cells that wait for room, and says which."""
        dropped = {cell.identity for cell in self._waiting}
        self._waiting = []
        return dropped

    def stop(self) -> str:
        """Stops the jobs, which save first, and says so."""
        for job in self.live():
            os.kill(int(job), signal.SIGTERM)
        end = time.monotonic() + STOP_S
        while self.live() and time.monotonic() < end:
            time.sleep(0.1)
        if left := self.live():
            return f"its jobs were told to save and stop; {len(left)} of them still run"
        return "its jobs have saved and stopped"


def visible_gpus() -> list[int]:
    """Numbers of the GPUs that this process may use, without loading torch."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [int(word) for word in allowed.split(",") if word.strip().isdigit()]
    if shutil.which("nvidia-smi") is None:
        return []
    said = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return list(range(sum(line.startswith("GPU ") for line in said.stdout.splitlines())))


def _processes() -> Iterator[tuple[int, bytes]]:
    """Number and command line of every process."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                yield int(folder.name), (folder / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue


def _environment(pid: int) -> dict[str, str]:
    """The environment that a process of this user was started with."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)
