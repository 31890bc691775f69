"""The table that a job ends with: what was spent, what came of it, where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dp_lora.config.schema import Config
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.jobs.job import Job
from dp_lora.jobs.spending import Books, in_words, ledger_path, private_set
from dp_lora.records.run_directory import OUTPUTS
from dp_lora.storage.files import read_json


def summary(job: Job, result: Mapping[str, Any]) -> str:
    """The table that a job ends with: what was spent, what came of it, where it lies."""
    # What was trained, not what this configuration and these images would give today.
    path, lines = job.directory / "privacy.json", []
    if path.exists():
        record = read_json(path)
        lines += [*guarantee(record), f"noise multiplicity {record['noise_multiplicity']}"]
        if choice := record.get("choice"):
            lines.append(f"matrices           {choice['number']} of {choice['of']}, {choice['by']}")
        together = line_of_all_runs(job.config, record["delta"], job.images)
        if together is not None:
            lines.append(f"all runs           {together}")
    elif (job.directory / OUTPUTS["finetune"]).exists():
        lines.append(
            f"what was spent is not known here: {path} is missing; put it back, or read it in "
            "adapter/README.md and in the ledger (python -m sweeps bill)"
        )
    if result.get("images_compared") is False:
        lines.append(
            "measured on images that could not be compared with those that the run was made from: it had no "
            "record of them"
        )
    if result.get("metrics"):
        lines += ["", *metrics_table(result)]
    lines += ["", f"run directory      {job.directory}"]
    return "\n".join(lines)


def line_of_all_runs(config: Config, delta: float, images: ImageSplits) -> str | None:
    """One line on all runs on the job's private images, by ledger and index; None for fewer than two runs."""
    from dp_lora.privacy.ledger import Charge, spent, spent_adaptively
    from dp_lora.privacy.subsampled_gaussian import Mechanism

    if config.data.public:
        return None
    path, name = ledger_path(config), private_set(config.data.name)
    nobody = Charge("", name, Mechanism(1.0, 0.0, 0), delta)
    try:
        books = Books(config, images)
        charges = [c for c in books.others(nobody) if c.mechanism.steps]
        alone = sum(c.mechanism.steps > 0 for c in books.in_ledger(nobody))
    except UserError as error:
        return str(error)
    if len(charges) < 2:
        return None
    shared = "" if len(charges) == alone else " and on sets that share images with it"
    unit = config.privacy.unit
    together, runs = spent(charges, delta, unit), f"{in_words(len(charges))} on {name}{shared} together"
    same = all(charge.unit == unit for charge in charges)
    runs += "" if same else f", for one {unit}, whatever each of them protects,"
    if together.accountant == "none":
        return f"epsilon {together.epsilon:.4g} of {runs}; {path}"
    adaptively = spent_adaptively(charges, delta, unit=unit)
    return (
        f"epsilon {together.epsilon:.4g} at delta {delta:g} ({together.accountant}) of {runs} if all were "
        f"fixed beforehand, {adaptively:.4g} also if later ones were chosen after seeing earlier ones; {path}"
    )


def metrics_table(result: Mapping[str, Any]) -> list[str]:
    """The metrics of an evaluation with their baselines; a star marks those that no epsilon covers."""
    from dp_lora.records.tracker import baseline_table

    columns, rows = baseline_table(result["metrics"])
    private = result.get("private_metrics", [])
    names = [f"{row[0]} *" if row[0] in private else row[0] for row in rows]
    lines = [_row(columns)]
    lines += [_row([name, *map(_number, row[1:])]) for name, row in zip(names, rows, strict=True)]
    if private:
        lines.append(f"* {result['private_metrics_note']}")
    if release := result.get("release"):
        spent = f"epsilon {release['epsilon']:.4g} ({release['accountant']}), delta {release['delta']:g}"
        one = release.get("unit", "image")
        lines.append(f"dp_*: {spent}, for one {one} of the {result['reference']['split']} split")
    return lines


def guarantee(record: Mapping[str, Any]) -> list[str]:
    """Lines on what a fine-tuning spends by its `record` (privacy.json), or on why it guarantees nothing."""
    from dp_lora.records.card import no_guarantee

    nothing = no_guarantee(record, reproducible_noise=record["reproducible_noise"])
    lines = [nothing.strip("*.")] if nothing else []
    if record["private"]:
        lines += [
            f"epsilon            {record['epsilon']:.4g} ({record['accountant']}, {record['adjacency']})",
            f"delta              {record['delta']:g}",
        ]
    sizes = f"{record['steps']} steps, sample rate {record['sample_rate']:.4g}"
    return [*lines, f"noise multiplier   {record['noise_multiplier']:.4g}, {sizes}"]


def _row(cells: Sequence[str]) -> str:
    return f"{cells[0]:<20} " + " ".join(f"{cell:>10}" for cell in cells[1:])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
