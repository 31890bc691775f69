"""Reconstruction against latent size: the measurement that the latents of `model=ldm32` were chosen by.

    python -m benchmarks.latents [--steps 300] [--json FILE]

Trains one small autoencoder for each latent size on the public letters, for the same number of steps,
and prints the mean squared error on public test letters (values in [-1, 1]) beside the size of the
latents and the time of a diffusion step on them. Public images only.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from dp_lora.config.load import config_directory, from_omegaconf
from dp_lora.config.schema import AutoencoderConfig, Config
from dp_lora.data import sets
from dp_lora.models.diffusion import per_example_loss
from dp_lora.models.folders import LatentDiffusion, build
from dp_lora.training.pretrain import AutoencoderStep, reconstruction_error

SIZES = {
    "4 x 4 x 4": AutoencoderConfig(4, [16, 32, 64, 64], 1, 16),
    "8 x 4 x 4": AutoencoderConfig(8, [16, 32, 64, 64], 1, 16),
    "2 x 8 x 8": AutoencoderConfig(2, [16, 32, 64], 1, 16),
    "4 x 8 x 8": AutoencoderConfig(4, [16, 32, 64], 1, 16),
}


def measure(config: Config, autoencoder: AutoencoderConfig, images: sets.ImageSplits) -> dict[str, Any]:
    """Error of the reconstruction, and seconds of CPU of one diffusion step on 128 rows."""
    torch.manual_seed(config.seed)
    shape = replace(config.model, autoencoder=autoencoder)
    model = build(shape, classes=images.train.classes, channels=1, image_size=32)
    step = AutoencoderStep(model, images.train, config.model.pretrain, config.seed)
    for number in range(config.model.pretrain.autoencoder_steps):
        step(number)
    model.eval()
    return {
        "reconstruction_mse": reconstruction_error(model, images.test),
        "numbers": int(torch.tensor(model.latent_shape).prod()),
        "diffusion_step_seconds": _diffusion_step(model),
    }


def _diffusion_step(model: LatentDiffusion, rows: int = 128, repeats: int = 5) -> float:
    latents = torch.randn(rows, *model.latent_shape)
    labels, timesteps = torch.zeros(rows, dtype=torch.long), torch.randint(1000, (rows, 1))
    noise = torch.randn(rows, 1, *model.latent_shape)
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        per_example_loss(model, latents, labels, timesteps, noise).mean().backward()  # type: ignore[no-untyped-call]
        seconds.append(time.process_time() - started)
    return sorted(seconds)[repeats // 2]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = from_omegaconf(compose("config"))
    config.model.pretrain.autoencoder_steps = arguments.steps
    images = sets.load(config.public_data, config.paths, "public_data")
    rows = []
    for name, autoencoder in SIZES.items():
        rows.append({"latents": name, "steps": arguments.steps, **measure(config, autoencoder, images)})
        row = rows[-1]
        print(
            f"{name}: mse {row['reconstruction_mse']:.4f} after {arguments.steps} steps, "
            f"{row['numbers']} numbers, {row['diffusion_step_seconds']:.3f} s a diffusion step of 128 rows",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
