"""The record of what a run was made from: it tells every change, and nothing else, and nothing to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_sets import pixels, splits_of

from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.jobs import content
from dp_lora.jobs.content import changes, content_of, keep, refusal
from dp_lora.storage.files import read_json

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


CHANGED: dict[str, Callable[[], ImageSplits]] = {
    "the pixels": one_pixel,
    "the number of images": lambda: SET._replace(train=TRAIN.subset(np.arange(13))),
    "the names of the classes": lambda: ImageSplits(*(replace(part, classes=("x", "c1")) for part in SET)),
    "the labels": lambda: with_train(labels=swapped(TRAIN.labels)),
    "the captions": lambda: with_train(captions=swapped(TRAIN.captions)),  # type: ignore[arg-type]
    "the roles of the images": one_moved_to_the_test,
    "the order of the images": lambda: SET._replace(train=TRAIN.subset(swapped(np.arange(14)))),
}


@pytest.mark.parametrize("said", CHANGED)
def test_every_change_is_told_by_its_name(said: str, tmp_path: Path) -> None:
    keep(SET, tmp_path / "checkpoint")
    assert refusal(SET, tmp_path / "checkpoint") is None
    assert changes(CHANGED[said](), content_of(SET, KEY)) == [said]
    reason = refusal(CHANGED[said](), tmp_path / "checkpoint")
    assert reason is not None and reason.startswith(f"data: {said} changed") and "\n" not in reason
    with pytest.raises(UserError, match=said):
        keep(CHANGED[said](), tmp_path / "checkpoint")


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
    for damaged in ("{", "[]", "{}", '{"key": "x"}'):
        (tmp_path / content.NAME).write_text(damaged)
        reason = refusal(SET, tmp_path)
        assert reason is not None and "cannot be read" in reason
