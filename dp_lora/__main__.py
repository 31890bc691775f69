"""The command `dp-lora` (= `python -m dp_lora`): a Hydra app around `run.run`.

A user's mistake is one line and exit status 2; an interrupted run ends with status 130 and continues
when the command is given again.
"""

from __future__ import annotations

import os
import re
import sys

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dp_lora.config import Config, config_directory, from_omegaconf
from dp_lora.errors import UserError, did_you_mean

ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(config_path=str(config_directory()), config_name="config", version_base="1.3")
def app(composed: DictConfig) -> dict[str, object]:
    """One job of a Hydra run or multirun; returns where it lies and its metrics."""
    from dp_lora.run import run

    config = from_omegaconf(composed)
    return run(config, list(HydraConfig.get().overrides.task))


def main() -> None:
    """Runs the app and turns what a user can cause into one line and an exit status."""
    # Without it Hydra prints errors its own way and exits with status 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        app()
    except UserError as error:
        _stop(str(error), 2)
    except (HydraException, OmegaConfBaseException) as error:
        _stop(explain(error), 2)
    except KeyboardInterrupt:
        _stop("interrupted; the same command continues", 130)
    except Exception as error:
        if type(error).__name__ != "Interrupted":
            raise
        _stop(f"{error}; the same command continues", 130)


def _stop(line: str, status: int) -> None:
    print(f"dp-lora: {line}", file=sys.stderr)
    sys.exit(status)


def explain(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf: the field, the value, what was expected, the nearest name."""
    causes = [error]
    while causes[-1].__cause__ is not None and isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    text = "\n".join(str(cause) for cause in causes)
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, choice = found[1], found[2]
        options = sorted(path.stem for path in (config_directory() / group).glob("*.yaml"))
        return f"{group}={choice}: expected one of {', '.join(options)}{did_you_mean(choice, options)}"
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[1]}: {_reason(text)}{_nearest_key(found[1])}"
    if found := re.search(r"Key '([^']+)' not in '(\w+)'\s+full_key: ([\w.@]+)", text):
        return f"{found[3]}: no such option{_nearest_key(found[3])}"
    return " ".join(str(error).split())


def _reason(text: str) -> str:
    if "is not in struct" in text or "not in '" in text:
        return "no such option"
    return " ".join(text.split("\n")[-1].split()) or "cannot be set"


def _nearest_key(key: str) -> str:
    groups = [path.name for path in config_directory().iterdir() if path.is_dir()]
    return did_you_mean(key, [*_keys(), *groups])


def _keys() -> list[str]:
    """Every dotted name that can be set."""
    found: list[str] = []

    def visit(node: DictConfig, prefix: str) -> None:
        for name in node:
            full = f"{prefix}{name}"
            found.append(full)
            if not OmegaConf.is_missing(node, str(name)) and isinstance(node[name], DictConfig):
                visit(node[name], f"{full}.")

    visit(OmegaConf.structured(Config), "")
    return found


if __name__ == "__main__":
    main()
