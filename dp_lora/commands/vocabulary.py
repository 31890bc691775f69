"""The names that the command line knows: presets, groups and fields, with their types."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dp_lora.config.load import config_directory
from dp_lora.config.schema import Config


def presets(group: str, own: str | None = None) -> list[str]:
    """The presets of a group, in the order of the numbers in their names; `own` is a folder with more.

    >>> presets("lora_rank")
    ['r1', 'r2', 'r4', 'r8', 'r16', 'r32', 'r64']
    """
    names = {path.stem for root in _roots(own) for path in (root / group).glob("*.yaml")}
    if group == "hydra/launcher":
        names.add("basic")
    return sorted(names, key=lambda name: (re.sub(r"\d+", "", name), int(re.sub(r"\D", "", name) or 0), name))


def kind_of(name: str) -> str:
    """The type of a field as it is written in the schema; empty for a section and for no field at all.

    >>> kind_of("lora.rank"), kind_of("lora")
    ('int', '')
    """
    return dict(_fields(Config, "")).get(name.lstrip("+"), "")


def names() -> list[str]:
    """Every dotted name of the configuration, and the groups."""
    return [*field_names(), *group_names(None)]


def _roots(own: str | None) -> list[Path]:
    return [config_directory(), *([Path(own)] if own is not None else [])]


@functools.cache
def group_names(own: str | None) -> tuple[str, ...]:
    """The names of the groups, with those of a folder of one's own."""
    found = {
        path.parent.relative_to(root).as_posix() for root in _roots(own) for path in root.rglob("*.yaml")
    }
    return tuple(sorted(found - {"."}))


@functools.cache
def field_names(*, leaves: bool = False) -> tuple[str, ...]:
    """Every dotted name of the configuration; only those that take a value if so asked."""
    return tuple(name for name, kind in _fields(Config, "") if kind or not leaves)


@functools.cache
def text_fields() -> frozenset[str]:
    """The names of the fields that take a text."""
    return frozenset(name for name, kind in _fields(Config, "") if kind in ("str", "str | None"))


def _fields(owner: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted name and type of every field; a section has none."""
    for field in dataclasses.fields(owner):
        inner: Any = field.default_factory
        if dataclasses.is_dataclass(inner):
            yield f"{prefix}{field.name}", ""
            yield from _fields(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", str(field.type)
