"""Reads the .wandb file that an offline W&B run leaves: LevelDB's log framing around Record messages.

A file is a 7-byte header, then blocks of 32,768 bytes (the header counts to the first). A frame is CRC-32
of kind and data, length, kind (whole, first, middle or last part of a record), data; no frame header
crosses a block.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

FILE_HEADER = struct.Struct("<4sHB")
FRAME_HEADER = struct.Struct("<IHB")
BLOCK = 32768
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """What one file says about its run."""

    run_id: str = ""
    project: str = ""
    entity: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    host: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metric: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    exit_code: int | None = None
    shown: bytes = b""
    """All records but those of artifacts, whose paths W&B needs to find their files and does not upload."""


def read_run(path: Path) -> WandbRun:
    """All of one file; the part of a record that a kill cut off is left out.

    Raises ValueError when the file is no .wandb file or a frame's checksum is wrong.
    """
    run = WandbRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        run.kinds.add(kind)
        run.shown += b"" if kind in ("artifact", "request") else data
        if kind == "run":
            _take_run(run, record.run)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary.update(_items(record.summary.update))
        elif kind == "config":
            run.config.update(_items(record.config.update))
        elif kind == "metric":
            run.step_metric[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            run.artifacts.append(record.artifact.name)
        elif kind == "files":
            run.files += [file.path for file in record.files.files]
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _take_run(run: WandbRun, record: Any) -> None:
    run.run_id, run.project, run.group = record.run_id, record.project, record.run_group
    run.entity = record.entity
    run.job_type, run.name, run.host = record.job_type, record.display_name, record.host
    run.tags = list(record.tags)
    run.config.update(_items(record.config.update))


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    if len(data) < FILE_HEADER.size or FILE_HEADER.unpack_from(data)[:2] != (b":W&B", 0xBEE1):
        raise ValueError("not a .wandb file")
    position, parts = FILE_HEADER.size, b""
    while position + FRAME_HEADER.size <= len(data):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < FRAME_HEADER.size:
            position += left_in_block
            continue
        checksum, length, kind = FRAME_HEADER.unpack_from(data, position)
        position += FRAME_HEADER.size
        part = data[position : position + length]
        if len(part) < length:
            return
        if zlib.crc32(bytes([kind]) + part) != checksum:
            raise ValueError(f"wrong checksum before byte {position}")
        position += length
        parts = part if kind in (WHOLE, FIRST) else parts + part
        if kind in (WHOLE, LAST):
            yield parts
