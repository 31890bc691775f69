"""The report of a sweep: tables, figures and a page, written whole or not at all."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_lora.config.identity import is_private
from dp_lora.storage.files import private_directory, write_atomic, write_json
from sweeps import afterwards, figures, tables
from sweeps.bill import bill
from sweeps.collect import Row, collect, mixtures, write_frame
from sweeps.curves import curves
from sweeps.folders import Sweep, directories, read, read_record, seen_from_here
from sweeps.page import page
from sweeps.summary import Summary, summarise

FILES = ("report.html", "table.md", "table.tex", "table.csv", "figure.pdf", "figure.png", "runs.csv",
         "runs.parquet", "provenance.json")  # fmt: skip
"""The files of a report; the figure if a run is done, parquet if pyarrow is installed."""


def write(folder: Path) -> str:
    """Writes the report of a sweep whose jobs have ended into its folder; returns table.md.

    What cannot be compared is taken together here, and the report says so: the runs are over.
    """
    return build([read(folder)], folder, ended=True, mixed=True)


def build(sweeps: Sequence[Sweep], out: Path, *, ended: bool = False, mixed: bool = False) -> str:
    """Writes `FILES` of these sweeps together into `out`; returns the content of table.md.

    Args:
        sweeps: of `folders.find`.
        out: a folder, made when absent.
        ended, mixed: as of `collect`.

    Raises UserError as `collect` does, before anything is written.
    """
    rows = collect(sweeps, ended=ended, mixed=mixed)
    summary = summarise(rows)
    title = ", ".join(sweep.folder.resolve().name for sweep in sweeps)
    rebuild = _rebuild(sweeps, mixed=bool(mixtures(rows)))
    spent = bill(directories(sweeps)).lines()
    charts = figures.charts(summary, curves(summary.groups))
    table = tables.main_table(summary, " && ".join(rebuild.splitlines()))
    text = _markdown(title, summary, table, spent)
    content: dict[str, str | bytes] = {
        "table.md": text,
        "table.tex": f"% {'; '.join(rebuild.splitlines())}\n{table.latex()}",
        "table.csv": tables.as_csv(summary),
        "report.html": page(title, summary, charts, spent, rebuild),
    }
    drawing = figures.printed(charts)
    if drawing is not None:
        content["figure.pdf"], content["figure.png"] = figures.render(drawing)
    if not out.is_dir():
        private_directory(out)
    for name, value in content.items():
        write_atomic(out / name, value, mode=0o600)
    write_json(out / "provenance.json", provenance(sweeps, rebuild), mode=0o600)
    write_frame(rows, out / "runs.csv")
    return text


def provenance(sweeps: Sequence[Sweep], rebuild: str) -> dict[str, Any]:
    """Where the numbers come from: commands, and each code version, package, machine and time of the runs."""
    paths = [directory / "provenance.json" for directory in directories(sweeps)]
    records = [read_record(path) for path in paths if path.exists()]

    def different(name: str) -> list[Any]:
        found = (record.get(name) for record in records)
        return [
            json.loads(text) for text in dict.fromkeys(json.dumps(value, sort_keys=True) for value in found)
        ]

    return {
        "commands": rebuild.splitlines(),
        "runs": len(records),
        "git": different("git"),
        "versions": different("versions"),
        "hardware": different("hardware"),
        "start": min((record["start"] for record in records if record.get("start")), default=None),
        "end": max((record["end"] for record in records if record.get("end")), default=None),
    }


def _rebuild(sweeps: Sequence[Sweep], *, mixed: bool) -> str:
    """The commands that lead here from nothing, one a line, without where files lay on one machine."""
    words = ["python", "-m", "sweeps", "report", *(str(seen_from_here(sweep.folder)) for sweep in sweeps)]
    commands = [_without_places(sweep.command) for sweep in sweeps if sweep.command is not None]
    return "\n".join([*commands, shlex.join([*words, *(["--mixed"] if mixed else [])])])


def _without_places(command: str) -> str:
    """A `dp-lora` command without where files lie, and without the values of private settings.

    A page is there to be shown, and its owner knows what belongs in their place.
    """
    words = [word for word in shlex.split(command) if not word.startswith("paths.")]
    return shlex.join(f"{word.partition('=')[0]}=..." if is_private(word) else word for word in words)


def _markdown(title: str, summary: Summary, table: tables.Table, spent: Sequence[str]) -> str:
    further, published = tables.other_metrics(summary), tables.published_table(summary)
    evaluated = afterwards.evaluations(summary)
    bill_lines = "\n".join(f"- {line}" for line in spent)
    parts = [f"## {title}: {summary.counted} runs", table.markdown(), "### Privacy bill", bill_lines]
    if further is not None:
        parts += ["### Further metrics", further.markdown()]
    if published is not None:
        parts += ["### Published figures", published.markdown()]
    if evaluated is not None:
        parts += ["### Evaluated afterwards", evaluated.markdown()]
    odd = [f"- {_said(row)}" for row in summary.rows if row["state"] != "done"]
    return "\n\n".join([*parts, *(["### Runs that are not done", "\n".join(odd)] if odd else [])]) + "\n"


def _said(row: Row) -> str:
    return f"{row['cell']}: {row['state']}" + (f", {row['error']}" if row["error"] else "")
