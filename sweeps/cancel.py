"""Ends the jobs of sweeps: they save first, and the sweep's command continues them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp_lora.errors import UserError
from sweeps.folders import Sweep

if TYPE_CHECKING:
    from sweeps.cluster.ledger import Ledger


def cancel(sweep: Sweep) -> list[str]:
    """Ends what of the sweep waits or runs; returns what was done, one line each.

    A driver on this machine is interrupted as by Ctrl-C: it lets its jobs save. Jobs on a cluster are ended
    by `scancel`, and go on from their last checkpoint when the sweep's command is given again.

    Raises UserError for a folder of runs that no launcher began, and when SLURM refuses.
    """
    if not sweep.launched:
        raise UserError(f"{sweep.folder}: runs that were started one by one; expected the folder of a sweep")
    from sweeps.cluster.ledger import Ledger

    done = _interrupt(sweep.folder)
    ledger = Ledger(sweep.folder)
    ledger.read()
    if any("_" in job for job in ledger.jobs().values()):
        done += _scancel(ledger)
    elif not done:
        done = _stop_local(ledger)
    return [f"{sweep.folder}: {line}" for line in done] or [f"{sweep.folder}: nothing of it runs or waits"]


def _interrupt(folder: Path) -> list[str]:
    """Interrupts the driver, if one holds the sweep."""
    holder = folder / "driver"
    words = holder.read_text(encoding="utf-8").split() if holder.exists() else []
    if len(words) != 4 or not _held(folder):
        return []
    number, machine = int(words[1]), words[3]
    if machine != socket.gethostname():
        return [f"its driver is process {number} on {machine}: stop it there"]
    os.kill(number, signal.SIGINT)
    return [f"interrupted its driver, process {number}"]


def _held(folder: Path) -> bool:
    """Whether a driver holds the sweep."""
    from dp_lora.storage.files import file_lock

    class Held(Exception):
        pass

    def refuse() -> None:
        raise Held

    try:
        with file_lock(folder / "lock", waiting=refuse):
            return False
    except Held:
        return True


def _stop_local(ledger: Ledger) -> list[str]:
    """Stops the jobs on this machine that a dead driver left behind."""
    from sweeps.cluster.pool import Pool

    pool = Pool(ledger, None, 0, None)
    left = list(pool.live())
    return [f"{pool.stop()}: {', '.join(left)}"] if left else []


def _scancel(ledger: Ledger) -> list[str]:
    """Takes the sweep's submissions, and the job that would write its report, off the cluster."""
    from sweeps.cluster.slurm import use_box

    use_box()
    names = {*ledger.submissions, ledger.report_name}
    queued = [
        line.split(" ", 1)
        for line in _run(["squeue", "-h", "-u", str(os.getuid()), "-o", "%F %j"]).splitlines()
    ]
    live = sorted({job for job, name in queued if name in names})
    if live:
        _run(["scancel", *live])
    return [f"cancelled job {job}" for job in live]


def _run(words: Sequence[str]) -> str:
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError(f"{words[0]}: not found; expected a machine that can reach the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]}: SLURM did not answer in 60 s") from None
    if said.returncode:
        raise UserError(f"{words[0]}: {' '.join(said.stderr.split())}")
    return said.stdout
