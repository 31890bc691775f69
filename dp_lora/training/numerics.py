"""All that is known to change what a training computes, up to the last bit.

It names the executions in the write-ahead record (`privacy.executions`): what differs here gets a fresh batch
and fresh noise at once. What is not known here shows in the sum of a step, to which its noise is bound.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dp_lora.config.load import PACKAGE
from dp_lora.config.schema import Config
from dp_lora.privacy.collectives import everyone
from dp_lora.privacy.precision import setting
from dp_lora.records.provenance import hardware, versions

_ROUND = ("dp-lora", "torch", "diffusers", "transformers", "peft", "opacus", "numpy", "cryptography")
"""Packages whose version can change how a step rounds."""

_LIBRARIES = (
    "ATEN_", "BLIS_", "CUBLAS_", "CUDA_", "CUDNN_", "DNNL_", "GLIBC_TUNABLES", "GOMP_", "GOTO_", "KMP_",
    "MKL_", "NCCL_ALGO", "NCCL_PROTO", "NPY_", "NVIDIA_TF32", "OMP_", "ONEDNN_", "OPENBLAS_", "TORCH_ALLOW_",
)  # fmt: skip
"""How the names of environment variables begin that tell a library how to compute."""

_ELSEWHERE = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH")
"""Those among them that say where something is."""


def numerics(config: Config, device: torch.device, microbatch: int, inputs: str) -> dict[str, Any]:
    """All that can change how a step rounds or what it starts from, for the write-ahead record.

    CUDA adds up in no fixed order unless torch is told to, so there every start is one of its own. Every
    process of the job has to ask.

    Args:
        config: the job.
        device: of the model.
        microbatch: examples per forward and backward.
        inputs: a digest of what the training begins from.
    """
    return {
        "inputs": inputs,
        "start": start(device),
        "train": asdict(config.train) | {"microbatch": None, "checkpoint_minutes": None},
        "learning_rate_factor": config.trainable.learning_rate_factor,
        "microbatch": microbatch,
        "processes": everyone(process(device)),
    }


def start(device: torch.device) -> str | None:
    """A random name for this start where the device adds up in no fixed order; else None."""
    repeatable = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    return None if repeatable else secrets.token_hex(8)


def process(device: torch.device) -> dict[str, Any]:
    """The hardware and libraries of this process, how they are set, and the code that it runs."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"],
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "matmul": setting(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest(),
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "versions": versions(_ROUND),
        "environment": environment(os.environ),
        "code": code_digest(PACKAGE),
    }


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of the environment `variables` that tell a library how to compute.

    >>> environment({"MKL_CBWR": "COMPATIBLE", "HOME": "/home/ann", "CUDA_VISIBLE_DEVICES": "1"})
    {'MKL_CBWR': 'COMPATIBLE'}
    """
    return {
        name: value
        for name, value in sorted(variables.items())
        if name.startswith(_LIBRARIES) and name not in _ELSEWHERE
    }


@cache
def code_digest(package: Path) -> str:
    """Hexadecimal sha256 of the names and contents of all Python files of a package, as they are on disk.

    Read once in a process.
    """
    hashed = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(package)} {len(content)}\n".encode())
        hashed.update(content)
    return hashed.hexdigest()
