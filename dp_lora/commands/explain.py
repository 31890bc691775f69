"""One line for an error of the configuration: the field, the value, what was expected, the nearest."""

from __future__ import annotations

import re

from dp_lora.commands.command_line import several
from dp_lora.commands.vocabulary import kind_of, names, presets
from dp_lora.errors import UserError, did_you_mean

_TYPES = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}


def explain(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf, with what to write instead."""
    if isinstance(error, UserError):
        return str(error)
    causes = [error]
    while causes[-1].__cause__ is not None and isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    text = "\n".join(str(cause) for cause in causes)
    return _of_choice(text) or _of_name(text, str(causes[-1])) or " ".join(str(error).split())


def _of_choice(text: str) -> str | None:
    """The line for a preset that does not exist, or for several values for one job."""
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        options = presets(found[1])
        hint = f"; expected one of {', '.join(options)}" if options else ""
        return f"{found[1]}={found[2]}: no such preset{hint}{did_you_mean(found[2], options)}"
    if found := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'\n", text):
        return several(found[1], found[2])
    if found := re.search(r"Sweep parameters '([^']+)' requires --multirun", text):
        return f"{found[1]}: several values; expected -m with it, for a job each"
    return None


def _of_name(text: str, cause: str) -> str | None:
    """The line for a name that does not exist, or for a value of the wrong type."""
    if found := re.search(r"Error parsing override '(.*)'", text):
        return f"{found[1]!r}: expected option=value, in Hydra's syntax"
    if found := re.search(r"Error merging override (.*)", text):
        name, _, value = found[1].partition("=")
        if percent := re.fullmatch(r"([\d.]+)%", value):
            return f"{found[1]}: expected {name.lstrip('+')}={float(percent[1]) / 100:g}"
        if "is not a ListConfig" in cause and not value.startswith("["):
            if not kind_of(name).startswith("list[str]"):
                return f"{found[1]}: expected a list of numbers, such as {name}=[0,4095]"
            return f"{found[1]}: expected a list: {name}=[{value}]"
        return f"{found[1]}: {_expected(cause)}"
    if found := re.search(r"is not in struct\s+full_key: ([\w.@]+)", text):
        return f"{found[1]}: a new name, expected a plus sign before it: +{found[1]}=<value>"
    if found := re.search(r"Could not override '([^']+)'", text):
        reason = "no such option" if "not in '" in text else _expected(text.split("\n")[-1])
        return f"{found[1]}: {reason or 'cannot be set'}{did_you_mean(found[1], names())}"
    if found := re.search(r"Key '([^']+)' not in '(\w+)'\s+full_key: ([\w.@]+)", text):
        return f"{found[3]}: no such option{did_you_mean(found[3], names())}"
    if found := re.search(r"Interpolation key '([^']+)' not found\s+full_key: ([\w.@]+)", text):
        return (
            f"{found[2]}=${{{found[1]}}}: no option has this name; expected ${{oc.env:{found[1]}}} for a "
            "variable of the shell"
        )
    if found := re.search(r"full_key: ([\w.@]+)", text):
        return f"{found[1]}: {_expected(cause)}"
    return None


def _wanted(kind: str) -> str:
    """The values that a field of this type takes, in words; an empty type is that of a section."""
    wanted = {
        "": "values of its fields",
        "str": "a text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "int | float": "a whole number, or a fraction",
        "int | str": "a whole number, or auto",
    }
    return wanted.get(kind, "a list" if kind.startswith("list") else "a mapping")


def _expected(text: str) -> str:
    """The expected type, from OmegaConf's `text` about a value of the wrong type."""
    if found := re.search(r"could not be converted to (\w+)", text):
        return f"expected {_TYPES.get(found[1], found[1])}"
    if found := re.search(r"field '([\w.]+)' is not Optional", text):
        return f"expected {_wanted(kind_of(found[1]))}"
    if found := re.search(r"incompatible with type hint '.*Union\[int, (\w+)", text):
        return f"expected {_wanted(f'int | {found[1]}')}"
    if found := re.search(r"Environment variable '([^']+)' not found", text):
        return f"the shell has no variable {found[1]}; expected `export {found[1]}=<value>` before"
    if re.search(r"is not a subclass of (\w+)", text):
        return "a group of options, expected one of the options below it"
    return " ".join(text.split("\n")[0].split())
