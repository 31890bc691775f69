"""The driver of a sweep where the node breaks or is out of service, while no job but its own is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.builders.cluster import Start, is_right, run, until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]


def node() -> str:
    """The name of the only node."""
    return run("sinfo", "-h", "-o", "%n").strip()


def test_a_job_that_slurm_holds_after_a_failed_launch_is_released(start: Start) -> None:
    broken = Path(os.environ["SLURM_BOX"]) / "broken"
    broken.touch()
    try:
        sweep = start("seed=0", "train.max_steps=4")
        # SLURM takes a node whose prolog fails out of service, and holds the job.
        until(lambda: "released" in sweep.said(), sweep)
    finally:
        broken.unlink()
        run("scontrol", "update", f"nodename={node()}", "state=resume")
    assert sweep.wait() == 0, sweep.said()
    assert f"released {sweep.job(0)}, which SLURM held" in sweep.said()
    assert is_right(sweep.cells()[0], 4)


def test_a_sweep_waits_for_nodes_that_are_out_of_service(start: Start) -> None:
    run("scontrol", "update", f"nodename={node()}", "state=drain", "reason=test")
    try:
        sweep = start("seed=0", "train.max_steps=4")
        sweep.begun()
        assert "1 node cannot be used at the moment" in sweep.said()
        assert run("squeue", "-h", "-t", "PENDING", "-n", *sweep.ledger.submissions).strip()
    finally:
        run("scontrol", "update", f"nodename={node()}", "state=resume")
    assert sweep.wait() == 0, sweep.said()
    assert is_right(sweep.cells()[0], 4)
