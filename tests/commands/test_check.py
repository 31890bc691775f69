"""`dp-lora-check`: a whole set is read; nothing is trained, logged or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp_lora.commands.check import main
from tests.builders.commands import FOLDER, dp_lora, state_of
from tests.builders.image_folders import put
from tests.builders.tiny import words


def check(*given: object) -> int:
    """The exit status of the command."""
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["dp-lora-check", *map(str, given)])
            main()
        return 0
    except SystemExit as stopped:
        return int(stopped.code or 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images in two classes, each with values of its own."""
    for number, name in enumerate(("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3 + np.uint8(number)).save(path)
    return tmp_path / "set"


def test_a_set_that_can_be_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("data=imagefolder", f"data.source={folder}", "tracking.progress=off") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.splitlines() == [
        f"set        imagefolder, {folder}",
        "images     4 (train 4)",
        "classes    2",
        "           cat: train 2",
        "           dog: train 2",
        "sizes      8 x 8: 4",
        "modes      L: 4, values 0 to 192",
        "constant   0 of 4",
        "copies     0 of 4, by pixels",
        "wrong      0",
        "verdict    can be trained on",
    ]


def test_a_set_that_cannot_be_trained_on_has_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(folder / "cat/a.png", "<html>")
    put(folder / "dog/b.png", b"")
    assert check("data=imagefolder", f"data.source={folder}") == 2
    shown = capsys.readouterr()
    listed = shown.out[shown.out.index("wrong") :].splitlines()
    assert listed == [
        "wrong      2",
        f"           {folder}/cat/a.png: an HTML page",
        f"           {folder}/dog/b.png: empty (0 bytes)",
    ]
    assert "verdict" not in shown.out
    lines = shown.err.splitlines()
    assert lines[0] == "check 0/6"
    assert lines[-1] == "dp-lora-check: data: 2 files or rows are wrong, as listed; expected none"


def test_the_words_are_those_of_the_job(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder / "metadata.csv", "file_name,kind\ncat/0.png,1\ncat/1.png,2\ndog/0.png,2\ndog/1.png,1\n")
    words = [
        "data=imagefolder",
        f"data.source={folder}",
        "data.label_column=kind",
        "lora.rank=4",
        "epsilon=eps1",
    ]
    assert check(*words) == 0
    assert "           1: train 2\n           2: train 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no set is named; expected data=imagefolder data.source=PATH, or data=NAME"),
        (["{}"], "{}: expected data=imagefolder data.source={}"),
        (["data=imagefoldr"], "did you mean 'imagefolder'?"),
        (["data=imagefolder"], "data.source=null: expected the folder that holds "),
        (["data=imagefolder", "data.source={}/no"], "data.source={}/no: no such folder; "),
        (["data=imagefolder,digits"], "data=imagefolder,digits: several values; expected one"),
        (["data=imagefolder", "data.source={}", "data.colour=1"], "data.colour: no such option"),
        (
            ["data=imagefolder", "data.source={}", "data.channels=2"],
            "data.channels=2: expected 1 (grey) or 3",
        ),
        (["-m", "data=digits"], "unrecognized arguments: -m"),
        (
            ["--config-dir=/nonexistent", "data=digits"],
            "--config-dir=/nonexistent: expected a folder of presets",
        ),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(*(word.replace("{}", str(folder)) for word in words)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("dp-lora-check: ")
    assert said.replace("{}", str(folder)) in line


def test_presets_of_ones_own(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = f"name: imagefolder\nsource: {folder}\nclasses: [dog]\n"
    put(tmp_path / "presets/data/mine.yaml", preset)
    assert check("data=mine", f"--config-dir={tmp_path / 'presets'}") == 0
    assert "classes    1\n           dog: train 2\n" in capsys.readouterr().out


def test_a_job_on_rows_that_do_not_match_lists_them_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(folder / "metadata.jsonl", '{"file_name": "cat/0.png"}\n{"file_name": "dog/9.png"}\n')
    before = state_of(tmp_path)
    given = [*words(tmp_path / "cache", tmp_path / "outputs"), *FOLDER, f"data.source={folder}"]
    assert dp_lora(*given) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err[shown.err.index("dp-lora: ") :].splitlines() == [
        "dp-lora: data.source: 4 images and rows of metadata do not match; expected one row for each image:",
        "  dog/9.png: no such file (line 2 of metadata.jsonl)",
        "  cat/1.png: no row",
        "  dog/0.png: no row",
        "  dog/1.png: no row",
    ]
    assert state_of(tmp_path) == before


def test_nothing_is_written_anywhere(folder: Path, tmp_path: Path) -> None:
    """In an empty folder with an empty home: no run, no ledger, no index, no cache."""
    home = tmp_path / "home"
    home.mkdir()
    before = sorted(tmp_path.rglob("*"))
    places = {"HOME": str(home), "DP_LORA_CACHE": str(home / "cache"), "DP_LORA_DATA": str(home / "data")}
    command = [sys.executable, "-m", "dp_lora.commands.check", "data=imagefolder", f"data.source={folder}"]
    for status in (0, 2):
        done = subprocess.run(
            command,
            cwd=home,
            env={**os.environ, **places, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
        )
        assert done.returncode == status, done.stderr
        assert sorted(tmp_path.rglob("*")) == before
        put(folder / "cat/0.png", "no image")
