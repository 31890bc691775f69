"""What privacy costs beyond the per-example gradients: noise, clip, accounting, checks and calibration.

    python -m benchmarks.mechanism [--json FILE]

First the parts of a step of the default job's model at a logical batch of 2,000 images: CPU time of one
thread (of the write-ahead record, which waits for the disk, time by the clock), and its share of the whole
step. Then, for the settings of the paper, the CPU time to calibrate the
noise from nothing and from the cache, and how far epsilon stays below its target.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dp_lora.config.schema import LoraConfig, TrainConfig
from dp_lora.models import adapters
from dp_lora.models.folders import LatentDiffusion, find, load
from dp_lora.models.latents import Latents
from dp_lora.privacy.accounting import EpsilonCurve, epsilon, noise_multiplier_for
from dp_lora.privacy.batches import poisson_batch
from dp_lora.privacy.executions import ORIGIN, Executions
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.mechanism import noised_mean, sum_digest
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.training import tuning
from dp_lora.training.finetune import FinetuneStep

EXAMPLES, BATCH, STEPS = 60_000, 2_000, 1_800
# (data, N, batch, steps, delta, epsilons); the settings of the paper.
SETTINGS = (
    ("mnist", 60_000, 2_000, 6_000, 1e-5, (1, 10)),
    ("cifar10", 50_000, 80, 12_500, 1e-5, (5, 10)),
    ("celeba32", 162_770, 8_192, 400, 1e-6, (10,)),
    ("celeba64", 162_770, 8_192, 400, 1e-6, (1, 5, 10)),
    ("celebahq256", 30_000, 2_048, 150, 1e-5, (1, 5, 10)),
)


def seconds(
    action: Callable[[], object], rounds: int = 5, clock: Callable[[], float] = time.process_time
) -> float:
    """Median time of `action`, CPU time unless another `clock` is given, after one call to warm up."""
    action()
    taken = []
    for _ in range(rounds):
        start = clock()
        action()
        taken.append(clock() - start)
    return statistics.median(taken)


def parts_of_a_step(microbatch: int = tuning.ROWS_ON_CPU) -> dict[str, float]:
    """Seconds of each part of a step at the logical batch `BATCH`, by name; `step` is all of it."""
    model = load(find("ldm32"))
    adapters.attach(model, ["lora", "embedder"], LoraConfig(), seed=0)
    key, plan = Randomness.from_system(), make_plan(
        num_examples=EXAMPLES, expected_batch_size=BATCH, steps=STEPS, noise_multiplier=1.0,
        target_epsilon=None, delta=1e-5, noise_multiplicity=1, max_grad_norm=1e-3,
    )  # fmt: skip
    engine = ClippedGradientSum(model, plan.clip)
    losses = tuning.synthetic_losses(model, microbatch, 1, seed=0)
    microbatches = -(-BATCH // microbatch)
    clipping: list[float] = []
    clip = engine._clip_and_add

    def timed_clip(*arguments: Any) -> None:
        start = time.process_time()
        clip(*arguments)
        clipping.append(time.process_time() - start)

    engine._clip_and_add = timed_clip  # type: ignore[method-assign]
    one = seconds(lambda: engine.add(losses(slice(None))))
    engine.detach()
    shape = (BATCH, *model.latent_shape)
    curve = EpsilonCurve(plan.mechanism, plan.delta)
    curve(1)
    with tempfile.TemporaryDirectory() as folder:
        record = step_record(model, plan, Path(folder))
    found = {
        "forward and backward": microbatches * (one - statistics.median(clipping)),
        "clip and sum": microbatches * statistics.median(clipping),
        "Poisson batch": seconds(lambda: poisson_batch(key, 3, EXAMPLES, plan.sample_rate)),
        "diffusion noise": seconds(lambda: key.normal("diffusion", 3, shape)),
        "secure noise": seconds(lambda: noised_mean(engine.total(), plan, key, 3)),
        **record,
        "account": seconds(lambda: curve(2)),
    }
    return {**found, "step": sum(found.values())}


def step_record(model: LatentDiffusion, plan: PrivacyPlan, folder: Path) -> dict[str, float]:
    """Seconds of what binds a step's noise to its sum and keeps it from being used twice.

    CPU time; of the record, which waits for the disk, by the clock.
    """
    latents = torch.zeros(1, *model.latent_shape)
    record = Executions(folder / "executions.jsonl", {})
    key = Randomness.from_system()
    step = FinetuneStep.on(
        model, Latents(latents, latents), torch.zeros(1), plan, key, TrainConfig(), 8, record
    )
    total = torch.zeros(step.sgd.gradients.num_parameters, dtype=torch.float64)
    numbers = itertools.count()

    def write() -> None:
        execution = record.begin(next(numbers), ORIGIN)
        record.keep_sum(execution, "0" * 64)

    found = {
        "digest of the state": seconds(step.sgd.state_digest),
        # For the record; the noise has its own, which is in its time.
        "digest of the sum": seconds(lambda: sum_digest(total, plan)),
        "write-ahead record": seconds(write, rounds=50, clock=time.perf_counter),
    }
    step.sgd.gradients.detach()
    return found


def calibrations() -> list[dict[str, Any]]:
    """One row for each setting and epsilon: seconds cold and cached, sigma, epsilon over its target."""
    rows = []
    for name, examples, batch, steps, delta, targets in SETTINGS:
        for target in targets:
            with tempfile.TemporaryDirectory() as folder:
                question = (float(target), delta, batch / examples, steps, Path(folder))
                start = time.process_time()
                sigma = noise_multiplier_for(*question)
                cold = time.process_time() - start
                start = time.process_time()
                noise_multiplier_for(*question)
                cached = time.process_time() - start
            spent = epsilon([Mechanism(sigma, batch / examples, steps)], delta).epsilon
            rows.append(
                {
                    "data": name,
                    "epsilon": target,
                    "noise_multiplier": sigma,
                    "of_target": spent / target,
                    "seconds_cold": cold,
                    "seconds_cached": cached,
                }
            )
    return rows


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mechanism", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = parts_of_a_step()
    for name, value in parts.items():
        print(f"{name:22} {value:9.4f} s {value / parts['step']:8.2%}")
    rows = calibrations()
    for row in rows:
        print(
            f"{row['data']:12} epsilon {row['epsilon']:<3} sigma {row['noise_multiplier']:8.4f} "
            f"{row['of_target']:8.3%} of the target, {row['seconds_cold']:5.2f} s, "
            f"cached {1e3 * row['seconds_cached']:5.2f} ms",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"parts": parts, "calibrations": rows}, indent=1))


if __name__ == "__main__":
    main()
