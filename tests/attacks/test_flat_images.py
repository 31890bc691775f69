"""Sets that were read wrong are refused on the owner's terminal, and nothing else learns of it.

Whether a job is refused for its pixels is a function of private images: no file of a run, no ledger and no
record of W&B may tell it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from dp_lora.__main__ import main
from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data.sets import ImageSet, load, refuse_flat
from dp_lora.errors import PrivateRefusal, recorded
from tests.builders.image_files import write_image
from tests.builders.tiny import once, words

pytestmark = pytest.mark.usefixtures("unchecked")

BASE = np.full((8, 8), 40, np.uint16)
BASE[:, 4:] = 200
BASE[:2, :2] = 255


def written(folder: Path, pixels: Any, number: int = 40) -> Path:
    for i in range(number):
        path = folder / f"{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(path)
    return folder


FLAT = {
    "12 bits in 16": lambda i: BASE * 16,
    "10 bits in 16": lambda i: BASE * 4,
    "black": lambda i: np.zeros((8, 8), np.uint8),
    "one colour each": lambda i: np.full((8, 8), 6 * i, np.uint8),
    "masks of 0 and 1": lambda i: (BASE > 100).astype(np.uint8),
    "all but one": lambda i: (BASE if i == 7 else BASE * 0).astype(np.uint8),
}


def with_a_dead_pixel(pixels: np.ndarray) -> np.ndarray:
    """16 times as large, with one pixel of the largest value that the file can hold."""
    large = np.kron(pixels, np.ones((16, 16), pixels.dtype))
    large[100, 100] = np.iinfo(pixels.dtype).max
    return large


FULL = {
    "8 bits": lambda i: BASE.astype(np.uint8),
    "16 bits": lambda i: BASE * 257,
    "half of them flat": lambda i: (BASE * (i % 2)).astype(np.uint8),
    "one stroke": lambda i: np.eye(8, dtype=np.uint8) * 255,
    "pale": lambda i: (230 + np.arange(64).reshape(8, 8) // 3).astype(np.uint8),
}


def images_of(folder: Path) -> ImageSet:
    return load(DataConfig("imagefolder", source=str(folder), image_size=8), PathsConfig()).train


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_set_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PrivateRefusal) as caught:
        refuse_flat(images_of(written(tmp_path / "set", FLAT[name])))
    said = str(caught.value)
    assert said.startswith("data: ") and "expected data.value_range=[black,white] of the files" in said
    assert "\n" not in said


@pytest.mark.parametrize("size", [8, 32, 128])
def test_a_dead_pixel_does_not_hide_a_wrong_range(tmp_path: Path, size: int) -> None:
    folder = written(tmp_path / "set", lambda i: with_a_dead_pixel(BASE * 16))
    data = DataConfig("imagefolder", source=str(folder), image_size=size)
    images = load(data, PathsConfig()).train
    if size > 8:
        assert images.images.max() > 17, "the pixel is there"
    with pytest.raises(PrivateRefusal, match="100% fill less than a sixteenth"):
        refuse_flat(images)


@pytest.mark.parametrize("bits", [13, 14])
def test_images_under_a_quarter_of_the_scale_are_told(
    tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    images = images_of(written(tmp_path / "set", lambda i: BASE * 2 ** (bits - 8)))
    capsys.readouterr()
    refuse_flat(images)
    shown = capsys.readouterr().err
    assert shown.startswith("data: 100% of the images fill less than a quarter of the scale (99% of the ")
    assert shown.count("\n") == 1 and "data.value_range=[black,white]" in shown


@pytest.mark.parametrize("name", FULL)
def test_a_set_with_contrast_is_not(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    images = images_of(written(tmp_path / "set", FULL[name]))
    capsys.readouterr()
    refuse_flat(images)
    expected = "data: 50% of the images are nearly constant; is data.value_range right for all?\n"
    shown = capsys.readouterr().err
    if name == "pale":
        assert "fill less than a quarter of the scale" in shown and shown.count("\n") == 1
    else:
        assert shown == (expected if name == "half of them flat" else "")


def started(cache: Path, folder: Path, source: Path, *given: str) -> None:
    GlobalHydra.instance().clear()
    command = [*words(cache, folder / "out"), "data=imagefolder", f"data.source={source}"]
    command += ["data.image_size=8", "train.expected_batch_size=10", "train.max_steps=1", *given]
    command += ["privacy.epsilon=null", "privacy.noise_multiplier=2", "stages=[finetune]"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["dp-lora", *once(*command)])
        main()


def damaged(folder: Path) -> Path:
    written(folder, FULL["8 bits"])
    (folder / "a" / "cut.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: written(folder, FLAT["12 bits in 16"]), "100% fill less than a sixteenth"),
        (damaged, "cut.png is no image that can be read: empty (0 bytes)"),
    ],
    ids=["flat", "damaged"],
)
def test_a_refused_job_leaves_nothing_behind(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, said: str
) -> None:
    """Guarantee: exit status 2 and a line on stderr; no run directory, no charge, no record."""
    source = make(tmp_path / "set")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        started(cache, tmp_path, source)
    shown = capsys.readouterr()
    assert caught.value.code == 2 and said in shown.err and shown.out == ""
    assert sorted(path for path in tmp_path.rglob("*")) == before
    if said.startswith("100%"):
        started(cache, tmp_path, source, "data.value_range=[0,4095]")
        assert list((tmp_path / "out").rglob("privacy.json"))


def test_a_job_that_is_refused_when_it_goes_on_keeps_its_status(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path / "set", FULL["8 bits"])
    started(cache, tmp_path, source)
    (directory,) = (tmp_path / "out" / "default").iterdir()
    kept = (directory / "status.json").read_text()
    written(source, FLAT["black"])
    with pytest.raises(SystemExit):
        started(cache, tmp_path, source, "train.max_steps=2")
    assert len(list((tmp_path / "out" / "default").iterdir())) == 1
    assert (directory / "status.json").read_text() == kept


def test_records_say_less_than_the_terminal(tmp_path: Path) -> None:
    write_image(tmp_path / "set/a/0.png", 3)
    with pytest.raises(PrivateRefusal) as caught:
        refuse_flat(images_of(tmp_path / "set"))
    assert recorded(caught.value) == (
        "the private images were refused; the reason is on the job's own terminal"
    )
