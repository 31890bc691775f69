"""A crash leaves the old content or the new; strict JSON; one holder of a lock."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dp_lora.storage.files import (
    Damaged,
    append_line,
    file_lock,
    private_directory,
    read_json,
    read_lines,
    write_atomic,
    write_json,
    write_lines,
)


def test_a_failed_write_leaves_the_old_content_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    write_atomic(path, "old")

    def no_room(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "big"
    contents = [b"a" * 300_000, b"b" * 300_000]
    write_atomic(path, contents[0])
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for content in contents:
                write_atomic(path, content)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        seen = {path.read_bytes() for _ in range(200)}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(contents)


def test_permissions_follow_the_umask_or_the_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "shared", b"")
        write_atomic(tmp_path / "private", b"", mode=0o600)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("shared", "private")]
    assert modes == [0o640, 0o600]


def test_json_is_strict_keeps_its_order_and_infinity_survives(tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    write_json(path, {"z": 1, "epsilon": math.inf, "a": {"x": (-math.inf, math.nan)}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    strict = json.loads(path.read_text(), parse_constant=refuse)
    assert list(strict) == ["z", "epsilon", "a"]
    assert float(read_json(path)["epsilon"]) == math.inf
    low, undefined = (float(text) for text in strict["a"]["x"])
    assert low == -math.inf
    assert math.isnan(undefined)


def test_what_json_does_not_know_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"tensor": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torn", ['{"step": 2', '{"step": 2, "text": "' + "x" * 200_000, ""])
def test_a_torn_last_line_is_dropped_on_read_and_before_the_next_append(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    with path.open("a") as file:
        file.write(torn)
    assert read_lines(path) == [{"step": 1}]
    append_line(path, {"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_file_of_one_torn_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"st')
    assert read_lines(path) == []
    append_line(path, {"step": 0})
    assert read_lines(path) == [{"step": 0}]


RECORD = {"a": [1, 2.5e-7, True, False, None, -3], "b": {"x": 'ü\\"é中\n\u2028', "y": {}}, "z": "\u0001"}


def test_every_beginning_of_a_record_is_dropped_and_the_whole_of_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_line(path, RECORD)
    whole = path.read_bytes()
    for end in range(1, len(whole) - 1):
        path.write_bytes(whole + whole[:end])
        assert read_lines(path) == [RECORD], whole[:end]
        append_line(path, {"step": 2})
        assert read_lines(path) == [RECORD, {"step": 2}], whole[:end]
    path.write_bytes(whole[:-1])
    assert read_lines(path) == [RECORD]
    append_line(path, {"step": 2})
    assert read_lines(path) == [RECORD, {"step": 2}]


@pytest.mark.parametrize("zeros", [b"\0" * 9, b'{"step": 2\0\0'])
def test_zeros_that_a_crash_leaves_behind_a_record_are_cut(tmp_path: Path, zeros: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"step": 1}\n' + zeros)
    append_line(path, {"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "content",
    [b"my diary", b"5", b'"text"', b"[1, 2", b"{my: notes", b'{"a": hello', b'{"a": 1} x', b"\0\0\0",
     b"\xff\xd8", b'{"step": 1}\nmy diary'],
)  # fmt: skip
def test_what_ends_as_no_record_does_is_refused_and_untouched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "diary.txt"
    path.write_bytes(content)
    for attempt in (lambda: append_line(path, {"step": 1}), lambda: read_lines(path)):
        with pytest.raises(Damaged, match=r"diary.txt, .*line( \d)?: (no JSON|expected a JSON object)"):
            attempt()
    assert path.read_bytes() == content


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/full"), Path("/dev/zero")):
        for attempt in (
            lambda path=path: append_line(path, {"step": 1}),
            lambda path=path: read_lines(path),
            lambda path=path: read_json(path),
            lambda path=path: file_lock(path).__enter__(),
        ):
            with pytest.raises(Damaged, match=f"{path}: (a folder|no regular file); expected a file"):
                attempt()


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": 1}, {"step": 2}, {"step": 3}])
    path.write_text(path.read_text().replace('{"step": 2}', '{"step"'))
    with pytest.raises(ValueError, match="line 2"):
        read_lines(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        read_lines(path)


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "absent.jsonl") == []


HOLD = """
import sys
from pathlib import Path
from dp_lora.storage.files import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_keeps_other_processes_out_until_its_holder_dies(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "model.lock"
    path.parent.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    waited: list[int | None] = []

    def kill_holder() -> None:
        waited.append(holder.poll())
        holder.kill()

    with file_lock(path, waiting=kill_holder):
        holder.wait(timeout=600)
    holder.stdin.close()
    holder.stdout.close()
    assert waited == [None]
    with file_lock(path, waiting=lambda: pytest.fail("the lock was not given back")):
        pass


def test_a_private_directory_is_closed_to_others_even_when_it_was_open(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoint"
    path.mkdir(parents=True, mode=0o755)
    assert private_directory(path) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(private_directory(tmp_path / "new" / "one").stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        private_directory(tmp_path / "file")
