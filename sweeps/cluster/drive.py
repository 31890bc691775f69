"""The driver of a sweep: plans, submits what is neither done nor under way, watches, reports."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from dp_lora.errors import SweepFailed, UserError
from sweeps.cluster.cells import Cell, code_version
from sweeps.cluster.ledger import Ledger, Submission, command_line, sweep_folder
from sweeps.cluster.settings import check_launcher

FILES_ARRIVE_S = 60.0
"""How long a network file system may hide a file that another machine has written."""

ALIKE = 2
"""After so many failures for the same reason, and no success, the cells that wait are not started."""

LOG_LINES = 8
"""The last lines of a failed job's log that are shown at the end."""


class Cluster(Protocol):
    """Where jobs run: `slurm.Slurm` or `pool.Pool`."""

    def settle(self) -> None: ...

    def adopt(self, jobs: Mapping[str, Cell]) -> None: ...

    def submit(self, cells: Sequence[Cell]) -> Iterator[tuple[Submission, str]]: ...

    def fill(self) -> Iterator[tuple[Submission, str]]: ...

    def finally_report(self) -> None: ...

    def live(self) -> dict[str, str] | None: ...

    def release(self, live: Mapping[str, str]) -> list[str]: ...

    def ended(self, jobs: Sequence[str]) -> dict[str, str]: ...

    def log(self, job: str) -> Path: ...

    def drop(self) -> set[str]: ...

    def stop(self) -> str: ...


def launch(settings: Mapping[str, Any], config: DictConfig, cells: Sequence[Cell]) -> None:
    """Runs the jobs of a sweep and waits for them, unless `settings` say to plan or to detach.

    Args:
        settings: the fields of `LauncherConfig` by name.
        config: the sweep's composed configuration, with Hydra's own part.
        cells: its jobs.

    Raises UserError for what cannot be launched, before anything is written; SweepFailed when a job failed.
    """
    asked = config.hydra.overrides
    check_launch(settings, config, cells)
    ledger = Ledger(sweep_folder(cells, settings["name"], list(asked.task)))
    if settings["dry_run"]:
        _say(plan(cells, ledger.folder))
        return
    hydra_words = [word for word in asked.hydra if not word.startswith("hydra.mode=")]
    with ledger.held():
        command = command_line(["-m", *asked.task, *hydra_words])
        ledger.begin(cells, command, code_version(), settings["job"], any_code=settings["any_code"])
        Drive(cells, ledger, cluster_of(settings, ledger), settings, hydra_words).run()


def check_launch(settings: Mapping[str, Any], config: DictConfig, cells: Sequence[Cell]) -> None:
    """Raises UserError for launcher settings that cannot be right, and for what the cluster cannot give."""
    check_launcher(settings, min(cell.config.resources.time_limit_min for cell in cells))
    _refuse_batches(config)
    if not settings["dry_run"]:
        _check(settings, cells)


def _refuse_batches(config: DictConfig) -> None:
    """Raises UserError where Hydra's sweeper would hand over the jobs in parts: a sweep is one folder."""
    size = config.hydra.sweeper.get("max_batch_size")
    if size is not None:
        raise UserError(
            f"hydra.sweeper.max_batch_size={size}: a sweep is launched as a whole; expected null, and "
            "hydra.launcher.max_parallel for how many jobs run at the same time"
        )


def _check(settings: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    if settings["where"] == "slurm":
        from sweeps.cluster.slurm import Slurm

        Slurm.check(cells)
        return
    from sweeps.cluster.pool import Pool

    if settings["detach"]:
        raise UserError(
            "hydra.launcher.detach=true: expected false with hydra/launcher=local, whose driver starts "
            "the jobs one after another"
        )
    Pool.check(cells)


def cluster_of(settings: Mapping[str, Any], ledger: Ledger) -> Cluster:
    """The cluster that `settings` name, or this machine."""
    parallel, kills, python = settings["max_parallel"], settings["max_kills"], settings["python"]
    if settings["where"] == "slurm":
        from sweeps.cluster.slurm import Slurm

        return Slurm(ledger, parallel, settings["preemption_notice_s"], kills, python)
    from sweeps.cluster.pool import Pool

    return Pool(ledger, parallel, kills, python)


class Drive:
    """One call of the driver.

    Args:
        cells: of the sweep.
        ledger: held.
        cluster: where jobs run.
        settings: of the launcher.
        hydra_words: the command line's words for Hydra, for the commands that are shown.
    """

    reports = True
    """Whether a report is written when all jobs have ended."""

    def __init__(
        self,
        cells: Sequence[Cell],
        ledger: Ledger,
        cluster: Cluster,
        settings: Mapping[str, Any],
        hydra_words: Sequence[str],
    ) -> None:
        self.cells = {cell.identity: cell for cell in cells}
        self.ledger, self.cluster, self.settings = ledger, cluster, settings
        self.hydra_words = hydra_words
        self.failed: dict[str, str] = {}
        self.dropped: set[str] = set()
        self.missing: dict[str, float] = {}

    def run(self) -> None:
        """Submits, watches and reports. Raises SweepFailed when a job failed."""
        try:
            self.cluster.settle()
            self._submit()
            if self.settings["detach"]:
                self._say("detached: the same command watches again; report.html will be written at the end")
                return
            self._watch()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted: {self.cluster.stop()}") from None
        self._report()

    def _say(self, text: str) -> None:
        _say(text)

    def _submit(self) -> None:
        done = {identity for identity, cell in self.cells.items() if cell.is_done()}
        live = self._live_jobs(done)
        todo = [
            cell for identity, cell in self.cells.items() if identity not in done and identity not in live
        ]
        self._say(f"sweep {self.ledger.folder}")
        self._say(f"{len(self.cells)} cells: {len(done)} done, {len(live)} under way, {len(todo)} to submit")
        self.cluster.adopt({job: self.cells[identity] for identity, job in live.items()})
        self.pending = set(self.cells) - done
        for submission, asked in self.cluster.submit(todo):
            self._submitted(submission, asked)
        if todo and self.reports:
            self.cluster.finally_report()

    def _submitted(self, submission: Submission, asked: str) -> None:
        assert submission.jobs
        jobs = (
            submission.jobs[0]
            if len(submission.jobs) == 1
            else f"{submission.jobs[0]} ... {submission.jobs[-1]}"
        )
        self._say(f"submitted {len(submission.cells)} cells as {jobs}: {asked}")

    def _live_jobs(self, done: set[str]) -> dict[str, str]:
        """The jobs, by cell, that an earlier driver submitted and that have not ended."""
        jobs = {
            cell: job for cell, job in self.ledger.jobs().items() if cell in self.cells and cell not in done
        }
        if not jobs:
            return {}
        while (live := self.cluster.live()) is None:
            self._say("SLURM does not answer; asking again")
            time.sleep(self.settings["poll_s"])
        # squeue may leave out a job for the moment in which it is queued again.
        gone = [job for job in jobs.values() if job not in live]
        ended = self.cluster.ended(gone) if gone else {}
        return {cell: job for cell, job in jobs.items() if job not in ended}

    def _watch(self) -> None:
        shown = ""
        while self.pending:
            live = self.cluster.live()
            if live is None:
                self._say("SLURM does not answer; the jobs go on")
            else:
                self._settle_ended(live)
                self._drop_if_all_fail_alike()
                for job in self.cluster.release(live):
                    self._say(f"released {job}, which SLURM held because its launch had failed")
                self._fill()
                if (line := self._progress(live)) != shown:
                    self._say(shown := line)
            if self.pending:
                time.sleep(self.settings["poll_s"])

    def _settle_ended(self, live: Mapping[str, str]) -> None:
        jobs, now = self.ledger.jobs(), time.monotonic()
        gone = {jobs[cell]: cell for cell in self.pending if cell in jobs and jobs[cell] not in live}
        self.missing = {job: self.missing.get(job, now) for job in gone}
        for cell in gone.values():
            if self.cells[cell].is_done():
                self.pending.discard(cell)
        # A queue may leave out a job for the moment in which it is queued again: look twice.
        twice = [job for job, cell in gone.items() if cell in self.pending and now > self.missing[job]]
        for job, how in (self.cluster.ended(twice) if twice else {}).items():
            # What a node wrote may reach this machine late.
            if how != "COMPLETED" or now - self.missing[job] > FILES_ARRIVE_S:
                self.pending.discard(gone[job])
                self.failed[gone[job]] = how

    def _reason(self, cell: str) -> str:
        """The line with which the cell's job ended; empty where it left none."""
        path = self.ledger.failure(cell)
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""

    def _drop_if_all_fail_alike(self) -> None:
        """Takes back the cells that wait, once the first ones have all failed for one reason."""
        none_done = len(self.pending) + len(self.failed) + len(self.dropped) == len(self.cells)
        reasons = {self._reason(cell) for cell in self.failed}
        if none_done and len(self.failed) >= ALIKE and len(reasons) == 1 and "" not in reasons:
            dropped = self.cluster.drop() & self.pending
            self.dropped |= dropped
            self.pending -= dropped

    def _fill(self) -> None:
        """Starts what has room now, where jobs need the driver for it."""
        for submission, asked in self.cluster.fill():
            self._submitted(submission, asked)

    def _progress(self, live: Mapping[str, str]) -> str:
        jobs = self.ledger.jobs()
        states = Counter(live.get(jobs.get(cell, ""), "waiting").lower() for cell in self.pending)
        done = len(self.cells) - len(self.pending) - len(self.failed)
        parts = [
            f"{done} of {len(self.cells)} done",
            *(f"{n} {state}" for state, n in sorted(states.items())),
        ]
        return ", ".join([*parts, *([f"{len(self.failed)} failed"] if self.failed else [])])

    def _report(self) -> None:
        from sweeps.report import write

        try:
            print(write(self.ledger.folder), flush=True)
            where = str(self.ledger.folder / "report.html")
        except UserError as error:
            # The runs are over, whatever somebody did to their files.
            where = "without a report"
            self._say(f"no report: {error}")
        if self.dropped:
            raise SweepFailed(
                f"the first {len(self.failed)} of {len(self.cells)} cells failed for one reason and the "
                f"other {len(self.dropped)} were not started: {self._reason(next(iter(self.failed)))}"
            )
        if self.failed:
            for cell, how in self.failed.items():
                self._say(self._failure(self.cells[cell], how))
            raise SweepFailed(
                f"{len(self.failed)} of {len(self.cells)} cells failed; the same command submits them again, "
                "and nothing else"
            )
        self._say(f"all {len(self.cells)} cells are done; {where}")

    def _failure(self, cell: Cell, how: str) -> str:
        """A report of a failed cell: SLURM's word, its last lines, the command that tries again."""
        job = self.ledger.jobs()[cell.identity]
        log = self.cluster.log(job)
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
        again = command_line(["-m", *(word.replace("'", "") for word in cell.words), *self.hydra_words])
        return "\n".join(
            [
                f"failed: cell {cell.number} ({' '.join(cell.words)}), job {job}: {how}",
                *(f"    | {line}" for line in lines),
                f"    log    {log}",
                f"    retry  {again}",
            ]
        )


def plan(cells: Sequence[Cell], folder: Path) -> str:
    """A text that says what submitting would do, take and spend."""
    from sweeps.cluster.slurm import describe
    from sweeps.plan import lines

    return "\n".join([f"sweep {folder}", *lines(cells, describe)])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
