"""Persons with few and many records, and the clipped sums of a step over them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from dp_lora.privacy.executions import Executions
from dp_lora.privacy.persons import Persons
from dp_lora.privacy.plan import make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.step import DPSGD
from tests.builders.cluster import free_ports

C = 0.02
COUNTS = (1, 3, 500, 2, 7, 1, 20)
"""Records of each person."""


def owners() -> Tensor:
    """int64 [R]: whose each record is; those of a person do not lie together."""
    whose = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    return whose[torch.randperm(len(whose), generator=torch.Generator().manual_seed(3))]


def sums(
    k: int,
    zeroed: int | None = None,
    *,
    microbatch: int = 3,
    dtype: torch.dtype = torch.float64,
    apart: bool = False,
    rate: float = 1.0,
) -> Tensor:
    """The clipped sum [P] of a step in which every person is, on this process its part of it.

    Args:
        k: draws of each person.
        zeroed: a person who contributes nothing.
        microbatch: persons of one forward.
        dtype: of the model.
        apart: the broken twin: every record is an example of its own.
        rate: q.
    """
    whose = owners()
    records = 100 * torch.randn(len(whose), 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    persons = Persons(whose)
    number = whose[persons.order[persons.offsets[:-1]]]  # of each person among COUNTS
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    examples = len(whose) if apart else len(persons)
    plan = make_plan(
        num_examples=examples, expected_batch_size=rate * examples, steps=1, noise_multiplier=1.0,
        delta=1e-4, max_grad_norm=C, noise_multiplicity=k, unit="image" if apart else "person",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        record = Executions(Path(folder) / "executions.jsonl", {})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sgd = DPSGD(model, optimizer, plan, Randomness.from_seed(5), record, examples)
        step = sgd.begin(0)
        for rows, weights, draws in step.microbatches(microbatch):
            if apart:
                chosen, of_person = rows[:, None].expand(-1, k), whose[rows]
            else:
                chosen, of_person = persons.draw(rows, draws, k), number[rows]
            losses = model(records[chosen.flatten()]).square().sum(1).view(-1, k).mean(1)
            step.add(losses if zeroed is None else losses * (of_person != zeroed), weights)
        found = sgd.gradients.total().double().clone()
        sgd.detach()
    return found


_SUMS = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}]
from tests.builders import persons
from dp_lora.training.processes import joined
torch.set_num_threads(1)
with joined(torch.device("cpu")) as team:
    found = torch.stack([
        persons.sums(k, zeroed) for k in {ks!r} for zeroed in (None, *range(len(persons.COUNTS)))
    ])
    dist.all_reduce(found)
    if team.first:
        torch.save(found, {out!r})
"""


def sums_of_two_processes(ks: tuple[int, ...], out: Path) -> Tensor:
    """[len(ks), 1 + persons, P]: whole, and without each person, as two processes add them up."""
    root = str(Path(__file__).resolve().parents[2])
    code, port = _SUMS.format(root=root, ks=ks, out=str(out)), str(free_ports())
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **places, "RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(300) for process in running] == [0, 0]
    found: Tensor = torch.load(out, weights_only=True)
    return found.view(len(ks), 1 + len(COUNTS), -1)
