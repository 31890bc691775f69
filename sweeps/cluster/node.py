"""The part of a sweep's job that runs on the node.

A job ends in one of four ways: its run directory says done; it leaves one line in the sweep's folder and
exits with a status above 0, so that the cluster calls it failed; it was preempted, has saved and is queued
again; or it was killed, and what is on disk is its last checkpoint.
"""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dp_lora.errors import Busy, UserError
from dp_lora.storage.files import read_json, write_atomic
from dp_lora.training.signals import Interrupted, Preempted, expect_preemption

if TYPE_CHECKING:
    from submitit import JobEnvironment

BUSY_S = 15.0
"""How often a job looks whether another one has finished the same cell."""


def run_cell(folder: str, identity: str) -> None:
    """Runs one cell of the sweep in `folder`, in each process of its job."""
    import submitit

    environment = submitit.JobEnvironment()
    if environment.cluster == "slurm":
        expect_preemption(environment._usr_sig())
    else:
        # The driver's word to stop; submitit would have it ignored.
        signal.signal(signal.SIGTERM, _stop)
    if environment.num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    first = environment.global_rank == 0
    failure = Path(folder) / "cells" / f"{identity}.failed"
    try:
        if first:
            failure.unlink(missing_ok=True)
        _run(Path(folder), identity, alone=environment.num_tasks == 1)
    except Preempted as notice:
        print(f"dp-lora: {notice}; queued again", file=sys.stderr, flush=True)
        _queue_again(environment)
    except UserError as error:
        line, status = str(error), 2
    except KeyboardInterrupt as error:
        line, status = f"interrupted: {error}", 130
    except Exception as error:
        traceback.print_exc()
        line, status = " ".join(f"{type(error).__name__}: {error}".split()), 1
    else:
        return
    print(f"dp-lora: {line}", file=sys.stderr, flush=True)
    if first:
        # The log has more; of an unexpected error the text may be as private as the log is.
        write_atomic(failure, f"{line}\n", mode=0o600)
    sys.exit(status)


def _stop(number: int, frame: object) -> NoReturn:
    raise Interrupted("between two trainings")


def _run(folder: Path, identity: str, *, alone: bool) -> None:
    """Runs the cell; where a job of another sweep runs the same one, a job of one process waits for it."""
    from sweeps.cluster.cells import code_version
    from sweeps.cluster.ledger import thaw

    sweep = read_json(folder / "sweep.json")
    if sweep["code"] != (code := code_version()):
        raise UserError(
            f"{folder}: the code has changed since this job was submitted ({sweep['code']}, now {code}); "
            "expected the same. Bring it back, or give the sweep's command again as it will say"
        )
    record = read_json(folder / "cells" / f"{identity}.json")
    module, _, name = str(sweep["job"]).partition(":")
    job: Callable[..., Any] = getattr(importlib.import_module(module), name)
    waits = False
    while True:
        try:
            job(thaw(record), record["words"])
            return
        except Busy as busy:
            if not alone:
                raise
            if not waits:
                print(f"dp-lora: {busy}; waiting for it", file=sys.stderr, flush=True)
            waits = True
            time.sleep(BUSY_S)


def _queue_again(environment: JobEnvironment) -> NoReturn:
    """Queues this job again under its number; all but the first process wait to be ended with it."""
    if environment.global_rank:
        time.sleep(600)
        sys.exit(1)
    for pause in (1, 5, 15, 30, None):
        try:
            environment._requeue(0)
            sys.exit(0)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
            print(f"dp-lora: scontrol requeue: {error}", file=sys.stderr, flush=True)
            if pause is not None:
                time.sleep(pause)
    sys.exit(1)


def write_report(folder: str) -> None:
    """Writes the sweep's report when its jobs have ended: the last job of a sweep on a cluster."""
    from sweeps.report import write

    try:
        write(Path(folder))
    except UserError as error:
        print(f"dp-lora: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
