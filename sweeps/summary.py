"""Runs that differ in their seed only, as one setting: means, deviations, and what the settings differ in."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dp_lora.records.manifest import RELEASED_METRICS
from sweeps.collect import SETTINGS, Row, metric_names

NUMERIC = ("rank", "noise_multiplicity", "given_noise_multiplier", "target_epsilon", "max_grad_norm",
           "expected_batch_size", "learning_rate")  # fmt: skip
"""Settings that an axis can be made of."""

TITLES = {
    "rank": "LoRA rank r", "noise_multiplicity": "noise multiplicity k", "target_epsilon": "epsilon",
    "given_noise_multiplier": "noise multiplier sigma", "max_grad_norm": "clipping norm C",
    "expected_batch_size": "expected batch size", "learning_rate": "learning rate", "trainable": "trained",
    "data": "private set", "model": "model", "experiment": "experiment",
}  # fmt: skip
"""The title of a setting for a reader."""

SYMBOLS = {
    "rank": "r", "noise_multiplicity": "k", "target_epsilon": "epsilon", "given_noise_multiplier": "sigma",
    "max_grad_norm": "C", "expected_batch_size": "batch", "learning_rate": "rate",
}  # fmt: skip
"""The letters of the paper; what has none speaks for itself."""


@dataclass(frozen=True)
class Stat:
    """A metric over the seeds of a setting."""

    mean: float
    std: float | None
    """The standard deviation of the sample (n - 1); None for a single run."""
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Stat | None:
        """The statistics of these values; None if there are none."""
        known = [float(value) for value in values]
        if not known:
            return None
        std = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), std, len(known))

    def __str__(self) -> str:
        if self.std is None or not math.isfinite(self.mean):
            return number(self.mean)
        digits = decimals(self.mean)
        return f"{self.mean:,.{digits}f} ± {self.std:,.{digits}f}"


def number(value: float | None) -> str:
    """A number for a table: four digits, or three decimals of what is below ten; nothing for None.

    >>> [number(x) for x in (0.91234, 12.345, 1234567.0, 1e-05, None, math.inf)]
    ['0.912', '12.35', '1,234,567', '1e-05', '', 'inf']
    """
    if value is None:
        return ""
    if not math.isfinite(value) or (value and abs(value) < 1e-3):
        return f"{value:.3g}"
    return f"{value:,.{decimals(value)}f}"


def decimals(value: float) -> int:
    """How many decimals of `value` are shown."""
    return 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0


@dataclass(frozen=True)
class Group:
    """The runs of one setting, over its seeds."""

    sweep: str
    setting: str
    rows: tuple[Row, ...]

    @property
    def done(self) -> list[Row]:
        """The runs that have ended well."""
        return [row for row in self.rows if row["state"] == "done"]

    @property
    def words(self) -> dict[str, str]:
        """The setting by the names of its choices; a value may have spaces."""
        pairs = (word.partition("=") for word in re.split(r" (?=[\w.@/+~]+=)", self.setting))
        return {name: value for name, sign, value in pairs if sign}

    def value(self, name: str) -> Any:
        """The value of a setting, or of a field that all runs share; None if no run has it yet."""
        return next((row[name] for row in self.rows if row.get(name) is not None), None)

    def stat(self, name: str) -> Stat | None:
        """A metric, or another number, over the runs that are done."""
        return Stat.of(row[name] for row in self.done if row.get(name) is not None)

    def largest(self, name: str) -> float | None:
        """The largest value among the runs that are done."""
        return max((row[name] for row in self.done if row[name] is not None), default=None)

    @property
    def private(self) -> bool:
        """Whether its runs have a finite epsilon and noise that nobody can take away."""
        epsilon = self.largest("epsilon")
        seeded = any(row["reproducible_noise"] for row in self.done)
        return epsilon is not None and math.isfinite(epsilon) and not seeded


@dataclass(frozen=True)
class Summary:
    """The settings of some sweeps, in the order of their first cells."""

    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    varying: tuple[str, ...]
    """The names of `SETTINGS`, without the seed, that the groups differ in; what an experiment implies is
    left out where experiments differ."""

    @property
    def metrics(self) -> list[str]:
        """The metrics, without those that are baselines of another: accuracy first, then distances."""
        names = metric_names([row for row in self.rows if row["state"] == "done"])
        return sorted(names, key=lambda name: (importance(name), names.index(name)))

    @property
    def counted(self) -> str:
        """How many of the runs are done."""
        done = sum(row["state"] == "done" for row in self.rows)
        return f"{done} of {len(self.rows)}"

    @property
    def complete(self) -> bool:
        """Whether all runs are done."""
        return all(row["state"] == "done" for row in self.rows)

    @property
    def axis(self) -> str | None:
        """The number that the settings differ in and a plot goes along; None when they are only names."""
        if "trainable" in self.varying:
            return None
        numeric = [name for name in NUMERIC if name in self.varying]
        return max(numeric, key=self._distinct, default=None)

    def _distinct(self, name: str) -> int:
        return len({group.value(name) for group in self.groups})

    def series(self, group: Group) -> str:
        """The settings in which a group differs from others at its place of the axis; empty if in none."""
        others = [name for name in self.varying if name != self.axis]
        if self.axis is None:
            return ""
        values = [(SYMBOLS.get(name), shown(group.value(name))) for name in others]
        return ", ".join(f"{symbol} = {value}" if symbol else value for symbol, value in values)


_FIRST = ("accuracy", "fid", "fd_", "kid")


def importance(metric: str) -> int:
    """Below 4 for what the main table shows: accuracies, then Frechet distances, then kernel distances."""
    return next((place for place, start in enumerate(_FIRST) if metric.startswith(start)), len(_FIRST))


def rises(metric: str) -> bool:
    """Whether more of this metric is better."""
    return not metric.removeprefix(RELEASED_METRICS).startswith(("fid", "fd", "kid"))


def summarise(rows: Sequence[Row]) -> Summary:
    """The rows by setting."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["sweep"], row["setting"]), []).append(row)
    groups = tuple(Group(sweep, setting, tuple(mine)) for (sweep, setting), mine in found.items())
    return Summary(tuple(rows), groups, _varying(groups))


def _varying(groups: Sequence[Group]) -> tuple[str, ...]:
    """The settings that differ within an experiment, and the private set or else the experiment."""
    by_experiment: dict[str, list[Group]] = {}
    for group in groups:
        if group.value("experiment") is not None:
            by_experiment.setdefault(group.value("experiment"), []).append(group)

    def differs(name: str, among: Sequence[Group]) -> bool:
        return len({group.value(name) for group in among}) > 1

    found = [n for n in SETTINGS if n != "seed" and any(differs(n, mine) for mine in by_experiment.values())]
    known = [group for mine in by_experiment.values() for group in mine]
    if "data" not in found and differs("data", known):
        found.append("data")
    elif len(by_experiment) > 1:
        found.append("experiment")
    return tuple(found)


def shown(value: Any) -> str:
    """A setting for a reader.

    >>> [shown(x) for x in (10.0, 1e-05, math.inf, None, "lora", 8)]
    ['10', '1e-05', 'inf', 'none', 'lora', '8']
    """
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
