"""Whose an image is, and that no role shares a person with another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data import persons
from dp_lora.data.inspection import inspect
from dp_lora.data.sets import ImageSet, ImageSplits, load
from dp_lora.errors import PrivateRefusal, UserError, recorded
from tests.builders.image_files import write_parquet
from tests.builders.image_folders import image, put
from tests.builders.patients import patients

COUNTS = {f"P{i:02}": 1 + i % 5 for i in range(60)}


def read(folder: Path, **settings: Any) -> ImageSplits:
    given = {"name": "imagefolder", "image_size": 8, "channels": 1, "source": str(folder)} | settings
    return load(DataConfig(**given), PathsConfig(cache=str(folder.parent / "cache")), tell=lambda line: None)


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as refused:
        read(folder, **settings)
    return str(refused.value)


def counted(images: ImageSet) -> dict[str, int]:
    """Images of each person."""
    assert images.persons is not None
    names, counts = np.unique(images.persons.astype(str), return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def test_a_column_of_metadata_says_whose_an_image_is(tmp_path: Path) -> None:
    folder = patients(tmp_path / "set", COUNTS)
    train = read(folder, person_column="patient").train
    assert counted(train) == COUNTS and train.examples("person") == 60
    assert train.examples("image") == len(train) == sum(COUNTS.values())
    assert "P01" not in repr(train)
    assert read(folder).train.persons is None, "nobody asked"
    some = train.subset(np.array([5, 0]))
    assert some.persons is not None and some.persons.tolist() == [train.persons[5], train.persons[0]]  # type: ignore[index]


def test_a_pattern_finds_persons_in_paths(tmp_path: Path) -> None:
    """In metadata's paths, in class folders, and in a zip archive."""
    folder = patients(tmp_path / "set", COUNTS)
    assert counted(read(folder, person_pattern=r"(P\d+)_").train) == COUNTS
    for name in ("cat/u1_0.png", "cat/u2_0.png", "dog/u1_1.png", "dog/u1_2.png"):
        image(tmp_path / "classes" / name)
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "classes")
    for source in (tmp_path / "classes", Path(archive)):
        assert counted(read(source, person_pattern=r"/(u\d+)_").train) == {"u1": 3, "u2": 1}


def test_a_column_of_a_table_says_it_and_spaces_do_not_matter(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "set.parquet", 4, label=[0, 1, 0, 1], user=["7", " 7 ", "8", "7"])
    found = read(tmp_path / "set.parquet", person_column="user").train
    assert counted(found) == {"7": 3, "8": 1}
    line = refusal(tmp_path / "set.parquet", person_pattern="(u)")
    assert "the images of a table have no names of files; expected data.person_column" in line
    assert "person_column=usr: expected one of" in refusal(tmp_path / "set.parquet", person_column="usr")


def test_an_image_of_nobody_or_of_two_is_named(tmp_path: Path) -> None:
    folder = patients(tmp_path / "set", {"a": 2, "b": 2})
    rows = (folder / "metadata.csv").read_text()
    put(
        folder / "metadata.csv", rows.replace("a_1.png,malignant,a", "a_1.png,malignant,").replace(",b", ", ")
    )
    line = refusal(folder, person_column="patient")
    assert line.startswith("data.person_column=patient: 3 images without one person; expected one for each:")
    assert "  a_1.png: no person" in line and "  b_0.png: no person" in line and "a_0" not in line
    put(folder / "metadata.csv", rows + "a_0.png,benign,b\n")
    assert "a_0.png: 2 rows (line 2 of metadata.csv, line 6 of metadata.csv)" in refusal(
        folder, person_column="patient"
    )
    put(folder / "metadata.csv", rows)
    line = refusal(folder, person_pattern="([ab])_1")
    assert "2 images without one person" in line and "a_0.png: no person" in line and "a_1" not in line
    image(folder / "a_b.png")
    put(folder / "metadata.csv", rows + "a_b.png,benign,b\n")
    assert "a_b.png: several persons (a, b)" in refusal(folder, person_pattern="([ab])")
    line = refusal(folder, person_pattern="(patient-[0-9]+)")
    assert "is found in none of the 5 paths of the images, such as 'a_0.png'" in line
    # A whole report for the owner, and nothing of it in a record.
    data = DataConfig(
        name="imagefolder", image_size=8, channels=1, source=str(folder), person_pattern="([ab])_"
    )
    found = inspect(data, PathsConfig(), progress="off")
    assert found.wrong == [] and ("persons", ["2 (train 2)"]) in found.sections()
    data.person_pattern = "(a)_"
    assert [name for name, _ in inspect(data, PathsConfig(), progress="off").wrong] == ["b_0.png", "b_1.png"]
    with pytest.raises(PrivateRefusal) as refused:
        read(folder, person_pattern="(a)_")
    assert "b_0" not in recorded(refused.value)


def test_sets_that_do_not_tell_are_refused_in_one_line(tmp_path: Path) -> None:
    paths = PathsConfig(cache=str(tmp_path))
    for settings in ({"person_column": "user"}, {"person_pattern": "(u)"}):
        with pytest.raises(UserError) as refused:
            load(DataConfig(name="digits", image_size=8, **settings), paths)  # type: ignore[arg-type]
        assert "digits reads no image files; expected null" in str(refused.value)
    image(tmp_path / "set/cat/0.png")
    line = refusal(tmp_path / "set", person_column="user")
    assert "person_column=user: imagefolder was not read from a table" in line and "\n" not in line
    folder = patients(tmp_path / "patients", {"a": 2, "b": 2})
    line = refusal(folder, person_column="patents")
    assert "no column 'patents' in metadata.csv" in line and "did you mean 'patient'?" in line


SIZES = {"person_column": "patient", "test_size": 0.3, "validation_size": 0.2}


def roles(splits: ImageSplits) -> dict[str, str]:
    """The role of each person. Raises AssertionError where roles share one."""
    found: dict[str, str] = {}
    for part in splits:
        for person in counted(part):
            assert found.setdefault(person, part.role) == part.role
    return found


def test_roles_never_share_a_person_and_nobody_moves_anybody_else(tmp_path: Path) -> None:
    folder = patients(tmp_path / "set", COUNTS)
    splits = read(folder, **SIZES)
    before = roles(splits)
    assert len(before) == 60 and set(before.values()) == {"train", "validation", "test"}
    assert {person: n for part in splits for person, n in counted(part).items()} == COUNTS
    # Fewer persons train where a fraction of them is asked for, and they are some of those.
    fewer = roles(read(folder, **SIZES, train_size=0.5))
    assert {p for p, role in fewer.items() if role == "train"} < {
        p for p, r in before.items() if r == "train"
    }
    for change in (
        COUNTS | {"P07": 40},
        COUNTS | {"new": 3},
        {p: n for p, n in COUNTS.items() if p != "P07"},
    ):
        after = roles(read(patients(tmp_path / f"set{len(change)}{sum(change.values())}", change), **SIZES))
        assert all(after[person] == role for person, role in before.items() if person in after)
    # The broken twin: images that draw their roles by their pixels share persons between roles.
    apart = read(folder, test_size=0.3)
    owner = {
        picture.tobytes(): person for picture, person in _owners(read(folder, person_column="patient").train)
    }
    assert {owner[p.tobytes()] for p in apart.train.images} & {owner[p.tobytes()] for p in apart.test.images}


def _owners(images: ImageSet) -> list[tuple[np.ndarray, str]]:
    assert images.persons is not None
    return list(zip(images.images, images.persons, strict=True))


def test_the_fractions_are_of_persons() -> None:
    """Shares are uniform: of 20,000 persons 0.3 to within 5 deviations, which fails once in a million."""
    names = np.array([f"p{i}" for i in range(20_000)], dtype=object)
    share = persons.shares(names, "role")
    assert abs(float((share < 0.3).mean()) - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5
    assert np.array_equal(persons.shares(names[::-1], "role")[::-1], share)
    assert abs(float(np.corrcoef(share, persons.shares(names, "train"))[0, 1])) < 5 / 20_000**0.5


def test_roles_that_the_set_brings_must_not_share_a_person(tmp_path: Path) -> None:
    for role, names in (("train", ("a_0", "b_0", "a_1")), ("test", ("c_0", "a_2"))):
        for name in names:
            image(tmp_path / "set" / role / "cat" / f"{name}.png")
    line = refusal(tmp_path / "set", person_pattern="([a-c])_")
    assert "1 persons have images in several roles" in line and "  a: train, test" in line
    (tmp_path / "set/test/cat/a_2.png").unlink()
    splits = read(tmp_path / "set", person_pattern="([a-c])_")
    assert counted(splits.train) == {"a": 2, "b": 1} and counted(splits.test) == {"c": 1}


def test_a_picture_of_several_persons_is_told(tmp_path: Path) -> None:
    folder, told = patients(tmp_path / "set", {"a": 2, "b": 2}), list[str]()
    shutil.copy(folder / "a_0.png", folder / "b_1.png")
    data = DataConfig(
        name="imagefolder", image_size=8, channels=1, source=str(folder), person_column="patient"
    )
    load(data, PathsConfig(cache=str(tmp_path / "cache")), tell=told.append)
    assert any("pictures that several persons have (the same pixels): 1" in line for line in told)
