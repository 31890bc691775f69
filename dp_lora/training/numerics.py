"""All that is known to change what a training computes, up to the last bit.

It names the executions in the write-ahead record (`privacy.executions`): what differs here gets a fresh batch
and fresh noise at once. What is not known here shows in the sum of a step, to which its noise is bound.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dp_lora.config.load import PACKAGE
from dp_lora.config.schema import Config
from dp_lora.models import folders
from dp_lora.models.folders import LatentDiffusion
from dp_lora.models.latents import Latents
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.records.provenance import hardware, versions
from dp_lora.training.processes import everyone

_ROUND = ("dp-lora", "torch", "diffusers", "transformers", "peft", "opacus", "numpy", "cryptography")
"""Packages whose version can change how a step rounds."""

_LIBRARIES = (
    "ATEN_", "BLIS_", "CUBLAS_", "CUDA_", "CUDNN_", "DNNL_", "GLIBC_TUNABLES", "GOMP_", "GOTO_", "KMP_",
    "MKL_", "NCCL_ALGO", "NCCL_PROTO", "NPY_", "NVIDIA_TF32", "OMP_", "ONEDNN_", "OPENBLAS_", "TORCH_ALLOW_",
)  # fmt: skip
"""How the names of environment variables begin that tell a library how to compute."""

_ELSEWHERE = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH")
"""Those among them that say where something is."""


def digest(
    model: LatentDiffusion,
    latents: Latents,
    labels: Tensor,
    plan: PrivacyPlan,
    randomness: Randomness,
    captions: Sequence[str] | None = None,
) -> str:
    """A hash of all that a training begins from. Private: it tells whether a guess of the images is right.

    Of the model it covers the weights, and what is no weight: the networks' and the scheduler's settings, the
    noise schedule itself, what the network predicts and how the tokenizer reads the prompts.
    """
    hashed = hashlib.sha256(randomness.key)
    hashed.update(json.dumps([plan.to_dict(), captions, _settings(model)], sort_keys=True).encode())
    hashed.update(folders.digest(model).encode())
    for tensor in (latents.mean, latents.std, labels, *_constants(model, captions)):
        hashed.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().numpy().data)
    return hashed.hexdigest()


def _settings(model: LatentDiffusion) -> dict[str, Any]:
    """What the files beside the weights say."""
    encoder = getattr(getattr(model.prompts, "encoder", None), "config", None)
    return {
        "unet": _plain(model.unet.config),
        "autoencoder": _plain(model.autoencoder.config),
        "scheduler": _plain(model.scheduler.config),
        "text_encoder": None if encoder is None else _plain(encoder.to_dict()),
        "predicts_v": model.predicts_v,
        "classes": list(model.classes),
    }


def _plain(settings: Mapping[str, Any]) -> dict[str, str]:
    # Names with an underscore say where a part lies and who wrote it.
    return {name: repr(value) for name, value in settings.items() if not name.startswith("_")}


def _constants(model: LatentDiffusion, captions: Sequence[str] | None) -> Iterable[Tensor]:
    yield model.scheduler.alphas_cumprod
    if model.prompts is not None:
        yield model.prompts.ids
        if captions:
            yield model.prompts.tokens(captions)


def numerics(config: Config, device: torch.device, microbatch: int, inputs: str) -> dict[str, Any]:
    """All that can change how a step rounds or what it starts from, for the write-ahead record.

    CUDA adds up in no fixed order unless torch is told to, so there every start is one of its own. Every
    process of the job has to ask.

    Args:
        config: the job.
        device: of the model.
        microbatch: examples per forward and backward.
        inputs: `digest` of what the training begins from.
    """
    repeatable = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    return {
        "inputs": inputs,
        "start": None if repeatable else secrets.token_hex(8),
        "train": asdict(config.train) | {"microbatch": None, "checkpoint_minutes": None},
        "learning_rate_factor": config.trainable.learning_rate_factor,
        "microbatch": microbatch,
        "processes": everyone(_process(device)),
    }


def _process(device: torch.device) -> dict[str, Any]:
    """Of one process: its hardware, its libraries, how they are set, and the code that it runs."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"],
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "matmul": torch.get_float32_matmul_precision(),
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
