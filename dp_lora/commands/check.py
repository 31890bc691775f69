"""The command `dp-lora-check`: reads a whole set of images and says what is in it, and what is wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp_lora.commands.parser import Parser, ending
from dp_lora.errors import UserError

if TYPE_CHECKING:
    from dp_lora.config.schema import Config

EPILOG = """examples:
  dp-lora-check data=imagefolder data.source=~/images
  dp-lora-check data=imagefolder data.source=set.zip data.label_column=diagnosis data.test_size=0.2

The exit status is 0 if the set can be trained on, else 2. The words are those of dp-lora; what they say
beside data is checked and makes no difference."""


def main() -> None:
    """Checks one set. A user's mistake ends with one line and status 2, as does a set that cannot train."""
    with ending("dp-lora-check", interrupted="nothing was written"):
        config = asked_for(*_parse(sys.argv[1:]))
        from dp_lora.data.inspection import inspect

        found = inspect(config.data, config.paths, progress=config.tracking.progress)
        _print(found.sections())
        found.verdict()
        print(f"{'verdict':<11}can be trained on")


def _parse(words: Sequence[str]) -> tuple[list[str], Path | None]:
    parser = Parser(
        prog="dp-lora-check",
        description="Reads a whole set of images as a job would, and lists every file with what is wrong,\n"
        "roles, classes, sizes, modes and values, constant images and copies. It trains, logs\n"
        "and writes nothing. What it prints is as private as the images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="field=value", help="as of dp-lora, such as data=imagefolder"
    )
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder of presets of your own")
    given = parser.parse_args(words)
    if not given.words:
        raise UserError("no set is named; expected data=imagefolder data.source=PATH, or data=NAME")
    return given.words, None if given.config_dir is None else Path(given.config_dir)


def asked_for(words: Sequence[str], presets: Path | None = None) -> Config:
    """The configuration that the words say, checked as `dp-lora` checks it.

    Raises UserError for a word that cannot be meant.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from dp_lora.commands.command_line import check_words, hydra_words
    from dp_lora.commands.explain import explain
    from dp_lora.config.load import config_directory, from_omegaconf
    from dp_lora.config.schema import Config

    if (path := next((word for word in words if "=" not in word and Path(word).exists()), None)) is not None:
        raise UserError(f"{path}: expected data=imagefolder data.source={path}")
    flag = [] if presets is None else [f"--config-dir={presets}"]
    ConfigStore.instance().store(name="schema", node=Config)
    own = [] if presets is None else [f"hydra.searchpath=['file://{presets.absolute()}']"]
    try:
        check_words([*words, *flag])
        with initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"):
            composed = compose("config", overrides=[*hydra_words(words), *own])
        return from_omegaconf(composed)
    except (HydraException, OmegaConfBaseException, UserError) as error:
        reason, several, _ = explain(error).partition("several values; expected ")
        raise UserError(f"{reason}{several}one" if several else reason) from error


def _print(sections: Sequence[tuple[str, Sequence[str]]]) -> None:
    try:
        for word, lines in sections:
            for number, line in enumerate(lines):
                print(f"{'' if number else word:<11}{line}")
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
