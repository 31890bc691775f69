"""Public pictures: clip art and emoji, cropped, turned and recoloured at random.

The pictures are those of two Debian packages. `openclipart-png` holds 8,121 drawings that their authors have
put in the public domain, in folders by subject. `fonts-noto-color-emoji` holds Google's emoji under the SIL
Open Font License. `make data` cuts each to what is drawn on it and keeps all of them in one file.

A fifth of the pictures is held out: a tenth makes the images of the role `validation`, a tenth those of
`test`. Which ones follows from the pixels, so that copies of a picture share a role.
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dp_lora.data.images import ROLES
from dp_lora.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

PACKAGES = ("openclipart-png", "fonts-noto-color-emoji")
"""The Debian packages that hold the pictures."""
FILE = "pictures.npz"
SIDE = 64
"""Pixels of the longer side of a stored picture."""
EMOJI = "emoji"
OTHER = "other"
"""The class of all pictures whose category has fewer than `_FEWEST`."""
_FEWEST = 20
_EMOJI_SIDE = 109
"""The one size in points at which the bitmaps of the font can be drawn."""
_EMOJI_BLOCKS = ((0x203C, 0x3300), (0x1F000, 0x1FB00))
_FOLDER = "usr/share/openclipart/png"
_FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
_CHUNK = 256


@dataclass(frozen=True)
class Pictures:
    """A bank of P pictures.

    rgba: uint8 [P, 64, 64, 4], not premultiplied, each in the middle of a transparent square. classes: names,
    sorted. labels: int64 [P], index into `classes`. roles: int64 [P], index into `images.ROLES`.
    """

    rgba: np.ndarray
    classes: tuple[str, ...]
    labels: np.ndarray
    roles: np.ndarray


# --- making the bank


def collect(unpacked: Path, target: Path) -> None:
    """Writes the bank `target / FILE` of the pictures in the folder into which PACKAGES were unpacked.

    Files that cannot be read, and pictures with nothing on them, are left out.

    Raises:
        UserError: if there are no pictures.
    """
    found = [*_clip_art(unpacked / _FOLDER), *_emoji(unpacked / _FONT)]
    if not found:
        raise UserError(f"no pictures in {unpacked}; expected {_FOLDER} and {_FONT}")
    categories, pictures = zip(*found, strict=True)
    np.savez_compressed(target / FILE, rgba=np.stack(pictures), categories=np.array(categories))


def _clip_art(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(category, uint8 [64, 64, 4]) of each file; the category is the first two folders of its path."""
    from PIL import Image

    for path in sorted(folder.rglob("*.png")):
        inside = path.relative_to(folder)
        try:
            with warnings.catch_warnings():  # a few drawings have more than 100 million pixels
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(path) as opened:
                    cut = _cut(opened.convert("RGBA"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        if cut is not None:
            yield "/".join(inside.parts[:-1][:2]), cut


def _emoji(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(`EMOJI`, uint8 [64, 64, 4]) of each emoji of one code point."""
    from PIL import Image, ImageDraw, ImageFont

    if not path.exists():
        return
    font = ImageFont.truetype(BytesIO(path.read_bytes()), _EMOJI_SIDE, layout_engine=ImageFont.Layout.BASIC)

    def drawn(code: int) -> Image.Image:
        canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((8, 8), chr(code), font=font, embedded_color=True)
        return canvas

    missing = drawn(0x10FFFE)
    for code in (code for block in _EMOJI_BLOCKS for code in range(*block)):
        canvas = drawn(code)
        cut = None if canvas == missing else _cut(canvas)
        if cut is not None:
            yield EMOJI, cut


def _cut(image: Image) -> np.ndarray | None:
    """The part of an RGBA image that is not transparent, its longer side 64 pixels; None if there is none."""
    from PIL.Image import Resampling, new

    box = image.getchannel("A").getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Resampling.BOX if scale < 1 else Resampling.BICUBIC)
    canvas = new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    canvas.paste(image, ((SIDE - width) // 2, (SIDE - height) // 2))
    return np.asarray(canvas)


# --- drawing images


def load_pictures(folder: Path, field: str = "data") -> Pictures:
    """The bank in `folder`.

    Raises:
        UserError: if it is absent or damaged.
    """
    path = folder / FILE
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            rgba, categories = file["rgba"], file["categories"]
    except FileNotFoundError as error:
        raise UserError(
            f"{field}: no public pictures, {path}; run `make data ARGS=pictures`, which takes them from the "
            f"Debian packages {' and '.join(PACKAGES)}"
        ) from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{field}: {path} is damaged; run `make data ARGS=pictures` again") from error
    names, counts = np.unique(categories, return_counts=True)
    rare = set(names[counts < _FEWEST].tolist())
    named = [OTHER if name in rare else name for name in categories.tolist()]
    classes = tuple(sorted(set(named)))
    labels = np.array([classes.index(name) for name in named], np.int64)
    return Pictures(rgba, classes, labels, _roles(rgba))


def provenance(folder: Path) -> tuple[str, str]:
    """(file name, sha256 of its bytes) of the bank: with count and seed it determines the images."""
    return FILE, hashlib.sha256((folder / FILE).read_bytes()).hexdigest()


def _roles(rgba: np.ndarray) -> np.ndarray:
    """int64 [P]: of ten pictures, eight train; by the hash of the pixels."""
    tenths = [hashlib.sha256(picture.tobytes()).digest()[0] % 10 for picture in rgba]
    return np.array([{0: ROLES.index("validation"), 1: ROLES.index("test")}.get(n, 0) for n in tenths])


def render(
    pictures: Pictures,
    count: int,
    seed: int,
    image_size: int = 32,
    channels: int = 1,
    role: str = "train",
    classes: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`count` images of the pictures of a role: uint8 [N, C, size, size] and labels int64 [N].

    Each image shows one picture: moved, turned, mirrored, scaled by 0.8 to 1.6 (a quarter of them by up to
    3, so that the image lies inside the picture), its tones changed, on a plain or shaded background. The
    share of a class is proportional to the square root of its number of pictures.

    Args:
        pictures: the bank.
        count: number of images.
        seed: the same bank, count, seed and the other arguments give the same images.
        image_size: 8 to 128.
        channels: 1 or 3.
        role: whose pictures are drawn, one of `images.ROLES`.
        classes: indices into `pictures.classes`; all by default.
    """
    rng = np.random.default_rng([seed, 0x70696374])
    wanted = np.arange(len(pictures.classes)) if classes is None else np.asarray(classes, np.int64)
    mine = np.flatnonzero(np.isin(pictures.labels, wanted) & (pictures.roles == ROLES.index(role)))
    if count and not len(mine):
        raise UserError(f"no picture of the role {role} in these classes")
    sizes = np.bincount(pictures.labels[mine], minlength=len(pictures.classes))
    weights = 1 / np.sqrt(sizes[pictures.labels[mine]])
    chosen = rng.choice(mine, count, p=weights / weights.sum()) if count else np.zeros(0, np.int64)
    images = np.empty((count, channels, image_size, image_size), np.uint8)
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        placed = _placed(pictures.rgba[chosen[part]], image_size, rng)
        images[part] = _coloured(placed, channels, rng)
    return images, pictures.labels[chosen]


def _placed(rgba: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [B, 4, size, size] in [0, 1] of uint8 [B, 64, 64, 4]: each under an affine map of its own."""
    from PIL import Image

    count = len(rgba)
    scale = np.exp(rng.uniform(np.log(0.8), np.log(1.6), count))
    scale = np.where(rng.random(count) < 0.25, np.exp(rng.uniform(np.log(1.6), np.log(3), count)), scale)
    aspect = np.exp(rng.uniform(-0.2, 0.2, count))
    angle = np.where(rng.random(count) < 0.6, 0.0, rng.normal(0, 0.5, count))
    mirrored = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    shift = rng.normal(0, 0.08 * SIDE, (count, 2))
    # Drawn at twice the size and averaged, so that edges are smooth.
    double = 2 * size
    step = SIDE / double / scale
    cos, sin = np.cos(angle) * step, np.sin(angle) * step
    a, b, d, e = cos * aspect * mirrored, -sin / aspect, sin * aspect * mirrored, cos / aspect
    middle = (double - 1) / 2
    c = SIDE / 2 - (a + b) * middle + shift[:, 0]
    f = SIDE / 2 - (d + e) * middle + shift[:, 1]
    out = np.empty((count, size, size, 4), np.float32)
    for index, coefficients in enumerate(np.stack([a, b, c, d, e, f], axis=1)):
        image = Image.fromarray(rgba[index]).transform(
            (double, double), Image.Transform.AFFINE, tuple(coefficients), Image.Resampling.BILINEAR
        )
        out[index] = np.asarray(image.reduce(2))
    return out.transpose(0, 3, 1, 2) / 255


def _coloured(placed: np.ndarray, channels: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [B, C, size, size]: the picture, its tones changed, on a background."""
    count, _, size, _ = placed.shape
    one = (count, 1, 1, 1)
    colours, alpha = placed[:, :3], placed[:, 3:]
    if channels == 1:
        colours = np.tensordot(colours, np.array([0.299, 0.587, 0.114], np.float32), ((1,), (0,)))[:, None]
    else:
        order = np.argsort(rng.random((count, 3)), axis=1)
        order[rng.random(count) < 0.7] = np.arange(3)
        colours = np.take_along_axis(colours, order[:, :, None, None], axis=1)
    colours = np.where(rng.random(one) < 0.3, 1 - colours, colours)
    low = rng.uniform(0, 0.5, one) * (rng.random(one) < 0.5)
    high = 1 - rng.uniform(0, 0.4, one) * (rng.random(one) < 0.4)
    colours = low + (high - low) * colours
    background = _backgrounds(count, channels, size, rng)
    image = alpha * colours + (1 - alpha) * background
    drawn: np.ndarray = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return drawn


def _backgrounds(count: int, channels: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """float [B, C, size, size]: black, white, of one colour, or shaded between two in some direction.

    Grey images are black around the picture in seven of ten cases, as most small grey sets are.
    """
    first, second = rng.random((2, count, channels, 1, 1))
    kind = rng.random(count)
    black, white, plain = (0.7, 0.75, 0.9) if channels == 1 else (0.25, 0.4, 0.65)
    first[kind < black] = 0
    first[(kind >= black) & (kind < white)] = 1
    second = np.where((kind < plain)[:, None, None, None], first, second)
    turn = rng.uniform(0, 2 * np.pi, count)[:, None, None]
    axis = np.linspace(-0.5, 0.5, size)
    along = np.cos(turn) * axis[None, None, :] + np.sin(turn) * axis[None, :, None]
    share = np.clip(0.5 + along, 0, 1)[:, None]
    shaded: np.ndarray = first + (second - first) * share
    return shaded
