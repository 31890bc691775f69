"""The state of the runs of sweeps: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.folders import Cell, Sweep, is_run, read_record
from sweeps.summary import number

if TYPE_CHECKING:
    from rich.console import RenderableType

SIGNS = ("privacy.json", "metrics.jsonl", "status.json")
"""Files that a running job writes again and again."""

STATES = ("running", "failed", "waiting", "done")
"""In the order in which they are shown."""


def look(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a cell: `cell`, `state` (one of `STATES`), `progress`, `epsilon`, `last_sign_s` and `reason`.

    `progress` is the stage and the steps of a training; `last_sign_s` the seconds since a running job wrote
    anything: a job that was killed says nothing any more.
    """
    return [_cell(sweep, cell) for cell in sweep.cells]


def _cell(sweep: Sweep, cell: Cell) -> dict[str, Any]:
    directory = cell.directory
    words = " ".join(sweep.asked(cell)) if sweep.launched else directory.name
    row: dict[str, Any] = dict.fromkeys(("progress", "epsilon", "last_sign_s", "reason"))
    row |= {"cell": words or "defaults", "state": "waiting"}
    status = _read(directory / "status.json") if is_run(directory) else {}
    if sweep.failure(cell).exists() and status.get("state") != "done":
        return row | {"state": "failed", "reason": status.get("error") or "see its log"}
    if not status:
        return row
    privacy = _read(directory / "privacy.json")
    row |= {"state": status["state"], "reason": status.get("error"), "epsilon": privacy.get("epsilon")}
    if row["state"] == "running":
        steps = f"{privacy['steps']} of {privacy['planned_steps']}" if "planned_steps" in privacy else ""
        row["progress"] = " ".join(filter(None, (status.get("stage"), steps)))
        row["last_sign_s"] = time.time() - max(
            path.stat().st_mtime for name in SIGNS if (path := directory / name).exists()
        )
    return row


def _read(path: Path) -> dict[str, Any]:
    return read_record(path) if path.exists() else {}


def counted(rows: Sequence[dict[str, Any]]) -> str:
    """How many of the cells are in which state.

    >>> counted([{"state": "done"}, {"state": "failed"}, {"state": "done"}])
    '3 cells: 1 failed, 2 done'
    """
    states = Counter(row["state"] for row in rows)
    return f"{len(rows)} cells: " + ", ".join(f"{states[s]} {s}" for s in STATES if states[s])


def plain(sweeps: Sequence[Sweep]) -> str:
    """The state of all cells as lines of text, the finished ones counted only."""
    lines = []
    for sweep in sweeps:
        rows = look(sweep)
        lines.append(f"{sweep.folder}  {counted(rows)}")
        for row in _shown(rows):
            said = [row["state"], row["progress"], _epsilon(row), _sign(row), row["reason"]]
            lines.append(f"  {row['cell']}: " + ", ".join(filter(None, said)))
    return "\n".join(lines)


def _shown(rows: Sequence[dict[str, Any]], most: int | None = None) -> list[dict[str, Any]]:
    """The rows to show one by one: running and failed ones first, then the others while there is room."""
    ordered = sorted(rows, key=lambda row: STATES.index(row["state"]))
    if most is None:
        return [row for row in ordered if row["state"] != "done"]
    return ordered[:most]


def _epsilon(row: dict[str, Any]) -> str:
    return "" if row["epsilon"] is None else f"epsilon {number(float(row['epsilon']))}"


def _sign(row: dict[str, Any]) -> str:
    seconds = row["last_sign_s"]
    if seconds is None:
        return ""
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"


COLOURS = {"running": "cyan", "failed": "red", "waiting": "dim", "done": "green"}


def table(sweeps: Sequence[Sweep], height: int) -> RenderableType:
    """The state of all cells for a terminal of `height` lines."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    room = max(4, (height - 2) // len(sweeps) - 6)
    for sweep in sweeps:
        rows = look(sweep)
        title = Text(f"{counted(rows)}  {sweep.folder}", no_wrap=True, overflow="ellipsis")
        shown = Table(title=title, title_justify="left", expand=True)
        for name in ("cell", "state", "progress", "epsilon", "last sign", "reason"):
            shown.add_column(name, overflow="fold", ratio=3 if name in ("cell", "reason") else None)
        for row in _shown(rows, room):
            state = Text(row["state"], style=COLOURS[row["state"]])
            shown.add_row(Text(row["cell"]), state, row["progress"], _epsilon(row).removeprefix("epsilon "),
                          _sign(row), Text(row["reason"] or ""))  # fmt: skip
        parts.append(shown)
        if len(rows) > room:
            parts.append(Text(f"... and {len(rows) - room} more"))
    return Group(
        *parts, Text(datetime.now().strftime("%H:%M:%S, Ctrl-C ends this, not the sweep"), style="dim")
    )


def watch(find: Callable[[], Sequence[Sweep]], every_s: float) -> None:
    """Shows the table of the sweeps on the terminal, anew every `every_s` seconds, until all have ended.

    `find` is asked each time, since sweeps begin and runs are made meanwhile.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            sweeps = find()
            live.update(table(sweeps, console.height), refresh=True)
            states = {row["state"] for sweep in sweeps for row in look(sweep)}
            if not states & {"running", "waiting"}:
                return
            time.sleep(every_s)


def is_terminal() -> bool:
    """Whether whoever reads the output can see it change."""
    return sys.stdout.isatty()
