"""Where a result comes from: code, versions, hardware, seeds, SLURM ids and times; no names of people."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from dp_lora.config.load import PACKAGE
from dp_lora.config.schema import Config

PACKAGES = (
    "dp-lora",
    "torch",
    "diffusers",
    "peft",
    "opacus",
    "dp-accounting",
    "torchmetrics",
    "cryptography",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scipy",
    "wandb",
)
CODE = ("dp_lora", "conf", "hydra_plugins", "sweeps", "pyproject.toml", "constraints.txt")
"""The parts of a checkout that can change a result."""

SLURM_IDS = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_PARTITION",
)


def provenance(config: Config, previous: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of provenance.json at the start of a run; `end` is null until `finished` sets it.

    Args:
        config: the job; only its public seed is taken.
        previous: the record of an earlier start of the same run: its start time is kept and `restarts`
            grows by one.
    """
    earlier = previous or {}
    return {
        "start": earlier.get("start") or now(),
        "end": None,
        "restarts": earlier["restarts"] + 1 if previous else 0,
        "git": git_state(PACKAGE.parent),
        "versions": versions(),
        "hardware": hardware(),
        "seeds": {"public": config.seed},
        "reproducible_noise": config.privacy.insecure_seed is not None,
        "slurm": {name: os.environ[name] for name in SLURM_IDS if name in os.environ},
    }


def finished(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with `end` set to now."""
    return {**record, "end": now()}


def now() -> str:
    """The time in UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_state(checkout: Path) -> dict[str, str | None]:
    """`sha` of the commit and `dirty`, a hash of what differs from it; both null outside a checkout.

    `dirty` is null when no file of `CODE` differs; else 12 digits that are equal for equal changes to
    tracked files and equal content of new ones.
    """
    nothing: dict[str, str | None] = {"sha": None, "dirty": None}
    if not (checkout / ".git").exists():
        return nothing
    sha = _git(checkout, "rev-parse", "--verify", "--quiet", "HEAD")
    difference = _git(checkout, "diff", "HEAD", "--binary", "--", *CODE) if sha else b""
    new_files = _git(checkout, "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE)
    if sha is None or difference is None or new_files is None:
        return nothing
    digest = hashlib.sha256(difference)
    for name in filter(None, new_files.split(b"\0")):
        path = checkout / os.fsdecode(name)
        digest.update(name + b"\0")
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    dirty = digest.hexdigest()[:12] if difference or new_files else None
    return {"sha": sha.decode().strip(), "dirty": dirty}


def _git(checkout: Path, *words: str) -> bytes | None:
    """The output of git, or None if there is no git or it refuses."""
    try:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Versions of Python and of the packages that can change a result; null for one that is absent."""
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """Processor model, usable cores, memory in bytes, and the GPU if torch is loaded and sees one."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpu_name(),
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _gpu_name() -> str | None:
    # Loading torch for this would cost seconds that a job without it need not spend.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name(torch.cuda.current_device()))
