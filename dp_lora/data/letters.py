"""Public letters rendered from free fonts: a stand-in for EMNIST letters that needs no download of data.

A glyph is kept as a signed distance field, so one gather per image applies rotation, shear, stretch,
elastic warp and the thickness of the pen, and the edge comes out anti-aliased. Size and position follow
MNIST: longest side about 20 pixels, centre of mass in the middle, white on black.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_lora.errors import UserError

CLASSES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""Upper and lower case are one class, as in EMNIST letters."""

PACKAGES = (
    "fonts-breip", "fonts-bwht", "fonts-dancingscript", "fonts-dkg-handwriting", "fonts-ecolier-court",
    "fonts-humor-sans", "fonts-kaushanscript", "fonts-kristi", "fonts-leckerli-one",
    "fonts-lobster", "fonts-comic-neue", "fonts-rufscript", "fonts-tomsontalks", "fonts-opendyslexic",
    "fonts-sil-andika", "fonts-jura", "fonts-cantarell", "fonts-dejavu-core", "fonts-liberation2",
    "fonts-lato",
)  # fmt: skip
"""The Debian packages whose fonts are used."""

HANDWRITTEN = {
    "breip": 3.0, "because": 3.0, "dancingscript": 2.0, "dkg": 3.0, "ecolier": 2.0,
    "humor": 3.0, "kaushanscript": 1.5, "kristi": 1.5, "leckerlione": 1.0, "lobster": 1.0, "comicneue": 3.0,
    "rufscript": 4.0, "tomsontalks": 2.0,
}  # fmt: skip
PRINTED = {
    "opendyslexic": 1.0, "andika": 2.0, "jura": 1.0, "cantarell": 1.0, "dejavusans": 1.0,
    "liberationsans": 1.0, "liberationserif": 0.5, "dejavuserif": 0.5, "lato": 1.0,
}  # fmt: skip
FAMILIES = HANDWRITTEN | PRINTED
"""Beginning of a font's file name, in small letters without '-', and how often the family is drawn."""

SYSTEM_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
_LEFT_OUT = (
    "mono", "math", "alta", "condensed", "hairline", "thin", "extralight", "medium", "semibold", "extrabold",
    "heavy", "black",
)  # fmt: skip
"""Words in the names of cuts that are no letters as written, or differ from the others in weight alone."""
_ENDINGS = (".ttf", ".otf")
_CANVAS = 64
_GLYPH = 46
_UNIT = 8.0
"""Steps of the stored distance per canvas pixel: int8 then reaches 16 pixels either way."""
_DIRECTIONS = 16
_CHUNK = 256


@dataclass(frozen=True)
class Glyphs:
    """A bank of G glyphs: letters of one or more fonts, all 52 of one font after those of another.

    fields: int8 [G, 64, 64], signed distance to the outline in eighths of a pixel, positive inside.
    centres: float32 [G, 2], centre of mass (x, y). hulls: float32 [G, 16, 2], the glyph's extreme points
    about its centre of mass. half_strokes: float32 [G], half the mean stroke width. letters: int64 [G],
    index into CLASSES. weights: float64 [G], how often each is drawn within its class.
    """

    fields: np.ndarray
    centres: np.ndarray
    hulls: np.ndarray
    half_strokes: np.ndarray
    letters: np.ndarray
    weights: np.ndarray


def find_fonts(folders: Sequence[str | Path]) -> list[Path]:
    """The font files of FAMILIES under the first of `folders` that has any, one per name, sorted by name.

    Only one folder is used, so that fonts fetched once give the same letters whatever the system has.
    Raises UserError when none has any.
    """
    for folder in folders:
        paths = sorted(Path(folder).expanduser().rglob("*"))
        found = {path.name: path for path in paths if path.suffix.lower() in _ENDINGS and _family(path)}
        if found:
            return [found[name] for name in sorted(found)]
    raise UserError(
        f"no font for the public letters in {', '.join(map(str, folders))}: run `make data`, or install "
        f"the packages {PACKAGES[0]}, {PACKAGES[1]}, ... {PACKAGES[-1]}"
    )


def provenance(fonts: Sequence[Path]) -> list[tuple[str, str]]:
    """(file name, sha256 of its bytes) of every font: with count and seed it determines the images."""
    return [(font.name, hashlib.sha256(font.read_bytes()).hexdigest()) for font in fonts]


def render(
    glyphs: Glyphs, count: int, seed: int, image_size: int = 28, classes: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`count` letters, balanced over the classes: uint8 [N, size, size] and labels int64 [N] in CLASSES.

    Args:
        glyphs: the bank that `load_glyphs` makes of the fonts.
        count: number of images; class sizes differ by at most one.
        seed: the same fonts, count, seed, size and classes give the same images.
        image_size: 28 to 32 leave the letter 20 pixels (the rest is margin); other sizes scale it.
        classes: indices into CLASSES; all by default.
    """
    rng = np.random.default_rng(seed)
    drawn = np.arange(len(CLASSES)) if classes is None else np.asarray(classes, np.int64)
    labels = rng.permutation(drawn[np.arange(count) % len(drawn)])
    chosen = _choose(glyphs, labels, rng)
    images = np.empty((count, image_size, image_size), np.uint8)
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw(glyphs, chosen[part], image_size, rng)
    return images, labels


def load_glyphs(fonts: Sequence[Path]) -> Glyphs:
    """The distance fields of the 52 letters of every font that has them all.

    Raises UserError when none has.
    """
    rows: list[tuple[Any, ...]] = []
    for font, weight in zip(fonts, _weights(fonts), strict=True):
        masks = list(_masks(font))
        if len(masks) == 2 * len(CLASSES):
            rows += [(*_measure(mask), i % len(CLASSES), weight) for i, mask in enumerate(masks)]
    if not rows:
        raise UserError(f"none of {len(fonts)} fonts has all letters A-Z, a-z: run `make data`")
    fields, centres, hulls, strokes, letters, weights = zip(*rows, strict=True)
    return Glyphs(
        np.stack(fields),
        np.asarray(centres, np.float32),
        np.asarray(hulls, np.float32),
        np.asarray(strokes, np.float32),
        np.asarray(letters, np.int64),
        np.asarray(weights, np.float64),
    )


def _family(path: Path) -> str | None:
    name = path.stem.lower().replace("-", "").replace("_", "")
    if any(word in name for word in _LEFT_OUT):
        return None
    return next((family for family in FAMILIES if name.startswith(family)), None)


def _weights(fonts: Sequence[Path]) -> list[float]:
    """A family's weight is shared by its files, so that many cuts of one face do not drown the others."""
    families = [_family(font) or font.name for font in fonts]
    return [FAMILIES.get(family, 1.0) / families.count(family) for family in families]


def _masks(font: Path) -> Iterator[np.ndarray]:
    """Boolean [128, 128] of each letter the font has, capitals first, its longest side 92 pixels."""
    from PIL import ImageFont

    try:
        # From bytes: given a path that it cannot read, PIL looks for a system font of the same name.
        at_96 = ImageFont.truetype(BytesIO(font.read_bytes()), 96, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UserError(f"{font}: no font that can be read ({error})") from error
    missing = bytes(at_96.getmask("\U0010fffe"))
    for letter in (*CLASSES, *(name.lower() for name in CLASSES)):
        mask = at_96.getmask(letter)
        if not any(mask.size) or bytes(mask) == missing:
            continue
        sized = at_96.font_variant(size=96 * 2 * _GLYPH / max(mask.size))
        mask = sized.getmask(letter)
        width, height = mask.size
        pixels = np.asarray(bytearray(mask), np.uint8).reshape(height, width)[: 2 * _CANVAS, : 2 * _CANVAS]
        height, width = pixels.shape
        canvas = np.zeros((2 * _CANVAS, 2 * _CANVAS), bool)
        top, left = _CANVAS - height // 2, _CANVAS - width // 2
        canvas[top : top + height, left : left + width] = pixels > 127
        yield canvas


def _measure(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Distance field, centre of mass, extreme points and half stroke width of a mask of twice the canvas."""
    from scipy.ndimage import distance_transform_edt

    distance = distance_transform_edt(mask) - distance_transform_edt(~mask)
    distance = distance.reshape(_CANVAS, 2, _CANVAS, 2).mean(axis=(1, 3)) / 2
    y, x = np.nonzero(distance > 0)
    points = np.stack([x, y], axis=1).astype(np.float32)
    centre = points.mean(axis=0)
    angles = np.arange(_DIRECTIONS) * (2 * np.pi / _DIRECTIONS)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    hull = (points - centre)[np.argmax((points - centre) @ directions, axis=0)]
    # Along a stroke of half width h the distance is spread evenly over [0, h], so its mean is h / 2.
    half_stroke = 2 * float(distance[y, x].mean())
    field = np.clip(np.rint(distance * _UNIT), -128, 127).astype(np.int8)
    return field, centre, hull, half_stroke


def _choose(glyphs: Glyphs, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A glyph of each label's class, drawn by weight."""
    chosen = np.empty(len(labels), np.int64)
    for letter in range(len(CLASSES)):
        members = np.flatnonzero(glyphs.letters == letter)
        weights = glyphs.weights[members]
        places = np.flatnonzero(labels == letter)
        chosen[places] = rng.choice(members, len(places), p=weights / weights.sum())
    return chosen


def _draw(glyphs: Glyphs, chosen: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [B, size, size]: each chosen glyph deformed by draws of its own."""
    count = len(chosen)
    strokes = Strokes(
        _affine(count, rng),
        rng.uniform(0.87, 0.97, count).astype(np.float32),
        rng.normal(0, 0.9 * _pixel(size), (count, 2, 5, 5)).astype(np.float32),
        np.exp(rng.normal(np.log(1.52), 0.22, count)).astype(np.float32),
    )
    return ink(glyphs, chosen, size, strokes)


class Strokes(NamedTuple):
    """How B glyphs are deformed.

    affine: float32 [B, 2, 2]. share: float32 [B], of the 20 pixels that the longest side may take. moves:
    float32 [B, 2, 5, 5], of the knots of a smooth warp, in pixels. pen: float32 [B], half the width of a
    stroke, in pixels of 28.
    """

    affine: np.ndarray
    share: np.ndarray
    moves: np.ndarray
    pen: np.ndarray


def ink(glyphs: Glyphs, chosen: np.ndarray, size: int, strokes: Strokes) -> np.ndarray:
    """uint8 [B, size, size]: the `chosen` glyphs [B], deformed by `strokes`."""
    unit, affine = _pixel(size), strokes.affine
    corners = np.einsum("bij,bkj->bki", affine, glyphs.hulls[chosen])
    longest = np.ptp(corners, axis=1).max(axis=1)
    scale = unit * 20.0 * strokes.share / longest
    inverse = np.linalg.inv(affine * scale[:, None, None])
    points = _warped_grid(strokes.moves, size, unit)
    where = np.einsum("bij,bjp->bip", inverse, points) + glyphs.centres[chosen][:, :, None]
    distance = _sample(glyphs.fields, chosen, where) * (scale / _UNIT)[:, None]
    native = glyphs.half_strokes[chosen] * scale
    wanted = unit * strokes.pen
    # A pen much thinner than the font's own would break its hairlines, so it loses at most a part.
    grow = np.clip(wanted - native, -0.35 * native, 1.2 * unit)
    cover = np.clip(0.5 + (distance + grow[:, None]) / 1.3, 0, 1)
    images: np.ndarray = np.rint(cover * 255).astype(np.uint8).reshape(-1, size, size)
    return images


def _pixel(size: int) -> float:
    return 1.0 if 28 <= size <= 32 else size / 28


def _affine(count: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [B, 2, 2]: rotation (sd 0.12 rad) of a shear (sd 0.2) of a stretch (sd 12 %)."""
    return affine_of(*rng.normal(size=(3, count)) * np.array([[0.12], [0.2], [0.12]]))


def affine_of(angle: np.ndarray, shear: np.ndarray, stretch: np.ndarray) -> np.ndarray:
    """float32 [B, 2, 2]: rotation by `angle` [B], in radians, of a `shear` [B] of a `stretch` [B]."""
    cos, sin, wide = np.cos(angle), np.sin(angle), np.exp(stretch)
    rotation = np.stack([cos, -sin, sin, cos], axis=1).reshape(-1, 2, 2)
    sheared = np.stack([wide, -shear / wide, np.zeros(len(wide)), 1 / wide], axis=1).reshape(-1, 2, 2)
    affine: np.ndarray = (rotation @ sheared).astype(np.float32)
    return affine


def _warped_grid(moves: np.ndarray, size: int, unit: float) -> np.ndarray:
    """float32 [B, 2, size^2]: pixels (x, y) about pixel size / 2, as in MNIST, smoothly moved."""
    axis = np.arange(size, dtype=np.float32) - size / 2
    knots = np.linspace(-14, 14, 5) * unit
    basis = np.exp(-0.5 * ((axis[:, None] - knots) / (5.0 * unit)) ** 2).astype(np.float32)
    field = basis @ moves @ basis.T
    field -= field.mean(axis=(2, 3), keepdims=True)
    field[:, 0] += axis[None, None, :]
    field[:, 1] += axis[None, :, None]
    points: np.ndarray = field.reshape(len(moves), 2, size * size)
    return points


def _sample(fields: np.ndarray, chosen: np.ndarray, where: np.ndarray) -> np.ndarray:
    """float32 [B, P]: fields[chosen] at the points `where` [B, 2, P], bilinear, the border extended."""
    where = np.clip(where, 0, _CANVAS - 1.001)
    corner = where.astype(np.int32)
    fraction = where - corner
    first = (chosen * _CANVAS**2)[:, None] + corner[:, 1] * _CANVAS + corner[:, 0]
    flat = fields.reshape(-1)
    right, down = fraction[:, 0], fraction[:, 1]
    upper = flat.take(first) * (1 - right) + flat.take(first + 1) * right
    lower = flat.take(first + _CANVAS) * (1 - right) + flat.take(first + _CANVAS + 1) * right
    return upper * (1 - down) + lower * down
