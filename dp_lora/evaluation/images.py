"""The images of an evaluation: which real ones serve for what, and whether generated ones fit them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import EvaluationConfig
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.evaluation.pairs import FEWEST

FEWEST_FOR_INFINITY = 10
"""Generated images between whose subsets a line can be drawn."""


class Labelled(Protocol):
    """Generated images uint8 [N, C, H, W] in [0, 255] with the labels int64 [N] they were generated for."""

    @property
    def images(self) -> Tensor | np.ndarray:
        """The pixels."""

    @property
    def labels(self) -> Tensor | np.ndarray:
        """The classes asked for."""


class Images(NamedTuple):
    """Images uint8 [N, C, H, W] with labels int64 [N], as tensors."""

    images: Tensor
    labels: Tensor


class RealPart(NamedTuple):
    """A split of the real images."""

    images: Tensor
    labels: Tensor
    role: str

    def described(self, at_most: int | None = None) -> dict[str, Any]:
        """For result.json: which split, and how many of its images."""
        n = len(self.images)
        return {"split": self.role, "n": n if at_most is None else min(n, at_most)}

    def draw(self, n: int, seed: int) -> Images:
        """`n` images without replacement, the same ones for the same seed; all when there are no more."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        chosen = order[:n].sort().values
        return Images(self.images[chosen], self.labels[chosen])


class Real(NamedTuple):
    """The real images of an evaluation, by what they are used for."""

    train: RealPart
    reference: RealPart
    test: RealPart
    """The images on which classifiers are tested."""
    opposite: RealPart
    """The real images whose distance to the reference is the baseline."""
    num_classes: int
    public: bool


def real_images(references: ImageSplits, config: EvaluationConfig) -> Real:
    """Which split serves for what. Raises UserError for one that is needed and too small."""
    field = f"evaluation.reference={config.reference}"
    fewest = FEWEST if config.extractors else 2
    reference = _split(references, config.reference, field, fewest)
    train = _split(references, "train", "evaluation", fewest)
    if config.reference == "validation":
        test = reference
    else:
        test = _split(references, "test", f"{field}: accuracy_*", fewest)
    opposite = test if config.reference == "train" else train
    used = {part.role for part in (train, reference, test)}
    public = all(getattr(references, role).public for role in used)
    return Real(train, reference, test, opposite, len(references.train.classes), public)


def _split(references: ImageSplits, role: str, field: str, fewest: int) -> RealPart:
    part: ImageSet = getattr(references, role)
    n = len(part.images)
    if n < fewest:
        raise UserError(
            f"{field}: the {role} split has {n} images, expected at least {fewest}; set data.{role}_size"
        )
    return RealPart(_tensor(part.images), _tensor(part.labels), role)


def _tensor(values: Tensor | np.ndarray) -> Tensor:
    # torch warns of arrays that it may not write to, such as memory-mapped ones.
    return values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements="W"))


def check_number(field: str, n: int, classes: int, config: EvaluationConfig) -> None:
    """Raises UserError naming `field` unless `n` generated images are enough for all metrics asked for."""
    needed = {"classifiers": classes} if config.classifiers else {}
    if config.extractors:
        needed["precision, recall, density and coverage"] = FEWEST
        if config.fid_infinity:
            needed["evaluation.fid_infinity"] = FEWEST_FOR_INFINITY
    fewest = max([2, *needed.values()])
    if n < fewest:
        reasons = ", ".join(f"{what} at least {number}" for what, number in needed.items() if n < number)
        raise UserError(f"{field}={n}: too few images, expected at least {fewest} ({reasons})")


def checked_samples(field: str, samples: Labelled, real: Real, config: EvaluationConfig) -> Images:
    """`samples` as tensors. Raises UserError naming `field` unless they fit the real images."""
    given = Images(_tensor(samples.images), _tensor(samples.labels))
    _check_images(field, given.images, real, config)
    _check_labels(field, given, real.num_classes)
    return given


def _check_images(field: str, images: Tensor, real: Real, config: EvaluationConfig) -> None:
    reference, role = real.reference.images, real.reference.role
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise UserError(
            f"{field}: {images.dtype} {list(images.shape)}, expected torch.uint8 [N, C, H, W] in [0, 255]"
        )
    if images.shape[1:] != reference.shape[1:]:
        raise UserError(
            f"{field}: images of {_size(images)}, expected {_size(reference)} as the {role} split"
        )
    check_number(field, len(images), real.num_classes, config)
    if int(images.max()) == 1 < int(reference.max()):
        raise UserError(f"{field}: values in [0, 1], expected [0, 255] as the {role} split")


def _check_labels(field: str, given: Images, classes: int) -> None:
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
