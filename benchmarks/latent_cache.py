"""A private step on cached latents, on latents in memory, and with every image encoded on the fly.

    python -m benchmarks.latent_cache [--rounds 15] [--json FILE]

Small models at the shapes of two settings: MNIST (3 x 32 x 32, latents 3 x 4 x 4) and CelebA-64 (3 x 64 x 64,
latents 3 x 32 x 32). The step is the one that jobs take, with its noise, optimiser and write-ahead record;
all three ways take the same batch in the same round. Time is the CPU time of one thread, user and system; a
ratio is the median over rounds of a way's time over that of `memory` in the same round. `latents` is the part
of it that differs, drawing a batch's latents, timed by itself in as many rounds. Images are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import AutoencoderConfig, LoraConfig, ModelConfig, TrainConfig, UNetConfig
from dp_lora.data.sets import ImageSet
from dp_lora.models import adapters, latents
from dp_lora.models.folders import LatentDiffusion, build
from dp_lora.models.latents import Latents
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.plan import make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.training.finetune import FinetuneStep

WAYS = ("memory", "cached", "on the fly")


@dataclass(frozen=True)
class Setting:
    """Number of images, mean size of a batch, rows of a microbatch, side of the images, networks."""

    count: int
    batch: int
    rows: int
    image_size: int
    autoencoder: AutoencoderConfig
    unet: UNetConfig


SETTINGS = {
    "mnist": Setting(
        20_000,
        128,
        64,
        32,
        AutoencoderConfig(latent_channels=3, block_out_channels=[16, 32, 48, 64], norm_num_groups=16),
        UNetConfig([64, 128], [True, True]),
    ),
    "celeba64": Setting(
        2_000,
        16,
        8,
        64,
        AutoencoderConfig(latent_channels=3, block_out_channels=[16, 32], norm_num_groups=16),
        UNetConfig([16, 32, 64], [False, True, True], norm_num_groups=16),
    ),
}


@dataclass(frozen=True)
class Row:
    setting: str
    k: int
    way: str
    seconds: float
    """Of one step, median."""
    ratio: float
    """To `memory`."""
    latents: float
    """Seconds of drawing one batch's latents, median."""


class OnTheFly(Latents):
    """Encodes the images of a batch when they are asked for."""

    def __init__(self, model: LatentDiffusion, images: ImageSet) -> None:
        empty = torch.empty(0)
        super().__init__(empty, empty)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "images", images)

    def sample(self, indices: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            mean, std = self.model.encode(latents.to_unit_range(self.images.images[indices.numpy()]))  # type: ignore[attr-defined]
        return mean + std * noise


def make_model(setting: Setting) -> LatentDiffusion:
    """With LoRA on its attention and a class embedding to train."""
    torch.manual_seed(0)
    shape = ModelConfig("small", autoencoder=setting.autoencoder, unet=setting.unet)
    model = build(shape, classes=list("0123456789"), channels=3, image_size=setting.image_size).eval()
    adapters.attach(model, ["lora", "embedder"], LoraConfig(), seed=0)
    return model


def make_step(
    model: LatentDiffusion, encoded: Latents, labels: Tensor, setting: Setting, k: int, folder: Path
) -> Callable[[int], object]:
    """The private step of a job."""
    folder.mkdir()
    plan = make_plan(
        num_examples=len(labels),
        expected_batch_size=setting.batch,
        steps=1000,
        noise_multiplier=1.0,
        target_epsilon=None,
        delta=1e-6,
        noise_multiplicity=k,
        max_grad_norm=1e-3,
    )
    executions = Executions(folder / "executions.jsonl", {})
    randomness, microbatch = Randomness.from_seed(1), setting.rows // k
    return FinetuneStep.on(model, encoded, labels, plan, randomness, TrainConfig(), microbatch, executions)


def measure(name: str, k: int, rounds: int, folder: Path) -> list[Row]:
    """One row a way."""
    setting = SETTINGS[name]
    generator = np.random.default_rng(0)
    shape = (setting.count, 3, setting.image_size, setting.image_size)
    labels = generator.integers(0, 10, setting.count)
    pixels = generator.integers(0, 256, shape, np.uint8)
    images = ImageSet(pixels, labels, tuple("0123456789"), name, "train", public=False)
    models = {way: make_model(setting) for way in WAYS}
    stored = latents.cached(models["cached"], images, folder / "cache")
    encoded = {
        "memory": Latents(stored.mean.clone(), stored.std.clone()),
        "cached": stored,
        "on the fly": OnTheFly(models["on the fly"], images),
    }
    steps = {
        way: make_step(
            models[way], encoded[way], torch.from_numpy(labels), setting, k, folder / f"{name}{k}{way}"
        )
        for way in WAYS
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        order = WAYS[number % 3 :] + WAYS[: number % 3]
        for way in order:
            start = time.process_time()
            steps[way](number)
            if number:  # the first warms up
                seconds[way].append(time.process_time() - start)
    draws = _draws(encoded, setting, models["memory"].latent_shape, rounds)
    return [
        Row(
            name,
            k,
            way,
            statistics.median(seconds[way]),
            statistics.median(a / b for a, b in zip(seconds[way], seconds["memory"], strict=True)),
            statistics.median(draws[way]),
        )
        for way in WAYS
    ]


def _draws(
    encoded: dict[str, Latents], setting: Setting, shape: tuple[int, ...], rounds: int
) -> dict[str, list[float]]:
    """Seconds of drawing the latents of `rounds` batches of the mean size, the same for every way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        chosen = torch.randint(setting.count, (setting.batch,)).sort().values
        noise = torch.randn(setting.batch, *shape)
        for way in WAYS:
            start = time.process_time()
            encoded[way].sample(chosen, noise)
            seconds[way].append(time.process_time() - start)
    return seconds


def main() -> None:
    """Prints the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.settings:
            for k in (1, 4):
                found = measure(name, k, arguments.rounds, Path(folder))
                for row in found:
                    print(
                        f"{row.setting:9} k{row.k}  {row.way:11} {row.seconds:7.3f} s  {row.ratio:6.3f}  "
                        f"latents {row.latents:8.5f} s",
                        flush=True,
                    )
                rows += found
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
