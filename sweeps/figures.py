"""The plots of a sweep, made with Altair: the page shows them live, the figure prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from sweeps import published
from sweeps.curves import Curve
from sweeps.summary import TITLES, Group, Stat, Summary, importance, number, rises, shown

Spec = dict[str, Any]
"""A Vega-Lite specification."""
Point = dict[str, Any]
"""What a mark stands for: its place, its values and what its tooltip says."""

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d3b"]
"""Told apart by colour-blind readers too (Okabe and Ito 2008)."""

PRINTED = 4
"""Plots in figure.pdf and figure.png."""

CONFIG: Spec = {
    "font": "Liberation Sans, Arial, Helvetica, sans-serif",
    "background": "#ffffff",
    "axis": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal", "gridColor": "#e6e6e6",
             "labelColor": "#333333", "titleColor": "#333333", "labelLimit": 150},
    "legend": {"orient": "top", "labelFontSize": 12, "titleFontSize": 12, "labelLimit": 320, "columns": 4,
               "symbolOpacity": 1},
    "title": {"anchor": "start", "fontSize": 14, "subtitleFontSize": 12, "subtitleColor": "#555555",
              "offset": 12},
    "range": {"category": COLOURS},
    "view": {"stroke": None},
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A plot, and what it says to whoever cannot see it."""

    name: str
    """The name of the element on the page."""
    title: str
    description: str
    plot: alt.Chart | alt.LayerChart
    """Without its size."""


def charts(summary: Summary, curves: Sequence[Curve]) -> list[Chart]:
    """All plots of a sweep: each metric along its axis, metrics against epsilon, and values over steps."""
    metrics = [name for name in summary.metrics if importance(name) < 4]
    found = [metric_chart(summary, name) for name in metrics]
    if summary.axis != "target_epsilon" and len(_epsilons(summary)) > 1:
        found += [front_chart(summary, name) for name in metrics[:2]]
    names = list(dict.fromkeys(curve.name for curve in curves))
    return found + [curve_chart([curve for curve in curves if curve.name == name]) for name in names]


def _epsilons(summary: Summary) -> set[float]:
    spent = {group.largest("epsilon") for group in summary.groups}
    return {round(epsilon, 1) for epsilon in spent if epsilon is not None and math.isfinite(epsilon)}


def metric_chart(summary: Summary, metric: str) -> Chart:
    """A metric by setting: every run, mean and standard deviation over seeds, published figures beside."""
    means: list[Point] = []
    runs: list[Point] = []
    figures: list[Point] = []
    matching = published.beside(summary.groups)
    for place, group in enumerate(summary.groups):
        at = {
            "x": place_of(summary, group),
            "series": summary.series(group) or "all",
            "setting": group.setting,
        }
        if (stat := group.stat(metric)) is None:
            continue
        means.append({**at, **_spread(stat), "epsilon": number(group.largest("epsilon"))})
        runs += [
            {**at, "value": row[metric], "seed": row["seed"]}
            for row in group.done
            if row.get(metric) is not None
        ]
        figures += [
            {**at, "value": f.value, "method": f.title, "source": published.SOURCES[f.source]}
            for f in matching.get(place, ())
            if f.metric == metric.partition("_")[0]
        ]
    axis = alt.Axis(labelAngle=0 if summary.axis else -35)
    x = alt.X("x:O", sort=places(summary), title=_axis_title(summary), axis=axis)
    several = len({point["series"] for point in means}) > 1
    *lines, squares = _means_layers(means, several, joined=summary.axis is not None)
    # A name of its own: the plots of a figure must not share what is picked.
    squares = _pickable(squares, "series", f"picked {metric}") if several else squares
    layers = [_runs_layer(runs, several), *lines, squares, *([_published_layer(figures)] if figures else [])]
    description = f"{metric} by {_axis_title(summary)}: " + "; ".join(
        f"{point['x']}{', ' + point['series'] if several else ''}: {point['shown']}" for point in means
    )
    better = "higher is better" if rises(metric) else "lower is better"
    title = alt.Title(f"{metric} ({better})", subtitle=_subtitle(summary, metric))
    plot = alt.LayerChart(layer=layers, title=title).encode(x)
    return Chart(f"metric-{metric}", metric, description, plot)


def place_of(summary: Summary, group: Group) -> str:
    """Where a group is on the axis: its number, or its setting without what is the same for all."""
    if summary.axis is not None:
        return shown(group.value(summary.axis))
    several = len({other.sweep for other in summary.groups}) > 1
    words = [*([group.sweep] if several else []), *(group.words.values() or [group.setting])]
    return " ".join(words)


def places(summary: Summary) -> list[str]:
    """The axis, in its order: numbers ascend, names are as in the sweep."""
    groups: list[Group] = list(summary.groups)
    axis = summary.axis
    if axis is not None:
        groups.sort(key=lambda group: math.inf if group.value(axis) is None else group.value(axis))
    return list(dict.fromkeys(place_of(summary, group) for group in groups))


def _axis_title(summary: Summary) -> str:
    return TITLES[summary.axis] if summary.axis is not None else "setting"


def _spread(stat: Stat) -> Point:
    std = stat.std or 0.0
    return {
        "mean": stat.mean,
        "low": stat.mean - std,
        "high": stat.mean + std,
        "shown": str(stat),
        "n": stat.n,
    }


def _subtitle(summary: Summary, metric: str) -> str:
    """The baselines in words: drawn to scale they would flatten what the settings differ in."""
    parts = []
    for end, title in (("before", "before fine-tuning"), ("real", "real images")):
        stat = Stat.of(r[f"{metric}_{end}"] for r in summary.rows if r.get(f"{metric}_{end}") is not None)
        parts += [f"{title} {number(stat.mean)}"] if stat else []
    return "; ".join(parts)


def _y(field: str) -> alt.Y:
    return alt.Y(f"{field}:Q", title=None).scale(zero=False, nice=True)


def _colour(several: bool, field: str) -> alt.Color | alt.ColorValue:
    return alt.Color(f"{field}:N", title=None, sort=None) if several else alt.ColorValue(COLOURS[0])


def _pickable(plot: alt.Chart, field: str, name: str) -> alt.Chart:
    """The plot with a legend that picks one of its colours."""
    picked = alt.selection_point(name=name, fields=[field], bind="legend")
    return plot.add_params(picked).encode(
        opacity=alt.when(picked).then(alt.value(1)).otherwise(alt.value(0.12))
    )


def _runs_layer(runs: list[Point], several: bool) -> alt.Chart:
    marks: alt.Chart = alt.Chart({"values": runs}).mark_circle(size=34, opacity=0.4)
    return marks.encode(_y("value"), _colour(several, "series"), tooltip=["setting:N", "seed:N", "value:N"])


def _means_layers(means: list[Point], several: bool, *, joined: bool) -> list[alt.Chart]:
    base = alt.Chart({"values": means}).encode(color=_colour(several, "series"))
    tips = [
        alt.Tooltip("setting:N"),
        alt.Tooltip("shown:N", title="mean ± std"),
        alt.Tooltip("n:N", title="seeds"),
        alt.Tooltip("epsilon:N"),
    ]
    line = base.mark_line(strokeWidth=2).encode(_y("mean"))
    rule = base.mark_rule(strokeWidth=2).encode(_y("low"), y2="high:Q")
    point = base.mark_point(filled=True, opacity=1, size=80, shape="square").encode(_y("mean"), tooltip=tips)
    return [*([line] if joined else []), rule, point]


def _published_layer(figures: list[Point]) -> alt.Chart:
    marks: alt.Chart = alt.Chart({"values": figures}).mark_point(
        shape="diamond", size=110, color="#555555", strokeWidth=2
    )
    return marks.encode(_y("value"), tooltip=["method:N", "value:N", "source:N"])


def front_chart(summary: Summary, metric: str) -> Chart:
    """A metric against the epsilon that was spent: what privacy costs, a point a setting."""
    points: list[Point] = []
    for group in summary.groups:
        stat, epsilon = group.stat(metric), group.largest("epsilon")
        if stat is not None and epsilon is not None and math.isfinite(epsilon):
            points.append({"epsilon": epsilon, **_spread(stat), "setting": group.setting})
    several = len(points) <= len(COLOURS)
    x = alt.X("epsilon:Q", title="epsilon spent").scale(type="log")
    base = alt.Chart({"values": points}).encode(x, color=_colour(several, "setting"))
    tips = [
        alt.Tooltip("setting:N"),
        alt.Tooltip("shown:N", title="mean ± std"),
        alt.Tooltip("epsilon:N", format=".3f"),
    ]
    rule = base.mark_rule(strokeWidth=2).encode(_y("low"), y2="high:Q")
    point = base.mark_point(filled=True, opacity=1, size=80).encode(_y("mean"), tooltip=tips)
    title = f"{metric} against epsilon"
    plot = alt.LayerChart(layer=[rule, point], title=title)
    said = "; ".join(f"epsilon {number(p['epsilon'])}: {p['shown']}" for p in points)
    return Chart(f"front-{metric}", title, f"{title} spent: {said}", plot)


CURVES = {
    "epsilon": "epsilon spent",
    "private_loss": "training loss, released inside epsilon",
    "signal_to_noise": "signal-to-noise of the noised update",
}


def curve_chart(curves: Sequence[Curve]) -> Chart:
    """A released value over the steps of one run a setting."""
    name = curves[0].name
    points = [
        {"step": step, "value": value, "setting": curve.setting}
        for curve in curves
        for step, value in zip(curve.steps, curve.values, strict=True)
    ]
    several = len(curves) > 1
    tips = [alt.Tooltip("setting:N"), alt.Tooltip("step:N"), alt.Tooltip("value:N", format=".4~g")]
    title = alt.Title(CURVES[name], subtitle="over steps, one run a setting")
    plot = alt.Chart({"values": points}, title=title).mark_line(strokeWidth=2, tooltip=True)
    plot = plot.encode(
        alt.X("step:Q", title="step"), _y("value"), color=_colour(several, "setting"), tooltip=tips
    )
    ends = "; ".join(
        f"{curve.setting}: {number(curve.values[-1])} at step {curve.steps[-1]}" for curve in curves
    )
    return Chart(
        f"steps-{name}",
        CURVES[name],
        f"{CURVES[name]} over steps; at the end {ends}",
        _pickable(plot, "setting", "picked") if several else plot,
    )


def live(chart: Chart) -> Spec:
    """A plot for the page, as wide as its place there."""
    fit = alt.AutoSizeParams(type="fit", contains="padding")
    plot = chart.plot.properties(width="container", height=280, autosize=fit, description=chart.description)
    return {**plot.to_dict(), "config": CONFIG}


def printed(found: Sequence[Chart]) -> Spec | None:
    """The first plots side by side, of fixed size; None when there is none."""
    metrics = [chart for chart in found if chart.name.startswith(("metric-", "front-"))][:PRINTED]
    if not metrics:
        return None
    plots = [chart.plot.properties(width=300, height=220) for chart in metrics]
    columns = len(plots) if len(plots) < PRINTED else 2
    return {**alt.concat(*plots, columns=columns, spacing=30).to_dict(), "config": CONFIG}


def render(spec: Spec) -> tuple[bytes, bytes]:
    """The PDF, and the PNG at 200 pixels an inch, of a specification."""
    import vl_convert

    return vl_convert.vegalite_to_pdf(spec), vl_convert.vegalite_to_png(spec, ppi=200, scale=1)


def script() -> str:
    """The JavaScript that draws the plots: vega, vega-lite and vega-embed, without anything to load."""
    import vl_convert

    return str(vl_convert.javascript_bundle(None))  # type: ignore[arg-type]  # its stub forgets the default
