"""The digest of a picture: of its pixels, however they are stored."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dp_lora.data.digests import pixel_digest
from dp_lora.data.pixels import Decoding, decode

SMALL = "6ae7e4a2050f741dfd61543dc958dd8e479147c05bfdd98ad39e75de1569c177"


def as_file(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


SAME = {
    "PNG, 16 bits": lambda small: as_file(small.astype(np.uint16) * 257, "PNG"),
    "PNG, 16 bits, shifted": lambda small: as_file(small.astype(np.uint16) * 256, "PNG"),
    "PGM, 16 bits": lambda small: b"P5 2 2 65535\n" + (small.astype(">u2") * 257).tobytes(),
    "TIFF, 32 bits": lambda small: as_file(small.astype(np.int32), "TIFF"),
    "TIFF, floating point": lambda small: as_file(small.astype(np.float32), "TIFF"),
    "PNG, opaque colour": lambda small: as_file(np.dstack([small] * 3 + [np.full_like(small, 255)]), "PNG"),
}


@pytest.mark.parametrize("form", SAME)
def test_the_digest_of_a_picture_is_pinned(form: str) -> None:
    """SHA-256 of b'(2, 2) |u1' and the four bytes, however the picture is stored without loss."""
    small = np.array([[0, 1], [2, 3]], np.uint8)
    assert pixel_digest(small).hex() == SMALL
    with Image.open(io.BytesIO(SAME[form](small))) as image:
        decoding = Decoding((0, 255)) if image.mode in ("I", "F") and image.format == "TIFF" else Decoding()
        assert decode(image, decoding).digest.hex() == SMALL


def test_colours_that_nobody_sees_do_not_change_the_digest() -> None:
    seen = np.array([[[9, 8, 7, 255], [1, 2, 3, 0]], [[5, 5, 5, 128], [4, 4, 4, 1]]], np.uint8)
    cleaned = seen.copy()
    cleaned[0, 1, :3] = 0
    other = seen.copy()
    other[1, 1, 0] = 0
    assert pixel_digest(seen) == pixel_digest(cleaned) != pixel_digest(other)


def test_pictures_of_more_than_a_byte_keep_all_of_it() -> None:
    deep = np.array([[0, 1], [2, 65535]], np.uint16)
    assert (
        pixel_digest(deep)
        == pixel_digest(deep.astype(np.int32))
        != pixel_digest((deep >> 8).astype(np.uint8))
    )
