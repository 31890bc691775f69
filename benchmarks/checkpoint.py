"""What a checkpoint costs: its size, its time, and its share of the training at the default interval.

    python -m benchmarks.checkpoint [overrides]

Size is over that of the trained parameters and AdamW's two moments. The share is the time of one checkpoint
over `train.checkpoint_minutes`, which is an upper bound: fewer are written when a step takes longer.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

import dp_lora.__main__  # noqa: F401  (registers the schema)
from dp_lora.config.load import config_directory, from_omegaconf
from dp_lora.jobs import job
from dp_lora.models import adapters
from dp_lora.models.folders import load
from dp_lora.models.latents import Latents
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.randomness import Randomness
from dp_lora.training.finetune import FinetuneStep
from dp_lora.training.loop import Checkpoint


def main() -> None:
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = from_omegaconf(compose("config", sys.argv[1:]))
    model = load(job.pretrained_model(config))
    adapters.attach(model, config.trainable.components, config.lora, seed=0)
    latents, labels = torch.zeros(10, *model.latent_shape), torch.zeros(10, dtype=torch.int64)
    plan = job.plan_of(config, 10 * config.train.expected_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        step = FinetuneStep.on(
            model, Latents(latents, latents), labels, plan, Randomness.from_seed(0), config.train, 8,
            Executions(Path(folder) / "executions.jsonl", {}),
        )  # fmt: skip
        size = sum(p.numel() for p in step.sgd.parameters)
        step.sgd.gradients.write_gradients(torch.ones(size))
        with step.sgd.descending():
            step.sgd.optimizer.step()
        checkpoint = Checkpoint(Path(folder) / "checkpoint", config.train.checkpoint_minutes)
        seconds = []
        for number in range(20):
            started = time.perf_counter()
            checkpoint.save(number, step.state_dict())
            seconds.append(time.perf_counter() - started)
        ratio = checkpoint.path.stat().st_size / (3 * 4 * size)
    took = statistics.median(seconds)
    print(
        f"{size:,} trained parameters; checkpoint {ratio:.2f} x parameters and moments, {took * 1e3:.1f} ms,"
    )
    print(f"{took / (60 * config.train.checkpoint_minutes):.3%} of {config.train.checkpoint_minutes} minutes")


if __name__ == "__main__":
    main()
