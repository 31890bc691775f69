"""The tables of a sweep, as in a paper: one line a setting, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sweeps import published
from sweeps.collect import mixtures
from sweeps.published import MARK, Figure
from sweeps.summary import Group, Stat, Summary, importance, number, rises, shown

PRIVATE = "‡"
PRIVATE_MEANS = "‡ computed on private data; releasing it is not covered by epsilon"
BASELINES = {"before": "before fine-tuning", "real": "real images"}


@dataclass(frozen=True)
class Table:
    """Words in lines and columns."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1
    """How many of the first columns name the line; the others hold numbers."""
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """With the notes under it."""
        aligned = ["---"] * self.labels + ["---:"] * (len(self.columns) - self.labels)
        lines = [_line(words) for words in (self.columns, aligned, *self.rows)]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])

    def latex(self) -> str:
        """For the packages booktabs and threeparttable."""
        form = "l" * self.labels + "r" * (len(self.columns) - self.labels)
        body = "\n".join(f"    {' & '.join(map(_tex, row))} \\\\" for row in self.rows)
        notes = "\n".join(f"    \\item {_tex(note)}" for note in self.notes)
        return (
            "\\begin{table}\n  \\centering\n  \\begin{threeparttable}\n"
            f"  \\caption{{{_tex(self.caption)}}}\n  \\begin{{tabular}}{{{form}}}\n    \\toprule\n"
            f"    {' & '.join(map(_tex, self.columns))} \\\\\n    \\midrule\n{body}\n    \\bottomrule\n"
            "  \\end{tabular}\n  \\begin{tablenotes}\\footnotesize\n"
            f"{notes}\n  \\end{{tablenotes}}\n  \\end{{threeparttable}}\n\\end{{table}}\n"
        )


def main_table(summary: Summary, command: str | None) -> Table:
    """A line a setting, then what the metrics are of the model before and of real images."""
    named = _label_columns(summary)
    metrics = [name for name in summary.metrics if importance(name) < 4]
    matching = published.beside(summary.groups)
    titles = list(dict.fromkeys(_column(f, summary) for found in matching.values() for f in found))
    columns = [*named, "runs", "epsilon", "delta", "sigma", "trained", *(marked(m, summary) for m in metrics),
               *titles, "seconds", "peak GB"]  # fmt: skip
    rows = []
    for place, group in enumerate(summary.groups):
        beside = {_column(f, summary): f"{f.value:,g}" for f in matching.get(place, [])}
        rows.append((
            *labels(group, named), f"{len(group.done)} of {len(group.rows)}", *_privacy(group),
            number_of_parameters(group), *(_stat(group.stat(m)) for m in metrics),
            *(beside.get(title, "") for title in titles), seconds(group), _gigabytes(group),
        ))  # fmt: skip
    rows += _baselines(summary, metrics, len(named), len(titles))
    used = {f for found in matching.values() for f in found}
    return Table(
        caption=f"{summary.counted} runs are done",
        columns=tuple(columns),
        rows=tuple(rows),
        labels=len(named),
        notes=notes(summary, used, command),
    )


def other_metrics(summary: Summary) -> Table | None:
    """The metrics that the main table leaves out; None when there are none."""
    metrics = [name for name in summary.metrics if importance(name) >= 4]
    if not metrics:
        return None
    named = _label_columns(summary)
    rows = [(*labels(g, named), *(_stat(g.stat(m)) for m in metrics)) for g in summary.groups]
    return Table("Further metrics", (*named, *(marked(m, summary) for m in metrics)), tuple(rows), len(named))


def published_table(summary: Summary) -> Table | None:
    """The published figures on the private sets of the sweep, a line a method; None when there are none."""
    data = dict.fromkeys(group.value("data") for group in summary.groups)
    figures = [figure for name in data for figure in published.on(name)]
    if not figures:
        return None
    columns = sorted({_place(f) for f in figures})
    by_line: dict[tuple[str, str, str], dict[tuple[int, float], str]] = {}
    for f in figures:
        line = by_line.setdefault((f.data, f.method + (MARK if f.broken else ""), f.source), {})
        line[_place(f)] = f"{f.value:,g}"
    rows = [
        (name, method, *(values.get(place, "") for place in columns), source)
        for (name, method, source), values in by_line.items()
    ]
    parts = [
        f"{name} is a part of {published.FULL_SETS[name]}" for name in data if name in published.FULL_SETS
    ]
    notes = [
        "FID is by Inception features against the training images, as each source computes it: compare it "
        "with a measured fid only, never with fd_*; epsilon is as claimed there",
        *([published.MARK_MEANS] if any(f.broken for f in figures) else []),
        *parts,
        *(f"{title}: {published.SOURCES[title]}" for title in dict.fromkeys(f.source for f in figures)),
    ]
    titles = [_METRICS[_ORDER[metric]].format(shown(epsilon)) for metric, epsilon in columns]
    return Table("Published figures", ("set", "method", *titles, "source"), tuple(rows), 2, tuple(notes))


_METRICS = {
    "accuracy": "accuracy at epsilon {}",
    "fid": "FID at epsilon {}",
    "trainable_parameters": "trained",
    "actual_epsilon": "what epsilon {} may be",
}
_ORDER = list(_METRICS)


def _place(figure: Figure) -> tuple[int, float]:
    return _ORDER.index(figure.metric), figure.epsilon or 0.0


def runs_table(summary: Summary) -> Table:
    """A line a run, whatever became of it."""
    rows = tuple(
        (row["cell"], row["state"], row["error"] or "", _steps(row), _short(row["epsilon"]),
         number(row["seconds"]), row["directory"])
        for row in summary.rows
    )  # fmt: skip
    return Table("Every run", ("run", "state", "reason", "steps", "epsilon", "seconds", "directory"), rows, 3)


def as_csv(summary: Summary) -> str:
    """The numbers of the main table and of the further metrics: mean, std and n each in a column."""
    named = _label_columns(summary)
    text = io.StringIO()
    records = [_record(group, labels(group, named), named, summary) for group in summary.groups]
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(group: Group, labelled: Sequence[str], named: Sequence[str], summary: Summary) -> dict[str, Any]:
    record: dict[str, Any] = dict(zip(named, labelled, strict=True))
    record |= {"runs": len(group.rows), "done": len(group.done), "epsilon": group.largest("epsilon")}
    record |= {
        name: group.value(name) for name in ("delta", "accountant", "adjacency", "trainable_parameters")
    }
    for name in (*summary.metrics, "noise_multiplier", "seconds"):
        stat = group.stat(name)
        record[name] = stat and stat.mean
        record[f"{name}_std"] = stat and stat.std
        record[f"{name}_n"] = stat.n if stat else 0
    record["peak_memory_bytes"] = group.largest("peak_memory_bytes")
    for figure in (f for f in published.figures() if f.metric in ("fid", "accuracy")):
        if figure.matches(group):
            source = re.sub(r"\W+", "_", figure.source).lower()
            record[f"published_{figure.metric}_{source}"] = figure.value
    return record


def notes(summary: Summary, used: set[Figure], command: str | None) -> tuple[str, ...]:
    """Notes on what the numbers of a table mean, and the command that builds it again."""
    done = [row for row in summary.rows if row["state"] == "done"]
    lines = []
    if not summary.complete:
        lines.append(f"partial: {summary.counted} runs are done; means are over those")
    bases = {(row["accountant"], row["adjacency"]) for row in done if row["accountant"] not in (None, "none")}
    lines += [f"epsilon at the delta beside it, by {by}, {adjacency}" for by, adjacency in sorted(bases)]
    if any(row["reproducible_noise"] for row in done):
        lines.append("none: no guarantee, the noise of these runs came from a seed")
    seeds = sorted({row["seed"] for row in done if row["seed"] is not None})
    if len(seeds) > 1:
        lines.append(f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}")
    elif seeds:
        lines.append(f"one run a setting, seed {seeds[0]}")
    lines += _measured(done)
    if any(row["private_metrics"] for row in done):
        lines.append(PRIVATE_MEANS)
    if any(figure.broken for figure in used):
        lines.append(published.MARK_MEANS)
    lines += [f"published, {name}: {published.SOURCES[name]}" for name in sorted({f.source for f in used})]
    lines += [f"mixed {what}: {', '.join(values)}" for what, values in mixtures(summary.rows).items()]
    lines += [f"code {code}" for code in sorted({row["code"] for row in done if row["code"]})]
    return (*lines, f"rebuilt by: {command}") if command else tuple(lines)


def _measured(done: Sequence[dict[str, Any]]) -> list[str]:
    """n, reference and extractors of the metrics."""
    said = dict.fromkeys(
        (row["data"], row["n_samples"], row["reference"], row["extractors"])
        for row in done
        if row["n_samples"]
    )
    return [
        f"metrics on {data}: {n:,} generated images against {reference}" + (f"; {by}" if by else "")
        for data, n, reference, by in said
    ]


def marked(metric: str, summary: Summary) -> str:
    """A metric's name with an arrow to what is better, and a mark when private data went into it."""
    private = any(metric in (row["private_metrics"] or "").split() for row in summary.rows)
    return f"{metric} {'↑' if rises(metric) else '↓'}{PRIVATE if private else ''}"


def _label_columns(summary: Summary) -> list[str]:
    """The names of the choices that the settings are made of, or `setting` where they are not words."""
    several = ["sweep"] if len({group.sweep for group in summary.groups}) > 1 else []
    names = list(dict.fromkeys(name for group in summary.groups for name in group.words))
    plain = all(group.setting == "defaults" or group.words for group in summary.groups)
    return [*several, *(names if names and plain and len(names) <= 4 else ["setting"])]


def labels(group: Group, named: Sequence[str]) -> list[str]:
    """The values of a group for these columns of `_label_columns`."""
    return [
        group.sweep if name == "sweep" else group.setting if name == "setting" else group.words.get(name, "")
        for name in named
    ]


def _column(figure: Figure, summary: Summary) -> str:
    """The column of a published figure: of all ranks or draws together where those are the lines."""
    if figure.rank is not None and figure.metric == "fid" and summary.axis == "rank":
        return f"LoRA FID{MARK if figure.broken else ''}, published"
    if figure.noise_multiplicity is not None and summary.axis == "noise_multiplicity":
        return f"DPDM {figure.metric.replace('fid', 'FID')}, published"
    return f"{figure.title}, published"


def _privacy(group: Group) -> tuple[str, str, str]:
    epsilon, sigma = group.largest("epsilon"), group.stat("noise_multiplier")
    if epsilon is not None and math.isinf(epsilon):
        return "inf", "", "0"
    delta = group.value("delta")
    seeded = any(row["reproducible_noise"] for row in group.done)
    shown_epsilon = "none" if seeded else _short(epsilon)
    return shown_epsilon, "" if delta is None else f"{delta:g}", number(sigma.mean if sigma else None)


def _baselines(
    summary: Summary, metrics: Sequence[str], named: int, published_columns: int
) -> list[tuple[str, ...]]:
    """The same metrics of the model before fine-tuning and of real images, for each private set."""
    done = [row for row in summary.rows if row["state"] == "done"]
    data = list(dict.fromkeys(row["data"] for row in done))
    found = []
    for name in data:
        for end, title in BASELINES.items():
            stats = [
                Stat.of(
                    r[f"{m}_{end}"] for r in done if r["data"] == name and r.get(f"{m}_{end}") is not None
                )
                for m in metrics
            ]
            if any(stats):
                label = title if len(data) == 1 else f"{title}, {name}"
                empty = [""] * (named - 1 + 5)
                found.append((label, *empty, *map(_stat, stats), *[""] * (published_columns + 2)))
    return found


def _stat(stat: Stat | None) -> str:
    return "" if stat is None else str(stat)


def number_of_parameters(group: Group) -> str:
    """The number of parameters that a group trains."""
    return number(group.value("trainable_parameters")).split(".")[0]


def seconds(group: Group) -> str:
    """Mean of all stages of a run."""
    stat = group.stat("seconds")
    return "" if stat is None else f"{stat.mean:,.0f}"


def _gigabytes(group: Group) -> str:
    largest = group.largest("peak_memory_bytes")
    return "" if largest is None else f"{largest / 1e9:.2f}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _steps(row: dict[str, Any]) -> str:
    if row["steps"] is None:
        return ""
    return f"{row['steps']} of {row['planned_steps']}" if row["planned_steps"] else str(row["steps"])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


_TEX = {
    "\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{",
    "}": "\\}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "↑": "$\\uparrow$",
    "↓": "$\\downarrow$", "†": "$^\\dagger$", "‡": "$^\\ddagger$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)
