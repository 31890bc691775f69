"""A sweep of real jobs in a cluster where everything goes wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conftest import words

from dp_lora.files import read_json
from slurm.conftest import Start, Sweep, until

REAL = ("stages=[finetune]", "train.max_steps=6", "train.expected_batch_size=60", "privacy.insecure_seed=7",
        "noise_multiplicity=k2", "train.checkpoint_minutes=0.01")  # fmt: skip
GRID = ("seed=0,1,2,3", "epsilon=eps1,eps10", "lora_rank=r2,r4,r8")
PAIR = ("train.max_steps=4", "train.microbatch=7", "privacy.insecure_seed=8")
KILLS = 20


class Quiet:
    """The same jobs, one after another in one process that nothing happens to."""

    def __init__(self, cache: Path, folder: Path, more: Sequence[str]) -> None:
        self._folder = folder
        given = {word.partition("=")[0]: word for word in [*words(cache, folder), *REAL, *more]}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dp_lora", "-m", *given.values()],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self) -> Path:
        """Their folder of outputs, once they have ended."""
        _, errors = self._process.communicate(timeout=600)
        assert self._process.returncode == 0, errors
        return self._folder


def process_of(job: str, conf: str) -> int | None:
    """The process of a running job that trains."""
    array, _, task = job.partition("_")
    wanted = {
        f"SLURM_CONF={conf}".encode(),
        f"SLURM_ARRAY_JOB_ID={array}".encode(),
        f"SLURM_ARRAY_TASK_ID={task}".encode(),
    }
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = set((folder / "environ").read_bytes().split(b"\0"))
            if b"submitit.core._submit" in words and b"python" in words[0] and wanted <= environment:
                return int(folder.name)
        except OSError:
            continue
    return None


def _trains(directory: Path) -> bool:
    return (directory / "checkpoint" / "state.pt").exists() and not (directory / "adapter").exists()


class Havoc:
    """Kills and disturbs the jobs of a sweep, and its driver."""

    def __init__(self, sweep: Sweep, again: Callable[[], Sweep], quiet: Quiet) -> None:
        self.sweep, self.again, self.quiet = sweep, again, quiet
        self.random = random.Random(0)
        self.done: list[str] = []

    def job(self, training: bool) -> str | None:
        """A running job; if so asked one that has begun to train and has not ended."""
        running = self.sweep.run("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%F_%K|%j").splitlines()
        ours = [line.split("|")[0] for line in running if line.split("|")[1] in self.sweep.ledger.submissions]
        cells = {job: cell for cell, job in self.sweep.ledger.jobs().items()}
        directories = {row["identity"]: Path(row["directory"]) for row in self._cells()}
        if training:
            ours = [job for job in ours if _trains(directories[cells[job]])]
        return self.random.choice(ours) if ours else None

    def _fails(self, *words: str) -> bool:
        """Whether SLURM refuses: the job may have ended in between."""
        environment = {**os.environ, **self.sweep.environment}
        said = subprocess.run(words, capture_output=True, text=True, env=environment)
        return bool(said.returncode or said.stderr)

    def _cells(self) -> list[dict[str, Any]]:
        cells: list[dict[str, Any]] = read_json(self.sweep.ledger.folder / "sweep.json")["cells"]
        return cells

    def strike(self, how: str, *, training: bool) -> None:
        job = until(lambda: self.job(training), self.sweep, timeout=120)
        if how == "kill -9":
            if (pid := process_of(job, self.sweep.environment["SLURM_CONF"])) is None:
                return
            os.kill(pid, signal.SIGKILL)
        elif how == "USR2":
            if self._fails("scancel", "--signal=USR2", job):
                return
        elif how == "requeue":
            if self._fails("scontrol", "requeue", job):
                return
        elif how == "urgent":
            self.sweep.run(
                "sbatch", "-p", "urgent", "-c", "16", "--mem=1G", "-o", "/dev/null", "--wrap", "sleep 1"
            )
            until(
                lambda: (
                    job not in self.sweep.run("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%F_%K").split()
                ),
                self.sweep,
            )
        elif how == "node down":
            node = self.sweep.run("sinfo", "-h", "-o", "%n").strip()
            self.sweep.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
            time.sleep(1)
            # It may have come back by itself, when its daemon next reported.
            self._fails("scontrol", "update", f"nodename={node}", "state=resume")
            until(
                lambda: self.sweep.run("sinfo", "-h", "-o", "%T").strip() in ("idle", "mixed", "allocated"),
                self.sweep,
            )
        elif how == "driver":
            os.killpg(self.sweep.process.pid, signal.SIGKILL)
            self.sweep.wait()
            self.sweep = self.again()
        self.done.append(how)


def wreak(start: Start, cache: Path, environment: dict[str, str], over: threading.Event) -> Havoc:
    """A sweep of 24 jobs through at least `KILLS` blows, until its driver ends or nobody waits for it."""
    given = (*REAL, *GRID, f"paths.cache={cache}", "hydra.launcher.max_parallel=4",
             "hydra.launcher.max_kills=100", "resources.memory_gb=1.5")  # fmt: skip
    sweep = start(*given, counting=False, **environment)
    sweep.begun()
    folder = sweep.outputs.with_name("quiet")
    folder.mkdir()
    havoc = Havoc(
        sweep,
        lambda: start(*given, outputs=sweep.outputs, counting=False, **environment),
        Quiet(cache, folder, GRID),
    )
    blows = ["kill -9", "USR2", "requeue"]
    strikes = [(how, training) for training in (True, False, False) for how in [*blows, *blows, "kill -9"]]
    strikes += [("urgent", True), ("node down", True), ("driver", False)]
    havoc.random.shuffle(strikes)
    for how, training in strikes:
        over.wait(havoc.random.uniform(0, 2))
        assert not over.is_set()
        assert havoc.sweep.process.poll() is None, havoc.sweep.said()
        havoc.strike(how, training=training)
    while havoc.sweep.process.poll() is None and not over.is_set():
        over.wait(0.2)
    return havoc
