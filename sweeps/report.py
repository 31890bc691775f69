"""The table of a sweep, in Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_lora.files import read_json, write_atomic
from sweeps.collect import PRIVACY, collect

_NOT_METRICS = {
    "cell", "state", "error", "directory", "n_samples", "seed", "reference", "device", "seconds", *PRIVACY,
}  # fmt: skip


def write(folder: Path) -> str:
    """Writes report.md and report.csv of a sweep whose jobs have ended; returns the Markdown."""
    rows = collect(folder, ended=True)
    text = markdown(rows, read_json(folder / "sweep.json")["command"])
    write_atomic(folder / "report.md", text)
    write_atomic(folder / "report.csv", as_csv(rows))
    return text


def markdown(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """A table with a line a cell, and under it what its numbers mean and the command that rebuilds it."""
    metrics = metric_names(rows)
    columns = [
        "cell",
        "state",
        "epsilon",
        "delta",
        "noise_multiplier",
        *metrics,
        "n_samples",
        "seed",
        "seconds",
    ]
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [_line([_shown(row.get(name)) for name in columns]) for row in rows]
    bases = {(row["accountant"], row["adjacency"]) for row in rows if row.get("accountant")}
    lines += ["", *(f"epsilon by {accountant}, {adjacency}" for accountant, adjacency in sorted(bases))]
    lines += [f"{row['cell']}: {row['error']}" for row in rows if row.get("error")]
    return "\n".join([*lines, f"rebuilt by: {command}", ""])


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """All values of all rows, with a first line of names."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics of all rows without those that are another one's baseline."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in _NOT_METRICS))
    return [name for name in names if not any(name.startswith(f"{other}_") for other in names)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
