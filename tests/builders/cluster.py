"""Sweeps on a SLURM: what a test asks of one that runs."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_lora.storage.files import read_json
from sweeps.cluster.ledger import Ledger
from tests.builders.counting import counted, go
from tests.builders.forked import Forked

LARGEST_ARRAY = 8
STEPS = 20


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


@dataclass
class Sweep:
    """A driver that runs, and its sweep's folder."""

    process: subprocess.Popen[str] | Forked
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


def now(directory: Path) -> int:
    path = directory / "now"
    return int(path.read_text()) if path.exists() else 0


def is_right(directory: Path, steps: int = STEPS) -> bool:
    """Whether the job is done, with the result of one that nothing happened to."""
    path = directory / "result.json"
    if not path.exists():
        return False
    result = read_json(path)
    return bool(result["state"] == counted(result["seed"], steps))
