"""Tables of images: parquet files and data sets of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data.sets import load
from tests.builders.image_files import config, encoded, refused, write_image, write_parquet


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
        "import sys; from dp_lora.data import tables; from dp_lora.config.schema import DataConfig\n"
        "from dp_lora.data.images import Preprocessing, Request; from pathlib import Path\n"
        "request = Request(DataConfig('imagefolder'), 'data', Path(), Path(sys.argv[2]))\n"
        "found = tables.read_hub(sys.argv[1], request, Preprocessing(8, 3))\n"
        "print(found.classes, found.train.labels.tolist(), found.train.images[:, 0, 4, 4].tolist())"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(parquet_folder / "home")}
    arguments = [sys.executable, "-c", script, str(parquet_folder), str(parquet_folder / "cache")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "('cat', 'dog') [0, 1, 0, 1, 0, 1] [10, 11, 12, 13, 14, 15]"


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
    texts = [f"text {i}" for i in range(30)]
    write_parquet(tmp_path / "x.parquet", 30, label=[i % 2 for i in range(30)], text=texts)
    found = load(
        config(tmp_path / "x.parquet", caption_column="text", test_size=0.3, train_size=0.8), PathsConfig()
    )
    assert len(found.train) > 2 and len(found.test) > 0
    for part in (found.train, found.test):
        pixels = part.images[:, 0, 4, 4].tolist()
        assert part.captions is not None and part.captions.tolist() == [f"text {pixel}" for pixel in pixels]
    assert found.train.subset(np.array([2])).captions == found.train.captions[2:3]
    assert "text" not in repr(found.train)
    assert load(config(tmp_path / "x.parquet"), PathsConfig()).train.captions is None


def test_captions_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "set/cat/0.png", 1)
    write_parquet(tmp_path / "x.parquet", 2, label=[0, 1], text=["a", None])
    said = refused(config(tmp_path / "x.parquet", caption_column="txt"))
    assert "data.caption_column=txt: expected one of image, label, text; did you mean 'text'?" in said
    said = refused(config(tmp_path / "x.parquet", caption_column="text"))
    assert said == "data.caption_column=text: expected one text for each image of train"
    said = refused(config(tmp_path / "set", caption_column="text"))
    assert (
        "data.caption_column=text: expected txt or caption, the ending of the texts beside the images" in said
    )


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
    assert "x.parquet says no role, beside files that do (test)" in refused(config(tmp_path))
    (tmp_path / "x.parquet").unlink()
    assert "no training rows, only test" in refused(config(tmp_path))


def test_splits_of_the_hub_of_one_role_are_refused_and_unknown_ones_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataConfig("imagefolder", source="owner/set", image_size=8)
    data.name = "emnist_letters"
    fake_hub(monkeypatch, {name: hub_rows(10, 8) for name in ("train", "val", "valid")})
    said = refused(data)
    assert said == (
        "data.source=owner/set: splits 'val' and 'valid' are both for validation; expected one of them"
    )
    fake_hub(monkeypatch, {"train": hub_rows(10, 8), "unlabelled": hub_rows(3, 8)})
    assert [len(part) for part in load(data, PathsConfig())] == [10, 0, 0]
    expected = "data.source=owner/set: split unlabelled is left out; its name says no role\n"
    assert capsys.readouterr().err == expected
