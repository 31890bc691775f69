"""Captions beside the images of class folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data.sets import load
from tests.builders.image_files import config, refused, write_image


def captioned(folder: Path, count: int = 20, ending: str = "txt") -> Path:
    for i in range(count):
        path = folder / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, i)
        path.with_suffix(f".{ending}").write_text(f"number {i}\n", encoding="utf-8")
    return folder


def of(folder: Path, caption_column: str | None = "txt", **values: object) -> DataConfig:
    return config(folder, caption_column=caption_column, **values)


@pytest.mark.parametrize("ending", ["txt", "caption"])
def test_each_image_keeps_its_caption(ending: str, tmp_path: Path) -> None:
    data = of(captioned(tmp_path / "set", ending=ending), ending, test_size=0.3, train_size=0.9)
    splits = load(data, PathsConfig(cache=str(tmp_path / "cache")))
    seen = []
    for part in (splits.train, splits.test):
        assert part.captions is not None and len(part.captions) == len(part.labels)
        for image, label, caption in zip(part.images, part.labels, part.captions, strict=True):
            number = int(image[0, -1, -1])
            assert caption == f"number {number}" and splits.train.classes[label] == ("dog", "cat")[number % 2]
            seen.append(number)
    assert len(splits.train) and len(splits.test) and len(set(seen)) == len(seen)


def test_roles_have_captions_of_their_own(tmp_path: Path) -> None:
    for role in ("train", "test"):
        captioned(tmp_path / "set" / role)
    splits = load(of(tmp_path / "set"), PathsConfig(cache=str(tmp_path / "cache")))
    for part in (splits.train, splits.test):
        assert part.captions is not None and sorted(part.captions) == sorted(f"number {i}" for i in range(20))


def test_what_is_no_caption_of_one_image_is_refused(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "set")
    paths = PathsConfig(cache=str(tmp_path / "cache"))
    assert "caption_column=txt, with which" in refused(of(folder, None), paths)
    assert "expected txt or caption" in refused(of(folder, "text"), paths)
    assert "caption_column=txt, with which" in refused(of(folder, "caption"), paths)
    (folder / "cat" / "99.txt").write_text("secret")
    said = refused(of(folder), paths)
    assert "99.txt belongs to no image" in said and "secret" not in said
    (folder / "cat" / "99.txt").unlink()
    (folder / "cat" / "1.txt").write_bytes(b"secret \xff")
    said = refused(of(folder), paths)
    assert "1.txt cannot be read as text" in said and "secret" not in said
    (folder / "cat" / "1.txt").unlink()
    assert "1.png has no text of its own; expected 1.txt beside it" in refused(of(folder), paths)
    (folder / "cat" / "1.txt").write_text("one")
    write_image(folder / "cat" / "3.jpg", 3)
    assert "3.png has no text of its own" in refused(of(folder), paths)
