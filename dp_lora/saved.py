"""The configuration of a run that is there, of this version or an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dp_lora.config import Config, from_omegaconf
from dp_lora.errors import UserError


def read_config(path: Path) -> Config:
    """The settings in the config.yaml of a run.

    Earlier versions called it `add_or_remove` when the sample rate followed from the number of images, which
    it tells. What holds for such a run, with the same epsilon, is `zero_out` with a public number of images,
    and so it is read.

    Raises UserError naming the file when it is damaged, missing, or of something else.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        if not isinstance(values, dict) or not values:
            raise TypeError("no settings by name")
        return from_omegaconf(OmegaConf.create(_as_it_holds(values)))
    except (
        UserError, OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, AssertionError,
        OSError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: says no longer what this run is ({reason}); expected what dp-lora wrote there"
        ) from error


def _as_it_holds(values: dict[Any, Any]) -> dict[Any, Any]:
    """The settings with the relation of neighbours that holds for them."""
    privacy, train = values.get("privacy"), values.get("train")
    if not isinstance(privacy, dict) or not isinstance(train, dict):
        return values
    if privacy.get("adjacency") != "add_or_remove" or train.get("sample_rate") is not None:
        return values
    return {**values, "privacy": {**privacy, "adjacency": "zero_out"}}
