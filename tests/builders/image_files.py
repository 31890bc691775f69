"""Image files, folders and tables that tests read, and what they ask of `dp_lora.data.sets`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data.sets import ImageSet, load
from dp_lora.errors import UserError


def refused(data: DataConfig, paths: PathsConfig | None = None, field: str = "data") -> str:
    with pytest.raises(UserError) as caught:
        load(data, paths or PathsConfig(), field)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows(*parts: ImageSet) -> list[bytes]:
    return [image.tobytes() for part in parts for image in part.images]


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_image(path: Path, value: int, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)


def write_parquet(
    path: Path, count: int, first: int = 0, *, named: bool = True, **columns: list[object]
) -> None:
    """Rows as the hub exports them: `image` a struct of bytes and path, `label` whose names are metadata.

    The red value of an image is its number; its upper left pixel is white.
    """
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = []
    for i in range(count):
        image = Image.new("RGB", (8, 8), (first + i, 0, 0))
        image.putpixel((0, 0), (255, 255, 255))
        images.append({"bytes": encoded(image), "path": f"{i}.png"})
    table = pyarrow.table({"image": images, **(columns or {"label": [i % 2 for i in range(count)]})})
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    if named:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def config(folder: Path, **values: object) -> DataConfig:
    return DataConfig("imagefolder", source=str(folder), image_size=8, **{"channels": 3, **values})  # type: ignore[arg-type]


def write_rows(path: Path, contents: list[bytes]) -> None:
    """A parquet file of images as bytes, of one class each two rows."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [i % 2 for i in range(len(contents))]
    parquet.write_table(pyarrow.table({"image": contents, "label": labels}), path)


def idx(array: np.ndarray) -> bytes:
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()
