"""Rendered pictures: deterministic, each role with pictures of its own, grey or in colour."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data import letters, pictures
from dp_lora.data.images import ROLES
from dp_lora.data.sets import ImageSplits, load, provenance
from dp_lora.errors import UserError

CLIP_ART = "usr/share/openclipart/png"
FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def draw(path: Path, seed: int) -> None:
    """A drawing of three coloured shapes on transparency."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGBA", (90, 70), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        left, top = rng.integers(0, 40, 2).tolist()
        box = (left, top, left + int(rng.integers(10, 45)), top + int(rng.integers(10, 28)))
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape(box, fill=(*rng.integers(0, 256, 3).tolist(), 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the unpacked packages: 150 animals, 60 fruits, 3 tools, and what is no picture."""
    root = tmp_path_factory.mktemp("unpacked")
    folder = root / CLIP_ART
    for category, count in (("animals/birds", 150), ("food/fruit/tropical", 60), ("tools", 3)):
        for number in range(count):
            draw(folder / category / f"{number:03}.png", hash((len(category), number)) % 10**6)
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(folder / "tools" / "nothing.png")
    (folder / "tools" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    (folder / "tools" / "read.txt").write_text("no picture")
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None and spec.submodule_search_locations
    fonts = Path(spec.submodule_search_locations[0]) / "mpl-data/fonts/ttf"
    (root / FONT).parent.mkdir(parents=True)
    (root / FONT).write_bytes((fonts / "DejaVuSans.ttf").read_bytes())
    return root


@pytest.fixture(scope="module")
def data(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`paths.data` with the bank of these pictures and a font for the letters."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    pictures.collect(unpacked, folder / "pictures")
    (folder / "fonts").mkdir()
    (folder / "fonts/DejaVuSans.ttf").write_bytes((unpacked / FONT).read_bytes())
    return folder


@pytest.fixture(scope="module")
def bank(data: Path) -> pictures.Pictures:
    return pictures.load_pictures(data / "pictures")


def loaded(data: Path, **fields: object) -> ImageSplits:
    settings = {"train_size": 60, "validation_size": 20, "test_size": 20, **fields}
    config = DataConfig(**{"name": "pictures", "public": True, **settings})  # type: ignore[arg-type]
    return load(config, PathsConfig(data=str(data)), "public_data")


def test_the_bank_holds_what_can_be_drawn(bank: pictures.Pictures) -> None:
    assert bank.classes == ("animals/birds", "emoji", "food/fruit", "other")
    counts = dict(zip(bank.classes, np.bincount(bank.labels).tolist(), strict=True))
    assert counts["animals/birds"] == 150 and counts["food/fruit"] == 60 and counts["other"] == 3
    assert counts["emoji"] > 100
    alpha = bank.rgba[bank.labels != 1][..., 3] > 0
    assert len(alpha) == 213
    # Cut to what is drawn: the longer side reaches from one end of the square to the other.
    wide, high = alpha.any(axis=1)[:, [0, -1]].all(axis=1), alpha.any(axis=2)[:, [0, -1]].all(axis=1)
    assert (wide | high).all()


def test_each_role_has_pictures_of_its_own_and_copies_share_one(
    bank: pictures.Pictures, unpacked: Path, tmp_path: Path
) -> None:
    shares = np.bincount(bank.roles, minlength=3) / len(bank.roles)
    assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 0.05
    folder = tmp_path / CLIP_ART / "animals/birds"
    folder.mkdir(parents=True)
    for number in range(30):
        content = (unpacked / CLIP_ART / f"animals/birds/{number:03}.png").read_bytes()
        for copy in "ab":
            (folder / f"{number:03}{copy}.png").write_bytes(content)
    pictures.collect(tmp_path, tmp_path)
    roles = pictures.load_pictures(tmp_path).roles.reshape(30, 2)
    assert (roles[:, 0] == roles[:, 1]).all() and len(set(roles[:, 0].tolist())) > 1


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_deterministic_and_of_the_shape_asked_for(bank: pictures.Pictures, channels: int) -> None:
    images, labels = pictures.render(bank, 300, 1, 24, channels)
    again, labels_again = pictures.render(bank, 300, 1, 24, channels)
    other, _ = pictures.render(bank, 300, 2, 24, channels)
    assert images.shape == (300, channels, 24, 24) and images.dtype == np.uint8
    assert (images == again).all() and (labels == labels_again).all() and (images != other).any()
    assert (images[:256] != images[44:]).any(), "each chunk has draws of its own"
    if channels == 3:
        assert (images[:, 0] != images[:, 1]).any(axis=(1, 2)).mean() > 0.5, "most are in colour"


def test_a_role_draws_only_its_own_pictures(bank: pictures.Pictures) -> None:
    """With the pictures of the others made black, its images stay as they are."""
    for role in ROLES:
        rgba = bank.rgba.copy()
        rgba[bank.roles != ROLES.index(role)] = 0
        alone = pictures.Pictures(rgba, bank.classes, bank.labels, bank.roles)
        assert (
            pictures.render(alone, 100, 0, role=role)[0] == pictures.render(bank, 100, 0, role=role)[0]
        ).all()


def test_shares_of_classes_follow_the_square_root_of_their_pictures(bank: pictures.Pictures) -> None:
    _, labels = pictures.render(bank, 4000, 0, 8)
    sizes = np.bincount(bank.labels[bank.roles == 0], minlength=4)
    wanted = np.sqrt(sizes) / np.sqrt(sizes).sum()
    # Five standard deviations of a share: fewer than one seed in 400,000 fails.
    assert np.abs(np.bincount(labels, minlength=4) / 4000 - wanted).max() < 5 * np.sqrt(0.25 / 4000)


def test_loaded_pictures_are_public_and_of_the_classes_asked_for(data: Path) -> None:
    splits = loaded(data, channels=3, classes=["food/fruit", "animals/birds"])
    assert [len(part) for part in splits] == [60, 20, 20]
    assert splits.train.public and splits.train.images.shape == (60, 3, 32, 32)
    assert splits.train.classes == ("food/fruit", "animals/birds")
    assert set(splits.train.labels.tolist()) == {0, 1}


@pytest.mark.parametrize("channels", [1, 3])
def test_letters_and_pictures_come_in_equal_numbers(data: Path, channels: int) -> None:
    splits = loaded(data, name="letters_pictures", train_size=401, channels=channels)
    of_letters = splits.train.labels < len(letters.CLASSES)
    assert int(of_letters.sum()) == 200 and len(splits.train) == 401
    assert splits.train.images.shape == (401, channels, 32, 32)
    assert splits.train.classes[26:] == ("animals/birds", "emoji", "food/fruit", "other")
    assert 60 < of_letters[:200].sum() < 140, "in a random order"
    few = loaded(data, name="letters_pictures", classes=["Q", "emoji"])
    assert few.train.classes == ("Q", "emoji") and np.bincount(few.train.labels).tolist() == [30, 30]


def test_provenance_names_fonts_and_pictures(data: Path) -> None:
    paths = PathsConfig(data=str(data))
    inputs = provenance(DataConfig("letters_pictures", True), paths)
    assert inputs["fonts"][0][0] == "DejaVuSans.ttf"
    assert inputs["pictures"] == pictures.provenance(data / "pictures")
    assert set(provenance(DataConfig("pictures", True), paths)) == {"pictures"}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"image_size": 4}, r"public_data\.image_size=4: pictures are rendered at 8 to 128 pixels"),
        ({"train_size": 0.5}, r"public_data\.train_size=0\.5: pictures is rendered; expected a whole number"),
        ({"classes": ["birds"]}, r"no class 'birds'.*animals/birds"),
        ({"source": "/images"}, r"data@public_data=pictures is rendered from clip art and reads no folder"),
        ({"name": "letters_pictures", "classes": ["A", "B"]}, "expected letters and categories of pictures"),
        ({"classes": ["other"]}, "no picture of the role"),
    ],
)
def test_mistakes_are_one_line(data: Path, fields: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        loaded(data, **fields)


def test_absent_and_damaged_banks_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no public pictures.*make data ARGS=pictures"):
        loaded(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / pictures.FILE).write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"pictures\.npz is damaged; run `make data ARGS=pictures` again"):
        loaded(tmp_path)
    with pytest.raises(UserError, match="no pictures in"):
        pictures.collect(tmp_path / "nowhere", tmp_path)
