"""The words `name=value` of the commands that take a finished run."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dp_lora.errors import UserError, did_you_mean
from dp_lora.storage.files import expanded


def folder_word(text: str) -> Path:
    """The folder that a word of the command line names, as a `type` of argparse."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, found an empty name")
    try:
        return expanded(text, text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def values(
    words: Sequence[str], known: Sequence[str], spelt: Mapping[str, str], *, several: Collection[str] = ()
) -> dict[str, str]:
    """The text behind each name, without quotes around it.

    Args:
        words: of the command line.
        known: the names.
        spelt: other spellings, with the name that each stands for.
        several: names that may come several times; their texts are joined by commas, quotes and all.

    Raises UserError for an unknown name, with the nearest one, for one that comes twice, and for no value.

    >>> values(["sampler.steps=3", "name='a b'"], ["steps", "name"], {"sampler.steps": "steps"})
    {'steps': '3', 'name': 'a b'}
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = spelt.get(name, name)
        if not equals or not value:
            raise UserError(f"{word}: expected field=value")
        if name not in known:
            raise UserError(
                f"{name}: no such field{did_you_mean(name, known)}; expected one of {', '.join(known)}"
            )
        if name in found and name not in several:
            raise UserError(f"{name}: is given twice; expected once")
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        text = value[1:-1] if quoted and name not in several else value
        found[name] = f"{found[name]},{text}" if name in found else text
    return found
