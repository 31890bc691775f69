"""Marks: how far an unfinished run has come, noted in a small file beside the ledger.

A run directory can be copied, and an older state of it can be brought back. Its own files then say nothing
of the steps that were taken elsewhere, or since. The mark does: it names who may go on, and how much of the
run's write-ahead record there was when something was last released.

Guarantees:
    * A process that another start of the same run has replaced learns it before it releases a further step.
    * A record that is shorter than the mark, since it is a copy of an earlier one, begins nothing.
    * A crash leaves the old mark or the new one (one short write), and a mark never says less than before.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dp_lora.errors import UserError

_WIDTH = 96
"""Bytes of a mark, so that each one overwrites the one before as a whole."""


class Superseded(UserError):
    """The run has gone on elsewhere: this is a copy of it, or an older state that was brought back."""


class Mark:
    """The mark in the file `path`. All methods raise UserError when it was edited."""

    def __init__(self, path: Path) -> None:
        self.path, self._synced = path, -math.inf

    def check(self, progress: int, *, expected: bool) -> None:
        """Raises Superseded when a record of `progress` bytes is shorter than what was noted.

        Raises UserError too when there is no mark although one is `expected`.
        """
        if self.path.exists():
            with self._locked(0) as descriptor:
                self._check(descriptor, progress)
        elif expected:
            raise UserError(
                f"{self.path}: is not there, though its run has not ended: it says how far the run has come, "
                "and the ledger was edited or moved without it; expected this file beside the ledger: bring "
                "it back from where the ledger was"
            )

    def begin(self, nonce: str, progress: int) -> None:
        """From now on only the start `nonce` may go on. Raises Superseded as `check`."""
        with self._locked(os.O_CREAT) as descriptor:
            self._check(descriptor, progress)
            self._write(descriptor, nonce, progress)
        _sync(self.path.parent)

    def note(self, nonce: str, progress: int) -> None:
        """Notes `progress`. Raises Superseded unless `nonce` may still go on."""
        try:
            with self._locked(0) as descriptor:
                before = self._read(descriptor)
                if before is None or before["nonce"] != nonce:
                    raise Superseded(f"{self.path}: another start of this run goes on")
                if progress > before["progress"]:
                    self._write(descriptor, nonce, progress)
        except FileNotFoundError as error:
            raise Superseded(f"{self.path}: another start of this run has ended it") from error

    def end(self) -> None:
        """Removes the mark of a run whose end is in the ledger."""
        self.path.unlink(missing_ok=True)

    def _check(self, descriptor: int, progress: int) -> None:
        before = self._read(descriptor)
        if before is not None and before["progress"] > progress:
            raise Superseded(f"{self.path}: steps were taken that this record does not have")

    def _read(self, descriptor: int) -> dict[str, Any] | None:
        """The mark; None in a file that was just made."""
        content = os.pread(descriptor, _WIDTH, 0)
        if not content:
            return None
        try:
            found: dict[str, Any] = json.loads(content)
            return {"nonce": str(found["nonce"]), "progress": int(found["progress"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: was edited; expected the file as it was written") from error

    def _write(self, descriptor: int, nonce: str, progress: int) -> None:
        text = json.dumps({"nonce": nonce, "progress": progress}).ljust(_WIDTH - 1) + "\n"
        os.pwrite(descriptor, text.encode(), 0)
        # What was written outlives the process at once. That it outlives the machine too costs milliseconds,
        # and the steps of a second matter only to a backup of that very second.
        if time.monotonic() - self._synced > 1:
            os.fdatasync(descriptor)
            self._synced = time.monotonic()

    @contextmanager
    def _locked(self, flags: int) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDWR | flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
