"""A user's own folder of images."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data import images
from dp_lora.data.images import Preprocessing
from dp_lora.data.sets import load
from tests.builders.image_files import config, refused, write_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten images each; the red value tells which."""
    for i in range(10):
        write_image(tmp_path / "set/cat" / f"{i}.png", 10 + i)
        write_image(tmp_path / "set/dog" / f"{i}.png", 100 + i, mode="L")
    (tmp_path / "set/.hidden").mkdir()
    (tmp_path / "set/cat/.DS_Store").write_bytes(b"no image")
    return tmp_path / "set"


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
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a/transparent.png")
    sixteen, transparent, middle = load(config(tmp_path, channels=1), PathsConfig()).train.images[:, 0]
    assert (middle == 255).all()
    assert (sixteen == 0xAB).all()
    assert (transparent == 255).all()


def test_imagefolder_with_its_own_roles(tmp_path: Path) -> None:
    for role, count in (("train", 4), ("test", 2)):
        for name in ("a", "b"):
            for i in range(count):
                write_image(tmp_path / role / name / f"{i}.png", i)
    splits = load(config(tmp_path), PathsConfig())
    assert [len(part) for part in splits] == [8, 0, 4]
    assert "comes with 4 test images" in refused(config(tmp_path, test_size=0.1))
    write_image(tmp_path / "test/c/0.png", 0)
    assert "class 'c'" in refused(config(tmp_path))
    (tmp_path / "tset").mkdir()
    assert "did you mean 'test'" in refused(config(tmp_path))


def test_images_without_classes_in_folders_of_their_roles(tmp_path: Path) -> None:
    names = ("Train/0.png", "Train/a/1.png", "Testing/b/c/0.png", "val/0.png")
    for value, name in enumerate(names, 1):
        write_image(tmp_path / name, value)
    splits = load(config(tmp_path, label_column="none"), PathsConfig())
    assert splits.train.classes == ("image",)
    assert [part.images[:, 0, 4, 4].tolist() for part in splits] == [[1, 2], [4], [3]]


def test_images_alone_in_train_and_test_are_roles_without_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "train/0.png", 1)
    write_image(tmp_path / "test/0.png", 2)
    splits = load(config(tmp_path, label_column="none"), PathsConfig())
    assert [part.images[:, 0, 4, 4].tolist() for part in splits] == [[1], [], [2]]


def test_a_readme_beside_the_one_folder_is_left_out_if_folders_are_chosen(folder: Path) -> None:
    (folder.parent / "README.md").write_text("hello")
    assert load(config(folder.parent, layout="folders"), PathsConfig()).train.classes == ("cat", "dog")
    assert "README.md is a file" in refused(config(folder.parent))


def test_class_folders_can_be_read_as_one_class(folder: Path) -> None:
    train = load(config(folder, label_column="none"), PathsConfig()).train
    assert train.classes == ("image",)
    assert train.images[:, 0, 4, 4].tolist() == [*range(10, 20), *range(100, 110)]
    assert "data.label_column=kind: imagefolder was not read from a table" in refused(
        config(folder, label_column="kind")
    )
    (folder / "cat/labels.csv").write_text("x")
    assert "cat/labels.csv is a table beside images" in refused(config(folder, label_column="none"))


def test_folders_that_are_nearly_roles_are_not_one_class(tmp_path: Path) -> None:
    """The images to test with would train."""
    write_image(tmp_path / "train_images/0.png", 1)
    write_image(tmp_path / "test_images/0.png", 2)
    assert refused(config(tmp_path, label_column="none")) == (
        f"data.source={tmp_path}: images lie in test_images, train_images; if these are roles, rename them "
        "to train, validation, test"
    )


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
        assert f"cow/{name} is no image that can be read: " in refused(config(folder))
        (folder / "cow" / name).unlink()
    (folder / "README").write_text("hello")
    assert "README is a file" in refused(config(folder))


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
        patched.setattr(Preprocessing, "prepare", None)
        again = load(config(folder), paths).train.images
    assert np.array_equal(first, in_memory) and np.array_equal(again, in_memory)
    write_image(folder / "cat" / "0.png", 77)
    load(dataclasses.replace(config(folder), image_size=6), paths)
    assert load(config(folder), paths).train.images[0, 0, 4, 4] == 77
    assert len(list((tmp_path / "cache/images").iterdir())) == 3


def write_roles(root: Path, red: dict[str, list[int]]) -> Path:
    """Images of one colour each; `red` has those of each `role/class`."""
    for place, values in red.items():
        for value in values:
            write_image(root / place / f"{value}.png", value)
    return root


def test_the_owner_is_told_of_images_that_train_and_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "train/cat": [1, 2, 3], "train/dog": [4, 5], "test/cat": [2, 3, 9], "test/dog": [6],
        "val/dog": [4, 7, 8],
    }  # fmt: skip
    load(config(write_roles(tmp_path / "set", parts)), PathsConfig())
    rest = "what is measured on these says nothing about images that were not trained on"
    assert capsys.readouterr().err.splitlines() == [
        f"data: validation images that train too (the same pixels): 1 of 3; {rest}",
        f"data: test images that train too (the same pixels): 2 of 4; {rest}",
    ]


def test_the_owner_is_told_of_a_picture_in_two_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(
        config(write_roles(tmp_path / "one", {"cat": [1, 2, 3], "dog": [3, 4], "cow": [3, 1]})), PathsConfig()
    )
    said = "data: pictures that stand in more than one class (the same pixels): "
    assert capsys.readouterr().err == f"{said}2\n"
    across = {"train/cat": [1], "train/dog": [2], "test/cat": [3], "test/dog": [1]}
    load(config(write_roles(tmp_path / "two", across)), PathsConfig())
    assert capsys.readouterr().err.splitlines()[-1] == f"{said}1"


def test_nothing_is_said_of_a_set_without_copies_in_other_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"train/cat": [1, 2], "train/dog": [4, 5], "test/cat": [3], "test/dog": [6]}
    write_roles(tmp_path / "set", parts)
    write_image(tmp_path / "set/train/cat/copy.png", 1)
    load(config(tmp_path / "set"), PathsConfig())
    assert capsys.readouterr().err == ""
    write_roles(tmp_path / "public", {"cat": [1], "dog": [1]})
    load(config(tmp_path / "public", public=True), PathsConfig(), "public_data")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"test_size": 0.9999}, "data.test_size=0.9999"),
        ({"validation_size": 0.9999}, "data.validation_size=0.9999"),
        (
            {"validation_size": 0.5, "test_size": 0.4999},
            "data.test_size=0.4999 with data.validation_size=0.5",
        ),
        ({"test_size": 0.1, "train_size": 0.0001}, "data.train_size=0.0001"),
    ],
)
def test_the_line_about_an_empty_part_names_what_was_given(
    folder: Path, settings: dict[str, float], named: str
) -> None:
    said = refused(config(folder, **settings))
    assert said.startswith(f"{named}: none of the 20 images fell to train, where ")
    assert said.endswith(" were expected; expected another fraction")
