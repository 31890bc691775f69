"""One thread, and a tiny model that is pre-trained once for the whole session."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"
# No test writes to the ledger beside the user's data, nor to the user's index of images.
os.environ["DP_LORA_LEDGER"] = tempfile.mkdtemp(prefix="dp_lora_ledger") + "/privacy_ledger.jsonl"
os.environ["XDG_DATA_HOME"] = str(Path(os.environ["DP_LORA_LEDGER"]).parent / "share")

from collections.abc import Callable, Iterator

import absl.logging
import hypothesis
import pytest
import torch
from torch import Tensor, nn

from dp_lora.config.schema import Config
from dp_lora.data import sets
from dp_lora.data.sets import ImageSplits
from dp_lora.jobs import job
from dp_lora.models.folders import LatentDiffusion, load
from dp_lora.training import finetune
from tests.builders.forked import Nursery
from tests.builders.tiny import TINY, composed, words
from tests.builders.tiny_diffusion import PRESETS, TinyDiffusion, batch_of

torch.set_num_threads(1)
# Tests kill processes and not machines, so nothing has to wait for the disk.
os.fsync = os.fdatasync = lambda descriptor: None  # type: ignore[assignment]
# A shell ignores these for what it starts in the background or under nohup, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# absl's handler closes its stream, which is pytest's here, each time that Hydra sets up logging.
absl.logging.PythonHandler.close = logging.StreamHandler.close
# The same examples in every run, however slow the machine.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on SLURM first, the longest; skips those that need a GPU where torch can use none."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from visiting over and over what importing and collecting made."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Removes the ledger and the index of the jobs that named none of their own."""
    shutil.rmtree(Path(os.environ["DP_LORA_LEDGER"]).parent)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `paths.cache` for the session that holds the pre-trained tiny model."""
    folder = tmp_path_factory.mktemp("cache")
    job.pretrained_model(composed(*TINY, f"paths.cache={folder}"))
    return folder


@pytest.fixture(scope="session")
def pretrained(cache: Path) -> Path:
    """The folder of the pre-trained tiny model."""
    return next((cache / "models").glob("tiny8-*[!k]"))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the preflight, which costs as much as ten steps; tests of its own check it."""
    monkeypatch.setattr(finetune, "check_engine", lambda *args: None)


@pytest.fixture
def tiny(cache: Path, tmp_path: Path) -> Callable[..., Config]:
    """The configuration of a tiny job in the test's own output folder, with the given overrides."""
    return lambda *overrides: composed(*words(cache, tmp_path / "outputs"), *overrides)


@pytest.fixture
def model(pretrained: Path) -> LatentDiffusion:
    """The pre-trained tiny model."""
    return load(pretrained)


@pytest.fixture(scope="session")
def digits(cache: Path) -> ImageSplits:
    """The private images of the tiny job."""
    config = composed(*TINY, f"paths.cache={cache}")
    return sets.load(config.data, config.paths)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts commands that have imported torch and diffusers already."""
    started = Nursery(tmp_path_factory.mktemp("nursery"))
    yield started
    started.end()


@pytest.fixture
def diffusion() -> Callable[..., TinyDiffusion]:
    def build(preset: str = "lora_embedder", seed: int = 0, checkpointing: bool = False) -> TinyDiffusion:
        torch.manual_seed(seed)
        return TinyDiffusion(PRESETS[preset], checkpointing).train()

    return build


@pytest.fixture
def make_batch() -> Callable[..., tuple[Tensor, ...]]:
    return batch_of


@pytest.fixture
def one_by_one() -> Callable[..., Tensor]:
    """Per-example gradients [M, P] by a loop over single examples with stock autograd."""

    def loop(module: nn.Module, loss_of: Callable[[int], Tensor], examples: int) -> Tensor:
        trained = [p for p in module.parameters() if p.requires_grad]
        rows = []
        for i in range(examples):
            gradients = torch.autograd.grad(loss_of(i).sum(), trained, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)

    return loop


@pytest.fixture
def example_of() -> Callable[..., tuple[Tensor, ...]]:
    def pick(batch: tuple[Tensor, ...], i: int, k: int) -> tuple[Tensor, ...]:
        latents, labels, timesteps, noise = batch
        rows = slice(i * k, (i + 1) * k)
        return latents[i : i + 1], labels[i : i + 1], timesteps[rows], noise[rows]

    return pick
