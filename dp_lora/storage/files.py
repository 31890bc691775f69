"""Writing files so that a crash leaves either the old content or the new, never half of one."""

from __future__ import annotations

import codecs
import fcntl
import json
import math
import os
import re
import secrets
import tempfile
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
    """The value that `write_json` wrote; infinities and NaN stay the strings "inf", "-inf" and "nan".

    Raises Damaged when the file is empty, cut off or something else, such as a folder.
    """
    content = _content(path)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not content.strip() else _reason(error)
        raise Damaged(f"{path}: no JSON ({reason}); expected what this program wrote there") from error


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends `record` to a JSON-lines file in one write.

    Guarantees:
        * A last line that an earlier crash left unfinished goes first, if it begins a record; a whole record
          that lacks its newline stays.
        * A file that ends with anything else is left as it is, and Damaged is raised.

    One process at a time may append.
    """
    data = (_line(record) + "\n").encode()
    _refuse_special(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        start, last = _last_line(descriptor)
        if _is_unfinished(last, first=start == 0):
            os.ftruncate(descriptor, start)
        elif last:
            _parse(path, None, last)
            data = b"\n" + data
        if os.write(descriptor, data) != len(data):
            raise OSError(f"{path}: the disk took only part of a line")
    finally:
        os.close(descriptor)


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a JSON-lines file atomically."""
    write_atomic(path, "".join(_line(record) + "\n" for record in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, without a last one that is unfinished; an absent file has none.

    Raises Damaged naming the line when one is no JSON object, and neither is the last the beginning of one.
    """
    if not path.exists():
        return []
    lines = _content(path).split(b"\n")
    if _is_unfinished(lines[-1], first=len(lines) == 1) or not lines[-1]:
        del lines[-1]
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(json_ready(record), allow_nan=False, ensure_ascii=False)


def _content(path: Path) -> bytes:
    _refuse_special(path)
    return path.read_bytes()


def _refuse_special(path: Path) -> None:
    """Raises Damaged for what is there and is no regular file: reading a pipe or a device has no end."""
    if path.is_dir():
        raise Damaged(f"{path}: a folder; expected a file as this program writes it")
    if path.exists() and not path.is_file():
        raise Damaged(f"{path}: no regular file; expected a file as this program writes it")


def _reason(error: Exception) -> str:
    """Why a text is no JSON; the reader gives up on brackets within brackets some thousand levels deep."""
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())


def _parse(path: Path, number: int | None, line: bytes) -> dict[str, Any]:
    """The record in line `number` of the file, None for the last; raises Damaged where it is none."""
    place = f"{path}, " + (f"line {number}" if number else "the last line")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{place}: no JSON ({_reason(error)})") from error
    if not isinstance(record, dict):
        raise Damaged(f"{place}: expected a JSON object, found {type(record).__name__}")
    return record


def _last_line(descriptor: int, block: int = 65536) -> tuple[int, bytes]:
    """Where the text behind the last newline of a file begins, and that text."""
    end = size = os.lseek(descriptor, 0, os.SEEK_END)
    tail = b""
    while end > 0:
        start = max(0, end - block)
        tail = os.pread(descriptor, end - start, start) + tail
        newline = tail.rfind(b"\n", 0, end - start)
        if newline >= 0:
            tail = tail[newline + 1 :]
            break
        end = start
    return size - len(tail), tail


def _is_unfinished(line: bytes, *, first: bool) -> bool:
    """Whether a last line without a newline is what a crash leaves of a record: its beginning.

    Some file systems leave zeros after it, or, behind other lines, zeros alone.
    """
    begun = line.rstrip(b"\0")
    if not begun:
        return bool(line) and not first
    try:
        # The last letter may lack some of its bytes.
        text = codecs.getincrementaldecoder("utf-8")().decode(begun)
        json.loads(text)
    except json.JSONDecodeError as error:
        return text.startswith("{") and _ends_too_early(text, error)
    except (ValueError, RecursionError):
        return False
    return begun != line


def _ends_too_early(text: str, error: json.JSONDecodeError) -> bool:
    """Whether JSON is no JSON only because it stops."""
    rest = text[error.pos :]
    if error.msg.startswith("Unterminated string") or rest.strip() == "":
        return True
    if error.msg.startswith("Invalid"):
        return re.search(r"\\(u[0-9a-fA-F]{0,4})?$", text) is not None and error.pos > len(text) - 7
    if re.fullmatch(r"\.|[eE][+-]?", rest):
        return True
    return any(word.startswith(rest) for word in ("true", "false", "null", "-"))


@contextmanager
def file_lock(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock of `path`, one holder at a time among all processes of all machines that see the file.

    The system frees it when its holder dies. The file itself stays: removing it would let two hold it.

    Args:
        path: an empty file, made when absent; its folder is made too.
        waiting: called once when somebody else holds the lock, before waiting for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_special(path)
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


def expanded(path: str | Path, field: str) -> Path:
    """`path` with the home of a user in place of `~` or `~name`; raises UserError naming `field`.

    >>> expanded("images", "data.source=images")
    PosixPath('images')
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = str(path).partition("/")[0]
        raise UserError(
            f"{field}: {user} is the home of nobody here; expected a path that is there"
        ) from error


def check_writable(folder: Path, field: str) -> None:
    """Raises UserError naming `field` unless `folder` is, or can be made, a directory that can be written.

    Nothing is left behind. Whether a folder that is there takes another is found by making one in it: some
    file systems, such as /proc, only seem to.
    """
    above = _nearest(folder.absolute(), field)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{field}: {above} is not a directory that can be written")
    if above != folder.absolute():
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".dp_lora-", dir=above))
        except OSError as error:
            raise UserError(
                f"{field}: {above} is not a directory that can be written ({error.strerror})"
            ) from error


def check_file(path: Path, field: str) -> None:
    """Raises UserError naming `field` unless `path` is, or can be made, a file that can be written."""
    check_writable(path.parent, field)
    if _nearest(path.absolute(), field) != path.absolute():
        return
    if not path.is_file():
        raise UserError(f"{field}: no regular file; expected what this program wrote, or a new name for it")
    if not os.access(path, os.R_OK | os.W_OK):
        raise UserError(f"{field}: cannot be read and written; expected a file with the permission to do so")


def _nearest(path: Path, field: str) -> Path:
    """The first of `path` and the folders above it that is there; raises UserError for what leads nowhere."""
    for one in (path, *path.parents):
        try:
            one.lstat()
            one.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            if one.is_symlink():
                raise UserError(
                    f"{field}: {one} is a link that leads nowhere; expected another place"
                ) from error
        except OSError as error:
            shown = f"{one.name[:20]}..." if len(one.name) > 100 else one
            raise UserError(f"{field}: {shown}: {error.strerror}; expected another place") from error
        else:
            return one
    return path
