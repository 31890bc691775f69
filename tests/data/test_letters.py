"""Rendered letters: deterministic, balanced, and of MNIST's size, place and grey."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data import letters
from dp_lora.data.sets import ImageSplits, load
from dp_lora.errors import UserError


@pytest.fixture(scope="module")
def fonts() -> list[Path]:
    """The DejaVu fonts that matplotlib ships, so that no font need be installed."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None and spec.submodule_search_locations
    found = letters.find_fonts([Path(spec.submodule_search_locations[0]) / "mpl-data/fonts/ttf"])
    return [font for font in found if font.name in ("DejaVuSans.ttf", "DejaVuSerif-Italic.ttf")]


@pytest.fixture(scope="module")
def glyphs(fonts: list[Path]) -> letters.Glyphs:
    return letters.load_glyphs(fonts)


@pytest.fixture(scope="module")
def drawn(glyphs: letters.Glyphs) -> tuple[np.ndarray, np.ndarray]:
    return letters.render(glyphs, 2600, seed=0)


def test_fonts_of_other_families_are_left_out(tmp_path: Path, fonts: list[Path]) -> None:
    for name in ("DejaVuSans.ttf", "DejaVuSansMono.ttf", "Wingdings.ttf", "Lato-Regular.woff", "lato.txt"):
        (tmp_path / name).write_bytes(fonts[0].read_bytes())
    assert [font.name for font in letters.find_fonts([tmp_path / "absent", tmp_path])] == ["DejaVuSans.ttf"]


def test_no_font_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make data.*fonts-breip"):
        letters.find_fonts([tmp_path, tmp_path / "absent"])


def test_a_broken_font_is_named(tmp_path: Path) -> None:
    (tmp_path / "Lato-Regular.ttf").write_bytes(b"no font")
    with pytest.raises(UserError, match=r"Lato-Regular\.ttf: no font"):
        letters.load_glyphs(letters.find_fonts([tmp_path]))


def test_provenance_is_name_and_sha256(fonts: list[Path]) -> None:
    record = letters.provenance(fonts)
    assert record[0] == (fonts[0].name, hashlib.sha256(fonts[0].read_bytes()).hexdigest())
    assert len(record) == len(fonts) == 2


def test_a_bank_has_both_cases_of_every_letter(glyphs: letters.Glyphs) -> None:
    assert np.bincount(glyphs.letters).tolist() == [4] * 26
    assert (glyphs.half_strokes > 0).all()


def test_images_are_balanced_and_deterministic(glyphs: letters.Glyphs) -> None:
    images, labels = letters.render(glyphs, 100, seed=1)
    again, labels_again = letters.render(glyphs, 100, seed=1)
    other, _ = letters.render(glyphs, 100, seed=2)
    assert images.shape == (100, 28, 28) and images.dtype == np.uint8
    assert set(np.bincount(labels, minlength=26)) == {3, 4}
    assert np.array_equal(images, again) and np.array_equal(labels, labels_again)
    assert not np.array_equal(images, other)
    assert len({image.tobytes() for image in images}) == 100


def test_size_place_and_grey_are_those_of_mnist(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    """MNIST: mean 33.3, sd 78.6, longest side 20, centre of mass at pixel 14."""
    images = drawn[0].astype(np.float64)
    assert abs(images.mean() - 33.3) < 4
    assert abs(images.std() - 78.6) < 5
    inked = images > 100
    extents = [inked.any(axis).sum(axis=1).max() for axis in (1, 2)]
    assert max(extents) <= 28
    longest = np.maximum(np.ptp(_span(inked.any(1)), axis=1), np.ptp(_span(inked.any(2)), axis=1)) + 1
    assert abs(longest.mean() - 20) < 1
    axis = np.arange(28)
    for image_axis in (1, 2):
        profile = images.sum(axis=image_axis)
        centre = (profile @ axis) / profile.sum(axis=1)
        assert abs(centre.mean() - 14) < 0.2
        assert centre.std() < 1


def _span(rows: np.ndarray) -> np.ndarray:
    """First and last inked place of each row."""
    return np.stack([rows.argmax(axis=1), rows.shape[1] - 1 - rows[:, ::-1].argmax(axis=1)], axis=1)


def test_labels_tell_the_letters_apart(drawn: tuple[np.ndarray, np.ndarray], glyphs: letters.Glyphs) -> None:
    """Nearest neighbour at 2,600 images reaches far more than chance (3.8 %); shuffled labels do not."""
    images, labels = drawn[0].reshape(2600, -1).astype(np.float32), drawn[1]
    queries, wanted = letters.render(glyphs, 520, seed=9)
    flat = queries.reshape(520, -1).astype(np.float32)
    nearest = ((images**2).sum(1)[None] - 2 * flat @ images.T).argmin(axis=1)
    assert (labels[nearest] == wanted).mean() > 0.6
    assert (np.random.default_rng(0).permutation(labels)[nearest] == wanted).mean() < 0.2


def test_chunks_do_not_share_draws(glyphs: letters.Glyphs) -> None:
    images, _ = letters.render(glyphs, 600, seed=3, classes=[0])
    assert len({image.tobytes() for image in images}) == 600


@pytest.fixture(scope="module")
def splits(fonts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ImageSplits:
    folder = tmp_path_factory.mktemp("data")
    (folder / "fonts").mkdir()
    (folder / "fonts" / fonts[0].name).write_bytes(fonts[0].read_bytes())
    config = DataConfig(
        "letters", True, train_size=90, validation_size=90, test_size=90, classes=["C", "A", "B"]
    )
    return load(config, PathsConfig(data=str(folder)))


def test_loaded_letters_are_public_and_held_out_ones_are_new(splits: ImageSplits) -> None:
    assert [len(part) for part in splits] == [90, 90, 90]
    assert all(part.public and part.classes == ("C", "A", "B") for part in splits)
    assert splits.train.images.shape == (90, 1, 32, 32)
    assert np.bincount(splits.train.labels).tolist() == [30, 30, 30]
    everything = [image.tobytes() for part in splits for image in part.images]
    assert len(set(everything)) == 270


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"public_data\.image_size=4"):
        load(DataConfig("letters", True, image_size=4), PathsConfig(data=str(tmp_path)), "public_data")
