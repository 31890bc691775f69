"""The jobs of a sweep whose cells are no product of values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.types import Override

from dp_lora.errors import UserError


def jobs(cells: Sequence[Mapping[str, str]], choices: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The words of every job: each cell with each combination of the values of `choices`.

    A choice with a value that some cells have keeps those, and the cells that leave it open; any other
    choice is for the cells that leave it open.

    >>> baselines = [{"trainable": "lora"}, {"trainable": "full"}, {"trainable": "lora", "epsilon": "'inf'"}]
    >>> jobs(baselines, {"trainable": ["lora"], "epsilon": ["eps1"]})
    [['trainable=lora', 'epsilon=eps1'], ['trainable=lora', "epsilon='inf'"]]

    Raises UserError for a choice that no cell has and none leaves open.
    """
    kept = list(cells)
    for name, values in choices.items():
        said = list(dict.fromkeys(cell[name] for cell in kept if name in cell))
        if set(said) & set(values):
            kept = [cell for cell in kept if cell.get(name, values[0]) in values]
        elif kept and all(name in cell for cell in kept):
            raise UserError(
                f"{name}={','.join(values)}: no cell of this sweep has it; expected some of {', '.join(said)}"
            )
    found: dict[frozenset[str], list[str]] = {}
    for cell in kept:
        open_names = [name for name in choices if name not in cell]
        for values in itertools.product(*(choices[name] for name in open_names)):
            chosen = {**cell, **dict(zip(open_names, values, strict=True))}
            words = [f"{name}={value}" for name, value in chosen.items()]
            found.setdefault(frozenset(words), words)
    return list(found.values())


def check_sweep(override: Override) -> None:
    """Raises UserError for what gives no values, one by one."""
    if not override.is_sweep_override():
        return
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: expected values between commas, or a range")
    values = list(override.sweep_string_iterator())
    if not values:
        raise UserError(f"{override.input_line}: stands for no value at all; expected at least one")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"{override.input_line}: {twice[0]} stands there twice; expected every value once")


def choices_of(overrides: Sequence[Override]) -> dict[str, list[str]]:
    """The values of each name, the last word of a name being the one that counts."""
    found: dict[str, list[str]] = {}
    for override in overrides:
        name = override.get_key_element()
        if override.is_sweep_override():
            check_sweep(override)
            found[name] = list(override.sweep_string_iterator())
        else:
            found[name] = [override.get_value_element_as_str()]
    return found
