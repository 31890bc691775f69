"""Signals to a job: to stop, to make room for another, or only to save.

A terminal stops a job with SIGINT or SIGTERM. A cluster has more to say: that it takes the machine back and
will start the job again (SIGUSR2 of submitit), or that the job may be killed soon, for a reason that it does
not give (SIGTERM). A training listens while it takes steps, and answers between two of them.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; a checkpoint of every finished step is on disk.

    A KeyboardInterrupt, so that it ends a sweep of several jobs too.
    """


class Preempted(Interrupted):
    """The cluster takes the machine back and will start the job again, where this start ends."""


class Leave(enum.IntEnum):
    """Whether to leave after the step in hand, and why; of several reasons the largest counts."""

    NO = 0
    STOPPED = 1
    PREEMPTED = 2

    def error(self, text: str) -> Interrupted:
        """The exception to raise."""
        return Preempted(text) if self is Leave.PREEMPTED else Interrupted(text)


class Requests:
    """The requests of the signals that came so far."""

    def __init__(self) -> None:
        self.leave = Leave.NO
        self.save = False

    def note(self, number: int) -> None:
        """Takes signal `number`. Raises KeyboardInterrupt for SIGINT when the run was to stop already."""
        asked = _asked[number]
        if asked is None:
            self.save = True
        elif self.leave and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.leave = max(self.leave, asked)


_asked: dict[int, Leave | None] = {signal.SIGINT: Leave.STOPPED, signal.SIGTERM: Leave.STOPPED}
"""What each signal asks for; None is to save and go on."""


def expect_preemption(number: int) -> None:
    """From now on signal `number` means preemption, and SIGTERM means to save and go on.

    A cluster sends SIGTERM before it kills, whether it will start the job again or not: leaving would turn a
    job that is to be continued into one that has ended. Signal `number` between two trainings, where there is
    nothing to save, raises `Preempted` at once.
    """
    _asked[number] = Leave.PREEMPTED
    _asked[signal.SIGTERM] = None
    signal.signal(number, _leave_at_once)
    # A function that does nothing: SIG_IGN would pass to the processes that the job starts.
    signal.signal(signal.SIGTERM, lambda number, frame: None)


def _leave_at_once(number: int, frame: object) -> None:
    raise Preempted(f"signal {number} between two trainings")


@contextmanager
def listening() -> Iterator[Requests]:
    """The requests of all signals until the end of the block; a second SIGINT ends the process at once."""
    requests = Requests()
    try:
        earlier = {
            number: signal.signal(number, lambda number, frame: requests.note(number)) for number in _asked
        }
    except ValueError:  # not the main thread: whoever runs us there handles signals
        earlier = {}
    try:
        yield requests
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
