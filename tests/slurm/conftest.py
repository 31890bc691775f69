"""A real SLURM for the tests, and sweeps on it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dp_lora.storage.files import read_json
from hydra_plugins.dp_lora_launcher._ledger import Ledger
from tests.builders.counting import go
from tests.builders.packages import unavailable
from tests.builders.tiny import TINY

ROOT = Path(__file__).resolve().parent.parent.parent
BOX = ROOT / "tools" / "slurm_box.sh"
LARGEST_ARRAY = 8


def free_ports() -> int:
    """The first of three free ports."""
    for first in range(38000 + os.getpid() % 500 * 20, 60000, 3):
        try:
            for port in range(first, first + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free port")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SLURM of this session's own; SLURM_CONF names it."""
    folder = tmp_path_factory.mktemp("slurm")
    prolog = folder / "prolog"
    prolog.write_text(f"#!/bin/sh\ntest ! -e {folder}/broken\n")
    prolog.chmod(0o755)
    environment = {
        "SLURM_BOX": str(folder), "SLURM_BOX_PORT": str(free_ports()), "SLURM_BOX_CPUS": "16",
        "SLURM_BOX_MAX_ARRAY": str(LARGEST_ARRAY + 1), "SLURM_BOX_GPUS": "4",
        "SLURM_BOX_MEMORY_MB": "200000", "SLURM_BOX_PROLOG": str(prolog),
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "PYTHONPATH": str(ROOT),
    }  # fmt: skip

    def call(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", str(BOX), command], capture_output=True, text=True, timeout=3600)

    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        installed = call("install")
        if installed.returncode:
            unavailable("SLURM", " ".join(installed.stderr.split())[-300:])
        try:
            started = call("up")
            assert started.returncode == 0, started.stderr
            yield
        finally:
            call("down")


@dataclass
class Sweep:
    """A driver that runs, and its sweep's folder."""

    process: subprocess.Popen[str]
    output: Path
    outputs: Path

    @property
    def ledger(self) -> Ledger:
        (folder,) = (self.outputs / "sweeps").iterdir()
        ledger = Ledger(folder)
        ledger.read()
        return ledger

    def cells(self) -> dict[int, Path]:
        """The run directories by the number of the cell."""
        folder = self.ledger.folder
        return {row["number"]: Path(row["directory"]) for row in read_json(folder / "sweep.json")["cells"]}

    def job(self, number: int) -> str:
        """The number that SLURM gave to the cell."""
        cells = {
            row["number"]: row["identity"] for row in read_json(self.ledger.folder / "sweep.json")["cells"]
        }
        return self.ledger.jobs()[cells[number]]

    def begun(self) -> dict[int, Path]:
        """The run directories, once everything is submitted."""
        until(lambda: "submitted" in self.said() or self.process.poll() is not None, self)
        assert "submitted" in self.said(), self.said()
        return self.cells()

    def let_go(self) -> None:
        """Lets the jobs go on that hold."""
        for directory in self.cells().values():
            go(directory)

    def said(self) -> str:
        return self.output.read_text()

    def wait(self, timeout: float = 900) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver still runs:\n{self.said()}\n{run('squeue', '-r')}") from None


Start = Callable[..., Sweep]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a driver: the words of its command, `outputs` to use those of an earlier one again."""
    running: list[subprocess.Popen[str]] = []

    def begin(
        *words: str,
        outputs: Path | None = None,
        launcher: str = "slurm",
        counting: bool = True,
        without: Sequence[str] = (),
        **env: str,
    ) -> Sweep:
        outputs = outputs or tmp_path_factory.mktemp("sweep") / "outputs"
        outputs.parent.mkdir(exist_ok=True)
        output = outputs.parent / f"driver{len(running)}.txt"
        given = [
            *TINY, "resources=cpu", "resources.cpus=1", "resources.memory_gb=0.5", f"paths.outputs={outputs}",
            f"hydra/launcher={launcher}", "hydra.launcher.poll_s=0.5",
        ]  # fmt: skip
        if counting:
            given += ["stages=[finetune]", "hydra.launcher.job=tests.builders.counting:counting"]
        # Later words win, as on any command line; a word may not come twice.
        chosen = {word.partition("=")[0]: word for word in [*given, *words]}
        for name in without:
            del chosen[name]
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "dp_lora", "-m", *chosen.values()],
                cwd=outputs.parent, stdout=file, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, **env}, start_new_session=True,
            )  # fmt: skip
        running.append(process)
        return Sweep(process, output, outputs)

    yield begin
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(condition: Callable[[], Any], sweep: Sweep | None = None, timeout: float = 600) -> Any:
    """The first true value of `condition`; `sweep` is shown when there is none in time."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    said = f"{sweep.said()}\n{run('squeue', '-r')}" if sweep else ""
    raise AssertionError(f"it did not happen in {timeout} s\n{said}")


def run(*words: str) -> str:
    """What a command of SLURM prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def how_it_ended(job: str) -> str:
    """SLURM's state of an ended job, once its accounting knows it."""
    return str(
        until(
            lambda: [
                line.split("|")[1]
                for line in run("sacct", "-X", "-n", "-P", "-j", job, "-o", "JobID,State").splitlines()
                if line.startswith(f"{job}|") and not line.endswith(("RUNNING", "PENDING", "REQUEUED"))
            ]
        )[0]
    )
