"""Digests of single images: what tells that an image of one set is an image of another one too.

A digest is taken of the decoded pixels before they are cropped, resized or made grey, so that a copy,
another name, another folder or another lossless format does not change it. Digests of private images are as
private as the images: whoever has one can confirm a guess of the image.
"""

from __future__ import annotations

import hashlib

import numpy as np

SEEN = "images.npy"
"""In the folder of a pre-trained model: uint8 [N, 32], the digests of the public images it was made from."""

SIZE = 32
"""Bytes of a digest."""


def pixel_digest(pixels: np.ndarray) -> bytes:
    """SHA-256 of an image [H, W] or [H, W, 3 or 4], the same for every way to hold the same pixels.

    An opaque image has the digest that it has without its alpha; colours that are fully transparent do not
    matter; a grey image in RGB has the digest of its grey values. Whole numbers of 16 bits of which the upper
    byte says it all (the lower one is zero, or repeats it) have that of the upper byte, whatever type holds
    them. The machine's byte order does not matter.

    >>> grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    >>> same = [np.stack([grey] * 3, axis=2), grey * np.uint16(257), grey.astype(np.float32) * 256]
    >>> [pixel_digest(image) == pixel_digest(grey) for image in (*same, grey.T)]
    [True, True, True, False]
    """
    plain = _narrow(_plain(pixels))
    ordered = np.ascontiguousarray(plain, plain.dtype.newbyteorder("<"))
    hashed = hashlib.sha256(f"{ordered.shape} {ordered.dtype.str}".encode())
    hashed.update(ordered.data)
    return hashed.digest()


def array_digests(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 32]: the digests of images uint8 [N, H, W] or [N, C, H, W] with 1 or 3 channels.

    They are those of the same images in files.
    """
    found = np.empty((len(images), SIZE), np.uint8)
    for into, image in zip(found, images, strict=True):
        pixels = image.transpose(1, 2, 0) if image.ndim == 3 else image
        into[:] = np.frombuffer(pixel_digest(pixels), np.uint8)
    return found


def both(images: np.ndarray, decoded: np.ndarray | None) -> np.ndarray:
    """uint8 [N or 2 N, 32]: digests of prepared `images`, and of the decoded ones if known."""
    prepared = array_digests(images)
    return prepared if decoded is None else np.concatenate([prepared, decoded])


def _plain(pixels: np.ndarray) -> np.ndarray:
    """[H, W], [H, W, 3] or [H, W, 4]: without an alpha that hides nothing, a grey image as grey."""
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        alpha = pixels[..., 3:]
        pixels = pixels[..., :3] if (alpha == 255).all() else np.where(alpha == 0, np.uint8(0), pixels)
    if pixels.ndim == 3 and pixels.shape[2] in (1, 3):
        first = pixels[..., 0]
        if (pixels == first[..., None]).all():
            return first
    return pixels


def _narrow(values: np.ndarray) -> np.ndarray:
    """Whole numbers that two bytes can hold, in two bytes, or in one where one of the two says it all."""
    if values.dtype == np.uint8:
        return values
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535 or (values != np.floor(values)).any():
        return values
    words = values.astype(np.uint16)
    if words.max(initial=0) <= 255:
        return words.astype(np.uint8)
    upper = words >> 8
    if not (words & 255).any() or (words == upper * np.uint16(257)).all():
        return upper.astype(np.uint8)
    return words
