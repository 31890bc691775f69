"""The processes of one job, from the environment that submitit or torchrun sets for them.

The first process decides, writes, samples and evaluates. The others take their part of each batch and wait.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

_PATIENCE = timedelta(days=30)
"""For what the first process has still to do: a cluster's time limit ends a job that hangs."""


class Team:
    """The channel between the processes of a job for all that is no tensor.

    Args:
        rank: of this process, from 0.
        size: number of processes.
        store: shared by them; None for a job of one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size, self._store = rank, size, store

    @property
    def first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def tell(self, name: str, value: Any = None) -> None:
        """Tells the other processes the `value`, which JSON can hold, of what they wait for as `name`."""
        if self._store is not None:
            self._store.set(name, json.dumps(value))

    def told(self, name: str) -> Any:
        """Waits for and returns what the first process told as `name`.

        Raises RuntimeError when that process is gone.
        """
        assert self._store is not None, "a job of one process waits for nobody"
        self._store.wait([name], _PATIENCE)
        return json.loads(self._store.get(name))

    def part(self) -> None:
        """Ends the job for this process; the first one, which holds the store, waits for the others."""
        if self._store is None:
            return
        self._store.set(f"left {self.rank}", "")
        others = [f"left {rank}" for rank in range(1, self.size)]
        if self.first and others:
            # One that is gone already has nothing to wait for.
            with contextlib.suppress(RuntimeError):
                self._store.wait(others, timedelta(seconds=60))


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The processes of this job, joined in torch's process group: nccl on GPUs, gloo elsewhere.

    Reads WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT; without them the job has one process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://")))
    backend = "nccl" if device.type == "cuda" else "gloo"
    group = PrefixStore("process group", store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=_PATIENCE)
    team = Team(rank, size, PrefixStore("team", store))
    yield team
    # Not after an error: the others may never come.
    team.part()
    dist.destroy_process_group()
