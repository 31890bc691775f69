"""The plots of a sweep, as Vega-Lite specifications: the page shows them live, the figure prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sweeps import published
from sweeps.curves import Curve
from sweeps.summary import TITLES, Group, Stat, Summary, importance, number, rises, shown

Spec = dict[str, Any]

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
    spec: Spec
    """Vega-Lite without width, height and config."""


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
    means: list[Spec] = []
    runs: list[Spec] = []
    figures: list[Spec] = []
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
    x: Spec = {
        "field": "x", "type": "ordinal", "sort": places(summary), "title": _axis_title(summary),
        "axis": {"labelAngle": 0 if summary.axis else -35},
    }  # fmt: skip
    several = len({point["series"] for point in means}) > 1
    layers = [_runs_layer(runs, several), *_means_layers(means, several, joined=summary.axis is not None)]
    layers += [_published_layer(figures)] if figures else []
    description = f"{metric} by {_axis_title(summary)}: " + "; ".join(
        f"{point['x']}{', ' + point['series'] if several else ''}: {point['shown']}" for point in means
    )
    better = "higher is better" if rises(metric) else "lower is better"
    title: Spec = {"text": f"{metric} ({better})", "subtitle": _subtitle(summary, metric)}
    spec: Spec = {"title": title, "encoding": {"x": x}, "layer": layers}
    return Chart(f"metric-{metric}", metric, description, spec)


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


def _spread(stat: Stat) -> Spec:
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


def _y(field: str, title: str | None = None) -> Spec:
    return {"field": field, "type": "quantitative", "scale": {"zero": False, "nice": True}, "title": title}


def _colour(several: bool, field: str = "series") -> Spec:
    if not several:
        return {"value": COLOURS[0]}
    return {"field": field, "type": "nominal", "title": None, "sort": None}


def _runs_layer(runs: list[Spec], several: bool) -> Spec:
    tips = [{"field": name} for name in ("setting", "seed", "value")]
    return {
        "data": {"values": runs},
        "mark": {"type": "circle", "size": 34, "opacity": 0.4},
        "encoding": {"y": _y("value"), "color": _colour(several), "tooltip": tips},
    }


def _means_layers(means: list[Spec], several: bool, *, joined: bool) -> list[Spec]:
    tips: list[Spec] = [
        {"field": "setting"},
        {"field": "shown", "title": "mean ± std"},
        {"field": "n", "title": "seeds"},
        {"field": "epsilon"},
    ]
    base: Spec = {"y": _y("mean"), "color": _colour(several), "tooltip": tips}
    rule: Spec = {
        "data": {"values": means},
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {"y": _y("low"), "y2": {"field": "high"}, "color": _colour(several)},
    }
    point: Spec = {
        "data": {"values": means},
        "mark": {"type": "point", "filled": True, "opacity": 1, "size": 80, "shape": "square"},
        "encoding": base,
    }
    if several:
        point["params"] = [
            {"name": "picked", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}
        ]
        base["opacity"] = {"condition": {"param": "picked", "value": 1}, "value": 0.12}
    line: Spec = {
        "data": {"values": means},
        "mark": {"type": "line", "strokeWidth": 2},
        "encoding": {"y": _y("mean"), "color": _colour(several)},
    }
    return [*([line] if joined else []), rule, point]


def _published_layer(figures: list[Spec]) -> Spec:
    tips = [{"field": name} for name in ("method", "value", "source")]
    return {
        "data": {"values": figures},
        "mark": {"type": "point", "shape": "diamond", "size": 110, "color": "#555555", "strokeWidth": 2},
        "encoding": {"y": _y("value"), "tooltip": tips},
    }


def front_chart(summary: Summary, metric: str) -> Chart:
    """A metric against the epsilon that was spent: what privacy costs, a point a setting."""
    points: list[Spec] = []
    for group in summary.groups:
        stat, epsilon = group.stat(metric), group.largest("epsilon")
        if stat is not None and epsilon is not None and math.isfinite(epsilon):
            points.append({"epsilon": epsilon, **_spread(stat), "setting": group.setting})
    several = len(points) <= len(COLOURS)
    base: Spec = {
        "x": {"field": "epsilon", "type": "quantitative", "scale": {"type": "log"}, "title": "epsilon spent"},
        "color": _colour(several, "setting"),
    }
    tips = [
        {"field": "setting"},
        {"field": "shown", "title": "mean ± std"},
        {"field": "epsilon", "format": ".3f"},
    ]
    layers: list[Spec] = [
        {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {"y": _y("low"), "y2": {"field": "high"}}},
        {
            "mark": {"type": "point", "filled": True, "opacity": 1, "size": 80},
            "encoding": {"y": _y("mean"), "tooltip": tips},
        },
    ]
    spec: Spec = {
        "title": {"text": f"{metric} against epsilon"},
        "data": {"values": points},
        "encoding": base,
        "layer": layers,
    }
    said = "; ".join(f"epsilon {number(p['epsilon'])}: {p['shown']}" for p in points)
    return Chart(
        f"front-{metric}", f"{metric} against epsilon", f"{metric} against epsilon spent: {said}", spec
    )


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
    tips = [{"field": "setting"}, {"field": "step"}, {"field": "value", "format": ".4~g"}]
    spec: Spec = {
        "title": {"text": CURVES[name], "subtitle": "over steps, one run a setting"},
        "data": {"values": points},
        "mark": {"type": "line", "strokeWidth": 2, "tooltip": True},
        "params": [{"name": "picked", "select": {"type": "point", "fields": ["setting"]}, "bind": "legend"}],
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step"},
            "y": _y("value"),
            "color": _colour(several, "setting"),
            "opacity": {"condition": {"param": "picked", "value": 1}, "value": 0.12},
            "tooltip": tips,
        },
    }
    if not several:
        del spec["params"], spec["encoding"]["opacity"]
    ends = "; ".join(
        f"{curve.setting}: {number(curve.values[-1])} at step {curve.steps[-1]}" for curve in curves
    )
    return Chart(f"steps-{name}", CURVES[name], f"{CURVES[name]} over steps; at the end {ends}", spec)


def printed(found: Sequence[Chart]) -> Spec | None:
    """The first plots side by side, of fixed size; None when there is none."""
    metrics = [chart for chart in found if chart.name.startswith(("metric-", "front-"))][:PRINTED]
    if not metrics:
        return None
    plots = [{**chart.spec, "width": 300, "height": 220} for chart in metrics]
    columns = len(plots) if len(plots) < PRINTED else 2
    return {"concat": plots, "columns": columns, "spacing": 30, "config": CONFIG}


def render(spec: Spec) -> tuple[bytes, bytes]:
    """The PDF, and the PNG at 200 pixels an inch, of a specification."""
    import vl_convert

    return vl_convert.vegalite_to_pdf(spec), vl_convert.vegalite_to_png(spec, ppi=200, scale=1)


def script() -> str:
    """The JavaScript that draws the plots: vega, vega-lite and vega-embed, without anything to load."""
    import vl_convert

    return str(vl_convert.javascript_bundle(None))  # type: ignore[arg-type]  # its stub forgets the default
