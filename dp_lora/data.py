"""Image sets in memory: which images train, which choose, which test, and which of them anybody may see.

`load` divides what `dp_lora.sources` read. Every split is fixed: it depends on an image's position in its
source and on nothing else, so it is the same for every seed, machine and configuration, and no later choice
can move a test image into training.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_lora import letters
from dp_lora.config import DataConfig, PathsConfig
from dp_lora.digests import array_digests
from dp_lora.errors import UserError, did_you_mean
from dp_lora.images import ROLES, Part, Request, Source, wanted_classes
from dp_lora.sources import LOADERS


@dataclass(frozen=True, repr=False, eq=False)
class ImageSet:
    """Labelled images of one role. Neither `repr` nor a traceback shows pixels or labels.

    images: uint8 [N, C, H, W], 0 to 255. labels: int64 [N], index into `classes`. role: train,
    validation or test. public: whether losses on the images may be shown. captions: str [N], as private as
    the images, where `data.caption_column` asks for them. digests: uint8 [N, 32], of the images as they were
    decoded (`dp_lora.digests`), as private as they are; None of public images.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    role: str
    public: bool
    captions: np.ndarray | None = None
    digests: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.images.dtype == np.uint8 and self.images.ndim == 4
        assert self.labels.dtype == np.int64 and self.labels.shape == self.images.shape[:1]
        assert self.role in ROLES
        assert self.captions is None or self.captions.shape == self.labels.shape

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        public = "public" if self.public else "private"
        return (
            f"ImageSet({self.name}, {self.role}, {public}, {len(self.classes)} classes, {self.images.shape})"
        )

    def subset(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices`, in that order."""
        captions, digests = (
            None if values is None else values[indices] for values in (self.captions, self.digests)
        )
        return replace(
            self,
            images=self.images[indices],
            labels=self.labels[indices],
            captions=captions,
            digests=digests,
        )


class ImageSplits(NamedTuple):
    """The three roles of one data set; validation and test may be empty."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def load(data: DataConfig, paths: PathsConfig, field: str = "data") -> ImageSplits:
    """The three roles of the data set that `data` names, as images of `data.image_size` and `data.channels`.

    `validation_size` images are set aside from the training images first, stratified; `train_size` are
    then taken from the rest, the same number of each class.

    Args:
        data: which set, and how much of it.
        paths: `paths.data` holds what `make data` fetched or the user put there; `paths.cache` keeps prepared
            images of large sets.
        field: where `data` stands in the configuration, for error messages.

    Raises:
        UserError: for an unknown name or class, an impossible size, or files that are absent or damaged.
    """
    if data.name not in LOADERS:
        hint = did_you_mean(data.name, LOADERS)
        raise UserError(f"{field}.name={data.name!r}: expected one of {', '.join(LOADERS)}{hint}")
    folders = (Path(paths.data).expanduser(), Path(paths.cache).expanduser())
    request = Request(data, field, *folders)
    source = _held_out(LOADERS[data.name](request))
    if data.caption_column is not None and source.train.captions is None:
        raise UserError(
            f"{field}.caption_column={data.caption_column}: {data.name} was not read from a table; expected "
            "parquet files or a data set of the hub, or null"
        )
    source = _split(_keep_classes(source, request), request)
    if data.train_size is not None and data.train_size != len(source.train.labels):
        source = source._replace(train=_balanced(source, data.train_size, field))
    parts = (source.train, source.validation, source.test)
    return ImageSplits(
        *(_image_set(part, source, role, data) for role, part in zip(ROLES, parts, strict=True))
    )


TRAIN_SIZES = {
    "mnist5k": 4_000,
    "digits": 1_500,
    "mnist": 60_000,
    "fashion_mnist": 60_000,
    "cifar10": 50_000,
    "celeba": 162_770,
    "emnist_letters": 124_800,
    "imagenet": 1_281_167,
}
"""Training images of the sets as they are published; CelebA-HQ is published with several splits."""


def expected_train_size(data: DataConfig) -> int | None:
    """Number of training images by the configuration alone, without looking at files; None where it is open.

    >>> expected_train_size(DataConfig(name="mnist5k", validation_size=500))
    3500
    """
    if data.train_size is not None:
        return data.train_size
    if data.source is not None or data.classes is not None or data.test_size or data.name not in TRAIN_SIZES:
        return None
    return TRAIN_SIZES[data.name] - data.validation_size


def provenance(data: DataConfig, paths: PathsConfig) -> dict[str, Any]:
    """What, besides `data`, determines the images: for letters the fonts, [(file name, sha256)]."""
    if data.name != "letters":
        return {}
    folders: list[str | Path] = [Path(paths.data).expanduser() / "fonts", *letters.SYSTEM_FOLDERS]
    return {"fonts": letters.provenance(letters.find_fonts(folders))}


def fixed_order(positions: np.ndarray, purpose: str) -> np.ndarray:
    """The indices that put `positions` in an order that is random, fixed for ever and the same everywhere.

    A hash of (purpose, position), since a random generator's stream may change between versions.
    """
    keys = [hashlib.sha256(f"{purpose} {position}".encode()).digest() for position in positions.tolist()]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def stratified(part_labels: np.ndarray, positions: np.ndarray, size: int, purpose: str) -> np.ndarray:
    """Sorted indices of `size` images, as many of each class as its share asks (largest remainders first)."""
    counts = np.bincount(part_labels)
    share = counts * size / max(1, len(part_labels))
    taken = np.floor(share).astype(int)
    by_remainder = np.argsort(taken - share, kind="stable")
    taken[by_remainder[: size - taken.sum()]] += 1
    return _first_of_each(part_labels, positions, taken, purpose)


def _first_of_each(labels: np.ndarray, positions: np.ndarray, taken: np.ndarray, purpose: str) -> np.ndarray:
    order = fixed_order(positions, purpose)
    chosen = [order[labels[order] == label][:number] for label, number in enumerate(taken)]
    return np.sort(np.concatenate(chosen))


def _held_out(source: Source) -> Source:
    """The source with its test part: the `held_out` images of a set that is published as one."""
    if not source.held_out:
        return source
    part = source.train
    chosen = stratified(part.labels, part.positions, source.held_out, "test")
    kept = np.delete(np.arange(len(part.labels)), chosen)
    return Source(source.classes, part.take(kept), source.validation, part.take(chosen))


def _keep_classes(source: Source, request: Request) -> Source:
    """The source with only the classes asked for, numbered in the order asked for."""
    wanted = wanted_classes(source.classes, request)
    if wanted == source.classes:
        return source
    number = np.full(len(source.classes), -1, np.int64)
    number[[source.classes.index(name) for name in wanted]] = np.arange(len(wanted))

    def keep(part: Part | None) -> Part | None:
        if part is None:
            return None
        kept = part.take(np.flatnonzero(number[part.labels] >= 0))
        return kept._replace(labels=number[kept.labels])

    train = keep(source.train)
    assert train is not None
    return Source(wanted, train, keep(source.validation), keep(source.test))


def _split(source: Source, request: Request) -> Source:
    """The source with a test and a validation part: its own, or set aside from its training images."""
    data, field = request.data, request.field
    train, test = _set_aside(source.train, source.test, "test", data.test_size, request)
    train, validation = _set_aside(train, source.validation, "validation", data.validation_size, request)
    if data.train_size is not None and data.train_size < len(source.classes):
        raise UserError(
            f"{field}.train_size={data.train_size}: expected one of each of {len(source.classes)} classes"
        )
    present = np.bincount(train.labels, minlength=len(source.classes)) > 0
    for name, there in zip(source.classes, present, strict=True):
        if not there:
            raise UserError(
                f"{field}: no training image of class {name!r} is left; expected at least one of each"
            )
    return Source(source.classes, train, validation, test)


def _set_aside(train: Part, own: Part | None, role: str, size: int, request: Request) -> tuple[Part, Part]:
    """(what stays in training, the part of `role`): the source's own part where it has one."""
    count, name = len(train.labels), f"{request.field}.{role}_size={size}"
    if own is not None:
        if size not in (0, len(own.labels)):
            raise UserError(
                f"{name}: {request.data.name} comes with {len(own.labels)} {role} images of its own; "
                "expected 0"
            )
        return train, own
    if size == 0:  # large sets are mapped from the disk: nothing of them is copied without need
        return train, train.take(np.arange(0))
    if size >= count:
        raise UserError(f"{name}: expected less than the {count} training images")
    chosen = stratified(train.labels, train.positions, size, role)
    return train.take(np.delete(np.arange(count), chosen)), train.take(chosen)


def _balanced(source: Source, size: int, field: str) -> Part:
    """`size` training images whose class counts differ by at most one."""
    labels = source.train.labels
    taken = size // len(source.classes) + (np.arange(len(source.classes)) < size % len(source.classes))
    counts = np.bincount(labels, minlength=len(source.classes))
    if (counts < taken).any():
        short = int(np.argmin(counts - taken))
        raise UserError(
            f"{field}.train_size={size}: {taken[short]} of each class asked for, but class "
            f"{source.classes[short]!r} has fewer; expected a smaller number, or null for all images"
        )
    return source.train.take(_first_of_each(labels, source.train.positions, taken, "train"))


def _image_set(part: Part | None, source: Source, role: str, data: DataConfig) -> ImageSet:
    assert part is not None
    images, digests = part.images, None
    if not data.public:
        digests = array_digests(images) if part.digests is None else part.digests
    if data.channels == 3 and images.shape[1] == 1:
        images = np.repeat(images, 3, axis=1)
    return ImageSet(
        np.ascontiguousarray(images),
        part.labels,
        source.classes,
        data.name,
        role,
        data.public,
        part.captions,
        digests,
    )
