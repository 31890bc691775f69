"""A private search on SLURM: its driver is killed, and nothing is drawn twice."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from dp_lora.privacy.ledger import Ledger
from dp_lora.storage.files import read_json
from tests.builders.cluster import Start, until

# Slow: a trial evaluates, too, which takes a job of a minute.
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.usefixtures("slurm")]


def test_a_search_goes_on_after_its_driver_was_killed(start: Start, cache: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    words = (
        "sweep=private_search", "search.space={lora.rank:[2,4]}", "search.expected_trials=2",
        "search.distribution=geometric", "resources.memory_gb=2",
        "train.max_steps=2", f"paths.cache={cache}", f"paths.ledger={ledger}",
        f"paths.index={tmp_path / 'index'}",
    )  # fmt: skip
    first = start(*words, counting=False)
    sweeps = first.outputs / "sweeps"

    def submitted() -> list[Path]:
        return list(sweeps.glob("*/private/launch/jobs.jsonl")) if sweeps.exists() else []

    until(lambda: (found := submitted()) and '"submitted"' in found[0].read_text(), first)
    os.killpg(first.process.pid, signal.SIGKILL)
    first.wait()
    (folder,) = sweeps.iterdir()
    private = folder / "private"
    draws = (private / "draws.json").read_bytes()
    (charge,) = Ledger(ledger).charges()
    number = len(read_json(private / "draws.json")["cells"])
    second = start(*words, counting=False, outputs=first.outputs)
    assert second.wait() == 0, second.said()
    assert (private / "draws.json").read_bytes() == draws
    assert Ledger(ledger).charges() == [charge] and charge.search is not None
    assert len(list((private / "trials").iterdir())) == number
    released = folder / str(read_json(private / "outcome.json")["released"])
    assert (released / "adapter" / "adapter_model.safetensors").exists()
    assert "trials are under way, and how many there are is private" in second.said()
    assert not re.search(r"\d+ of \d+ done|cells:", second.said())
    # Whoever looks again finds the same.
    third = start(*words, counting=False, outputs=first.outputs)
    assert third.wait() == 0 and str(released) in third.said()
