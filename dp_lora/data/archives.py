"""The official archives of the paper's sets, as they are published or unpacked.

    CIFAR-10    cifar-10-python.tar.gz or cifar-10-binary.tar.gz, or one of their folders
    EMNIST      gzip.zip, or the four emnist-letters-*-idx?-ubyte files, gzipped or not
    ImageNet    Imagenet32_train.zip and Imagenet32_val.zip (or 64, or _npz), or the batches in them
    CelebA      img_align_celeba.zip (or its folder), list_attr_celeba.txt, list_eval_partition.txt
    CelebA-HQ   CelebAMask-HQ.zip or its folder; or images and image_list.txt with list_attr_celeba.txt

Python pickles are read without numpy's or anybody else's unpickling code: a file that names anything but a
container, a number, a string or an array of numbers is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dp_lora.data.images import (
    Part,
    Preprocessing,
    Request,
    Source,
    Unread,
    identity_of,
    part_of,
    prepare_roles,
)
from dp_lora.data.pixels import Content
from dp_lora.data.published import COUNTS
from dp_lora.errors import UserError, did_you_mean

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OPPOSITES = {"Male": ("Female", "Male"), "Young": ("Old", "Young")}
"""Names of the classes without and with a CelebA attribute, where `not_<attribute>` would read badly."""


class Tree:
    """The files of a folder or an archive by their path in it; archives in a folder are part of it."""

    def __init__(self, root: Path, field: str) -> None:
        self.root, self.field = root, field
        self.files: dict[str, Callable[[], bytes]] = {}
        self.paths: list[Path] = []
        try:
            self._add(root, "")
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise UserError(f"{field}.source: {root} cannot be read ({error})") from error
        self.by_name: dict[str, str] = {}
        for name in self.files:
            self.by_name.setdefault(PurePosixPath(name).name, name)

    def _add(self, path: Path, prefix: str) -> None:
        if path.is_dir():
            for file in sorted(file for file in path.rglob("*") if file.is_file()):
                name = file.relative_to(path).as_posix()
                if file.suffix == ".zip" or file.name.endswith((".tar.gz", ".tgz")):
                    self._add(file, f"{prefix}{name}/")
                else:
                    self.files[prefix + name] = file.read_bytes
                    self.paths.append(file)
            return
        self.paths.append(path)
        if path.suffix == ".zip":
            archive = zipfile.ZipFile(path)
            for member in archive.infolist():
                if not member.is_dir():
                    self.files[prefix + member.filename] = _zip_reader(archive, member)
        else:
            with tarfile.open(path) as tar:
                for item in tar:
                    content = tar.extractfile(item)
                    if content is not None:
                        self.files[prefix + item.name] = io.BytesIO(content.read()).getvalue

    def read(self, name: str) -> bytes:
        """The content of the file whose last part is `name`, gunzipped if it is there as `name`.gz."""
        for found, unpack in ((name, bytes), (f"{name}.gz", gzip.decompress)):
            if found in self.by_name:
                try:
                    return unpack(self.files[self.by_name[found]]())
                except (OSError, EOFError, zipfile.BadZipFile) as error:
                    raise self.error(f"{found} cannot be read ({error})") from error
        raise self.error(f"no {name} in it")

    def lines(self, name: str) -> list[list[str]]:
        """The words of each line of a text file that are not empty."""
        text = self.read(name).decode("utf-8", "replace")
        return [line.split() for line in text.splitlines() if line.strip()]

    def has(self, *names: str) -> bool:
        return all(name in self.by_name or f"{name}.gz" in self.by_name for name in names)

    def error(self, what: str) -> UserError:
        return UserError(f"{self.field}.source: {self.root}: {what}")


def _zip_reader(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Callable[[], bytes]:
    return lambda: archive.read(member)


# --- pickles


class _Dtype:
    """Stands for a numpy dtype in a pickle; its state says byte order only, which the name has too."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.dtype = np.dtype(name if isinstance(name, str) else name.decode())
        if self.dtype.kind not in "biufSU":
            raise pickle.UnpicklingError(f"an array of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1] if isinstance(state[1], str) else state[1].decode()
        self.dtype = self.dtype.newbyteorder("=" if order == "|" else order)  # type: ignore[arg-type]


class _Array:
    """Stands for a numpy array in a pickle."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_bytes(data, dtype, shape, "F" if fortran else "C")


def _from_bytes(data: Any, dtype: _Dtype, shape: Any, order: Any) -> np.ndarray:
    return np.frombuffer(data, dtype.dtype).reshape(tuple(shape), order=order)


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode("latin-1")


class _Unpickler(pickle.Unpickler):
    """Builds containers, numbers, strings and arrays of numbers; refuses to name anything else."""

    _NUMPY: Mapping[str, Any] = {
        "_reconstruct": lambda *_: _Array(),
        "_frombuffer": _from_bytes,
        "scalar": _scalar,
    }
    _KNOWN: Mapping[tuple[str, str], Any] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric",
                      "numpy._core.numeric") and name in self._NUMPY:  # fmt: skip
            return self._NUMPY[name]
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self._KNOWN[module, name]


def unpickle(content: bytes) -> Any:
    """A pickle of containers, numbers, strings and arrays of numbers, with no code of it executed.

    Byte strings in the keys of dictionaries become strings. Raises ValueError for anything else.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="bytes").load())
    except Exception as error:  # a damaged pickle fails in every way there is
        raise ValueError(f"it is no pickle of plain arrays: {str(error) or type(error).__name__}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key.decode() if isinstance(key, bytes) else key: _plain(item) for key, item in value.items()}
    return value


def _batch(tree: Tree, name: str) -> Mapping[str, Any]:
    """The dictionary in a file: a pickle, or an archive of numpy's (.npz) without pickles in it."""
    content = tree.read(name)
    try:
        if name.endswith(".npz"):
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        found = unpickle(content)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise tree.error(f"{name} is refused: {error}") from error
    if not isinstance(found, dict):
        raise tree.error(f"{name} holds a {type(found).__name__}, expected a dictionary")
    return found


def _rows(tree: Tree, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3, size, size] and labels [N] of a batch with `data` and `labels`."""
    batch = _batch(tree, name)
    try:
        data, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    except KeyError as error:
        raise tree.error(f"{name} has no {error}, expected data and labels") from error
    if data.dtype != np.uint8 or data.shape != (len(labels), 3 * size * size):
        found = math.isqrt(data.shape[-1] // 3) if data.ndim == 2 else 0
        raise tree.error(
            f"{name} holds {data.dtype} {data.shape} for {len(labels)} labels, expected images of "
            f"3 x {size} x {size}"
            + (f"; they seem to be {found} x {found}" if found not in (0, size) else "")
        )
    return data.reshape(-1, 3, size, size), labels.astype(np.int64)


def _stacked(batches: list[tuple[np.ndarray, np.ndarray]]) -> Part:
    """All batches as one, each freed as soon as it is copied."""
    count = sum(len(labels) for _, labels in batches)
    images, labels = np.empty((count, *batches[0][0].shape[1:]), np.uint8), np.empty(count, np.int64)
    first = 0
    while batches:
        part, of_part = batches.pop(0)
        images[first : first + len(part)], labels[first : first + len(part)] = part, of_part
        first += len(part)
    return part_of(images, labels)


def _check(tree: Tree, name: str, found: Mapping[str, int]) -> None:
    """Raises UserError unless the number of images is the published one."""
    expected = COUNTS[name]
    if dict(found) != expected:
        said = [", ".join(f"{n} {role}" for role, n in counts.items()) for counts in (found, expected)]
        raise tree.error(f"{said[0]} images, expected the published {said[1]}")


def _labels_in(tree: Tree, part: Part, classes: int) -> None:
    if len(part.labels) and not (part.labels.min() >= 0 and part.labels.max() < classes):
        raise tree.error(f"labels beyond the {classes} classes")


# --- the sets


def cifar10(tree: Tree, request: Request) -> Source | None:
    """CIFAR-10: 50,000 + 10,000, 3 x 32 x 32 as they are."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    if tree.has(names[0]):
        batches = [_rows(tree, name, 32) for name in names]
    elif tree.has(f"{names[0]}.bin"):
        batches = [_binary_batch(tree, f"{name}.bin") for name in names]
    else:
        return None
    test, train = _stacked([batches.pop()]), _stacked(batches)
    _check(tree, "cifar10", {"train": len(train.labels), "test": len(test.labels)})
    for part in (train, test):
        _labels_in(tree, part, len(CIFAR10))
    return Source(CIFAR10, train, test=test)


def _binary_batch(tree: Tree, name: str) -> tuple[np.ndarray, np.ndarray]:
    content = np.frombuffer(tree.read(name), np.uint8)
    if len(content) % 3073:
        raise tree.error(f"{name} has {len(content)} bytes, expected a multiple of 1 + 3 x 32 x 32")
    rows = content.reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)


def imagenet(tree: Tree, request: Request) -> Source | None:
    """Downsampled ImageNet (Chrabaszcz et al. 2017): 1,281,167 + 50,000, labels numbered from 1."""
    numbered = [f"train_data_batch_{i}" for i in range(1, 11)]
    end = ".npz" if tree.has(f"{numbered[0]}.npz") else ""
    if not tree.has(numbered[0] + end):
        return None
    size = request.data.image_size
    train = _stacked([_rows(tree, name + end, size) for name in numbered])
    test = _stacked([_rows(tree, f"val_data{end}", size)])
    _check(tree, "imagenet", {"train": len(train.labels), "test": len(test.labels)})
    classes = _imagenet_classes(tree)
    for part in (train, test):
        part.labels[:] -= 1
        _labels_in(tree, part, len(classes))
    return Source(classes, train, test=test)


def _imagenet_classes(tree: Tree) -> tuple[str, ...]:
    """Names from map_clsloc.txt where it is there (`n02119789 1 kit_fox`), else numbers from 1."""
    if not tree.has("map_clsloc.txt"):
        return tuple(str(number) for number in range(1, 1001))
    rows = sorted((int(number), name, synset) for synset, number, name in tree.lines("map_clsloc.txt"))
    names = [name for _, name, _ in rows]
    return tuple(
        f"{name.replace('_', ' ')} ({synset})" if names.count(name) > 1 else name.replace("_", " ")
        for _, name, synset in rows
    )


def emnist_letters(
    tree: Tree, parse: Callable[[bytes, Path, str], np.ndarray]
) -> tuple[np.ndarray, ...] | None:
    """EMNIST letters: training images uint8 [N, 28, 28], labels from 0, test images, labels.

    The files hold each image transposed, and labels from 1; both are put right.
    """
    names = [
        f"emnist-letters-{role}-{what}" for role in ("train", "test")
        for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]  # fmt: skip
    if not tree.has(names[0]):
        return None
    arrays = [parse(tree.read(name), tree.root / name, tree.field) for name in names]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise tree.error(f"images {images.shape} for {len(labels)} labels, expected 28 x 28")
    _check(tree, "emnist_letters", {"train": len(arrays[1]), "test": len(arrays[3])})
    train, train_labels, test, test_labels = arrays
    turned = [np.ascontiguousarray(images.transpose(0, 2, 1)) for images in (train, test)]
    return turned[0], train_labels.astype(np.int64) - 1, turned[1], test_labels.astype(np.int64) - 1


def celeba(tree: Tree, request: Request, preprocessing: Preprocessing) -> Source | None:
    """CelebA, aligned and cropped (178 x 218): 162,770 + 19,867 + 19,962, split as published."""
    if not tree.has("list_attr_celeba.txt", "list_eval_partition.txt"):
        return None
    partition = {words[0]: words[1] for words in tree.lines("list_eval_partition.txt")}
    classes, labels = _attribute(tree, "list_attr_celeba.txt", request)
    roles = {"train": "0", "validation": "1", "test": "2"}
    names = {role: [name for name in partition if partition[name] == code] for role, code in roles.items()}
    _check(tree, "celeba", {role: len(listed) for role, listed in names.items()})
    unread = {
        role: _pictures(tree, listed, [labels.get(name) for name in listed]) for role, listed in names.items()
    }
    parts = prepare_roles(unread, preprocessing, request)
    return Source(classes, parts["train"], parts["validation"], parts["test"])


def celebahq(tree: Tree, request: Request, preprocessing: Preprocessing) -> Source | None:
    """CelebA-HQ: 30,000 images, each with the attribute of its own number.

    Split by train_filenames.pickle and test_filenames.pickle (24,000 + 6,000, the paper's) where they are
    there, else by CelebA's own partition where the numbers of both sets are mapped, else a fixed fifth tests.
    """
    own, original = "CelebAMask-HQ-attribute-anno.txt", "list_attr_celeba.txt"
    mapping = next(
        (name for name in ("image_list.txt", "CelebA-HQ-to-CelebA-mapping.txt") if tree.has(name)), None
    )
    if not tree.has(own) and not (mapping and tree.has(original)):
        return None
    to_original = {} if mapping is None else {int(row[0]): row[2] for row in tree.lines(mapping)[1:]}
    if tree.has(own):
        classes, named = _attribute(tree, own, request)
        labels = {_number(name): label for name, label in named.items()}
    else:
        classes, named = _attribute(tree, original, request)
        labels = {number: named[name] for number, name in to_original.items() if name in named}
    pictures = {}
    for name in tree.files:
        number = _number(PurePosixPath(name).name)
        if number is not None:
            pictures[number] = name
    _check(tree, "celebahq", {"all": len(pictures)})
    roles, held_out = _celebahq_roles(tree, sorted(pictures), to_original)
    unread = {
        role: _pictures(tree, [pictures[n] for n in numbers], [labels.get(n) for n in numbers])
        for role, numbers in roles.items()
    }
    parts = prepare_roles(unread, preprocessing, request)
    return Source(classes, parts["train"], parts.get("validation"), parts.get("test"), held_out)


def _number(name: str) -> int | None:
    """The number of a CelebA-HQ image by its file's name: 17 for 17.jpg, 00017.png, img00000017.png."""
    found = re.fullmatch(r"(?:img)?(\d+)\.(?:jpe?g|png)", name)
    return int(found[1]) if found else None


def _celebahq_roles(
    tree: Tree, numbers: list[int], to_original: Mapping[int, str]
) -> tuple[dict[str, list[int]], int]:
    lists = {role: f"{role}_filenames.pickle" for role in ("train", "test")}
    if tree.has(*lists.values()):
        roles = {role: _listed(tree, name, set(numbers)) for role, name in lists.items()}
        if set(roles["train"]) & set(roles["test"]):
            raise tree.error("train_filenames.pickle and test_filenames.pickle share images")
        return roles, 0
    if to_original and tree.has("list_eval_partition.txt"):
        codes = dict(words[:2] for words in tree.lines("list_eval_partition.txt"))
        found = {number: codes.get(to_original.get(number, "")) for number in numbers}
        if None in found.values():
            raise tree.error("list_eval_partition.txt does not have every image")
        names = {"train": "0", "validation": "1", "test": "2"}
        return {role: [n for n in numbers if found[n] == code] for role, code in names.items()}, 0
    return {"train": numbers}, len(numbers) // 5


def _listed(tree: Tree, name: str, there: set[int]) -> list[int]:
    try:
        numbers = [int(number) for number in unpickle(tree.read(name))]
    except (ValueError, TypeError) as error:
        raise tree.error(f"{name} is refused: {error}") from error
    absent = [number for number in numbers if number not in there]
    if absent:
        raise tree.error(f"{name} lists image {absent[0]}, which is not there")
    return numbers


def _attribute(tree: Tree, name: str, request: Request) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes, and the label of each image by its file's name.

    The list has the number of images, the names of the attributes, then for each image -1 or 1 for each.
    Without `data.attribute` there is one class.
    """
    rows = tree.lines(name)
    if len(rows) < 2 or any(len(row) != len(rows[1]) + 1 for row in rows[2:]):
        raise tree.error(
            f"{name} is damaged: expected a count, names, and for each image its name and values"
        )
    attribute = request.data.attribute
    if attribute is None:
        return ("face",), {row[0]: 0 for row in rows[2:]}
    if attribute not in rows[1]:
        raise UserError(
            f"{request.field}.attribute={attribute!r}: expected one of {', '.join(rows[1])}, or null"
            f"{did_you_mean(attribute, rows[1])}"
        )
    column = 1 + rows[1].index(attribute)
    return attribute_classes(attribute), {row[0]: int(row[column] == "1") for row in rows[2:]}


def attribute_classes(attribute: str) -> tuple[str, str]:
    """Names of the classes without and with a CelebA attribute.

    >>> attribute_classes("Smiling"), attribute_classes("Male")
    (('not_Smiling', 'Smiling'), ('Female', 'Male'))
    """
    return OPPOSITES.get(attribute, (f"not_{attribute}", attribute))


def _pictures(tree: Tree, names: Sequence[str], labels: Sequence[int | None]) -> Unread:
    """The images of the given names, or paths in the tree. Raises UserError for the first that is missing."""
    paths = []
    for name, label in zip(names, labels, strict=True):
        path = name if name in tree.files else tree.by_name.get(name)
        if path is None:
            raise tree.error(f"image {name} is listed and not there")
        if label is None:
            raise tree.error(f"image {name} has no attributes")
        paths.append(path)

    def contents() -> Iterator[tuple[Content, str]]:
        for path in paths:
            try:
                yield tree.files[path](), path
            except (OSError, zipfile.BadZipFile) as error:
                raise tree.error(f"{path} cannot be read ({error})") from error

    archives = [path for path in tree.paths if path.suffix in (".zip", ".gz", ".tgz")]
    folder = tree.root if tree.root.is_dir() else tree.root.parent
    loose = [folder / path for path in paths if (folder / path).is_file()]
    listed = hashlib.sha256("\n".join(paths).encode()).hexdigest()
    return Unread(np.array(labels, np.int64), contents, f"{identity_of([*archives, *loose])} {listed}")
