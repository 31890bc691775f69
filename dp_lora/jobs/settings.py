"""Checks of a job by its settings alone: whether its model, its images and its adapters fit each other.

Neither images nor weights are read, so that a plan and a dry run find what every job of a sweep would fail
with.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

from dp_lora.config.load import WEIGHTS
from dp_lora.config.schema import QUANTISED, Config, ModelConfig
from dp_lora.data.sets import expected_train_size
from dp_lora.data.sources import check_fields
from dp_lora.errors import UserError
from dp_lora.models.folders import LatentDiffusion, build, find, outline
from dp_lora.models.pipelines import is_pipeline, pipeline_name
from dp_lora.models.sample import refuse_sampler


def check_settings(config: Config) -> None:
    """Raises UserError for settings with which a job cannot work, whatever its images are.

    A pre-trained model that is not on this machine is not looked for: a cluster may have it.
    """
    check_fields(config.data, "data")
    check_fields(config.public_data, "public_data")
    given = config.model.pretrained
    if given is None or (WEIGHTS / given).is_dir() or Path(given).expanduser().is_dir():
        side = config.data.image_size
        check_fit(config, outline_of(config), (config.data.channels, side, side))
    # Persons are not counted by any setting.
    size = expected_train_size(config.data) if config.privacy.unit == "image" else None
    if size is not None and config.train.expected_batch_size > size:
        raise UserError(
            f"train.expected_batch_size={config.train.expected_batch_size:g}: expected a number in "
            f"(0, {size}], the number of training images"
        )
    if size is not None and config.privacy.delta >= 1 / size and not config.data.public:
        raise UserError(
            f"privacy.delta={config.privacy.delta:g}: expected a number in (0, 1/N) = (0, {1 / size:.3g})"
        )


def outline_of(config: Config) -> LatentDiffusion:
    """The job's model without weights: its names, shapes and, where it is pre-trained, its classes.

    It is shared by all who ask, who must not change it. Raises UserError for sizes that do not fit each
    other, and for a `model.pretrained` that is none.
    """
    if config.model.pretrained is not None:
        size, length = config.data.image_size, config.model.prompt_length
        return outline(find(config.model.pretrained), image_size=size, prompt_length=length)
    public = config.public_data
    return _built(json.dumps(dataclasses.asdict(config.model)), public.channels, public.image_size)


@functools.lru_cache(maxsize=4)
def _built(sizes: str, channels: int, image_size: int) -> LatentDiffusion:
    import torch
    from omegaconf import OmegaConf

    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), json.loads(sizes)))
    assert isinstance(model, ModelConfig)
    with torch.device("meta"):
        return build(model, classes=["?"], channels=channels, image_size=image_size)


def check_fit(config: Config, model: LatentDiffusion, found: Sequence[int]) -> None:
    """Refuses images of the shape `found`, captions, targets and ranks that the model cannot take."""
    from dp_lora.models.adapters import target_names

    if config.data.caption_column is not None and model.prompts is None:
        raise UserError(
            f"data.caption_column={config.data.caption_column}: the model has no text encoder; expected null "
            "or a text-to-image pipeline as model.pretrained"
        )
    if config.train.snr_gamma is not None and model.process.flows:
        raise UserError(
            f"train.snr_gamma={config.train.snr_gamma}: the model is a flow, whose loss has no such weights; "
            "expected null"
        )
    if config.model.base_precision != "float32" and (
        model.source is None or config.trainable.components != ["lora"]
    ):
        raise UserError(
            f"model.base_precision={config.model.base_precision}: expected float32, or a text-to-image "
            "pipeline with trainable.components=[lora]"
        )
    if config.model.base_precision in QUANTISED:
        from dp_lora.models.quantised import functions

        functions(config.model.base_precision)
    if "sample" in config.stages:
        refuse_sampler(model, config.sampler.name)
    if tuple(found) != tuple(model.image_shape):
        raise UserError(
            f"data.name={config.data.name}: images of {_by(found)}, expected {_by(model.image_shape)}, which "
            f"{_who(config)} takes{_way_out(config)}"
        )
    if "lora" in config.trainable.components:
        lora = config.lora
        target_names(model.unet, lora.target_modules, lora.rank, cap_rank=lora.cap_rank)


def _who(config: Config) -> str:
    """What takes images of one size: a pipeline, or the autoencoder of a model of ours."""
    if config.model.pretrained is not None:
        folder = find(config.model.pretrained)
        if is_pipeline(folder):
            return f"the {pipeline_name(folder)} that model.pretrained names"
    return f"the autoencoder of model.name={config.model.name}"


def _way_out(config: Config) -> str:
    """A model that is made from public images takes what those are."""
    if config.model.pretrained is not None:
        return ""
    name = config.public_data.name
    return f": it is made from public_data.name={name}; expected public images of the same size and channels"


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
