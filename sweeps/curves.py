"""Released values over the steps of runs, from metrics.jsonl, thinned out for a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dp_lora.errors import UserError
from dp_lora.storage.files import read_lines
from sweeps.collect import Row
from sweeps.summary import Group

NAMES = ("epsilon", "private_loss", "signal_to_noise")
"""The values that are drawn; all of them may leave a run (`dp_lora.records.tracker.RELEASED`)."""

MOST_POINTS = 60
MOST_RUNS = 24


@dataclass(frozen=True)
class Curve:
    """One value over the steps of one run."""

    name: str
    setting: str
    steps: list[int]
    values: list[float]


def curves(groups: Sequence[Group]) -> list[Curve]:
    """The curves of one run of each of the first settings: the first that is done, or else has begun.

    Raises UserError when a record of metrics is damaged.
    """
    found = []
    for group in groups[:MOST_RUNS]:
        row = next(iter(group.done), None) or next((r for r in group.rows if r["state"] != "missing"), None)
        if row is not None:
            found += of_run(row)
    return found


def of_run(row: Row) -> list[Curve]:
    """The curves of a run; none of a value that it did not log."""
    try:
        lines = [
            line
            for line in read_lines(Path(row["directory"]) / "metrics.jsonl")
            if line["stage"] == "finetune"
        ]
    except (ValueError, KeyError) as error:
        raise UserError(f"{row['directory']}: metrics.jsonl is damaged ({error})") from error
    found = []
    for name in NAMES:
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        stride = max(1, len(points) // MOST_POINTS)
        # The last point is what was spent.
        kept = points[::stride] + (points[-1:] if points and (len(points) - 1) % stride else [])
        if len(kept) > 1:
            steps, values = zip(*kept, strict=True)
            found.append(Curve(name, row["setting"], list(steps), list(values)))
    return found
