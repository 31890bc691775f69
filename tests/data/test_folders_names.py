"""Folders and files whose names or contents mislead: one line says what they are."""

from __future__ import annotations

import os
import struct
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data.images import Preprocessing
from dp_lora.data.pixels import Damaged, shown
from dp_lora.data.sets import load
from tests.builders.image_files import config, refused, write_parquet
from tests.builders.image_folders import both, image, link, put, roles, two

NFC, NFD = (unicodedata.normalize(form, "m\u00fcde") for form in ("NFC", "NFD"))
NO_NAME = (
    "has a name that is not UTF-8, or characters that cannot be printed; expected text, since the names of "
    "classes are released"
)
SAME = "are the same folder by a link; expected each image in one place"
REFUSED: dict[str, tuple[Any, str]] = {
    "no width": (
        lambda f: two(f, ("cat", "cat\u200b")), "data.source: class folder {}/cat\\u200b " + NO_NAME
    ),
    "right to left": (
        lambda f: two(f, ("cat", "\u202egod")), "data.source: class folder {}/\\u202egod " + NO_NAME
    ),
    "line separator": (
        lambda f: two(f, ("cat", "dog\u2028x")), "data.source: class folder {}/dog\\u2028x " + NO_NAME
    ),
    "one name in two forms": (
        lambda f: two(f, (NFC, NFD)),
        "data.source: classes 'mu\\u0308de' and 'm\\xfcde' read the same; expected one of them",
    ),
    "two forms in two roles": (
        lambda f: (two(f / "train", ("cat", NFC)), two(f / "test", (NFD,))),
        "data.source: classes 'm\\xfcde' and 'mu\\u0308de' read the same; expected one of them",
    ),
    "a space at the end": (
        lambda f: two(f, ("cat", "cat ")),
        "data.source: classes 'cat' and 'cat ' read the same; expected one of them",
    ),
    "a class linked twice": (
        both(two, lambda f: link(f, "cat", "katze")), "data.source: {}/cat and {}/katze " + SAME
    ),
    "a role linked twice": (
        both(lambda f: roles(f, "train"), lambda f: link(f, "train", "val")),
        "data.source: {}/train and {}/val " + SAME,
    ),
    "a training class that tests": (
        both(lambda f: roles(f, "train", "test"), lambda f: link(f, "../train/cat", "test/cow"),
             lambda f: two(f / "train", ("cow",))),
        "data.source: {}/train/cat and {}/test/cow " + SAME,
    ),
    "patients in classes": (
        lambda f: (image(f / "NORMAL/patient0/0.png"), image(f / "PNEUMONIA/patient1/0.png")),
        "data.source: class folder {}/NORMAL holds the folder patient0; expected images directly in each "
        "class folder",
    ),
    "train_images": (
        lambda f: roles(f, "train_images", "test_images"),
        "data.source={}: class folders lie in test_images, train_images; if these are roles, rename them to "
        "train, validation, test",
    ),
    "seg_train": (
        lambda f: roles(f, "seg_train", "seg_test", "seg_pred"),
        "data.source={}: class folders lie in seg_test, seg_train; if these are roles, rename them to train, "
        "validation, test",
    ),
    "captions": (
        both(two, lambda f: put(f / "cat/0.txt", "a cat")),
        "data.source: {}/cat/0.txt: a caption beside an image; expected images alone, or "
        "data.caption_column=txt, with which a text-to-image model is trained",
    ),
    "an archive": (lambda f: None, "data.source={}.zip: an archive, which has to be unpacked; expected a "),
    "one image": (lambda f: None, "data.source={}.png: one image; expected a folder of class folders"),
    "an address": (
        lambda f: None, "data.source=https://x.org/a.zip: an address, from which nothing is fetched; "
    ),
}  # fmt: skip
ELSEWHERE = {"an archive": "{}.zip", "one image": "{}.png", "an address": "https://x.org/a.zip"}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, said = REFUSED[name]
    folder = tmp_path / "set"
    make(folder)
    put(Path(f"{folder}.zip"))
    put(Path(f"{folder}.png"))
    source = ELSEWHERE.get(name, "{}").replace("{}", str(folder))
    found = refused(DataConfig("imagefolder", source=source, image_size=8))
    expected = said.replace("{}", str(folder))
    assert found.startswith(expected) if name in ELSEWHERE else found == expected


@pytest.mark.parametrize("name", ["#recycle", "$RECYCLE.BIN", "System Volume Information", "__pycache__"])
def test_what_systems_leave_behind_is_no_class(tmp_path: Path, name: str) -> None:
    image(two(tmp_path / "set") / name / "0.png")
    put(tmp_path / "set/cat/Icon\r", "")
    assert load(config(tmp_path / "set"), PathsConfig()).train.classes == ("cat", "dog")


def test_classes_of_tables_have_names_that_can_be_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, 4, named=False, label=["cat", "cat ", "cat", "cat "])
    assert refused(config(path)) == (
        "data.label_column=null: classes 'cat' and 'cat ' read the same; expected one of them"
    )
    write_parquet(path, 4, named=False, label=["cat", "d\u200b", "cat", "d\u200b"])
    assert refused(config(path)).startswith("data.label_column=null: class 'd\\\\u200b' has characters that ")


def tiff_of(bits: int, colours: int = 1) -> bytes:
    """The beginning of a TIFF of floating-point numbers."""
    entries = [
        (256, 3, 1), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, colours),
        (278, 3, 1), (279, 4, bits * colours // 8), (339, 3, 3),
    ]  # fmt: skip
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(entries)) + packed + bytes(4)


KINDS = {
    "DICOM": (bytes(128) + b"DICM\2\0" + bytes(range(200)), "DICOM; expected its pixels as PNG or TIFF"),
    "NIfTI": (
        struct.pack("<I", 348) + bytes(340) + b"n+1\0\xff",
        "NIfTI, a volume; expected its slices as PNG or TIFF"
    ),
    "npy": (b"\x93NUMPY\1\0v\0", "an array of NumPy (.npy); expected PNG or TIFF"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\xff", "HDF5; expected PNG or TIFF, or a parquet file"),
    "MP4": (b"\0\0\0\x18ftypisom\xff", "a film (MP4); expected single images"),
    "7z": (b"7z\xbc\xaf\x27\x1c\xff", "a 7z archive"),
    "rar": (b"Rar!\x1a\7\xff", "a rar archive"),
    "CR2": (b"II*\0\x10\0\0\0CR\2\0\xff", "a raw file of a camera; expected PNG or JPEG"),
    "64 bits": (
        tiff_of(64), "a TIFF of 64-bit floating-point numbers, expected 32 bits and one value a pixel"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named(kind: str) -> None:
    content, why = KINDS[kind]
    with pytest.raises(Damaged) as caught:
        Preprocessing(8, 1).read(content, "x", "data")
    assert str(caught.value) == f"data.source: x is no image that can be read: {why}"


def test_a_raw_file_is_not_read_as_the_small_picture_in_it(tmp_path: Path) -> None:
    two(tmp_path / "set")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "set/cat/9.dng", format="TIFF")
    assert refused(config(tmp_path / "set")).endswith(
        "9.dng is no image that can be read: a raw file of a camera; expected PNG or JPEG"
    )


def test_what_no_terminal_shows_is_escaped() -> None:
    assert shown("a\u200bb\u202e\x85\U000e0001") == r"a\u200bb\u202e\x85\U000e0001"
    assert shown(os.fsdecode(b"\xff")) == r"\xff"
