"""The command `dp-lora-sample`: draws images from a finished run or an adapter, at no cost in privacy."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.commands.parser import Parser, ending
from dp_lora.commands.words import folder_word, values
from dp_lora.errors import UserError
from dp_lora.storage.files import expanded

if TYPE_CHECKING:
    from dp_lora.config.schema import SamplerConfig
    from dp_lora.jobs.drawing import Asked

TEXTS = {
    "prompt": "of a text-to-image model: with {} for the name of a class, or one for all images",
    "pretrained": "the pre-trained model, if neither run nor adapter names it: a name or a folder",
    "name": "of the new folder in RUN/samples/; derived from the settings",
    "out": "another folder for the images; an adapter without its run needs one",
    "format": "npz, or png: also a folder a class with metadata.jsonl",
    "device": "auto, cpu or cuda",
}
"""The words that take a text, and what it is."""

_OTHERWISE = ("name", "classes", "export")
"""Fields of the sampler that have other words here: `sampler`, `classes` and `format`."""


def main() -> None:
    """Draws images. A user's mistake is one line and exit status 2."""
    with ending("dp-lora-sample", interrupted="the same command draws them"):
        place, words = _parse(sys.argv[1:])
        asked = asked_for(place, words)
        from dp_lora.jobs.drawing import draw

        drawn = draw(asked)
    print(f"images     {drawn.number}\nfolder     {drawn.folder}\nprivacy    {drawn.note}")


def _parse(words: Sequence[str]) -> tuple[Path, list[str]]:
    from dp_lora.config.schema import SamplerConfig

    fields = [
        f"{field.name}={field.default}"
        for field in dataclasses.fields(SamplerConfig)
        if field.name not in _OTHERWISE
    ]
    listed = {
        "sampler=PRESET": "ddim, dpmsolver or pipeline, with the steps, eta and guidance of the preset",
        **dict.fromkeys(fields, "of the sampler; as in the run if it is not given"),
        "classes=cat:500,dog:20": "images of each class, instead of num_samples",
        "seed=0": "of the images; as in the run if it is not given",
        **{f"{name}=...": what for name, what in TEXTS.items()},
    }
    parser = Parser(
        prog="dp-lora-sample",
        description="Draws images from a finished run, or from the folder of an adapter. It costs no\n"
        "privacy and reads neither private images nor the ledger.",
        epilog="\n".join(["words:", *(f"  {word:<26}{what}" for word, what in listed.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "place", type=folder_word, metavar="RUN_OR_ADAPTER", help="a run directory, or an adapter's folder"
    )
    parser.add_argument("words", nargs="*", metavar="field=value", help="what to draw; see below")
    given = parser.parse_args(words)
    return given.place, given.words


def asked_for(place: Path, words: Sequence[str]) -> Asked:
    """The images that the command line asks for.

    Raises UserError for a word that it does not know, or whose value is of another kind.
    """
    from dp_lora.jobs.drawing import FORMATS, Asked, source_of

    given = _values(words)
    config = source_of(place).config
    sampler = _sampler(config.sampler, given)
    if {"num_samples", "classes"} <= given.keys():
        raise UserError("num_samples and classes: both say how many images; expected one of the two")
    counts = None if "num_samples" in given else sampler.counts
    counts = _mapping(given["classes"]) if "classes" in given else counts
    seed = _number("seed", given.pop("seed", str(config.seed)), int)
    if seed < 0:
        raise UserError(f"seed={seed}: expected 0 or more")
    texts = {name: given[name] for name in TEXTS if name in given}
    if (shape := texts.get("format", "npz")) not in FORMATS:
        raise UserError(f"format={shape}: expected one of {', '.join(FORMATS)}")
    out = texts.pop("out", None)
    return Asked(
        place, sampler, seed, counts, out=None if out is None else expanded(out, f"out={out}"), **texts
    )


def _values(words: Sequence[str]) -> dict[str, str]:
    """The text behind each name. Raises UserError for an unknown name, and for one that comes twice.

    `classes` may come several times: that is what most shells make of `classes={cat:500,dog:20}`.
    """
    from dp_lora.config.schema import SamplerConfig

    fields = [field.name for field in dataclasses.fields(SamplerConfig) if field.name not in _OTHERWISE]
    known = ["sampler", *fields, "classes", "seed", *TEXTS]
    spelt = {"sampler.name": "sampler", **{f"sampler.{name}": name for name in fields}}
    return values(words, known, spelt, several=["classes"])


def _sampler(of_run: SamplerConfig, given: dict[str, str]) -> SamplerConfig:
    """The run's sampler, or a preset, with the fields that are given."""
    from dp_lora.commands.vocabulary import presets
    from dp_lora.config.load import config_directory
    from dp_lora.config.schema import SAMPLERS, SamplerConfig

    chosen: dict[str, Any] = dataclasses.asdict(of_run)
    if (preset := given.get("sampler")) is not None:
        if preset in presets("sampler"):
            import yaml

            text = (config_directory() / "sampler" / f"{preset}.yaml").read_text(encoding="utf-8")
            # The number of images is that of the run: a preset is chosen for how they are drawn.
            own = {name: chosen[name] for name in ("num_samples", "classes", "batch_size")}
            chosen = {**dataclasses.asdict(SamplerConfig()), **yaml.safe_load(text), **own}
        elif preset in SAMPLERS:
            chosen["name"] = preset
        else:
            raise UserError(f"sampler={preset}: expected one of {', '.join(presets('sampler'))}")
    for name, default in chosen.items():
        if name in given and name not in _OTHERWISE:
            chosen[name] = _number(name, given[name], type(default))
    return SamplerConfig(**chosen)


def _number(name: str, text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if value != value or value in (math.inf, -math.inf):
        raise UserError(f"{name}={text}: expected a {'whole number' if kind is int else 'number'}")
    return value


def _mapping(text: str) -> dict[str, int]:
    """The numbers by class of `cat:500,dog:20`, with or without braces; a name may be quoted.

    >>> _mapping("{tabby cat: 500, 'a, b':20}")
    {'tabby cat': 500, 'a, b': 20}
    """
    inside = text.strip()
    if inside.startswith("{") and inside.endswith("}"):
        inside = inside[1:-1]
    found: dict[str, int] = {}
    part = re.compile(r"""\s*("[^"]+"|'[^']+'|[^,'"{}]+?)\s*:\s*([0-9]{1,12})\s*(?:,|$)""")
    place = 0
    while place < len(inside):
        match = part.match(inside, place)
        name = match[1].strip("'\"") if match is not None else ""
        if match is None or name in found:
            raise UserError(f"classes={text}: expected classes=name:number,name:number, each class once")
        found[name], place = int(match[2]), match.end()
    if not found:
        raise UserError(f"classes={text}: expected classes=name:number,name:number, each class once")
    return found


if __name__ == "__main__":
    main()
