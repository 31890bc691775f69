"""Imports of large libraries in less time."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector from running while large libraries are imported.

    Modules make a million objects that stay, and the collector would visit them again and again: a fifth of
    the time that the imports take. Afterwards it runs as before. `gc.freeze` would hide from it what was made
    so far, and with that the garbage of an earlier job in this process would never be freed.
    """
    _leave_at_once()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def _leave_at_once() -> None:
    """Spares the process the search for garbage among those objects when it ends: two seconds."""
    atexit.register(gc.freeze)
