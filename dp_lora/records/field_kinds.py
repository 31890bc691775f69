"""The kinds of values that a released record may hold: a text in a list of numbers is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from dp_lora.errors import UserError

NON_FINITE = ("inf", "-inf", "nan")
"""How the files hold what JSON has no number for."""

Kind = Callable[[str, Any], Any]
"""Returns the value of a field, given its name and value. Raises UserError for a value of another kind."""

Shape = Kind | Mapping[str, Any]
"""The kind of a value, or the shapes of its fields by their names; that of `ANY` is for all others."""

ANY = "*"

_NAME = re.compile(r"[\w.-]{1,80}")
_PATH = re.compile(r"(?:^|[^\w ])/\w|~/|\\|://|/\w[\w.-]*/")
_WORDS = re.compile(r"[\w ,()+.-]{1,120}")


def number(field: str, value: Any) -> float | str:
    """A number, or a word for one that JSON cannot hold. Raises UserError otherwise."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in NON_FINITE):
        raise _wrong(field, "a number", value)
    return value  # type: ignore[no-any-return]


def finite(field: str, value: Any) -> float:
    """A number that is not infinite. Raises UserError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise _wrong(field, "a finite number", value)
    return value


def flag(field: str, value: Any) -> bool:
    """True or false. Raises UserError otherwise."""
    if not isinstance(value, bool):
        raise _wrong(field, "true or false", value)
    return value


def words(field: str, value: Any) -> str:
    """A few plain words, in which there is no path. Raises UserError otherwise."""
    if not isinstance(value, str) or not _WORDS.fullmatch(value):
        raise _wrong(field, "a few plain words", value)
    return value


def name(field: str, value: Any) -> str:
    """One word of letters, digits, dots and hyphens. Raises UserError otherwise."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _wrong(field, "a name", value)
    return value


def sentences(field: str, value: Any) -> str | list[str]:
    """A text, or a list of them. Raises UserError otherwise."""
    if not isinstance(value, str) and not (isinstance(value, list | tuple) and all(map(_is_text, value))):
        raise _wrong(field, "a list of sentences", value)
    return value if isinstance(value, str) else list(value)


def sentence(field: str, value: Any) -> str:
    """A text of at most 500 characters in which there is no path. Raises UserError otherwise."""
    if not isinstance(value, str) or len(value) > 500 or _PATH.search(value):
        raise _wrong(field, "a sentence without a path", value)
    return value


def names(field: str, value: Any) -> list[str]:
    """A list of names. Raises UserError otherwise."""
    if not isinstance(value, list | tuple):
        raise _wrong(field, "a list of names", value)
    return [name(field, item) for item in value]


def sequence(field: str, value: Any) -> list[float | str]:
    """A list of numbers. Raises UserError otherwise."""
    if not isinstance(value, list | tuple):
        raise _wrong(field, "a list of numbers", value)
    return [number(field, item) for item in value]


def plain(field: str, value: Any) -> Any:
    """A number, a flag or a sentence without a path. Raises UserError otherwise."""
    if isinstance(value, str):
        return sentence(field, value)
    return value if isinstance(value, bool) else number(field, value)


def device(field: str, value: Any) -> str:
    """`cpu` or `cuda`, with or without a number. Raises UserError otherwise."""
    if not isinstance(value, str) or not re.fullmatch(r"(cpu|cuda)(:\d+)?", value):
        raise _wrong(field, "a device", value)
    return value


def shaped(field: str, value: Any, shape: Shape) -> Any:
    """`value` as far as `shape` knows it: fields that it does not name are left out; None is itself.

    Raises UserError for a value of another kind than its field's.
    """
    if value is None:
        return None
    if not isinstance(shape, Mapping):
        return shape(field, value)
    found, other = mapping(field, value), shape.get(ANY)
    kept = {key: item for key, item in found.items() if key in shape or other is not None}
    return {
        key if key in shape else name(field, key): shaped(f"{field}.{key}", item, shape.get(key, other))
        for key, item in kept.items()
    }


def mapping(field: str, value: Any) -> Mapping[str, Any]:
    """Values by their names. Raises UserError otherwise."""
    if not isinstance(value, Mapping):
        raise _wrong(field, "values by name", value)
    for key in value:
        if not _is_text(key):
            raise _wrong(field, "values by name", value)
    return value


def numbers(field: str, value: Any) -> dict[str, float | str]:
    """Numbers by their names. Raises UserError otherwise."""
    return {name(field, key): number(f"{field}.{key}", item) for key, item in mapping(field, value).items()}


def list_of_numbers(field: str, value: Any) -> list[dict[str, float | str]]:
    """A list of numbers by their names. Raises UserError otherwise."""
    if not isinstance(value, list | tuple):
        raise _wrong(field, "a list", value)
    return [numbers(field, item) for item in value]


def interval(field: str, value: Any) -> list[float | str]:
    """Two numbers. Raises UserError otherwise."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong(field, "two numbers", value)
    return [number(field, end) for end in value]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _wrong(field: str, expected: str, value: Any) -> UserError:
    # The value is not shown: it is of no known kind, and may be anything.
    return UserError(f"{field}: expected {expected}, found {type(value).__name__}")
