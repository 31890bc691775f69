"""Impossible values are refused by field and value, and every whole number has an end."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from dp_lora.commands.vocabulary import field_names, kind_of
from dp_lora.config.checks import check
from dp_lora.config.load import from_omegaconf
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from tests.builders.tiny import composed

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "prompt": ({"model.prompt": "a photo"}, "model.prompt='a photo': expected {}"),
    "adjacency": ({"privacy.adjacency": "replace"}, "privacy.adjacency='replace'"),
    "add or remove without a rate": (
        {"privacy.adjacency": "add_or_remove"},
        "train.sample_rate=null with privacy.adjacency=add_or_remove: expected a number in (0, 1]",
    ),
    "add or remove by passes": (
        {"privacy.adjacency": "add_or_remove", "train.sample_rate": 0.25, "train.epochs": 2.0},
        "train.epochs=2.0 with privacy.adjacency=add_or_remove: expected null and train.max_steps",
    ),
    "add or remove of a number that is said": (
        {"privacy.adjacency": "add_or_remove", "train.sample_rate": 0.25, "data.train_size": 300},
        "data.train_size=300 with privacy.adjacency=add_or_remove: expected null or a fraction",
    ),
    "a fraction of one": (
        {"data.test_size": 1.0},
        "data.test_size=1.0: expected a whole number, or a fraction",
    ),
    "range of one value": ({"data.value_range": [0.0]}, "data.value_range=[0.0]: expected the values of"),
    "range upside down": ({"data.value_range": [255.0, 0.0]}, "data.value_range=[255.0, 0.0]"),
    "range without an end": ({"data.value_range": [0.0, float("inf")]}, "data.value_range=[0.0, inf]"),
    "background": ({"data.background": "whit"}, "data.background='whit': expected white, grey, black or"),
    "layout": (
        {"data.layout": "folder"},
        "data.layout='folder': expected one of folders, tables, or null; did",
    ),
    "a rate beside a public number": ({"train.sample_rate": 0.25}, "train.sample_rate=0.25 with"),
    "sample rate": (
        {"privacy.adjacency": "add_or_remove", "train.sample_rate": 1.5},
        "train.sample_rate=1.5",
    ),
    "sample rate NaN": (
        {"privacy.adjacency": "add_or_remove", "train.sample_rate": float("nan")},
        "train.sample_rate=nan",
    ),
    "epsilon zero": ({"privacy.epsilon": 0.0}, "privacy.epsilon=0"),
    "epsilon negative": ({"privacy.epsilon": -1.0}, "privacy.epsilon=-1"),
    "epsilon NaN": ({"privacy.epsilon": float("nan")}, "privacy.epsilon=nan"),
    "delta zero": ({"privacy.delta": 0.0}, "privacy.delta=0"),
    "delta one": ({"privacy.delta": 1.0}, "privacy.delta=1"),
    "delta NaN": ({"privacy.delta": float("nan")}, "privacy.delta=nan"),
    "sigma zero": ({"privacy.noise_multiplier": 0.0}, "privacy.noise_multiplier=0"),
    "sigma infinite": ({"privacy.noise_multiplier": float("inf")}, "privacy.noise_multiplier=inf"),
    "nothing given": ({"privacy.epsilon": None}, "privacy.epsilon=null"),
    "noise on the baseline": (
        {"privacy.epsilon": float("inf"), "privacy.noise_multiplier": 1.0},
        "privacy.epsilon=inf",
    ),
    "k zero": ({"privacy.noise_multiplicity": 0}, "privacy.noise_multiplicity=0"),
    "C zero": ({"privacy.max_grad_norm": 0.0}, "privacy.max_grad_norm=0"),
    "C NaN": ({"privacy.max_grad_norm": float("nan")}, "privacy.max_grad_norm=nan"),
    "C beyond what an optimiser holds": (
        {"privacy.max_grad_norm": 1e300},
        "privacy.max_grad_norm=1e+300: expected a number above 0, at most 1e+06",
    ),
    "k beyond the timesteps": (
        {"privacy.noise_multiplicity": 10**8},
        "privacy.noise_multiplicity=100000000: expected at most 1000",
    ),
    "alpha beyond float32": (
        {"lora.alpha": 1e30},
        "lora.alpha=1e+30: expected a number above 0, at most 1e+06, or null",
    ),
    "seed beyond 63 bits": (
        {"seed": 99999999999999999999},
        "seed=99999999999999999999: expected at most 9223372036854775807",
    ),
    "threads beyond all machines": (
        {"resources.threads": 99999999999999},
        "resources.threads=99999999999999: expected at most 4096",
    ),
    "microbatch beyond memory": (
        {"train.microbatch": 10**20},
        "train.microbatch=100000000000000000000: expected 'auto' or a whole number from 1 to 100000",
    ),
    "epochs beyond float64": ({"train.epochs": 1e308}, "train.epochs=1e+308: expected a number above 0, at"),
    "guidance beyond float32": (
        {"sampler.guidance": 1e38},
        "sampler.guidance=1e+38: expected a number from 0",
    ),
    "memory beyond all machines": ({"resources.memory_gb": 1e300}, "resources.memory_gb=1e+300: expected"),
    "more images than fit": ({"data.train_size": 10**30}, "expected at most 10000000, or a fraction"),
    "weight decay beyond the weight": (
        {"train.weight_decay": 1e9},
        "train.weight_decay=1e+09: with train.learning_rate=0.02, times the largest factor 5, expected a",
    ),
    "weight decay times a factor": (
        {"train.weight_decay": 10.0, "trainable.learning_rate_factor": 100.0},
        "train.weight_decay=10: with train.learning_rate=0.02, times the largest factor 100, expected",
    ),
    "no level": (
        {"model.unet.block_out_channels": []},
        "model.unet.block_out_channels=[]: expected at least",
    ),
    "clipping": ({"privacy.clipping": "flatt"}, "privacy.clipping='flatt'"),
    "rank zero": ({"lora.rank": 0}, "lora.rank=0"),
    "alpha infinite": ({"lora.alpha": float("inf")}, "lora.alpha=inf"),
    "no target": ({"lora.target_modules": []}, "lora.target_modules=[]"),
    "no component": ({"trainable.components": []}, "trainable.components=[]"),
    "component": ({"trainable.components": ["lorra"]}, "did you mean 'lora'?"),
    "choice": ({"trainable.choice": "salientt"}, "did you mean 'salient'?"),
    "candidates": ({"trainable.candidates": "matrix"}, "trainable.candidates='matrix': expected one of lora"),
    "share above 1": (
        {"trainable.choice": "random", "trainable.share": 1.5},
        "trainable.share=1.5: expected",
    ),
    "share NaN": ({"trainable.choice": "random", "trainable.share": float("nan")}, "trainable.share=nan"),
    "share of all": ({"trainable.share": 0.5}, "trainable.share=0.5 with trainable.choice=all"),
    "scouting for all": ({"trainable.scout_steps": 2}, "trainable.scout_steps=2 with trainable.choice=all"),
    "scouting for a seed": (
        {"trainable.choice": "random", "trainable.scout_steps": 2},
        "trainable.scout_steps=2 with trainable.choice=random: nothing is measured; expected 0",
    ),
    "no scouting": ({"trainable.choice": "salient"}, "trainable.scout_steps=0 with trainable.choice=salient"),
    "scouting without end": (
        {"trainable.choice": "salient", "trainable.scout_steps": 80},
        "trainable.scout_steps=80: expected fewer than train.max_steps=80",
    ),
    "a choice without adapters": (
        {"trainable.choice": "random", "trainable.components": ["attention"]},
        "trainable.choice=random with trainable.components=['attention']: chooses where adapters go",
    ),
    "a choice with a start": (
        {"trainable.choice": "random", "train.continue_from": "run"},
        "train.continue_from=run with trainable.choice=random",
    ),
    "matrices in half precision": (
        {
            "trainable.choice": "salient_public",
            "trainable.scout_steps": 1,
            "trainable.candidates": "matrices",
            "model.base_precision": "bfloat16",
        },
        "trainable.candidates=matrices with model.base_precision=bfloat16",
    ),
    "stage": ({"stages": ["finetune", "evalute"]}, "did you mean 'evaluate'?"),
    "batch zero": ({"train.expected_batch_size": 0}, "train.expected_batch_size=0"),
    "steps zero": ({"train.max_steps": 0}, "train.max_steps=0"),
    "no end": ({"train.max_steps": None}, "train.max_steps=null"),
    "epochs NaN": ({"train.epochs": float("nan")}, "train.epochs=nan"),
    "rate NaN": ({"train.learning_rate": float("nan")}, "train.learning_rate=nan"),
    "decay one": ({"train.ema_decay": 1.0}, "train.ema_decay=1"),
    "factor below 0": (
        {"train.embedder_learning_rate_factor": -1.0},
        "train.embedder_learning_rate_factor=-1",
    ),
    "rate factor zero": (
        {"trainable.learning_rate_factor": 0.0},
        "trainable.learning_rate_factor=0.0: expected a finite number above 0",
    ),
    "captions of public images": (
        {"public_data.caption_column": "text"},
        "public_data.caption_column=text: pre-training knows classes",
    ),
    "guidance NaN": ({"sampler.guidance": float("nan")}, "sampler.guidance=nan"),
    "microbatch zero": ({"train.microbatch": 0}, "train.microbatch=0"),
    "microbatch word": ({"train.microbatch": "many"}, "train.microbatch='many'"),
    "precision": ({"train.precision": "float16"}, "train.precision='float16'"),
    "schedule": ({"train.schedule": "cosin"}, "did you mean 'cosine'?"),
    "sampler": ({"sampler.name": "ddmi"}, "did you mean 'ddim'?"),
    "eta": ({"sampler.eta": 2.0}, "sampler.eta=2"),
    "no samples": ({"sampler.num_samples": 0}, "sampler.num_samples=0"),
    "device": ({"resources.device": "tpu"}, "resources.device='tpu'"),
    "threads": ({"resources.threads": 0}, "resources.threads=0"),
    "channels": ({"data.channels": 2}, "data.channels=2"),
    "negative part": ({"data.test_size": -1}, "data.test_size=-1"),
    "private pre-training": ({"public_data.public": False}, "public_data.public=false"),
    "levels": ({"model.unet.attention": [True]}, "model.unet.attention"),
    "experiment": ({"experiment": "../up"}, "experiment='../up'"),
    "seed": ({"seed": -1}, "seed=-1"),
    "classifier": ({"evaluation.classifiers": ["resnext", "wnr"]}, "did you mean 'wrn'?"),
    "nothing measured": (
        {"evaluation.extractors": [], "evaluation.classifiers": []},
        "evaluation.extractors=[] with evaluation.classifiers=[]",
    ),
    "few resamples": ({"evaluation.bootstrap": 5}, "evaluation.bootstrap=5"),
    "negative resamples": ({"evaluation.bootstrap": -50}, "evaluation.bootstrap=-50"),
    "release": ({"evaluation.release": "pd"}, "evaluation.release='pd'"),
    "release epsilon NaN": ({"evaluation.release_epsilon": float("nan")}, "evaluation.release_epsilon=nan"),
    "release epsilon infinite": ({"evaluation.release_epsilon": float("inf")}, "release_epsilon=inf"),
    "release delta": ({"evaluation.release_delta": 1.0}, "evaluation.release_delta=1"),
    "release on trained images": (
        {"evaluation.release": "dp", "evaluation.reference": "train"},
        "evaluation.release=dp with evaluation.reference=train",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_impossible_value_is_refused_by_field_and_value(name: str, default: Config) -> None:
    changes, expected = BAD[name]
    config = _copy(default)
    check(config)
    for field, value in changes.items():
        *groups, last = field.split(".")
        target: Any = config
        for group in groups:
            target = getattr(target, group)
        assert hasattr(target, last)
        setattr(target, last, value)
    with pytest.raises(UserError) as caught:
        check(config)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


WHOLE = [
    "trainable.scout_steps",
    "seed", "privacy.noise_multiplicity", "lora.rank", "train.max_steps", "train.expected_batch_size",
    "train.warmup_steps", "train.microbatch", "model.prompt_length", "sampler.steps", "sampler.num_samples",
    "sampler.batch_size",
    "evaluation.classifier_epochs", "evaluation.deep_classifier_epochs", "evaluation.batch_size",
    "evaluation.bootstrap", "tracking.log_every", "resources.threads", "resources.nodes", "resources.gpus",
    "resources.processes", "resources.cpus", "resources.time_limit_min",
    *(f"model.autoencoder.{name}"
      for name in ("latent_channels", "layers_per_block", "norm_num_groups", "num_codes")),
    *(f"model.unet.{name}" for name in ("layers_per_block", "cross_attention_dim", "num_heads", "head_dim",
                                        "norm_num_groups")),
    "model.scheduler.num_train_timesteps",
    *(f"model.pretrain.{name}" for name in (
        "autoencoder_steps", "unet_steps", "decoder_steps", "warmup_steps", "adversarial_start",
        "samples_every", "autoencoder_batch_size", "unet_batch_size")),
    *(f"{data}.{name}" for data in ("data", "public_data")
      for name in ("image_size", "train_size", "validation_size", "test_size")),
]  # fmt: skip
"""Every field that takes a whole number, but for those of `ANY`."""

ANY = {"data.channels", "public_data.channels", "privacy.insecure_seed"}
"""1 or 3; and what is hashed, of any size."""


@pytest.mark.parametrize("name", WHOLE)
def test_every_whole_number_has_an_end(name: str, default: Config) -> None:
    for value in (10**30, -1):
        config = _copy(default)
        *groups, last = name.split(".")
        setattr(functools.reduce(getattr, groups, config), last, value)
        with pytest.raises(UserError, match=re.escape(f"{name}={value}: expected ")):
            check(config)


def test_no_whole_number_was_left_out() -> None:
    whole = {name for name in field_names(leaves=True) if re.match(r"int\b", kind_of(name))}
    assert whole == {*WHOLE, *ANY}


def _copy(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    return type(value)(**{f.name: _copy(getattr(value, f.name)) for f in dataclasses.fields(value)})


def test_a_missing_value_and_an_unknown_field_are_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.name: no value given$"):
        from_omegaconf(OmegaConf.structured(Config))
    # `+` adds a key to what Hydra composes; it must not pass in silence.
    with pytest.raises(ConfigKeyError, match="rnk"):
        composed("+lora.rnk=3")
