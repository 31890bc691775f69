"""How good generated images are: distances to real ones, and the accuracy of a CNN trained on them alone.

Every number stands beside two others made the same way: `<metric>_before` on images of the model before
fine-tuning, and `<metric>_real` on as many real images. Distances lie between the images and the reference
split. The CNN is tested on real test images, or, when the reference is the validation split, on those:
then nothing here has seen the test set, and choices may be made by these numbers.

No choice is made in here: the number of epochs is fixed, and the last weights are the ones tested.

Metrics are functions of the real images and carry no noise: releasing them is not covered by epsilon
whenever the real images are private. The metadata says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dp_lora.classifier import CLASSIFIER, accuracy, train_classifier
from dp_lora.config import EvaluationConfig
from dp_lora.data import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.features import (
    EXTRACTORS,
    distances,
    extract_features,
    load_extractors,
)
from dp_lora.files import private_directory, write_atomic

PRIVATE_METRICS_NOTE = "computed on private data; releasing it is not covered by epsilon"

_REVISION = 1
"""Part of every cache key: to be raised when the code behind a cached value changes."""

Say = Callable[[str], None]


class Evaluation(NamedTuple):
    """What result.json shows."""

    metrics: dict[str, float]
    """Flat: `accuracy_cnn` in [0, 1], `fd_<extractor>`, `kid_<extractor>`, with `_before` and `_real`."""
    metadata: dict[str, Any]
    """What was compared with what, by what, and which metrics are not covered by epsilon."""


class Labelled(Protocol):
    """Generated images uint8 [N, C, H, W] in [0, 255] with the labels int64 [N] they were generated for."""

    @property
    def images(self) -> Tensor | np.ndarray:
        """The pixels."""

    @property
    def labels(self) -> Tensor | np.ndarray:
        """The classes asked for."""


class _Images(NamedTuple):
    images: Tensor
    labels: Tensor


class _Part(NamedTuple):
    """A split of the real images."""

    images: Tensor
    labels: Tensor
    role: str

    def described(self, at_most: int | None = None) -> dict[str, Any]:
        n = len(self.images)
        return {"split": self.role, "n": n if at_most is None else min(n, at_most)}

    def draw(self, n: int, seed: int) -> _Images:
        """`n` images without replacement, the same ones for the same seed; all when there are no more."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        chosen = order[:n].sort().values
        return _Images(self.images[chosen], self.labels[chosen])


class _Real(NamedTuple):
    """The real images of an evaluation, by what they are used for."""

    train: _Part
    reference: _Part
    test: _Part
    """What the CNN is tested on."""
    opposite: _Part
    """The real images whose distance to the reference is the baseline."""
    num_classes: int
    public: bool


class _Measure:
    """Measures sets of images against the same real ones, with the same networks."""

    def __init__(
        self,
        real: _Real,
        config: EvaluationConfig,
        seed: int,
        device: torch.device,
        cache: Path | None,
        say: Say,
    ) -> None:
        self.real, self.config, self.seed, self.device, self.say = real, config, seed, device, say
        self.cache = cache
        self.networks = load_extractors(config.extractors, device)
        self.reference = {name: self._reference_features(name) for name in self.networks}

    def __call__(self, what: str, given: _Images) -> dict[str, float]:
        metrics = {"accuracy_cnn": self._accuracy(what, given)}
        for name in self.networks:
            metrics |= self._distances(name, what, given.images)
        return metrics

    def real_baseline(self, n: int) -> dict[str, float]:
        """The metrics of `n` real images, or of all when they are fewer; from the cache if there."""
        train, opposite = (part.draw(n, self.seed) for part in (self.real.train, self.real.opposite))
        test = self.real.test
        key = {
            "metric": "accuracy_cnn",
            "train": _digest(train.images, train.labels),
            "test": _digest(test.images, test.labels),
            "classifier": asdict(CLASSIFIER),
            "classes": self.real.num_classes,
            "epochs": self.config.classifier_epochs,
            "seed": self.seed,
        }
        metrics = self._cached_metrics(key, lambda: {"accuracy_cnn": self._accuracy("real", train)})
        for name in self.networks:
            key = {"metric": "distances", "images": _digest(opposite.images), **self._reference_key(name)}
            compute = partial(self._distances, name, "real", opposite.images)
            metrics |= self._cached_metrics(key, compute)
        return metrics

    def _accuracy(self, what: str, given: _Images) -> float:
        self.say(f"CNN on {len(given.images)} {what} images")
        classifier = train_classifier(
            given.images,
            given.labels,
            num_classes=self.real.num_classes,
            epochs=self.config.classifier_epochs,
            seed=self.seed,
            device=self.device,
        )
        test = self.real.test
        return accuracy(classifier, test.images, test.labels, batch_size=self.config.batch_size)

    def _distances(self, name: str, what: str, images: Tensor) -> dict[str, float]:
        features = self._features(name, what, images)
        return distances(name, features.to(self.device), self.reference[name].to(self.device))

    def _features(self, name: str, what: str, images: Tensor) -> Tensor:
        self.say(f"{name} features of {len(images)} {what} images")
        network, batch_size = self.networks[name], self.config.batch_size
        return extract_features(network, images, batch_size=batch_size, device=self.device)

    def _reference_features(self, name: str) -> Tensor:
        images = self.real.reference.images
        key = {"metric": "features", **self._reference_key(name)}
        return self._cached(key, lambda: {"features": self._features(name, "reference", images)})["features"]

    def _reference_key(self, name: str) -> dict[str, Any]:
        return {
            "reference": _digest(self.real.reference.images),
            "extractor": EXTRACTORS[name].version(),
            "preprocessing": EXTRACTORS[name].preprocessing,
        }

    def _cached(self, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        environment = {"revision": _REVISION, "torch": torch.__version__, "device": self.device.type}
        return cached(self.cache, {**key, **environment}, compute)

    def _cached_metrics(
        self, key: Mapping[str, Any], compute: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        tensors = self._cached(
            key, lambda: {name: torch.tensor(value, dtype=torch.float64) for name, value in compute().items()}
        )
        return {name: float(value) for name, value in tensors.items()}


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
    """The metrics of `samples` alone: `accuracy_cnn`, `fd_<extractor>`, `kid_<extractor>`.

    Arguments and errors as in `evaluate_all`.
    """
    real = _real_parts(references, config)
    generated = _checked("sampler.num_samples", samples, real)
    measure = _Measure(real, config, seed, torch.device(device), cache, progress or _silent)
    return measure("generated", generated)


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
        before: images of the model before fine-tuning; give as many as `samples`, for the distances fall
            with n.
        seed: of the CNN (initial weights, order, dropout) and of the choice of real images. The same seed
            on the same device kind and number of threads gives the same numbers.
        cache: where reference features and the real baseline are kept for other jobs, under `evaluation/`,
            readable by the owner only; null keeps nothing.
        progress: told what is being computed, in words without any private value.

    Raises UserError: a split that is needed is empty; images of another size, dtype or range than the
    real ones; labels outside the classes; fewer images than a metric needs; an extractor that is
    unknown or not installed; a damaged file in the cache.
    """
    real = _real_parts(references, config)
    generated = _checked("sampler.num_samples", samples, real)
    earlier = None if before is None else _checked("images before fine-tuning", before, real)
    measure = _Measure(real, config, seed, torch.device(device), cache, progress or _silent)
    metrics = measure("generated", generated)
    baselines = {"real": measure.real_baseline(len(generated.images))}
    if earlier is not None:
        baselines["before"] = measure("earlier", earlier)
    for suffix, values in sorted(baselines.items()):
        metrics |= {f"{name}_{suffix}": value for name, value in values.items()}
    metadata = {
        "n_samples": len(generated.images),
        "n_before": None if earlier is None else len(earlier.images),
        **_metadata(len(generated.images), real, config),
        "private_metrics": [] if real.public else list(metrics),
        "private_metrics_note": "" if real.public else PRIVATE_METRICS_NOTE,
    }
    return Evaluation(metrics, metadata)


def _silent(message: str) -> None:
    pass


def _real_parts(references: ImageSplits, config: EvaluationConfig) -> _Real:
    reference = _split(references, config.reference, f"evaluation.reference={config.reference}")
    train = _split(references, "train", "evaluation")
    if config.reference == "validation":
        test = reference
    else:
        test = _split(references, "test", f"evaluation.reference={config.reference}: accuracy_cnn")
    opposite = test if config.reference == "train" else train
    used = {part.role for part in (train, reference, test)}
    public = all(getattr(references, role).public for role in used)
    return _Real(train, reference, test, opposite, len(references.train.classes), public)


def _split(references: ImageSplits, role: str, field: str) -> _Part:
    part: ImageSet = getattr(references, role)
    n = len(part.images)
    if n < 2:
        raise UserError(
            f"{field}: the {role} split has {n} images, expected at least 2; set data.{role}_size"
        )
    return _Part(_tensor(part.images), _tensor(part.labels), role)


def _tensor(values: Tensor | np.ndarray) -> Tensor:
    # torch warns of arrays that it may not write to, such as memory-mapped ones.
    return values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements="W"))


def _checked(field: str, samples: Labelled, real: _Real) -> _Images:
    given = _Images(_tensor(samples.images), _tensor(samples.labels))
    _check_images(field, given.images, real)
    _check_labels(field, given, real.num_classes)
    return given


def _check_images(field: str, images: Tensor, real: _Real) -> None:
    reference, role, classes = real.reference.images, real.reference.role, real.num_classes
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise UserError(
            f"{field}: {images.dtype} {list(images.shape)}, expected torch.uint8 [N, C, H, W] in [0, 255]"
        )
    if images.shape[1:] != reference.shape[1:]:
        raise UserError(
            f"{field}: images of {_size(images)}, expected {_size(reference)} as the {role} split"
        )
    if len(images) < max(2, classes):
        raise UserError(
            f"{field}={len(images)}: Frechet distance and KID need at least 2 images, "
            f"accuracy_cnn at least {classes}, one a class"
        )
    if int(images.max()) == 1 < int(reference.max()):
        raise UserError(f"{field}: values in [0, 1], expected [0, 255] as the {role} split")


def _check_labels(field: str, given: _Images, classes: int) -> None:
    images, labels = given
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{field}: labels {labels.dtype} {list(labels.shape)}, expected int64 [{len(images)}]"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        found = f"[{int(labels.min())}, {int(labels.max())}]"
        raise UserError(f"{field}: labels in {found}, expected [0, {classes - 1}], the {classes} classes")


def _size(images: Tensor) -> str:
    channels, height, width = images.shape[1:]
    return f"{channels} x {height} x {width}"


def _metadata(n: int, real: _Real, config: EvaluationConfig) -> dict[str, Any]:
    return {
        "reference": real.reference.described(),
        "real_baseline": {
            "distances": real.opposite.described(at_most=n),
            "accuracy_cnn": real.train.described(at_most=n),
        },
        "classifier": {
            **asdict(CLASSIFIER),
            "epochs": config.classifier_epochs,
            "tested_on": real.test.described(),
        },
        "extractors": {
            name: {"version": EXTRACTORS[name].version(), "preprocessing": EXTRACTORS[name].preprocessing}
            for name in config.extractors
        },
        "values": "uint8 in [0, 255]",
    }


def cached(
    cache: Path | None, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `compute` returns, computed once for each `key` and then read from `cache`/evaluation.

    The folder has mode 0700 and its files 0600, for they are functions of private images. A file appears
    whole or not at all, and is read only if it holds this key and its content has the recorded sha256.
    Two jobs that compute the same thing at once write the same thing.

    Raises UserError when a file is damaged. `cache` null computes always.
    """
    if cache is None:
        return compute()
    text = json.dumps(key, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = private_directory(cache.expanduser() / "evaluation") / f"{name}.safetensors"
    if path.exists():
        return _read(path, text)
    tensors = {name: value.contiguous() for name, value in compute().items()}
    record = {"key": text, "sha256": _digest(*(tensors[name] for name in sorted(tensors)))}
    write_atomic(path, safetensors.torch.save(tensors, metadata=record), mode=0o600)
    return tensors


def _read(path: Path, key: str) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except safetensors.SafetensorError as error:
        raise UserError(f"paths.cache: {path} is damaged ({error}); delete it") from error
    if record.get("key") != key or record.get("sha256") != _digest(*tensors.values()):
        raise UserError(f"paths.cache: {path} is damaged (its checksum differs); delete it")
    return tensors


def _digest(*tensors: Tensor) -> str:
    """sha256 of the dtypes, shapes and values of `tensors`."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
