"""The index knows images again and nothing else; it is its owner's alone and says when it is damaged."""

from __future__ import annotations

import hashlib
import os
import pwd
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data.digests import array_digests, pixel_digest
from dp_lora.data.sets import ImageSplits, load
from dp_lora.errors import UserError
from dp_lora.jobs.image_index import ImageIndex, default_folder
from dp_lora.privacy.ledger import Charge
from dp_lora.privacy.subsampled_gaussian import Mechanism
from tests.builders.image_sets import pixels, private_images, splits_of

pytestmark = pytest.mark.usefixtures("unchecked")

A, B, C = (pixels(seed, 12) for seed in (10, 11, 12))


@pytest.fixture
def index(tmp_path: Path) -> ImageIndex:
    return ImageIndex(tmp_path / "share" / "image_index")


def charge(run: str, steps: int = 10) -> Charge:
    return Charge(run, "imagefolder", Mechanism(1.0, 0.1, steps), 1e-5)


def names(index: ImageIndex, *sets: np.ndarray) -> set[str]:
    return {index.register(splits_of(images)).name for images in sets}


def test_a_digest_is_sha256_of_shape_dtype_and_bytes() -> None:
    image = np.array([[1, 2], [3, 4]], np.uint8)
    by_hand = hashlib.sha256(b"(2, 2) |u1\x01\x02\x03\x04").digest()
    assert pixel_digest(image) == by_hand
    for same in (image[None], image[None, None], np.repeat(image[None, None], 3, axis=1)):
        assert array_digests(same).tobytes() == by_hand


def test_a_set_is_the_same_whatever_its_order_roles_and_labels(index: ImageIndex) -> None:
    first = index.register(splits_of(A))
    assert index.register(splits_of(A[::-1], classes=3, held_out=5)).name == first.name
    assert index.together(index.register(splits_of(B))) != index.together(first)


def test_what_shares_an_image_is_together_and_so_is_what_shares_with_that(index: ImageIndex) -> None:
    assert index.find(splits_of(A)) is None, "nothing was charged yet"
    (a,), (c,) = names(index, A), names(index, C)
    bridge = np.concatenate([A[3:4], B, C[5:6]])
    unregistered = index.find(splits_of(bridge))
    assert unregistered is not None and index.together(unregistered) == {a, c, unregistered.name}
    assert index.together(index.register(splits_of(A))) == {a}, "finding registers nothing"
    (joined,) = names(index, bridge)
    for images in (A, C, bridge):
        assert index.together(index.register(splits_of(images))) == {a, c, joined}
    (apart,) = names(index, pixels(13, 5))
    assert index.together(index.register(splits_of(pixels(13, 5)))) == {apart}


def test_a_picture_that_is_held_in_another_way_is_the_same_one(index: ImageIndex, tmp_path: Path) -> None:
    """Files with other values that are trained on as the same pixels: on a background, and inverted."""
    folders = [tmp_path / name / "c0" for name in ("plain", "transparent", "inverted")]
    for folder in folders:
        folder.mkdir(parents=True)
    for number, (image,) in enumerate(A):
        grey = Image.fromarray(image)
        alpha = Image.fromarray(np.where(image == 255, 0, 255).astype(np.uint8))
        grey.save(folders[0] / f"{number}.png")
        Image.merge("LA", (grey, alpha)).save(folders[1] / f"{number}.png")
        # White is zero: the numbers in the file are 65535 less 257 times the picture's.
        wide = Image.fromarray(65535 - 257 * image.astype(np.uint16))
        wide.save(folders[2] / f"{number}.tif", tiffinfo={262: 0})
    sets_ = [
        load(DataConfig("imagefolder", source=str(folder.parent), image_size=8, channels=1), PathsConfig())
        for folder in folders
    ]
    assert all((one.train.images == sets_[0].train.images).all() for one in sets_[1:])
    names_ = {index.register(one).name for one in sets_}
    assert index.together(index.register(sets_[0])) == names_ and len(names_) == 3


def test_images_of_one_colour_connect_nothing(index: ImageIndex) -> None:
    blank = np.zeros((1, 1, 8, 8), np.uint8)
    (a,) = names(index, np.concatenate([A, blank]))
    found = index.register(splits_of(np.concatenate([B, blank])))
    assert index.together(found) == {found.name} != {a}
    assert len(found.images) == len(B)


def test_charges_stand_under_their_set_and_those_of_others_are_taken_over(index: ImageIndex) -> None:
    found = index.register(splits_of(A))
    seen: list[list[Charge]] = []
    index.enter(found, charge("b"), [charge("a", 4)], lambda charges: seen.append(list(charges)))
    index.enter(found, charge("b", 7), [charge("a", 9)], lambda charges: seen.append(list(charges)))
    assert [(c.run, c.private_set, c.mechanism.steps) for c in index.charges()] == [
        ("a", found.name, 4), ("b", found.name, 7),
    ]  # fmt: skip
    assert [len(charges) for charges in seen] == [0, 2]

    def refuse(charges: object) -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        index.enter(found, charge("c"), [], refuse)
    assert len(index.charges()) == 2


def test_the_index_is_its_owners_and_confirms_no_guess_without_its_key(index: ImageIndex) -> None:
    index.register(splits_of(A))
    assert index.folder.stat().st_mode & 0o777 == 0o700
    for path in (index.folder / "key", *(index.folder / "sets").iterdir()):
        assert path.stat().st_mode & 0o777 == 0o600
    content = b"".join(path.read_bytes() for path in index.folder.rglob("*") if path.is_file())
    assert not any(row.tobytes()[:8] in content for row in array_digests(A))
    (stored,) = (index.folder / "sets").iterdir()
    assert stored.stat().st_size == 8 * len(A)


LOSSES = [
    "key", "sets.jsonl", "sets.jsonl emptied", "sets.jsonl cut", "sets", "sets cut", "sets changed",
    "privacy_ledger.jsonl", "privacy_ledger.jsonl cut", "privacy_ledger.jsonl and head", "key and sets",
]  # fmt: skip


def damage(index: ImageIndex, lost: str) -> None:
    """Removes the files that `lost` names, empties them, cuts them to nothing or changes a digest."""
    names, _, how = lost.replace(" and ", "+").partition(" ")
    for path in (index.folder / name for name in names.split("+")):
        for inner in [*path.iterdir()] if path.is_dir() else [path]:
            if how == "emptied":
                inner.write_text("{}\n")
            elif how == "changed":
                inner.write_bytes(b"\1" + inner.read_bytes()[1:])
            elif how == "cut":
                inner.write_bytes(inner.read_bytes()[: 0 if inner.suffix == ".jsonl" else 8])
            else:
                inner.unlink()
        if path.is_dir() and not how:
            path.rmdir()


@pytest.mark.parametrize("lost", LOSSES)
def test_a_damaged_index_is_one_line_and_never_a_new_one(lost: str, index: ImageIndex) -> None:
    index.enter(index.register(splits_of(A)), charge("a"), [], lambda charges: None)
    damage(index, lost)

    def spent(images: ImageSplits) -> None:
        index.find(images)
        index.charges()

    def enter(images: ImageSplits) -> None:
        index.enter(index.register(images), charge("b"), [], lambda charges: None)

    for action in (spent, enter):
        with pytest.raises(UserError, match=r"paths\.index=.*not there or damaged.*expected") as caught:
            action(splits_of(np.concatenate([A[:1], B])))
        assert "\n" not in str(caught.value)


def test_an_index_without_a_head_goes_on_and_has_one_from_then_on(index: ImageIndex) -> None:
    """As earlier versions left it; and as a kill leaves it between the line and the head."""
    found = index.register(splits_of(A))
    index.enter(found, charge("a"), [], lambda charges: None)
    head = index.folder / "head"
    old = head.read_text()
    head.unlink()
    index.enter(found, charge("b"), [], lambda charges: None)
    assert head.exists() and [c.run for c in index.charges()] == ["a", "b"]
    head.write_text(old)
    index.enter(found, charge("c"), [], lambda charges: None)
    assert [c.run for c in index.charges()] == ["a", "b", "c"]


def test_who_registers_at_once_loses_nothing(index: ImageIndex) -> None:
    sets = [np.concatenate([A[:1], pixels(20 + number, 4)]) for number in range(6)]
    workers = [threading.Thread(target=index.register, args=(splits_of(images),)) for images in sets]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(index.together(index.register(splits_of(sets[0])))) == 6


def test_the_place_depends_on_the_user_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "dp_lora" / "image_index"
    monkeypatch.setenv("HOME", str(tmp_path))
    # A relative folder would be another one in each working directory.
    for given in (None, "", "share"):
        monkeypatch.delenv("XDG_DATA_HOME") if given is None else monkeypatch.setenv("XDG_DATA_HOME", given)
        assert default_folder() == tmp_path / ".local" / "share" / "dp_lora" / "image_index"
    of_the_system = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".local/share/dp_lora/image_index"
    for home in (None, "", "home"):
        monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
        assert default_folder() == of_the_system


def test_a_set_knows_no_digest_by_its_name(index: ImageIndex) -> None:
    assert "u1" not in repr(index.register(private_images()))
