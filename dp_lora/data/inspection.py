"""A whole set, read as a job reads it, with everything about it that its owner may want to know.

Nothing is trained, logged or written. What is found is as private as the images, and for their owner alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data import sets
from dp_lora.data.digests import SIZE, array_digests
from dp_lora.data.images import Part, Prepared, Preprocessing, Request, Unread
from dp_lora.data.metadata import Unmatched
from dp_lora.data.persons import Unowned
from dp_lora.data.pixels import Damaged, Unfit, shown
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import PrivateRefusal, UserError
from dp_lora.records.progress import Progress

MOST_SIZES = 8
"""Sizes of images that are listed one by one."""


class Seen(NamedTuple):
    """One image that can be read."""

    name: str
    size: tuple[int, int]
    """Width and height, upright."""
    mode: str
    low: float
    high: float
    """The smallest and the largest value in the file."""
    constant: bool
    """Whether all its pixels are the same."""
    digest: bytes
    filled: tuple[int, int]
    """What of the scale it fills as it is trained on (`sets.filled`)."""


@dataclass
class Inspection:
    """What was found in a set."""

    data: DataConfig
    images: list[Seen] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    """The files that cannot be read, and rows and files that do not match, each with the reason."""
    lines: list[str] = field(default_factory=list)
    """What a job would tell the owner."""
    splits: ImageSplits | None = None
    """The roles, if a job could read them; their images are placeholders where they come from files."""
    refusal: str | None = None
    """Why the set cannot be trained on, apart from single files."""

    def verdict(self) -> None:
        """Raises PrivateRefusal where the set cannot be trained on."""
        if self.wrong:
            files = "1 file or row is" if len(self.wrong) == 1 else f"{len(self.wrong)} files or rows are"
            raise PrivateRefusal(f"data: {files} wrong, as listed; expected none")
        if self.refusal is not None:
            raise PrivateRefusal(self.refusal)

    def sections(self) -> list[tuple[str, list[str]]]:
        """The report: a word and its lines, of which the first one sums up."""
        found = [("set", [f"{self.data.name}, {shown(self.data.source or 'its own files')}"])]
        found += self._of_roles() + self._of_files()
        found += [("notes", self.lines)] if self.lines else []
        return found

    def _of_roles(self) -> list[tuple[str, list[str]]]:
        if self.splits is None:
            return [("images", [f"{len(self.images)} that can be read"])]
        parts = {part.role: part for part in self.splits if len(part)}
        sizes = ", ".join(f"{role} {len(part)}" for role, part in parts.items())
        found = [("images", [f"{sum(map(len, parts.values()))} ({sizes})"])]
        classes = self.splits.train.classes
        counts = {role: np.bincount(part.labels, minlength=len(classes)) for role, part in parts.items()}
        each = [
            f"{name}: " + ", ".join(f"{role} {of_role[number]}" for role, of_role in counts.items())
            for number, name in enumerate(classes)
        ]
        found.append(("classes", [str(len(classes)), *each]))
        whose = {role: len(set(part.persons)) for role, part in parts.items() if part.persons is not None}
        if whose:
            each_role = ", ".join(f"{role} {number}" for role, number in whose.items())
            found.append(("persons", [f"{sum(whose.values())} ({each_role})"]))
        captions = sum(len(part) for part in parts.values() if part.captions is not None)
        return found + ([("captions", [str(captions)])] if captions else [])

    def _of_files(self) -> list[tuple[str, list[str]]]:
        found: list[tuple[str, list[str]]] = []
        if self.images:
            found.append(("sizes", [_sizes(Counter(image.size for image in self.images))]))
            found.append(("modes", _modes(self.images)))
        count = f"of {len(self.images)}"
        constant = [image.name for image in self.images if image.constant]
        copies = _copies(self.images)
        found.append(("constant", [f"{len(constant)} {count}", *constant]))
        number = sum(map(len, copies)) - len(copies)
        found.append(("copies", [f"{number} {count}, by pixels", *(" = ".join(names) for names in copies)]))
        found.append(("wrong", [str(len(self.wrong)), *(f"{name}: {why}" for name, why in self.wrong)]))
        return found


def _sizes(counts: Counter[tuple[int, int]]) -> str:
    listed = [f"{width} x {height}: {n}" for (width, height), n in counts.most_common(MOST_SIZES)]
    rest = len(counts) - MOST_SIZES
    if rest > 0:
        (low, high) = [[f(size[i] for size in counts) for i in (0, 1)] for f in (min, max)]
        listed.append(f"{rest} other sizes; widths {low[0]} to {high[0]}, heights {low[1]} to {high[1]}")
    return ", ".join(listed)


def _modes(images: Sequence[Seen]) -> list[str]:
    """Of each mode how many images have it, and the values in their files."""
    found = []
    for mode, count in Counter(image.mode for image in images).most_common():
        low = min(image.low for image in images if image.mode == mode)
        high = max(image.high for image in images if image.mode == mode)
        found.append(f"{mode}: {count}, values {low:g} to {high:g}")
    return found


def _copies(images: Sequence[Seen]) -> list[list[str]]:
    """The names of images with the same pixels."""
    by_digest: dict[bytes, list[str]] = {}
    for image in images:
        by_digest.setdefault(image.digest, []).append(image.name)
    return [names for names in by_digest.values() if len(names) > 1]


def inspect(data: DataConfig, paths: PathsConfig, *, progress: str = "auto") -> Inspection:
    """Reads all of the set that `data` names, through the code by which a job reads it, and writes nothing.

    A data set of the hub is fetched into the cache of the hub's own client.

    Args:
        data: which set.
        paths: where published sets lie.
        progress: as `records.progress.Progress` takes it.

    Raises UserError for what can be said before a file is read: settings, folders that can be read in two
    ways, columns that are not there.
    """
    found = Inspection(data)
    read = False

    def prepare(
        unread: Mapping[str, Unread], preprocessing: Preprocessing, request: Request
    ) -> dict[str, Part]:
        nonlocal read
        read = True
        parts = _read(unread, preprocessing, found, progress)
        if found.wrong:
            raise _Listed
        return parts

    def refuse(error: PrivateRefusal) -> None:
        assert isinstance(error, Unmatched | Unowned)
        found.wrong += error.wrong

    try:
        splits = sets.load(data, paths, tell=found.lines.append, prepare=prepare, refuse=refuse)
    except _Listed:
        return found
    except UserError as error:
        if not read and not found.wrong:
            raise
        found.refusal = str(error)
        return found
    found.splits = splits
    if not found.images:
        found.images = [image for part in splits for image in _of_arrays(part)]
    try:
        sets.refuse_flat_ones(_filled(splits, found.images), tell=found.lines.append)
    except UserError as error:
        found.refusal = str(error)
    return found


class _Listed(Exception):
    """Every file was read, and some are wrong."""


def _read(
    unread: Mapping[str, Unread], preprocessing: Preprocessing, into: Inspection, progress: str
) -> dict[str, Part]:
    """The images of each role as placeholders of one pixel, with their labels and digests."""
    parts = {}
    total = sum(len(images.labels) for images in unread.values())
    with Progress(total, "check", mode=progress, unit="image") as shows:
        for role, images in unread.items():
            digests = np.zeros((len(images.labels), SIZE), np.uint8)
            for digest, (content, name) in zip(digests, images.contents(), strict=True):
                try:
                    prepared = preprocessing.prepare(content, name, "data")
                except Damaged as error:
                    into.wrong += error.files
                except Unfit as error:
                    into.wrong.append((error.name, error.why))
                else:
                    into.images.append(_seen(prepared, name))
                    digest[:] = np.frombuffer(prepared.decoded.digest, np.uint8)
                shows.update()
            pixel = np.zeros((1, preprocessing.channels, 1, 1), np.uint8)
            placeholders = np.broadcast_to(pixel, (len(digests), *pixel.shape[1:]))
            parts[role] = Part(placeholders, images.labels, np.arange(len(digests)), None, digests)
    return parts


def _seen(prepared: Prepared, name: str) -> Seen:
    decoded = prepared.decoded
    values = decoded.values
    return Seen(
        name,
        (values.shape[1], values.shape[0]),
        decoded.mode,
        float(values.min()),
        float(values.max()),
        bool((values[-1, -1] == values[0, 0]).all() and (values == values[0, 0]).all()),
        decoded.digest,
        sets.filled(prepared.pixels),
    )


def _of_arrays(part: sets.ImageSet) -> Iterable[Seen]:
    """The images of a set that is published as arrays."""
    digests = array_digests(part.images) if part.digests is None else part.digests
    mode = "L" if part.images.shape[1] == 1 else "RGB"
    for number, (image, digest) in enumerate(zip(part.images, digests, strict=True)):
        yield Seen(
            f"image {number} of {part.role}",
            (image.shape[2], image.shape[1]),
            mode,
            float(image.min()),
            float(image.max()),
            bool((image == image[:, :1, :1]).all()),
            digest.tobytes(),
            sets.filled(image),
        )


def _filled(splits: ImageSplits, images: Sequence[Seen]) -> list[tuple[int, int]]:
    """What those training images fill at which a job looks; of all images where their roles are public."""
    train = splits.train
    if train.digests is None:
        return [images[index].filled for index in sets.looked_at(len(images))]
    by_digest = {image.digest: image.filled for image in images}
    return [by_digest[train.digests[index].tobytes()] for index in sets.looked_at(len(train))]
