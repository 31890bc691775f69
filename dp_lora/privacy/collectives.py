"""Values that the processes of one job share through torch's process group; one process has its own."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def rank() -> int:
    """The number of this process in the process group; 0 without one."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of processes in the process group; 1 without one."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Returns once every process of the job has come here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def agreed(value: T) -> T:
    """The first process's `value`; every process of the job has to call it."""
    import torch.distributed as dist

    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def everyone(value: T) -> list[T]:
    """The `value` of every process of the job, in their order; every one has to call it."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    shared: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shared, value)
    return shared


def largest(value: int) -> int:
    """The largest `value` of all processes of the job; every one has to call it."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    shared = torch.tensor(int(value), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)
