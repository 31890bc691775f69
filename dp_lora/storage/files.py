"""Writing files so that a crash leaves either the old content or the new, never half of one."""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dp_lora.errors import UserError


def write_atomic(path: Path, content: bytes | str, *, mode: int = 0o666) -> None:
    """Replaces the content of `path` so that every reader sees all of the old or all of the new.

    The bytes go to a file beside it, reach the disk, and take its name; then the folder's entry reaches
    the disk. A crash in between leaves `path` as it was.

    Args:
        path: its folder must exist.
        content: text is written as UTF-8.
        mode: permissions of a file made anew, less the umask; 0o600 for what is private.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_ready(value: Any) -> Any:
    """`value` with every float that JSON cannot hold as the string "inf", "-inf" or "nan".

    `float("inf")` reads them back, so a reader who writes `float(record["epsilon"])` gets numbers and
    infinities alike. Tuples become lists and paths become strings; other types are left to `json`, which
    refuses what it does not know.

    >>> json_ready({"epsilon": math.inf, "steps": (1, 2.5)})
    {'epsilon': 'inf', 'steps': [1, 2.5]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [json_ready(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, record: Any, *, mode: int = 0o666) -> None:
    """Replaces `path` atomically by `record`: keys in their given order, indented by 2, strict JSON.

    Floats that JSON cannot hold are written as `json_ready` says.
    """
    text = json.dumps(json_ready(record), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(path, text + "\n", mode=mode)


class Damaged(UserError, ValueError):
    """A file that this program wrote cannot be read any more."""


def read_json(path: Path) -> Any:
    """What `write_json` wrote; infinities and NaN stay the strings "inf", "-inf" and "nan".

    Raises Damaged when the file is empty, cut off or something else, such as a folder.
    """
    content = _content(path)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not content.strip() else _reason(error)
        raise Damaged(f"{path}: no JSON ({reason}); expected what this program wrote there") from error


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends `record` to a JSON-lines file in one write; a torn last line of an earlier crash goes first.

    One process at a time may append.
    """
    data = (_line(record) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        _cut_torn_line(descriptor)
        if os.write(descriptor, data) != len(data):
            raise OSError(f"{path}: the disk took only part of a line")
    finally:
        os.close(descriptor)


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a JSON-lines file atomically."""
    write_atomic(path, "".join(_line(record) + "\n" for record in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, without a torn last line; an absent file has none.

    Raises Damaged naming the line when a line before the last is no JSON object.
    """
    if not path.exists():
        return []
    whole = _content(path).split(b"\n")[:-1]
    return [_parse(path, number, line) for number, line in enumerate(whole, start=1)]


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(json_ready(record), allow_nan=False, ensure_ascii=False)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError as error:
        raise Damaged(f"{path}: a folder; expected a file as this program writes it") from error


def _reason(error: Exception) -> str:
    """Why a text is no JSON; the reader gives up on brackets within brackets some thousand levels deep."""
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}, line {number}: no JSON ({_reason(error)})") from error
    if not isinstance(record, dict):
        raise Damaged(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
    return record


def _cut_torn_line(descriptor: int, block: int = 65536) -> None:
    end = size = os.lseek(descriptor, 0, os.SEEK_END)
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            os.ftruncate(descriptor, start + newline + 1)
            return
        end = start
    os.ftruncate(descriptor, 0)


@contextmanager
def file_lock(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock of `path`, one holder at a time among all processes of all machines that see the file.

    The system frees it when its holder dies. The file itself stays: removing it would let two hold it.

    Args:
        path: an empty file, made when absent; its folder is made too.
        waiting: called once when somebody else holds the lock, before waiting for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def private_directory(path: Path) -> Path:
    """`path` as a directory that only its owner can enter (mode 0700), made when absent.

    Raises PermissionError when it belongs to another user, FileExistsError when it is no directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)
    return path


def check_writable(folder: Path, field: str) -> None:
    """Raises UserError naming `field` unless `folder` is, or can be made, a directory that can be written."""
    above = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{field}: {above} is not a directory that can be written")
