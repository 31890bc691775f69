"""Small private image sets for tests, as arrays and as folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dp_lora.data.sets import ImageSet, ImageSplits


def pixels(seed: int, number: int, size: int = 8) -> np.ndarray:
    """uint8 [number, 1, size, size] at random."""
    return np.random.default_rng(seed).integers(0, 256, (number, 1, size, size), dtype=np.uint8)


def splits_of(
    images: np.ndarray, *, classes: int = 2, held_out: int = 0, public: bool = False
) -> ImageSplits:
    """`images` in training but for the last `held_out`, which test; labels in turn."""
    labels = np.arange(len(images)) % classes
    names = tuple(f"c{number}" for number in range(classes))
    parts = np.split(np.arange(len(images)), [len(images) - held_out])
    chosen = {"train": parts[0], "validation": parts[1][:0], "test": parts[1]}
    return ImageSplits(
        *(ImageSet(images[at], labels[at], names, "set", role, public) for role, at in chosen.items())
    )


def private_images(seed: int = 0, number: int = 20) -> ImageSplits:
    """A private set of images that no other seed gives."""
    return splits_of(pixels(seed, number), held_out=number // 4)


def write_folder(root: Path, images: np.ndarray, *, classes: int = 2, suffix: str = ".png") -> Path:
    """`images` as a folder of class folders, labelled in turn."""
    for number, image in enumerate(images):
        folder = root / f"c{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / f"{number:03}{suffix}")
    return root
