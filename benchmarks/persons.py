"""What it costs that an example is a person: a step beside one with as many rows of images, and the index.

    python -m benchmarks.persons [overrides]

Both steps have every example in their batch, so that they compute as many rows. They take turns, and the time
is that of this process's CPU, so that what else runs on the machine matters little.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch

from dp_lora.config.schema import Config
from dp_lora.jobs import job
from dp_lora.models import adapters
from dp_lora.models.folders import load
from dp_lora.models.latents import Latents
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.persons import Persons
from dp_lora.privacy.plan import make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.training.finetune import FinetuneStep
from tests.builders.tiny import composed

EXAMPLES, IMAGES, ROUNDS = 64, 40, 11


def step_of(config: Config, unit: str, folder: Path) -> FinetuneStep:
    """A step on `EXAMPLES` images, or on as many persons with `IMAGES` each."""
    model = load(job.pretrained_model(config))
    adapters.attach(model, config.trainable.components, config.lora, seed=0)
    images = EXAMPLES if unit == "image" else EXAMPLES * IMAGES
    latents = torch.randn(images, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(images) % len(model.classes)
    plan = make_plan(
        num_examples=EXAMPLES,
        expected_batch_size=EXAMPLES,
        steps=2 * ROUNDS,
        noise_multiplier=1.0,
        delta=1e-5,
        max_grad_norm=config.privacy.max_grad_norm,
        noise_multiplicity=config.privacy.noise_multiplicity,
        unit=unit,
    )
    persons = None if unit == "image" else Persons(torch.arange(EXAMPLES).repeat(IMAGES))
    return FinetuneStep.on(
        model, Latents(latents, latents.abs() / 10), labels, plan, Randomness.from_seed(0), config.train, 16,
        Executions(folder / f"{unit}.jsonl", {}), persons=persons,
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    config = composed(*sys.argv[1:])
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        steps = {unit: step_of(config, unit, Path(folder)) for unit in ("image", "person")}
        for number in range(ROUNDS + 1):
            took = {}
            for unit, step in steps.items():
                started = time.process_time()
                step(number)
                took[unit] = time.process_time() - started
            if number:  # the first one also loads code
                ratios.append(took["person"] / took["image"])
    k = config.privacy.noise_multiplicity
    print(f"step over {EXAMPLES} persons, k {k}: {statistics.median(ratios):.3f} x one over as many images")
    names = np.array([f"patient {i}" for i in range(50_000)], dtype=object)
    owners = names[np.random.default_rng(0).integers(0, 50_000, 1_000_000)]
    started = time.perf_counter()
    Persons(owners)
    seconds = time.perf_counter() - started
    tracemalloc.start()
    Persons(owners)
    memory = tracemalloc.get_traced_memory()[1]
    print(f"index of 1,000,000 images of 50,000 persons: {seconds:.2f} s, {memory / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
