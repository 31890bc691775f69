"""One picture in every format and depth: the pixels are those of the picture, written here by hand.

The picture, 16 x 16 and grey: 40 on the left, 200 on the right, 255 in the upper left 4 x 4.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import PathsConfig
from dp_lora.data.images import Preprocessing
from dp_lora.data.pixels import background_of, name_of, to_bytes
from dp_lora.data.sets import load
from dp_lora.errors import UserError
from tests.builders.image_files import config, refused

Save = Callable[[Path], None]
SIDE = 16
BASE = np.full((SIDE, SIDE), 40, np.uint8)
BASE[:, 8:] = 200
BASE[:4, :4] = 255
RGB = np.stack([BASE] * 3, -1)
WIDE = BASE.astype(np.uint16)
PICTURE = (255, 40, 200)
"""At (1, 1), (12, 2) and (12, 14): upper left, left, right."""


def of(pixels: np.ndarray, mode: str | None = None) -> Any:
    image = Image.fromarray(pixels)
    return image if mode is None else image.convert(mode)


def saved(image: Any, name: str, **options: Any) -> Save:
    return lambda folder: image().save(folder / name, **options)


def raw_tiff(bits: int, samples: bytes, photometric: int = 1, sample_format: int = 1) -> Save:
    """A TIFF of 16 x 16 values written byte by byte."""

    def save(folder: Path) -> None:
        entries = [
            (256, 3, SIDE), (257, 3, SIDE), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8), (277, 3, 1), (278, 3, SIDE), (279, 4, len(samples)), (339, 3, sample_format),
        ]  # fmt: skip
        directory = len(entries).to_bytes(2, "little")
        for tag, kind, value in entries:
            directory += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little")
            directory += value.to_bytes(4, "little")
        header = b"II*\0" + (8 + len(samples)).to_bytes(4, "little")
        (folder / "x.tif").write_bytes(header + samples + directory + bytes(4))

    return save


def packed_12(values: np.ndarray) -> bytes:
    """12 bits a value, two values in three bytes."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    both = (pairs[:, 0] << 12) | pairs[:, 1]
    return b"".join(int(value).to_bytes(3, "big") for value in both)


def turned(image: Any, orientation: int, name: str, **options: Any) -> Save:
    """Stored so that the EXIF orientation brings it upright."""
    undo = {
        3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
        2: Image.Transpose.FLIP_LEFT_RIGHT, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 7: Image.Transpose.TRANSVERSE,
    }  # fmt: skip

    def save(folder: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image().transpose(undo[orientation]).save(folder / name, exif=exif, **options)

    return save


def animated(folder: Path) -> None:
    frames = [of(RGB).quantize(8), of(255 - RGB).quantize(8)]
    frames[0].save(folder / "x.gif", save_all=True, append_images=frames[1:], duration=100)


def with_holes(kind: str) -> Any:
    """The picture where alpha is 255, and nothing on the right half."""
    alpha = np.where(np.arange(SIDE) < 8, 255, 0).astype(np.uint8)[None].repeat(SIDE, 0)
    if kind == "LA":
        return Image.merge("LA", [of(BASE), of(alpha)])
    return Image.merge("RGBA", [*of(RGB).split(), of(alpha)])


def premultiplied(folder: Path) -> None:
    """A TIFF of colours multiplied by alpha: ink of 199 at alpha 128 on the left, black on the right."""
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:, :8] = (100, 100, 100, 128)
    Image.fromarray(pixels).save(folder / "x.tif")
    content = (folder / "x.tif").read_bytes()
    extra = [struct.pack("<HHLHH", 338, 3, 1, kind, 0) for kind in (2, 1)]  # unassociated alpha, associated
    assert content.count(extra[0]) == 1
    (folder / "x.tif").write_bytes(content.replace(*extra))


def jpeg_2000(bits: int, *, signed: bool = False) -> Save:
    """The picture, times 16, in a JPEG 2000 of that many bits.

    Pillow writes 16; another number is put into its header, and the difference between the middles of both
    ranges, which a decoder adds to unsigned values, into the values.
    """

    def save(folder: Path) -> None:
        move = 2**15 if signed else 2**15 - 2 ** (bits - 1)
        buffer = io.BytesIO()
        of(WIDE * 16 + move).save(buffer, "JPEG2000", no_jp2=True)
        content = bytearray(buffer.getvalue())
        assert content[:4] == b"\xff\x4f\xff\x51" and content[42] == 15
        content[42] = bits - 1 + (128 if signed else 0)
        (folder / "x.j2k").write_bytes(content)

    return save


def pgm(largest: int, values: np.ndarray) -> Save:
    kind = ">u2" if largest > 255 else "u1"
    header = f"P5 16 16 {largest}\n".encode()
    return lambda folder: (folder / "x.pgm").write_bytes(header + values.astype(kind).tobytes()) and None


def colour_ppm(folder: Path) -> None:
    (folder / "x.ppm").write_bytes(
        b"P6 16 16 65535\n" + (RGB.astype(np.uint16) * 257).astype(">u2").tobytes()
    )


def png_of_4_bits(folder: Path) -> None:
    nibbles = BASE // 17
    write_png(folder, 4, 0, nibbles[:, ::2] << 4 | nibbles[:, 1::2])


def pgm_of_12_bits(folder: Path) -> None:
    (folder / "x.pgm").write_bytes(b"P5 16 16 4095\n" + (WIDE * 16).astype(">u2").tobytes())


def write_png(folder: Path, bits: int, colour: int, rows: np.ndarray) -> None:
    """A PNG of a kind that Pillow reads and does not write; `rows` in the bytes of the file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", content), chunk(b"IEND", b""))
    (folder / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def colour_of_16_bits(folder: Path) -> None:
    write_png(folder, 16, 2, (RGB.astype(np.uint16) * 257).astype(">u2"))


FORMATS: dict[str, tuple[Save, dict[str, Any], tuple[int, int, int], int]] = {
    # name: how it is saved, settings, the pixels at the three places, by how much a lossy format may be off
    "png, grey": (saved(lambda: of(BASE), "x.png"), {}, PICTURE, 0),
    "png, colour": (saved(lambda: of(RGB), "x.png"), {}, PICTURE, 0),
    "png, one bit": (saved(lambda: of(BASE).convert("1", dither=0), "x.png"), {}, (255, 0, 255), 0),
    "tiff, one bit": (saved(lambda: of(BASE).convert("1", dither=0), "x.tif"), {}, (255, 0, 255), 0),
    "png, palette": (saved(lambda: of(RGB).quantize(8), "x.png"), {}, PICTURE, 0),
    "png, 16 bits": (saved(lambda: of(WIDE * 257), "x.png"), {}, PICTURE, 0),
    "png, 16 bits, low byte": (saved(lambda: of(WIDE * 256 + 255), "x.png"), {}, PICTURE, 0),
    "png, 16 bits, full range": (
        saved(lambda: of(WIDE * 257), "x.png"), {"value_range": [0, 65535]}, PICTURE, 0
    ),
    "png, 12 bits in 16": (saved(lambda: of(WIDE * 16), "x.png"), {"value_range": [0, 4095]}, PICTURE, 0),
    "png, 10 bits in 16": (saved(lambda: of(WIDE * 4), "x.png"), {"value_range": [0, 1023]}, PICTURE, 0),
    "png, 14 bits in 16": (saved(lambda: of(WIDE * 64), "x.png"), {"value_range": [0, 16383]}, PICTURE, 0),
    "png, 12 bits read as 16": (saved(lambda: of(WIDE * 16), "x.png"), {}, (15, 2, 12), 0),
    "png, 8 bits stretched": (saved(lambda: of(BASE), "x.png"), {"value_range": [40, 200]}, (255, 0, 255), 0),
    "png, masks of 0 and 1": (
        saved(lambda: of((BASE > 100).astype(np.uint8)), "x.png"), {"value_range": [0, 1]}, (255, 0, 255), 0
    ),
    "tiff, 16 bits": (saved(lambda: of(WIDE * 257), "x.tif"), {}, PICTURE, 0),
    "tiff, 16 bits, deflated": (
        saved(lambda: of(WIDE * 257), "x.tif", compression="tiff_adobe_deflate"), {}, PICTURE, 0
    ),
    "tiff, 16 bits, big-endian": (
        saved(lambda: Image.frombytes("I;16B", (SIDE, SIDE), (WIDE * 257).astype(">u2").tobytes()), "x.tif"),
        {}, PICTURE, 0,
    ),
    "tiff, 16 bits, white is zero": (
        raw_tiff(16, (65535 - WIDE * 257).astype("<u2").tobytes(), photometric=0), {}, PICTURE, 0
    ),
    "tiff, 8 bits, white is zero": (raw_tiff(8, (255 - BASE).tobytes(), photometric=0), {}, PICTURE, 0),
    "tiff, 12 bits packed": (raw_tiff(12, packed_12(WIDE * 16)), {}, PICTURE, 0),
    "tiff, 12 bits packed, range given": (
        raw_tiff(12, packed_12(WIDE * 16)), {"value_range": [0, 4095]}, PICTURE, 0
    ),
    "tiff, signed 16 bits": (
        raw_tiff(16, (WIDE.astype("<i2") - 100).tobytes(), sample_format=2),
        {"value_range": [-100, 155]}, PICTURE, 0,
    ),
    "tiff, float in 0 to 1": (
        saved(lambda: of((BASE / 255).astype(np.float32)), "x.tif"), {"value_range": [0, 1]}, PICTURE, 0
    ),
    "tiff, float in -1 to 1": (
        saved(lambda: of((BASE / 127.5 - 1).astype(np.float32)), "x.tif"), {"value_range": [-1, 1]},
        PICTURE, 0,
    ),
    "tiff, float in 0 to 255": (
        saved(lambda: of(BASE.astype(np.float32)), "x.tif"), {"value_range": [0, 255]}, PICTURE, 0
    ),
    "tiff, float beyond the range": (
        saved(lambda: of((BASE / 100).astype(np.float32)), "x.tif"), {"value_range": [0, 1]},
        (255, 102, 255), 0,
    ),
    "tiff, 32 bits": (
        saved(lambda: of(BASE.astype(np.int32)), "x.tif"), {"value_range": [0, 255]}, PICTURE, 0
    ),
    "tiff, 32 bits, large values": (
        saved(lambda: of(BASE.astype(np.int32) * 2**16), "x.tif"), {"value_range": [0, 2**24 - 1]}, PICTURE, 0
    ),
    "tiff, several pages": (
        saved(lambda: of(BASE), "x.tif", save_all=True, append_images=[of(255 - BASE)]), {}, PICTURE, 0
    ),
    "tiff, CMYK": (saved(lambda: of(RGB).convert("CMYK"), "x.tif"), {}, PICTURE, 0),
    "jpeg, CMYK": (saved(lambda: of(RGB).convert("CMYK"), "x.jpg", quality=100), {}, PICTURE, 4),
    "jpeg": (saved(lambda: of(RGB), "x.jpg", quality=100), {}, PICTURE, 4),
    "jpeg, grey": (saved(lambda: of(BASE), "x.jpg", quality=100), {}, PICTURE, 4),
    "jpeg, progressive": (saved(lambda: of(RGB), "x.jpg", quality=100, progressive=True), {}, PICTURE, 4),
    "jpeg, large letters": (saved(lambda: of(RGB), "X.JPG", quality=100), {}, PICTURE, 4),
    "jpeg named png": (saved(lambda: of(RGB), "x.png", format="JPEG", quality=100), {}, PICTURE, 4),
    "gif, animated": (animated, {}, PICTURE, 0),
    "webp, lossless": (saved(lambda: of(RGB), "x.webp", lossless=True), {}, PICTURE, 0),
    "bmp": (saved(lambda: of(RGB), "x.BMP"), {}, PICTURE, 0),
    "jpeg 2000": (saved(lambda: of(RGB), "x.jp2"), {}, PICTURE, 0),
    "jpeg 2000, 16 bits": (saved(lambda: of(WIDE * 257), "x.jp2"), {}, PICTURE, 0),
    "jpeg 2000, 12 bits in 16": (
        saved(lambda: of(WIDE * 16), "x.jp2"), {"value_range": [0, 4095]}, PICTURE, 0
    ),
    "jpeg 2000, 12 bits": (jpeg_2000(12), {}, PICTURE, 0),
    "jpeg 2000, 12 bits, range given": (jpeg_2000(12), {"value_range": [0, 4095]}, PICTURE, 0),
    "jpeg 2000, half of 13 bits": (jpeg_2000(13), {"value_range": [0, 4095]}, PICTURE, 0),
    "jpeg 2000, signed 13 bits": (jpeg_2000(13, signed=True), {"value_range": [0, 4095]}, PICTURE, 0),
    "avif": (saved(lambda: of(RGB), "x.avif", quality=100), {}, PICTURE, 4),
    "pgm": (saved(lambda: of(BASE), "x.pgm"), {}, PICTURE, 0),
    "pgm, 12 bits": (pgm_of_12_bits, {}, PICTURE, 1),
    "pgm, 12 bits, range given": (pgm_of_12_bits, {"value_range": [0, 4095]}, PICTURE, 1),
    "pgm, 12 bits in 16": (pgm(65535, WIDE * 16), {"value_range": [0, 4095]}, PICTURE, 0),
    "pgm, 8 bits stretched": (pgm(255, BASE), {"value_range": [40, 200]}, (255, 0, 255), 0),
    "pgm, 51 levels": (pgm(51, BASE // 5), {}, PICTURE, 0),
    "png, 4 bits": (png_of_4_bits, {}, (255, 34, 187), 0),
    "tiff, unsigned 32 bits": (
        raw_tiff(32, (BASE.astype("<u4") * 2**24).tobytes()), {"value_range": [0, 2**32 - 1]}, PICTURE, 0
    ),
    "png, 16 bits a colour": (colour_of_16_bits, {}, PICTURE, 0),
    "tga": (saved(lambda: of(RGB), "x.tga"), {}, PICTURE, 0),
    **{
        f"png, EXIF {number}": (turned(lambda: of(BASE), number, "x.png"), {}, PICTURE, 0)
        for number in (2, 3, 4, 5, 6, 7, 8)
    },
    "jpeg, EXIF 6": (turned(lambda: of(RGB), 6, "x.jpg", quality=100), {}, PICTURE, 4),
    "png, 16 bits, EXIF 8": (turned(lambda: of(WIDE * 257), 8, "x.png"), {}, PICTURE, 0),
    "png, transparency on white": (saved(lambda: with_holes("RGBA"), "x.png"), {}, (255, 40, 255), 0),
    "png, transparency on black": (
        saved(lambda: with_holes("RGBA"), "x.png"), {"background": "black"}, (255, 40, 0), 0
    ),
    "png, transparency on grey": (
        saved(lambda: with_holes("RGBA"), "x.png"), {"background": "grey"}, (255, 40, 128), 0
    ),
    "png, transparency on a colour": (
        saved(lambda: with_holes("RGBA"), "x.png"), {"background": "#646464"}, (255, 40, 100), 0
    ),
    "png, grey and alpha": (saved(lambda: with_holes("LA"), "x.png"), {}, (255, 40, 255), 0),
    "png, opaque alpha": (saved(lambda: of(RGB).convert("RGBA"), "x.png"), {}, PICTURE, 0),
    "png, grey with a transparent value": (
        saved(lambda: of(BASE), "x.png", transparency=40), {}, (255, 255, 200), 0
    ),
    "png, 16 bits with a transparent value": (
        saved(lambda: of(WIDE * 257), "x.png", transparency=40 * 257), {}, (255, 255, 200), 0
    ),
    "png, palette with alpha": (
        saved(lambda: of(RGB).quantize(8), "x.png", transparency=bytes([255] * 8)), {}, PICTURE, 0
    ),
    "png, alpha under a range": (
        saved(lambda: with_holes("RGBA"), "x.png"), {"value_range": [40, 255]}, (255, 0, 255), 0
    ),
    "webp, transparency": (
        saved(lambda: with_holes("RGBA"), "x.webp", lossless=True), {}, (255, 40, 255), 0
    ),
    "gif, transparency": (
        saved(lambda: of(np.where(BASE == 40, 0, 1).astype(np.uint8)).convert("P"), "x.gif", transparency=0),
        {}, (1, 255, 1), 0,
    ),
    "tiff, premultiplied": (premultiplied, {}, (227, 227, 0), 2),
}  # fmt: skip


def read(folder: Path, save: Save, **settings: Any) -> np.ndarray:
    (folder / "a").mkdir(parents=True)
    save(folder / "a")
    data = config(folder, channels=1, **settings)
    data.image_size = SIDE
    return load(data, PathsConfig(cache=str(folder / "cache"))).train.images[0, 0]


@pytest.mark.parametrize("name", FORMATS)
def test_the_picture_is_the_same_in_every_format(tmp_path: Path, name: str) -> None:
    save, settings, expected, tolerance = FORMATS[name]
    found = read(tmp_path / "set", save, **settings)
    values = np.array([found[1, 1], found[12, 2], found[12, 14]], np.int64)
    assert np.abs(values - expected).max() <= tolerance, values


REFUSED: dict[str, tuple[Save, dict[str, Any], str]] = {
    "float without a range": (
        saved(lambda: of((BASE / 255).astype(np.float32)), "x.tif"), {},
        "data.value_range=null: {} holds floating-point numbers, which have no range of their own; expected "
        "the values of black and white, such as data.value_range=[0,1]",
    ),
    "32 bits without a range": (
        saved(lambda: of(BASE.astype(np.int32)), "x.tif"), {},
        "data.value_range=null: {} holds signed whole numbers or 32 bits a value, which have no range of "
        "their own; expected the values of black and white, such as data.value_range=[0,255]",
    ),
    "signed 16 bits without a range": (
        raw_tiff(16, (WIDE.astype("<i2") - 100).tobytes(), sample_format=2), {},
        "data.value_range=null: {} holds signed whole numbers or 32 bits a value, which have no range of "
        "their own; expected the values of black and white, such as data.value_range=[0,255]",
    ),
    "8 bits with the range of 12": (
        saved(lambda: of(BASE), "x.png"), {"value_range": [0, 4095]},
        "data.value_range=[0,4095]: {} holds 8 bits a value; expected two numbers from 0 to 255, or null",
    ),
    "16 bits of colour with a range": (
        colour_of_16_bits,
        {"value_range": [0, 4095]},
        "data.value_range=[0,4095]: {} holds 16 bits a colour, of which only the upper 8 are read; expected "
        "null, and images written as 8 bits a colour, or over all 16",
    ),
    "a PPM of 16 bits of colour with a range": (
        colour_ppm,
        {"value_range": [0, 4095]},
        "data.value_range=[0,4095]: {} holds 16 bits a colour, of which only the upper 8 are read; expected "
        "null, and images written as 8 bits a colour, or over all 16",
    ),
    "a PGM below 255 with a range": (
        pgm(51, BASE // 5), {"value_range": [0, 51]},
        "data.value_range=[0,51]: {} holds a PGM, which says its range itself (0 to 51); expected null",
    ),
    "a PGM of 12 bits with another range": (
        pgm_of_12_bits, {"value_range": [0, 1023]},
        "data.value_range=[0,1023]: {} holds a PGM, which says its range itself (0 to 4095); expected null",
    ),
    "4 bits with a range": (
        png_of_4_bits, {"value_range": [0, 15]},
        "data.value_range=[0,15]: {} holds fewer than 8 bits a value, which are spread over the whole scale; "
        "expected null",
    ),
    "float that is no number": (
        saved(lambda: of(np.full((SIDE, SIDE), np.nan, np.float32)), "x.tif"), {"value_range": [0, 1]},
        "data.source: {} is no image that can be read: values that are no finite numbers",
    ),
    "signed 8 bits": (
        raw_tiff(8, BASE.tobytes(), sample_format=2), {},
        "data.source: {} is no image that can be read: signed whole numbers of 8 bits",
    ),
    "LAB": (
        saved(lambda: Image.frombytes("LAB", (SIDE, SIDE), RGB.tobytes()), "x.tif"), {},
        "data.source: {} is no image that can be read: the colour space LAB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_range_is_refused_with_what_to_write(tmp_path: Path, name: str) -> None:
    save, settings, said = REFUSED[name]
    (tmp_path / "set/a").mkdir(parents=True)
    save(tmp_path / "set/a")
    (path,) = (tmp_path / "set/a").iterdir()
    assert refused(config(tmp_path / "set", channels=1, **settings)) == said.format(path)


def test_transparency_is_said_once_and_only_where_it_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set/a").mkdir(parents=True)
    for i in range(3):
        with_holes("RGBA").save(tmp_path / f"set/a/{i}.png")
    load(config(tmp_path / "set"), PathsConfig())
    assert capsys.readouterr().err == "data: images with transparency are laid on white (data.background)\n"
    load(config(tmp_path / "set", background="black"), PathsConfig())
    assert "laid on black" in capsys.readouterr().err
    read(tmp_path / "opaque", saved(lambda: of(RGB).convert("RGBA"), "x.png"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("values", "low", "high", "expected"),
    [
        (np.array([0, 255, 256, 65535], np.uint16), 0, 65535, [0, 0, 1, 255]),
        (np.array([0, 15, 16, 4095], np.uint16), 0, 4095, [0, 0, 1, 255]),
        (np.array([0, 1, 7], np.uint8), 0, 1, [0, 255, 255]),
        (np.array([-1000, -500, 400], np.int32), -1000, 400, [0, 91, 255]),
        (np.array([0.0, 0.5, 1.0, 2.0, -3.0], np.float32), 0, 1, [0, 128, 255, 255, 0]),
        (np.arange(256, dtype=np.int32), 0, 255, list(range(256))),
    ],
)
def test_values_become_bytes(values: np.ndarray, low: float, high: float, expected: list[int]) -> None:
    assert to_bytes(values, low, high).tolist() == expected


def test_names_of_backgrounds() -> None:
    assert [background_of(name) for name in ("white", "#0a0B0c", "#12", "red")] == [
        (255, 255, 255), (10, 11, 12), None, None,
    ]  # fmt: skip
    assert name_of((255, 255, 255)) == "white" and name_of((10, 11, 12)) == "#0a0b0c"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "JPEG2000", "AVIF", "PPM"])
def test_a_file_with_changed_bytes_is_read_or_refused_in_one_line(kind: str) -> None:
    """Whatever Pillow raises: 100 files, each with a few random bytes or cut short."""
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    buffer = io.BytesIO()
    of(RGB).save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
    for number in range(100):
        content = bytearray(buffer.getvalue())
        for place in random.integers(0, min(300, len(content)), 3):
            content[place] = random.integers(0, 256)
        whole = bytes(content[: random.integers(1, len(content))] if number % 4 == 0 else content)
        said = "read"
        try:
            Preprocessing(8, 1).read(whole, "x", "data")
        except UserError as error:
            said = str(error)
        assert said == "read" or said.startswith("data.source: x is no image that can be read: ")


def test_odd_exif_does_not_matter(tmp_path: Path) -> None:
    """An orientation beside values that cannot be written again."""
    exif = Image.Exif()
    exif[0x0112], exif[0x9999] = 6, "?"
    turned_back = of(RGB).transpose(Image.Transpose.ROTATE_90)
    found = read(tmp_path / "set", lambda folder: turned_back.save(folder / "x.png", exif=exif))
    assert (found[1, 1], found[12, 2], found[12, 14]) == PICTURE
