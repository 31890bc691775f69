"""The words of the command line, before Hydra composes anything from them.

`prepared` gives the words as Hydra takes them. A word that cannot be meant as it stands is refused with one
line that names it and shows what to write; what it shows can be pasted into a POSIX shell.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import shlex
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from hydra.errors import HydraException

from dp_lora.commands.parser import Parser
from dp_lora.commands.repeats import ONE, refuse_twice
from dp_lora.commands.vocabulary import field_names, group_names, kind_of, names, presets, text_fields
from dp_lora.config.spellings import COMMANDS, INSTEAD, NO_SPACES, meant
from dp_lora.config.wandb_settings import MEANT
from dp_lora.errors import UserError, did_you_mean

VALUES = {
    "epsilon": "privacy.epsilon",
    "lora_rank": "lora.rank",
    "noise_multiplicity": "privacy.noise_multiplicity",
    "noise_multiplier": "privacy.noise_multiplier",
}
"""The field that takes a number, by the group whose presets set it."""

OWN_FOLDERS = (
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.output_subdir",
    "hydra.job.chdir",
)
"""Settings by which Hydra would make folders of its own beside the run directories."""

_DASHES = re.compile("^[\N{HYPHEN}-\N{HORIZONTAL BAR}\N{MINUS SIGN}]+")
"""The dash that a text processor makes of the two hyphens of a flag."""

_OPEN = ("resources.sbatch.", "hydra.", "hydra/")
"""Beginnings of names that may be added or left out, and that are checked elsewhere."""

_PLAIN = frozenset(f"{string.ascii_letters}{string.digits}_/-\\+.$%*@?|: [],")
"""The characters of a value without quotes in Hydra's grammar, and those with which lists are written."""

_WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false"}

_PACKAGES = ("data@public_data",)
"""The places other than its own at which a group may be chosen."""

_FOLDERS = {"data": ["data=imagefolder", "data.source"], "model": ["model.pretrained"]}
"""The words that name a folder, by the group in whose place one may have been given."""

Choices = Callable[[str], Sequence[str]]
"""The presets of a group; none where they are not known."""


def prepared(words: Sequence[str]) -> list[str]:
    """The command line as Hydra takes it, once every word of it can be meant.

    Raises UserError for the first word that cannot.
    """
    check_words(words)
    return hydra_words(dry_run(words))


def hydra_words(words: Sequence[str]) -> list[str]:
    """The command line in Hydra's syntax: flags come last, and two kinds of values are quoted.

    `epsilon=inf` names a preset, not a number; `~/` begins the name of a file, which most shells leave as it
    is behind an equals sign.

    >>> hydra_words(["epsilon=eps1,inf", "-m", "lora.rank=4", "data.source=~/images"])
    ["epsilon=eps1,'inf'", 'lora.rank=4', "data.source='~/images'", '-m']
    """
    quoted = [
        re.sub(r"\binf\b", "'inf'", word) if re.match(r"epsilon=[\w,]+$", word) else word for word in words
    ]
    quoted = [re.sub(r"^([\w.]+)=(~[^,'\"]*)$", r"\1='\2'", word) for word in quoted]
    return sorted(quoted, key=lambda word: word.startswith("-") or "=" not in word)


def dry_run(words: Sequence[str]) -> list[str]:
    """The command line without `--dry-run`, told to plan a sweep and to stop.

    >>> dry_run(["lora.rank=4", "--dry-run"])
    ['lora.rank=4', 'hydra/launcher=local', 'hydra.launcher.dry_run=true', '-m']
    """
    if "--dry-run" not in words:
        return list(words)
    kept = [word for word in words if word not in ("--dry-run", "hydra/launcher=basic")]
    if not any(word.startswith(("hydra/launcher=", "cluster=")) for word in kept):
        kept.append("hydra/launcher=local")
    flag = [] if {"-m", "--multirun"} & set(kept) else ["-m"]
    return [*kept, "hydra.launcher.dry_run=true", *flag]


def check_words(words: Sequence[str]) -> None:
    """Raises UserError for the first word that cannot be meant, with what to write in its place."""
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(f"{word!r}: no UTF-8; expected a name in UTF-8: rename the file, or link to it")
        if _DASHES.match(word):
            raise UserError(f"{word}: begins with a dash; expected {_hyphens(word)}")
    rest = _without_flags(words)
    for place, word in rest:
        if "=" not in word and not word.startswith("~"):
            _refuse_bare(word, words, place)
    overrides = [word for _, word in rest]
    arguments = _arguments(words)
    _check_launcher(overrides, multirun=arguments.multirun or "--dry-run" in words)
    groups = group_names(arguments.config_dir)

    def choices(group: str) -> list[str]:
        elsewhere = any(word.startswith("hydra.searchpath=") for word in overrides)
        return [] if elsewhere else presets(group, arguments.config_dir)

    own = _sweeper(overrides) in (None, "grid")
    for word in overrides:
        if own or not word.lstrip("+~").startswith("hydra.sweeper."):
            _check_override(word, groups, choices)
    refuse_twice(overrides)


# Flags


def _hyphens(word: str) -> str:
    rest = _DASHES.sub("", word)
    return f"-{rest}" if len(rest) == 1 else f"--{rest}"


class _Flags(Parser):
    """Hydra's flags."""

    listed = "the flags"


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags by name. Raises UserError for flags that do not go together or are not for these jobs."""
    parser = _Flags(add_help=False, parents=[get_args_parser()], prog="dp-lora")
    given = [word for word in words if word not in ("--dry-run", "--version")]
    arguments, _ = parser.parse_known_args(given)
    for name in ("experimental_rerun", "config_name", "config_path"):
        if (value := getattr(arguments, name)) is not None:
            raise UserError(
                f"--{name.replace('_', '-')}={value}: not for these jobs; expected {INSTEAD[name]}"
            )
    printing = "--cfg" if arguments.cfg else "--info" if arguments.info else None
    running = "-m" if arguments.multirun else "--dry-run" if "--dry-run" in words else "--run"
    if printing and (arguments.multirun or "--dry-run" in words or arguments.run):
        raise UserError(
            f"{printing} with {running}: it prints the configuration of one job and runs none; expected one "
            "of the two flags"
        )
    for one, other in (("cfg", "info"), ("run", "multirun")):
        if getattr(arguments, one) and getattr(arguments, other):
            raise UserError(f"--{one} with --{other}: expected one of the two flags")
    if arguments.resolve and not (arguments.cfg or arguments.help):
        raise UserError("--resolve: expected --cfg job with it")
    if arguments.shell_completion and not any(
        word.startswith(("install=", "uninstall=", "query=")) for word in words
    ):
        raise UserError("--shell-completion: expected install=bash or uninstall=bash with it (zsh, fish)")
    package = arguments.package
    if package and package.split(".")[0] not in ("_global_", "hydra") and package not in field_names():
        raise UserError(
            f"--package={package}: no part of the configuration; expected one such as privacy"
            f"{did_you_mean(package, field_names())}"
        )
    if arguments.config_dir is not None and not Path(arguments.config_dir).is_dir():
        raise UserError(f"--config-dir={arguments.config_dir}: expected a folder of presets")
    return arguments


def _without_flags(words: Sequence[str]) -> list[tuple[int, str]]:
    """Place and text of the words that are neither flags nor the value of one.

    Raises UserError for a flag that does not exist.
    """
    actions = get_args_parser()._option_string_actions
    found, takes_value, seen = [], False, set[str]()
    for place, word in enumerate(words):
        if word.startswith("-") and word.strip("-"):
            _check_flag(word, words[place + 1 : place + 2], ["--dry-run", *actions])
            flag = next((known for known in actions if known.startswith(word.split("=")[0])), "")
            if flag and actions[flag].nargs != 0:
                if (name := actions[flag].dest) in seen:
                    raise UserError(f"{word}: --{name.replace('_', '-')} is given twice; expected it once")
                seen.add(name)
            takes_value = word.startswith("--") or word == flag
            takes_value = (
                takes_value and "=" not in word and flag != "" and actions[flag].nargs in (None, "?")
            )
        elif takes_value and "=" not in word:
            takes_value = False
        else:
            takes_value = False
            found.append((place, word))
    return found


def _check_flag(word: str, following: Sequence[str], flags: Sequence[str]) -> None:
    body = word.lstrip("-")
    name = re.split("[=:]", body)[0]
    given = body[len(name) + 1 :] or next(
        (w for w in following if not w.startswith("-") and "=" not in w), ""
    )
    if name in VALUES and re.fullmatch(r"[\d.]+", given):
        raise UserError(f"{word}: options have no hyphens; expected {VALUES[name]}={given}")
    if name in names():
        raise UserError(f"{word}: options have no hyphens; expected {name}={given or '<value>'}")
    flag = word.split("=")[0]
    if flag in flags or (flag.startswith("--") and any(known.startswith(flag) for known in flags)):
        return
    if option := _of_others(name, given):
        raise UserError(f"{word}: options have no hyphens; expected {option}")
    hint = did_you_mean(name, names()) if "." in name else did_you_mean(flag, flags)
    raise UserError(f"{flag}: no such flag{hint}; --help lists them")


def _of_others(name: str, value: str) -> str | None:
    """The word to write for another trainer's option, or for the end of a name; None if it is unknown."""
    if (word := meant(name, value, field_names(leaves=True))) is None:
        return None
    if not value:
        return f"{word}<value>"
    before = "data=imagefolder " if word.startswith("data.source=") else ""
    try:
        OverridesParser.create().parse_overrides(hydra_words([word]))
    except HydraException:
        return f"{before}{quoted(word)}"
    return f"{before}{shlex.quote(word)}"


def _check_launcher(overrides: Sequence[str], *, multirun: bool) -> None:
    """Hydra ignores a launcher without a sweep."""
    launcher = next((word for word in overrides if word.startswith("hydra/launcher=")), None)
    is_sweep = multirun or any(word.startswith(("sweep=", "hydra.mode=")) for word in overrides)
    if launcher not in (None, "hydra/launcher=basic") and not is_sweep:
        raise UserError(f"{launcher}: launches the jobs of a sweep; expected -m with it")
    sweeper = _sweeper(overrides)
    if sweeper == "basic":
        raise UserError("hydra/sweeper=basic: not for these jobs; expected hydra/sweeper=grid, or nothing")
    if sweeper not in (None, "grid") and not is_sweep:
        raise UserError(f"hydra/sweeper={sweeper}: chooses the jobs of a sweep; expected -m with it")
    chooses = ("hydra/launcher=", "cluster=", "sweep=", "experiment=")
    setting = next((word for word in overrides if word.startswith("hydra.launcher.")), None)
    if setting is not None and not any(word.startswith(chooses) for word in overrides):
        raise UserError(f"{setting}: expected hydra/launcher=local or hydra/launcher=slurm with it")


def _sweeper(overrides: Sequence[str]) -> str | None:
    """The preset of `hydra/sweeper` that is asked for."""
    words = (word.lstrip("+").partition("=") for word in overrides)
    return next((value for name, _, value in words if name == "hydra/sweeper"), None)


# Words without an equals sign


def _refuse_bare(word: str, words: Sequence[str], place: int) -> NoReturn:
    """Raises UserError with what may have been meant: a value apart from its name, or lost quotes."""

    def is_bare(other: str) -> bool:
        return "=" not in other and not other.startswith("-")

    name, _, value = word.partition(":")
    after = [*words[place + 1 : place + 3], "", ""]
    # Blanks around the equals sign make two words of one, or three.
    apart = after[1] if after[0] == "=" else after[0][1:] if after[0].startswith("=") else ""
    given = value.strip() or apart or next(filter(is_bare, words[place + 1 : place + 2]), "")
    if word in COMMANDS and not (word in group_names(None) and given):
        raise UserError(f"{word!r}: expected {COMMANDS[word]}")
    if name in (*field_names(leaves=True), *group_names(None)):
        raise UserError(f"{word}: expected {name}={given or '<value>'}")
    before = words[place - 1] if place else ""
    if before.endswith("=") and not before.startswith("-"):
        raise UserError(f"{word!r}: no space belongs there; expected {shlex.quote(before + word)}")
    if "=" in before and not before.startswith("-") and _takes_spaces(before) and is_bare(word):
        lost = itertools.takewhile(is_bare, words[place:])
        whole = quoted(" ".join([before, *lost]))
        raise UserError(f"{word!r}: expected option=value; a value with spaces takes quotes: {whole}")
    raise UserError(f"{word!r}: expected option=value{did_you_mean(name, names())}")


def _takes_spaces(word: str) -> bool:
    """Whether words that follow this one can be the rest of its value."""
    name, _, value = word.partition("=")
    return name in text_fields() and name not in NO_SPACES and not value.endswith(("'", '"'))


# Words with an equals sign


def quoted(word: str) -> str:
    """`name=value` with its value quoted for Hydra, and the whole for a POSIX shell.

    >>> print(quoted("model.prompt=a photo of a {}"))
    'model.prompt="a photo of a {}"'
    """
    name, _, value = word.partition("=")
    return shlex.quote(f"{name}={_in_quotes(value)}")


def _in_quotes(text: str) -> str:
    """The text as Hydra reads it back, in double quotes.

    A backslash counts there only before a quote, so those before one and at the end are doubled.
    """
    escaped = re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    return f'"{escaped}"'


def _check_override(word: str, groups: Sequence[str], choices: Choices) -> None:
    """Raises UserError unless Hydra can read the word, and reads it as it was meant."""
    found = re.fullmatch(r"([+~]*)([^=]*)=?(.*)", word, re.DOTALL)
    assert found is not None
    prefix, name, value = found.groups()
    group, known = name.partition("@")[0], [*field_names(), *groups]
    if name.split(".")[:3] == ["hydra", "sweeper", "params"]:
        swept = name.removeprefix("hydra.sweeper.params").lstrip(".")
        raise UserError(
            f"{word}: belongs to the presets of `sweep`; expected -m "
            + (shlex.quote(f"{swept}={value}") if swept else "<option>=<value>,<value>")
        )
    if prefix.startswith("~"):
        if name not in known and not name.startswith(_OPEN) and group not in groups:
            raise UserError(f"{word}: no such option{did_you_mean(name, known) if name else ''}")
        section = name in field_names() and name not in field_names(leaves=True)
        instead = "values of its fields" if section else f"{name}={value or '<value>'}"
        if not name.startswith(_OPEN):
            raise UserError(f"{word}: no option can be left out; expected {instead}")
        return
    if not re.fullmatch(r"[a-z_$][\w$./@:-]*", name, re.ASCII | re.I) or name.endswith(".") or ".." in name:
        raise UserError(f"{word}: {name!r} is no option{did_you_mean(name.strip(' .'), known)}")
    if "@" in name and name not in _PACKAGES and group in groups:
        raise UserError(f"{word}: no such place for a preset; expected {group}={value}")
    if prefix and (group in groups or (prefix == "+" and name in field_names(leaves=True))):
        raise UserError(f"{word}: {name} is there already; expected {shlex.quote(f'{name}={value}')}")
    is_own = name in known or group in groups or name.startswith(_OPEN)
    near = did_you_mean(name, known)
    is_near = "." in name and any(repr(leaf) in near for leaf in field_names(leaves=True))
    if not is_own and not is_near and (option := _of_others(name.rpartition(".")[2], value)):
        raise UserError(f"{name}: no such option; expected {option}")
    if name in OWN_FOLDERS:
        folder = value if name.endswith(".dir") and value else "<folder>"
        instead = f"paths.outputs={folder}"
        raise UserError(
            f"{word}: a run makes its own directory below paths.outputs; expected "
            f"{shlex.quote(instead) if folder == value else instead}"
        )
    try:
        (override,) = OverridesParser.create().parse_overrides(hydra_words([word]))
    except HydraException as error:
        if not prefix and name not in known and not name.startswith(_OPEN) and group not in groups:
            raise UserError(f"{name}: no such option{did_you_mean(name, known)}") from error
        raise UserError(_not_read(word, group if group in groups else name, value, choices)) from error
    if group in groups:
        _check_choice(override, name, value, choices)
    elif name in text_fields():
        _check_text(override, word, value)


def _not_read(word: str, name: str, value: str, choices: Choices) -> str:
    """The message for a value that Hydra cannot read, with what to write instead."""
    kind = kind_of(name)
    if name.endswith(".background") and not re.fullmatch("#[0-9a-fA-F]{6}", value):
        return _colour(word, name)
    if options := choices(name):
        return f"{word}: expected one of {', '.join(options)}{_folder_of(name, value)}"
    for beginning, wanted in _WANTED.items():
        if kind and kind.startswith(beginning):
            return f"{word}: expected {wanted}"
    whole = f"{name}={_in_quotes(value)}"
    if kind and kind.startswith("list"):
        parts = value.strip().strip("[]()").split(",")
        if kind.startswith("list[float]"):
            numbers = ",".join(part.strip() for part in parts)
            return f"{word}: expected a list of numbers: {name}=[{numbers}]"
        whole = f"{name}=[{','.join(_in_quotes(part.strip(chr(34) + chr(39) + chr(32))) for part in parts)}]"
    odd = next((letter for letter in value if letter not in _PLAIN), None)
    which = f"{odd!r} takes" if odd is not None else "this takes"
    return f"{word}: {which} quotes; expected {shlex.quote(whole)}"


def _check_choice(override: Override, name: str, value: str, choices: Choices) -> None:
    """Raises UserError for a preset that there is not, or for several presets of one job."""
    chosen: Any = override.value()
    group = name.partition("@")[0]
    if name != group and name not in _PACKAGES:
        raise UserError(f"{name}={value}: no such place for a preset; expected {group}={value}")
    if isinstance(chosen, list):
        names = ",".join(str(one) for one in chosen)
        raise UserError(
            f"{name}={value}: a job takes one preset of a group; expected -m {name}={names} for a job each"
        )
    if override.is_sweep_override() and group in ONE:
        raise UserError(
            f"{name}={value}: {ONE[group]}; expected {group}=<one of {', '.join(choices(group))}>"
        )
    if isinstance(chosen, Glob):
        return
    options = choices(group)
    values = list(chosen.list) if isinstance(chosen, ChoiceSweep) else [chosen]
    for one in (getattr(one, "text", one) for one in values):
        if not isinstance(one, str) or (options and one.removesuffix(".yaml") not in options):
            numbers = isinstance(chosen, RangeSweep) or all(isinstance(one, int | float) for one in values)
            raise UserError(
                _no_preset(name, value if numbers or len(values) == 1 else str(one), options, numbers=numbers)
            )


def _no_preset(name: str, value: str, options: Sequence[str], *, numbers: bool) -> str:
    """The message for a preset that does not exist, or for several between commas, with what to write."""
    group = name.partition("@")[0]
    expected = f"one of {', '.join(options)}{_folder_of(group, value)}"
    if not numbers:
        hint = did_you_mean("none" if value == "null" else value, options)
        return f"{name}={value}: expected {expected}{hint}"
    flag = "-m " if "," in value else ""
    field = f"{flag}{VALUES[group]}={value}, or " if group in VALUES and _positive(value) else ""
    by_number = {re.sub(r"^\D+", "", option): option for option in options}
    near = [by_number.get(number.strip()) for number in value.split(",")]
    hint = f"; did you mean {flag}{name}={','.join(map(str, near))}?" if None not in near else ""
    return f"{name}={value}: expected {field}{expected}{hint}"


def _positive(value: str) -> bool:
    """Whether no number in `value`, as far as numbers are in it, is beyond what a field can take."""
    for part in value.split(","):
        try:
            number = float(part)
        except ValueError:
            continue
        if not 0 < number < math.inf:
            return False
    return True


def _folder_of(group: str, value: str) -> str:
    """How a folder is named, where one was given for a preset."""
    if "/" not in value or group not in _FOLDERS:
        return ""
    *words, last = _FOLDERS[group]
    return f", or for a folder {' '.join([*words, shlex.quote(f'{last}={value}')])}"


def _check_text(override: Override, word: str, value: str) -> None:
    """Raises UserError for a text that Hydra would read as something else, and write otherwise."""
    read = override.value()
    values = read.list if isinstance(read, ChoiceSweep) else [read]
    name = word.partition("=")[0].lstrip("+")
    if name == "tracking.wandb" and (mode := MEANT.get(value.lower(), value)) != value:
        raise UserError(f"{word}: expected tracking.wandb={mode}")
    if name.endswith(".background") and isinstance(read, list):
        raise UserError(_colour(word, name))
    if any(isinstance(one, list | dict) for one in values):
        raise UserError(f"{word}: would be read as a list or mapping; expected quotes: {quoted(word)}")
    if isinstance(read, bool | int | float) and str(read) != value.strip():
        raise UserError(f"{word}: would be read as {read}; expected quotes: {quoted(word)}")


def _colour(word: str, name: str) -> str:
    return f"{word}: expected white, grey, black or a colour such as {quoted(f'{name}=#f0f0f0')}"


def several(name: str, value: str) -> str:
    """The message for values between commas that were given to one job, with what to write instead."""
    word, kind = f"{name}={value}", kind_of(name)
    if kind.startswith("float") and re.fullmatch(r"\d+,\d+", value):
        return (
            f"{word}: several values; expected -m {word} for a job each, or {name}={value.replace(',', '.')}"
        )
    one = f", or for one text {quoted(word)}" if name in text_fields() else ""
    one = f", or for one list {name}=[{value}]" if kind.startswith("list") else one
    return f"{word}: several values; expected -m {word} for a job each{one}"
