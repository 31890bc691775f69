"""The official archives of the paper's sets, in every form in which they are published."""

from __future__ import annotations

import ast
import collections
import dataclasses
import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data.archives import COUNTS, unpickle
from dp_lora.data.images import Preprocessing
from dp_lora.data.sets import load
from dp_lora.errors import UserError
from tests.builders.image_files import encoded, idx, refused
from tests.builders.tiny import composed

RNG = np.random.default_rng(5)


def pickled(value: object, python2: bool = False) -> bytes:
    """As Python 2 and early numpy wrote it, or as Python 3 does."""
    content = pickle.dumps(value, protocol=2)
    return content.replace(b"numpy._core", b"numpy.core") if python2 else pickle.dumps(value)


def cifar_batches(python2: bool) -> tuple[dict[str, bytes], np.ndarray, list[int]]:
    data = RNG.integers(0, 256, (60, 3072), np.uint8)
    labels = [i % 10 for i in range(60)]
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    key = (lambda text: text.encode()) if python2 else str
    files = {
        f"cifar-10-batches-py/{name}": pickled(
            {key("data"): data[10 * i : 10 * i + 10], key("labels"): labels[10 * i : 10 * i + 10]}, python2
        )
        for i, name in enumerate(names)
    }
    return files, data.reshape(-1, 3, 32, 32), labels


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The archives that tests write count as the published ones."""
    monkeypatch.setitem(COUNTS, "cifar10", {"train": 50, "test": 10})
    monkeypatch.setitem(COUNTS, "emnist_letters", {"train": 52, "test": 26})
    monkeypatch.setitem(COUNTS, "imagenet", {"train": 2000, "test": 1000})
    monkeypatch.setitem(COUNTS, "celeba", {"train": 6, "validation": 2, "test": 2})
    monkeypatch.setitem(COUNTS, "celebahq", {"all": 10})


@pytest.mark.parametrize("python2", [True, False])
@pytest.mark.parametrize("form", ["archive", "in a folder", "unpacked", "binary"])
@pytest.mark.usefixtures("small_counts")
def test_cifar10_is_read_in_every_official_form(tmp_path: Path, form: str, python2: bool) -> None:
    files, images, labels = cifar_batches(python2)
    source = tmp_path / "cifar10"
    source.mkdir()
    if form == "binary":
        rows = np.concatenate([np.array(labels, np.uint8)[:, None], images.reshape(60, -1)], 1)
        names = [PurePosixPath(name).name for name in files]
        files = {f"cifar-10-batches-bin/{n}.bin": rows[10 * i :][:10].tobytes() for i, n in enumerate(names)}
        write_tar(source / "cifar-10-binary.tar.gz", files)
    elif form == "unpacked":
        write_folder(source, files)
    else:
        write_tar(source / "cifar-10-python.tar.gz", files)
    given = str(source / "cifar-10-python.tar.gz") if form == "archive" else None
    splits = load(DataConfig("cifar10", source=given, channels=3), PathsConfig(data=str(tmp_path)))
    assert np.array_equal(splits.train.images, images[:50]) and np.array_equal(
        splits.test.images, images[50:]
    )
    assert splits.train.labels.tolist() == labels[:50] and splits.train.classes[9] == "truck"


@pytest.mark.usefixtures("small_counts")
@pytest.mark.parametrize("setting", ["resample='box'", "background='grey'", "value_range=[0,9]"])
def test_arrays_are_taken_as_they_are(tmp_path: Path, setting: str) -> None:
    write_folder(tmp_path / "cifar10", cifar_batches(True)[0])
    name, value = setting.split("=")
    data = DataConfig("cifar10", channels=3, **{name: ast.literal_eval(value)})
    usual = "white" if name == "background" else "null"
    assert refused(data, PathsConfig(data=str(tmp_path))) == (
        f"data.{setting.replace(chr(39), '')}: cifar10 is read from arrays of 8 bits as published; expected "
        f"{usual}"
    )


def test_an_archive_with_other_counts_than_published_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "cifar10", cifar_batches(True)[0])
    message = refused(DataConfig("cifar10", channels=3), PathsConfig(data=str(tmp_path)))
    assert "50 train, 10 test images, expected the published 50000 train, 10000 test" in message


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("was-run",)


@pytest.mark.parametrize(
    "value",
    [
        {"data": Harmful(), "labels": []},
        {"data": np.array([{}], object), "labels": [0]},
        {"data": np.zeros(3, [("a", "u1")]), "labels": [0]},
        {"data": collections.OrderedDict(), "labels": [0]},
    ],
)
def test_a_pickle_that_is_more_than_arrays_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in (2, 5):
        files = {**cifar_batches(True)[0], "cifar-10-batches-py/data_batch_1": pickle.dumps(value, protocol)}
        write_folder(tmp_path / "cifar10", files)
        message = refused(DataConfig("cifar10", channels=3), PathsConfig(data=str(tmp_path)))
        assert "data_batch_1 is refused: it is no pickle of plain arrays" in message
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_come_back_whole(protocol: int) -> None:
    value = {
        "data": np.arange(24, dtype=np.int64).reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "labels": [1, 2, np.int64(3)],
        "name": "x",
    }
    found = unpickle(pickle.dumps(value, protocol))
    assert found["labels"] == [1, 2, 3]
    for name in ("data", "fortran", "big"):
        assert np.array_equal(found[name], value[name])


def imagenet_files(size: int, form: str) -> tuple[dict[str, bytes], np.ndarray]:
    images = RNG.integers(0, 256, (3000, 3 * size * size), np.uint8)
    labels = [1 + i % 1000 for i in range(3000)]
    parts = {f"train_data_batch_{i + 1}": slice(200 * i, 200 * i + 200) for i in range(10)}
    files = {}
    for name, rows in {**parts, "val_data": slice(2000, 3000)}.items():
        batch = {"data": images[rows], "labels": labels[rows], "mean": images.mean(0)}
        if form == "npz":
            buffer = io.BytesIO()
            np.savez(buffer, **batch)
            files[f"{name}.npz"] = buffer.getvalue()
        else:
            files[name] = pickled(batch)
    return files, images.reshape(-1, 3, size, size)


@pytest.mark.parametrize("form", ["pickle", "npz", "zip"])
@pytest.mark.usefixtures("small_counts")
def test_downsampled_imagenet_is_read_in_every_official_form(tmp_path: Path, form: str) -> None:
    files, images = imagenet_files(32, form)
    folder = tmp_path / "imagenet32"
    if form == "zip":
        folder.mkdir()
        write_zip(folder / "Imagenet32_train.zip", {n: c for n, c in files.items() if n != "val_data"})
        write_zip(folder / "Imagenet32_val.zip", {"val_data": files["val_data"]})
    else:
        write_folder(folder, files)
        synsets = [f"n{i:08} {i} {'crane' if i in (7, 9) else f'name_{i}'}" for i in range(1, 1001)]
        (folder / "map_clsloc.txt").write_text("\n".join(synsets))
    paths = PathsConfig(data=str(tmp_path))
    splits = load(DataConfig("imagenet", channels=3), paths)
    assert np.array_equal(splits.train.images, images[:2000])
    assert np.array_equal(splits.test.images, images[2000:])
    assert splits.train.labels[:3].tolist() == [0, 1, 2]
    named = ("name 1", "crane (n00000007)")
    assert (splits.train.classes[0], splits.train.classes[6]) == (("1", "7") if form == "zip" else named)
    (tmp_path / "imagenet32").rename(tmp_path / "imagenet64")
    said = refused(DataConfig("imagenet", channels=3, image_size=64), paths)
    assert "expected images of 3 x 64 x 64; they seem to be 32 x 32" in said


@pytest.mark.parametrize("form", ["zip", "folder"])
@pytest.mark.usefixtures("small_counts")
def test_emnist_letters_are_turned_upright_and_numbered_from_zero(tmp_path: Path, form: str) -> None:
    upright = RNG.integers(0, 256, (78, 28, 28), np.uint8)
    labels = np.array([1 + i % 26 for i in range(78)], np.uint8)
    files = {}
    for role, rows in (("train", slice(0, 52)), ("test", slice(52, 78))):
        images = np.ascontiguousarray(upright[rows].transpose(0, 2, 1))
        files[f"gzip/emnist-letters-{role}-images-idx3-ubyte.gz"] = gzip.compress(idx(images))
        files[f"gzip/emnist-letters-{role}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels[rows]))
    (tmp_path / "emnist_letters").mkdir()
    if form == "zip":
        write_zip(tmp_path / "emnist_letters/gzip.zip", files)
    else:
        write_folder(tmp_path / "emnist_letters", files)
    paths = PathsConfig(data=str(tmp_path))
    splits = load(DataConfig("emnist_letters", image_size=28, public=True), paths)
    assert np.array_equal(splits.train.images[:, 0], upright[:52])
    assert splits.test.labels.tolist() == list(range(26)) and splits.train.classes[0] == "A"
    paper = load(composed("data@public_data=emnist_letters").public_data, paths).train.images
    by_pillow = Image.fromarray(upright[3]).resize((32, 32))  # bicubic, as the paper's code resizes
    assert paper.shape == (52, 3, 32, 32) and np.array_equal(paper[3, 0], np.asarray(by_pillow))
    assert np.array_equal(paper[:, 0], paper[:, 2])


ATTRIBUTES = "Eyeglasses Male Young"


def celeba_files(count: int = 10) -> dict[str, bytes]:
    """Faces of 178 x 218 whose brightness grows downwards; every second is of a man."""
    column = np.linspace(0, 255, 218).astype(np.uint8)
    files = {}
    for i in range(1, count + 1):
        pixels = np.repeat(column[:, None, None], 178, 1) * np.array([1, 0, 0], np.uint8) + np.uint8(i)
        files[f"img_align_celeba/{i:06}.jpg"] = encoded(Image.fromarray(pixels), "PNG")
    names = [f"{i:06}.jpg" for i in range(1, count + 1)]
    values = [f"{name}  -1 {1 if i % 2 else -1:2}  1" for i, name in enumerate(names)]
    files["Anno/list_attr_celeba.txt"] = "\n".join([str(count), ATTRIBUTES + " ", *values]).encode()
    codes = [0 if i < 6 else 1 + (i >= 8) for i in range(count)]
    files["Eval/list_eval_partition.txt"] = "\n".join(
        f"{name} {code}" for name, code in zip(names, codes, strict=True)
    ).encode()
    return files


def write_celeba(folder: Path, form: str) -> None:
    files = celeba_files()
    images = {name: content for name, content in files.items() if name.endswith(".jpg")}
    write_folder(folder, files if form == "folder" else {n: c for n, c in files.items() if n not in images})
    if form == "zip":
        write_zip(folder / "img_align_celeba.zip", images)


@pytest.mark.parametrize("form", ["zip", "folder"])
@pytest.mark.usefixtures("small_counts")
def test_celeba_has_its_own_split_and_the_attribute_as_class(tmp_path: Path, form: str) -> None:
    write_celeba(tmp_path / "celeba", form)
    paths = PathsConfig(data=str(tmp_path), cache=str(tmp_path / "cache"))
    splits = load(composed("data=celeba64").data, paths)
    assert [part.images.shape for part in splits] == [(6, 3, 64, 64), (2, 3, 64, 64), (2, 3, 64, 64)]
    assert splits.train.classes == ("Female", "Male")
    assert splits.train.labels.tolist() == [0, 1] * 3
    assert splits.test.images[:, 1, 0, 0].tolist() == [9, 10]
    alone = load(dataclasses.replace(composed("data=celeba32").data, attribute=None), paths).train
    assert alone.classes == ("face",) and alone.images.shape == (6, 3, 32, 32)
    assert "did you mean 'Male'" in refused(DataConfig("celeba", attribute="Mael", channels=3), paths)


@pytest.mark.parametrize("size", [32, 64])
def test_faces_are_resized_then_cropped_as_the_paper_does(size: int) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (218, 178, 3), np.uint8))
    found = Preprocessing(size, 3, "bilinear", "shorter").read(encoded(image), "x", "data")
    # torchvision: Resize(size) gives size x int(size * 218 / 178); CenterCrop rounds half of the rest.
    long = int(size * 218 / 178)
    top = {32: 4, 64: 7}[size]
    resized = np.asarray(image.resize((size, long), Image.Resampling.BILINEAR))
    assert np.array_equal(found, resized[top : top + size].transpose(2, 0, 1))


def test_padding_does_not_crop() -> None:
    with pytest.raises(UserError, match=r"x has 40 x 28 pixels, expected at most 32 x 32"):
        Preprocessing(32, 1, "pad").read(encoded(Image.new("L", (40, 28))), "x", "data")


def test_padding_never_blurs() -> None:
    pixels = RNG.integers(0, 256, (28, 28), np.uint8)
    found = Preprocessing(32, 1, "pad").read(encoded(Image.fromarray(pixels)), "x", "data")
    assert np.array_equal(found[0, 2:30, 2:30], pixels) and found.sum(dtype=int) == pixels.sum(dtype=int)


@pytest.mark.usefixtures("small_counts")
def test_celeba_names_what_is_missing(tmp_path: Path) -> None:
    write_celeba(tmp_path / "celeba", "folder")
    paths = PathsConfig(data=str(tmp_path))
    (tmp_path / "celeba/img_align_celeba/000004.jpg").unlink()
    request = DataConfig("celeba", channels=3, attribute="Male")
    assert "image 000004.jpg is listed and not there" in refused(request, paths)
    (tmp_path / "celeba/Anno/list_attr_celeba.txt").write_text("10\nMale\n000001.jpg 1 1\n")
    assert "list_attr_celeba.txt is damaged" in refused(request, paths)
    (tmp_path / "celeba/img_align_celeba.zip").write_bytes(b"no zip")
    assert "cannot be read" in refused(request, paths)


@pytest.mark.parametrize("split", ["the paper's", "CelebA's", "none"])
@pytest.mark.usefixtures("small_counts")
def test_celebahq_images_have_the_attribute_of_their_own_number(tmp_path: Path, split: str) -> None:
    faces = celeba_files()
    order = [4, 9, 2, 7, 1, 0, 3, 8, 6, 5]  # HQ image i is CelebA image order[i] + 1
    files = {
        f"images/{i}.jpg": encoded(Image.new("RGB", (300, 300), (10 * i, 0, 0)), "PNG") for i in range(10)
    }
    rows = [f"{i} {of} {of + 1:06}.jpg md5" for i, of in enumerate(order)]
    files["image_list.txt"] = "\n".join(["idx orig_idx orig_file proper_md5", *rows]).encode()
    files["list_attr_celeba.txt"] = faces["Anno/list_attr_celeba.txt"]
    if split == "the paper's":
        files["train_filenames.pickle"] = pickled([0, 3, 4, 5, 6, 9, 8])
        files["test_filenames.pickle"] = pickled([1, 2, 7])
    if split == "CelebA's":
        files["list_eval_partition.txt"] = faces["Eval/list_eval_partition.txt"]
    write_folder(tmp_path / "celebahq", files)
    splits = load(composed("data=celebahq256").data, PathsConfig(data=str(tmp_path)))
    counts = {"the paper's": [7, 0, 3], "CelebA's": [6, 2, 2], "none": [8, 0, 2]}[split]
    assert [len(part) for part in splits] == counts
    assert splits.train.images.shape[1:] == (3, 256, 256)
    for part in splits:
        numbers = part.images[:, 0, 100, 100] // 10
        assert part.labels.tolist() == [order[number] % 2 for number in numbers]


@pytest.mark.usefixtures("small_counts")
def test_celebamask_hq_is_read_from_its_zip(tmp_path: Path) -> None:
    files = {
        f"CelebAMask-HQ/CelebA-HQ-img/{i}.jpg": encoded(Image.new("RGB", (8, 8), (i, 0, 0)))
        for i in range(10)
    }
    files["CelebAMask-HQ/CelebAMask-HQ-mask-anno/0/00000_hair.png"] = b"no face"
    lines = [f"{i}.jpg  1 {1 if i > 6 else -1} 1" for i in range(10)]
    files["CelebAMask-HQ/CelebAMask-HQ-attribute-anno.txt"] = "\n".join(["10", ATTRIBUTES, *lines]).encode()
    write_zip(tmp_path / "CelebAMask-HQ.zip", files)
    request = DataConfig(
        "celebahq", source=str(tmp_path / "CelebAMask-HQ.zip"), image_size=8, channels=3, attribute="Male"
    )
    splits = load(request, PathsConfig())
    both = np.concatenate([splits.train.images, splits.test.images])[:, 0, 0, 0]
    labels = np.concatenate([splits.train.labels, splits.test.labels])
    assert labels.tolist() == [int(value > 6) for value in both] and len(splits.test) == 2


@pytest.mark.parametrize("name", ["cifar10", "celeba", "celebahq", "emnist_letters", "imagenet"])
def test_a_set_that_is_not_there_says_what_to_put_where(tmp_path: Path, name: str) -> None:
    message = refused(DataConfig(name, channels=3), PathsConfig(data=str(tmp_path)))
    own = "imagenet32" if name == "imagenet" else name
    assert f"no {tmp_path}/{own}; put " in message and "there" in message
    assert name == "emnist_letters" or "data.source=" in message


@pytest.mark.parametrize(
    "preset", ["cifar10", "celeba32", "celeba64", "celebahq256", "emnist_letters", "imagenet32", "imagenet64"]
)
def test_the_presets_of_the_paper_compose(preset: str) -> None:
    public = preset.startswith(("emnist", "imagenet"))
    where = "data@public_data" if public else "data"
    chosen = composed(f"{where}={preset}")
    found = chosen.public_data if public else chosen.data
    assert found.public is public and found.channels == 3
    assert found.image_size == int("".join(filter(str.isdigit, preset)).removeprefix("10") or 32)
