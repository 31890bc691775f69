"""Images on their way from a source to a set: what was asked for, what was found, how pixels are prepared.

The preprocessing of a set belongs to its name, not to where its files come from:

    pad        into the middle of a black square, so that no stroke is blurred
    fit        the largest square in the middle, resized
    shorter    the shorter side resized to `size`, then the square in the middle

Values stay uint8 in 0..255; `latents.to_unit_range` brings them to [-1, 1]. How they come to 8 bits:
`dp_lora.data.pixels`.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_lora.config.schema import DataConfig
from dp_lora.data import dicom, pixels
from dp_lora.data.digests import SIZE
from dp_lora.data.pixels import Content, Damaged, Decoded, Decoding, NoRange, Unfit, shown
from dp_lora.data.places import Member, Place
from dp_lora.errors import PrivateRefusal, UserError, did_you_mean
from dp_lora.storage import arrays
from dp_lora.storage.keyed import keyed_name

ROLES = ("train", "validation", "test")
STORED_BYTES = 2**25
"""Prepared images beyond this size are kept in `paths.cache`, so that only the first job decodes them."""


class Part(NamedTuple):
    """Images uint8 [N, C, H, W] with labels int64 [N].

    `positions` in the source decide the splits of a published set, `digests` uint8 [N, 32] of the pixels, as
    they are in the files, those of a user's own. `captions` and `persons`, of type str [N], are there when
    the source was asked for them.
    """

    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    captions: np.ndarray | None = None
    digests: np.ndarray | None = None
    persons: np.ndarray | None = None

    def take(self, indices: np.ndarray) -> Part:
        captions, digests, persons = (None if one is None else one[indices] for one in self[3:])
        images, labels, positions = (one[indices] for one in self[:3])
        return Part(images, labels, positions, captions, digests, persons)


def part_of(images: np.ndarray, labels: np.ndarray) -> Part:
    """All images of a source, in its order."""
    return Part(images, labels.astype(np.int64), np.arange(len(labels)))


class Source(NamedTuple):
    """The result of a loader: the classes, the training part, the parts that the source sets aside itself.

    Where a set is published as one, `held_out` of its training images are its test images. `own`: it is a
    user's own set, in which nobody has fixed the position of an image.
    """

    classes: tuple[str, ...]
    train: Part
    validation: Part | None = None
    test: Part | None = None
    held_out: int = 0
    own: bool = False


def say(line: str) -> None:
    """Tells the owner a line on stderr, by the first process of a job alone."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


class Request(NamedTuple):
    """A `DataConfig`, where it stands in the configuration, and `paths.data` and `paths.cache`."""

    data: DataConfig
    field: str
    folder: Path
    cache: Path
    tell: Callable[[str], None] = say
    """What tells the owner a line; no record of a job holds it."""
    prepare: Prepare | None = None
    """What reads the images of all roles in place of `prepare_roles`; null for a job."""
    refuse: Callable[[PrivateRefusal], None] | None = None
    """What takes a refusal after which the rest of the set can be read; null for a job, which ends."""


def wanted_classes(classes: tuple[str, ...], request: Request) -> tuple[str, ...]:
    """Those of `classes` that are asked for, in the order asked for; UserError for one that is not there."""
    wanted, field = request.data.classes, request.field
    if wanted is None:
        return classes
    if not wanted or len(set(wanted)) != len(wanted):
        raise UserError(f"{field}.classes={wanted}: expected at least one class, each named once, or null")
    for name in wanted:
        if name not in classes:
            known = ", ".join(classes[:30]) + (", ..." if len(classes) > 30 else "")
            raise UserError(
                f"{field}.classes: no class {name!r}, expected any of {known}{did_you_mean(name, classes)}"
            )
    return tuple(wanted)


def check_class_names(names: Iterable[str], where: str) -> None:
    """Raises UserError for names that nobody can read or tell apart: they are released with the adapter.

    Two names are the same when they are in Unicode's form NFC, without spaces around them.
    """
    known: dict[str, str] = {}
    for name in names:
        if shown(name) != name:
            raise UserError(
                f"{where}: class {shown(name)!r} has characters that cannot be printed; expected text, since "
                "the names of classes are released"
            )
        other = known.setdefault(unicodedata.normalize("NFC", name).strip(), name)
        if other != name:
            raise UserError(f"{where}: classes {other!a} and {name!a} read the same; expected one of them")


class Unread(NamedTuple):
    """Images that are still to be read, in the order of their source."""

    labels: np.ndarray
    """int64 [N]."""
    contents: Callable[[], Iterable[tuple[Content, str]]]
    """Each image, and what an error calls it; read one after the other."""
    identity: str
    """Changes whenever a content does: names, sizes and times of the files."""

    def prepare(self, preprocessing: Preprocessing, request: Request) -> tuple[Part, bool]:
        """The prepared images, in memory, or mapped from `paths.cache` where they are many.

        Also whether any of those read now has transparency. Raises Damaged with all files that are no images.
        """
        size, count = preprocessing.size, len(self.labels)
        shape = (count, preprocessing.channels, size, size)
        transparent = False

        def fill(into: dict[str, np.ndarray]) -> None:
            nonlocal transparent
            transparent = self._read(into["images"], into["digests"], preprocessing, request.field)

        if math.prod(shape) <= STORED_BYTES:
            made = {"images": np.empty(shape, np.uint8), "digests": np.empty((count, SIZE), np.uint8)}
            fill(made)
        else:
            asked = f"{self.identity} {astuple(preprocessing)} {count} with digests"
            key = keyed_name(request.cache, f"images {asked}")
            shapes = {"images": ("U8", shape), "digests": ("U8", (count, SIZE))}
            made = arrays.shared(request.cache / "images", key, shapes, fill)
        return part_of(made["images"], self.labels)._replace(digests=made["digests"]), transparent

    def _read(
        self, images: np.ndarray, digests: np.ndarray, preprocessing: Preprocessing, field: str
    ) -> bool:
        damaged: list[tuple[str, str]] = []
        transparent = False
        for image, digest, (content, name) in zip(images, digests, self.contents(), strict=True):
            try:
                prepared = preprocessing.prepare(content, name, field)
            except Damaged as error:
                damaged += error.files
                continue
            image[:] = prepared.pixels
            digest[:] = np.frombuffer(prepared.decoded.digest, np.uint8)
            transparent |= prepared.decoded.transparent
        if damaged:
            raise Damaged(damaged, field)
        return transparent


Prepare = Callable[[Mapping[str, Unread], "Preprocessing", Request], dict[str, Part]]
"""The images of each role, read and prepared."""


def prepare_roles(
    unread: Mapping[str, Unread], preprocessing: Preprocessing, request: Request
) -> dict[str, Part]:
    """The prepared images of each role. Raises Damaged with the files of all roles that cannot be read."""
    if request.prepare is not None:
        return request.prepare(unread, preprocessing, request)
    parts: dict[str, Part] = {}
    damaged: list[tuple[str, str]] = []
    transparent = False
    for role, images in unread.items():
        try:
            parts[role], here = images.prepare(preprocessing, request)
            transparent |= here
        except Damaged as error:
            damaged += error.files
    if damaged:
        raise Damaged(damaged, request.field)
    if transparent:
        colour = pixels.name_of(preprocessing.decoding.background)
        request.tell(
            f"{request.field}: images with transparency are laid on {colour} ({request.field}.background)"
        )
    return parts


def identity_of(files: Sequence[Path]) -> str:
    """A digest of path, size and time of modification of each file."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(os.fsencode(os.path.realpath(path)))
        try:
            status = path.stat()
        except OSError:  # which reading it will say
            continue
        digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def identity_of_places(places: Sequence[Place]) -> str:
    """`identity_of` of files in folders and in archives, with the names of the latter."""
    members = [place for place in places if isinstance(place, Member)]
    archives = {path: None for place in members for path in place.archive.paths.values()}
    loose = [place for place in places if isinstance(place, Path)]
    identity = identity_of([*archives, *loose])
    if not archives:
        return identity
    names = "\n".join(shown(place) for place in places)
    return f"{identity} {hashlib.sha256(names.encode()).hexdigest()}"


class Prepared(NamedTuple):
    """One image: uint8 [C, size, size], and what it was made from."""

    pixels: np.ndarray
    decoded: Decoded


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes uint8 [channels, size, size].

    `resample` is pad, whatever `crop` is, or a filter of Pillow: box, bilinear, bicubic or lanczos. All of
    these look at every pixel when they make an image smaller. `decoding` brings its values to 8 bits.
    """

    size: int
    channels: int
    resample: str = "bicubic"
    crop: str = "fit"
    decoding: Decoding = Decoding()  # noqa: RUF009  (frozen)

    def read(self, content: Content, name: str, field: str) -> np.ndarray:
        """The pixels alone. Arguments and errors as of `prepare`."""
        return self.prepare(content, name, field).pixels

    def prepare(self, content: Content, name: str, field: str) -> Prepared:
        """The image in `content`.

        Raises Damaged naming `name`, Unfit where the file's values or size do not fit the settings, and
        PrivateRefusal where what reads it is not installed.
        """
        from PIL import Image

        try:
            if isinstance(content, Member):
                pixels.check_file(content)
                content = content.read_bytes()
            with warnings.catch_warnings():
                # Pillow warns from 90 million pixels on, and refuses from 180 million.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return self._opened(content, name, field)
        except NoRange as error:
            holds, expected = error.args
            given = pixels.said(self.decoding.value_range)
            raise Unfit(f"{field}.value_range={given}", name, f"holds {holds}; {expected}") from error
        except UserError:
            raise
        except Exception as error:  # a damaged file fails in every way there is
            raise Damaged([(name, pixels.reason(content, error))], field) from error

    def _opened(self, content: Path | bytes | np.ndarray, name: str, field: str) -> Prepared:
        from PIL import Image, UnidentifiedImageError

        if isinstance(content, np.ndarray):
            return self._prepared(pixels.decode(Image.fromarray(content), self.decoding))
        if isinstance(content, Path):
            pixels.check_file(content)
        # A file of both kinds begins as a TIFF, with DICOM behind it.
        if name.lower().endswith(dicom.ENDINGS) and dicom.is_dicom(content):
            return self._of_dicom(content, name, field)
        try:
            opened = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        except UnidentifiedImageError:
            if dicom.is_dicom(content):
                return self._of_dicom(content, name, field)
            raise
        with opened as image:
            pixels.to_the_image(image)
            if self.resample == "pad" and max(image.size) > self.size:
                raise self._too_large(image.size, name, field)
            return self._prepared(pixels.decode(image, self.decoding))

    def _of_dicom(self, content: Path | bytes, name: str, field: str) -> Prepared:
        decoded = dicom.decode(content, name, field, self.decoding)
        if self.resample == "pad" and max(decoded.image.size) > self.size:
            raise self._too_large(decoded.image.size, name, field)
        return self._prepared(decoded)

    def _too_large(self, size: tuple[int, int], name: str, field: str) -> Unfit:
        return Unfit(
            f"{field}.resample=pad",
            name,
            f"has {size[0]} x {size[1]} pixels, expected at most {self.size} x {self.size}, or a filter such "
            "as bicubic",
        )

    def _prepared(self, decoded: Decoded) -> Prepared:
        image = decoded.image.convert("L" if self.channels == 1 else "RGB")
        square = np.asarray(self._square(image)).reshape(self.size, self.size, self.channels)
        return Prepared(square.transpose(2, 0, 1), decoded)

    def _square(self, image: Any) -> Any:
        from PIL import Image, ImageOps

        if self.resample == "pad":
            square = Image.new(image.mode, (self.size, self.size))
            square.paste(image, tuple((self.size - side) // 2 for side in image.size))
            return square
        resample = Image.Resampling[self.resample.upper()]
        if self.crop == "fit":
            return ImageOps.fit(image, (self.size, self.size), resample)
        assert self.crop == "shorter"
        width, height = image.size
        shorter = min(width, height)
        # The longer side is cut off to a whole number and the margins are rounded, as in the paper's code.
        width, height = (int(self.size * side / shorter) for side in (width, height))
        if image.size != (width, height):
            image = image.resize((width, height), resample)
        left, top = (round((side - self.size) / 2) for side in (width, height))
        return image.crop((left, top, left + self.size, top + self.size))


def preprocessing_of(data: DataConfig, resample: str, crop: str = "fit") -> Preprocessing:
    """The preprocessing that `data` asks for; `resample` and `crop` are used where it leaves them open."""
    background = pixels.background_of(data.background)
    assert background is not None, "the configuration was checked"
    low_high = None if data.value_range is None else (data.value_range[0], data.value_range[1])
    decoding = Decoding(low_high, background)
    return Preprocessing(data.image_size, data.channels, data.resample or resample, crop, decoding)


def padded(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, 1, size, size] of [N, 28, 28]: black margins."""
    margin = (size - images.shape[-1]) // 2
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin)))[:, None]
