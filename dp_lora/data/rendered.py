"""Loaders of the sets that are rendered: letters from fonts, clip art and emoji, and both together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dp_lora.config.schema import DataConfig
from dp_lora.data import letters, pictures, writers
from dp_lora.data.digests import array_digests
from dp_lora.data.images import ROLES, Request, Source, part_of, wanted_classes
from dp_lora.errors import UserError

TRAIN_SIZE = 30_000
"""Rendered when `train_size` is null."""
_SIZES = ("train_size", "validation_size", "test_size")
_Drawn = tuple[np.ndarray, np.ndarray]


def load_letters(request: Request) -> Source:
    """Letters rendered from the fonts in `<paths.data>/fonts` and on the system, a random stream a role."""
    data = request.data
    _check_side(request)
    kept = _indices(letters.CLASSES, wanted_classes(letters.CLASSES, request))
    bank = _glyphs(request)
    return _source(
        letters.CLASSES,
        [_letters(bank, _count(request, name), role, data, kept) for role, name in enumerate(_SIZES)],
    )


def load_letters_by_writer(request: Request) -> Source:
    """Letters of writers who do not exist, each of whom is a person."""
    _check_side(request)
    glyphs = _glyphs(request)
    kept = np.array(_indices(letters.CLASSES, wanted_classes(letters.CLASSES, request)))
    images, labels, owners = writers.render(glyphs, writers.writers(glyphs), 0, request.data.image_size, kept)
    names = np.array([f"writer {number}" for number in range(writers.WRITERS)], dtype=object)
    part = part_of(images[:, None], labels)._replace(persons=names[owners], digests=array_digests(images))
    return Source(letters.CLASSES, part, own=True)


def load_pictures(request: Request) -> Source:
    """Clip art and emoji from `<paths.data>/pictures`; each role has pictures of its own."""
    _check_size(request)
    bank = pictures.load_pictures(_folder(request), request.field)
    kept = _indices(bank.classes, wanted_classes(bank.classes, request))
    return _source(
        bank.classes,
        [
            _pictures(bank, _count(request, name), role, request.data, kept)
            for role, name in enumerate(_SIZES)
        ],
    )


def load_letters_pictures(request: Request) -> Source:
    """Letters and pictures in equal numbers, in a fixed random order; the letters' classes come first."""
    _check_size(request)
    bank, glyphs = pictures.load_pictures(_folder(request), request.field), _glyphs(request)
    classes = (*letters.CLASSES, *bank.classes)
    wanted = wanted_classes(classes, request)
    ours = _indices(letters.CLASSES, [name for name in wanted if name in letters.CLASSES])
    theirs = _indices(bank.classes, [name for name in wanted if name in bank.classes])
    if not ours or not theirs:
        raise UserError(
            f"{request.field}.classes={request.data.classes}: expected letters and categories of pictures, "
            "or data=letters or data=pictures"
        )
    parts = []
    for role, name in enumerate(_SIZES):
        count = _count(request, name)
        drawn, written = _letters(glyphs, count // 2, role, request.data, ours)
        seen, shown = _pictures(bank, count - count // 2, role, request.data, theirs)
        images = np.concatenate([drawn, seen])
        labels = np.concatenate([written, shown + len(letters.CLASSES)])
        order = np.random.default_rng(role).permutation(count)
        parts.append((images[order], labels[order]))
    return _source(classes, parts)


def _glyphs(request: Request) -> letters.Glyphs:
    fonts = letters.find_fonts([request.folder / "fonts", *letters.SYSTEM_FOLDERS])
    return letters.load_glyphs(fonts)


def _folder(request: Request) -> Path:
    return request.folder / "pictures"


def _indices(classes: Sequence[str], wanted: Sequence[str]) -> list[int]:
    return [classes.index(name) for name in wanted]


def _letters(bank: letters.Glyphs, count: int, role: int, data: DataConfig, kept: list[int]) -> _Drawn:
    images, labels = letters.render(bank, count, seed=role, image_size=data.image_size, classes=kept)
    return np.repeat(images[:, None], data.channels, axis=1), labels


def _pictures(bank: pictures.Pictures, count: int, role: int, data: DataConfig, kept: list[int]) -> _Drawn:
    return pictures.render(bank, count, role, data.image_size, data.channels, ROLES[role], kept)


def _source(classes: tuple[str, ...], drawn: Sequence[_Drawn]) -> Source:
    train, validation, test = (part_of(images, labels) for images, labels in drawn)
    return Source(classes, train, validation, test)


def _count(request: Request, name: str) -> int:
    """How many images to render; as many as there are has no fraction."""
    size = getattr(request.data, name)
    if isinstance(size, float):
        raise UserError(
            f"{request.field}.{name}={size}: {request.data.name} is rendered; expected a whole number"
        )
    return TRAIN_SIZE if size is None else int(size)


def _check_side(request: Request) -> None:
    size = request.data.image_size
    if not 8 <= size <= 256:
        raise UserError(f"{request.field}.image_size={size}: letters are rendered at 8 to 256 pixels")


def _check_size(request: Request) -> None:
    if not 8 <= request.data.image_size <= 128:
        raise UserError(
            f"{request.field}.image_size={request.data.image_size}: pictures are rendered at 8 to 128 pixels"
        )
