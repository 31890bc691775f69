"""Sets in zip archives, and what operating systems leave beside images."""

from __future__ import annotations

import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data import images
from dp_lora.data.sets import load
from dp_lora.errors import PrivateRefusal
from tests.builders.image_files import config, refused, write_image
from tests.builders.image_folders import put, roles, two

LABELS = "file_name,label\n1.png,dog\n0.png,cat\n3.png,dog\n2.png,cat\n"


def zipped(folder: Path, *, below: str = "", backslashes: bool = False) -> Path:
    """The archive of a folder, beside it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            name = below + file.relative_to(folder).as_posix() + ("/" if file.is_dir() else "")
            member = zipfile.ZipInfo(name.replace("/", "\\") if backslashes else name)
            archive.writestr(member, b"" if file.is_dir() else file.read_bytes())
    return path


def numbered(folder: Path, metadata: str | None = None) -> None:
    for i in range(4):
        write_image(folder / f"{i}.png", 10 * i)
    if metadata is not None:
        put(folder / "metadata.csv", metadata)


LAYOUTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[int, int, int]]] = {
    "class folders": (two, ("cat", "dog"), (6, 0, 0)),
    "roles": (lambda f: roles(f, "Training", "Testing", "valid"), ("cat", "dog"), (6, 6, 6)),
    "no classes": (numbered, ("image",), (4, 0, 0)),
    "metadata": (lambda f: numbered(f, LABELS), ("cat", "dog"), (4, 0, 0)),
    "metadata of roles": (
        lambda f: (numbered(f / "train", LABELS), numbered(f / "TEST", LABELS)), ("cat", "dog"), (4, 0, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("backslashes", [False, True], ids=["", "as Windows writes it"])
@pytest.mark.parametrize("below", ["", "set of mine/"], ids=["", "wrapped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_archive_is_read_as_its_folder(tmp_path: Path, layout: str, below: str, backslashes: bool) -> None:
    make, classes, counts = LAYOUTS[layout]
    make(tmp_path / "set")
    if layout == "no classes" and below:
        classes = ("set of mine",)  # one folder of images is a class, in an archive as anywhere
    folder = load(config(tmp_path / "set"), PathsConfig())
    archive = load(config(zipped(tmp_path / "set", below=below, backslashes=backslashes)), PathsConfig())
    assert archive.train.classes == classes
    assert tuple(len(part) for part in archive) == counts
    for ours, theirs in zip(archive, folder, strict=True):
        assert np.array_equal(ours.images, theirs.images)
        assert np.array_equal(ours.labels, theirs.labels)
        assert ours.digests is not None
        assert theirs.digests is not None
        assert np.array_equal(ours.digests, theirs.digests)


@pytest.mark.parametrize("below", [False, True], ids=["", "each with its folder"])
def test_archives_in_a_folder_stand_for_folders(tmp_path: Path, below: bool) -> None:
    """As `imagefolder` of Hugging Face's datasets: train.zip and test.zip, with metadata in each."""
    numbered(tmp_path / "parts/Train", LABELS)
    numbered(tmp_path / "parts/test", LABELS)
    for name in ("Train", "test"):
        zipped(tmp_path / "parts" / name, below=f"{name}/" if below else "")
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "parts" / f"{name}.zip").rename(tmp_path / "set" / f"{name}.zip")
    put(tmp_path / "set/Thumbs.db")
    splits = load(config(tmp_path / "set"), PathsConfig())
    for part in (splits.train, splits.test):
        assert part.images[:, 0, 4, 4].tolist() == [10, 0, 30, 20]
        assert [part.classes[label] for label in part.labels] == ["dog", "cat", "dog", "cat"]
    with zipfile.ZipFile(tmp_path / "set/test.zip", "a") as archive:
        archive.writestr("test/9.png" if below else "9.png", "")
    assert (
        refused(config(tmp_path / "set"))
        == "data.source: test/9.png: no row; expected one row for each image"
    )


def test_archives_of_classes(tmp_path: Path) -> None:
    two(tmp_path / "set")
    for name in ("cat", "dog"):
        zipped(tmp_path / "set" / name)
        shutil.rmtree(tmp_path / "set" / name)
    train = load(config(tmp_path / "set"), PathsConfig()).train
    assert train.classes == ("cat", "dog")
    assert len(train) == 6
    with zipfile.ZipFile(tmp_path / "set/dog.zip", "a") as archive:
        archive.writestr("9.png", "")
    assert refused(config(tmp_path / "set")) == (
        f"data.source: {tmp_path}/set/dog.zip/9.png is no image that can be read: empty (0 bytes)"
    )


def test_a_folder_that_holds_the_archive_of_the_set(tmp_path: Path) -> None:
    two(tmp_path / "parts/images")
    (tmp_path / "set").mkdir()
    zipped(tmp_path / "parts/images").rename(tmp_path / "set/images.zip")
    assert load(config(tmp_path / "set"), PathsConfig()).train.classes == ("cat", "dog")


def test_the_pixels_and_classes_of_an_archive(tmp_path: Path) -> None:
    numbered(tmp_path / "set", LABELS)
    train = load(config(zipped(tmp_path / "set")), PathsConfig()).train
    assert train.images[:, 0, 4, 4].tolist() == [10, 0, 30, 20]
    assert train.labels.tolist() == [1, 0, 1, 0]


def test_a_published_set_can_be_ones_own_archive(tmp_path: Path) -> None:
    two(tmp_path / "set")
    settings: dict[str, Any] = {"source": str(zipped(tmp_path / "set")), "image_size": 8, "channels": 3}
    assert load(DataConfig("cifar10", **settings), PathsConfig()).train.classes == ("cat", "dog")


def test_many_images_of_an_archive_are_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(tmp_path / "set", LABELS)
    paths = PathsConfig(cache=str(tmp_path / "cache"))
    monkeypatch.setattr(images, "STORED_BYTES", 100)
    source = zipped(tmp_path / "set")
    first = load(config(source), paths).train.images
    assert np.array_equal(load(config(source), paths).train.images, first)
    assert len(list((tmp_path / "cache/images").iterdir())) == 1
    write_image(tmp_path / "set/1.png", 77)
    assert load(config(zipped(tmp_path / "set")), paths).train.images[0, 0, 4, 4] == 77


def test_images_of_several_archives_are_read_again_when_one_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, name in ((10, "a"), (20, "b"), (30, "c")):
        write_image(tmp_path / "parts" / name / "0.png", value)
        (tmp_path / "set").mkdir(exist_ok=True)
        content = zipped(tmp_path / "parts" / name).read_bytes()
        (tmp_path / ("other" if name == "c" else f"set/{name}.zip")).write_bytes(content)
    paths = PathsConfig(cache=str(tmp_path / "cache"))
    monkeypatch.setattr(images, "STORED_BYTES", 100)
    assert load(config(tmp_path / "set"), paths).train.images[:, 0, 4, 4].tolist() == [10, 20]
    (tmp_path / "set/b.zip").write_bytes((tmp_path / "other").read_bytes())
    assert load(config(tmp_path / "set"), paths).train.images[:, 0, 4, 4].tolist() == [10, 30]


def test_damaged_members_are_listed(tmp_path: Path) -> None:
    two(tmp_path / "set")
    put(tmp_path / "set/cat/a.png", "<html>")
    put(tmp_path / "set/cat/b.png", b"0123456789 and so on")
    put(tmp_path / "set/dog/c.dng", "raw")
    path = zipped(tmp_path / "set")
    path.write_bytes(path.read_bytes().replace(b"0123456789 and", b"9876543210 and"))
    with pytest.raises(PrivateRefusal) as caught:
        load(config(path), PathsConfig())
    assert str(caught.value).split("\n") == [
        "data.source: 3 files are no images that can be read:",
        f"  {path}/cat/a.png: an HTML page",
        f"  {path}/cat/b.png: damaged in the archive (Bad CRC-32 for file 'cat/b.png')",
        f"  {path}/dog/c.dng: a raw file of a camera; expected PNG or JPEG",
    ]


def test_an_archive_with_a_password_is_refused_in_one_line(tmp_path: Path) -> None:
    two(tmp_path / "set")
    path = zipped(tmp_path / "set")
    content = bytearray(path.read_bytes())
    for place in range(len(content) - 4):
        if content[place : place + 4] == b"PK\1\2":  # an entry of the directory; its flags follow
            content[place + 8] |= 1
    path.write_bytes(content)
    assert refused(config(path)) == (
        f"data.source={path}: cannot be read (it needs a password); expected a folder, a zip archive or "
        "several"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cat/0.png", "it holds 'cat/0.png' twice"),
        ("../../x.png", "it holds '../../x.png', which leads out of it"),
    ],
)
def test_an_archive_with_a_name_twice_or_outside_of_it_is_refused(
    name: str, reason: str, tmp_path: Path
) -> None:
    path = zipped(two(tmp_path / "set"))
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile itself warns of a name that is there
        archive.writestr(name, (tmp_path / "set/cat/1.png").read_bytes())
    assert refused(config(path)) == (
        f"data.source={path}: cannot be read ({reason}); expected a folder, a zip archive or several"
    )


def test_what_systems_leave_behind_is_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two(tmp_path / "set")
    litter = ["Thumbs.db", "cat/Thumbs.db", "dog/desktop.ini", "cat/@eaDir/0.png/x.jpg", "cat/._0.png",
              "dog/._1.png", "__MACOSX/cat/._0.png", ".DS_Store", "cat/.keep", ".hidden/0.png"]  # fmt: skip
    for name in litter:
        put(tmp_path / "set" / name)
    said = (
        "data: skipped 8 left behind by operating systems or tools: .DS_Store 1, ._* 2, @eaDir 1, "
        "Thumbs.db 2, __MACOSX 1, desktop.ini 1"
    )
    assert len(load(config(tmp_path / "set"), PathsConfig()).train) == 6
    assert capsys.readouterr().err.splitlines()[0] == said
    assert len(load(config(zipped(tmp_path / "set")), PathsConfig()).train) == 6
    assert capsys.readouterr().err.splitlines()[0] == said


def test_the_owner_is_told_of_a_folder_around_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two(tmp_path / "set/images")
    load(config(tmp_path / "set"), PathsConfig())
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"data.source={tmp_path}/set: read from images, the one folder in it"
