"""Odd but real folders: read as one would expect, or refused in a line that says what to do."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import PathsConfig
from dp_lora.data.pixels import shown
from dp_lora.data.sets import load
from dp_lora.errors import PrivateRefusal
from tests.builders.image_files import config, refused, write_parquet
from tests.builders.image_folders import (
    Make,
    both,
    image,
    latin1,
    link,
    pages,
    put,
    roles,
    saved_to_disk,
    two,
)

READ: dict[str, tuple[Make, dict[str, Any], tuple[str, ...], tuple[int, int, int]]] = {
    # name: what is made, settings, the classes, how many images train, choose and test
    "hidden files": (
        both(two, lambda f: put(f / ".DS_Store"), lambda f: put(f / "cat/.DS_Store")),
        {}, ("cat", "dog"), (6, 0, 0),
    ),
    "hidden folder": (both(two, lambda f: put(f / ".ipynb_checkpoints/x")), {}, ("cat", "dog"), (6, 0, 0)),
    "AppleDouble": (both(two, lambda f: put(f / "cat/._0.png")), {}, ("cat", "dog"), (6, 0, 0)),
    "Thumbs.db": (
        both(two, lambda f: put(f / "cat/Thumbs.db"), lambda f: put(f / "dog/desktop.ini")),
        {}, ("cat", "dog"), (6, 0, 0),
    ),
    "Thumbs.db beside the classes": (
        both(two, lambda f: put(f / "Thumbs.db")),
        {}, ("cat", "dog"), (6, 0, 0),
    ),
    "macOS archive": (both(two, lambda f: put(f / "__MACOSX/cat/._0.png")), {}, ("cat", "dog"), (6, 0, 0)),
    "Synology": (both(two, lambda f: put(f / "cat/@eaDir/x")), {}, ("cat", "dog"), (6, 0, 0)),
    "roles": (lambda f: roles(f, "train", "validation", "test"), {}, ("cat", "dog"), (6, 6, 6)),
    "val": (lambda f: roles(f, "train", "val"), {}, ("cat", "dog"), (6, 6, 0)),
    "valid": (lambda f: roles(f, "train", "valid", "test"), {}, ("cat", "dog"), (6, 6, 6)),
    "dev": (lambda f: roles(f, "train", "dev"), {}, ("cat", "dog"), (6, 6, 0)),
    "capitals": (lambda f: roles(f, "Train", "Test"), {}, ("cat", "dog"), (6, 0, 6)),
    "all capitals": (lambda f: roles(f, "TRAIN", "VAL", "TEST"), {}, ("cat", "dog"), (6, 6, 6)),
    "Training and Testing": (lambda f: roles(f, "Training", "Testing"), {}, ("cat", "dog"), (6, 0, 6)),
    "a class named train": (
        lambda f: two(f, ("boat", "car", "train")), {}, ("boat", "car", "train"), (9, 0, 0)
    ),
    "classes named train and test, as they are said to be": (
        lambda f: two(f, ("train", "test")), {"classes": ["train", "test"]}, ("train", "test"), (6, 0, 0)
    ),
    "classes named train and trail": (
        lambda f: two(f, ("trail", "train")), {}, ("trail", "train"), (6, 0, 0)
    ),
    "classes that begin as roles": (
        lambda f: two(f, ("test_tube", "train_station")), {}, ("test_tube", "train_station"), (6, 0, 0)
    ),
    "classes named test and control": (
        lambda f: two(f, ("control", "test")), {}, ("control", "test"), (6, 0, 0)
    ),
    "classes named val and test": (lambda f: two(f, ("val", "test")), {}, ("test", "val"), (6, 0, 0)),
    "numbers": (lambda f: two(f, ("0", "1", "10", "2")), {}, ("0", "1", "10", "2"), (12, 0, 0)),
    "classes that differ in case": (lambda f: two(f, ("Cat", "cat")), {}, ("Cat", "cat"), (6, 0, 0)),
    "letters of all kinds": (
        lambda f: two(f, ("müde", "猫", "😀 smile")), {}, ("müde", "猫", "😀 smile"), (9, 0, 0)
    ),
    "blanks and quotes": (
        lambda f: two(f, ("dog's, etc", "my cats")),
        {}, ("dog's, etc", "my cats"), (6, 0, 0),
    ),
    "one class": (lambda f: two(f, ("cat",)), {}, ("cat",), (3, 0, 0)),
    "no classes": (lambda f: [image(f / f"{i}.png") for i in range(3)], {}, ("image",), (3, 0, 0)),
    "no classes, and a table that is left out": (
        lambda f: [image(f / "0.png"), put(f / "labels.csv")], {"layout": "folders"}, ("image",), (1, 0, 0)
    ),
    "wrapped": (lambda f: two(f / "images"), {}, ("cat", "dog"), (6, 0, 0)),
    "wrapped roles": (lambda f: roles(f / "chest_xray", "Train", "Test"), {}, ("cat", "dog"), (6, 0, 6)),
    "wrapped beside what macOS leaves": (
        both(lambda f: roles(f / "set", "train", "VALID"), lambda f: put(f / "__MACOSX/set/._x")),
        {}, ("cat", "dog"), (6, 6, 0),
    ),
    "one role": (lambda f: roles(f, "train"), {}, ("cat", "dog"), (6, 0, 0)),
    "one image": (lambda f: two(f, ("cat",), 1), {}, ("cat",), (1, 0, 0)),
    "a link to an image": (
        both(two, lambda f: link(f, str(f / "cat/0.png"), "dog/9.png")), {}, ("cat", "dog"), (7, 0, 0)
    ),
    "a link to a class folder": (
        both(two, lambda f: two(f.parent / "elsewhere", ("cow",)),
             lambda f: link(f, str(f.parent / "elsewhere/cow"), "cow")),
        {}, ("cat", "cow", "dog"), (9, 0, 0),
    ),
    "a name that is not UTF-8": (
        both(two, lambda f: latin1(f, "cat", b"m\xfcde.png")), {}, ("cat", "dog"), (7, 0, 0)
    ),
    "a name with a line break": (
        both(two, lambda f: image(f / "cat/a\nb.png")),
        {}, ("cat", "dog"), (7, 0, 0),
    ),
    "no ending": (
        both(two, lambda f: shutil.copy(f / "cat/0.png", f / "cat/noending")), {}, ("cat", "dog"), (7, 0, 0)
    ),
    "a table beside folders, folders chosen": (
        both(two, lambda f: put(f / "labels.csv")), {"layout": "folders"}, ("cat", "dog"), (6, 0, 0)
    ),
    "parquet beside folders, folders chosen": (
        both(two, lambda f: write_parquet(f / "x.parquet", 4)),
        {"layout": "folders"}, ("cat", "dog"), (6, 0, 0),
    ),
    "parquet beside folders, tables chosen": (
        both(lambda f: two(f, ("cat", "cow")), lambda f: write_parquet(f / "x.parquet", 4)),
        {"layout": "tables"}, ("cat", "dog"), (4, 0, 0),
    ),
    "parquet in a class folder, folders chosen": (
        both(two, lambda f: write_parquet(f / "cat/x.parquet", 4)),
        {"layout": "folders"}, ("cat", "dog"), (6, 0, 0),
    ),
    "a readme beside folders, folders chosen": (
        both(two, lambda f: put(f / "README.md")), {"layout": "folders"}, ("cat", "dog"), (6, 0, 0)
    ),
    "parquet as the hub exports it": (
        both(lambda f: write_parquet(f / "data/train-0.parquet", 4),
             lambda f: write_parquet(f / "data/test-0.parquet", 2), lambda f: put(f / "README.md")),
        {}, ("cat", "dog"), (4, 0, 2),
    ),
    "parquet in a folder that is called test": (
        lambda f: write_parquet(f / "test_of_mine/x.parquet", 4), {"below": "test_of_mine"},
        ("cat", "dog"), (4, 0, 0),
    ),
    "hidden parquet": (
        both(two, lambda f: write_parquet(f / ".cache/x.parquet", 4)), {}, ("cat", "dog"), (6, 0, 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_it_is_read(tmp_path: Path, name: str) -> None:
    make, settings, classes, counts = READ[name]
    make(tmp_path / "set")
    folder = tmp_path / "set" / settings.pop("below", "") if "below" in settings else tmp_path / "set"
    splits = load(config(folder, **settings), PathsConfig())
    assert splits.train.classes == classes
    assert tuple(len(part) for part in splits) == counts


REFUSED: dict[str, tuple[Make, dict[str, Any], str]] = {
    # name: what is made, settings, the line with {} for the folder
    "val beside valid": (
        lambda f: roles(f, "train", "val", "valid"), {},
        "data.source={}: folders 'val' and 'valid' are both for validation; expected one of them",
    ),
    "dev beside validation": (
        lambda f: roles(f, "train", "dev", "validation"), {},
        "data.source={}: folders 'dev' and 'validation' are both for validation; expected one of them",
    ),
    "Train beside TRAIN": (
        lambda f: roles(f, "TRAIN", "Train"), {},
        "data.source={}: folders 'TRAIN' and 'Train' are both for train; expected one of them",
    ),
    "test beside Testing": (
        lambda f: roles(f, "train", "test", "Testing"), {},
        "data.source={}: folders 'Testing' and 'test' are both for test; expected one of them",
    ),
    "no train": (
        lambda f: roles(f, "val", "test"), {},
        "data.source: no folder train in {}, only test, val; expected it beside them",
    ),
    "a misspelt role": (
        lambda f: roles(f, "train", "tset"), {},
        "data.source: folder 'tset' beside train in {}; expected train, validation, test; did you mean "
        "'test'?",
    ),
    "a test part without classes": (
        both(lambda f: roles(f, "train"), lambda f: image(f / "test/0.png")), {},
        "data.source: {}/test/0.png is a file, and no class folders are beside it; expected a folder of "
        "images for each class",
    ),
    "a class that does not train": (
        both(lambda f: roles(f, "train", "test"), lambda f: image(f / "test/cow/0.png")), {},
        "data.source: class 'cow' of {}/test has no training images",
    ),
    "wrapped twice": (
        lambda f: two(f / "set" / "images"), {},
        "data.source={}/set: holds only the folder images with folders in it; did you mean "
        "data.source={}/set/images?",
    ),
    "roles that are wrapped": (
        lambda f: two(f / "train" / "images"), {},
        "data.source={}/train: holds only the folder images with folders in it; did you mean "
        "data.source={}/train/images?",
    ),
    "nested": (
        both(lambda f: image(f / "cat/siamese/0.png"), lambda f: image(f / "dog/0.png")), {},
        "data.source: class folder {}/cat holds the folder siamese; expected images directly in each "
        "class folder",
    ),
    "a table beside images": (
        lambda f: (image(f / "0.png"), put(f / "labels.csv")), {},
        "data.source: {}/labels.csv is a table beside images, which may say their classes; expected "
        "metadata.csv, metadata.jsonl or metadata.parquet with a column file_name, or data.layout=folders, "
        "which leaves it out",
    ),
    "captions beside images": (
        lambda f: (image(f / "0.png"), put(f / "0.txt")), {},
        "data.source: {}/0.txt: a caption beside an image; expected images alone, or "
        "data.caption_column=txt, with which a text-to-image model is trained",
    ),
    "a zip archive beside class folders": (
        both(two, lambda f: put(f / "images.zip")), {},
        "data.source: {}/images.zip is a zip archive; expected data.source={}/images.zip, if it holds the "
        "set, or its files unpacked",
    ),
    "images beside class folders": (
        both(two, lambda f: image(f / "0.png")), {},
        "data.source: {}/0.png is a file; expected only class folders there, or data.layout=folders, which "
        "takes the classes from the folders and leaves it out",
    ),
    "a table alone": (
        lambda f: put(f / "labels.csv"), {},
        "data.source: {}/labels.csv is a file, and no class folders are beside it; expected a folder of "
        "images for each class, or a parquet file as data.source",
    ),
    "save_to_disk": (
        saved_to_disk, {},
        "data.source={}: holds data-00000-of-00001.arrow, as save_to_disk of Hugging Face's datasets writes "
        "it, which is not read; expected parquet files, one for each role: "
        "load_from_disk(folder)['train'].to_parquet('train.parquet')",
    ),
    "save_to_disk, with roles": (
        lambda f: (put(f / "dataset_dict.json"), saved_to_disk(f / "train"), saved_to_disk(f / "test")), {},
        "data.source={}: holds test/data-00000-of-00001.arrow, as save_to_disk of Hugging Face's datasets "
        "writes it, which is not read; expected parquet files, one for each role: "
        "load_from_disk(folder)['train'].to_parquet('train.parquet')",
    ),
    "train and test without classes": (
        lambda f: two(f, ("train", "test")), {},
        "data.source={}: images lie directly in test, train, which may be roles or classes; expected a "
        "folder for each class in them, such as train/images, or data.label_column=none, if they are roles, "
        "or data.classes=[test,train] if they are classes",
    ),
    "three roles without classes": (
        lambda f: two(f, ("Training", "Testing", "VAL")), {"test_size": 0.5},
        "data.source={}: images lie directly in Testing, Training, VAL, which may be roles or classes; "
        "expected a folder for each class in them, such as Training/images, or data.label_column=none, if "
        "they are roles, or data.classes=[Testing,Training,VAL] if they are classes",
    ),
    "nearly roles without classes": (
        lambda f: two(f, ("train_images", "test_images")), {},
        "data.source={}: images lie directly in test_images, train_images, which may be roles or classes; "
        "expected a folder for each class in them, such as train_images/images, if they are roles, or "
        "data.classes=[test_images,train_images] if they are classes",
    ),
    "empty": (
        lambda f: f.mkdir(),
        {}, "data.source: {} is empty; expected a folder of images for each class",
    ),
    "an empty class": (
        both(two, lambda f: (f / "cow").mkdir()), {},
        "data.source: class folder {}/cow is empty; expected images",
    ),
    "a class of hidden files": (
        both(two, lambda f: put(f / "cow/.keep")),
        {}, "data.source: class folder {}/cow is empty; expected images"
    ),
    "labels.csv": (
        both(two, lambda f: put(f / "labels.csv")), {},
        "data.source: {}/labels.csv is a file beside class folders: the classes may be in it or in the "
        "names of "
        "the folders; expected data.layout=folders, which takes the classes from the folders and leaves it "
        "out, "
        "or a parquet file as data.source",
    ),
    "a stray parquet file": (
        both(two, lambda f: write_parquet(f / "x.parquet", 4)), {},
        "data.source={}: holds the table x.parquet and the image cat/0.png; expected data.layout=tables, "
        "which "
        "reads the parquet files, or data.layout=folders, which reads the class folders",
    ),
    "a parquet file in a class folder": (
        both(two, lambda f: write_parquet(f / "dog/x.parquet", 4)), {},
        "data.source={}: holds the table dog/x.parquet and the image cat/0.png; expected "
        "data.layout=tables, which "
        "reads the parquet files, or data.layout=folders, which reads the class folders",
    ),
    "a parquet file beside roles": (
        both(lambda f: roles(f, "train", "test"), lambda f: write_parquet(f / "x.parquet", 4)), {},
        "data.source={}: holds the table x.parquet and the image test/cat/0.png; expected "
        "data.layout=tables, "
        "which reads the parquet files, or data.layout=folders, which reads the class folders",
    ),
    "a parquet file beside a linked class": (
        both(lambda f: two(f.parent / "elsewhere", ("cow",)), lambda f: write_parquet(f / "x.parquet", 4),
             lambda f: link(f, str(f.parent / "elsewhere/cow"), "cow")), {},
        "data.source={}: holds the table x.parquet and the image cow/0.png; expected data.layout=tables, "
        "which "
        "reads the parquet files, or data.layout=folders, which reads the class folders",
    ),
    "tables asked for": (
        two, {"layout": "tables"}, "data.layout=tables: no parquet file in {}; expected some, or null"
    ),
    "a table without a role beside tables with one": (
        both(
            lambda f: write_parquet(f / "train-0.parquet", 4), lambda f: write_parquet(f / "new.parquet", 2)
        ),
        {},
        "data.source={}: new.parquet says no role, beside files that do (train); expected train, "
        "validation or "
        "test in its name",
    ),
    "tables val and valid": (
        both(*(lambda f, n=n: write_parquet(f / f"{n}-0.parquet", 4) for n in ("train", "val", "valid"))), {},
        "data.source={}: files 'val' and 'valid' are both for validation; expected one of them",
    ),
    "a link to nothing": (
        both(two, lambda f: link(f, "/nonexistent/x.png", "cat/9.png")), {},
        "data.source: {}/cat/9.png is no image that can be read: a link to nothing",
    ),
    "a link that loops": (
        both(two, lambda f: link(f, "9.png", "cat/9.png")), {},
        "data.source: {}/cat/9.png is no image that can be read: a link that leads back to itself",
    ),
    "a folder that loops": (
        both(two, lambda f: link(f, "..", "cat/up")), {},
        "data.source: class folder {}/cat holds the folder up; expected images directly in each class folder",
    ),
    "a class that is a link to nothing": (
        both(two, lambda f: link(f, "/nonexistent", "cow")), {},
        "data.source: {}/cow is a link to nothing; expected a class folder",
    ),
    "a class that is a link that loops": (
        both(two, lambda f: link(f, "cow", "cow")), {},
        "data.source: {}/cow is a link that leads back to itself; expected a class folder",
    ),
    "a pipe": (
        both(two, lambda f: os.mkfifo(f / "cat/pipe")), {},
        "data.source: {}/cat/pipe is no image that can be read: no regular file",
    ),
    "zero bytes": (
        both(two, lambda f: put(f / "cat/9.png", b"")), {},
        "data.source: {}/cat/9.png is no image that can be read: empty (0 bytes)",
    ),
    "nothing but zeros": (
        both(two, lambda f: put(f / "cat/9.png", bytes(4096))), {},
        "data.source: {}/cat/9.png is no image that can be read: nothing but zero bytes",
    ),
    "HTML": (
        both(two, lambda f: put(f / "cat/9.jpg", "\n<!DOCTYPE html><html>404</html>")), {},
        "data.source: {}/cat/9.jpg is no image that can be read: an HTML page",
    ),
    "Git LFS": (
        both(two, lambda f: put(f / "cat/9.jpg", "version https://git-lfs.github.com/spec/v1\noid sha256:1")),
        {},
        "data.source: {}/cat/9.jpg is no image that can be read: a pointer of Git LFS; `git lfs pull` "
        "fetches the "
        "file",
    ),
    "text": (
        both(two, lambda f: put(f / "cat/9.txt", "a cat")), {},
        "data.source: {}/cat/9.txt is no image that can be read: text",
    ),
    "SVG": (
        both(two, lambda f: put(f / "cat/0.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>")), {},
        "data.source: {}/cat/0.svg is no image that can be read: a drawing (SVG); expected pixels",
    ),
    "EPS": (
        both(two, lambda f: Image.new("RGB", (8, 8)).save(f / "cat/0.eps")), {},
        "data.source: {}/cat/0.eps is no image that can be read: a drawing (PostScript); expected pixels",
    ),
    "PostScript": (
        both(two, lambda f: put(f / "cat/0.jpg", "%!PS-Adobe-3.0\nshowpage\n")), {},
        "data.source: {}/cat/0.jpg is no image that can be read: a drawing (PostScript); expected pixels",
    ),
    "EMF": (
        both(two, lambda f: put(f / "cat/0.emf", b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60))), {},
        "data.source: {}/cat/0.emf is no image that can be read: a drawing (WMF or EMF); expected pixels",
    ),
    "thumbnails alone": (
        both(two, lambda f: pages(f / "cat/0.tif", (4, {254: 1}), (2, {254: 1}))), {},
        "data.source: {}/cat/0.tif is no image that can be read: a TIFF with thumbnails alone; expected the "
        "image itself",
    ),
    "HEIC": (
        both(two, lambda f: put(f / "cat/0.heic", b"\0\0\0\x18ftypheic\0\0\0\0")), {},
        "data.source: {}/cat/0.heic is no image that can be read: HEIC, which cannot be read; expected PNG "
        "or JPEG",
    ),
    "a zip": (
        both(two, lambda f: put(f / "cat/0.png", b"PK\x03\x04\xff\xff")), {},
        "data.source: {}/cat/0.png is no image that can be read: a zip archive",
    ),
    "noise": (
        both(two, lambda f: put(f / "cat/0.png", bytes(range(128, 256)))), {},
        "data.source: {}/cat/0.png is no image that can be read: of no format that is known, or cut off at "
        "its "
        "beginning",
    ),
    "a damaged file whose name is not UTF-8": (
        both(two, lambda f: put(Path(os.fsdecode(os.fsencode(f) + b"/cat/m\xfcde.png")), b"")), {},
        "data.source: {}/cat/m\\xfcde.png is no image that can be read: empty (0 bytes)",
    ),
    "a class whose name is not UTF-8": (
        both(two, lambda f: latin1(f, os.fsdecode(b"m\xfcde"), b"0.png")), {},
        "data.source: class folder {}/m\\xfcde has a name that is not UTF-8, or characters that cannot be "
        "printed; expected text, since the names of classes are released",
    ),
    "absent": (lambda f: None, {}, "data.source={}: no such folder; expected a folder of class folders, "
               "or a zip archive of one"),
    "a zip of the set": (
        both(two, lambda f: shutil.make_archive(f"{f}.zip.parts", "zip", f), shutil.rmtree, lambda f: put(f)),
        {},
        "data.source={}: a file; expected a folder of class folders, or a zip archive of one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, settings, said = REFUSED[name]
    make(tmp_path / "set")
    assert refused(config(tmp_path / "set", **settings)) == said.replace("{}", str(tmp_path / "set"))


def test_all_damaged_files_are_listed_each_with_its_reason(tmp_path: Path) -> None:
    roles(tmp_path / "set", "train", "test")
    put(tmp_path / "set/train/cat/a.png", b"")
    link(tmp_path / "set", "/nonexistent", "train/dog/b.png")
    put(tmp_path / "set/test/cat/c.png", "<html>")
    with pytest.raises(PrivateRefusal) as caught:
        load(config(tmp_path / "set"), PathsConfig())
    assert str(caught.value).split("\n") == [
        "data.source: 3 files are no images that can be read:",
        f"  {tmp_path}/set/train/cat/a.png: empty (0 bytes)",
        f"  {tmp_path}/set/train/dog/b.png: a link to nothing",
        f"  {tmp_path}/set/test/cat/c.png: an HTML page",
    ]


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "tif", "bmp", "jp2"])
def test_a_file_that_is_cut_short_is_said_to_be(tmp_path: Path, ending: str) -> None:
    two(tmp_path / "set")
    path = tmp_path / f"set/cat/cut.{ending}"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    assert f"cut.{ending} is no image that can be read: " in (said := refused(config(tmp_path / "set")))
    assert "cut short or damaged" in said or "cut off" in said


def test_a_file_with_too_many_pixels_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two(tmp_path / "set")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (30, 30)).save(tmp_path / "set/cat/large.png")
    said = refused(config(tmp_path / "set"))
    assert said.endswith("large.png is no image that can be read: too large: more pixels than an image has")


def test_a_file_of_many_pixels_is_read_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    two(tmp_path / "set")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (12, 12)).save(tmp_path / "set/cat/large.png")
    warnings.simplefilter("always")
    assert len(load(config(tmp_path / "set"), PathsConfig()).train) == 7
    assert not [warned for warned in recwarn if warned.category is Image.DecompressionBombWarning]


@pytest.mark.parametrize(
    "before",
    [[], [{254: 1}], [{255: 2}], [{254: 4}], [{254: 5}, {254: 1}]],
    ids=["nothing", "a thumbnail", "an old thumbnail", "a mask", "two of them"],
)
@pytest.mark.parametrize("resample", ["pad", "bicubic"])
def test_the_first_page_that_is_no_thumbnail_is_the_image(
    tmp_path: Path, before: list[dict[int, int]], resample: str
) -> None:
    """A page of several (2) is an image, as one that says nothing is."""
    small = [(4 + number, tags) for number, tags in enumerate(before)]
    pages(tmp_path / "set/cat/0.tif", *small, (8, {254: 2}), (7, {}))
    (image,) = load(config(tmp_path / "set", channels=1, resample=resample), PathsConfig()).train.images
    assert (image == 8).all()


def test_names_are_shown_as_they_can_be_printed() -> None:
    assert shown(os.fsdecode(b"m\xfcde\n.png")) == r"m\xfcde\x0a.png"
    assert shown("müde 猫.png") == "müde 猫.png"
