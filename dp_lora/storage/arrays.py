"""Arrays on disk that are made once, shared by many jobs, mapped into memory and verified when opened.

A store is one file in the safetensors format: the length of a JSON header, the header, the arrays one after
the other. Any safetensors reader opens it. It appears whole or not at all; its header holds a digest of the
data; one job at a time makes it while the others wait. Whoever may enter its folder may read it, so stores of
private data belong into a folder of mode 0700; the file itself has mode 0600. What is said about a store
names its folder and not the store, whose name may stand for private content.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dp_lora.storage.files import file_lock, private_directory

FORMAT = "dp-lora arrays 1"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "U8": np.dtype("u1"),
    "I64": np.dtype("<i8"),
}
_ALIGNMENT = 4096
"""The data begins at a multiple of this, so that pages of the file are pages of the arrays."""

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""For each array its dtype (F32, U8 or I64) and its shape."""


class Damaged(Exception):
    """A file that is not the store that was asked for, with the reason."""


def shared(
    folder: Path, key: str, shapes: Shapes, fill: Callable[[dict[str, np.ndarray]], None]
) -> dict[str, np.ndarray]:
    """The arrays of the store `<folder>/<key>.safetensors`, made by `fill` if no job has made them yet.

    A file that is truncated, changed, or of other shapes is said so on stderr and made again. The arrays are
    mapped copy-on-write: what is written to them never reaches the file.

    Args:
        folder: made with mode 0700.
        key: names the content: everything that determines it has to be part of it. Of private content it is
            made by `dp_lora.storage.keyed`.
        shapes: of the arrays.
        fill: writes all values into the arrays it is given, in any order; they are backed by the disk, so
            they may be larger than memory.
    """
    path = private_directory(folder) / f"{key}.safetensors"
    found = _open_or_none(path, key, shapes)
    if found is not None:
        return found

    def waiting() -> None:
        print(f"waiting for another job that makes the same {folder.name}", file=sys.stderr, flush=True)

    with file_lock(private_directory(folder.parent / "locks") / f"{folder.name}-{key}.lock", waiting):
        found = _open_or_none(path, key, shapes)
        if found is None:
            _make(path, key, shapes, fill)
            found = open_store(path, key, shapes)
    return found


def open_store(path: Path, key: str, shapes: Shapes) -> dict[str, np.ndarray]:
    """The arrays of the store at `path`, each of its bytes verified. Raises Damaged, FileNotFoundError."""
    header, start = _read_header(path)
    length, offsets = _layout(shapes)
    expected = _header(key, shapes, offsets, str(header.get("__metadata__", {}).get("sha256")))
    if header != expected:
        raise Damaged("its header is that of another store")
    if path.stat().st_size != start + length:
        raise Damaged(f"{path.stat().st_size} bytes, expected {start + length}")
    if _digest(path, start) != header["__metadata__"]["sha256"]:
        raise Damaged("its content is not what was written (sha256 differs)")
    return _map(path, start, shapes, offsets, "c")


def _open_or_none(path: Path, key: str, shapes: Shapes) -> dict[str, np.ndarray] | None:
    try:
        return open_store(path, key, shapes)
    except FileNotFoundError:
        return None
    except Damaged as damage:
        print(f"{path.parent}: a damaged file: {damage}; it is made again", file=sys.stderr, flush=True)
        return None


def _make(path: Path, key: str, shapes: Shapes, fill: Callable[[dict[str, np.ndarray]], None]) -> None:
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a job that was killed while it held the lock
        left.unlink()
    length, offsets = _layout(shapes)
    blank = _encoded(_header(key, shapes, offsets, "0" * 64))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "r+b") as file:
            file.write(blank)
            file.truncate(len(blank) + length)
            file.flush()
            arrays = _map(temporary, len(blank), shapes, offsets, "r+")
            fill(arrays)
            for array in arrays.values():
                if isinstance(array, np.memmap):
                    array.flush()
            digest = _digest(temporary, len(blank))
            file.seek(0)
            file.write(_encoded(_header(key, shapes, offsets, digest)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _layout(shapes: Shapes) -> tuple[int, dict[str, tuple[int, int]]]:
    """Bytes of all arrays, and of each its first byte and the one behind its last.

    The largest items come first, which aligns all of them: the format has no room for gaps.
    """
    offsets, end = {}, 0
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -_DTYPES[item[1][0]].itemsize):
        begin, end = end, end + _DTYPES[dtype].itemsize * math.prod(shape)
        offsets[name] = (begin, end)
    return end, offsets


def _header(key: str, shapes: Shapes, offsets: Mapping[str, tuple[int, int]], digest: str) -> dict[str, Any]:
    arrays = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets[name])}
        for name, (dtype, shape) in shapes.items()
    }
    return {"__metadata__": {"format": FORMAT, "key": key, "sha256": digest}, **arrays}


def _encoded(header: Mapping[str, Any]) -> bytes:
    """The header behind its length, padded with blanks so that the data begins on a page."""
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = text.ljust(-(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT - 8)
    return len(padded).to_bytes(8, "little") + padded


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the number of the first byte behind it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= 64 * _ALIGNMENT:
            raise Damaged("it has no header")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise Damaged("its header cannot be read") from error
    if not isinstance(header, dict):
        raise Damaged("its header is no JSON object")
    return header, 8 + length


def _digest(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(
    path: Path, start: int, shapes: Shapes, offsets: Mapping[str, tuple[int, int]], mode: Any
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in shapes.items():
        empty = math.prod(shape) == 0  # which cannot be mapped
        at = start + offsets[name][0]
        arrays[name] = (
            np.empty(shape, _DTYPES[dtype])
            if empty
            else np.memmap(path, _DTYPES[dtype], mode, offset=at, shape=shape)
        )
    return arrays
