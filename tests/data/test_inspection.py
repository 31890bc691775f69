"""What is found in a whole set; every number is of the files that are written here."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data import images, sets
from dp_lora.data.inspection import Inspection, inspect
from dp_lora.errors import PrivateRefusal, UserError
from tests.builders.image_files import config, write_image, write_parquet
from tests.builders.image_folders import image, put


def saved(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mixed(folder: Path) -> Path:
    """Five images in two classes: two of one colour, two with the same pixels, four sizes and three modes."""
    ramp = np.arange(96, dtype=np.uint8).reshape(8, 12)
    ramp[-1, -1] = 0  # as the first one
    saved(folder / "cat/ramp.png", ramp)
    saved(folder / "dog/copy.bmp", ramp)
    saved(folder / "cat/deep.png", np.arange(5, 69, dtype=np.uint16).reshape(8, 8) * 900)
    saved(folder / "dog/grey.png", np.full((6, 5), 7, np.uint8))
    saved(folder / "dog/red.png", np.full((10, 20, 3), (200, 0, 30), np.uint8))
    return folder


def section(found: Inspection, word: str) -> list[str]:
    return dict(found.sections())[word]


def looked(folder: Path, **settings: object) -> Inspection:
    return inspect(config(folder, **settings), PathsConfig(), progress="off")


def test_counts_classes_sizes_modes_and_values(tmp_path: Path) -> None:
    found = looked(mixed(tmp_path))
    found.verdict()
    assert found.sections() == [
        ("set", [f"imagefolder, {tmp_path}"]),
        ("images", ["5 (train 5)"]),
        ("classes", ["2", "cat: train 2", "dog: train 3"]),
        ("sizes", ["12 x 8: 2, 8 x 8: 1, 5 x 6: 1, 20 x 10: 1"]),
        ("modes", ["L: 3, values 0 to 94", "I;16: 1, values 4500 to 61200", "RGB: 1, values 0 to 200"]),
        ("constant", ["2 of 5", f"{tmp_path}/dog/grey.png", f"{tmp_path}/dog/red.png"]),
        ("copies", ["1 of 5, by pixels", f"{tmp_path}/cat/ramp.png = {tmp_path}/dog/copy.bmp"]),
        ("wrong", ["0"]),
        (
            "notes",
            [
                "data: pictures that stand in more than one class (the same pixels): 1",
                "data: 20% of the images are nearly constant; is data.value_range right for all?",
            ],
        ),
    ]


def test_every_file_is_listed_with_what_is_wrong(tmp_path: Path) -> None:
    mixed(tmp_path)
    put(tmp_path / "cat/a.png", b"")
    put(tmp_path / "dog/b.png", "<html>")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "dog/c.tif")
    found = looked(tmp_path)
    assert section(found, "wrong") == [
        "3",
        f"{tmp_path}/cat/a.png: empty (0 bytes)",
        f"{tmp_path}/dog/b.png: an HTML page",
        f"{tmp_path}/dog/c.tif: data.value_range=null: holds floating-point numbers, which have no range of "
        "their own; expected the values of black and white, such as data.value_range=[0,1]",
    ]
    assert section(found, "images") == ["5 that can be read"]
    assert section(found, "constant")[0] == "2 of 5"
    with pytest.raises(PrivateRefusal, match=r"^data: 3 files or rows are wrong, as listed; expected none$"):
        found.verdict()


def test_rows_that_do_not_match_are_listed_with_damaged_files(tmp_path: Path) -> None:
    """The rest is read all the same, so that one call finds everything."""
    for i in range(4):
        write_image(tmp_path / f"{i}.png", i + 1)
    put(tmp_path / "4.png", "<html>")
    rows = ["0.png,x", "1.png,x", "9.png,x", "1.png,y", "4.png,x", "2.png,"]
    put(tmp_path / "metadata.csv", "\n".join(["file_name,label", *rows]))
    found = looked(tmp_path)
    assert section(found, "wrong") == [
        "5",
        "9.png: no such file (line 4 of metadata.csv)",
        "2.png: no value of label (line 7 of metadata.csv)",
        "1.png: 2 rows (line 3 of metadata.csv, line 5 of metadata.csv)",
        "3.png: no row",
        f"{tmp_path}/4.png: an HTML page",
    ]
    assert section(found, "images") == ["2 that can be read"]


def test_roles_captions_and_what_was_skipped(tmp_path: Path) -> None:
    for role, count in (("Train", 4), ("test", 2)):
        rows = [f"{i}.png,{'xy'[i % 2]},text {i}" for i in range(count)]
        put(tmp_path / role / "metadata.csv", "\n".join(["file_name,label,text", *rows]))
        for i in range(count):
            saved(tmp_path / role / f"{i}.png", np.full((4, 4), 60 * i, np.uint8) + np.eye(4, dtype=np.uint8))
    put(tmp_path / "Thumbs.db")
    found = looked(tmp_path, caption_column="text", value_range=[0, 2])
    assert section(found, "images") == ["6 (train 4, test 2)"]
    assert section(found, "classes") == ["2", "x: train 2, test 1", "y: train 2, test 1"]
    assert section(found, "captions") == ["6"]
    assert (
        section(found, "notes")[0] == "data: skipped 1 left behind by operating systems or tools: Thumbs.db 1"
    )
    assert "test images that train too (the same pixels): 2 of 2" in section(found, "notes")[1]


def test_the_roles_are_those_of_a_job(tmp_path: Path) -> None:
    for i in range(40):
        saved(tmp_path / f"cat/{i}.png", np.arange(i, i + 64, dtype=np.uint8).reshape(8, 8) * 2)
    settings = {"test_size": 0.3, "validation_size": 0.2}
    splits = sets.load(config(tmp_path, **settings), PathsConfig())
    counts = [len(part) for part in splits]
    assert sum(counts) == 40
    assert 0 < counts[0] < 40
    assert section(looked(tmp_path, **settings), "images") == [
        f"40 (train {counts[0]}, validation {counts[1]}, test {counts[2]})"
    ]


@pytest.mark.parametrize("public", [False, True])
def test_a_set_that_a_job_refuses_is_refused_with_its_line(tmp_path: Path, public: bool) -> None:
    for i in range(20):
        saved(tmp_path / f"cat/{i}.png", np.arange(i, i + 64, dtype=np.uint16).reshape(8, 8))
    with pytest.raises(PrivateRefusal) as by_job:
        sets.refuse_flat(sets.load(config(tmp_path), PathsConfig()).train)
    with pytest.raises(PrivateRefusal) as by_check:
        looked(tmp_path, public=public).verdict()
    assert str(by_check.value) == str(by_job.value)
    assert str(by_check.value).startswith("data: 100% of the images are constant")
    with pytest.raises(PrivateRefusal, match="none of the 20 images fell to test"):
        looked(tmp_path, test_size=0.0001, value_range=[0, 100]).verdict()


def test_what_is_wrong_before_a_file_is_read_is_one_line(tmp_path: Path) -> None:
    image(tmp_path / "train/cat/0.png")
    image(tmp_path / "tset/cat/0.png")
    with pytest.raises(UserError, match="did you mean 'test'"):
        looked(tmp_path)


def test_tables_are_listed_by_their_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 4)
    found = looked(tmp_path / "train.parquet")
    assert [seen.name for seen in found.images] == [f"image {i} of train" for i in range(4)]
    assert section(found, "classes") == ["2", "cat: train 2", "dog: train 2"]


def test_a_set_that_comes_with_its_package() -> None:
    found = inspect(DataConfig("digits", image_size=8), PathsConfig(), progress="off")
    found.verdict()
    assert section(found, "images") == ["1797 (train 1500, test 297)"]
    assert section(found, "sizes") == ["8 x 8: 1797"]
    assert section(found, "modes") == ["L: 1797, values 0 to 255"]
    assert section(found, "constant") == ["0 of 1797"]


def test_many_sizes_are_summed_up(tmp_path: Path) -> None:
    for side in range(1, 13):
        write_image(tmp_path / f"cat/{side}.png", side, (side, 2 * side))
    (line,) = section(looked(tmp_path), "sizes")
    assert line.count(" x ") == 8
    assert line.endswith(", 4 other sizes; widths 1 to 12, heights 2 to 24")


@pytest.mark.slow
def test_ten_thousand_images_take_less_than_twenty_seconds(tmp_path: Path) -> None:
    """Of one processor, whatever else it does."""
    random = np.random.default_rng(0)
    for i in range(10_000):
        saved(tmp_path / f"{'ab'[i % 2]}/{i}.png", random.integers(0, 256, (64, 64, 3), np.uint8))
    start = time.process_time()
    found = looked(tmp_path, test_size=0.2)
    assert time.process_time() - start < 20
    assert section(found, "sizes") == ["64 x 64: 10000"]
    found.verdict()


def test_no_image_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job would keep so many prepared images in paths.cache."""
    mixed(tmp_path / "set")
    monkeypatch.setattr(images, "STORED_BYTES", 10)
    inspect(config(tmp_path / "set"), PathsConfig(cache=str(tmp_path / "cache")), progress="off").verdict()
    assert not (tmp_path / "cache").exists()
