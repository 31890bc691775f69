"""The command `dp-lora-evaluate`: evaluates the images of a finished run again, without another training."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.commands.parser import Parser, ending
from dp_lora.commands.words import folder_word, values
from dp_lora.errors import UserError

if TYPE_CHECKING:
    from dp_lora.config.schema import EvaluationConfig
    from dp_lora.jobs.evaluating import Asked

TEXTS = {
    "samples": "images that dp-lora-sample drew: a name in RUN/samples/, or a folder; else the run's own",
    "name": "of the new file in RUN/evaluations/; derived from the settings",
    "pretrained": "the pre-trained model, if it is not where the run had it: a name or a folder",
    "device": "auto, cpu or cuda",
}
"""The words that take a text, and what it is."""


def main() -> None:
    """Evaluates. A user's mistake is one line and exit status 2."""
    with ending("dp-lora-evaluate", interrupted="the same command evaluates them"):
        place, words = _parse(sys.argv[1:])
        asked = asked_for(place, words)
        from dp_lora.jobs.evaluating import evaluate

        path, record = evaluate(asked)
        from dp_lora.jobs.summary import metrics_table

        table = metrics_table(record)
    print("\n".join([*table, "", f"result     {path}", f"privacy    {record['note']}"]))


def _parse(words: Sequence[str]) -> tuple[Path, list[str]]:
    from dp_lora.commands.vocabulary import presets
    from dp_lora.config.schema import EvaluationConfig

    fields = {
        f"evaluation.{field.name}=...": _expected(str(field.type))
        for field in dataclasses.fields(EvaluationConfig)
    }
    listed = {
        "evaluation=PRESET": f"one of {', '.join(presets('evaluation'))}; else as in the run",
        **fields,
        "evaluation.reference=none": "only the Inception score: no private image, no ledger",
        **{f"{name}=...": what for name, what in TEXTS.items()},
    }
    parser = Parser(
        prog="dp-lora-evaluate",
        description="Evaluates the images of a finished run with other settings, without another training.\n"
        "Metrics on private images are marked with a star, are not covered by epsilon, and are\n"
        "entered in the ledger as that. evaluation=release spends a budget of its own.",
        epilog="\n".join(["words:", *(f"  {word:<39}{what}" for word, what in listed.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=folder_word, metavar="RUN", help="a run directory, or a folder in its samples/"
    )
    parser.add_argument("words", nargs="*", metavar="field=value", help="what to measure; see below")
    given = parser.parse_args(words)
    return given.run, given.words


def asked_for(place: Path, words: Sequence[str]) -> Asked:
    """The evaluation that the command line asks for.

    Raises UserError for a word that it does not know, or whose value is of another kind.
    """
    from dp_lora.config.schema import EvaluationConfig
    from dp_lora.jobs.drawing import source_of
    from dp_lora.jobs.evaluating import NO_IMAGES, Asked, run_of

    fields = [f"evaluation.{field.name}" for field in dataclasses.fields(EvaluationConfig)]
    spelt = {name.removeprefix("evaluation."): name for name in fields}
    given = values(words, ["evaluation", *fields, *TEXTS], spelt)
    run, samples = run_of(place)
    if samples is not None and "samples" in given:
        raise UserError(f"samples={given['samples']}: {place} names the images already; expected the run")
    compares = given.get("evaluation.reference") != NO_IMAGES
    if not compares:
        del given["evaluation.reference"]
    evaluation = _evaluation(source_of(run).config.evaluation, given)
    texts = {name: given[name] for name in TEXTS if name in given}
    return Asked(run, evaluation, compares, texts.pop("samples", samples), **texts)


def _evaluation(of_run: EvaluationConfig, given: dict[str, str]) -> EvaluationConfig:
    """The run's evaluation, or a preset, with the fields that are given."""
    import yaml

    from dp_lora.commands.vocabulary import presets
    from dp_lora.config.load import config_directory
    from dp_lora.config.schema import EvaluationConfig
    from dp_lora.errors import did_you_mean

    chosen: dict[str, Any] = dataclasses.asdict(of_run)
    if (preset := given.get("evaluation")) is not None:
        if preset not in (known := presets("evaluation")):
            raise UserError(
                f"evaluation={preset}: expected one of {', '.join(known)}{did_you_mean(preset, known)}"
            )
        content = (config_directory() / "evaluation" / f"{preset}.yaml").read_text(encoding="utf-8")
        # Where the weights lie and what fits into memory are those of the run, whatever is measured.
        own = {name: chosen[name] for name in ("inception_weights", "batch_size")}
        chosen = {**dataclasses.asdict(EvaluationConfig()), **yaml.safe_load(content), **own}
    for field in dataclasses.fields(EvaluationConfig):
        if (text := given.get(f"evaluation.{field.name}")) is not None:
            chosen[field.name] = _value(f"evaluation.{field.name}", text, str(field.type))
    return EvaluationConfig(**chosen)


_KINDS = {
    "list[str]": "names such as [lite0,inception]",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}


def _expected(kind: str) -> str:
    """What may stand for a field whose type is written `kind`.

    >>> _expected("float | None")
    'a number, or null'
    """
    base, _, rest = kind.partition(" | ")
    return f"{_KINDS.get(base, 'a text')}{', or null' if rest else ''}"


def _value(name: str, text: str, kind: str) -> Any:
    """The value that a text gives to a field whose type is written `kind`.

    >>> _value("x", "[lite0, inception]", "list[str]"), _value("x", "1e-5", "float | None")
    (['lite0', 'inception'], 1e-05)
    """
    base, _, rest = kind.partition(" | ")
    if rest and text == "null":
        return None
    if base == "str":
        return text
    try:
        if base == "list[str]":
            inside = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text
            found = [part.strip().strip("'\"") for part in inside.split(",")] if inside.strip() else []
            if all(found):
                return found
        elif base == "bool":
            return {"true": True, "false": False}[text.lower()]
        else:
            return {"int": int, "float": float}[base](text)
    except (ValueError, KeyError):
        pass
    raise UserError(f"{name}={text}: expected {_expected(kind)}")


if __name__ == "__main__":
    main()
