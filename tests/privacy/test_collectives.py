"""What two processes of one job tell each other."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dp_lora.privacy.collectives import agreed, barrier, everyone, largest, rank, size


def _told(number: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rank": rank(), "size": size(), "agreed": agreed(f"by {number}")}
    found |= {"everyone": everyone(10 * number), "largest": largest(7 - 2 * number)}
    # The second process comes late.
    time.sleep(0.2 * number)
    found["came"] = time.monotonic()
    barrier()
    return {**found, "went": time.monotonic()}


def _process(number: int, folder: Path) -> int:
    """A fork that leaves in `folder` what it was told; a group that waits for ever ends it."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(60)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
        (folder / f"{number}.json").write_text(json.dumps(_told(number)))
        status = 0
    finally:
        os._exit(status)


def test_two_processes_tell_each_other(tmp_path: Path) -> None:
    children = [_process(number, tmp_path) for number in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    told = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert [one["rank"] for one in told] == [0, 1]
    for one in told:
        assert (one["size"], one["agreed"], one["everyone"], one["largest"]) == (2, "by 0", [0, 10], 7)
        assert one["went"] >= told[1]["came"], "nobody goes on before all have come"


def test_one_process_tells_itself() -> None:
    assert (rank(), size(), agreed("a"), everyone("a"), largest(7)) == (0, 1, "a", ["a"], 7)
    barrier()


def test_in_a_group_the_first_process_has_the_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(shared: list[str]) -> None:
        shared[0] = "of the first"

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert agreed("own") == "of the first"
