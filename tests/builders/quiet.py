"""Real jobs, and the same ones as they end when nothing happens to them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_lora.storage.files import read_json
from tests.builders.forked import Nursery
from tests.builders.tiny import once, words

STEPS = 6
REAL = ("stages=[finetune]", f"train.max_steps={STEPS}", "train.expected_batch_size=60",
        "privacy.insecure_seed=7", "noise_multiplicity=k2", "train.checkpoint_minutes=0.01")  # fmt: skip


class Quiet:
    """The same jobs, one after another in one process that nothing happens to."""

    def __init__(self, nursery: Nursery, cache: Path, folder: Path, more: Sequence[str]) -> None:
        self._folder = folder
        descriptor, said = tempfile.mkstemp(dir=folder, suffix=".txt")
        os.close(descriptor)
        self._said = Path(said)
        given = once(*words(cache, folder), *REAL, *more)
        self._process = nursery.start(["-m", *given], self._said, folder, os.environ)

    def __call__(self) -> Path:
        """Their folder of outputs, once they have ended."""
        assert self._process.wait(600) == 0, self._said.read_text()
        return self._folder


def released(directory: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The bytes of the weights and the content of privacy.json."""
    weights = {path.name: path.read_bytes() for path in (directory / "adapter").glob("*.safetensors")}
    return weights, read_json(directory / "privacy.json")


def twin(directory: Path, quiet: Path) -> Path:
    """The quiet run of the same configuration."""
    (found,) = quiet.glob(f"default/*-{directory.name.rpartition('-')[2]}")
    return found
