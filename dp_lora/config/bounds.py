"""The ranges of numbers: where a value ends beyond which no job could do what it says, and why."""

from __future__ import annotations

import math
from typing import Any

from dp_lora.config.schema import LARGEST_RATE, Config
from dp_lora.errors import UserError

LARGEST_SEED = 2**63 - 1
"""The largest seed that the generators of both torch and NumPy take."""
MOST_DRAWS = 1000
"""As many (timestep, noise) draws of an image as there are timesteps; all of them are in memory at once."""
MOST_IMAGES = 10**7
"""More images of 32 x 32 than a large machine's memory holds."""
LARGEST_MICROBATCH = 10**5
"""Images whose gradients are in memory at once."""
MOST_STEPS = 10**7
"""More than the accountants can compose, and than anybody waits for."""
LARGEST_SIDE = 8192
"""In pixels: one image of this size takes most of a GPU."""
WIDEST = 2**16
"""Channels of a layer: one square matrix of this width has 4e9 weights."""
MOST_THREADS = 4096
"""Threads of a process, and processes of a job; beyond it the libraries that torch computes with crash."""
LARGEST_GRAD_NORM = 1e6
"""C: with the largest noise multiplier (1e9) noise is 1e15, whose square an optimiser holds in float32."""
LARGEST_ALPHA = 1e6
"""The largest alpha of LoRA: gradients grow with alpha / rank, and are computed in float32."""
LARGEST_GUIDANCE = 1e4
"""Latents grow with it in each step of the sampler, and are float32."""
LARGEST_SHIFT = 1e6
"""Beyond it all timesteps are the last one, and every weight of a loss is 1."""
LARGEST_DECAY = 1.0
"""Weight decay takes the share (learning rate x weight decay) of each weight in a step: at most all of it."""

_NUMBERS: dict[str, tuple[int, int]] = {
    "seed": (0, LARGEST_SEED),
    "privacy.noise_multiplicity": (1, MOST_DRAWS),
    "lora.rank": (1, WIDEST),
    "train.max_steps": (1, MOST_STEPS),
    "trainable.scout_steps": (0, MOST_STEPS),
    "train.expected_batch_size": (1, 10**9),
    "train.warmup_steps": (0, MOST_STEPS),
    "model.prompt_length": (1, WIDEST),
    "sampler.steps": (1, 10**6),
    "sampler.num_samples": (1, MOST_IMAGES),
    "sampler.batch_size": (1, MOST_IMAGES),
    "evaluation.classifier_epochs": (1, 10**6),
    "evaluation.deep_classifier_epochs": (1, 10**6),
    "evaluation.batch_size": (1, MOST_IMAGES),
    "evaluation.bootstrap": (0, 10**6),
    "tracking.log_every": (1, MOST_STEPS),
    "resources.threads": (1, MOST_THREADS),
    "resources.nodes": (1, MOST_THREADS),
    "resources.gpus": (0, MOST_THREADS),
    "resources.processes": (1, MOST_THREADS),
    "resources.cpus": (1, MOST_THREADS),
    "resources.time_limit_min": (1, 10**7),
    "model.autoencoder.latent_channels": (1, WIDEST),
    "model.autoencoder.layers_per_block": (1, 100),
    "model.autoencoder.norm_num_groups": (1, WIDEST),
    "model.autoencoder.num_codes": (1, 10**7),
    "model.unet.layers_per_block": (1, 100),
    "model.unet.cross_attention_dim": (1, WIDEST),
    "model.unet.num_heads": (1, WIDEST),
    "model.unet.head_dim": (1, WIDEST),
    "model.unet.norm_num_groups": (1, WIDEST),
    "model.scheduler.num_train_timesteps": (1, 10**6),
    "model.pretrain.autoencoder_steps": (1, 10**9),
    "model.pretrain.unet_steps": (1, 10**9),
    "model.pretrain.decoder_steps": (0, 10**9),
    "model.pretrain.warmup_steps": (0, 10**9),
    "model.pretrain.adversarial_start": (0, 10**9),
    "model.pretrain.samples_every": (0, 10**9),
    "model.pretrain.autoencoder_batch_size": (1, MOST_IMAGES),
    "model.pretrain.unet_batch_size": (1, MOST_IMAGES),
    "data.image_size": (1, LARGEST_SIDE),
    "public_data.image_size": (1, LARGEST_SIDE),
}
"""The smallest and the largest whole number that a field takes."""

_LISTS = ("model.autoencoder.block_out_channels", "model.unet.block_out_channels")
"""Lists of widths."""

_ABOVE_0: dict[str, float] = {
    "privacy.max_grad_norm": LARGEST_GRAD_NORM,
    "lora.alpha": LARGEST_ALPHA,
    "train.epochs": MOST_STEPS,
    "train.learning_rate": LARGEST_RATE,
    "train.timestep_shift": LARGEST_SHIFT,
    "train.snr_gamma": LARGEST_SHIFT,
    "model.pretrain.autoencoder_learning_rate": LARGEST_RATE,
    "model.pretrain.unet_learning_rate": LARGEST_RATE,
    "resources.memory_gb": 1e6,
}
"""The largest number that a field takes, which has to be above 0."""

_MAY_BE_NULL = ("lora.alpha", "train.epochs", "train.timestep_shift", "train.snr_gamma")


def check_bounds(config: Config) -> None:
    """Raises UserError naming field, value and range for the first number that lies outside of its own."""
    for name, (least, most) in _NUMBERS.items():
        value = _value(config, name)
        if value is not None:
            _check_whole(name, value, least, most)
    for name in _LISTS:
        values = _value(config, name)
        if not values:
            raise UserError(f"{name}=[]: expected at least one width")
        for value in values:
            _check_whole(name, value, 1, WIDEST)
    for name, top in _ABOVE_0.items():
        value = _value(config, name)
        if value is not None and not 0 < value <= top:
            raise UserError(f"{name}={value}: expected a number above 0, at most {top:g}{_or_null(name)}")
    for section in ("data", "public_data"):
        for part in ("train_size", "validation_size", "test_size"):
            name, least = f"{section}.{part}", int(part == "train_size")
            value = _value(config, name)
            if isinstance(value, float) and not 0 < value < 1:
                raise UserError(f"{name}={value}: expected a whole number, or a fraction between 0 and 1")
            if isinstance(value, int):
                _check_whole(name, value, least, MOST_IMAGES, ", or a fraction")
    _check_microbatch(config.train.microbatch)
    _check_rates(config)


def _check_whole(name: str, value: int, least: int, most: int, rest: str = "") -> None:
    if value < least:
        raise UserError(f"{name}={value}: expected at least {least}{rest}")
    if value > most:
        raise UserError(f"{name}={value}: expected at most {most}{rest}")


def _check_microbatch(microbatch: int | str) -> None:
    if microbatch != "auto" and (isinstance(microbatch, str) or not 1 <= microbatch <= LARGEST_MICROBATCH):
        raise UserError(
            f"train.microbatch={microbatch!r}: expected 'auto' or a whole number from 1 to "
            f"{LARGEST_MICROBATCH}"
        )


def _check_rates(config: Config) -> None:
    """The learning rates, each times its factor, alone and times the weight decay."""
    train, factor = config.train, config.trainable.learning_rate_factor
    if not 0 < factor < math.inf:
        raise UserError(f"trainable.learning_rate_factor={factor}: expected a finite number above 0")
    own = train.embedder_learning_rate_factor
    for name in ("weight_decay", "checkpoint_minutes", "embedder_learning_rate_factor", "noise_offset"):
        if not 0 <= getattr(train, name) < math.inf:
            raise UserError(f"train.{name}={getattr(train, name)}: expected a finite number, at least 0")
    for field, value in (
        ("train.embedder_learning_rate_factor", own),
        ("trainable.learning_rate_factor", factor),
    ):
        if value * train.learning_rate > LARGEST_RATE:
            raise UserError(
                f"{field}={value}: with train.learning_rate={train.learning_rate} expected a product of at "
                f"most {LARGEST_RATE:g}"
            )
    largest = train.learning_rate * max(1.0, own, factor)
    if largest * train.weight_decay > LARGEST_DECAY:
        times = "" if largest == train.learning_rate else f", times the largest factor {max(own, factor):g},"
        raise UserError(
            f"train.weight_decay={train.weight_decay:g}: with train.learning_rate={train.learning_rate:g}"
            f"{times} expected a product of at most {LARGEST_DECAY:g}, the share of each weight that a step "
            "takes away"
        )


def _or_null(name: str) -> str:
    return ", or null" if name in _MAY_BE_NULL else ""


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
