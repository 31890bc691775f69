"""The table that a job ends with: what was spent, what came of it, where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dp_lora.jobs.job import Job
from dp_lora.jobs.spending import line_of_all_runs
from dp_lora.records.run_directory import OUTPUTS
from dp_lora.storage.files import read_json


def summary(job: Job, result: Mapping[str, Any]) -> str:
    """The table that a job ends with: what was spent, what came of it, where it lies."""
    # What was trained, not what this configuration and these images would give today.
    path, lines = job.directory / "privacy.json", []
    if path.exists():
        record = read_json(path)
        lines += [*guarantee(record), f"noise multiplicity {record['noise_multiplicity']}"]
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
