"""Real jobs on a real SLURM: whatever happens on the way, the result is that of a quiet run, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import words
from safetensors.torch import load_file
from wandb_file import read_run

from dp_lora.files import read_json, read_lines
from slurm.conftest import Start, Sweep, run, until

pytestmark = pytest.mark.slurm

REAL = ("stages=[finetune]", "train.max_steps=12", "train.expected_batch_size=120", "privacy.insecure_seed=7",
        "noise_multiplicity=k2", "train.checkpoint_minutes=0.01")  # fmt: skip
GRID = ("seed=0,1,2,3", "epsilon=eps1,eps10", "lora_rank=r2,r4,r8")
PAIR = ("train.max_steps=4", "train.microbatch=7", "privacy.insecure_seed=8")
KILLS = 20


@pytest.fixture(scope="module")
def quiet(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The outputs of the same jobs in one process that nothing happens to, once they are there."""
    folder = tmp_path_factory.mktemp("quiet")
    process = [
        subprocess.Popen(
            [sys.executable, "-m", "dp_lora", "-m", *_distinct(*words(cache, folder), *REAL, *more)],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for more in (GRID, PAIR)
    ]  # fmt: skip

    def wait() -> Path:
        for one in process:
            _, errors = one.communicate(timeout=300)
            assert one.returncode == 0, errors
        return folder

    return wait


def _distinct(*given: str) -> list[str]:
    return list({word.partition("=")[0]: word for word in given}.values())


def released(directory: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The bytes of the weights and the content of privacy.json."""
    weights = {path.name: path.read_bytes() for path in (directory / "adapter").glob("*.safetensors")}
    return weights, read_json(directory / "privacy.json")


def twin(directory: Path, quiet: Path) -> Path:
    """The quiet run of the same configuration."""
    (found,) = quiet.glob(f"default/*-{directory.name.rpartition('-')[2]}")
    return found


def process_of(job: str) -> int | None:
    """The process of a running job that trains."""
    array, _, task = job.partition("_")
    wanted = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
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

    def _cells(self) -> list[dict[str, Any]]:
        cells: list[dict[str, Any]] = read_json(self.sweep.ledger.folder / "sweep.json")["cells"]
        return cells

    def strike(self, how: str, *, training: bool) -> None:
        job = until(lambda: self.job(training), self.sweep, timeout=120)
        if how == "kill -9":
            if (pid := process_of(job)) is None:
                return
            os.kill(pid, signal.SIGKILL)
        elif how == "USR2":
            if subprocess.run(["scancel", "--signal=USR2", job], capture_output=True).stderr:
                return
        elif how == "requeue":
            if subprocess.run(["scontrol", "requeue", job], capture_output=True).returncode:
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
            time.sleep(1)
            # It may have come back by itself, when its daemon next reported.
            subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True)
            until(
                lambda: run("sinfo", "-h", "-o", "%T").strip() in ("idle", "mixed", "allocated"), self.sweep
            )
        elif how == "driver":
            os.killpg(self.sweep.process.pid, signal.SIGKILL)
            self.sweep.wait()
            self.sweep = self.again()
        self.done.append(how)


def test_a_sweep_through_havoc_ends_like_a_quiet_one(
    start: Start, cache: Path, quiet: Callable[[], Path]
) -> None:
    given = (*REAL, *GRID, f"paths.cache={cache}", "hydra.launcher.max_parallel=4",
             "hydra.launcher.max_kills=100", "resources.memory_gb=1.5")  # fmt: skip
    sweep = start(*given, counting=False)
    sweep.begun()
    havoc = Havoc(sweep, lambda: start(*given, outputs=sweep.outputs, counting=False))
    blows = ["kill -9", "USR2", "requeue"]
    strikes = [(how, training) for training in (True, False, False) for how in blows * 2 + ["kill -9"]]
    strikes += [("urgent", True), ("node down", True), ("driver", False)]
    havoc.random.shuffle(strikes)
    for how, training in strikes:
        time.sleep(havoc.random.uniform(0, 2))
        assert havoc.sweep.process.poll() is None, havoc.sweep.said()
        havoc.strike(how, training=training)
    assert havoc.sweep.wait(400) == 0, havoc.sweep.said()
    assert len(havoc.done) >= KILLS, havoc.done
    outputs = quiet()
    cells = havoc.sweep.cells()
    assert len(cells) == 24
    restarts = 0
    for directory in cells.values():
        assert released(directory) == released(twin(directory, outputs)), directory
        rows = read_lines(directory / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 13))
        assert len(read_lines(directory / "checkpoint" / "executions.jsonl")) == 12, (
            "no step was paid for twice"
        )
        restarts += read_json(directory / "provenance.json")["restarts"]
    assert restarts >= 5, "some were hit while they trained"
    report = (havoc.sweep.ledger.folder / "report.md").read_text()
    assert report.count("| done |") == 24


def test_two_processes_of_one_job_end_where_one_does(
    start: Start, cache: Path, quiet: Callable[[], Path]
) -> None:
    sweep = start(*REAL, *PAIR, f"paths.cache={cache}", "resources.processes=2", counting=False)
    assert sweep.wait() == 0, sweep.said()
    (directory,) = sweep.cells().values()
    alone = twin(directory, quiet())
    for name in ("adapter_model.safetensors", "trained.safetensors"):
        both, one = load_file(directory / "adapter" / name), load_file(alone / "adapter" / name)
        assert both.keys() == one.keys()
        apart = torch.cat([(both[key] - one[key]).flatten() for key in one])
        whole = torch.cat([one[key].flatten() for key in one])
        assert float(apart.norm() / whole.norm()) < 1e-6
    assert read_json(directory / "privacy.json") == read_json(alone / "privacy.json")


def test_a_preempted_job_goes_on_in_the_same_wandb_run(start: Start, cache: Path) -> None:
    sweep = start(
        *REAL, "train.max_steps=40", f"paths.cache={cache}", "tracking.wandb=offline", counting=False
    )
    (directory,) = sweep.begun().values()
    until(lambda: len(read_lines(directory / "metrics.jsonl")) >= 2, sweep)
    run("scancel", "--signal=USR2", sweep.job(0))
    assert sweep.wait() == 0, sweep.said()
    files = sorted((directory / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    runs = [read_run(path) for path in files]
    assert {found.run_id for found in runs} == {directory.name.rpartition("-")[2]}
    assert read_json(directory / "provenance.json")["restarts"] == 1
