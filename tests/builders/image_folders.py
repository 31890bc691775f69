"""Folders of images that are odd but real, and what is put into them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin

Make = Callable[[Path], object]


def put(path: Path, content: bytes | str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3).save(path)


def pages(path: Path, *each: tuple[int, dict[int, int]]) -> None:
    """A TIFF with a page of grey for each side and its tags; a page is as bright as it is wide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TiffImagePlugin.AppendingTiffWriter(str(path), True) as writer:
        for side, tags in each:
            Image.new("L", (side, side), side).save(writer, format="TIFF", tiffinfo=tags)
            writer.newFrame()


def two(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 3) -> Path:
    """`count` images in each of two classes."""
    for name in classes:
        for i in range(count):
            image(folder / name / f"{i}.png")
    return folder


def roles(folder: Path, *names: str) -> None:
    for name in names:
        two(folder / name)


def link(folder: Path, target: str, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, folder / name)


def latin1(folder: Path, below: str, name: bytes) -> None:
    """A copy of an image under a name that is not UTF-8."""
    os.makedirs(os.fsencode(folder / below), exist_ok=True)
    shutil.copy(folder / "cat/0.png", os.fsencode(folder / below) + b"/" + name)


def saved_to_disk(folder: Path) -> None:
    put(folder / "data-00000-of-00001.arrow")
    put(folder / "dataset_info.json", "{}")
    put(folder / "state.json", "{}")


def both(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for one in makes:
            one(folder)

    return make
