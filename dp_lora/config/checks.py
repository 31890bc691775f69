"""Which values of a configuration are possible: all that can be known without data and model.

Checks that need the data (delta against the number of images, batch against the number of images) or the
model (rank against a layer's width) are made by the module that has them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from dp_lora.config.bounds import LARGEST_GUIDANCE, check_bounds
from dp_lora.config.objective import objectives
from dp_lora.config.schema import (
    ADJACENCIES,
    AUTOENCODERS,
    BACKGROUNDS,
    CLASSIFIERS,
    CLIPPINGS,
    CONDITIONINGS,
    DEVICES,
    DISTRIBUTIONS,
    EXPORTS,
    EXTRACTORS,
    FEWEST_RESAMPLES,
    LABEL_COLUMNS,
    LARGEST_EPSILON,
    LAYOUTS,
    PERSONS_KNOWN,
    PRECISIONS,
    QUANTISED,
    RESAMPLINGS,
    SAMPLERS,
    SCHEDULES,
    SMALLEST_EPSILON,
    STAGES,
    TARGET_GROUPS,
    UNITS,
    WANDB_MODES,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PretrainConfig,
    PrivacyConfig,
    TrainConfig,
)
from dp_lora.config.search import check_search
from dp_lora.config.trainable import CANDIDATES, CHOICES, COMPONENTS, MEASURED
from dp_lora.config.wandb_settings import MEANT, check_names
from dp_lora.errors import UserError, did_you_mean
from dp_lora.storage.files import expanded


def check(config: Config) -> None:
    """Raises UserError naming field, value and range for the first value that cannot be right."""
    _check_texts(config, "")
    _check_homes(config)
    _check_choices(config)
    check_bounds(config)
    _check_privacy(config.privacy)
    _check_train(config.train, config.privacy)
    _check_relation(config.train, config.data, config.privacy.adjacency)
    _check_unit(config)
    _check_choice(config)
    _check_counts(config)
    _check_evaluation(config.evaluation)
    check_search(config.search)
    check_names(config.tracking)
    objectives(config)
    _check_start(config)
    _check_model(config.model)
    for name in ("data", "public_data"):
        data: DataConfig = getattr(config, name)
        _check_data(name, data)
        if data.channels not in (1, 3):
            raise UserError(f"{name}.channels={data.channels}: expected 1 (grey) or 3 (RGB)")
        if data.resample is not None and data.resample not in RESAMPLINGS:
            hint = did_you_mean(data.resample, RESAMPLINGS)
            raise UserError(
                f"{name}.resample={data.resample!r}: expected one of {', '.join(RESAMPLINGS)}, or null{hint}"
            )
    if config.public_data.caption_column is not None:
        raise UserError(
            f"public_data.caption_column={config.public_data.caption_column}: pre-training knows classes, "
            "expected null"
        )
    if not config.public_data.public:
        raise UserError(
            f"public_data.public=false ({config.public_data.name}): pre-training has no privacy and "
            "takes public images only"
        )
    if not re.fullmatch(r"[\w.-]+", config.experiment):
        raise UserError(f"experiment={config.experiment!r}: expected letters, digits, '_', '-' or '.'")


def _check_data(name: str, data: DataConfig) -> None:
    values = data.value_range
    if values is not None and (
        len(values) != 2 or not all(map(math.isfinite, values)) or not values[0] < values[1]
    ):
        raise UserError(
            f"{name}.value_range={values}: expected the values of black and of white, such as [0,4095], or "
            "null"
        )
    if not re.fullmatch("|".join((*BACKGROUNDS, "#[0-9a-fA-F]{6}")), data.background):
        hint = did_you_mean(data.background, BACKGROUNDS)
        raise UserError(
            f"{name}.background={data.background!r}: expected white, grey, black or a colour such as "
            f"'#f0f0f0'{hint}"
        )
    if data.layout is not None and data.layout not in LAYOUTS:
        hint = did_you_mean(data.layout, LAYOUTS)
        raise UserError(f"{name}.layout={data.layout!r}: expected one of {', '.join(LAYOUTS)}, or null{hint}")


def _check_texts(section: Any, prefix: str) -> None:
    """Refuses empty texts: shells make one of a variable that is not set, and as a path it is this folder."""
    for known in dataclasses.fields(section):
        value = getattr(section, known.name)
        if dataclasses.is_dataclass(value):
            _check_texts(value, f"{prefix}{known.name}.")
        elif value == "":
            rest = ", or null" if "None" in str(known.type) else ""
            raise UserError(f'{prefix}{known.name}="": expected a text that is not empty{rest}')


def _check_homes(config: Config) -> None:
    """Refuses `~name` where there is no such user, before anybody looks below that home."""
    places = {
        "data.source": config.data.source,
        "public_data.source": config.public_data.source,
        "model.pretrained": config.model.pretrained,
        "model.adapter": config.model.adapter,
        "train.continue_from": config.train.continue_from,
        "model.pretrain.perceptual_network": config.model.pretrain.perceptual_network,
        "evaluation.inception_weights": config.evaluation.inception_weights,
        **{f"paths.{name}": place for name, place in dataclasses.asdict(config.paths).items()},
    }
    for name, place in places.items():
        if place is not None:
            expanded(place, f"{name}={place}")


def _check_start(config: Config) -> None:
    given, adapter = config.train.continue_from, config.model.adapter
    if given is not None and adapter is not None:
        raise UserError(
            f"train.continue_from={given} with model.adapter={adapter}: a training starts from one adapter; "
            "expected one of the two"
        )
    if config.privacy.fixed_beforehand and given is None:
        raise UserError("privacy.fixed_beforehand=true: says how train.continue_from counts; expected it too")


def _check_choices(config: Config) -> None:
    choices: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("stages", config.stages, STAGES),
        ("trainable.components", config.trainable.components, COMPONENTS),
        ("trainable.choice", [config.trainable.choice], CHOICES),
        ("trainable.candidates", [config.trainable.candidates], CANDIDATES),
        ("privacy.clipping", [config.privacy.clipping], CLIPPINGS),
        ("privacy.adjacency", [config.privacy.adjacency], tuple(ADJACENCIES)),
        ("privacy.unit", [config.privacy.unit], UNITS),
        ("train.precision", [config.train.precision], PRECISIONS),
        ("model.base_precision", [config.model.base_precision], (*PRECISIONS, *QUANTISED)),
        ("train.schedule", [config.train.schedule], SCHEDULES),
        ("model.conditioning", [config.model.conditioning], CONDITIONINGS),
        ("model.autoencoder.kind", [config.model.autoencoder.kind], AUTOENCODERS),
        ("model.pretrain.schedule", [config.model.pretrain.schedule], SCHEDULES),
        ("model.pretrain.precision", [config.model.pretrain.precision], PRECISIONS),
        ("model.pretrain.reconstruction", [config.model.pretrain.reconstruction], ("mse", "l1")),
        ("train.timesteps", [config.train.timesteps or "uniform"], DISTRIBUTIONS),
        ("sampler.name", [config.sampler.name], SAMPLERS),
        ("sampler.export", [config.sampler.export], EXPORTS),
        ("evaluation.reference", [config.evaluation.reference], ("train", "validation", "test")),
        ("evaluation.release", [config.evaluation.release], ("none", "dp")),
        ("tracking.wandb", [config.tracking.wandb], WANDB_MODES),
        ("tracking.progress", [config.tracking.progress], ("auto", "bar", "lines", "off")),
        ("resources.device", [config.resources.device], DEVICES),
    ]
    for name, values, options in choices:
        if not values:
            raise UserError(f"{name}=[]: expected at least one of {', '.join(options)}")
        for value in values:
            if value not in options:
                meant = MEANT.get(value.lower(), value) if name == "tracking.wandb" else value
                hint = did_you_mean(meant, options)
                raise UserError(f"{name}={value!r}: expected one of {', '.join(options)}{hint}")


def _check_choice(config: Config) -> None:
    """Refuses a choice of matrices without anything to choose among, or by."""
    trainable, most = config.trainable, config.train.max_steps
    choice, share, scout = trainable.choice, trainable.share, trainable.scout_steps
    if not 0 < share <= 1:
        raise UserError(f"trainable.share={share}: expected a number above 0, at most 1")
    if choice == "all":
        if share != 1 or scout:
            field = f"trainable.share={share:g}" if share != 1 else f"trainable.scout_steps={scout}"
            raise UserError(
                f"{field} with trainable.choice=all: every matrix is trained; expected trainable=salient, "
                "salient_public or random"
            )
        return
    if "lora" not in trainable.components:
        raise UserError(
            f"trainable.choice={choice} with trainable.components={trainable.components}: chooses where "
            "adapters go; expected lora among the components"
        )
    for name, start in (("train.continue_from", config.train.continue_from),
                        ("model.adapter", config.model.adapter)):  # fmt: skip
        if start is not None:
            raise UserError(
                f"{name}={start} with trainable.choice={choice}: that adapter has its matrices already; "
                "expected trainable=lora with those names as lora.target_modules"
            )
    if choice not in MEASURED and scout:
        raise UserError(
            f"trainable.scout_steps={scout} with trainable.choice={choice}: nothing is measured; expected 0"
        )
    if choice in MEASURED and scout < 1:
        raise UserError(f"trainable.scout_steps={scout} with trainable.choice={choice}: expected at least 1")
    if choice == "salient" and most is not None and scout >= most:
        raise UserError(
            f"trainable.scout_steps={scout}: expected fewer than train.max_steps={most}, of which they are "
            "the first"
        )
    if trainable.candidates == "matrices" and config.model.base_precision != "float32":
        raise UserError(
            f"trainable.candidates=matrices with model.base_precision={config.model.base_precision}: the "
            "gradients of whole matrices are clipped in float32; expected trainable.candidates=lora"
        )


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    for name in evaluation.extractors:
        if name not in EXTRACTORS:
            hint = did_you_mean(name, EXTRACTORS)
            raise UserError(f"evaluation.extractors={name!r}: expected one of {', '.join(EXTRACTORS)}{hint}")
    for name in evaluation.classifiers:
        if name not in CLASSIFIERS:
            hint = did_you_mean(name, CLASSIFIERS)
            raise UserError(
                f"evaluation.classifiers={name!r}: expected one of {', '.join(CLASSIFIERS)}{hint}"
            )
    if not evaluation.extractors and not evaluation.classifiers:
        raise UserError("evaluation.extractors=[] with evaluation.classifiers=[]: expected one of them")
    if evaluation.bootstrap and evaluation.bootstrap < FEWEST_RESAMPLES:
        raise UserError(
            f"evaluation.bootstrap={evaluation.bootstrap}: expected 0 (no intervals) or at least "
            f"{FEWEST_RESAMPLES} resamples"
        )
    epsilon, delta = evaluation.release_epsilon, evaluation.release_delta
    if not 0 < epsilon < math.inf:
        raise UserError(f"evaluation.release_epsilon={epsilon}: expected a finite number above 0")
    if not SMALLEST_EPSILON <= epsilon <= LARGEST_EPSILON:
        raise UserError(
            f"evaluation.release_epsilon={epsilon:g}: expected a number from {SMALLEST_EPSILON:g} to "
            f"{LARGEST_EPSILON:g}"
        )
    if delta is not None and not 0 < delta < 1:
        raise UserError(f"evaluation.release_delta={delta}: expected a number between 0 and 1, or null")
    if evaluation.release == "dp" and evaluation.reference == "train":
        raise UserError(
            "evaluation.release=dp with evaluation.reference=train: expected test or validation, images that "
            "took no part in the training"
        )


def _check_model(model: ModelConfig) -> None:
    levels, given = len(model.unet.block_out_channels), len(model.unet.attention)
    if levels != given:
        raise UserError(f"model.unet.attention: {given} values, expected one a level, {levels}")
    levels, given = len(model.autoencoder.block_out_channels), len(model.autoencoder.attention)
    if given not in (0, levels):
        raise UserError(
            f"model.autoencoder.attention: {given} values, expected one a level, {levels}, or none"
        )
    heads, dim = model.unet.num_heads, model.unet.head_dim
    for channels, attends in zip(model.unet.block_out_channels, model.unet.attention, strict=True):
        field_of, size = ("num_heads", heads) if dim is None else ("head_dim", dim)
        if attends and channels % size:
            raise UserError(
                f"model.unet.{field_of}={size}: expected a divisor of each level's {channels} channels"
            )


def _check_privacy(privacy: PrivacyConfig) -> None:
    epsilon, sigma = privacy.epsilon, privacy.noise_multiplier
    if epsilon is not None and not epsilon > 0:
        raise UserError(f"privacy.epsilon={epsilon}: expected a number above 0, inf or null")
    if epsilon is not None and epsilon < math.inf and not SMALLEST_EPSILON <= epsilon <= LARGEST_EPSILON:
        raise UserError(
            f"privacy.epsilon={epsilon:g}: expected a number from {SMALLEST_EPSILON:g} to "
            f"{LARGEST_EPSILON:g}, inf (no noise) or null"
        )
    if not 0 < privacy.delta < 1:
        raise UserError(f"privacy.delta={privacy.delta}: expected a number between 0 and 1, below 1/N")
    if sigma is not None and not (0 < sigma < math.inf):
        raise UserError(f"privacy.noise_multiplier={sigma}: expected a finite number above 0, or null")
    if epsilon is None and sigma is None:
        raise UserError("privacy.epsilon=null with privacy.noise_multiplier=null: expected one of the two")
    if epsilon == math.inf and sigma is not None:
        raise UserError(
            f"privacy.epsilon=inf with privacy.noise_multiplier={sigma}: the non-private baseline has no "
            "noise; use epsilon=none to report what a fixed noise multiplier spends"
        )
    budget = privacy.budget_epsilon
    if budget is not None and not 0 < budget < math.inf:
        raise UserError(f"privacy.budget_epsilon={budget}: expected a finite number above 0, or null")


def _check_train(train: TrainConfig, privacy: PrivacyConfig) -> None:
    if train.max_steps is None and train.epochs is None and privacy.noise_multiplier is None:
        raise UserError(
            "train.max_steps=null with train.epochs=null and privacy.noise_multiplier=null: "
            "expected a number of steps or a noise multiplier"
        )
    if train.max_steps is None and train.epochs is None and privacy.epsilon is None:
        raise UserError(
            "train.max_steps=null with train.epochs=null and privacy.epsilon=null: expected a number of "
            "steps or an epsilon at which to stop"
        )
    if not 0 <= train.ema_decay < 1:
        raise UserError(f"train.ema_decay={train.ema_decay}: expected a number in [0, 1)")


def _check_relation(train: TrainConfig, data: DataConfig, adjacency: str) -> None:
    rate = train.sample_rate
    if rate is not None and not 0 < rate <= 1:
        raise UserError(f"train.sample_rate={rate}: expected a number in (0, 1], or null")
    if adjacency != "add_or_remove":
        if rate is not None:
            raise UserError(
                f"train.sample_rate={rate} with privacy.adjacency={adjacency}: expected null, since the rate "
                "is train.expected_batch_size over the public number of images"
            )
        return
    if rate is None:
        raise UserError(
            "train.sample_rate=null with privacy.adjacency=add_or_remove: expected a number in (0, 1] beside "
            "train.expected_batch_size, since the rate must not follow from the private number of images"
        )
    if train.epochs is not None:
        raise UserError(
            f"train.epochs={train.epochs} with privacy.adjacency=add_or_remove: expected null and "
            "train.max_steps, since the number of steps must not follow from the private number of images"
        )
    if isinstance(data.train_size, int) and not data.public:
        raise UserError(
            f"data.train_size={data.train_size} with privacy.adjacency=add_or_remove: expected null or a "
            "fraction, since the number of images is private, and where one is missing another would come in"
        )


def _check_unit(config: Config) -> None:
    """Refuses persons that nothing tells or nothing asks for, and a pattern that can tell none."""
    data, public, unit = config.data, config.public_data, config.privacy.unit
    fields = ("person_column", "person_pattern")
    given = {name: value for name in fields if (value := getattr(data, name)) is not None}
    for name in fields:
        if (value := getattr(public, name)) is not None:
            raise UserError(
                f"public_data.{name}={value}: public images are protected for nobody; expected null"
            )
    if len(given) > 1:
        raise UserError(
            f"data.person_column={data.person_column} with data.person_pattern={data.person_pattern}: both "
            "say whose an image is; expected one of them"
        )
    if unit == "person" and not given and data.name not in PERSONS_KNOWN:
        raise UserError(
            "privacy.unit=person: nothing says whose an image is; expected data.person_column=COLUMN of a "
            "table or of metadata.csv, or data.person_pattern=REGULAR_EXPRESSION of file names"
        )
    for name, value in given.items():
        if unit != "person":
            raise UserError(
                f"data.{name}={value} with privacy.unit={unit}: expected privacy.unit=person, which protects "
                "a person with all of their images, or null"
            )
        if name == "person_column" and value in (
            (data.label_column,) if data.label_column else LABEL_COLUMNS
        ):
            raise UserError(
                f"data.person_column={value}: says the classes, whose names are released; expected another "
                "column, or data.label_column=none"
            )
        if data.name in PERSONS_KNOWN:
            raise UserError(f"data.{name}={value}: {data.name} knows its persons itself; expected null")
    if data.person_pattern is not None:
        try:
            groups = re.compile(data.person_pattern).groups
        except re.error as error:
            raise UserError(
                f"data.person_pattern={data.person_pattern}: no regular expression ({error}); expected one "
                "whose first group is the person, such as '(P[0-9]+)_'"
            ) from error
        if not groups:
            raise UserError(
                f"data.person_pattern={data.person_pattern}: has no group; expected parentheses around what "
                "is the person, such as '(P[0-9]+)_'"
            )


def _check_counts(config: Config) -> None:
    _check_pretrain(config.model.pretrain)
    if not config.lora.target_modules and "lora" in config.trainable.components:
        raise UserError(
            f"lora.target_modules=[]: expected at least one of {', '.join(TARGET_GROUPS)} or an end of a "
            "module's name"
        )
    if "{}" not in config.model.prompt:
        raise UserError(f"model.prompt={config.model.prompt!r}: expected {{}} for the name of the class")
    if not 0 <= config.sampler.guidance <= LARGEST_GUIDANCE:
        raise UserError(
            f"sampler.guidance={config.sampler.guidance}: expected a number from 0 to {LARGEST_GUIDANCE:g}"
        )
    asked = config.sampler.classes
    if asked is not None and not (isinstance(asked, dict) and asked):
        raise UserError(
            f"sampler.classes={asked}: expected numbers of images by class, such as {{cat: 500, dog: 20}}, "
            "or null"
        )
    for name, number in (asked or {}).items():
        if type(number) is not int or number < 1:
            raise UserError(
                f"sampler.classes: {name}: {number}: expected a whole number of images, at least 1"
            )
    if not 0 <= config.sampler.eta <= 1:
        raise UserError(f"sampler.eta={config.sampler.eta}: expected a number in [0, 1]")


def _check_pretrain(pretrain: PretrainConfig) -> None:
    for name in ("kl_weight", "codebook_weight", "perceptual_weight", "adversarial_weight"):
        if not 0 <= getattr(pretrain, name) < math.inf:
            raise UserError(
                f"model.pretrain.{name}={getattr(pretrain, name)}: expected a finite number, at least 0"
            )
    if not 0 <= pretrain.ema_decay < 1:
        raise UserError(f"model.pretrain.ema_decay={pretrain.ema_decay}: expected a number in [0, 1)")
