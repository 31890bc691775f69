"""Options that a command line gives twice, of which Hydra takes the last in silence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from dp_lora.errors import UserError

ONE = {
    "sweep": "one sweep a command",
    "cluster": "one cluster a command",
    "hydra/launcher": "one launcher a command",
}
"""Why a group cannot be swept: it says what or where the jobs are, not what one of them does."""


def refuse_twice(overrides: Sequence[str]) -> None:
    """Raises UserError for two values of one option; the same value twice is one.

    Args:
        overrides: words that Hydra can read.
    """
    given: dict[str, str] = {}
    for word in overrides:
        for name in _names_in(word):
            if given.setdefault(name, word).lstrip("+") != word.lstrip("+"):
                reason = f"{ONE[name]}; " if name in ONE else ""
                raise UserError(f"{given[name]} and {word}: {reason}expected one of the two")


def _names_in(word: str) -> Iterator[str]:
    """The options that a word sets: the one that it names, or those in the mapping that it gives.

    >>> list(_names_in("+lora={rank: 4, alpha: 8}"))
    ['lora.rank', 'lora.alpha']
    """
    name, _, value = word.lstrip("+~").partition("=")
    if not value.startswith("{"):
        yield name
        return
    (override,) = OverridesParser.create().parse_overrides([word])
    mappings: list[tuple[str, Any]] = [(name, override.value())]
    for prefix, content in mappings:
        if isinstance(content, dict):
            mappings += [(f"{prefix}.{key}", inner) for key, inner in content.items()]
        else:
            yield prefix
