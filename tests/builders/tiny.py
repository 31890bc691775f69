"""The command line and the configuration of a job that takes seconds."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import dp_lora.__main__  # noqa: F401  (registers the schema)
from dp_lora.config.load import config_directory, from_omegaconf
from dp_lora.config.schema import Config

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


def composed(*overrides: str) -> Config:
    """The checked configuration of a command line.

    Hydra takes a fifth of a second, so it composes command lines that differ in their places alone once.
    """
    places = [word for word in overrides if re.fullmatch(r"paths\.\w+=[\w/.-]+", word)]
    config = copy.deepcopy(_composed(*(word for word in overrides if word not in places)))
    for place in places:
        name, _, value = place.partition("=")
        OmegaConf.update(config, name, value)
    return from_omegaconf(config)


@functools.cache
def _composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return compose("config", list(overrides))


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
