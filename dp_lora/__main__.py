"""The command `dp-lora` (= `python -m dp_lora`): a Hydra app around `run.run`, and `dp-lora export`.

A user's mistake is one line and exit status 2; an interrupted run ends with status 130 and continues
when the command is given again.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dp_lora.config import Config, config_directory, from_omegaconf
from dp_lora.errors import SweepFailed, UserError, did_you_mean

ConfigStore.instance().store(name="schema", node=Config)


_PLACES = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""What the system says when a folder that the user named cannot take a file."""


class _Reported(UserError):
    """A failed job of a sweep, whose line is on stderr already."""


@hydra.main(config_path=str(config_directory()), config_name="config", version_base="1.3")
def app(composed: DictConfig) -> dict[str, object]:
    """One job of a Hydra run or multirun; returns where it lies and its metrics."""
    from dp_lora.run import run

    settings = HydraConfig.get()
    try:
        return run(from_omegaconf(composed), list(settings.overrides.task))
    except (UserError, OmegaConfBaseException) as error:
        reason = explain(error)
        if settings.mode != RunMode.MULTIRUN:
            _stop(reason, 2)
    except Exception as error:
        if settings.mode != RunMode.MULTIRUN:
            raise
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__} {error}".split())
    # The other jobs of the sweep go on; Hydra passes on the first failure only, so each is told here.
    _say(f"job {settings.job.num} ({settings.job.override_dirname}): {reason}")
    raise _Reported(reason)


def main() -> None:
    """Runs the app, or `dp-lora export`; what a user can cause becomes one line and an exit status."""
    if sys.argv[1:2] == ["export"]:
        from dp_lora import export_command

        export_command.main(sys.argv[2:])
        return
    # Without it Hydra prints errors its own way and exits with status 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.argv[1:] = hydra_words(dry_run(sys.argv[1:]))
    try:
        _check_flags(sys.argv[1:])
        app()
    except _Reported:
        sys.exit(2)
    except SweepFailed as error:
        _stop(str(error), 1)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        _stop(explain(error), 2)
    except OSError as error:
        if error.errno not in _PLACES:
            raise
        _stop(f"{error.filename or 'writing'}: {error.strerror}; expected a place that can be written", 2)
    except KeyboardInterrupt as error:
        _stop(f"{str(error) or 'interrupted'}; the same command continues", 130)


def hydra_words(words: Sequence[str]) -> list[str]:
    """The command line as Hydra takes it: `epsilon=inf` names a preset, not a number, and flags come last.

    >>> hydra_words(["epsilon=eps1,inf", "-m", "lora.rank=4"])
    ["epsilon=eps1,'inf'", 'lora.rank=4', '-m']
    """
    quoted = [
        re.sub(r"\binf\b", "'inf'", word) if re.match(r"epsilon=[\w,]+$", word) else word for word in words
    ]
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


def _check_flags(words: Sequence[str]) -> None:
    """Raises UserError for a flag that does not exist, or a launcher without a sweep to launch.

    Of the first argparse would print its whole usage, the second Hydra ignores.
    """
    launcher = next((word for word in words if word.startswith("hydra/launcher=")), None)
    is_sweep = {"-m", "--multirun"} & set(words) or any(word.startswith("sweep=") for word in words)
    if launcher not in (None, "hydra/launcher=basic") and not is_sweep:
        raise UserError(f"{launcher}: launches the jobs of a sweep; expected -m with it")
    flags = get_args_parser()._option_string_actions
    for word in words:
        name = word.split("=")[0]
        if name.startswith("--") and not any(flag.startswith(name) for flag in flags):
            raise UserError(f"{name}: no such flag{did_you_mean(name, flags)}; --help lists them")


def _say(line: str) -> None:
    print(f"dp-lora: {line}", file=sys.stderr, flush=True)


def _stop(line: str, status: int) -> NoReturn:
    _say(line)
    sys.exit(status)


def explain(error: Exception) -> str:
    """One line for an error of the user: the field, the value, what was expected, the nearest."""
    if isinstance(error, UserError):
        return str(error)
    causes = [error]
    while causes[-1].__cause__ is not None and isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    text = "\n".join(str(cause) for cause in causes)
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, choice = found[1], found[2]
        options = sorted(path.stem for path in (config_directory() / group).glob("*.yaml"))
        if group == "hydra/launcher":
            options = ["basic", *options]
        return f"{group}={choice}: expected one of {', '.join(options)}{did_you_mean(choice, options)}"
    if found := re.search(r"Error parsing override '(.*)'", text):
        return f"{found[1]!r}: expected option=value, in Hydra's syntax"
    if found := re.search(r"Error merging override (.*)", text):
        return f"{found[1]}: {_expected(str(causes[-1]))}"
    if found := re.search(r"is not in struct\s+full_key: ([\w.@]+)", text):
        return f"{found[1]}: a new name, expected a plus sign before it: +{found[1]}=<value>"
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[1]}: {_reason(text)}{_nearest_key(found[1])}"
    if found := re.search(r"Key '([^']+)' not in '(\w+)'\s+full_key: ([\w.@]+)", text):
        return f"{found[3]}: no such option{_nearest_key(found[3])}"
    if found := re.search(r"full_key: ([\w.@]+)", text):
        return f"{found[1]}: {_expected(str(causes[-1]))}"
    return " ".join(str(error).split())


_TYPES = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}


def _expected(text: str) -> str:
    """What OmegaConf's `text` about a value of the wrong type says was expected."""
    if found := re.search(r"could not be converted to (\w+)", text):
        return f"expected {_TYPES.get(found[1], found[1])}"
    if found := re.search(r"is not a subclass of (\w+)", text):
        return "a group of options, expected one of the options below it"
    return " ".join(text.split("\n")[0].split())


def _reason(text: str) -> str:
    return "no such option" if "not in '" in text else _expected(text.split("\n")[-1]) or "cannot be set"


def _nearest_key(key: str) -> str:
    groups = [path.name for path in config_directory().iterdir() if path.is_dir()]
    return did_you_mean(key, [*_keys(), *groups])


def _keys() -> list[str]:
    """Every dotted name that can be set."""
    found: list[str] = []

    def visit(node: DictConfig, prefix: str) -> None:
        for name in node:
            full = f"{prefix}{name!s}"
            found.append(full)
            if not OmegaConf.is_missing(node, str(name)) and isinstance(node[name], DictConfig):
                visit(node[name], f"{full}.")

    visit(OmegaConf.structured(Config), "")
    return found


if __name__ == "__main__":
    main()
