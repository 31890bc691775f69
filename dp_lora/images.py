"""Images on their way from a source to a set: what was asked for, what was found, how pixels are prepared.

The preprocessing of a set belongs to its name, not to where its files come from:

    pad        into the middle of a black square, so that no stroke is blurred
    fit        the largest square in the middle, resized
    shorter    the shorter side resized to `size`, then the square in the middle

Values stay uint8 in 0..255; `latents.to_unit_range` brings them to [-1, 1].
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_lora import arrays
from dp_lora.config import DataConfig
from dp_lora.digests import SIZE, decoded, pixel_digest
from dp_lora.errors import UserError, did_you_mean
from dp_lora.keyed import keyed_name

ROLES = ("train", "validation", "test")
STORED_BYTES = 2**25
"""Prepared images beyond this size are kept in `paths.cache`, so that only the first job decodes them."""

Content = Path | bytes | np.ndarray
"""An image file, its bytes, or pixels uint8 [H, W] or [H, W, C]."""


class Part(NamedTuple):
    """Images uint8 [N, C, H, W] with labels int64 [N]; `positions` in the source decide every split.

    `captions`, of type str [N], are there when the source was asked for them. `digests`, uint8 [N, 32], are
    those of the images before they were prepared (`dp_lora.digests`); None where they are the same images.
    """

    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    captions: np.ndarray | None = None
    digests: np.ndarray | None = None

    def take(self, indices: np.ndarray) -> Part:
        captions, digests = (
            None if values is None else values[indices] for values in (self.captions, self.digests)
        )
        return Part(self.images[indices], self.labels[indices], self.positions[indices], captions, digests)


def part_of(images: np.ndarray, labels: np.ndarray) -> Part:
    """All images of a source, in its order."""
    return Part(images, labels.astype(np.int64), np.arange(len(labels)))


class Source(NamedTuple):
    """What a loader found: the classes, the training part, the parts that the source sets aside itself.

    Where a set is published as one, `held_out` of its training images are its test images.
    """

    classes: tuple[str, ...]
    train: Part
    validation: Part | None = None
    test: Part | None = None
    held_out: int = 0


class Request(NamedTuple):
    """A `DataConfig`, where it stands in the configuration, and `paths.data` and `paths.cache`."""

    data: DataConfig
    field: str
    folder: Path
    cache: Path


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


class Unread(NamedTuple):
    """Images that are still to be read, in the order of their source."""

    labels: np.ndarray
    """int64 [N]."""
    contents: Callable[[], Iterable[tuple[Content, str]]]
    """Each image, and what an error calls it; read one after the other."""
    identity: str
    """Changes whenever a content does: names, sizes and times of the files."""

    def prepare(self, preprocessing: Preprocessing, request: Request) -> Part:
        """The prepared images: in memory, or mapped from `paths.cache` where they are many."""
        size, field = preprocessing.size, request.field
        shape = (len(self.labels), preprocessing.channels, size, size)
        digests = (len(self.labels), SIZE)

        def fill(into: dict[str, np.ndarray]) -> None:
            rows = zip(into["images"], into["digests"], self.contents(), strict=True)
            for image, digest, (content, name) in rows:
                image[:] = preprocessing.read(content, name, field, digest)

        if math.prod(shape) <= STORED_BYTES:
            stored = {"images": np.empty(shape, np.uint8), "digests": np.empty(digests, np.uint8)}
            fill(stored)
        else:
            asked = f"{self.identity} {astuple(preprocessing)} {len(self.labels)} with digests"
            key = keyed_name(request.cache, f"images {asked}")
            shapes = {"images": ("U8", shape), "digests": ("U8", digests)}
            stored = arrays.shared(request.cache / "images", key, shapes, fill)
        return part_of(stored["images"], self.labels)._replace(digests=stored["digests"])


def identity_of(files: Sequence[Path]) -> str:
    """A digest of path, size and time of modification of each file."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes uint8 [channels, size, size].

    `resample` is pad, whatever `crop` is, or a filter of Pillow: box, bilinear, bicubic or lanczos. All of
    these look at every pixel when they make an image smaller.
    """

    size: int
    channels: int
    resample: str = "bicubic"
    crop: str = "fit"

    def read(self, content: Content, name: str, field: str, digest: np.ndarray | None = None) -> np.ndarray:
        """The pixels of `content`; what is transparent becomes black. Raises UserError naming `name`.

        The digest of the image as it was decoded goes into `digest`, uint8 [32], where one is given.
        """
        from PIL import Image

        try:
            if isinstance(content, np.ndarray):
                return self._pixels(Image.fromarray(content), digest)
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                if self.resample == "pad" and max(image.size) > self.size:
                    raise UserError(
                        f"{field}.resample=pad: {name} has {image.size[0]} x {image.size[1]} pixels, "
                        f"expected at most {self.size} x {self.size}, or a filter such as bicubic"
                    )
                return self._pixels(image, digest)
        except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
            raise UserError(f"{field}.source: {name} is no image that can be read") from error

    def _pixels(self, opened: Any, digest: np.ndarray | None) -> np.ndarray:
        from PIL import Image, ImageOps

        image: Any = ImageOps.exif_transpose(opened)
        if digest is not None:
            digest[:] = np.frombuffer(pixel_digest(decoded(image)), np.uint8)
        if image.mode.startswith("I"):  # 16 bits a pixel; PIL would cut them off at 255
            image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        pixels = np.asarray(self._square(image))
        return pixels.reshape(self.size, self.size, self.channels).transpose(2, 0, 1)

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


def padded(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, 1, size, size] of [N, 28, 28]: black margins."""
    margin = (size - images.shape[-1]) // 2
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin)))[:, None]
