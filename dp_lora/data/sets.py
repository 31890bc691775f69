"""Image sets in memory: which images train, which choose, which test, and which of them anybody may see.

`load` divides what `dp_lora.data.sources` read. Every split is fixed: it is the same for every seed and
machine, and no later choice can move a test image into training.

    sets of persons    by the person whose the image is, all of whose images have one role
                       (`dp_lora.data.persons`)
    published sets     by an image's position in the set as it was published, which nobody changes
    a user's own       by the image itself: a hash of its decoded pixels with a public salt, against a fixed
                       fraction. Not its label, caption, name or place, nor the other images: whoever adds,
                       removes or renames an image moves no other one, and copies of an image share a role

So neighbouring sets, which differ in one image, differ in one image of one role. Where an image is zeroed
out, its slot in its role stays and contributes nothing: the numbers of images are those of before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data import letters, persons, pictures
from dp_lora.data.digests import array_digests
from dp_lora.data.images import ROLES, Part, Prepare, Request, Source, say, wanted_classes
from dp_lora.data.published import COUNTS
from dp_lora.data.sources import LOADERS, check_fields
from dp_lora.errors import PrivateRefusal, UserError, did_you_mean


@dataclass(frozen=True, repr=False, eq=False)
class ImageSet:
    """Labelled images of one role. Neither `repr` nor a traceback shows pixels or labels.

    images: uint8 [N, C, H, W], 0 to 255. labels: int64 [N], index into `classes`. role: train,
    validation or test. public: whether losses on the images may be shown. captions: str [N], as private as
    the images, where `data.caption_column` asks for them. digests: uint8 [N, 32], of the images as they were
    decoded (`dp_lora.data.digests`), as private as they are; None of public ones not read from files.
    persons: str [N], whose each image is, as private as the images; None where nobody asked.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    role: str
    public: bool
    captions: np.ndarray | None = None
    digests: np.ndarray | None = None
    persons: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.images.dtype == np.uint8 and self.images.ndim == 4
        assert self.labels.dtype == np.int64 and self.labels.shape == self.images.shape[:1]
        assert self.role in ROLES
        for values in (self.captions, self.persons):
            assert values is None or values.shape == self.labels.shape

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        public = "public" if self.public else "private"
        return (
            f"ImageSet({self.name}, {self.role}, {public}, {len(self.classes)} classes, {self.images.shape})"
        )

    def examples(self, unit: str) -> int:
        """The number of examples for one of `schema.UNITS`: of persons, or of images."""
        if unit == "image":
            return len(self)
        assert self.persons is not None, "the configuration and the loader were checked"
        return len(set(self.persons))

    def subset(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices`, in that order."""
        values = (self.captions, self.digests, self.persons)
        captions, digests, owners = (None if one is None else one[indices] for one in values)
        images, labels = self.images[indices], self.labels[indices]
        return replace(self, images=images, labels=labels, captions=captions, digests=digests, persons=owners)


class ImageSplits(NamedTuple):
    """The three roles of one data set; validation and test may be empty."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def load(
    data: DataConfig,
    paths: PathsConfig,
    field: str = "data",
    *,
    tell: Callable[[str], None] = say,
    prepare: Prepare | None = None,
    refuse: Callable[[PrivateRefusal], None] | None = None,
) -> ImageSplits:
    """The three roles of the data set that `data` names, as images of `data.image_size` and `data.channels`.

    Of a published set `validation_size` images are set aside from the training images first, stratified;
    `train_size` are then taken from the rest, the same number of each class. In a user's own set each image
    is drawn by itself with the fractions asked for, and the sizes that came of it are told on stderr.

    Args:
        data: which set, and how much of it.
        paths: `paths.data` holds what `make data` fetched or the user put there; `paths.cache` keeps prepared
            images of large sets.
        field: where `data` stands in the configuration, for error messages.
        tell: what tells the owner a line; on stderr unless it is given.
        prepare: what reads the files of a set in place of `images.prepare_roles`.
        refuse: what takes the rows and files that do not match, in place of an end with all of them.

    Raises:
        UserError: for an unknown name or class, an impossible size, or files that are absent or damaged.
    """
    if data.name not in LOADERS:
        hint = did_you_mean(data.name, LOADERS)
        raise UserError(f"{field}.name={data.name!r}: expected one of {', '.join(LOADERS)}{hint}")
    check_fields(data, field)
    folders = (Path(paths.data).expanduser(), Path(paths.cache).expanduser())
    request = Request(data, field, *folders, tell, prepare, refuse)
    source = _held_out(LOADERS[data.name](request))
    if data.caption_column is not None and source.train.captions is None:
        raise UserError(
            f"{field}.caption_column={data.caption_column}: {data.name} was not read from a table or from "
            "images; expected parquet files, a data set of the hub, images with metadata.csv or with texts "
            "beside them, or null"
        )
    persons.refuse_unread([source.train], data, field)
    source = _split(_keep_classes(source, request), request)
    if source.own and not data.public:
        _tell_copies(source, request)
    size = _number(data.train_size, len(source.train.labels))
    if not source.own and size is not None and size != len(source.train.labels):
        source = source._replace(train=_balanced(source, size, field))
    parts = (source.train, source.validation, source.test)
    return ImageSplits(
        *(_image_set(part, source, role, data) for role, part in zip(ROLES, parts, strict=True))
    )


FLAT, NARROW = 16, 64
"""Of 256 levels, those that 12 bits fill where 16 were expected, and those that 14 bits fill."""
NEARLY_ALL = 0.95
TAIL = 0.01
"""Share of an image's pixels, at either end, that does not count: dead pixels, a marker in a corner."""


def refuse_flat(images: ImageSet, field: str = "data") -> None:
    """Raises PrivateRefusal for a set in which nearly all images are constant or fill a sliver of the scale.

    Such a set was read with a wrong range: it would be trained on, and spend epsilon, for nothing. What an
    image fills is counted from its 1st to its 99th percentile. Looks at no more than 4,096 images, evenly
    spaced, and tells the owner on stderr of some flat ones, and of nearly all filling under a quarter.
    """
    refuse_flat_ones([filled(images.images[index]) for index in looked_at(len(images))], field)


def looked_at(count: int) -> np.ndarray:
    """The indices of those of `count` images that `refuse_flat` looks at."""
    return np.unique(np.linspace(0, count - 1, 4096).astype(np.int64))


def refuse_flat_ones(
    found: Sequence[tuple[int, int]], field: str = "data", tell: Callable[[str], None] = say
) -> None:
    """`refuse_flat` for images of which `filled` is known."""
    low, high = np.array(found).T
    spread = high - low
    flat = float((spread < FLAT).mean())
    asked = f"{field}.value_range=[black,white] of the files"
    if flat >= NEARLY_ALL:
        constant = float((spread <= 1).mean())
        raise PrivateRefusal(
            f"{field}: {constant:.0%} of the images are constant, and {flat:.0%} fill less than a sixteenth "
            f"of the scale (99% of the pixels of each are at most {high.max()} of 255): they seem to be read "
            f"with a wrong range, and training would spend epsilon on nothing; expected {asked}, such as "
            "[0,4095] for 12 bits in 16 of grey; files of 16 bits a colour have to be written again, as 8 "
            "bits a colour or over all 16"
        )
    narrow = float((spread < NARROW).mean())
    if narrow >= NEARLY_ALL:
        tell(
            f"{field}: {narrow:.0%} of the images fill less than a quarter of the scale (99% of the pixels "
            f"of each are at most {high.max()} of 255); if the files hold 13 or 14 bits in 16, give {asked}"
        )
    elif flat > 1 - NEARLY_ALL:
        tell(f"{field}: {flat:.0%} of the images are nearly constant; is {field}.value_range right for all?")


def filled(image: np.ndarray) -> tuple[int, int]:
    """The darkest and the brightest value of uint8 `image`, but for `TAIL` of its pixels at either end."""
    counts = np.bincount(image.reshape(-1), minlength=256)
    left_out = int(TAIL * image.size)
    low = int(np.argmax(np.cumsum(counts) > left_out))
    return low, 255 - int(np.argmax(np.cumsum(counts[::-1]) > left_out))


def expected_train_size(data: DataConfig) -> int | None:
    """Number of training images by the configuration alone, without looking at files; None where it is open.

    >>> expected_train_size(DataConfig(name="mnist5k", validation_size=500))
    3500
    """
    if isinstance(data.train_size, float) or isinstance(data.validation_size, float):
        return None
    if data.train_size is not None:
        return data.train_size
    size = COUNTS.get(data.name, {}).get("train")
    if data.source is not None or data.classes is not None or data.test_size or size is None:
        return None
    return size - data.validation_size


def provenance(data: DataConfig, paths: PathsConfig) -> dict[str, Any]:
    """The inputs besides `data` that determine the images: (file name, sha256) of fonts and pictures."""
    inputs: dict[str, Any] = {}
    place = Path(paths.data).expanduser()
    if data.name in ("letters", "letters_by_writer", "letters_pictures"):
        folders: list[str | Path] = [place / "fonts", *letters.SYSTEM_FOLDERS]
        inputs["fonts"] = letters.provenance(letters.find_fonts(folders))
    if data.name in ("pictures", "letters_pictures"):
        inputs["pictures"] = pictures.provenance(place / "pictures")
    return inputs


def fixed_order(positions: np.ndarray, purpose: str) -> np.ndarray:
    """The indices that put `positions` in an order that is random, fixed for ever and the same everywhere.

    A hash of (purpose, position), since a random generator's stream may change between versions.
    """
    keys = [hashlib.sha256(f"{purpose} {position}".encode()).digest() for position in positions.tolist()]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


ROLE_SALT = b"dp_lora roles 1"
"""Public and fixed for ever: whoever has an image can tell its role."""


def shares(digests: np.ndarray, purpose: str) -> np.ndarray:
    """For each image a number float64 [N] in [0, 1), uniform over images, by its pixels and `purpose` alone.

    The first 53 bits of SHA-256 of (`ROLE_SALT`, purpose, digest).

    Args:
        digests: uint8 [N, 32], `digests.pixel_digest` of each image.
        purpose: what is drawn; draws for different purposes are independent.
    """
    salt = ROLE_SALT + b" " + purpose.encode() + b" "
    words = [hashlib.sha256(salt + digest.tobytes()).digest()[:8] for digest in digests]
    return np.array([(int.from_bytes(word, "big") >> 11) / 2.0**53 for word in words], np.float64)


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
    return Source(wanted, train, keep(source.validation), keep(source.test), own=source.own)


def _split(source: Source, request: Request) -> Source:
    """The source with a test and a validation part: its own, or set aside from its training images."""
    data, field = request.data, request.field
    if source.own:
        train, validation, test = _drawn(source, request)
    else:
        train, test = _set_aside(source.train, source.test, "test", data.test_size, request)
        train, validation = _set_aside(train, source.validation, "validation", data.validation_size, request)
    if isinstance(data.train_size, int) and data.train_size < len(source.classes):
        raise UserError(
            f"{field}.train_size={data.train_size}: expected one of each of {len(source.classes)} classes"
        )
    present = np.bincount(train.labels, minlength=len(source.classes)) > 0
    for name, there in zip(source.classes, present, strict=True):
        if not there:
            raise PrivateRefusal(
                f"{field}: no training image of class {name!r} is left; expected at least one of each"
            )
    return Source(source.classes, train, validation, test, own=source.own)


def _number(size: int | float | None, count: int) -> int | None:
    """The number of images that a published set is asked for, of `count`."""
    return round(size * count) if isinstance(size, float) else size


def _drawn(source: Source, request: Request) -> tuple[Part, Part, Part]:
    """Training, validation and test part of a user's own set, in which each image draws its own role.

    The test images are those with the smallest shares, the validation images those with the largest, so that
    each of the two sizes can change without the other part. `train_size` is a draw of its own.
    """
    data, found = request.data, source.train
    for role in ("train", "validation", "test"):
        _check_own_size(role, getattr(data, f"{role}_size"), source, request)
    if data.test_size + data.validation_size >= 1:
        raise UserError(
            f"{request.field}.test_size={data.test_size} with {request.field}.validation_size="
            f"{data.validation_size}: expected fractions whose sum is below 1"
        )
    if not (data.test_size or data.validation_size or data.train_size):
        # Large sets are mapped from the disk: nothing of them is copied without need.
        empty = found.take(np.arange(0))
        return found, source.validation or empty, source.test or empty
    share = _shares(found, "role")
    is_test, is_validation = share < data.test_size, share >= 1 - data.validation_size
    is_train = ~(is_test | is_validation)
    if data.train_size is not None:
        is_train &= _shares(found, "train") < data.train_size
    train, validation, test = (
        found.take(np.flatnonzero(chosen)) for chosen in (is_train, is_validation, is_test)
    )
    _tell_sizes((train, validation, test), persons.number(found), request)
    return train, source.validation or validation, source.test or test


def _shares(part: Part, purpose: str) -> np.ndarray:
    """The `shares` of the images of a set of a user's own: by their persons, else by their pixels."""
    if part.persons is not None:
        return persons.shares(part.persons, purpose)
    assert part.digests is not None
    return shares(part.digests, purpose)


def _check_own_size(role: str, size: int | float | None, source: Source, request: Request) -> None:
    """Refuses a part that the set brings itself, and a number, which would make roles depend on others."""
    name, count = f"{request.field}.{role}_size={size}", len(source.train.labels)
    own = {"validation": source.validation, "test": source.test}.get(role)
    if size and own is not None:
        raise UserError(
            f"{name}: {request.data.name} comes with {len(own.labels)} {role} images of its own; expected 0"
        )
    if size and isinstance(size, int):
        alike = f"{size / count:.2g} for {size} of {count}" if size < count else "0.2 for a fifth of them"
        raise PrivateRefusal(
            f"{name}: in a set of one's own each image draws its role by itself, since one image more would "
            f"move others else; expected a fraction between 0 and 1, such as {alike}"
        )


def _tell_sizes(parts: tuple[Part, Part, Part], count: int, request: Request) -> None:
    """Tells the owner the size of each part beside what was expected. Raises UserError for an empty one."""
    data, what = request.data, "images" if parts[0].persons is None else "persons"
    rest = 1 - data.test_size - data.validation_size
    fractions = (rest * (data.train_size or 1), data.validation_size, data.test_size)
    said = []
    for role, part, fraction in zip(ROLES, parts, fractions, strict=True):
        expected, size = fraction * count, persons.number(part)
        if fraction and not size:
            # What is left of the others trains, where nothing else is asked for.
            given = [role] if getattr(data, f"{role}_size") else ["test", "validation"]
            named = [name for name in given if getattr(data, f"{name}_size")]
            asked = " with ".join(
                f"{request.field}.{name}_size={getattr(data, f'{name}_size')}" for name in named
            )
            raise PrivateRefusal(
                f"{asked}: none of the {count} {what} fell to {role}, where {expected:.3g} were expected; "
                "expected another fraction"
            )
        if fraction:
            said.append(f"{size} {role} (expected {expected:.4g})")
    how = "each image draws its role by its own pixels"
    if what == "persons":
        how = "each person draws one role for all of their images, by their name"
    request.tell(f"{request.field}: of {count} {what} {', '.join(said)}; {how}")


def _tell_copies(source: Source, request: Request) -> None:
    """Tells the owner of test and validation images that train too, and of pictures in several classes.

    Whoever brings such a set may mean it, so it is not refused.
    """
    field = request.field
    parts = {"train": source.train, "validation": source.validation, "test": source.test}
    found = {role: part for role, part in parts.items() if part is not None}
    persons.refuse_shared(found, field)
    pictures = {role: _picture(part) for role, part in found.items()}
    persons.tell_shared_pictures(found.values(), pictures.values(), request)
    for role in [role for role in found if role != "train"]:
        copies = int(np.isin(pictures[role], pictures["train"]).sum())
        if copies:
            request.tell(
                f"{field}: {role} images that train too (the same pixels): {copies} of "
                f"{len(pictures[role])}; what is measured on these says nothing about images that were not "
                "trained on"
            )
    _, number = np.unique(np.concatenate([*pictures.values()]), return_inverse=True)
    labels = np.concatenate([part.labels for part in found.values()])
    classes = len(source.classes)
    several = int((np.bincount(np.unique(number * classes + labels) // classes) > 1).sum())
    if several:
        request.tell(f"{field}: pictures that stand in more than one class (the same pixels): {several}")


def _picture(part: Part) -> np.ndarray:
    """uint64 [N]: a number for each image, the same for the same pixels in the file."""
    assert part.digests is not None
    return np.ascontiguousarray(part.digests[:, :8]).view("<u8")[:, 0]


def _set_aside(
    train: Part, own: Part | None, role: str, asked: int | float, request: Request
) -> tuple[Part, Part]:
    """(what stays in training, the part of `role`): the source's own part where it has one."""
    count, name = len(train.labels), f"{request.field}.{role}_size={asked}"
    if own is not None:
        if asked not in (0, len(own.labels)):
            raise UserError(
                f"{name}: {request.data.name} comes with {len(own.labels)} {role} images of its own; "
                "expected 0"
            )
        return train, own
    size = _number(asked, count) or 0
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
    images, digests = part.images, part.digests
    if digests is None and not data.public:
        digests = array_digests(images)
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
        part.persons,
    )
