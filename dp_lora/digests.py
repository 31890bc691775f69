"""Digests of single images: what tells that an image of one set is an image of another one too.

A digest is taken of the decoded pixels before they are cropped, resized or made grey, so that a copy,
another name, another folder or another lossless format does not change it. Digests of private images are as
private as the images: whoever has one can confirm a guess of the image.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

SIZE = 32
"""Bytes of a digest."""


def pixel_digest(image: np.ndarray) -> bytes:
    """SHA-256 over shape, dtype and bytes of `image`, in C order.

    >>> a = np.zeros((2, 3), np.uint8)
    >>> pixel_digest(a) == pixel_digest(a.copy()), pixel_digest(a) == pixel_digest(a.T)
    (True, False)
    """
    hashed = hashlib.sha256(f"{image.shape} {image.dtype.str} ".encode())
    hashed.update(np.ascontiguousarray(image).data)
    return hashed.digest()


def decoded(image: Any) -> np.ndarray:
    """The pixels of a PIL image for its digest: uint8 [H, W, 4] (RGBA), whatever its mode is.

    Images of more than 8 bits a channel, which RGBA would cut off, keep their own array.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return np.asarray(image)
    try:
        return np.asarray(image.convert("RGBA"))
    except ValueError:  # a mode that has no such conversion, such as LAB
        return np.asarray(image)


def array_digests(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 32]: the digests of images uint8 [N, H, W] or [N, C, H, W] with 1 or 3 channels.

    They are those of the same images in files.
    """
    found = np.empty((len(images), SIZE), np.uint8)
    rgba = np.full((*images.shape[-2:], 4), 255, np.uint8)
    for into, image in zip(found, images, strict=True):
        rgba[..., :3] = image[..., None] if image.ndim == 2 else image.transpose(1, 2, 0)
        into[:] = np.frombuffer(pixel_digest(rgba), np.uint8)
    return found
