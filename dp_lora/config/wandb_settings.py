"""What the user has told W&B: whether a run's record goes to its server, and under which names.

A field of `tracking` comes before W&B's variables, and those before its settings files, as W&B has it.
"""

from __future__ import annotations

import configparser
import logging
import netrc
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast
from urllib.parse import urlsplit

from dp_lora.config.schema import LONGEST_NAME, LONGEST_PROJECT, LONGEST_TAG, NOT_IN_PROJECT, TrackingConfig
from dp_lora.errors import UserError, did_you_mean
from dp_lora.storage.files import expanded, private_directory

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

PROJECT = "dp-lora"
"""The project of a run whose user has named none."""

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


def named(tracking: TrackingConfig, experiment: str) -> TrackingConfig:
    """`tracking`; what it leaves open is as W&B's variables and settings have it.

    `name` and `folder` stay None where nothing names them. Raises UserError for what W&B would refuse.
    """
    try:
        kept = _kept()
    except UserError:
        if tracking.wandb not in ("offline", "disabled"):
            raise
        kept = {}
    told = os.environ.get

    def one(field: str, *sources: str | None) -> str | None:
        given: str | None = getattr(tracking, field)
        return given if given is not None else next((source for source in sources if source), None)

    found = replace(
        tracking,
        entity=one("entity", told("WANDB_ENTITY"), kept.get("entity")),
        project=one("project", told("WANDB_PROJECT"), kept.get("project"), PROJECT),
        group=one("group", told("WANDB_RUN_GROUP"), experiment),
        name=one("name", told("WANDB_NAME")),
        folder=one("folder", told("WANDB_DIR")),
        tags=tracking.tags or [tag for tag in told("WANDB_TAGS", "").split(",") if tag],
    )
    check_names(found)
    return found


def folder_of(tracking: TrackingConfig) -> Path | None:
    """`tracking.folder`, made for its owner alone where it is not there; None where nothing names it."""
    if tracking.folder is None:
        return None
    folder = expanded(tracking.folder, f"tracking.folder={tracking.folder}")
    return folder if folder.is_dir() else private_directory(folder)


def check_names(tracking: TrackingConfig) -> None:
    """Refuses what W&B would refuse, with the run's whole record lost, once the run has begun."""
    project = tracking.project
    if project is not None and (
        not 1 <= len(project) <= LONGEST_PROJECT or set(project) & set(NOT_IN_PROJECT)
    ):
        raise UserError(
            f"tracking.project={project!r}: expected 1 to {LONGEST_PROJECT} characters, none of them in "
            f"{NOT_IN_PROJECT}"
        )
    for field in ("entity", "name", "group"):
        value = getattr(tracking, field)
        if value is not None and not (1 <= len(value) <= LONGEST_NAME and value.isprintable()):
            raise UserError(
                f"tracking.{field}={value!r}: expected 1 to {LONGEST_NAME} characters in one line"
            )
    if tracking.folder is not None:
        expanded(tracking.folder, f"tracking.folder={tracking.folder}")
    for tag in tracking.tags:
        if not 1 <= len(tag) <= LONGEST_TAG:
            raise UserError(
                f"tracking.tags={tag!r}: {len(tag)} characters, expected 1 to {LONGEST_TAG} a tag"
            )


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
