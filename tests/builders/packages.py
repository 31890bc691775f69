"""Debian's packages that tests need, installed by one process at a time."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LOCK = Path("/var/tmp/dp-lora-apt.lock")
"""That of tools/slurm_box.sh too: apt-get gives up when another one runs."""

ATTEMPTS = 5


def apt_get(*words: str) -> subprocess.CompletedProcess[str]:
    """`apt-get` with these words, which waits for the locks of others."""
    command = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-qq", *words]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    return subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=1800)


def install(
    packages: tuple[str, ...], there: Callable[[], bool], run: Callable[..., object] = apt_get
) -> None:
    """Sees to it that the packages are `there`; `unavailable` where they cannot be had."""
    if there():
        return
    reason = "it is not there after the installation"
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process of the tests may have installed them in the meantime.
        for attempt in range(ATTEMPTS):
            if there():
                return
            try:
                for words in (("update",), ("install", "-y", "--no-install-recommends", *packages)):
                    done = run(*words)
                    if getattr(done, "returncode", 0):
                        reason = " ".join(str(getattr(done, "stderr", "")).split())[-300:]
                        break
                else:
                    continue
            except (OSError, subprocess.SubprocessError) as error:
                reason = str(error)
            if not lost_a_lock(reason):
                break
            time.sleep(attempt)
    if not there():
        unavailable(" ".join(packages), reason)


def lost_a_lock(reason: str) -> bool:
    """Whether apt-get gave up because somebody else was installing: a matter of time, not of the machine."""
    return any(
        word in reason for word in ("Could not get lock", "Unable to lock", "Unable to acquire", "is held by")
    )


def unavailable(what: str, reason: str) -> None:
    """Skips the test where a package cannot be had on this machine; fails in CI and where a lock was lost."""
    if os.environ.get("CI") or lost_a_lock(reason):
        pytest.fail(f"the tests need {what}, which could not be installed: {reason}")
    pytest.skip(f"no {what} here: {reason}")
