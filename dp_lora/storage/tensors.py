"""Functions of real images that evaluations share: computed once, kept in files of their owner, verified."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dp_lora.storage.files import private_directory, write_atomic
from dp_lora.storage.keyed import keyed_name


def cached(
    cache: Path | None, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The result of `compute`, computed once for each `key` and then read from `cache`/evaluation.

    The folder has mode 0700 and its files 0600, for they are functions of private images; neither their names
    nor their headers tell anything about `key` without the cache's own key (`dp_lora.storage.keyed`). A file
    appears whole or not at all, and is read only if it was made for this key and its content has the recorded
    sha256. A damaged one is reported on stderr and made again. Jobs computing at once write the same thing.

    Args:
        cache: `paths.cache`; null computes always.
        key: all that determines the result; digests of private images may be in it.
        compute: makes the tensors.
    """
    if cache is None:
        return compute()
    root = cache.expanduser()
    name = keyed_name(root, f"evaluation {json.dumps(key, sort_keys=True)}")
    path = private_directory(root / "evaluation") / f"{name}.safetensors"
    found = _read(path, name) if path.exists() else None
    if found is not None:
        return found
    tensors = {name: value.contiguous() for name, value in compute().items()}
    record = {"key": name, "sha256": digest(*(tensors[name] for name in sorted(tensors)))}
    write_atomic(path, safetensors.torch.save(tensors, metadata=record), mode=0o600)
    return tensors


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of a file; None, and a line on stderr that does not name it, when it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except safetensors.SafetensorError:
        tensors, record = {}, {}
    if record.get("key") == key and record.get("sha256") == digest(*tensors.values()):
        return tensors
    print(f"{path.parent}: a damaged file; it is made again", file=sys.stderr, flush=True)
    return None


def digest(*tensors: Tensor) -> str:
    """sha256 of the dtypes, shapes and values of `tensors`."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(as_bytes(tensor))
    return found.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, of any dtype and on any device."""
    content: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return content
