"""Images in tables: parquet files as the Hugging Face hub exports them, and data sets of the hub by name.

A table has a column of images (a struct with `bytes`, or bytes) and a column of labels: whole numbers with
names in the metadata, names, or a CelebA attribute. Its role is in the name of the file or of its folder:
train-..., validation-... (or valid, val), test-...; a file that says nothing is for training.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_lora.config.schema import LABEL_COLUMNS
from dp_lora.data.archives import attribute_classes
from dp_lora.data.images import (
    Preprocessing,
    Request,
    Source,
    Unread,
    check_class_names,
    identity_of,
    prepare_roles,
)
from dp_lora.data.persons import asked, by_column, by_pattern, given
from dp_lora.data.pixels import Content, shown
from dp_lora.data.places import Place
from dp_lora.errors import UserError, did_you_mean

IMAGE_COLUMNS = ("image", "img")
CELEBA = ("celeba", "celebahq")
"""Sets whose own files say `data.attribute`, and whose presets set it."""
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
"""The role that a folder, a file or a split has by its name, whatever its case."""


def one_of_each(names: Iterable[str], where: str, kind: str) -> dict[str, str]:
    """The name of each role, of names that all say one. Raises UserError for two names of one role.

    >>> one_of_each(["Train", "val"], "", "folders")
    {'train': 'Train', 'validation': 'val'}
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        role = SPLITS[name.lower()]
        if role in found:
            raise UserError(
                f"{where}: {kind} {found[role]!r} and {name!r} are both for {role}; expected one of them"
            )
        found[role] = name
    return found


class Table(NamedTuple):
    """One role's rows, whether they lie in parquet files or came from the hub."""

    columns: Sequence[str]
    names: dict[str, list[str]]
    """Names of the classes of each column that has some."""
    column: Any
    """From the name of a column to all its values, as a list."""
    images: Any
    """From the name of a column to an iterator over its values, a few of them in memory at a time."""
    identity: str
    paths: Sequence[str] | None = None
    """Of the images in their set, where each is a file of its own."""


def read_parquet(
    location: Path, files: Sequence[Path], request: Request, preprocessing: Preprocessing
) -> Source:
    """The images of the parquet `files`: one, or all of the folder `location`."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"{request.field}.source={location}: reading parquet files needs pyarrow; "
            "get it by `pip install 'dp-lora[hub]'`"
        )
    by_role = _by_role(files, location, request.field)
    try:
        tables = {role: _parquet_table(paths) for role, paths in by_role.items()}
        return source_of(tables, request, preprocessing)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors and KeyErrors
        raise UserError(
            f"{request.field}.source={location}: cannot be read as parquet ({_line(error)})"
        ) from error


def _by_role(files: Sequence[Path], location: Path, field: str) -> dict[str, list[Path]]:
    """The files of each role. Raises UserError for two names of one, and for a file without beside others."""
    said: dict[str, list[Path]] = {}
    for file in files:
        said.setdefault(_word(file, location), []).append(file)
    silent = said.pop("", [])
    if silent and said:
        raise UserError(
            f"{field}.source={location}: {shown(silent[0].name)} says no role, beside files that do "
            f"({', '.join(sorted(said))}); expected train, validation or test in its name"
        )
    roles = one_of_each(said, f"{field}.source={location}", "files")
    return {"train": silent} if silent else {role: said[name] for role, name in roles.items()}


def _word(file: Path, location: Path) -> str:
    """The word in the name of the file, or of its folders in `location`, that says its role; or nothing."""
    words = [file.stem, *(parent.name for parent in file.parents if location in parent.parents)]
    first = (re.split(r"[-_.]", word)[0].lower() for word in words)
    return next((word for word in first if word in SPLITS), "")


def _parquet_table(files: Sequence[Path]) -> Table:
    from pyarrow import parquet

    schema = parquet.read_schema(files[0])

    def column(name: str) -> list[Any]:
        return [
            value for file in files for value in parquet.read_table(file, columns=[name])[name].to_pylist()
        ]

    def images(name: str) -> Iterator[Any]:
        for file in files:
            with parquet.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=256, columns=[name]):
                    yield from batch.column(0).to_pylist()

    return Table(schema.names, class_names(schema), column, images, identity_of(files))


def class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes that the schema of a parquet file says, by column."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return _names(metadata.get("info", {}).get("features", {}))


def read_hub(source: str, request: Request, preprocessing: Preprocessing) -> Source:
    """The images of a data set of the hub. Raises UserError where it cannot be had."""
    field = request.field
    advice = (
        "expected a folder, a parquet file, or the name of a data set of the Hugging Face hub that can be "
        f"reached; offline, put the set's files into {request.folder / request.data.name}"
    )
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{field}.source={source!r}: no such file or folder, and `datasets` is not installed; {advice}"
        )
    import datasets

    try:
        splits = datasets.load_dataset(source)
    except Exception as error:  # what the hub's client raises where there is no network is of many kinds
        raise UserError(f"{field}.source={source!r}: cannot be loaded ({_line(error)}); {advice}") from error
    named = {name: rows for name, rows in splits.items() if name.lower() in SPLITS}
    if left_out := [name for name in splits if name not in named]:
        request.tell(
            f"{field}.source={source}: split {', '.join(left_out)} is left out; its name says no role"
        )
    by_role = one_of_each(named, f"{field}.source={source}", "splits")
    return source_of(
        {role: _hub_table(splits[name], datasets) for role, name in by_role.items()}, request, preprocessing
    )


def _hub_table(rows: Any, datasets: Any) -> Table:
    features = dict(rows.features.items())
    names = {name: list(feature.names) for name, feature in features.items() if hasattr(feature, "names")}

    def images(name: str) -> Iterator[Any]:
        undecoded = rows.cast_column(name, datasets.Image(decode=False))
        return (row[name] for row in undecoded.select_columns([name]))

    return Table(list(features), names, lambda name: list(rows[name]), images, f"hub {rows._fingerprint}")


def _names(features: dict[str, Any]) -> dict[str, list[str]]:
    return {
        name: list(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# --- from tables to a source


def source_of(tables: dict[str, Table], request: Request, preprocessing: Preprocessing) -> Source:
    """The classes, images, labels and captions of the rows of each role."""
    if "train" not in tables:
        raise UserError(f"{request.field}.source: no training rows, only {', '.join(tables)}")
    image = _image_column(tables["train"].columns, request)
    classes, labels = _labels(tables, request)
    check_class_names(classes, f"{request.field}.label_column={request.data.label_column or 'null'}")
    # ImageNet's test images have no labels (-1), so its validation images test.
    labels = {role: found for role, found in labels.items() if role == "train" or (found != -1).any()}
    if "test" not in labels and "validation" in labels:
        labels["test"], tables["test"] = labels.pop("validation"), tables["validation"]
    captions = _captions(tables, request)
    owners = {role: _persons(tables[role], role, len(found), request) for role, found in labels.items()}
    unread: dict[str, Unread] = {}
    for role, found in labels.items():
        if not (found >= 0).all() or (found >= len(classes)).any():
            raise UserError(f"{request.field}.source: {role} labels beyond the {len(classes)} classes")
        table = tables[role]
        unread[role] = Unread(found, _reader(table, image, role), f"{table.identity} {image}")
    parts = {
        role: part._replace(captions=captions.get(role), persons=owners[role])
        for role, part in prepare_roles(unread, preprocessing, request).items()
    }
    return Source(classes, parts["train"], parts.get("validation"), parts.get("test"), own=True)


def _captions(tables: dict[str, Table], request: Request) -> dict[str, np.ndarray]:
    """The captions str [N] of each role; none unless they are asked for."""
    column, field = request.data.caption_column, request.field
    if column is None:
        return {}
    found = {}
    for role, table in tables.items():
        if column not in table.columns:
            raise UserError(
                f"{field}.caption_column={column}: expected one of {', '.join(table.columns)}"
                f"{did_you_mean(column, table.columns)}"
            )
        values = table.column(column)
        # Which row it is, or what stands there, is not said: captions are private.
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{field}.caption_column={column}: expected one text for each image of {role}")
        found[role] = np.array(values, dtype=object)
    return found


def _persons(table: Table, role: str, count: int, request: Request) -> np.ndarray | None:
    """The persons str [N] of one role; None unless they are asked for."""
    data, column = request.data, request.data.person_column
    if not asked(data):
        return None
    names = [f"image {number} of {role}" for number in range(count)] if table.paths is None else table.paths
    if column is None:
        if table.paths is None:
            raise UserError(
                f"{given(data, request.field)}: the images of a table have no names of files; expected "
                f"{request.field}.person_column"
            )
        return by_pattern(table.paths, request)
    if column not in table.columns:
        raise UserError(
            f"{given(data, request.field)}: expected one of {', '.join(table.columns)}"
            f"{did_you_mean(column, table.columns)}"
        )
    return by_column(table.column(column), names, request)


def _reader(table: Table, column: str, role: str) -> Any:
    def contents() -> Iterable[tuple[Content, str]]:
        for number, value in enumerate(table.images(column)):
            if isinstance(value, Place):
                yield value, shown(value)
                continue
            content = value.get("bytes") if isinstance(value, dict) else value
            if content is None and isinstance(value, dict) and value.get("path"):
                content = Path(value["path"])
            if not isinstance(content, bytes | Path):
                content = b""  # which the reader refuses by the name of the row
            yield content, f"image {number} of {role}"

    return contents


def _image_column(columns: Sequence[str], request: Request) -> str:
    wanted = request.data.image_column
    for name in (wanted,) if wanted else IMAGE_COLUMNS:
        if name in columns:
            return name
    hint = did_you_mean(wanted or "image", columns)
    raise UserError(
        f"{request.field}.image_column={wanted or 'null'}: expected one of {', '.join(columns)}{hint}"
    )


def _labels(tables: dict[str, Table], request: Request) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The classes, and for each role the labels int64 [N]."""
    data, field, columns = request.data, request.field, tables["train"].columns
    lowered = {column.lower(): column for column in columns}
    if data.label_column is None and data.attribute and data.attribute.lower() in lowered:
        column = lowered[data.attribute.lower()]
        values = {role: table.column(column) for role, table in tables.items()}
        labels = {role: np.array([int(v) > 0 for v in found], np.int64) for role, found in values.items()}
        return attribute_classes(data.attribute), labels
    _refuse_attribute(request, columns)
    if data.label_column == "none":
        image = _image_column(columns, request)
        return ("image",), {r: np.zeros(_length(t, image), np.int64) for r, t in tables.items()}
    named = [name for name in (data.label_column,) if name] or [n for n in LABEL_COLUMNS if n in columns]
    if not named or named[0] not in columns:
        raise UserError(
            f"{field}.label_column={data.label_column or 'null'}: expected one of {', '.join(columns)}, or "
            f"none for images without classes{did_you_mean(data.label_column or 'label', columns)}"
        )
    return _classes_of(tables, named[0], field)


def refuse_lone(classes: int, images: int, kind: str, where: str) -> None:
    """Raises UserError for classes that few images share.

    The names of the classes are released with the adapter, and nothing protects them.
    """
    if 2 * classes > images:
        raise UserError(
            f"{where}: {classes} different {kind} for {images} images; expected classes that many images "
            "share, since their names are released"
        )


def _refuse_attribute(request: Request, columns: Sequence[str]) -> None:
    """Refuses `data.attribute` where the classes are read from another column; CelebA's presets set it."""
    data, field = request.data, request.field
    if data.attribute is None or data.name in CELEBA:
        return
    if data.label_column is not None:
        raise UserError(
            f"{field}.attribute={data.attribute}: {field}.label_column={data.label_column} says the classes; "
            "expected null"
        )
    raise UserError(
        f"{field}.attribute={data.attribute}: expected one of {', '.join(columns)}, or null"
        f"{did_you_mean(data.attribute, columns)}"
    )


def _length(table: Table, image: str) -> int:
    return sum(1 for _ in table.images(image))


def _classes_of(
    tables: dict[str, Table], column: str, field: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    values = {role: table.column(column) for role, table in tables.items()}
    kinds = {type(value) for found in values.values() for value in found}
    if kinds <= {int, bool}:
        labels = {role: np.array(found, np.int64) for role, found in values.items()}
        names = tables["train"].names.get(column)
        return tuple(names or map(str, range(int(labels["train"].max(initial=-1)) + 1))), labels
    if kinds != {str}:
        said = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(f"{field}.label_column={column}: values of {said}, expected whole numbers or names")
    classes = tuple(sorted(set(values["train"])))
    refuse_lone(len(classes), len(values["train"]), "names", f"{field}.label_column={column}")
    number = {name: i for i, name in enumerate(classes)}
    for role, found in values.items():
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise UserError(f"{field}.source: class {unknown[0]!r} of {role} has no training images")
    return classes, {role: np.array([number[v] for v in found], np.int64) for role, found in values.items()}
