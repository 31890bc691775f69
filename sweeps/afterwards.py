"""What was drawn and evaluated from finished runs afterwards, by dp-lora-sample and dp-lora-evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dp_lora.errors import UserError
from dp_lora.records.tracker import baseline_table
from sweeps.folders import read_record
from sweeps.summary import Summary, shown
from sweeps.tables import PRIVATE, PRIVATE_MEANS, Table


def sets(summary: Summary) -> Iterator[tuple[str, Path]]:
    """(the setting and the set's name, its grid of images) of each set that was drawn from a finished run."""
    for group in summary.groups:
        for row in group.done:
            for path in sorted((Path(row["directory"]) / "samples").glob("*/sampling.json")):
                grid = path.with_name("samples.png")
                if grid.exists():
                    yield f"{group.setting}, seed {row['seed']}: {path.parent.name}", grid


def evaluations(summary: Summary) -> Table | None:
    """A line for each metric of each later evaluation; None if there is none."""
    lines: list[tuple[str, ...]] = []
    is_private = False
    for group in summary.groups:
        for row in group.done:
            for path in sorted((Path(row["directory"]) / "evaluations").glob("*.json")):
                found = read_record(path)
                if not isinstance(found.get("metrics"), dict) or not isinstance(found.get("n_samples"), int):
                    raise UserError(f"{path}: expected what dp-lora-evaluate wrote; remove it to go on")
                private = found.get("private_metrics", [])
                is_private |= bool(private)
                for name, value, *_ in baseline_table(found["metrics"])[1]:
                    marked = f"{name} {PRIVATE}" if name in private else name
                    words = (group.setting, str(row["seed"]), path.stem, marked)
                    lines.append((*words, f"{found['n_samples']:,}", "" if value is None else shown(value)))
    if not lines:
        return None
    columns = ("setting", "seed", "evaluation", "metric", "n", "value")
    notes = (PRIVATE_MEANS,) if is_private else ()
    return Table("Evaluations of finished runs", columns, tuple(lines), 4, notes)
