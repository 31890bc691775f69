"""Images beside metadata.csv, .jsonl or .parquet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data.sets import ImageSplits, load
from dp_lora.errors import PrivateRefusal, recorded
from tests.builders.image_files import config, refused, write_image
from tests.builders.image_folders import image, put

CSV = (
    'file_name,label,text\n1.png,dog,a dog\n0.png,cat,a cat\n3.png,dog,"two dogs, one wet"\n2.png,cat,cats\n'
)
"""Four images in an order of its own; image i has the red value 10 i."""


def pictures(folder: Path, *names: str) -> Path:
    """An image for each name, whose red value is ten times the number in it."""
    for name in names:
        write_image(folder / name, 10 * int("".join(filter(str.isdigit, Path(name).stem))), (8, 8))
    return folder


def flat(folder: Path, metadata: str = CSV, name: str = "metadata.csv") -> Path:
    pictures(folder, "0.png", "1.png", "2.png", "3.png")
    put(folder / name, metadata)
    return folder


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_metadata_parquet(
    path: Path, columns: dict[str, list[Any]], classes: list[str] | None = None
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(columns)
    if classes is not None:
        features = {"label": {"names": classes, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def reds(splits: ImageSplits) -> list[list[int]]:
    """The red value of each image of each role."""
    return [part.images[:, 0, 4, 4].tolist() for part in splits]


def labels(splits: ImageSplits) -> list[list[str]]:
    return [[part.classes[label] for label in part.labels] for part in splits]


def read(folder: Path, **settings: object) -> ImageSplits:
    return load(config(folder, **settings), PathsConfig())


def test_a_table_says_the_class_and_the_text_of_each_image(tmp_path: Path) -> None:
    splits = read(flat(tmp_path), caption_column="text")
    assert splits.train.classes == ("cat", "dog")
    assert reds(splits) == [[10, 0, 30, 20], [], []]
    assert labels(splits)[0] == ["dog", "cat", "dog", "cat"]
    assert splits.train.captions is not None
    assert splits.train.captions.tolist() == ["a dog", "a cat", "two dogs, one wet", "cats"]
    assert read(tmp_path).train.captions is None


ROWS = [("1.png", "dog"), ("0.png", "cat"), ("3.png", "dog"), ("2.png", "cat")]


@pytest.mark.parametrize("kind", ["csv", "csv of Windows", "jsonl", "parquet"])
def test_the_three_kinds_of_files_say_the_same(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path, "0.png", "1.png", "2.png", "3.png")
    if kind == "parquet":
        names, classes = zip(*ROWS, strict=True)
        write_metadata_parquet(
            tmp_path / "metadata.parquet", {"file_name": list(names), "label": list(classes)}
        )
    elif kind == "jsonl":
        put(tmp_path / "metadata.jsonl", lines(*({"file_name": f, "label": c} for f, c in ROWS)))
    elif kind == "csv":
        put(tmp_path / "metadata.csv", CSV)
    else:
        put(tmp_path / "metadata.csv", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode() + b"\r\n")
    splits = read(tmp_path)
    assert reds(splits)[0] == [10, 0, 30, 20]
    assert labels(splits)[0] == ["dog", "cat", "dog", "cat"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_whole_numbers_are_classes_in_their_order(tmp_path: Path, kind: str) -> None:
    """Numbers that begin anywhere: 2, 10 and 7."""
    pictures(tmp_path, *(f"{i}.png" for i in range(6)))
    numbers = [10, 2, 7, 7, 2, 10]
    rows = [{"file_name": f"{i}.png", "grade": n} for i, n in enumerate(numbers)]
    if kind == "parquet":
        columns = {name: [row[name] for row in rows] for name in ("file_name", "grade")}
        write_metadata_parquet(tmp_path / "metadata.parquet", columns)
    elif kind == "jsonl":
        put(tmp_path / "metadata.jsonl", lines(*rows))
    else:
        text = "".join(f"{row['grade']},{row['file_name']}\n" for row in rows)
        put(tmp_path / "metadata.csv", f"grade,file_name\n{text}")
    splits = read(tmp_path, label_column="grade")
    assert splits.train.classes == ("2", "7", "10")
    assert splits.train.labels.tolist() == [2, 0, 1, 1, 0, 2]
    kept = read(tmp_path, label_column="grade", classes=["10", "2"])
    assert reds(kept)[0] == [0, 10, 40, 50]
    assert kept.train.labels.tolist() == [0, 1, 1, 0]


def test_a_parquet_file_may_name_its_numbers(tmp_path: Path) -> None:
    pictures(tmp_path, "0.png", "1.png", "2.png", "3.png")
    columns = {"file_name": [f"{i}.png" for i in range(4)], "label": [1, 0, 0, 1]}
    write_metadata_parquet(tmp_path / "metadata.parquet", columns, ["cat", "dog"])
    assert labels(read(tmp_path))[0] == ["dog", "cat", "cat", "dog"]


def test_without_a_column_of_classes_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path, "cat/0.png", "dog/1.png")
    put(tmp_path / "metadata.csv", "file_name,text\ncat/0.png,x\ndog/1.png,y\n")
    splits = read(tmp_path, caption_column="text")
    assert splits.train.classes == ("image",)
    assert reds(splits)[0] == [0, 10]
    assert capsys.readouterr().err == (
        "data: one class, since metadata.csv has no column label or labels; data.label_column names another, "
        "data.layout=folders takes them from the folders\n"
    )
    put(tmp_path / "metadata.csv", "file_name,lable\ncat/0.png,x\ndog/1.png,y\n")
    read(tmp_path)
    assert capsys.readouterr().err.endswith("takes them from the folders; did you mean 'lable'?\n")
    assert read(tmp_path, layout="folders").train.classes == ("cat", "dog")
    assert read(flat(tmp_path / "labelled"), label_column="none").train.classes == ("image",)


def test_one_table_above_all_roles(tmp_path: Path) -> None:
    pictures(tmp_path, "Train/0.png", "Train/a/1.png", "Testing/2.png", "VAL/3.png")
    rows = ["Testing/2.png,cat", "Train/a/1.png,dog", "Train/0.png,cat", "VAL/3.png,dog", "Train/4.png,dog"]
    pictures(tmp_path, "Train/4.png", "Train/5.png")
    rows.append("./Train//5.png,cat")
    put(tmp_path / "metadata.csv", "\n".join(["file_name,label", *rows]))
    splits = read(tmp_path)
    assert reds(splits) == [[10, 0, 40, 50], [30], [20]]
    assert labels(splits) == [["dog", "cat", "dog", "cat"], ["dog"], ["cat"]]


def test_roles_are_those_of_images_without_an_ending_too(tmp_path: Path) -> None:
    """And masks, which lie beside them, have none."""
    rows = []
    for number, name in enumerate(("train/a", "train/b", "test/c", "val/d")):
        pictures(tmp_path, f"masks/{number}.png")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / f"masks/{number}.png", tmp_path / name)
        rows.append({"file_name": name, "mask_file_name": f"masks/{number}.png"})
    put(tmp_path / "metadata.jsonl", lines(*rows))
    assert reds(read(tmp_path)) == [[0, 10], [30], [20]]


def test_a_table_in_each_role(tmp_path: Path) -> None:
    flat(tmp_path / "train")
    pictures(tmp_path / "test", "4.png", "5.png")
    rows = [
        {"file_name": "5.png", "label": "cat", "text": "x"},
        {"file_name": "4.png", "label": "dog", "text": "y"},
    ]
    put(tmp_path / "test/metadata.jsonl", lines(*rows))
    splits = read(tmp_path, caption_column="text")
    assert reds(splits) == [[10, 0, 30, 20], [], [50, 40]]
    assert labels(splits)[2] == ["cat", "dog"]
    assert splits.test.captions is not None
    assert splits.test.captions.tolist() == ["x", "y"]


def test_a_table_in_each_folder_below(tmp_path: Path) -> None:
    pictures(tmp_path, "a/0.png", "a/1.png", "b/2.png", "b/3.png")
    put(tmp_path / "a/metadata.csv", "file_name,label\n0.png,x\n1.png,y\n")
    put(tmp_path / "b/metadata.csv", "file_name,label\n3.png,x\n2.png,y\n")
    assert reds(read(tmp_path))[0] == [0, 10, 30, 20]
    assert labels(read(tmp_path))[0] == ["x", "y", "x", "y"]


def test_a_column_of_masks_names_no_images_of_the_set(tmp_path: Path) -> None:
    pictures(tmp_path, "images/0.png", "images/1.png", "masks/7.png", "masks/8.png")
    rows = [
        {"input_file_name": f"images/{i}.png", "mask_file_name": f"masks/{m}.png"}
        for i, m in ((1, 7), (0, 8))
    ]
    put(tmp_path / "metadata.jsonl", lines(*rows))
    assert refused(config(tmp_path)) == (
        "data.image_column=null: metadata.jsonl has the columns input_file_name, mask_file_name; "
        "expected one of input_file_name, mask_file_name; did you mean 'mask_file_name'?"
    )
    assert reds(read(tmp_path, image_column="input"))[0] == [10, 0]
    assert reds(read(tmp_path, image_column="input_file_name"))[0] == [10, 0]
    assert reds(read(tmp_path, image_column="mask"))[0] == [70, 80]


def test_other_files_without_a_row_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat(tmp_path)
    for name in ("README.md", "labels.csv", "Thumbs.db", "sub/._0.png", "sub/desktop.ini", "sub/Desktop.ini"):
        put(tmp_path / name)
    assert reds(read(tmp_path))[0] == [10, 0, 30, 20]
    assert capsys.readouterr().err.splitlines() == [
        "data: left out 2 files that are no images and have no row: README.md, labels.csv",
        "data: skipped 4 left behind by operating systems or tools: ._* 1, Desktop.ini 1, Thumbs.db 1, "
        "desktop.ini 1",
    ]


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root, who runs the tests in a container, any folder can be read."""
    scan = os.scandir

    def forbidden(folder: str | Path) -> object:
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    (flat(tmp_path) / "sub").mkdir()
    monkeypatch.setattr(os, "scandir", forbidden)
    assert refused(config(tmp_path)) == f"data.source: {tmp_path}/sub is no folder that can be read"


def test_a_name_may_be_written_in_either_of_unicodes_forms(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, f"m\u00fcde{i}.png") for i, form in enumerate(("NFC", "NFD", "NFD"))]
    pictures(tmp_path, *names)
    told = [unicodedata.normalize(form, names[i]) for i, form in enumerate(("NFC", "NFC", "NFD"))]
    put(tmp_path / "metadata.csv", "file_name\n" + "\n".join(told))
    assert reds(read(tmp_path))[0] == [0, 10, 20]


def test_paths_may_have_the_backslashes_of_windows(tmp_path: Path) -> None:
    pictures(tmp_path, "a/0.png", "a/1.png")
    put(tmp_path / "metadata.csv", "file_name\na\\1.png\na\\0.png\n")
    assert reds(read(tmp_path))[0] == [10, 0]


def test_roles_do_not_depend_on_the_table(tmp_path: Path) -> None:
    """Each image draws its role by its own pixels, whatever names it."""
    pictures(tmp_path / "set/cat", *(f"{i}.png" for i in range(20)))
    by_folder = read(tmp_path / "set", test_size=0.5)
    rows = [f"cat/{i}.png,x" for i in reversed(range(20))]
    put(tmp_path / "set/metadata.csv", "\n".join(["file_name,label", *rows]))
    by_table = read(tmp_path / "set", test_size=0.5)
    assert 0 < len(by_table.test) < 20
    assert [sorted(part) for part in reds(by_table)] == [sorted(part) for part in reds(by_folder)]


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    # name: what is made, settings, the line with {} for the folder
    "a column that is not there": (
        flat, {"label_column": "lable"},
        "data.label_column=lable: no column 'lable' in metadata.csv, expected one of file_name, label, "
        "text, or none for one class; did you mean 'label'?",
    ),
    "no such text": (
        flat, {"caption_column": "txt"},
        "data.caption_column=txt: no column 'txt' in metadata.csv, expected one of file_name, label, "
        "text; did you mean 'text'?",
    ),
    "no column of files": (
        lambda f: flat(f, "filename,label\n0.png,x\n"), {},
        "data.image_column=null: metadata.csv has the columns filename, label; expected file_name, with the "
        "path of each image, or the name of the column that has it; did you mean 'filename'?",
    ),
    "an attribute that is not there": (
        flat, {"attribute": "Smiling"},
        "data.attribute=Smiling: expected one of file_name, label, text, or null",
    ),
    "a class in one table alone": (
        lambda f: (flat(f / "train"), flat(f / "test", "file_name\n0.png\n1.png\n2.png\n3.png\n")), {},
        "data.label_column=null: no column 'label' in test/metadata.csv, expected one of file_name, or "
        "none for one class",
    ),
    "a missing file": (
        lambda f: flat(f, CSV + "4.png,cat,x\n"), {},
        "data.source: 4.png: no such file (line 6 of metadata.csv); expected one row for each image",
    ),
    "an image without a row": (
        lambda f: pictures(flat(f), "a/5.png"), {},
        "data.source: a/5.png: no row; expected one row for each image",
    ),
    "two rows": (
        lambda f: flat(f, CSV + "./2.png,dog,x\n"), {},
        "data.source: 2.png: 2 rows (line 5 of metadata.csv, line 6 of metadata.csv); expected one row "
        "for each image",
    ),
    "no class in a row": (
        lambda f: flat(f, CSV.replace(",cat,cats", ",,cats")), {},
        "data.source: 2.png: no value of label (line 5 of metadata.csv); expected one row for each image",
    ),
    "a path that leads out": (
        lambda f: (image(f.parent / "x.png"), flat(f, CSV + "../x.png,cat,x\n")), {},
        "data.source: ../x.png: leads out of the folder of metadata.csv (line 6 of metadata.csv); "
        "expected one row for each image",
    ),
    "two kinds of table": (
        lambda f: put(flat(f) / "metadata.jsonl", "{}"), {},
        "data.source: metadata.csv and metadata.jsonl both lie in the folder of the set; expected one of "
        "them",
    ),
    "a role without a table": (
        lambda f: (flat(f / "train"), pictures(f / "test", "0.png")), {},
        "data.source: no metadata file in test, beside train/metadata.csv; expected one in each, or one "
        "above them",
    ),
    "no train": (
        lambda f: flat(f / "test"), {},
        "data.source: no folder train in {}, only test; expected it beside them",
    ),
    "a misspelt role": (
        lambda f: (flat(f / "train"), flat(f / "tset")), {},
        "data.source: folder 'tset' beside train in {}; expected train, validation, test; did you mean "
        "'test'?",
    ),
    "semicolons": (
        lambda f: flat(f, CSV.replace(",", ";")), {},
        "data.source: metadata.csv: columns between ';'; expected commas",
    ),
    "a line that is too long": (
        lambda f: flat(f, CSV.replace('"', "")), {},
        "data.source: metadata.csv: line 4 has 4 values for 3 columns; expected as many",
    ),
    "a column twice": (
        lambda f: flat(f, "file_name,label,label\n0.png,a,b\n"), {},
        "data.source: metadata.csv: two columns 'label'; expected each once",
    ),
    "no rows": (
        lambda f: flat(f, "file_name,label\n"), {},
        "data.source: metadata.csv has no rows; expected one for each image",
    ),
    "latin1": (
        lambda f: put(flat(f) / "metadata.csv", b"file_name\nm\xfcde.png\n"), {},
        "data.source: metadata.csv is no text in UTF-8; expected that",
    ),
    "no JSON": (
        lambda f: flat(f, '{"file_name": "0.png"}\n[1]\n', "metadata.jsonl"), {},
        "data.source: metadata.jsonl: line 2 is no JSON object; expected one in each line",
    ),
    "a class for each image": (
        lambda f: flat(f, "file_name,label\n0.png,17\n1.png,4\n2.png,12\n3.png,9\n"), {},
        "data.label_column=label: 4 different numbers for 4 images; expected classes that many images share, "
        "since their names are released",
    ),
    "fractions": (
        lambda f: flat(
            f, lines(*({"file_name": f"{i}.png", "label": 0.5} for i in range(4))), "metadata.jsonl"
        ),
        {}, "data.label_column=label: values of float, expected whole numbers or names",
    ),
    "a text that is missing": (
        lambda f: flat(f, CSV.replace("a cat", "")), {"caption_column": "text"},
        "data.caption_column=text: expected one text for each image of train",
    ),
    "a stray table of images": (
        lambda f: shutil.copy(_parquet(pictures(f, "0.png") / "x.parquet"), f / "metadata.parquet"), {},
        "data.source={}: holds the table x.parquet and the image 0.png; expected data.layout=tables, "
        "which reads the parquet files, or data.layout=folders, which reads the class folders",
    ),
}  # fmt: skip


def _parquet(path: Path) -> Path:
    write_metadata_parquet(path, {"file_name": ["0.png"]})
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, settings, said = REFUSED[name]
    make(tmp_path / "set")
    assert refused(config(tmp_path / "set", **settings)) == said.replace("{}", str(tmp_path / "set"))


@pytest.mark.parametrize("name", sorted({*REFUSED} - {"a stray table of images"}))
def test_no_record_of_a_job_says_what_its_owner_is_told(tmp_path: Path, name: str) -> None:
    make, settings, _ = REFUSED[name]
    make(tmp_path / "set")
    with pytest.raises(PrivateRefusal) as caught:
        read(tmp_path / "set", **settings)
    assert (
        recorded(caught.value) == "the private images were refused; the reason is on the job's own terminal"
    )


def test_a_damaged_parquet_file_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    said = refused(config(flat(tmp_path, "PAR1", "metadata.parquet")))
    assert said.startswith("data.source: metadata.parquet cannot be read (")


def test_all_that_does_not_match_is_listed(tmp_path: Path) -> None:
    flat(tmp_path, CSV + "9.png,cat,x\n1.png,dog,y\n2.png,,z\n/etc/passwd,cat,x\nhttp://x/0.png,cat,x\n")
    image(tmp_path / "a/5.png")
    image(tmp_path / "a/6.jpg")
    with pytest.raises(PrivateRefusal) as caught:
        read(tmp_path)
    assert str(caught.value).split("\n") == [
        "data.source: 8 images and rows of metadata do not match; expected one row for each image:",
        "  9.png: no such file (line 6 of metadata.csv)",
        "  2.png: no value of label (line 8 of metadata.csv)",
        "  /etc/passwd: leads out of the folder of metadata.csv (line 9 of metadata.csv)",
        "  http://x/0.png: leads out of the folder of metadata.csv (line 10 of metadata.csv)",
        "  1.png: 2 rows (line 2 of metadata.csv, line 7 of metadata.csv)",
        "  2.png: 2 rows (line 5 of metadata.csv, line 8 of metadata.csv)",
        "  a/5.png: no row",
        "  a/6.jpg: no row",
    ]


def test_a_published_set_can_be_ones_own_folder_with_a_table(tmp_path: Path) -> None:
    rows = lines(*({"file_name": f"{i}.png", "Male": 2 * (i % 2) - 1} for i in range(4)))
    flat(tmp_path / "faces", rows, "metadata.jsonl")
    settings = {"source": str(tmp_path / "faces"), "image_size": 8, "channels": 3, "attribute": "Male"}
    train = load(DataConfig("celeba", **settings), PathsConfig()).train  # type: ignore[arg-type]
    assert train.classes == ("Female", "Male")
    assert train.labels.tolist() == [0, 1, 0, 1]


HUGGING_FACE = """
import json, sys
import datasets

datasets.disable_progress_bars()
splits = datasets.load_dataset("imagefolder", data_dir=sys.argv[1], cache_dir=sys.argv[2])
found = {name: [[row["image"].getpixel((4, 4))[0], row["label"], row["text"]] for row in rows]
         for name, rows in splits.items()}
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("layout", ["flat", "roles"])
def test_datasets_reads_the_same(tmp_path: Path, kind: str, layout: str) -> None:
    """Red value, class and text of each image, in the same order, as Hugging Face's imagefolder has them."""
    pytest.importorskip("datasets")
    for role in ("train", "test"):
        folder = tmp_path / "set" / role if layout == "roles" else tmp_path / "set"
        if role == "test" and layout == "flat":
            continue
        pictures(folder, "0.png", "sub/1.png", "2.png", "3.png")
        names = ["2.png", "sub/1.png", "3.png", "0.png"]
        rows = [{"file_name": name, "label": label, "text": f"{role} {label}"}
                for name, label in zip(names, ["x", "y", "x", "y"], strict=True)]  # fmt: skip
        if kind == "parquet":
            write_metadata_parquet(
                folder / "metadata.parquet", {name: [row[name] for row in rows] for name in rows[0]}
            )
        elif kind == "jsonl":
            put(folder / "metadata.jsonl", lines(*rows))
        else:
            text = "".join(",".join(row.values()) + "\n" for row in rows)
            put(folder / "metadata.csv", f"file_name,label,text\n{text}")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUGGING_FACE, str(tmp_path / "set"), str(tmp_path / "cache")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    theirs = json.loads(output.splitlines()[-1])
    splits = read(tmp_path / "set", caption_column="text")
    ours = {}
    for role, part, red, label in zip(theirs, (splits.train, splits.test), reds(splits)[::2],
                                      labels(splits)[::2], strict=False):  # fmt: skip
        assert part.captions is not None and isinstance(part.images, np.ndarray)
        ours[role] = [list(row) for row in zip(red, label, part.captions.tolist(), strict=True)]
    assert ours == theirs and theirs["train"][0] == [20, "x", "train x"]
