"""A real SLURM for the tests, and sweeps on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.builders.cluster import LARGEST_ARRAY, Start, Sweep, free_ports
from tests.builders.forked import Forked, Nursery
from tests.builders.packages import unavailable
from tests.builders.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
BOX = ROOT / "tools" / "slurm_box.sh"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[None]:
    """A SLURM of this session's own; SLURM_CONF names it. The nursery imports while it starts."""
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


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Start]:
    """Starts a driver: the words of its command, `outputs` to use those of an earlier one again.

    It is a fork of the nursery, or with `forked=False` the command as a user gives it.
    """
    running: list[subprocess.Popen[str] | Forked] = []

    def begin(
        *words: str,
        outputs: Path | None = None,
        launcher: str = "slurm",
        counting: bool = True,
        without: Sequence[str] = (),
        forked: bool = True,
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
        process: subprocess.Popen[str] | Forked
        if forked:
            process = nursery.start(["-m", *chosen.values()], output, outputs.parent, {**os.environ, **env})
        else:
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
