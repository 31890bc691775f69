"""The processes of one job: what they tell each other, and that sharing a batch changes no bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.mechanism import microbatches, slice_of_batch
from dp_lora.privacy.plan import Clip
from dp_lora.training.processes import Team, joined
from tests.builders.cluster import free_ports

ROOT = str(Path(__file__).resolve().parents[2])
C, EXAMPLES, K = 0.02, 9, 2

SUMS = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}]
from tests.training import test_processes
from dp_lora.training.processes import joined
torch.set_num_threads(1)
with joined(torch.device("cpu")) as team:
    if team.first:
        team.tell("word", {{"left": ["finetune"]}})
    else:
        assert team.told("word") == {{"left": ["finetune"]}}
    sums = test_processes.sums(team.rank, team.size)
    dist.all_reduce(sums)
    if team.first:
        torch.save(sums, {out!r})
"""
IMAGES = """
import os, sys, torch
sys.path[:0] = [{root!r}]
from tests.builders.image_sets import private_images
from dp_lora.jobs.content import agree
from dp_lora.errors import UserError
from dp_lora.training.processes import joined
with joined(torch.device("cpu")) as team:
    agree(private_images(0))
    try:
        agree(private_images(team.rank))
    except UserError:
        os._exit(7)  # torch's own end may abort where the other process is gone first
"""
GONE = """
import sys, torch
from dp_lora.training.processes import joined
with joined(torch.device("cpu")) as team:
    if team.first:
        raise SystemExit(5)
    try:
        team.told("finished")
    except RuntimeError:
        sys.exit(6)
"""


def sums(rank: int, size: int) -> torch.Tensor:
    """Clipped sums [EXAMPLES + 1, P] of this process's part of the batch: whole, and without each example."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    images = 100 * torch.randn(EXAMPLES, 6, generator=torch.Generator().manual_seed(1))
    engine = ClippedGradientSum(model, Clip(K, C))
    found = []
    for left_out in range(EXAMPLES + 1):
        batch = torch.tensor([i for i in range(EXAMPLES) if i != left_out - 1])
        engine.reset()
        # Parts of 5 and 4, or of 4: nothing divides anything.
        for indices, weights in microbatches(slice_of_batch(batch, rank, size), 3):
            rows = images[indices].repeat_interleave(K, 0)
            engine.add(model(rows).square().sum(1).view(-1, K).mean(1), weights)
        found.append(engine.total().double().clone())
    engine.detach()
    return torch.stack(found)


def both(code: str) -> list[int]:
    """Exit statuses of two processes of one job."""
    port = str(free_ports())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "WORLD_SIZE": "2",
                "RANK": rank,
            },
            stderr=subprocess.DEVNULL,
        )
        for rank in ("0", "1")
    ]
    return [process.wait(120) for process in running]


def test_one_example_moves_the_sum_of_two_processes_by_c_and_no_more(tmp_path: Path) -> None:
    out = tmp_path / "sums.pt"
    assert both(SUMS.format(root=ROOT, out=str(out))) == [0, 0]
    shared, alone = torch.load(out, weights_only=True), sums(0, 1)
    assert float((shared - alone).norm() / alone.norm()) < 1e-6
    moved = (shared[0] - shared[1:]).norm(dim=1)
    assert len(moved) == EXAMPLES
    # Gradients far above C: each example moves the sum by C itself.
    assert float(moved.max()) <= C and float(moved.min()) >= C * (1 - 1e-4)


def test_processes_that_read_different_images_all_end() -> None:
    assert both(IMAGES.format(root=ROOT)) == [7, 7]


def test_when_the_first_process_is_gone_the_others_end() -> None:
    assert both(GONE) == [5, 6]


def test_a_job_of_one_process_has_nobody_to_tell() -> None:
    assert "WORLD_SIZE" not in os.environ
    with joined(torch.device("cpu")) as team:
        assert team.first and team.size == 1
        team.tell("anything", 1)
        team.part()
    assert not Team(rank=1, size=2).first
