"""How all commands end: a mistake is one line and exit status 2, an interruption exit status 130."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from dp_lora.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser of arguments that raises UserError where argparse prints its usage and exits."""

    listed = "what there is"
    """What `--help` shows, for the error's last words."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's `message`."""
        raise UserError(f"{message}; --help lists {self.listed}")


_OF_A_PLACE = (
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM
)  # fmt: skip
"""Errors of a place that the user gave, not of the program."""


@contextmanager
def ending(command: str, *, interrupted: str) -> Iterator[None]:
    """Exits with one line on stderr: status 2 for a user's mistake or a bad place, 130 for an interruption.

    Args:
        command: its name, with which the line begins.
        interrupted: what the user has to know after an interruption.
    """
    try:
        yield
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _OF_A_PLACE or error.filename is None:
            raise
        print(f"{command}: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"{command}: {str(error) or 'interrupted'}; {interrupted}", file=sys.stderr)
        sys.exit(130)
