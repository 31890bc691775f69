"""One thread, and a tiny model that is pre-trained once for the whole session."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"
# No test writes to the ledger beside the user's data, nor to the user's index of images.
os.environ["DP_LORA_LEDGER"] = tempfile.mkdtemp(prefix="dp_lora_ledger") + "/privacy_ledger.jsonl"
os.environ["XDG_DATA_HOME"] = str(Path(os.environ["DP_LORA_LEDGER"]).parent / "share")

from collections.abc import Callable

import absl.logging
import hypothesis
import pytest
import torch
from hydra import compose, initialize_config_dir

import dp_lora.__main__  # noqa: F401  (registers the schema)
from dp_lora.config.load import config_directory, from_omegaconf
from dp_lora.config.schema import Config
from dp_lora.data import sets
from dp_lora.data.sets import ImageSplits
from dp_lora.jobs import job
from dp_lora.models.folders import LatentDiffusion, load

torch.set_num_threads(1)
# absl's handler closes its stream, which is pytest's here, each time that Hydra sets up logging.
absl.logging.PythonHandler.close = logging.StreamHandler.close
# The same examples in every run, however slow the machine.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")

TINY = (
    "model=tiny8",
    "data=digits",
    "data@public_data=digits",
    "public_data.public=true",
    "train.expected_batch_size=60",
    "train.max_steps=4",
    "sampler.num_samples=20",
    "sampler.steps=4",
    "tracking.wandb=disabled",
    "tracking.progress=off",
    "resources.device=cpu",
    "resources.threads=1",
)
"""The command line of a job that takes seconds, without its paths."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on SLURM first, the longest; skips those that need a GPU where torch can use none."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_unconfigure() -> None:
    """Removes the ledger and the index of the jobs that named none of their own."""
    shutil.rmtree(Path(os.environ["DP_LORA_LEDGER"]).parent)


def composed(*overrides: str) -> Config:
    """The checked configuration of a command line."""
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return from_omegaconf(compose("config", list(overrides)))


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
def tiny(cache: Path, tmp_path: Path) -> Callable[..., Config]:
    """The configuration of a tiny job in the test's own output folder, with the given overrides."""
    return lambda *overrides: composed(*words(cache, tmp_path / "outputs"), *overrides)


def words(cache: Path, outputs: Path) -> list[str]:
    """The command line of a tiny job."""
    ledger = outputs.with_name(f"{outputs.name}.privacy_ledger.jsonl")
    places = {
        "cache": cache,
        "outputs": outputs,
        "ledger": ledger,
        "index": outputs.with_name(f"{outputs.name}.image_index"),
    }
    return [*TINY, *(f"paths.{name}={place}" for name, place in places.items())]


def once(*given: str) -> list[str]:
    """The words of a command line, where a later one takes the place of an earlier one of the same name."""
    kept = {word.partition("=")[0]: word for word in given}
    return [word for word in dict.fromkeys(given) if kept[word.partition("=")[0]] == word]


@pytest.fixture
def model(pretrained: Path) -> LatentDiffusion:
    """The pre-trained tiny model."""
    return load(pretrained)


@pytest.fixture(scope="session")
def digits(cache: Path) -> ImageSplits:
    """The private images of the tiny job."""
    config = composed(*TINY, f"paths.cache={cache}")
    return sets.load(config.data, config.paths)
