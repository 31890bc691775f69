"""Real jobs on a real SLURM: whatever happens on the way, the result is that of a quiet run, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dp_lora.storage.files import read_json, read_lines
from tests.builders.cluster import Start, run, until
from tests.builders.forked import Nursery
from tests.builders.quiet import REAL, Quiet, twin
from tests.builders.wandb_file import read_run

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

PAIR = ("train.max_steps=4", "train.microbatch=7", "privacy.insecure_seed=8")


def test_two_processes_of_one_job_end_where_one_does(
    start: Start, nursery: Nursery, cache: Path, tmp_path: Path
) -> None:
    quiet = Quiet(nursery, cache, tmp_path, PAIR)
    sweep = start(*REAL, *PAIR, f"paths.cache={cache}", "resources.processes=2", "resources.memory_gb=4",
                  counting=False)  # fmt: skip
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
        *REAL,
        "train.max_steps=40",
        f"paths.cache={cache}",
        "tracking.wandb=offline",
        "resources.memory_gb=4",
        counting=False,
    )
    (directory,) = sweep.begun().values()
    until(lambda: len(read_lines(directory / "metrics.jsonl")) >= 2, sweep)
    run("scancel", "--signal=USR2", sweep.job(0))
    assert sweep.wait() == 0, sweep.said()
    # The preempted start sent nothing: W&B hears of a private training when it has ended.
    (file,) = (directory / "wandb").glob("offline-run-*/*.wandb")
    found = read_run(file)
    assert found.run_id == (directory / "checkpoint" / "wandb_id").read_text()
    assert [row["step"] for row in found.history if "stage" in row] == list(range(1, 41))
    assert read_json(directory / "provenance.json")["restarts"] == 1
