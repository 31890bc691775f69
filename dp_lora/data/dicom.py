"""Images of medicine: DICOM files, read by pydicom, which is an extra (`pip install 'dp-lora[dicom]'`).

Stored values become those of the modality by the file's own slope and intercept (or its table), as Hounsfield
units in computed tomography. Black and white are then those of `data.value_range`, else of the first window
that the file states (DICOM PS3.3, C.11.2), else of the bits that it stores. MONOCHROME1 is inverted.

The digest by which an image draws its role is of the stored values, before all of this.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from dp_lora.data.digests import pixel_digest
from dp_lora.data.pixels import Decoded, Decoding, NoRange, Unreadable, to_bytes
from dp_lora.errors import PrivateRefusal

ENDINGS = (".dcm", ".dicom")
_GREY = ("MONOCHROME1", "MONOCHROME2")


def is_dicom(content: Path | bytes) -> bool:
    """Whether the content begins as DICOM does: DICM behind 128 bytes of anything."""
    if isinstance(content, bytes):
        return content[128:132] == b"DICM"
    with content.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def decode(content: Path | bytes, name: str, field: str, decoding: Decoding) -> Decoded:
    """The image of one frame in a DICOM file, in 8 bits.

    Raises:
        PrivateRefusal: pydicom is not installed.
        Unreadable: there is no image in it, or several, or pydicom cannot unpack it.
        NoRange: `value_range` was given for colours.
        What pydicom raises for a damaged file.
    """
    if importlib.util.find_spec("pydicom") is None:
        raise PrivateRefusal(
            f"{field}.source: {name} is DICOM, and reading it needs pydicom; get it by `pip install "
            "'dp-lora[dicom]'`"
        )
    with warnings.catch_warnings():
        # pydicom warns of every field that is written in an odd way; what an image needs is checked here.
        warnings.simplefilter("ignore")
        return _decoded(content, decoding)


def _decoded(content: Path | bytes, decoding: Decoding) -> Decoded:
    import pydicom
    from PIL import Image

    file = pydicom.dcmread(io.BytesIO(content) if isinstance(content, bytes) else content)
    if "PixelData" not in file and "FloatPixelData" not in file and "DoubleFloatPixelData" not in file:
        raise Unreadable("DICOM without an image in it")
    if (frames := int(file.get("NumberOfFrames") or 1)) != 1:
        raise Unreadable(f"DICOM with {frames} frames; expected one image a file")
    stored = _stored(file)
    kind = str(file.PhotometricInterpretation)
    if kind in _GREY:
        bits = int(file.get("BitsStored", 0)) or stored.dtype.itemsize * 8
        return Decoded(
            Image.fromarray(_grey(file, stored, decoding, bits)),
            pixel_digest(stored),
            False,
            f"DICOM {kind} {bits} bits",
            stored,
        )
    if decoding.value_range is not None:
        raise NoRange("the colours of a DICOM file", "expected null")
    colours = _colours(file, stored, kind)
    return Decoded(Image.fromarray(colours), pixel_digest(colours), False, f"DICOM {kind}", colours)


def _stored(file: Any) -> np.ndarray:
    """The values [H, W] or [H, W, 3] as they are stored, without the bits that are not theirs."""
    import pydicom.pixels

    try:
        values: np.ndarray = pydicom.pixels.pixel_array(file)
    except (RuntimeError, NotImplementedError) as error:  # pydicom's words for a decoder that is not there
        syntax = getattr(file.file_meta.TransferSyntaxUID, "name", "an unknown syntax")
        raise Unreadable(f"DICOM in {syntax}, which pydicom cannot unpack here") from error
    return values


def _grey(file: Any, stored: np.ndarray, decoding: Decoding, bits: int) -> np.ndarray:
    """uint8 [H, W]."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    if file.get("RescaleSlope") == 0:
        raise Unreadable("DICOM with a slope of 0, which makes one value of all")
    values = apply_modality_lut(stored, file)
    if decoding.value_range is not None:
        grey = to_bytes(values, *decoding.value_range)
    elif file.get("WindowCenter") not in (None, ""):
        grey = _windowed(values, file)
    elif "VOILUTSequence" in file:
        depth = int(file.VOILUTSequence[0].LUTDescriptor[2])
        grey = to_bytes(apply_voi(values, file), 0, 2**depth - 1)
    else:
        grey = _whole(file, values, bits)
    return 255 - grey if file.PhotometricInterpretation == "MONOCHROME1" else grey


def _windowed(values: np.ndarray, file: Any) -> np.ndarray:
    """The values through the first window that the file states (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    center, width = (float(_first(file.get(name))) for name in ("WindowCenter", "WindowWidth"))
    function = str(file.get("VOILUTFunction") or "LINEAR")
    if not width > 0 or (function == "LINEAR" and width < 1):
        raise Unreadable(f"DICOM with a window of width {width:g}")
    exact = values.astype(np.float64)
    if function == "SIGMOID":
        with np.errstate(over="ignore"):  # far below the window: exp is infinite and the value 0
            return np.rint(255 / (1 + np.exp(-4 * (exact - center) / width))).astype(np.uint8)
    if function == "LINEAR_EXACT":
        low, high = center - width / 2, center + width / 2
    else:
        low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    if high == low:
        return np.where(exact > low, 255, 0).astype(np.uint8)
    return to_bytes(exact, low, high)


def _first(value: Any) -> Any:
    """The first of several values, or the only one."""
    if value is None or value == "":
        raise Unreadable("DICOM with a window without a width")
    return value if isinstance(value, str | int | float) else value[0]


def _whole(file: Any, values: np.ndarray, bits: int) -> np.ndarray:
    """The values over all that the stored bits can hold, from the lowest to the highest."""
    if "ModalityLUTSequence" in file:
        depth = int(file.ModalityLUTSequence[0].LUTDescriptor[2])
        return to_bytes(values, 0, 2**depth - 1)
    if "PixelData" not in file:
        raise NoRange(
            "floating-point numbers, which have no range of their own",
            "expected the values of black and white, such as data.value_range=[0,1]",
        )
    rescaled = "RescaleSlope" in file and "RescaleIntercept" in file  # neither counts alone
    slope, intercept = (float(file.RescaleSlope), float(file.RescaleIntercept)) if rescaled else (1.0, 0.0)
    first = -(2 ** (bits - 1)) if file.get("PixelRepresentation") else 0
    ends = sorted(slope * end + intercept for end in (first, first + 2**bits - 1))
    return to_bytes(values, *ends)


def _colours(file: Any, stored: np.ndarray, kind: str) -> np.ndarray:
    """uint8 [H, W, 3]."""
    from pydicom.pixels import apply_color_lut

    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, file)
    if stored.dtype == np.uint16 and kind == "PALETTE COLOR":
        stored = (stored >> 8).astype(np.uint8)
    if stored.dtype != np.uint8 or stored.ndim != 3 or stored.shape[2] != 3:
        raise Unreadable(f"DICOM in the colours {kind} of {stored.dtype}; expected 8 bits a colour")
    return stored
