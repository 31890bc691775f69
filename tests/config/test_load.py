"""Every preset composes and says what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from dp_lora.config.load import config_directory
from dp_lora.config.schema import Config
from tests.builders.tiny import composed

# What a preset needs beside itself to make sense.
COMPANIONS = {
    "data/imagefolder": ["data.source=/images"],
    "epsilon/none": ["privacy.noise_multiplier=1"],
}


PRESETS = sorted(path.relative_to(config_directory()) for path in config_directory().glob("*/**/*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_every_preset_composes_and_passes_the_checks(preset: Path) -> None:
    group, choice = preset.parent.as_posix(), preset.stem
    override = f"{group}='{choice}'"  # quoted, because `inf` would be a number
    config = composed(override, *COMPANIONS.get(f"{group}/{choice}", []))
    assert isinstance(config, Config)


def test_presets_say_what_their_names_say() -> None:
    config = composed("epsilon=eps1", "lora_rank=r16", "noise_multiplicity=k8")
    assert (config.privacy.epsilon, config.lora.rank, config.privacy.noise_multiplicity) == (1.0, 16, 8)
    assert composed("epsilon=none", "noise_multiplier=fixed", "train.max_steps=5").privacy.epsilon is None
    assert composed("epsilon='inf'").privacy.epsilon == float("inf")
    fixed = composed("noise_multiplier=fixed")
    assert fixed.privacy.noise_multiplier == 1.0 and fixed.train.max_steps is None


@pytest.mark.parametrize(
    "experiment", ["mnist", "fashion_mnist", "cifar10", "celeba32", "celeba64", "celebahq256"]
)
def test_smoke_is_the_experiment_in_small(experiment: str) -> None:
    config, full = composed(f"experiment={experiment}", "scale=smoke"), composed(f"experiment={experiment}")
    train, pretrain = config.train, config.model.pretrain
    assert (train.max_steps, train.epochs, train.expected_batch_size) == (2, None, 10)
    assert (pretrain.autoencoder_steps, pretrain.unet_steps, config.sampler.num_samples) == (1, 1, 20)
    for name in ("data", "public_data", "trainable", "lora", "resources"):
        assert getattr(config, name) == getattr(full, name)
    assert (config.model.unet, config.model.autoencoder) == (full.model.unet, full.model.autoencoder)
    assert (config.privacy.epsilon, config.privacy.delta) == (full.privacy.epsilon, full.privacy.delta)


def test_every_preset_is_overridden_by_value() -> None:
    config = composed("epsilon=eps1", "privacy.epsilon=2.5", "lora_rank=r16", "lora.rank=12")
    assert config.privacy.epsilon == 2.5 and config.lora.rank == 12
