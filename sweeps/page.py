"""report.html: one self-contained page with the tables, the plots and the generated images of a sweep."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_lora.errors import UserError
from dp_lora.records.provenance import now
from sweeps import afterwards, tables
from sweeps.figures import Chart, live, script
from sweeps.summary import Summary

MOST_IMAGES = 24
IMAGE_SIDE = 420
"""The largest side of a shown grid of samples, in pixels."""
IMAGE_BYTES = 800_000
"""The size of all grids together, at most; the page stays below 3 MB."""


@dataclass(frozen=True)
class Sample:
    """A grid of generated images, ready for the page."""

    setting: str
    data: str
    """As a data: address."""
    width: int
    height: int


def page(title: str, summary: Summary, charts: Sequence[Chart], bill: Sequence[str], rebuild: str) -> str:
    """The HTML of a report.

    Args:
        title: of the sweep.
        summary: its settings.
        charts: of `figures.charts`.
        bill: lines on what all runs together spend.
        rebuild: the commands that build this again.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("sweeps", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    content: dict[str, Any] = {
        "main": tables.main_table(summary, None),
        "further": tables.other_metrics(summary),
        "published": tables.published_table(summary),
        "evaluations": afterwards.evaluations(summary),
        "runs": tables.runs_table(summary),
        "charts": charts,
        "bill": list(bill),
        "samples": samples(summary),
    }
    headings = {
        "table": "Results", "further": "Further metrics", "plots": "Plots", "bill": "Privacy bill",
        "published": "Published figures", "evaluations": "Evaluated afterwards",
        "samples": "Generated images", "runs": "Every run", "rebuild": "How to build this again",
    }  # fmt: skip
    there = {**content, "table": True, "plots": charts, "rebuild": True}
    specifications = {chart.name: live(chart) for chart in charts}
    return environment.get_template("page.html.j2").render(
        **content,
        title=title,
        lead=_lead(summary),
        sections=[(name, heading) for name, heading in headings.items() if there[name]],
        cards=_cards(summary),
        partial=None if summary.complete else _partial(summary),
        rebuild=rebuild,
        written=now(),
        # Of the package, not of a run: nothing in it came from a user.
        script=Markup(script().replace("</script", "<\\/script")) if charts else "",
        specifications=specifications,
    )


def _lead(summary: Summary) -> str:
    done = [row for row in summary.rows if row["state"] == "done"]
    data = ", ".join(dict.fromkeys(row["data"] for row in done if row["data"]))
    models = ", ".join(dict.fromkeys(row["model"] for row in done if row["model"]))
    if not done:
        return "No run is done yet"
    return f"Private fine-tuning of {models} on {data}" if data else "Runs whose settings are not known"


def _partial(summary: Summary) -> str:
    states = [row["state"] for row in summary.rows]
    counted = ", ".join(f"{states.count(s)} {s}" for s in ("running", "failed", "missing") if s in states)
    return (
        f"A partial report: {summary.counted} runs are done, {counted}. Means are over those that are done."
    )


def _cards(summary: Summary) -> list[tuple[str, str, str]]:
    done = [row for row in summary.rows if row["state"] == "done"]
    found = [("Runs", summary.counted, f"{len(summary.groups)} settings")]
    private = [row for row in done if row["delta"] and row["epsilon"] < math.inf]
    if private:
        least, most = (f"{end(row['epsilon'] for row in private):.4g}" for end in (min, max))
        spread = least if least == most else f"{least} to {most}"
        bases = ", ".join(sorted({row["adjacency"] for row in private if row["adjacency"]}))
        by = ", ".join(sorted({row["accountant"] for row in private if row["accountant"]}))
        deltas = ", ".join(f"{delta:g}" for delta in sorted({row["delta"] for row in private}))
        found.append(("Epsilon of a run", spread, f"delta {deltas}; by {by}; {bases}"))
        if any(row["reproducible_noise"] for row in private):
            found.append(("No guarantee", "seeded noise", "whoever knows the seed can take the noise away"))
    measured = dict.fromkeys((row["n_samples"], row["reference"]) for row in done if row["n_samples"])
    if measured:
        n, reference = next(iter(measured))
        more = "and others" if len(measured) > 1 else ""
        found.append(("Measured on", f"{n:,} generated images", f"against {reference} {more}".strip()))
    seconds = sum(row["seconds"] for row in done if row["seconds"] is not None)
    if seconds:
        devices = ", ".join(sorted({row["device"] for row in done if row["device"]}))
        found.append(("Time of all runs", f"{seconds / 3600:.1f} h", devices))
    return found


def samples(summary: Summary) -> list[Sample]:
    """The grids of one finished run of each of the first settings, made small enough for the page.

    After them those that were drawn from the runs afterwards.
    """
    grids: list[tuple[str, Path]] = []
    for group in summary.groups:
        paths = [path for row in group.done if (path := Path(row["directory"]) / "samples.png").exists()]
        grids += [(group.setting, path) for path in paths[:1]]
    found: list[Sample] = []
    left = IMAGE_BYTES
    for name, path in [*grids, *afterwards.sets(summary)][:MOST_IMAGES]:
        sample = _sample(name, path)
        left -= len(sample.data)
        if left < 0:
            break
        found.append(sample)
    return found


def _sample(setting: str, path: Path) -> Sample:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as an image; make it again, or remove it") from error
    else:
        image.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        image.save(content, "WEBP", quality=85, method=6)
        width, height = image.size
    text = base64.b64encode(content.getvalue()).decode()
    return Sample(setting, f"data:image/webp;base64,{text}", width, height)
