"""From an image file to upright pixels of 8 bits, and the digest by which an image is given its role.

Depth and range belong to the file's own mode, or to `data.value_range`; they are never estimated from images:

    1, L, P, RGB, CMYK, ...    8 bits a channel or fewer, as Pillow reads them
    16 bits of grey            0 to 65535; 12 bits in a TIFF of 12 bits a value, 0 to 4095; a PGM says its
                               range itself, a JPEG 2000 its number of bits
    16 bits a colour           0 to 65535; Pillow reads the upper 8 bits, so that no other range is possible
    32 bits, floating point,   no range of their own: `data.value_range` says which values are black and white
    signed whole numbers
    transparent                laid on `data.background`

Values beyond the range become black or white. A TIFF's MaxSampleValue is not read: TIFF 6.0 keeps it for
statistics, and programs write there the largest value of each single image.
"""

from __future__ import annotations

import io
import os
import re
import stat
from dataclasses import dataclass
from errno import EACCES, ELOOP, ENOENT
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_lora.data.digests import pixel_digest
from dp_lora.data.places import Member, Place
from dp_lora.errors import PrivateRefusal

BACKGROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}
Content = Place | bytes | np.ndarray
"""An image file, its bytes, or pixels uint8 [H, W] or [H, W, C]."""

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339
"""TIFF's tags: whether white is zero, bits a sample, signed or floating-point samples."""
_KIND, _OLD_KIND = 254, 255
"""TIFF's tags: whether a page is a reduced picture of another one, or a mask; whether it is the former."""
_ORIENTATION = 0x0112
"""EXIF's tag."""
_EIGHT_BITS = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX", "LA", "PA", "La", "RGBA", "RGBa")
_EXPECTED_COLOURS = "expected null, and images written as 8 bits a colour, or over all 16"


class Unreadable(Exception):
    """A file that is no image that can be read, with the reason in a few words."""


class NoRange(Exception):
    """A file whose values `data.value_range` does not fit: what it holds, and what was expected."""


@dataclass(frozen=True)
class Decoding:
    """How values become bytes: the values of black and of white (None: by the mode), what is behind."""

    value_range: tuple[float, float] | None = None
    background: tuple[int, int, int] = BACKGROUNDS["white"]


class Decoded(NamedTuple):
    """An upright image."""

    image: Any
    """An image of Pillow, mode L or RGB."""
    digest: bytes
    """SHA-256 of the pixels as they are in the file, upright, before range, background and size."""
    transparent: bool
    """Whether the background can be seen."""
    mode: str
    """What the file holds: Pillow's mode, or a word for it."""
    values: np.ndarray
    """The pixels that the digest is of."""


def background_of(name: str) -> tuple[int, int, int] | None:
    """The colour of `data.background`: white, grey, black, or '#rrggbb'; None for anything else.

    >>> background_of("white"), background_of("#ff8000"), background_of("pink")
    ((255, 255, 255), (255, 128, 0), None)
    """
    if re.fullmatch(r"#[0-9a-fA-F]{6}", name):
        return int(name[1:3], 16), int(name[3:5], 16), int(name[5:7], 16)
    return BACKGROUNDS.get(name)


def name_of(colour: tuple[int, int, int]) -> str:
    """The name of a background, or its '#rrggbb'."""
    names = [name for name, known in BACKGROUNDS.items() if known == colour]
    return names[0] if names else "#" + "".join(f"{part:02x}" for part in colour)


def said(value_range: tuple[float, float] | None) -> str:
    """A range as it stands in the settings.

    >>> said((0.0, 4095.0)), said(None)
    ('[0,4095]', 'null')
    """
    return "null" if value_range is None else f"[{value_range[0]:g},{value_range[1]:g}]"


def to_the_image(opened: Any) -> None:
    """Brings an opened file to its first page that is an image of its own, past thumbnails and masks.

    Raises Unreadable where there is none, and for a drawing, which has no pixels before it is drawn.
    """
    if opened.format == "EPS":
        raise Unreadable(_POSTSCRIPT)
    page, tags = 0, getattr(opened, "tag_v2", {})
    while opened.format == "TIFF" and (tags.get(_KIND, 0) & 0b101 or tags.get(_OLD_KIND) == 2):
        page += 1
        try:
            opened.seek(page)
        except EOFError:
            raise Unreadable("a TIFF with thumbnails alone; expected the image itself") from None
        tags = opened.tag_v2


def decode(opened: Any, decoding: Decoding) -> Decoded:
    """The picture to which `to_the_image` brought an opened file, upright, in 8 bits, on the background.

    Raises:
        Unreadable: values or colours that cannot be brought to 8 bits.
        NoRange: values without a range of their own, or with another depth than `value_range`.
        What Pillow raises for a damaged file.
    """
    from PIL.ImageFile import StubImageFile

    if isinstance(opened, StubImageFile):  # HDF5 and the like, which Pillow knows and does not read
        raise OSError("no pixels that can be read")
    deep = _deep_range(opened, decoding)
    mode = opened.mode
    image = _upright(opened)
    if deep is None:
        eight = _eight_bits(image)
        laid, transparent = _on_background(_stretched(eight, decoding), decoding)
        values = np.asarray(eight)
        return Decoded(laid, pixel_digest(values), transparent, mode, values)
    values = np.asarray(image)
    if deep.unsigned:
        values = values.view(np.uint32)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise Unreadable("values that are no finite numbers")
    laid, transparent = _on_background(_grey(values, deep, opened), decoding)
    return Decoded(laid, pixel_digest(values), transparent, mode, values)


def to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8: `low` and below become 0, `high` and above 255.

    Whole numbers of at least 256 levels are cut into 256 parts of the same size, so that 16, 12 or 10 bits
    keep their upper 8; others are rounded to the nearest.

    >>> to_bytes(np.array([0, 40 * 16, 4095, 9999]), 0, 4095), to_bytes(np.array([-1.0, 0.5, 1.0]), 0, 1)
    (array([  0,  40, 255, 255], dtype=uint8), array([  0, 128, 255], dtype=uint8))
    """
    inside = np.clip(values.astype(np.float64), low, high) - low
    if values.dtype.kind in "iu" and high - low >= 255:
        return np.minimum(np.floor(inside * 256 / (high - low + 1)), 255).astype(np.uint8)
    return np.rint(inside * (255 / (high - low))).astype(np.uint8)


def _upright(opened: Any) -> Any:
    """The image as its EXIF orientation says that it is to be seen.

    Not by Pillow's `exif_transpose`, which writes the EXIF anew and fails where it holds anything odd.
    """
    from PIL import Image

    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90,
    }  # fmt: skip
    opened.load()
    found = turns.get(opened.getexif().get(_ORIENTATION, 1))
    return opened if found is None else opened.transpose(found)


class _Range(NamedTuple):
    """The values of black and white of a file of more than 8 bits."""

    black: float
    white: float
    inverted: bool
    """Whether they change places, as a TIFF may say."""
    unsigned: bool = False
    """Whether Pillow's signed 32 bits are unsigned ones."""
    shift: int = 0
    """By how many bits Pillow shifted the values to the left."""
    signed: bool = False
    """Whether Pillow moved signed values up by half their range."""

    def values_of(self, values: np.ndarray) -> np.ndarray:
        """The values of the file, of those that Pillow read."""
        if self.signed:
            return (values.astype(np.int64) - 2**15) >> self.shift
        return values >> self.shift if self.shift else values


def _deep_range(opened: Any, decoding: Decoding) -> _Range | None:
    """The range of a file of more than 8 bits; None for 8 bits, for which `value_range` has been checked."""
    tags = getattr(opened, "tag_v2", {})
    mode, given = opened.mode, decoding.value_range
    if mode in _EIGHT_BITS:
        if 2 in tags.get(_SAMPLE_FORMAT, ()):
            raise Unreadable("signed whole numbers of 8 bits")
        if given is not None:
            _check_eight_bits(opened, given)
        return None
    inverted = tags.get(_PHOTOMETRIC) == 0
    if mode not in ("I", "F") and not mode.startswith("I;16"):
        raise Unreadable(f"the colour space {mode}")
    if (largest := _largest(opened)) is not None:
        if given is not None and tuple(given) != (0, largest):
            raise _says_its_range(largest)
        return _Range(0, 65535, inverted)
    if given is not None:
        wide = mode == "I" and tags.get(_BITS) == (32,) and 2 not in tags.get(_SAMPLE_FORMAT, ())
        shift, signed = _jpeg_2000(opened)
        return _Range(*given, inverted, unsigned=wide, shift=shift, signed=signed)
    if mode.startswith("I;16") or (opened.format == "PPM" and mode != "F"):
        return _Range(0, 2.0 ** tags.get(_BITS, (16,))[0] - 1, inverted)
    kind = "floating-point numbers" if mode == "F" else "signed whole numbers or 32 bits a value"
    example = "[0,1]" if mode == "F" else "[0,255]"
    raise NoRange(
        f"{kind}, which have no range of their own",
        f"expected the values of black and white, such as data.value_range={example}",
    )


def _check_eight_bits(opened: Any, given: tuple[float, float]) -> None:
    """Raises NoRange unless the values, as Pillow reads them, are those of the file."""
    if _upper_bytes(opened):
        raise NoRange("16 bits a colour, of which only the upper 8 are read", _EXPECTED_COLOURS)
    if (largest := _largest(opened)) is not None:
        raise _says_its_range(largest)
    spread = any(re.match("L;[24]", str(tile[3])) for tile in getattr(opened, "tile", ()))
    if spread or _jpeg_2000(opened)[0] > 8:
        raise NoRange("fewer than 8 bits a value, which are spread over the whole scale", "expected null")
    if given[0] < 0 or given[1] > 255:
        raise NoRange("8 bits a value", "expected two numbers from 0 to 255, or null")


def _largest(opened: Any) -> int | None:
    """The value of white that a PGM or PPM says, where Pillow brings values to the scale by it."""
    arguments = opened.tile[0][3] if opened.format == "PPM" and opened.tile else None
    if isinstance(arguments, tuple) and isinstance(arguments[1], int) and opened.mode != "F":
        return arguments[1]
    return None


def _says_its_range(largest: int) -> NoRange:
    return NoRange(f"a PGM, which says its range itself (0 to {largest})", "expected null")


def _jpeg_2000(opened: Any) -> tuple[int, bool]:
    """By how many bits Pillow shifts the values of 9 to 16 bits to the left, and whether they are signed.

    The marker SIZ says the bits of the first component in byte 42 of the codestream (ISO 15444-1, A.5.1).
    """
    if opened.format != "JPEG2000":
        return 0, False
    opened.fp.seek(0)
    beginning = opened.fp.read(2**20)
    start = beginning.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(beginning) <= start + 42:
        raise Unreadable("a JPEG 2000 that does not say its number of bits")
    size = beginning[start + 42]
    return 16 - (size & 0x7F) - 1, bool(size & 0x80)


def _upper_bytes(opened: Any) -> bool:
    """Whether Pillow reads the upper 8 of up to 16 bits of each colour."""
    if opened.format == "JPEG2000":
        return _jpeg_2000(opened)[0] < 8
    if (_largest(opened) or 0) > 255:
        return True
    return any(";16" in str(tile[3]) for tile in getattr(opened, "tile", ()))


def _eight_bits(image: Any) -> Any:
    """The image in mode L, RGB, or RGBA where it has transparency."""
    if image.has_transparency_data:
        whole = image.convert("LA") if image.mode == "La" else image
        return whole.convert("RGBA")
    return image.convert("L") if image.mode in ("1", "L") else image.convert("RGB")


def _stretched(image: Any, decoding: Decoding) -> Any:
    """The image with its colours brought from `value_range` to 0 to 255."""
    from PIL import Image

    if decoding.value_range is None:
        return image
    table = to_bytes(np.arange(256, dtype=np.float64), *decoding.value_range).tolist()
    bands = image.split()
    colours = [band.point(table) for band in (bands[:3] if image.mode == "RGBA" else bands)]
    return Image.merge(image.mode, [*colours, *bands[len(colours) :]])


def _grey(values: np.ndarray, deep: _Range, opened: Any) -> Any:
    """Mode L, or RGBA where one value is declared transparent."""
    from PIL import Image

    mapped = to_bytes(deep.values_of(values), deep.black, deep.white)
    grey = Image.fromarray(255 - mapped if deep.inverted else mapped)
    hole = opened.info.get("transparency")
    if not isinstance(hole, int):
        return grey
    alpha = Image.fromarray(np.where(values == hole, 0, 255).astype(np.uint8))
    return Image.merge("RGBA", [grey, grey, grey, alpha])


def _on_background(image: Any, decoding: Decoding) -> tuple[Any, bool]:
    """The image in mode L or RGB, and whether the background can be seen."""
    from PIL import Image

    if image.mode != "RGBA":
        return image, False
    behind = Image.new("RGBA", image.size, (*decoding.background, 255))
    seen = image.getchannel("A").getextrema()[0] < 255
    return Image.alpha_composite(behind, image).convert("RGB"), seen


# --- what is wrong with a file


def shown(path: Place | str) -> str:
    """A name as it can be printed: bytes that are not UTF-8, and what no terminal shows, escaped."""
    text = os.fsencode(str(path)).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else _escaped(ord(char)) for char in text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def check_file(path: Place) -> None:
    """Raises Unreadable for what is no regular file: a folder, a link to nothing, a pipe."""
    if isinstance(path, Path):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise Unreadable(_REASONS.get(error.errno or 0, str(error.strerror))) from error
        if stat.S_ISDIR(mode):
            raise Unreadable("a folder")
        if not stat.S_ISREG(mode):
            raise Unreadable("no regular file")
    if path.suffix.lower() in _RAW:  # of which Pillow would read the small picture inside
        raise Unreadable("a raw file of a camera; expected PNG or JPEG")


_REASONS = {
    ELOOP: "a link that leads back to itself",
    ENOENT: "a link to nothing",
    EACCES: "it may not be read (permission denied)",
}
_RAW = (".dng", ".nef", ".arw", ".cr2", ".cr3", ".orf", ".rw2", ".raf", ".pef", ".srw")
_POSTSCRIPT = "a drawing (PostScript); expected pixels"
_BEGINNINGS = (
    (rb".{128}DICM", "DICOM that is cut short or damaged"),
    (rb".{344}(n\+1|ni1)\0", "NIfTI, a volume; expected its slices as PNG or TIFF"),
    (rb"\x93NUMPY", "an array of NumPy (.npy); expected PNG or TIFF"),
    (rb"\x89HDF\r\n\x1a\n", "HDF5; expected PNG or TIFF, or a parquet file"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"Rar!\x1a\x07", "a rar archive"),
    (rb"II\*\0....CR|FUJIFILM|II(U\0|RO)", "a raw file of a camera; expected PNG or JPEG"),
    (rb"\s*(<!--.*-->\s*)?<(!doctype\s+html|html|head|body)", "an HTML page"),
    (rb"version https://git-lfs", "a pointer of Git LFS; `git lfs pull` fetches the file"),
    (rb"\s*(<\?xml.*)?<svg", "a drawing (SVG); expected pixels"),
    (rb"%PDF", "a PDF"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", _POSTSCRIPT),
    (rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a drawing (WMF or EMF); expected pixels"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"\x1f\x8b", "a gzip archive"),
    (rb"PAR1", "a parquet table"),
    (rb"....ftyp(heic|heix|mif1|msf1)", "HEIC, which cannot be read; expected PNG or JPEG"),
    (rb"....ftyp(?!avi[fs]|hei|mif1|msf1)", "a film (MP4); expected single images"),
    (rb"\x00+$", "nothing but zero bytes"),
    (rb"[\t\n\r\x20-\x7e]+$", "text"),
)


def reason(content: Content, error: Exception) -> str:
    """Why `content` could not be read, in a few words."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Unreadable):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return "too large: more pixels than an image has"
    if isinstance(content, np.ndarray | Member):
        return str(error)
    try:
        beginning = content[:512] if isinstance(content, bytes) else _first_bytes(content)
    except OSError as unreadable:
        return _REASONS.get(unreadable.errno or 0, str(unreadable.strerror))
    if not beginning:
        return "empty (0 bytes)"
    if isinstance(content, Path) and content.name.lower().endswith(".nii.gz"):
        return "NIfTI, a volume; expected its slices as PNG or TIFF"
    for pattern, what in _BEGINNINGS:
        if re.match(pattern, beginning, re.DOTALL | re.IGNORECASE):
            return what
    if floats := _floats_of_tiff(content):
        return f"a TIFF of {floats}, expected 32 bits and one value a pixel"
    if isinstance(error, UnidentifiedImageError):
        return "of no format that is known, or cut off at its beginning"
    return f"cut short or damaged ({str(error) or type(error).__name__})"


def _floats_of_tiff(content: Path | bytes) -> str | None:
    """The kind of floating-point numbers in a TIFF; None for another file. Pillow reads only 32 bits."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    try:
        with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
            tags = ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
            bits, kinds = tags.get(_BITS, (0,)), tags.get(_SAMPLE_FORMAT, (0,))
    except Exception:  # no TIFF, or a damaged one: it fails in every way there is
        return None
    if set(kinds) != {3}:
        return None
    several = f"{len(bits)} " if len(bits) > 1 else ""
    return f"{several}{bits[0]}-bit floating-point numbers"


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


class Unfit(PrivateRefusal):
    """A file that does not fit the settings: `why` says the setting, what it holds and what was expected."""

    def __init__(self, setting: str, name: str, why: str) -> None:
        self.name, self.why = name, f"{setting}: {why}"
        super().__init__(f"{setting}: {name} {why}")


class Damaged(PrivateRefusal):
    """Files that are no images, all of them, each with its reason."""

    def __init__(self, files: list[tuple[str, str]], field: str) -> None:
        self.files = files
        if len(files) == 1:
            name, why = files[0]
            super().__init__(f"{field}.source: {name} is no image that can be read: {why}")
        else:
            lines = [f"  {name}: {why}" for name, why in files]
            super().__init__(
                "\n".join([f"{field}.source: {len(files)} files are no images that can be read:", *lines])
            )
