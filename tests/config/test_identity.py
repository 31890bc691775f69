"""What names a run: the fingerprint, the run directory, and the weights of a pre-training."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import pytest

from dp_lora.config import identity as settings
from dp_lora.config.identity import fingerprint, pretrained_fingerprint, run_directory
from dp_lora.config.schema import Config
from tests.builders.tiny import composed


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "data=digits",
        "public_data.train_size=100",
        "model.unet.cross_attention_dim=32",
        "trainable=bias",
        "lora.rank=3",
        "lora.alpha=2",
        "privacy.epsilon=3",
        "privacy.adjacency=add_or_remove train.sample_rate=0.25",
        "tracking.private_loss=true",
        "privacy.delta=1e-6",
        "privacy.insecure_seed=1",
        "train.learning_rate=0.1",
        "train.precision=bfloat16",
        "train.timesteps=logit_normal",
        "train.timestep_shift=3",
        "train.snr_gamma=5",
        "train.noise_offset=0.1",
        "model.prompt_length=64",
        "model.base_precision=bfloat16",
        "sampler.steps=3",
        "evaluation.reference=train",
        "evaluation.bootstrap=50",
        "evaluation=release",
    ],
)
def test_the_fingerprint_changes_with_what_can_change_the_result(override: str, default: Config) -> None:
    assert fingerprint(composed(*override.split())) != fingerprint(default)


def test_a_new_setting_that_says_what_was_done_before_is_left_out(
    default: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(default), pretrained_fingerprint(default)
    assert dataclasses.asdict(default)["train"]["snr_gamma"] is None
    monkeypatch.setattr(settings, "_SAY_NOTHING_NEW", ())
    assert fingerprint(default) != before[0], "the list is of settings that would change it"
    assert pretrained_fingerprint(default) == before[1]


@pytest.mark.parametrize(
    "override",
    [
        "paths.outputs=/elsewhere",
        "paths.cache=/elsewhere",
        "tracking.project=other",
        "tracking.log_every=5",
        "resources.device=cpu",
        "resources.threads=1",
        "stages=[sample]",
        "train.microbatch=7",
        "train.compile=true",
        "train.channels_last=true",
        "train.gradient_checkpointing=true",
        "train.checkpoint_minutes=9",
        "evaluation.inception_weights=/elsewhere",
    ],
)
def test_the_fingerprint_ignores_what_cannot(override: str, default: Config) -> None:
    assert fingerprint(composed(override)) == fingerprint(default)


@pytest.mark.parametrize(
    "setting",
    [
        *("data.source", "public_data.source", "model.pretrained"),
        *("model.pretrain.perceptual_network", "evaluation.dinov2"),
    ],
)
def test_a_place_in_the_home_folder_is_one_run_in_both_spellings(
    setting: str, default: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    *path, name = setting.split(".")

    def given(place: str) -> Config:
        config = copy.deepcopy(default)
        setattr(functools.reduce(getattr, path, config), name, place)
        return config

    for identity in (fingerprint, pretrained_fingerprint):
        places = ("~/set", "/home/ann/set", "~/set/", "/home/ann/./set")
        assert len({identity(given(place)) for place in places}) == 1
    assert len({fingerprint(given(place)) for place in ("set", "~/set", "/home/bob/set")}) == 3


def test_the_weights_of_a_pre_training_depend_on_what_is_public_alone() -> None:
    own = pretrained_fingerprint(composed())
    assert own == pretrained_fingerprint(
        composed("data=digits", "privacy.epsilon=1", "model.pretrained=null")
    )
    assert own != pretrained_fingerprint(composed("public_data.train_size=26"))
    assert own != pretrained_fingerprint(composed("model.pretrain.unet_steps=7"))


def test_the_run_directory_is_readable_and_the_same_however_the_run_is_asked_for(tmp_path: Path) -> None:
    said = ["paths.outputs=x", "lora.rank=3", "epsilon='inf'", "tracking.project=p", "train.microbatch=4"]
    config = composed(*said[1:], f"paths.outputs={tmp_path}")
    directory = run_directory(config, said)
    assert directory == tmp_path / "default" / f"epsilon=inf,lora.rank=3-{fingerprint(config)}"
    assert run_directory(config, []).name == f"defaults-{fingerprint(config)}"
    directory.mkdir(parents=True)
    assert run_directory(config, ["lora.rank=3", "privacy.epsilon=.inf"]) == directory
    odd = run_directory(composed(f"paths.outputs={tmp_path}", "seed=9"), ["data.source=/a b/'c'", "x" * 300])
    assert odd.parent == tmp_path / "default" and len(odd.name) < 140 and " " not in odd.name
