"""How good generated images are: distances to real ones, and what classifiers learn from them alone.

Every number stands beside two others made the same way: `<metric>_before` on images of the model before
fine-tuning, and `<metric>_real` on as many real images. Distances lie between the images and the reference
split. Classifiers are tested on real test images, or, when the reference is the validation split, on those:
then nothing here has seen the test set, and choices may be made by these numbers.

No choice is made in here: the number of epochs is fixed, and the last weights are the ones tested.

Metrics are functions of the real images and carry no noise: releasing them is not covered by epsilon
whenever the real images are private. The metadata says of each metric whether it is so. The Inception score
alone never sees a real image. `dp_lora.jobs.release` computes what a budget of its own covers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dp_lora.config.schema import DEEP_CLASSIFIERS, EvaluationConfig
from dp_lora.data.sets import ImageSplits
from dp_lora.evaluation.classifier import RECIPES, correct, train_classifier
from dp_lora.evaluation.features import check_extractors, extract_features, load_extractors
from dp_lora.evaluation.images import (
    Images,
    Labelled,
    Real,
    RealPart,
    check_number,
    checked_samples,
    real_images,
)
from dp_lora.evaluation.metrics import LEVEL, Interval, Measured, Options, Reference, interval, measure
from dp_lora.evaluation.pairs import DENSITY_NEIGHBOURS, MANIFOLD_NEIGHBOURS
from dp_lora.records import manifest
from dp_lora.storage.tensors import cached, digest

PRIVATE_METRICS_NOTE = manifest.UNCOVERED_NOTE

_REVISION = 3
"""Part of every cache key: to be raised when the code behind a cached value changes."""

Say = Callable[[str], None]


class Evaluation(NamedTuple):
    """The metrics and the metadata that result.json shows."""

    metrics: dict[str, float]
    """Flat: `accuracy_<classifier>` in [0, 1] and those of `metrics`, with `_before` and `_real`."""
    metadata: dict[str, Any]
    """The images that were compared, by which networks, the intervals, and the metrics outside of epsilon."""


class Instruments:
    """The networks of an evaluation: features of images, and what classifiers trained on them get right."""

    def __init__(self, config: EvaluationConfig, seed: int, device: torch.device, say: Say) -> None:
        self.config, self.seed, self.device, self.say = config, seed, device, say
        self.extractors = load_extractors(config, device)

    def features(self, name: str, what: str, images: Tensor) -> Tensor:
        """Features float32 [N, F], on the CPU, of images uint8 [N, C, H, W]."""
        self.say(f"{name} features of {what}")
        network = self.extractors[name].network
        return extract_features(network, images, batch_size=self.config.batch_size, device=self.device)

    def classifier(self, name: str, what: str, given: Images, num_classes: int) -> nn.Module:
        """The classifier `name` trained on `given`."""
        self.say(f"{name} trained on {what}")
        return train_classifier(
            given.images,
            given.labels,
            num_classes=num_classes,
            epochs=self.epochs(name),
            seed=self.seed,
            device=self.device,
            name=name,
        )

    def correct(self, classifier: nn.Module, test: RealPart) -> Tensor:
        """bool [N]: which images of `test` it gets right."""
        return correct(classifier, test.images, test.labels, batch_size=self.config.batch_size)

    def epochs(self, name: str) -> int:
        """Passes over its images."""
        return (
            self.config.deep_classifier_epochs if name in DEEP_CLASSIFIERS else self.config.classifier_epochs
        )


class _Measure:
    """Measures sets of images against the same real ones, with the same networks."""

    def __init__(self, real: Real, instruments: Instruments, cache: Path | None) -> None:
        self.real, self.instruments, self.cache = real, instruments, cache
        self.config, self.seed, self.device = instruments.config, instruments.seed, instruments.device
        self.options = Options(self.config.bootstrap, self.config.fid_infinity, self.seed)
        self.reference = {name: self._reference(name) for name in instruments.extractors}

    def __call__(self, what: str, given: Images) -> Measured:
        described = f"{len(given.images)} {what} images"
        parts = [self._accuracy(name, described, given) for name in self.config.classifiers]
        parts += [self._distances(name, described, given.images) for name in self.instruments.extractors]
        return _with_mean_accuracy(_joined(parts))

    def real_baseline(self, n: int) -> Measured:
        """The metrics of `n` real images, or of all when they are fewer; from the cache if there."""
        train, opposite = (part.draw(n, self.seed) for part in (self.real.train, self.real.opposite))
        parts = [self._cached_accuracy(name, train) for name in self.config.classifiers]
        for name in self.instruments.extractors:
            key = {"metric": "distances", "images": digest(opposite.images), **self._reference_key(name)}
            described = f"{len(opposite.images)} real images"
            compute = partial(self._distances, name, described, opposite.images)
            parts.append(self._cached_measured({**key, "options": asdict(self.options)}, compute))
        return _with_mean_accuracy(_joined(parts))

    def _accuracy(self, name: str, what: str, given: Images) -> Measured:
        classifier = self.instruments.classifier(name, what, given, self.real.num_classes)
        right = self.instruments.correct(classifier, self.real.test).double()
        metric, value = f"accuracy_{name}", float(right.mean())
        return Measured({metric: value}, self._accuracy_interval(metric, value, right))

    def _accuracy_interval(self, metric: str, value: float, right: Tensor) -> dict[str, Interval]:
        """Over resamples of the test images: those of n draws have binomially many right ones."""
        if not self.options.bootstrap:
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        counts = torch.full((self.options.bootstrap,), float(len(right)), dtype=torch.float64)
        drawn = torch.binomial(counts, torch.full_like(counts, value), generator=generator)
        return {metric: interval(value, drawn / len(right))}

    def _cached_accuracy(self, name: str, train: Images) -> Measured:
        test = self.real.test
        key = {
            "metric": f"accuracy_{name}",
            "train": digest(train.images, train.labels),
            "test": digest(test.images, test.labels),
            "classifier": asdict(RECIPES[name]),
            "classes": self.real.num_classes,
            "epochs": self.instruments.epochs(name),
            "seed": self.seed,
            "bootstrap": self.options.bootstrap,
        }
        described = f"{len(train.images)} real images"
        return self._cached_measured(key, lambda: self._accuracy(name, described, train))

    def _distances(self, name: str, what: str, images: Tensor) -> Measured:
        features = self.instruments.features(name, what, images).to(self.device)
        logits = self.instruments.extractors[name].logits(features)
        return measure(name, features, self.reference[name], self.options, logits)

    def _reference(self, name: str) -> Reference:
        images = self.real.reference.images
        described = f"{len(images)} reference images"
        key = {"metric": "reference", **self._reference_key(name)}

        def compute() -> dict[str, Tensor]:
            features = self.instruments.features(name, described, images)
            return Reference.of(features.to(self.device)).tensors()

        return Reference.from_tensors(self._cached(key, compute), self.device)

    def _reference_key(self, name: str) -> dict[str, Any]:
        extractor = self.instruments.extractors[name].described()
        return {"reference": digest(self.real.reference.images), "name": name, "extractor": extractor}

    def _cached(self, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        environment = {"revision": _REVISION, "torch": torch.__version__, "device": self.device.type}
        return cached(self.cache, {**key, **environment}, compute)

    def _cached_measured(self, key: Mapping[str, Any], compute: Callable[[], Measured]) -> Measured:
        """As `_cached`: each metric as its value, with the bounds of its interval where it has one."""

        def rows() -> dict[str, Tensor]:
            metrics, intervals = compute()
            return {
                name: torch.tensor([value, *intervals.get(name, ())], dtype=torch.float64)
                for name, value in metrics.items()
            }

        found = {name: row.tolist() for name, row in self._cached(key, rows).items()}
        metrics = {name: row[0] for name, row in found.items()}
        return Measured(metrics, {name: Interval(*row[1:]) for name, row in found.items() if len(row) == 3})


def check(
    config: EvaluationConfig,
    references: ImageSplits,
    num_samples: int,
    field: str = "sampler.num_samples",
) -> None:
    """Raises UserError for what `evaluate_all` would refuse later, of `num_samples` images, in no time.

    `field` names where that number comes from.

    An extractor that is unknown, not installed, or without its weights; a split that is too small; too few
    samples for a metric.
    """
    check_extractors(config)
    real_images(references, config)
    check_number(field, num_samples, len(references.train.classes), config)


def evaluate(
    samples: Labelled,
    references: ImageSplits,
    config: EvaluationConfig,
    *,
    seed: int,
    device: torch.device | str,
    cache: Path | None = None,
    progress: Say | None = None,
) -> dict[str, float]:
    """The metrics of `samples` alone, without baselines. Arguments and errors as in `evaluate_all`."""
    real = real_images(references, config)
    generated = checked_samples("sampler.num_samples", samples, real, config)
    instruments = Instruments(config, seed, torch.device(device), progress or _silent)
    return _Measure(real, instruments, cache)("generated", generated).metrics


def evaluate_all(
    samples: Labelled,
    references: ImageSplits,
    config: EvaluationConfig,
    *,
    before: Labelled | None = None,
    seed: int,
    device: torch.device | str,
    cache: Path | None = None,
    progress: Say | None = None,
) -> Evaluation:
    """The metrics of `samples` with their baselines, and what has to be said beside them.

    Args:
        samples: generated images uint8 [N, C, H, W] in [0, 255] with the labels int64 [N] they were
            generated for.
        references: the real images: train, validation and test split.
        config: what is measured, against which split.
        before: images of the model before fine-tuning; give as many as `samples`, for the distances fall
            with n.
        seed: of the classifiers (initial weights, order, dropout), of the choice of real images, and of
            resamples. The same seed on the same device kind and number of threads gives the same numbers.
        device: of the networks and of the products of features.
        cache: where everything about the reference and the real baseline are kept for other jobs, under
            `evaluation/`, readable by the owner only; null keeps nothing.
        progress: told what is being computed, in words without any private value.

    Raises UserError: a split that is needed is too small; images of another size, dtype or range than the
    real ones; labels outside the classes; fewer images than a metric needs; an extractor that is
    unknown or not installed, or without its weights; a damaged file in the cache.
    """
    real = real_images(references, config)
    generated = checked_samples("sampler.num_samples", samples, real, config)
    earlier = None if before is None else checked_samples("images before fine-tuning", before, real, config)
    instruments = Instruments(config, seed, torch.device(device), progress or _silent)
    run = _Measure(real, instruments, cache)
    sets = {"": run("generated", generated)}
    if earlier is not None:
        sets["_before"] = run("earlier", earlier)
    sets["_real"] = run.real_baseline(len(generated.images))
    metrics = {f"{name}{end}": value for end, found in sets.items() for name, value in found.metrics.items()}
    intervals = {f"{name}{end}": x for end, found in sets.items() for name, x in found.intervals.items()}
    private = [] if real.public else [name for name in metrics if name not in manifest.GENERATED_METRICS]
    metadata = {
        "n_samples": len(generated.images),
        "n_before": None if earlier is None else len(earlier.images),
        **_compared(len(generated.images), real),
        **described(instruments),
        "intervals": intervals,
        "intervals_note": _intervals_note(config),
        "private_metrics": private,
        "private_metrics_note": PRIVATE_METRICS_NOTE if private else "",
    }
    return Evaluation(metrics, metadata)


def _silent(message: str) -> None:
    pass


def _joined(parts: list[Measured]) -> Measured:
    metrics = {name: value for part in parts for name, value in part.metrics.items()}
    return Measured(metrics, {name: x for part in parts for name, x in part.intervals.items()})


def _with_mean_accuracy(found: Measured) -> Measured:
    """With `accuracy_mean` too, of the three networks of DPImageBench, where all were trained."""
    names = [f"accuracy_{name}" for name in DEEP_CLASSIFIERS]
    if not set(names) <= found.metrics.keys():
        return found
    mean = sum(found.metrics[name] for name in names) / len(names)
    return Measured({**found.metrics, "accuracy_mean": mean}, found.intervals)


def _compared(n: int, real: Real) -> dict[str, Any]:
    return {
        "reference": real.reference.described(),
        "tested_on": real.test.described(),
        "real_baseline": {
            "distances": real.opposite.described(at_most=n),
            "accuracy": real.train.described(at_most=n),
        },
    }


def described(instruments: Instruments) -> dict[str, Any]:
    """The description of the networks and of the metrics' definitions in result.json."""
    config = instruments.config
    return {
        "classifiers": {
            name: {**asdict(RECIPES[name]), "epochs": instruments.epochs(name)} for name in config.classifiers
        },
        "extractors": {name: loaded.described() for name, loaded in instruments.extractors.items()},
        "neighbours": {
            "precision, recall": MANIFOLD_NEIGHBOURS,
            "density, coverage": DENSITY_NEIGHBOURS,
        },
        "values": "uint8 in [0, 255]",
    }


def _intervals_note(config: EvaluationConfig) -> str:
    if not config.bootstrap:
        return ""
    return (
        f"{LEVEL:.0%} over {config.bootstrap} resamples of the generated images (recall and coverage: of the "
        "reference; accuracies: of the test images); neither the bias of few images nor another training"
    )
