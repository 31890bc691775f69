"""What a sweep will take, from the time that finished runs took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_lora.config import Config
from dp_lora.files import read_json
from sweeps.collect import configuration, runs


def hours(config: Config, measured: Sequence[dict[str, Any]]) -> float | None:
    """Hours that a run of `config` is expected to take; None when nothing comparable was measured.

    Args:
        config: of the run.
        measured: what `rates` returned.
    """
    size = draws(config)
    alike = [rate for rate in measured if rate["kind"] == _kind(config)]
    if not alike or size is None:
        return None
    a_draw = float(statistics.median(rate["seconds_per_draw"] for rate in alike))
    rest = float(statistics.median(rate["rest_s"] for rate in alike))
    return (a_draw * size + rest) / 3600


def draws(config: Config) -> float | None:
    """Expected number of (timestep, noise) draws of the training; None when it depends on the data."""
    if config.train.max_steps is None or config.train.epochs is not None:
        return None
    return config.train.max_steps * config.train.expected_batch_size * config.privacy.noise_multiplicity


def rates(experiment: Path) -> list[dict[str, Any]]:
    """What the finished runs of an experiment took.

    `kind` is what makes runs comparable, `seconds_per_draw` is of the training, `rest_s` of all other stages.
    """
    found = []
    for directory in runs([experiment]):
        result, privacy, values = (
            directory / "result.json",
            directory / "privacy.json",
            configuration(directory),
        )
        if not (result.exists() and privacy.exists() and values):
            continue
        seconds, spent = read_json(result).get("seconds", {}), read_json(privacy)
        size = spent["steps"] * spent["expected_batch_size"] * spent["noise_multiplicity"]
        if not size or "finetune" not in seconds:
            continue
        resources = values["resources"]
        found.append(
            {
                "kind": (values["model"]["name"], resources["device"], resources["gpus"], resources["nodes"]),
                "seconds_per_draw": seconds["finetune"] / size,
                "rest_s": sum(seconds.values()) - seconds["finetune"],
            }
        )
    return found


def _kind(config: Config) -> tuple[Any, ...]:
    resources = config.resources
    return (config.model.name, resources.device, resources.gpus, resources.nodes)
