"""The command `dp-lora-neighbours`, without what is slow to load: the words it takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dp_lora.auditing.neighbours import WARNING, inspect
from dp_lora.commands.parser import Parser, ending
from dp_lora.storage.files import expanded


def main(words: Sequence[str] | None = None) -> None:
    """Inspects one run. A user's mistake is one line and exit status 2."""
    parser = Parser(prog="dp-lora-neighbours", description=f"Nearest training images; {WARNING}.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder; default: RUN/checkpoint")
    parser.add_argument("--extractor", default="lite0", metavar="NAME", help="lite0, inception or dinov2")
    parser.add_argument(
        "--images", type=_at_least_one, default=20, metavar="N", help="generated images shown"
    )
    parser.add_argument("--neighbours", type=_at_least_one, default=5, metavar="K", help="shown beside each")
    with ending("dp-lora-neighbours", interrupted="nothing was written"):
        given = parser.parse_args(words)
        directory = expanded(given.run, str(given.run))
        folder = expanded(given.out, f"--out={given.out}") if given.out else directory / "checkpoint"
        path = inspect(
            directory, folder, extractor=given.extractor, images=given.images, count=given.neighbours
        )
    print(f"{path}\n{WARNING}")


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)


if __name__ == "__main__":
    main()
