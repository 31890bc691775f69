"""Letters by writers who do not exist: a public set in which many images belong to one person.

A writer has a font, a slant, a width, a size, a pen and a warp of their own, and wrote 1 to 60 letters with
them, each a little different. So a writer's letters are alike, and it can be seen whether a model learnt one
writer. Few of them wrote much: half of the writers wrote 7 letters or fewer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dp_lora.data import letters
from dp_lora.data.letters import CLASSES, Glyphs, Strokes

WRITERS = 2400
MOST = 60
"""Letters of one writer."""

_ROWS = 2 * len(CLASSES)
"""Glyphs of a font."""
_CHUNK = 256


class Writers(NamedTuple):
    """W writers.

    counts: int64 [W], of letters. fonts: int64 [W]. shear, stretch: float64 [W]. share, pen, moves: float32
    [W, ...], as of `Strokes`.
    """

    counts: np.ndarray
    fonts: np.ndarray
    shear: np.ndarray
    stretch: np.ndarray
    share: np.ndarray
    pen: np.ndarray
    moves: np.ndarray


def writers(glyphs: Glyphs, count: int = WRITERS, seed: int = 0) -> Writers:
    """`count` writers: the same fonts, count and seed give the same ones."""
    rng = np.random.default_rng(seed)
    weights = glyphs.weights[::_ROWS]
    return Writers(
        # Their logarithm is uniform.
        np.minimum(np.floor(np.exp(rng.uniform(0, np.log(MOST + 1), count))), MOST).astype(np.int64),
        rng.choice(len(weights), count, p=weights / weights.sum()),
        rng.normal(0, 0.3, count),
        rng.normal(0, 0.15, count),
        rng.uniform(0.75, 0.97, count).astype(np.float32),
        np.exp(rng.normal(np.log(1.52), 0.3, count)).astype(np.float32),
        rng.normal(0, 0.9, (count, 2, 5, 5)).astype(np.float32),
    )


def render(
    glyphs: Glyphs, by: Writers, seed: int, image_size: int, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All letters of the writers: uint8 [N, size, size], labels int64 [N] in CLASSES, writers int64 [N].

    Args:
        glyphs: the bank that the writers' fonts are of.
        by: the writers.
        seed: the same fonts, writers, seed, size and classes give the same letters.
        image_size: as of `letters.render`.
        classes: indices into CLASSES, of which each letter is drawn.
    """
    rng = np.random.default_rng([seed, 1])
    owner = np.arange(len(by.counts)).repeat(by.counts)
    labels = rng.choice(classes, len(owner))
    # Capitals come first in a font.
    small = rng.integers(0, 2, len(owner))
    chosen = by.fonts[owner] * _ROWS + small * len(CLASSES) + labels
    images = np.empty((len(owner), image_size, image_size), np.uint8)
    for start in range(0, len(owner), _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = letters.ink(
            glyphs, chosen[part], image_size, _strokes(by, owner[part], image_size, rng)
        )
    return images, labels.astype(np.int64), owner


def _strokes(by: Writers, owner: np.ndarray, size: int, rng: np.random.Generator) -> Strokes:
    """How letters of the writers `owner` are written: as each does, a little differently each time."""
    count, pixel = len(owner), 1.0 if 28 <= size <= 32 else size / 28
    angle, shear, stretch = rng.normal(0, 0.04, (3, count))
    moves = by.moves[owner] + rng.normal(0, 0.3, (count, 2, 5, 5)).astype(np.float32)
    return Strokes(
        letters.affine_of(angle, by.shear[owner] + shear, by.stretch[owner] + stretch),
        by.share[owner],
        (pixel * moves).astype(np.float32),
        by.pen[owner] * np.exp(rng.normal(0, 0.05, count)).astype(np.float32),
    )
