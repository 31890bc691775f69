"""Letters of writers who do not exist."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dp_lora.config.checks import check
from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data import letters, writers
from dp_lora.data.letters import CLASSES, Glyphs
from dp_lora.data.sets import load
from dp_lora.data.writers import MOST, WRITERS, render
from dp_lora.errors import UserError
from tests.builders.tiny import composed

KEPT = np.array([0, 3, 5])
FOLDERS = (Path("~/.cache/dp_lora/data/fonts"), *letters.SYSTEM_FOLDERS)


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return letters.load_glyphs(letters.find_fonts(FOLDERS)[:6])


def test_writers_are_many_and_few_of_them_wrote_much(glyphs: Glyphs) -> None:
    found = writers.writers(glyphs)
    assert len(found.counts) == WRITERS >= 2000
    assert found.counts.min() == 1 and found.counts.max() == MOST == 60
    assert 6 <= np.median(found.counts) <= 9 and found.fonts.max() < len(glyphs.letters) // 52
    again = writers.writers(glyphs)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    assert not np.array_equal(found.counts, writers.writers(glyphs, seed=1).counts)


def test_a_writers_letters_are_more_alike_than_those_of_others(glyphs: Glyphs) -> None:
    by = writers.writers(glyphs, 60)
    images, labels, owner = render(glyphs, by, 0, 28, KEPT)
    assert images.dtype == np.uint8 and images.shape == (by.counts.sum(), 28, 28)
    assert set(labels.tolist()) == set(KEPT.tolist())
    assert np.array_equal(np.bincount(owner, minlength=60), by.counts)
    assert np.array_equal(render(glyphs, by, 0, 28, KEPT)[0], images)
    # The ink of a letter, about the mean of its class: the writer explains most of it.
    ink = images.reshape(len(images), -1).mean(1)
    ink -= np.array(
        [ink[labels == label].mean() for label in range(len(CLASSES)) if (labels == label).any()]
    )[np.searchsorted(KEPT, labels)]
    within = np.concatenate([ink[owner == w] - ink[owner == w].mean() for w in range(60) if by.counts[w] > 1])
    assert within.var() < 0.5 * ink.var()


def test_the_set_is_of_persons_whatever_the_unit(
    glyphs: Glyphs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Roles go by writers, so that both units train on the same ones."""
    monkeypatch.setattr(letters, "find_fonts", lambda folders: [])
    monkeypatch.setattr(letters, "load_glyphs", lambda fonts: glyphs)
    monkeypatch.setattr(writers, "WRITERS", 80)
    monkeypatch.setattr(writers.writers, "__defaults__", (80, 0))
    data = DataConfig(name="letters_by_writer", image_size=28, channels=1, classes=["A", "D"], test_size=0.25)
    splits = load(data, PathsConfig(data=str(tmp_path)), tell=lambda line: None)
    train, test = splits.train.persons, splits.test.persons
    assert train is not None and test is not None
    assert not set(train) & set(test) and 30 < splits.train.examples("person") < 80
    for unit in ("image", "person"):
        config = composed("experiment=letters_by_writer", f"privacy.unit={unit}")
        assert (config.data.name, config.privacy.unit) == ("letters_by_writer", unit)
    config.data.person_column = "writer"
    with pytest.raises(UserError, match="letters_by_writer knows its persons itself; expected null"):
        check(config)
