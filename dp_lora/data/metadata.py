"""Images beside metadata.csv, .jsonl or .parquet, as the `imagefolder` of Hugging Face's datasets reads them.

Each row names its image in the column `file_name` (or `*_file_name`), by the path from the file's own folder.
`data.label_column` (`label` or `labels`) says the class: names, or whole numbers. Without such a column there
is one class, whatever folders the images lie in. `data.caption_column` says the text.

The file lies in the folder of the set, or one lies in each of train/, validation/ and test/. If the images
lie in folders with such names, these are their roles, also with one metadata file above them all.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from dp_lora.config.schema import LABEL_COLUMNS
from dp_lora.data import tables
from dp_lora.data.folders import METADATA, PICTURES, files_below
from dp_lora.data.images import ROLES, Preprocessing, Request, Source, identity_of_places
from dp_lora.data.pixels import shown
from dp_lora.data.places import Place, Visible
from dp_lora.data.tables import CELEBA, SPLITS, Table, refuse_lone
from dp_lora.errors import PrivateRefusal, UserError, did_you_mean

_FILE_NAME = "file_name"


class _Row(NamedTuple):
    """One row of a metadata file."""

    values: Mapping[str, Any]
    where: str
    """The line, or the number of the row, and the file."""


class _Metadata(NamedTuple):
    """One metadata file."""

    name: str
    """Its path in the set."""
    columns: Sequence[str]
    rows: Sequence[_Row]
    names: Mapping[str, list[str]]
    """Names of the classes of each column that has some: of parquet files."""


def read_metadata(
    root: Place, visible: Visible, request: Request, preprocessing: Preprocessing
) -> Source | None:
    """The images of the metadata files in `root`; None where there are none.

    Raises PrivateRefusal, with all files and rows that do not match, and for tables that cannot be read.
    """
    field = request.field
    files = files_below(root, visible, field)
    found = {path: place for path, place in files.items() if place.name in METADATA}
    if not found:
        return None
    _refuse_two_kinds(found, field)
    of_set = {path: place for path, place in files.items() if path not in found}
    metadata = [_read(path, place, field) for path, place in found.items()]
    request = _with_columns(request, metadata)
    named = _named(metadata, request.data.image_column or _FILE_NAME, of_set)
    images, others = _images(named, metadata, of_set)
    folders = _roles(images, found, root, field)
    rows = _matched(named, images, request)
    if others:
        told = ", ".join(map(shown, sorted(others)[:5])) + (", ..." if len(others) > 5 else "")
        request.tell(f"{field}: left out {len(others)} files that are no images and have no row: {told}")
    by_role: dict[str, list[tuple[str, _Row]]] = {}
    for path, row in rows.items():
        role = folders[path.split("/")[0]] if folders else "train"
        by_role.setdefault(role, []).append((path, row))
    visible.tell_skipped(request.tell, field)
    try:
        return tables.source_of(_tables(by_role, of_set, metadata, request), request, preprocessing)
    except PrivateRefusal:
        raise
    except UserError as error:  # which a file of the private set decided
        raise PrivateRefusal(str(error)) from error


def _refuse_two_kinds(found: Mapping[str, Place], field: str) -> None:
    folders: dict[str, str] = {}
    for path in found:
        folder, name = os.path.split(path)
        if (other := folders.setdefault(folder, name)) != name:
            raise PrivateRefusal(
                f"{field}.source: {other} and {name} both lie in {shown(folder) or 'the folder of the set'}; "
                "expected one of them"
            )


def _roles(images: set[str], found: Mapping[str, Place], root: Place, field: str) -> dict[str, str] | None:
    """The role of each folder in `root`; None where all images train."""
    folders = sorted({path.split("/")[0] for path in (*images, *found) if "/" in path})
    said = {SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}
    if not said or any("/" not in path for path in images):
        return None
    unknown = [name for name in folders if name.lower() not in SPLITS]
    if "train" not in said:
        if unknown:
            return None
        raise PrivateRefusal(
            f"{field}.source: no folder train in {shown(root)}, only {', '.join(folders)}; expected it "
            "beside them"
        )
    if unknown:
        raise PrivateRefusal(
            f"{field}.source: folder {shown(unknown[0])!r} beside train in {shown(root)}; expected "
            f"{', '.join(ROLES)}{did_you_mean(unknown[0], ROLES)}"
        )
    one_each = tables.one_of_each(folders, f"{field}.source={shown(root)}", "folders")
    _refuse_some(found, one_each, field)
    return {name: role for role, name in one_each.items()}


def _refuse_some(found: Mapping[str, Place], folders: Mapping[str, str], field: str) -> None:
    """Raises PrivateRefusal where some folders of a role have a metadata file and others none above them."""
    if any("/" not in path for path in found):
        return
    having = {path.split("/")[0] for path in found}
    if lacking := [name for name in folders.values() if name not in having]:
        raise PrivateRefusal(
            f"{field}.source: no metadata file in {shown(lacking[0])}, beside "
            f"{', '.join(map(shown, found))}; expected one in each, or one above them"
        )


# --- files


def _read(path: str, place: Place, field: str) -> _Metadata:
    name = shown(path)
    read = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[place.suffix]
    try:
        found = read(place.read_bytes(), name)
    except UnicodeDecodeError as error:
        raise PrivateRefusal(f"{field}.source: {name} is no text in UTF-8; expected that") from error
    except _Wrong as error:
        raise PrivateRefusal(f"{field}.source: {name}: {error}") from error
    except (OSError, ValueError, KeyError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise PrivateRefusal(f"{field}.source: {name} cannot be read ({reason})") from error
    if not found.rows:
        raise PrivateRefusal(f"{field}.source: {name} has no rows; expected one for each image")
    return found


class _Wrong(Exception):
    """A metadata file that is not what its name says, and what was expected."""


def _csv(content: bytes, name: str) -> _Metadata:
    """Comma-separated values with names in the first line; an empty cell is no value."""
    reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    columns = [column.strip() for column in next(reader, [])]
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise _Wrong(f"two columns {twice!r}; expected each once")
    if len(columns) == 1 and (found := re.search("[;\t]", columns[0])):
        raise _Wrong(f"columns between {found[0]!r}; expected commas")
    rows = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(columns):
            raise _Wrong(
                f"line {reader.line_num} has {len(cells)} values for {len(columns)} columns; expected as many"
            )
        values = {column: cell or None for column, cell in zip(columns, cells, strict=True)}
        rows.append(_Row(values, f"line {reader.line_num} of {name}"))
    return _Metadata(name, columns, rows, {})


def _jsonl(content: bytes, name: str) -> _Metadata:
    rows, columns = [], dict[str, None]()
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise _Wrong(f"line {number} is no JSON object; expected one in each line")
        columns.update(dict.fromkeys(values))
        rows.append(_Row(values, f"line {number} of {name}"))
    return _Metadata(name, list(columns), rows, {})


def _parquet(content: bytes, name: str) -> _Metadata:
    if importlib.util.find_spec("pyarrow") is None:
        raise _Wrong("reading it needs pyarrow; get it by `pip install 'dp-lora[hub]'`")
    from pyarrow import parquet

    table = parquet.read_table(io.BytesIO(content))
    rows = [_Row(values, f"row {number} of {name}") for number, values in enumerate(table.to_pylist(), 1)]
    return _Metadata(name, table.column_names, rows, tables.class_names(table.schema))


# --- columns


def _with_columns(request: Request, metadata: Sequence[_Metadata]) -> Request:
    """The request with the column of the classes, and none of images, since the files are named.

    Raises PrivateRefusal for a column that a metadata file does not have.
    """
    data, field = request.data, request.field
    shared = [name for name in metadata[0].columns if all(name in of_one.columns for of_one in metadata)]
    label = data.label_column
    by_attribute = data.attribute is not None and (
        data.name not in CELEBA or data.attribute.lower() in map(str.lower, shared)
    )
    if label is None and not by_attribute:
        somewhere = {name for of_one in metadata for name in of_one.columns}
        label = next((name for name in LABEL_COLUMNS if name in somewhere), "none")
    asked = (data.caption_column, data.person_column)
    for setting, column in zip(
        ("label_column", "caption_column", "person_column"), (label, *asked), strict=True
    ):
        for of_one in metadata:
            if column not in (None, "none", *of_one.columns):
                given = getattr(data, setting) or "null"
                what = ", or none for one class" if setting == "label_column" else ""
                raise PrivateRefusal(
                    f"{field}.{setting}={given}: no column {column!r} in {of_one.name}, expected one of "
                    f"{', '.join(of_one.columns)}{what}{did_you_mean(str(column), of_one.columns)}"
                )
    if label == "none" and data.label_column is None:
        columns = metadata[0].columns
        near = next(filter(None, (did_you_mean(name, columns) for name in LABEL_COLUMNS)), "")
        request.tell(
            f"{field}: one class, since {metadata[0].name} has no column {' or '.join(LABEL_COLUMNS)}; "
            f"{field}.label_column names another, {field}.layout=folders takes them from the folders{near}"
        )
    column = _file_column(metadata, request)
    changed = dataclasses.replace(data, label_column=label, image_column=column)
    return request._replace(data=changed)


def _file_column(metadata: Sequence[_Metadata], request: Request) -> str:
    """The column that names the images: `data.image_column`, also without `_file_name`, or the only one."""
    wanted, field = request.data.image_column, request.field
    for of_one in metadata:
        known = _file_columns(of_one.columns)
        meant = [_FILE_NAME, f"image_{_FILE_NAME}"] if wanted is None else [wanted, f"{wanted}_{_FILE_NAME}"]
        meant += [_FILE_NAME] if wanted == "image" else []
        column = next((name for name in meant if name in of_one.columns), None)
        if column is None and wanted is None and len(known) == 1:
            column = known[0]
        if column is None:
            hint = did_you_mean(wanted or _FILE_NAME, of_one.columns)
            what = (
                f"one of {', '.join(known)}"
                if known
                else f"{_FILE_NAME}, with the path of each image, or the name of the column that has it"
            )
            raise PrivateRefusal(
                f"{field}.image_column={wanted or 'null'}: {of_one.name} has the columns "
                f"{', '.join(of_one.columns)}; expected {what}{hint}"
            )
        if of_one is metadata[0]:
            first = column
        elif column != first:
            raise PrivateRefusal(
                f"{field}.source: images are named by {first} in {metadata[0].name} and by {column} in "
                f"{of_one.name}; expected one column"
            )
    return first


def _file_columns(columns: Sequence[str]) -> list[str]:
    return [name for name in columns if name == _FILE_NAME or name.endswith(f"_{_FILE_NAME}")]


# --- rows and files


class _Named(NamedTuple):
    """The image that a row names."""

    row: _Row
    path: str
    """Its path in the set, or what the row has in place of one."""
    problem: str | None


def _named(metadata: Sequence[_Metadata], column: str, files: Mapping[str, Place]) -> list[_Named]:
    """What the rows of all metadata files with that column name in it."""
    # macOS stores the names of files in another of Unicode's forms than most programs write.
    normal = {unicodedata.normalize("NFC", path): path for path in files}
    found = []
    for of_one in metadata:
        for row in of_one.rows if column in of_one.columns else ():
            value = row.values.get(column)
            path, problem = _path_of(value, of_one.name)
            path = path if path in files else normal.get(unicodedata.normalize("NFC", path), path)
            if problem is None and path not in files:
                problem = "no such file"
            found.append(_Named(row, path or str(value), problem))
    return found


def _images(
    named: Sequence[_Named], metadata: Sequence[_Metadata], files: Mapping[str, Place]
) -> tuple[set[str], set[str]]:
    """The paths of the images that belong to the set, with a row or without, and of all other files.

    Masks, for instance, which a column of their own names, are no images of the set.
    """
    with_row = {one.path for one in named if one.problem is None}
    elsewhere: set[str] = set()
    for column in dict.fromkeys(name for of_one in metadata for name in _file_columns(of_one.columns)):
        elsewhere |= {one.path for one in _named(metadata, column, files)}
    images = with_row | {path for path in files if _is_picture(path) and path not in elsewhere}
    return images, set(files) - images - elsewhere


def _matched(named: Sequence[_Named], images: set[str], request: Request) -> dict[str, _Row]:
    """The row of each image by its path in the set, in the order of the rows.

    Raises PrivateRefusal with everything that does not match: rows without a file or a class, images without
    a row or with several.
    """
    label = request.data.label_column
    wrong: list[tuple[str, str]] = []
    rows: dict[str, _Row] = {}
    seen: dict[str, list[_Row]] = {}
    for row, path, problem in named:
        if problem is not None:
            wrong.append((shown(path), f"{problem} ({row.where})"))
            continue
        seen.setdefault(path, []).append(row)
        if label in (None, "none") or row.values.get(label) is not None:
            rows.setdefault(path, row)
        else:
            wrong.append((shown(path), f"no value of {label} ({row.where})"))
    wrong += [
        (shown(path), f"{len(several)} rows ({', '.join(row.where for row in several)})")
        for path, several in seen.items()
        if len(several) > 1
    ]
    wrong += [(shown(path), "no row") for path in sorted(images - set(seen))]
    if wrong:
        error = Unmatched(wrong, request.field)
        if request.refuse is None:
            raise error
        request.refuse(error)
    return rows


class Unmatched(PrivateRefusal):
    """Rows and images that do not match, all of them."""

    def __init__(self, wrong: Sequence[tuple[str, str]], field: str) -> None:
        self.wrong = wrong
        """Each file, or what a row has for one, and the reason."""
        expected, lines = "expected one row for each image", [f"{name}: {why}" for name, why in wrong]
        if len(lines) == 1:
            super().__init__(f"{field}.source: {lines[0]}; {expected}")
        else:
            head = f"{field}.source: {len(lines)} images and rows of metadata do not match; {expected}:"
            super().__init__("\n".join([head, *(f"  {line}" for line in lines)]))


def _path_of(value: Any, metadata: str) -> tuple[str, str | None]:
    """The path in the set that a row names, and what is wrong with it."""
    if not isinstance(value, str) or not value:
        return "", "no name of a file"
    path = os.path.normpath(value.replace("\\", "/"))
    if "://" in value or path.startswith("/") or path.split("/")[0] in ("..", "."):
        return "", f"leads out of the folder of {metadata}"
    return (PurePosixPath(metadata).parent / path).as_posix(), None


def _is_picture(path: str) -> bool:
    return path.lower().endswith(PICTURES)


# --- to the tables that are read from anywhere


def _tables(
    by_role: Mapping[str, Sequence[tuple[str, _Row]]],
    files: Mapping[str, Place],
    metadata: Sequence[_Metadata],
    request: Request,
) -> dict[str, Table]:
    label = request.data.label_column or ""
    names = {name: found for of_one in metadata for name, found in of_one.names.items()}
    numbers = None
    if label not in ("", "none", *names):
        numbers = _numbers([row.values[label] for rows in by_role.values() for _, row in rows])
    if numbers is not None:
        classes = sorted({number for number in numbers.values() if number >= 0})
        names[label] = [str(number) for number in classes]
        images = len(by_role.get("train", ()))
        refuse_lone(len(classes), images, "numbers", f"{request.field}.label_column={label}")
        numbers = {value: classes.index(n) if n >= 0 else n for value, n in numbers.items()}

    texts = (label, request.data.caption_column, request.data.person_column)

    def table(rows: Sequence[tuple[str, _Row]]) -> Table:
        def column(name: str) -> list[Any]:
            values = [row.values.get(name) for _, row in rows]
            if name == label and numbers is not None:
                return [numbers[value] for value in values]
            if name in texts:
                return values
            found = _numbers(values)  # of the attribute, the only other column that is asked for
            if found is None:
                raise PrivateRefusal(
                    f"{request.field}.attribute={name}: expected a whole number in each row, above 0 where "
                    "an image has it"
                )
            return [found[value] for value in values]

        def places(_: str) -> Iterator[Place]:
            return (files[path] for path in paths)

        paths = [path for path, _ in rows]
        columns = dict.fromkeys(name for of_one in metadata for name in of_one.columns)
        return Table(list(columns), names, column, places, identity_of_places([*places("")]), paths)

    return {role: table(by_role[role]) for role in ROLES if role in by_role}


def _numbers(values: Sequence[Any]) -> dict[Any, int] | None:
    """The whole number of each value where all are such, or texts of such; else None."""
    found: dict[Any, int] = {}
    for value in set(values) if all(isinstance(value, str | int) for value in values) else ():
        if isinstance(value, str) and not re.fullmatch(r"-?[0-9]{1,18}", value):
            return None
        found[value] = int(value)
    return found or None
