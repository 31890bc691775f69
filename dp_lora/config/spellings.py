"""Our names for the options and commands of other trainers, such as kohya's and diffusers'."""

from __future__ import annotations

from collections.abc import Sequence

_NAMES = {
    "batch_size": "train.expected_batch_size",
    "instance_data_dir": "data.source",
    "learning_rate": "train.learning_rate",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.schedule",
    "lr_warmup_steps": "train.warmup_steps",
    "max_train_epochs": "train.epochs",
    "max_train_steps": "train.max_steps",
    "mixed_precision": "train.precision",
    "network_alpha": "lora.alpha",
    "network_dim": "lora.rank",
    "num_train_epochs": "train.epochs",
    "output_dir": "paths.outputs",
    "precision": "train.precision",
    "pretrained_model_name_or_path": "model.pretrained",
    "rank": "lora.rank",
    "resolution": "data.image_size",
    "target_epsilon": "privacy.epsilon",
    "train_batch_size": "train.expected_batch_size",
    "train_data_dir": "data.source",
}
"""The field, by what others call it."""

_VALUES = {
    "train.precision": {"no": "float32", "fp32": "float32", "fp16": "bfloat16", "bf16": "bfloat16"},
    "train.schedule": {"constant_with_warmup": "constant"},
}
"""The spellings of other trainers for a value, by the field."""


COMMANDS = {
    "export": "`dp-lora export` first",
    "audit": "`dp-lora-audit` for it",
    "train": "stages=[finetune], or train=<preset>",
    "finetune": "stages=[finetune]",
    "sample": "stages=[sample]",
    "evaluate": "stages=[evaluate]",
    "pretrain": "stages=[pretrain]",
    "help": "--help",
    "version": "--version",
}
"""The words to write for the commands of other programs."""

INSTEAD = {
    "experimental_rerun": "the run's own command, which continues it; its config.yaml says what it was",
    "config_name": "--config-dir=FOLDER with presets of your own",
    "config_path": "--config-dir=FOLDER with presets of your own",
}
"""The replacement for a flag of Hydra."""

NO_SPACES = ("tracking.wandb", "tracking.progress", "resources.device")
"""Texts of which each possible value is one word."""


def meant(name: str, value: str, fields: Sequence[str]) -> str | None:
    """The field and its value that another trainer's option means, as a word; None where that is not known.

    The last part of a field's name stands for the field where no other ends so, apart from those of the
    public set and of the model. Hyphens and underscores are alike.

    Args:
        name: without the hyphens before it.
        value: as given.
        fields: the dotted names of the fields that take a value.

    >>> meant("network-dim", "8", ["lora.rank"])
    'lora.rank=8'
    """
    plain = name.replace("-", "_").lower()
    field = _NAMES.get(plain)
    if field is None:
        ends = [one for one in fields if plain in (one, one.rpartition(".")[2])]
        own = [one for one in ends if not one.startswith(("public_data.", "model."))] or ends
        field = own[0] if len(own) == 1 else None
    return None if field is None else f"{field}={_VALUES.get(field, {}).get(value, value)}"
