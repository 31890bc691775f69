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
from contextlib import suppress
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dp_lora import __version__
from dp_lora.commands.command_line import prepared
from dp_lora.commands.explain import explain
from dp_lora.commands.help import help_text
from dp_lora.config.load import config_directory, from_omegaconf
from dp_lora.config.objective import objective, objectives, refuse_without_objective
from dp_lora.config.schema import Config
from dp_lora.errors import SweepFailed, UserError

ConfigStore.instance().store(name="schema", node=Config)


_PLACES = (
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR,
    errno.ELOOP, errno.ENAMETOOLONG, errno.EFBIG,
)  # fmt: skip
"""What the system says when a folder that the user named cannot take a file."""


_ended: list[str] = []
"""How the jobs of a multirun in this process have ended, in order: the reason, or empty for a success."""

ALIKE = 2
"""After so many failures for the same reason, and no success, the rest of a multirun is not started."""


class _Reported(UserError):
    """A failed job of a sweep, whose line is on stderr already."""


@hydra.main(config_path=str(config_directory()), config_name="config", version_base="1.3")
def app(composed: DictConfig) -> object:
    """One job of a Hydra run or multirun; returns where it lies and its metrics, or what `optimize` names."""
    from dp_lora.jobs.stages import run

    settings = HydraConfig.get()
    try:
        config = from_omegaconf(composed)
        names = objectives(config)
        if settings.mode == RunMode.MULTIRUN:
            refuse_without_objective(settings.sweeper, config)
        returned = run(config, list(settings.overrides.task))
        _ended.append("")
        return objective(names, returned) if names else returned
    except Exception as error:
        known = _of_the_user(error)
        if settings.mode != RunMode.MULTIRUN:
            if known is None:
                raise
            _stop(known, 2)
        if known is None:
            traceback.print_exc()
        reason = known or " ".join(f"{type(error).__name__} {error}".split())
    # The other jobs of the sweep go on; Hydra passes on the first failure only, so each is told here.
    _say(f"job {settings.job.num} ({settings.job.override_dirname}): {reason}")
    _ended.append(reason)
    if len(_ended) == ALIKE and len(set(_ended)) == 1:
        # An Exception would end this job alone.
        _stop(f"the first {ALIKE} jobs failed for one reason; nothing after them was started", 2)
    raise _Reported(reason)


def main() -> None:
    """Runs the app, or `dp-lora export`; what a user can cause becomes one line and an exit status."""
    if sys.argv[1:2] == ["export"]:
        from dp_lora.commands import export as export_command

        export_command.main(sys.argv[2:])
        return
    if "--version" in sys.argv[1:]:
        print(f"dp-lora {__version__}")
        return
    if {"--help", "-h"} & set(sys.argv[1:]):
        with suppress(BrokenPipeError):  # `| head`
            print(help_text(), flush=True)
            return
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    # Without it Hydra prints errors its own way and exits with status 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    _ended.clear()
    try:
        sys.argv[1:] = prepared(sys.argv[1:])
        app()
    except _Reported:
        sys.exit(2)
    except SweepFailed as error:
        _stop(str(error), 1)
    except KeyboardInterrupt as error:
        _stop(f"{str(error) or 'interrupted'}; the same command continues", 130)
    except Exception as error:
        known = _of_the_user(error)
        if known is None:
            raise
        _stop(known, 2)


def _of_the_user(error: Exception) -> str | None:
    """The line for what a user can cause; None for any other error."""
    if isinstance(error, UserError | HydraException | OmegaConfBaseException):
        return explain(error)
    if isinstance(error, OSError) and error.errno in _PLACES:
        return f"{error.filename or 'writing'}: {error.strerror}; expected a place that can be written"
    return None


def _say(line: str) -> None:
    """Prints `line` as one line, whatever a value in it holds; a list, which is indented, as one."""
    lines = re.split(r"\n(?=  \S)", line)
    shown = [
        "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in one) for one in lines
    ]
    print("dp-lora: " + "\n".join(shown), file=sys.stderr, flush=True)


def _stop(line: str, status: int) -> NoReturn:
    _say(line)
    sys.exit(status)


if __name__ == "__main__":
    main()
