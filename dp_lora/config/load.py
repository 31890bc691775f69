"""Configurations as they are read: composed by Hydra, or kept by a run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dp_lora.config.checks import check
from dp_lora.config.schema import Config
from dp_lora.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the installed package."""
WEIGHTS = PACKAGE / "weights"
"""The models that come with it."""


def from_omegaconf(composed: DictConfig) -> Config:
    """The composed configuration as a checked, typed `Config`.

    Raises UserError when a field is missing or `check` refuses a value.
    """
    # As plain values: merging one typed configuration into another lets unknown fields pass.
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    _check_public(composed, plain)
    merged = OmegaConf.merge(_schema(), plain)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{missing[0]}: no value given")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check(config)
    return config


def _check_public(composed: DictConfig, plain: Mapping[Any, Any]) -> None:
    """Refuses images of one's own that only a preset calls public: nothing would be charged for them.

    Such a preset is an interpolation, so that it is told from the user's own word. In `public_data`, which
    takes nothing else, and without a source it stands for itself.
    """
    data = plain.get("data")
    if not isinstance(data, dict) or data.get("source") is None or data.get("public") is not True:
        return
    if OmegaConf.is_interpolation(composed.data, "public") and data.get("name") not in _WITHOUT_FILES:
        raise UserError(
            f"data.source with the preset of {data.get('name')}, which calls its images public, and cannot "
            "know whose these are; expected data.public=false, which charges what is spent on them, or "
            "data.public=true if anybody may see them"
        )


_WITHOUT_FILES = ("letters", "pictures", "letters_pictures")
"""Sets that refuse any source, in a line of their own."""


@functools.cache
def _schema() -> DictConfig:
    """The schema of `Config`; making it takes longer than filling it, and a sweep has hundreds of jobs."""
    return OmegaConf.structured(Config)  # type: ignore[no-any-return]


def config_directory() -> Path:
    """The folder of the YAML files: `conf/` of the checkout, else the copy inside the installed package."""
    checkout = PACKAGE.parent / "conf"
    return checkout if (checkout / "config.yaml").exists() else PACKAGE / "conf"


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
