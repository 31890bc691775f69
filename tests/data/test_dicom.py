"""DICOM files: the window that a file states, its slope and intercept, and what is refused."""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_lora.config.schema import PathsConfig
from dp_lora.data.digests import pixel_digest
from dp_lora.data.sets import load
from dp_lora.errors import PrivateRefusal
from tests.builders.image_files import config, refused
from tests.builders.image_folders import put, two

PLAIN = "1.2.840.10008.1.2.1"
"""Explicit little endian, not packed."""


def encapsulated(frame: bytes) -> bytes:
    pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate

    return bytes(encapsulate([frame]))


def write_dicom(path: Path, values: np.ndarray, syntax: str = PLAIN, **fields: Any) -> Path:
    """A DICOM file of [H, W] or [H, W, 3]; `fields` are added, or left out where they are None."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    file.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    file.file_meta.TransferSyntaxUID = syntax
    bits = values.dtype.itemsize * 8
    colours = values.shape[2] if values.ndim == 3 else 1
    standard = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "SOPInstanceUID": "1.2.3.4", "Modality": "CT",
        "Rows": values.shape[0], "Columns": values.shape[1], "SamplesPerPixel": colours,
        "PhotometricInterpretation": "MONOCHROME2" if colours == 1 else "RGB",
        "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
        "PixelRepresentation": int(values.dtype.kind == "i"), "PixelData": values.tobytes(),
        **({"PlanarConfiguration": 0} if colours > 1 else {}),
    }  # fmt: skip
    for name, value in {**standard, **fields}.items():
        if value is not None:
            setattr(file, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, file, enforce_file_format=True)
    return path


def read(folder: Path, **settings: Any) -> np.ndarray:
    """The grey values [8, 8] of the one image in `folder`, as they are trained on."""
    (image,) = load(config(folder, channels=1, **settings), PathsConfig()).train.images
    return image[0]


def columns(*values: int, dtype: type = np.uint16) -> np.ndarray:
    """[8, 8]: each value in the rows of one column or, of fewer than eight, of several."""
    return np.repeat(np.array([values], dtype), 8, axis=0).repeat(8 // len(values), axis=1)


WINDOWED: dict[str, tuple[np.ndarray, dict[str, Any], list[int]]] = {
    # values of eight columns, what the file says, the grey values by hand
    # PS3.3 C.11.2.1.2: c = 100, w = 51, so that 74.5 - 0.5 ... 99.5 + 25 are black and white: 255 / 50 a unit
    "a window": (
        columns(0, 74, 75, 99, 100, 124, 125, 4095), {"WindowCenter": 100, "WindowWidth": 51},
        [0, 0, 3, 125, 130, 252, 255, 255],
    ),
    "the first of two windows": (
        columns(0, 74, 75, 99, 100, 124, 125, 4095), {"WindowCenter": [100, 9], "WindowWidth": [51, 2]},
        [0, 0, 3, 125, 130, 252, 255, 255],
    ),
    # Stored values minus 1024 are Hounsfield units; the window of soft tissue: 40 +- 200 by 399
    "slope and intercept": (
        columns(0, 864, 865, 1063, 1064, 1262, 1263, 4000, dtype=np.int16),
        {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400},
        [0, 0, 1, 127, 128, 254, 255, 255],
    ),
    "signed values": (
        columns(-2000, -160, -159, 39, 40, 238, 239, 3000, dtype=np.int16),
        {"WindowCenter": 40, "WindowWidth": 400}, [0, 0, 1, 127, 128, 254, 255, 255],
    ),
    "a slope that is no whole number": (
        columns(0, 0, 10, 10, 20, 20, 30, 30),
        {"RescaleSlope": 0.5, "RescaleIntercept": 1, "WindowCenter": 9, "WindowWidth": 16},
        # 1, 6, 11, 16 in the window from 1 to 16: 17 a unit
        [0, 0, 85, 85, 170, 170, 255, 255],
    ),
    "white is zero": (
        columns(0, 74, 75, 99, 100, 124, 125, 4095),
        {"WindowCenter": 100, "WindowWidth": 51, "PhotometricInterpretation": "MONOCHROME1"},
        [255, 255, 252, 130, 125, 3, 0, 0],
    ),
    # C.11.2.1.3.2: from 75 to 125, both ends included
    "an exact window": (
        columns(0, 75, 80, 101, 110, 121, 125, 4095),
        {"WindowCenter": 100, "WindowWidth": 50, "VOILUTFunction": "LINEAR_EXACT"},
        [0, 0, 26, 133, 178, 235, 255, 255],
    ),
    # C.11.2.1.3.1: 255 / (1 + exp(-4 (x - 100) / 40)); at 90: 1 / (1 + e), at 110: e / (1 + e)
    "a sigmoid": (
        columns(0, 0, 90, 90, 100, 100, 110, 110),
        {"WindowCenter": 100, "WindowWidth": 40, "VOILUTFunction": "SIGMOID"},
        [0, 0, 69, 69, 128, 128, 186, 186],
    ),
    "a window of one value": (
        columns(0, 4, 5, 6, 7, 8, 9, 4095), {"WindowCenter": 6, "WindowWidth": 1},
        [0, 0, 0, 255, 255, 255, 255, 255],
    ),
    # Without a window, what 12 bits hold: 16 values for each of 256 levels
    "no window": (
        columns(0, 15, 16, 2047, 2048, 4079, 4080, 4095), {"BitsStored": 12, "HighBit": 11},
        [0, 0, 1, 127, 128, 254, 255, 255],
    ),
    "no window, signed": (
        columns(-2048, -2033, -2032, -1, 0, 2031, 2032, 2047, dtype=np.int16),
        {"BitsStored": 12, "HighBit": 11}, [0, 0, 1, 127, 128, 254, 255, 255],
    ),
    "a drawing in the bits above": (
        columns(0x8000, 0x800F, 16, 2047, 2048, 4079, 4080, 0x8FFF), {"BitsStored": 12, "HighBit": 11},
        [0, 0, 1, 127, 128, 254, 255, 255],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_of_the_file_says_black_and_white(tmp_path: Path, name: str) -> None:
    values, fields, expected = WINDOWED[name]
    write_dicom(tmp_path / "set/ct/0.dcm", values, **fields)
    assert read(tmp_path / "set").tolist() == [expected] * 8


def test_the_settings_come_before_the_window(tmp_path: Path) -> None:
    """The range is in units of the modality, here Hounsfield's."""
    values = columns(0, 24, 26, 523, 525, 1022, 1024, 2024)
    window = {"WindowCenter": 40, "WindowWidth": 400, "RescaleIntercept": -1024, "RescaleSlope": 1}
    write_dicom(tmp_path / "set/ct/0.dcm", values, **window)
    # From -1000 to 0: 255 / 1000 a unit
    assert read(tmp_path / "set", value_range=[-1000, 0])[0].tolist() == [0, 0, 1, 127, 128, 254, 255, 255]


def test_colours_are_those_of_the_file(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 3), np.uint8)
    values[..., 0], values[..., 2] = 200, 40
    write_dicom(tmp_path / "set/us/0.dcm", values)
    (image,) = load(config(tmp_path / "set"), PathsConfig()).train.images
    assert [set(channel.ravel().tolist()) for channel in image] == [{200}, {0}, {40}]
    assert refused(config(tmp_path / "set", value_range=[0, 100])) == (
        f"data.value_range=[0,100]: {tmp_path}/set/us/0.dcm holds the colours of a DICOM file; expected null"
    )


def table(first: int, depth: int, *entries: int) -> Any:
    """A sequence of one lookup table, from the value `first` on."""
    pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset

    found = Dataset()
    found.LUTDescriptor = [len(entries), first, depth]
    found.LUTData = np.array(entries, "<u2").tobytes()
    return [found]


def test_a_table_may_stand_in_place_of_a_window(tmp_path: Path) -> None:
    """Values below and above a table have its first and its last entry; 12 bits are 16 values a level."""
    values = columns(0, 5, 6, 7, 8, 9, 10, 99)
    write_dicom(tmp_path / "set/dx/0.dcm", values, VOILUTSequence=table(6, 12, 16, 160, 1600, 4095))
    assert read(tmp_path / "set")[0].tolist() == [1, 1, 1, 10, 100, 255, 255, 255]


def test_a_table_may_stand_in_place_of_slope_and_intercept(tmp_path: Path) -> None:
    values = columns(0, 1, 2, 3)
    write_dicom(tmp_path / "set/dx/0.dcm", values, ModalityLUTSequence=table(0, 16, 2560, 25600, 256, 65535))
    assert read(tmp_path / "set")[0].tolist() == [10, 10, 100, 100, 1, 1, 255, 255]


def test_a_palette_has_colours(tmp_path: Path) -> None:
    fields: dict[str, Any] = {}
    for name, entries in (("Red", (0, 255)), ("Green", (128, 0)), ("Blue", (7, 9))):
        fields[f"{name}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        deep = np.array(entries, "<u2") * 257  # 16 bits of which either byte says it all
        fields[f"{name}PaletteColorLookupTableData"] = deep.astype("<u2").tobytes()
    values = columns(0, 1, dtype=np.uint8)
    write_dicom(tmp_path / "set/us/0.dcm", values, PhotometricInterpretation="PALETTE COLOR", **fields)
    (image,) = load(config(tmp_path / "set"), PathsConfig()).train.images
    assert image[:, 0, 0].tolist() == [0, 128, 7]
    assert image[:, 0, 7].tolist() == [255, 0, 9]


def test_luminance_and_chrominance_become_colours(tmp_path: Path) -> None:
    """ITU-R BT.601: pure red has the luminance 76 and the chrominances 85 and 255, rounded."""
    values = np.full((8, 8, 3), (76, 85, 255), np.uint8)
    write_dicom(tmp_path / "set/us/0.dcm", values, PhotometricInterpretation="YBR_FULL")
    (image,) = load(config(tmp_path / "set"), PathsConfig()).train.images
    assert np.abs(image[:, 4, 4].astype(int) - (255, 0, 0)).max() <= 1


def test_an_image_draws_its_role_by_its_stored_values(tmp_path: Path) -> None:
    """Not by its name, its window, its slope or the settings."""
    values = columns(0, 74, 75, 99, 100, 124, 125, 4095)
    write_dicom(tmp_path / "set/ct/0.dcm", values, WindowCenter=100, WindowWidth=51)
    write_dicom(tmp_path / "set/ct/other", values, WindowCenter=0, WindowWidth=5, RescaleSlope=2)
    train = load(config(tmp_path / "set", value_range=[0, 9]), PathsConfig()).train
    assert train.digests is not None
    assert [digest.tobytes() for digest in train.digests] == [pixel_digest(values)] * 2


def test_files_without_an_ending_and_in_archives_are_known(tmp_path: Path) -> None:
    values = columns(0, 74, 75, 99, 100, 124, 125, 4095)
    path = write_dicom(tmp_path / "set/ct/IM0001", values, WindowCenter=100, WindowWidth=51)
    expected = [[0, 0, 3, 125, 130, 252, 255, 255]] * 8
    assert read(tmp_path / "set").tolist() == expected
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.write(path, "ct/IM0001.dcm")
    assert read(tmp_path / "set.zip").tolist() == expected
    shutil.move(path, tmp_path / "flat.dcm")
    put(tmp_path / "flat/0.dcm", (tmp_path / "flat.dcm").read_bytes())
    assert read(tmp_path / "flat").tolist() == expected


def test_what_is_no_single_image_is_listed(tmp_path: Path) -> None:
    values = columns(0, 1)
    write_dicom(tmp_path / "set/ct/a.dcm", np.stack([values] * 3).reshape(24, 8), Rows=8, NumberOfFrames=3)
    write_dicom(tmp_path / "set/ct/b.dcm", values, PixelData=None)
    path = write_dicom(tmp_path / "set/ct/c.dcm", values)
    path.write_bytes(path.read_bytes()[:-20])
    put(tmp_path / "set/ct/d.dcm", bytes(range(128, 256)))
    write_dicom(tmp_path / "set/ct/e.dcm", values, WindowCenter=5)
    write_dicom(tmp_path / "set/ct/g.dcm", values, WindowCenter=5, WindowWidth=0)
    write_dicom(tmp_path / "set/ct/h.dcm", values, RescaleSlope=0, RescaleIntercept=7)
    lossless = "1.2.840.10008.1.2.4.70"
    write_dicom(tmp_path / "set/ct/f.dcm", values, syntax=lossless, PixelData=encapsulated(b"\xff\xd8\xff"))
    with pytest.raises(PrivateRefusal) as caught:
        read(tmp_path / "set")
    folder = f"  {tmp_path}/set/ct"
    assert str(caught.value).split("\n") == [
        "data.source: 8 files are no images that can be read:",
        f"{folder}/a.dcm: DICOM with 3 frames; expected one image a file",
        f"{folder}/b.dcm: DICOM without an image in it",
        f"{folder}/c.dcm: DICOM that is cut short or damaged",
        f"{folder}/d.dcm: of no format that is known, or cut off at its beginning",
        f"{folder}/e.dcm: DICOM with a window without a width",
        f"{folder}/f.dcm: DICOM in JPEG Lossless, Non-Hierarchical, First-Order Prediction (Process 14 "
        "[Selection Value 1]), which pydicom cannot unpack here",
        f"{folder}/g.dcm: DICOM with a window of width 0",
        f"{folder}/h.dcm: DICOM with a slope of 0, which makes one value of all",
    ]


def test_without_pydicom_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pydicom" else find(name))
    two(tmp_path / "set")
    for name in ("a.dcm", "b"):
        put(tmp_path / "set/cat" / name, bytes(128) + b"DICM" + bytes(20))
    assert refused(config(tmp_path / "set")) == (
        f"data.source: {tmp_path}/set/cat/a.dcm is DICOM, and reading it needs pydicom; get it by `pip "
        "install 'dp-lora[dicom]'`"
    )
