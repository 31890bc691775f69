"""A tiny fine-tuning that is run once, and processes that start fast."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_lora.data.sets import ImageSplits
from tests.builders.finetuning import Given, given


@pytest.fixture(scope="module")
def job(pretrained: Path, digits: ImageSplits) -> Given:
    return given(pretrained, digits)


@pytest.fixture(scope="module")
def uninterrupted(
    job: Given, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], torch.Tensor]:
    return job.run(tmp_path_factory.mktemp("whole") / "checkpoint")


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Starts processes that have imported this module already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.builders.finetuning", "dp_lora.records.tracker", "dp_lora.jobs.stages", "dp_lora.jobs.reuse",
         "dp_lora.jobs.summary", "hydra.core.global_hydra"]
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        # The server does not take over sys.path.
        patched.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        yield context
