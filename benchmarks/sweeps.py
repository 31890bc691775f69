"""What the commands of `python -m sweeps` cost on a large sweep, and how large its page is.

    python -m benchmarks.sweeps --runs 500

Writes the run directories of a sweep as jobs leave them (rank x k x epsilon x seed, 80 logged steps, pictures
that cannot be compressed) into a temporary folder, and gives of each command, in a process of its own, the
seconds and the processor seconds, the least of three rounds; then the bytes of report.html.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from sweep_folder import grid, write_sweep  # noqa: E402  (of the tests)


def write(outputs: Path, runs: int) -> Path:
    """The folder of a sweep with this many runs, five in seven of them done."""
    choices = grid(
        lora__rank=[1, 2, 4, 8, 16], privacy__noise_multiplicity=[1, 2, 4, 8],
        privacy__epsilon=[1.0, 5.0, 10.0], seed=range(-(-runs // 60)),
    )[:runs]  # fmt: skip
    states = ["done", "done", "done", "done", "done", "running", "failed"]
    return write_sweep(outputs, "large", choices, [states[number % 7] for number in range(runs)])


def measured(words: Sequence[str], folder: Path, rounds: int) -> tuple[float, float]:
    """Seconds and processor seconds of a command, the least of `rounds`."""
    found = []
    for _ in range(rounds):
        before, started = os.times(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "sweeps", *words], cwd=folder, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        after = os.times()
        assert done.returncode == 0, done.stderr
        processor = (
            after.children_user + after.children_system - before.children_user - before.children_system
        )
        found.append((time.perf_counter() - started, processor))
    return min(seconds for seconds, _ in found), min(processor for _, processor in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sweep = write(folder / "outputs", arguments.runs)
        plan = ["plan", f"seed=range({arguments.runs // 12})", "lora_rank=r4,r8,r16,r32",
                "epsilon=eps1,eps5,eps10"]  # fmt: skip
        print(f"| command, {arguments.runs} runs | seconds | processor seconds |\n|---|---:|---:|")
        for words in (plan, ["status"], ["collect"], ["report"]):
            seconds, processor = measured(words, folder, arguments.rounds)
            print(f"| {words[0]} | {seconds:.2f} | {processor:.2f} |", flush=True)
        print(f"\nreport.html: {(sweep / 'report.html').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
