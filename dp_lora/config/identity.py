"""Which settings make a run what it is: its fingerprint, its directory, and the words that may be shown."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dp_lora.config.schema import Config, PathsConfig

PRIVATE_SETTINGS = (
    "data.source",
    "data.person_pattern",
    "public_data.source",
    "model.pretrained",
    "model.pretrain.perceptual_network",
    "model.adapter",
    "train.continue_from",
    "privacy.insecure_seed",
    "evaluation.inception_weights",
    "evaluation.dinov2",
    "paths",
    "tracking.folder",
    *(f"resources.{name}" for name in ("partition", "account", "qos", "constraint", "sbatch", "setup")),
)
"""Settings that no name of a run tells and that never leave: they can name people, folders and accounts, or
take the noise away."""

_CANNOT_CHANGE_THE_RESULT = ("experiment", "stages", "optimize", "search", "tracking", "resources", "paths")
_SAY_NOTHING_NEW = (
    ("data", "person_column", None),
    ("data", "person_pattern", None),
    ("public_data", "person_column", None),
    ("public_data", "person_pattern", None),
    ("privacy", "unit", "image"),
    ("trainable", "choice", "all"),
    ("trainable", "share", 1.0),
    ("trainable", "scout_steps", 0),
    ("trainable", "candidates", "lora"),
    ("model", "prompt_length", None),
    ("model", "base_precision", "float32"),
    ("train", "timesteps", None),
    ("train", "timestep_shift", None),
    ("train", "snr_gamma", None),
    ("train", "noise_offset", 0.0),
)
_NOR_CAN = ("microbatch", "channels_last", "compile", "gradient_checkpointing", "checkpoint_minutes")
"""Fields of `train`."""


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits of what can change the result of a run.

    Device, threads, tracking, launcher and paths are not part of it, so the same run asked for twice
    has the same directory wherever it runs. Whoever knows the other settings can confirm a guess of one by
    it, so what leaves carries that of `manifest.shown_fingerprint` alone.
    """
    return _digest(_values(config))


def training_fingerprint(config: Config) -> str:
    """Eight hexadecimal digits of what can change the adapter of a run, and the same for all such runs.

    What follows the training, `sampler` and `evaluation`, is not part of it.
    """
    values = _values(config)
    del values["sampler"], values["evaluation"]
    return _digest(values)


def _values(config: Config) -> dict[str, Any]:
    """The settings that can change the result of a run, each in one spelling."""
    values = dataclasses.asdict(config)
    for name in _CANNOT_CHANGE_THE_RESULT:
        del values[name]
    # Of tracking, it alone changes the released values.
    values["private_loss"] = config.tracking.private_loss
    for name in _NOR_CAN:
        del values["train"][name]
    del values["privacy"]["budget_epsilon"]
    del values["model"]["pretrain"]["samples_every"]
    del values["sampler"]["export"]
    values["sampler"]["classes"] = config.sampler.counts
    if config.sampler.counts is None:
        del values["sampler"]["classes"]
    # Where the published file lies: what is in it is fixed.
    del values["evaluation"]["inception_weights"]
    for group, name in (
        ("data", "source"),
        ("public_data", "source"),
        ("model", "pretrained"),
        ("evaluation", "dinov2"),
        ("train", "continue_from"),
        ("model", "adapter"),
    ):
        values[group][name] = _one_spelling(values[group][name])
    if not (values["train"]["continue_from"] or values["model"]["adapter"]):
        # As long as they say nothing, runs that are kept stay what they are.
        del (
            values["train"]["continue_from"],
            values["model"]["adapter"],
            values["privacy"]["fixed_beforehand"],
        )
    pretrain = values["model"]["pretrain"]
    pretrain["perceptual_network"] = _one_spelling(pretrain["perceptual_network"])
    # Where they say what was done before they were there, runs stay what they are.
    for group, name, value in _SAY_NOTHING_NEW:
        if values[group][name] == value:
            del values[group][name]
    return values


def _one_spelling(place: str | None) -> str | None:
    """The same for all spellings of one path that mean the same place wherever it is.

    `~` is the home folder. A relative path stays as it is, so that a folder and its runs can be moved
    together, and links are not followed.

    >>> _one_spelling("set/"), _one_spelling("./set//."), _one_spelling("uoft-cs/cifar10")
    ('set', 'set', 'uoft-cs/cifar10')
    """
    return str(PurePosixPath(os.path.expanduser(place))) if place else place


def pretrained_fingerprint(config: Config) -> str:
    """Eight hexadecimal digits of what can change the weights of a public pre-training."""
    model = dataclasses.asdict(config.model)
    del model["pretrained"], model["adapter"], model["prompt"], model["pretrain"]["samples_every"]
    del model["prompt_length"], model["base_precision"]
    public = dataclasses.asdict(config.public_data)
    public["source"] = _one_spelling(public["source"])
    pretrain = model["pretrain"]
    pretrain["perceptual_network"] = _one_spelling(pretrain["perceptual_network"])
    # As long as they say what was done before they were there, models that are kept stay what they are.
    for name, value in (
        ("value_range", None),
        ("background", "white"),
        ("layout", None),
        ("person_column", None),
        ("person_pattern", None),
    ):
        if public[name] == value:
            del public[name]
    return _digest({"model": model, "public_data": public, "seed": config.seed})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def absolute_paths(paths: PathsConfig) -> PathsConfig:
    """The same places, whatever folder a later command is given in."""
    places = {
        name: place and str(Path(place).expanduser().absolute())
        for name, place in dataclasses.asdict(paths).items()
    }
    return PathsConfig(**places)


def run_directory(config: Config, overrides: Sequence[str]) -> Path:
    """`<paths.outputs>/<experiment>/<readable overrides>-<fingerprint8>`.

    Args:
        config: the job.
        overrides: the command line's `key=value` words; those that cannot change the result, and those of
            `PRIVATE_SETTINGS`, are left out. A directory of the same run that was asked for in other words
            is taken again.
    """
    folder = Path(config.paths.outputs).expanduser() / config.experiment
    identity = fingerprint(config)
    # Not glob, which takes several times as long, and a sweep asks once for each of its cells.
    names = os.listdir(folder) if folder.is_dir() else []
    if said_otherwise := sorted(name for name in names if name.endswith(f"-{identity}")):
        return folder / said_otherwise[0]
    return folder / f"{readable(overrides)}-{identity}"


def readable(overrides: Sequence[str]) -> str:
    """The command line's words that can change the result and may be shown, as part of a name.

    >>> readable(["seed=1", "data.source=/home/ann/patients", "lora.rank=4", "tracking.tags=[a]"])
    'lora.rank=4,seed=1'
    """
    without_effect = (
        *(*_CANNOT_CHANGE_THE_RESULT, "cluster", "sweep"),
        *("privacy.budget_epsilon", "evaluation.inception_weights"),
        *(f"train.{name}" for name in _NOR_CAN),
    )
    words = [word.replace("'", "") for word in overrides]
    said = [word.lstrip("+~") for word in words if not word.lstrip("+~").startswith(without_effect)]
    shown = sorted(word for word in said if _may_be_shown(word))
    return re.sub(r"[^\w.=,+-]+", "_", ",".join(shown)).strip("_")[:120] or "defaults"


def _may_be_shown(word: str) -> bool:
    """Whether a word sets one plain value that is neither private nor a path."""
    return not is_private(word) and not re.search(r"[/~\\{$]", word.partition("=")[2])


def is_private(word: str) -> bool:
    """Whether a word of the command line sets one of `PRIVATE_SETTINGS`."""
    name = word.partition("=")[0].lstrip("+~")
    return any(f"{name}.".startswith(f"{setting}.") for setting in PRIVATE_SETTINGS)
