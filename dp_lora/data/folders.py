"""Images in folders: a folder a class, or train/, validation/ and test/ with a folder a class in each.

All images directly in one folder are one class. A zip archive of any of these is read like the folder that it
holds, and one folder around everything is left out.

What could be read in two ways is an error that names both: tables beside class folders, two folders of one
role, images directly in train/ and test/, two folders that are the same place by a link.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dp_lora.data import tables
from dp_lora.data.images import (
    ROLES,
    Preprocessing,
    Request,
    Source,
    Unread,
    check_class_names,
    identity_of_places,
    prepare_roles,
)
from dp_lora.data.persons import by_pattern
from dp_lora.data.pixels import Content, Unreadable, check_file, shown
from dp_lora.data.places import Archive, Member, Place, Visible, is_seen
from dp_lora.errors import PrivateRefusal, UserError, did_you_mean

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""The tables beside images that name each image (`dp_lora.data.metadata`)."""
TABLES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".arrow")
PICTURES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".avif", ".jp2"),
    *(".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".heic", ".svg", ".dcm", ".dicom"),
)
NO_CLASS = "image"
"""The name of the class of images without classes."""


TEXTS = ("txt", "caption")
"""The endings of captions beside images."""


class Survey(NamedTuple):
    """The kinds of files that lie anywhere in a folder."""

    parquet: list[Path]
    picture: Path | None
    """One of the image files, by their names."""
    arrow: Path | None = None
    """One of the files in which `datasets` of Hugging Face saves."""


def survey(location: Path) -> Survey:
    """The parquet files in `location`, sorted, or that file itself, and one of the image files."""
    if location.suffix == ".parquet" and location.is_file():
        return Survey([location], None)
    parquet: list[Path] = []
    picture: Path | None = None
    arrow: Path | None = None
    walked: set[str] = set()
    for folder, below, names in os.walk(location, followlinks=True):
        if (real := os.path.realpath(folder)) in walked:  # a link that leads back
            below.clear()
            continue
        walked.add(real)
        below[:] = sorted(name for name in below if is_seen(name))
        for name in filter(is_seen, names):
            if name.endswith(".parquet"):
                parquet.append(Path(folder) / name)
            elif picture is None and name.lower().endswith(PICTURES):
                picture = Path(folder) / name
            elif arrow is None and name.endswith(".arrow"):
                arrow = Path(folder) / name
    return Survey(sorted(parquet), picture, arrow)


def parquet_files(location: Path, request: Request) -> list[Path]:
    """The parquet files to read at `location`; none where its folders are to be read.

    Raises UserError for a folder that can be read in both ways, unless `data.layout` decides, and for one
    that has no such files where `data.layout` asks for them.
    """
    found, layout, field = survey(location), request.data.layout, request.field
    if found.arrow is not None and not found.parquet and found.picture is None:
        raise UserError(
            f"{field}.source={shown(location)}: holds {_below(found.arrow, location)}, as save_to_disk of "
            "Hugging Face's datasets writes it, which is not read; expected parquet files, one for each "
            "role: load_from_disk(folder)['train'].to_parquet('train.parquet')"
        )
    if layout == "tables" and not found.parquet:
        raise UserError(
            f"{field}.layout=tables: no parquet file in {shown(location)}; expected some, or null"
        )
    if layout == "folders":
        return []
    if layout is None and found.picture is not None:
        tables_alone = [file for file in found.parquet if file.name not in METADATA]
        if not tables_alone:
            return []
        raise UserError(
            f"{field}.source={shown(location)}: holds the table {_below(tables_alone[0], location)} and "
            f"the image {_below(found.picture, location)}; expected {field}.layout=tables, which reads the "
            f"parquet files, or {field}.layout=folders, which reads the class folders"
        )
    return found.parquet


def opened(location: Path, visible: Visible, request: Request) -> Place:
    """The folder of the set: `location`, or that in a zip archive; or the one folder around everything.

    In a folder of zip archives alone, each stands for a folder of its name.

    Raises PrivateRefusal for an archive that cannot be read.
    """
    place: Place = location
    where = f"{request.field}.source={shown(location)}"
    several = [] if location.is_file() else _listed(location, visible, request.field)
    each = {path.stem: path for path in several if isinstance(path, Path) and path.suffix.lower() == ".zip"}
    if location.is_file() or (each and len(each) == len(several)):
        try:
            place = Member(Archive(location, each or None), "")
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise PrivateRefusal(
                f"{where}: cannot be read ({error}); expected a folder, a zip archive or several"
            ) from error
    inside = _listed(place, visible, request.field)
    if request.data.layout == "folders" and not any(map(_is_picture, inside)):
        inside = [path for path in inside if visible.is_dir(path)]  # other files are left out
    if len(inside) != 1 or not visible.is_dir(inside[0]) or inside[0].name.lower() in tables.SPLITS:
        return place
    below = _listed(inside[0], visible, request.field)
    if any(visible.is_dir(path) or path.name in METADATA for path in below):
        request.tell(f"{where}: read from {shown(inside[0].name)}, the one folder in it")
        return inside[0]
    return place


def read_folders(root: Place, visible: Visible, request: Request, preprocessing: Preprocessing) -> Source:
    """The images of the class folders in `root`, in the folders of its roles, or in `root` itself.

    Raises UserError for what is no such folder, and Damaged with all files that are no images.
    """
    field, data = request.field, request.data
    if data.caption_column is not None and data.caption_column not in TEXTS:
        raise UserError(
            f"{field}.caption_column={data.caption_column}: expected {' or '.join(TEXTS)}, the ending of the "
            "texts beside the images of class folders, or metadata.csv or parquet files with such a column"
        )
    reader = _Reader(root, visible, request)
    roles = reader.roles()
    inside = reader.without_classes if data.label_column == "none" else reader.classes
    if reader.is_flat():
        files = {"train": reader.without_classes(root)}
    elif roles is None:
        files = {"train": inside(root)}
    else:
        for role in roles.values():
            reader.once(root / role)
        files = {role: inside(root / roles[role]) for role in ROLES if role in roles}
    classes = tuple(files["train"])
    check_class_names(
        dict.fromkeys(name for of_role in files.values() for name in of_role), f"{field}.source"
    )
    for role, of_role in files.items():
        unknown = [name for name in of_role if name not in classes]
        if unknown:
            raise UserError(
                f"{field}.source: class {unknown[0]!r} of {shown(root / role)} has no training images"
            )
    visible.tell_skipped(request.tell, field)
    unread = {role: _unread(of_role, classes) for role, of_role in files.items()}
    owners = {role: reader.persons(of_role, request) for role, of_role in files.items()}
    parts = prepare_roles(unread, preprocessing, request)
    parts = {role: part._replace(persons=owners[role]) for role, part in parts.items()}
    if data.caption_column is not None:
        captions = {role: reader.captions(of_role) for role, of_role in files.items()}
        parts = {role: part._replace(captions=captions[role]) for role, part in parts.items()}
    if data.name == "imagenet" and "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")  # ImageNet's own test labels are not public
    return Source(classes, parts["train"], parts.get("validation"), parts.get("test"), own=True)


class _Reader:
    """The folders of one set."""

    def __init__(self, root: Place, visible: Visible, request: Request) -> None:
        self.root, self.visible, self.field = root, visible, request.field
        self.tables_left_out = request.data.layout == "folders"
        self.classes_given = bool(request.data.classes)
        self.one_class = request.data.label_column == "none"
        self.texts = request.data.caption_column
        self._text_of: dict[Place, Place] = {}
        self._places: dict[tuple[int, int], Place] = {}

    def roles(self) -> dict[str, str] | None:
        """The folder of each role; None where the folders are classes.

        A folder with the name of a role is one if folders lie in it, or if there are no classes; else it is a
        class of that name.
        """
        names = [path.name for path in self._visible(self.root) if self.visible.is_dir(path)]
        named = [name for name in names if name.lower() in tables.SPLITS]
        named = [name for name in named if self.one_class or self._has_folders(name)]
        if not named:
            self._refuse_nearly_roles(names)
            if not self.one_class:
                self._refuse_roles_without_classes(names)
            return None
        if all(tables.SPLITS[name.lower()] != "train" for name in named):
            if len(named) < len(names):
                return None
            raise UserError(
                f"{self.field}.source: no folder train in {shown(self.root)}, only {', '.join(named)}; "
                "expected it beside them"
            )
        for path in self._folders(self.root):
            if path.name.lower() not in tables.SPLITS:
                hint = did_you_mean(path.name, ROLES)
                raise UserError(
                    f"{self.field}.source: folder {shown(path.name)!r} beside train in {shown(self.root)}; "
                    f"expected {', '.join(ROLES)}{hint}"
                )
        where = f"{self.field}.source={shown(self.root)}"
        return tables.one_of_each([path.name for path in self._folders(self.root)], where, "folders")

    def is_flat(self) -> bool:
        """Whether images lie directly in the folder, and no folders beside them."""
        inside = self._visible(self.root)
        return not any(map(self.visible.is_dir, inside)) and any(map(_is_picture, inside))

    def without_classes(self, folder: Place) -> dict[str, list[Place]]:
        """All files in a folder and below, as one class. Raises UserError for tables or texts beside them."""
        below = files_below(folder, self.visible, self.field).values()
        files = [path for path in below if not self._is_left_out(path)]
        if not files:
            raise UserError(f"{self.field}.source: {shown(folder)} is empty; expected images")
        if (table := next((path for path in files if path.suffix.lower() in TABLES), None)) is not None:
            raise PrivateRefusal(
                f"{self.field}.source: {shown(table)} is a table beside images, which may say their classes; "
                f"expected {', '.join(METADATA[:-1])} or {METADATA[-1]} with a column file_name, or "
                f"{self.field}.layout=folders, which leaves it out"
            )
        self._refuse_beside(folder, files)
        return {NO_CLASS: files if self.texts is None else self._with_texts(files)}

    def once(self, folder: Place) -> None:
        """Raises UserError for a folder that was read under another name: links, and mounts of one place."""
        if not isinstance(folder, Path):
            return
        status = folder.stat()
        other = self._places.setdefault((status.st_dev, status.st_ino), folder)
        if other != folder:
            raise UserError(
                f"{self.field}.source: {shown(other)} and {shown(folder)} are the same folder by a link; "
                "expected each image in one place"
            )

    def _refuse_nearly_roles(self, names: Sequence[str]) -> None:
        """train_images beside test_images are no classes."""
        nearly = [
            name
            for name in names
            if set(re.split(r"[-_. ]", name.lower())) & set(tables.SPLITS)
            and (self.one_class or self._has_folders(name))
        ]
        if nearly:
            what = "images" if self.one_class else "class folders"
            raise UserError(
                f"{self.field}.source={shown(self.root)}: {what} lie in {shown(', '.join(nearly))}; "
                f"if these are roles, rename them to {', '.join(ROLES)}"
            )

    def _refuse_roles_without_classes(self, names: Sequence[str]) -> None:
        """Images directly in train/ and test/, or in train_images/ and test_images/, may be meant as roles.

        Taken for classes, the test images would train. Beside a folder of another name they are classes.
        """
        words = [re.split(r"[-_. ]", name.lower()) for name in names]
        roles = [{tables.SPLITS[word] for word in of_name if word in tables.SPLITS} for of_name in words]
        rests = {tuple(word for word in of_name if word not in tables.SPLITS) for of_name in words}
        all_of_them = all(roles) and len(rests) == 1 and len(names) > 1
        if all_of_them and {"train"} < set().union(*roles) and not self.classes_given:
            exact = all(name.lower() in tables.SPLITS for name in names)
            otherwise = f"or {self.field}.label_column=none, " if exact else ""
            one = shown(next(name for name, role in zip(names, roles, strict=True) if "train" in role))
            raise UserError(
                f"{self.field}.source={shown(self.root)}: images lie directly in {shown(', '.join(names))}, "
                "which may be roles or classes; expected a folder for each class in them, such as "
                f"{one}/images, {otherwise}if they are roles, or "
                f"{self.field}.classes=[{shown(','.join(names))}] if they are classes"
            )

    def classes(self, folder: Place) -> dict[str, list[Place]]:
        """Sorted files of each class, classes sorted by name."""
        folders = self._folders(folder)
        self._refuse_wrapped(folder, folders)
        files = {}
        for path in folders:
            self.once(path)
            name = shown(path.name)
            if name != path.name:
                raise UserError(
                    f"{self.field}.source: class folder {shown(path)} has a name that is not UTF-8, or "
                    "characters that cannot be printed; expected text, since the names of classes are "
                    "released"
                )
            files[name] = [file for file in self._visible(path) if not self._is_left_out(file)]
            if not files[name]:
                raise UserError(f"{self.field}.source: class folder {shown(path)} is empty; expected images")
            self._refuse_beside(path, files[name])
            if self.texts is not None:
                files[name] = self._with_texts(files[name])
        return files

    def captions(self, files: Mapping[str, Sequence[Place]]) -> np.ndarray:
        """The captions str [N] of the images that `classes` found, in their order."""
        captions = []
        for place in (self._text_of[image] for of_class in files.values() for image in of_class):
            try:
                captions.append(place.read_bytes().decode("utf-8").strip())
            except (OSError, UnicodeError) as error:
                # Without the error's own words: those of the caption may be among them.
                raise UserError(
                    f"{self.field}.source: {shown(place)} cannot be read as text; expected UTF-8"
                ) from error
        return np.array(captions, dtype=object)

    def persons(self, files: Mapping[str, Sequence[Place]], request: Request) -> np.ndarray | None:
        """The persons str [N] of the images that `classes` found, in their order; None unless asked for."""
        if request.data.person_pattern is None:
            return None
        places = [place for of_class in files.values() for place in of_class]
        return by_pattern([_inside(place, self.root) for place in places], request)

    def _with_texts(self, files: Sequence[Place]) -> list[Place]:
        """The images among `files`, each of which has a text of its own with its name."""
        ending = f".{self.texts}"
        texts = {_before_ending(file): file for file in files if file.suffix.lower() == ending}
        images = [file for file in files if file.suffix.lower() != ending]
        for image in images:
            text = texts.pop(_before_ending(image), None)
            if text is None:
                raise UserError(
                    f"{self.field}.source: {shown(image)} has no text of its own; expected "
                    f"{shown(image.stem)}{ending} beside it"
                )
            self._text_of[image] = text
        if texts:
            raise UserError(
                f"{self.field}.source: {shown(min(texts.values()))} belongs to no image; expected one with "
                "its name"
            )
        return images

    def _refuse_beside(self, folder: Place, files: Sequence[Place]) -> None:
        """Refuses folders in a class folder, and texts with the name of an image."""
        inner = next((file for file in files if self.visible.is_dir(file)), None)
        if inner is not None:
            raise UserError(
                f"{self.field}.source: class folder {shown(folder)} holds the folder {shown(inner.name)}; "
                "expected images directly in each class folder"
            )
        images = {file.stem for file in files if _is_picture(file)}
        endings = [f".{ending}" for ending in TEXTS if ending != self.texts]
        texts = [f for f in files if f.suffix.lower() in endings and f.stem in images]
        if texts:
            ending = texts[0].suffix.lower().removeprefix(".")
            raise UserError(
                f"{self.field}.source: {shown(texts[0])}: a caption beside an image; expected images alone, "
                f"or {self.field}.caption_column={ending}, with which a text-to-image model is trained"
            )

    def _folders(self, folder: Place) -> list[Place]:
        """The sorted folders in `folder`, which may hold nothing else."""
        is_dir = self.visible.is_dir
        paths = [path for path in self._visible(folder) if is_dir(path) or not self.tables_left_out]
        if not paths:
            raise UserError(
                f"{self.field}.source: {shown(folder)} is empty; expected a folder of images for each class"
            )
        for path in paths:
            if not is_dir(path):
                raise self._beside(path, any(map(is_dir, paths)))
        return paths

    def _beside(self, path: Place, has_folders: bool) -> UserError:
        """The error for a file where class folders were expected; `has_folders` if some are beside it."""
        try:
            check_file(path)
        except Unreadable as error:
            return UserError(f"{self.field}.source: {shown(path)} is {error}; expected a class folder")
        if path.suffix.lower() == ".zip":
            return PrivateRefusal(
                f"{self.field}.source: {shown(path)} is a zip archive; expected {self.field}.source="
                f"{shown(path)}, if it holds the set, or its files unpacked"
            )
        if not has_folders:
            table = f", or a parquet file as {self.field}.source" if path.suffix.lower() in TABLES else ""
            return UserError(
                f"{self.field}.source: {shown(path)} is a file, and no class folders are beside it; expected "
                f"a folder of images for each class{table}"
            )
        layout = f"{self.field}.layout=folders, which takes the classes from the folders and leaves it out"
        if path.suffix.lower() in TABLES:
            return UserError(
                f"{self.field}.source: {shown(path)} is a file beside class folders: the classes may be in "
                f"it or in the names of the folders; expected {layout}, or a parquet file as "
                f"{self.field}.source"
            )
        return UserError(
            f"{self.field}.source: {shown(path)} is a file; expected only class folders there, or {layout}"
        )

    def _refuse_wrapped(self, folder: Place, folders: Sequence[Place]) -> None:
        """A single folder with folders in it is not a class, but the set in one more folder."""
        inside = self._visible(folders[0]) if len(folders) == 1 else []
        if inside and all(map(self.visible.is_dir, inside)):
            raise UserError(
                f"{self.field}.source={shown(folder)}: holds only the folder {shown(folders[0].name)} with "
                f"folders in it; did you mean {self.field}.source={shown(folders[0])}?"
            )

    def _has_folders(self, name: str) -> bool:
        return any(map(self.visible.is_dir, self._visible(self.root / name)))

    def _is_left_out(self, path: Place) -> bool:
        return self.tables_left_out and path.suffix.lower() in TABLES

    def _visible(self, folder: Place) -> list[Place]:
        return _listed(folder, self.visible, self.field)


def _listed(folder: Place, visible: Visible, field: str) -> list[Place]:
    try:
        return visible(folder)
    except OSError as error:
        raise UserError(f"{field}.source: {shown(folder)} is no folder that can be read") from error


def files_below(folder: Place, visible: Visible, field: str) -> dict[str, Place]:
    """All files in `folder` and below, by their paths from there. Raises PrivateRefusal."""
    try:
        return dict(visible.files(folder))
    except OSError as error:
        unread = shown(str(error.filename))
        raise PrivateRefusal(f"{field}.source: {unread} is no folder that can be read") from error


def _is_picture(path: Place) -> bool:
    return path.suffix.lower() in PICTURES


def _below(path: Path, location: Path) -> str:
    return shown(path.relative_to(location))


def _unread(files: Mapping[str, Sequence[Place]], classes: tuple[str, ...]) -> Unread:
    paths = [path for of_class in files.values() for path in of_class]
    labels = [classes.index(name) for name, of_class in files.items() for _ in of_class]

    def contents() -> Iterator[tuple[Content, str]]:
        return ((path, shown(path)) for path in paths)

    return Unread(np.array(labels, np.int64), contents, identity_of_places(paths))


def _inside(place: Place, root: Place) -> str:
    """The path of a file from `root`, with slashes."""
    if isinstance(place, Member):
        return place.inside.removeprefix(
            f"{root.inside}/" if isinstance(root, Member) and root.inside else ""
        )
    return place.relative_to(str(root)).as_posix()


def _before_ending(file: Place) -> str:
    """The path of a file without its ending."""
    return str(file).removesuffix(file.suffix)
