"""Functions of real images that evaluations share: computed once, kept in files of their owner, verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dp_lora.errors import UserError
from dp_lora.files import private_directory, write_atomic


def cached(
    cache: Path | None, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `compute` returns, computed once for each `key` and then read from `cache`/evaluation.

    The folder has mode 0700 and its files 0600, for they are functions of private images. A file appears
    whole or not at all, and is read only if it holds this key and its content has the recorded sha256.
    Jobs computing at once write the same thing.

    Raises UserError when a file is damaged. `cache` null computes always.
    """
    if cache is None:
        return compute()
    text = json.dumps(key, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = private_directory(cache.expanduser() / "evaluation") / f"{name}.safetensors"
    if path.exists():
        return _read(path, text)
    tensors = {name: value.contiguous() for name, value in compute().items()}
    record = {"key": text, "sha256": digest(*(tensors[name] for name in sorted(tensors)))}
    write_atomic(path, safetensors.torch.save(tensors, metadata=record), mode=0o600)
    return tensors


def _read(path: Path, key: str) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except safetensors.SafetensorError as error:
        raise UserError(f"paths.cache: {path} is damaged ({error}); delete it") from error
    if record.get("key") != key or record.get("sha256") != digest(*tensors.values()):
        raise UserError(f"paths.cache: {path} is damaged (its checksum differs); delete it")
    return tensors


def digest(*tensors: Tensor) -> str:
    """sha256 of the dtypes, shapes and values of `tensors`."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
