"""The public commands in this process, and an interruption of the training that they start."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from dp_lora.__main__ import main
from dp_lora.privacy import step as algorithm
from tests.builders.tiny import once


def dp_lora(*words: str, command: Callable[[], None] = main) -> int:
    """The exit status of `dp-lora` with these words, or of another command."""
    GlobalHydra.instance().clear()
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["dp-lora", *once(*words)])
            command()
        return 0
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        GlobalHydra.instance().clear()


def state_of(*folders: Path) -> dict[str, str]:
    """A digest of each file below `folders`."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


FOLDER = (
    "data=imagefolder",
    "data.image_size=8",
    "data.channels=1",
    "train.expected_batch_size=6",
    "train.max_steps=3",
    "epsilon=none",
    "privacy.noise_multiplier=2",
    "privacy.delta=1e-3",
    "sampler.num_samples=4",
    "sampler.steps=2",
)
"""After `tiny.words`: a job on a folder of two classes, without its `data.source`."""


def interrupted(at: int) -> Callable[..., Any]:
    """`noised_mean`, which is interrupted when it is called for the `at`-th time."""
    noised, calls = algorithm.noised_mean, 0

    def stop(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return noised(*args)

    return stop
