"""Whether a run's W&B record goes to its server, stays on this machine, or is not kept at all."""

from __future__ import annotations

import configparser
import logging
import netrc
import os
from pathlib import Path
from typing import Literal, cast
from urllib.parse import urlsplit

from dp_lora.errors import UserError, did_you_mean
from dp_lora.storage.files import expanded

Mode = Literal["online", "offline", "disabled"]

_SPELLINGS: dict[str, Mode] = {
    **dict.fromkeys(("online", "run", "shared", "enabled"), "online"),
    **dict.fromkeys(("offline", "dryrun"), "offline"),
    **dict.fromkeys(("disabled", "disable", "none", "off", "false", "no", "0", "null"), "disabled"),
}  # fmt: skip
"""The spellings of a mode by W&B and its users."""

_YES = ("1", "true", "yes", "on", "y", "t")

MEANT: dict[str, Mode] = {**_SPELLINGS, **dict.fromkeys(_YES, "online")}
"""The meaning of a lower-case word that is not a value of `tracking.wandb`."""

_log = logging.getLogger(__name__)


def wandb_mode(setting: str) -> Mode:
    """online, offline or disabled, from `tracking.wandb`.

    `auto` takes the most silent of what the user has told W&B: WANDB_DISABLED, else WANDB_MODE, else what
    `wandb offline` or `wandb disabled` left in W&B's settings files. Where that allows it, a run is online if
    there is an API key, else offline.

    Raises UserError for a mode that W&B does not know, and when `online` is asked for and there is no key,
    because W&B would stop to ask for one.
    """
    if setting == "auto":
        told = _told()
        return told if told in ("offline", "disabled") else "online" if _has_key() else "offline"
    if setting == "online" and not _has_key():
        raise UserError(
            "tracking.wandb='online': no API key found; expected WANDB_API_KEY, `wandb login` or "
            "tracking.wandb=auto"
        )
    assert setting in ("online", "offline", "disabled"), setting
    return cast(Mode, setting)


def _told() -> Mode | None:
    """The mode that the environment asks for, or else W&B's settings files; None where neither does."""
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in _YES:
        return "disabled"
    if word := os.environ.get("WANDB_MODE", "").strip():
        return _mode("WANDB_MODE", word)
    kept = _kept()
    if kept.get("disabled", "").strip().lower() in _YES:
        return "disabled"
    return _mode("mode in W&B's settings", kept["mode"]) if kept.get("mode") else None


def _mode(name: str, word: str) -> Mode:
    if word.lower() not in _SPELLINGS:
        expected = "online, offline, disabled, shared, dryrun or run"
        raise UserError(f"{name}={word!r}: expected {expected}{did_you_mean(word, _SPELLINGS)}")
    return _SPELLINGS[word.lower()]


def _kept() -> dict[str, str]:
    """W&B's settings: those of the user's home, and over them those of the folder of the command."""
    here = _place("WANDB_DIR", ".")
    home = _place("WANDB_CONFIG_DIR", "~/.config/wandb")
    local = here / (".wandb" if (here / ".wandb").exists() else "wandb")
    found: dict[str, str] = {}
    for path in (home / "settings", local / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path)
        except (OSError, configparser.Error, UnicodeDecodeError) as error:
            # What stands there may forbid what would be sent.
            raise UserError(
                f"{path}: W&B's settings cannot be read ({type(error).__name__}); expected those of `wandb "
                "online`, `wandb offline` or `wandb disabled`, or tracking.wandb=offline or disabled"
            ) from error
        if parser.has_section("default"):
            found |= dict(parser.items("default"))
    return found


def _has_key() -> bool:
    """Whether W&B would find a key, by the environment or netrc, without the time its import takes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = _place("NETRC", "~/.netrc")
    server = os.environ.get("WANDB_BASE_URL") or _kept().get("base_url") or "https://api.wandb.ai"
    try:
        return path.is_file() and urlsplit(server).netloc in netrc.netrc(path).hosts
    except netrc.NetrcParseError as error:
        _log.warning("W&B: no key taken from %s (line %s cannot be read)", path.name, error.lineno)
        return False
    except (OSError, UnicodeDecodeError) as error:
        # No word of the content, which is secret.
        _log.warning("W&B: no key taken from %s, which cannot be read (%s)", path.name, type(error).__name__)
        return False


def _place(variable: str, default: str) -> Path:
    """The file or folder that a variable of the shell names; an empty one counts as none."""
    given = os.environ.get(variable) or default
    return expanded(given, f"{variable}={given}")
