"""What the launcher costs: the submission of a sweep, and the way of a job to its first training step.

    eval "$(tools/slurm_box.sh env)"
    python -m benchmarks.launcher submit --cells 500
    python -m benchmarks.launcher start model=ldm32

`submit` gives the seconds of the whole command that submits a sweep of jobs which end at once. `start` runs
a job three times on SLURM and gives, of the last two (the first fills the caches), the seconds and the
processor seconds from the start of its process to its first training step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dp_lora.config.schema import Config
from dp_lora.storage.files import append_line, read_lines

SECONDS = "DP_LORA_BENCHMARK_SECONDS"


def nothing(config: Config, words: Sequence[str]) -> None:
    """A job that ends at once."""


def until_first_step(config: Config, words: Sequence[str]) -> None:
    """A job that ends before its first training step and notes how long it took to get there."""
    from dp_lora.jobs.stages import run
    from dp_lora.training import finetune

    def note(*args: object) -> None:
        begun = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        alive = time.clock_gettime(time.CLOCK_BOOTTIME) - begun / os.sysconf("SC_CLK_TCK")
        append_line(Path(os.environ[SECONDS]), {"seconds": alive, "processor": time.process_time()})
        sys.exit(0)

    finetune.run_steps = note  # type: ignore[assignment]
    run(config, words)


def submit(cells: int) -> None:
    # Ten seeds of each choice of presets, as in a sweep over rank, noise multiplicity and epsilon.
    grid = ["epsilon=eps1,eps10", "noise_multiplicity=k1,k2,k4,k8,k12", "lora_rank=r1,r2,r4,r8,r16"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "dp_lora", "-m", *grid, f"seed={','.join(map(str, range(cells // 50)))}",
            f"paths.outputs={folder}", "hydra/launcher=slurm", "hydra.launcher.detach=true", "resources=cpu",
            "+resources.sbatch.hold=''", "hydra.launcher.job=benchmarks.launcher:nothing",
        ]  # fmt: skip
        started = time.perf_counter()
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        seconds = time.perf_counter() - started
        names = [
            line.split()[4].partition("_")[0] for line in said.splitlines() if line.startswith("submitted")
        ]
        subprocess.run(["scancel", *names], check=True)
    print(f"{cells} cells submitted in {seconds:.1f} s")


def start(overrides: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        seconds = Path(folder) / "seconds.jsonl"
        for number in range(3):
            subprocess.run(
                [
                    sys.executable, "-m", "dp_lora", "-m", f"seed={number}",
                    f"paths.outputs={folder}/outputs", "hydra/launcher=slurm", "hydra.launcher.poll_s=1",
                    "resources=cpu", "tracking.wandb=disabled",
                    "hydra.launcher.job=benchmarks.launcher:until_first_step", *overrides,
                ],
                env={**os.environ, SECONDS: str(seconds)}, capture_output=True,
            )  # fmt: skip
        for row in read_lines(seconds)[1:]:
            print(f"first step after {row['seconds']:.1f} s, {row['processor']:.1f} s of processor time")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["submit", "start"])
    parser.add_argument("--cells", type=int, default=500)
    given, overrides = parser.parse_known_args()
    if given.what == "submit":
        submit(given.cells)
    else:
        start(overrides)


if __name__ == "__main__":
    main()
