"""The exceptions of a user's mistake and of failed jobs, and the search for what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping


class UserError(Exception):
    """A mistake in what the user gave.

    Its message is one line that names the field, the value and what was expected; the entry point
    prints it without a traceback and exits with status 2.
    """


class PlanError(UserError, ValueError):
    """A number of a privacy plan that is out of range, or numbers that do not go together.

    Args:
        message: with the names of the parameters of `make_plan` in angle brackets.

    >>> error = PlanError("<steps>=0: expected at least 1")
    >>> str(error), error.named({"steps": "train.max_steps"})
    ('steps=0: expected at least 1', 'train.max_steps=0: expected at least 1')
    """

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"<(\w+)>", r"\1", message))
        self._message = message

    def named(self, names: Mapping[str, str]) -> str:
        """The message with the `names` that the parameters have elsewhere, such as in a configuration."""
        return re.sub(r"<(\w+)>", lambda match: names.get(match[1], match[1]), self._message)


class PrivateRefusal(UserError):
    """A refusal that was decided by private images or their files.

    Its message is for the owner's terminal alone; `recorded` is what any record of the job says instead.
    """


def recorded(error: BaseException) -> str:
    """What a record that others may read says of an error: the text of a mistake in settings, else less."""
    if isinstance(error, PrivateRefusal):
        return "the private images were refused; the reason is on the job's own terminal"
    # The text of an unexpected error may hold what nobody but the owner may read.
    return str(error) if isinstance(error, UserError) else type(error).__name__


class Busy(UserError):
    """Another process does this already; what is to be done will be there when it ends."""


class SweepFailed(Exception):
    """Jobs of a sweep failed: each was reported; the entry point prints this line and exits with status 1."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the option nearest to `name`, or an empty string when none is near.

    Capital letters do not matter.
    """
    by_name = {option.lower(): option for option in options}
    near = difflib.get_close_matches(name.lower(), list(by_name), n=1)
    return f"; did you mean {by_name[near[0]]!r}?" if near else ""
