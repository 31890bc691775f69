"""The record of what a run was made from: it tells every change, and nothing else, and nothing to others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import PathsConfig
from dp_lora.data.sets import ImageSet, ImageSplits, load
from dp_lora.errors import UserError
from dp_lora.jobs import content
from dp_lora.jobs.content import changes, content_of, keep, refusal, unknown
from dp_lora.jobs.job import check_content
from dp_lora.storage.files import read_json
from tests.builders.image_files import config
from tests.builders.image_sets import pixels, splits_of, write_folder

pytestmark = pytest.mark.usefixtures("unchecked")

KEY = "11" * 32


def captioned(images: ImageSplits) -> ImageSplits:
    def told(part: ImageSet) -> ImageSet:
        return replace(part, captions=np.array([f"{part.role} {i}" for i in range(len(part))], object))

    return ImageSplits(*map(told, images))


SET = captioned(splits_of(pixels(0, 20), held_out=6))
TRAIN, TEST = SET.train, SET.test


def with_train(**fields: object) -> ImageSplits:
    return SET._replace(train=replace(TRAIN, **fields))  # type: ignore[arg-type]


def swapped(values: np.ndarray) -> np.ndarray:
    """The first two change places."""
    return values[[1, 0, *range(2, len(values))]]


def one_pixel() -> ImageSplits:
    changed = TRAIN.images.copy()
    changed[3, 0, 0, 0] ^= 1
    return with_train(images=changed)


def one_moved_to_the_test() -> ImageSplits:
    """Number, labels and captions stay with the images; a training and a test image change places."""
    train, test = TRAIN.subset(np.arange(1, 14)), TEST.subset(np.arange(1, 6))

    def joined(first: ImageSet, second: ImageSet) -> ImageSet:
        names = ("images", "labels", "captions")
        both = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in names}
        return replace(first, **both)

    return SET._replace(
        train=joined(train, TEST.subset(np.arange(1))), test=joined(test, TRAIN.subset(np.arange(1)))
    )


def the_same_files_read_otherwise() -> ImageSplits:
    """The pixels in the files stay; what is trained on is not what it was."""
    return with_train(images=255 - TRAIN.images, digests=content.digests(TRAIN))


CHANGED: dict[str, Callable[[], ImageSplits]] = {
    "the pixels": one_pixel,
    "the number of images": lambda: SET._replace(train=TRAIN.subset(np.arange(13))),
    "the names of the classes": lambda: ImageSplits(*(replace(part, classes=("x", "c1")) for part in SET)),
    "the labels": lambda: with_train(labels=swapped(TRAIN.labels)),
    "the captions": lambda: with_train(captions=swapped(TRAIN.captions)),  # type: ignore[arg-type]
    "the roles of the images": one_moved_to_the_test,
    "the pixels as they are trained on (as this Pillow reads and resizes the files)": (
        the_same_files_read_otherwise
    ),
    "the order of the images": lambda: SET._replace(train=TRAIN.subset(swapped(np.arange(14)))),
}


@pytest.mark.parametrize("said", CHANGED)
def test_every_change_is_told_by_its_name(said: str, tmp_path: Path) -> None:
    keep(SET, tmp_path / "checkpoint")
    assert refusal(SET, tmp_path / "checkpoint") is None
    assert changes(CHANGED[said](), content_of(SET, KEY)) == [said]
    reason = refusal(CHANGED[said](), tmp_path / "checkpoint")
    assert reason is not None and reason.startswith(f"data: {said} changed") and "\n" not in reason
    with pytest.raises(UserError, match=re.escape(said)):
        keep(CHANGED[said](), tmp_path / "checkpoint")


def in_other_bits(path: Path) -> None:
    """0 to 255 of 16 bits are nearly black, 0 to 255 of 8 bits are not."""
    Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16)).save(path)


def inverted(path: Path) -> None:
    Image.fromarray(np.asarray(Image.open(path))).save(path, tiffinfo={262: 0})


def transparent(path: Path) -> None:
    """The commonest of the values is declared to be the hole."""
    values = np.asarray(Image.open(path))
    Image.fromarray(values).save(path, transparency=int(values[0, 0]))


@pytest.mark.parametrize(
    ("other", "suffix", "wide"),
    [(in_other_bits, ".png", False), (inverted, ".tif", True), (transparent, ".png", True)],
)
def test_files_with_the_same_numbers_that_mean_other_pixels_are_told(
    tmp_path: Path, other: Callable[[Path], None], suffix: str, wide: bool
) -> None:
    images = pixels(0, 6).astype(np.uint16) * 255 + 1 if wide else pixels(0, 6)
    root = write_folder(tmp_path / "set", images, suffix=suffix)
    data = config(root, channels=1)
    keep(load(data, PathsConfig()), tmp_path / "checkpoint")
    assert refusal(load(data, PathsConfig()), tmp_path / "checkpoint") is None
    for path in root.rglob(f"*{suffix}"):
        other(path)
    reason = refusal(load(data, PathsConfig()), tmp_path / "checkpoint")
    assert reason is not None and "the pixels as they are trained on" in reason


def test_the_record_of_an_earlier_version_is_compared_in_what_it_has() -> None:
    record = content_of(SET, KEY)
    del record["prepared"]
    assert changes(SET, record) == [] and changes(the_same_files_read_otherwise(), record) == []
    assert changes(one_pixel(), record) == ["the pixels"]


def test_what_is_read_anew_is_the_same(tmp_path: Path) -> None:
    again = captioned(splits_of(pixels(0, 20).copy(), held_out=6))
    assert changes(again, content_of(SET, KEY)) == []
    keep(SET, tmp_path)
    before = (tmp_path / content.NAME).read_bytes()
    keep(again, tmp_path)
    assert (tmp_path / content.NAME).read_bytes() == before


def test_the_record_is_keyed_and_the_owners(tmp_path: Path) -> None:
    for name in "ab":
        keep(SET, tmp_path / name)
    first, second = (read_json(tmp_path / name / content.NAME) for name in "ab")
    assert all(first[name] != second[name] for name in first if name != "classes")
    assert (tmp_path / "a" / content.NAME).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_a_run_without_a_record_or_with_a_damaged_one(tmp_path: Path) -> None:
    assert refusal(SET, tmp_path / "earlier") is None
    for damaged in ("", "{", "[]", "{}", '{"key": "x"}'):
        (tmp_path / content.NAME).write_text(damaged)
        reason = refusal(SET, tmp_path)
        assert reason is not None and "cannot be read" in reason
        assert reason.endswith(
            "expected it as it was written: put it back, or remove the run directory to start again, and "
            "count what was spent"
        )


def test_the_owner_is_told_where_images_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    check_content(SET, tmp_path)
    checkpoint.mkdir()
    (checkpoint / "lock").touch()
    check_content(SET, tmp_path)
    assert capsys.readouterr().err == "", "a run that begins"
    for begun in (tmp_path / "adapter", checkpoint / "plan.json"):
        begun.mkdir()
        check_content(SET, tmp_path)
        assert capsys.readouterr().err == (
            f"data: {checkpoint}/content.json is not there, so these images cannot be compared with those "
            "that the run was made from; put it back, or make sure yourself that they are the same\n"
        )
        begun.rmdir()
    keep(SET, checkpoint)
    (tmp_path / "adapter").mkdir()
    check_content(SET, tmp_path)
    assert capsys.readouterr().err == "" and unknown(tmp_path) is None


def test_a_run_that_goes_on_without_a_record_gets_none(tmp_path: Path) -> None:
    """It would say that the run began with the images of today."""
    (tmp_path / "plan.json").write_text("{}")
    keep(SET, tmp_path)
    assert not (tmp_path / content.NAME).exists()
