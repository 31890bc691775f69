"""Published figures to stand beside: published.csv, with where each is from and whether its guarantee holds.

The code released with the DP-LoRA paper clips each of the k draws of an image by itself, so one image moves
the sum by up to k C under the noise of C; DPImageBench took that over. Their figures are marked `broken`. Of
the other methods the guarantee is as their authors claim it; nobody checked it here.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sweeps.summary import Group

SOURCES = {
    "DP-LDM repository": "ParkLabML/DP-LDM, data/dp_lora_hyperparameters/results.md (no multiplicity, "
    "70 epochs)",
    "DPDM paper": "Dockhorn et al. 2023, Differentially Private Diffusion Models (trained from scratch)",
    "DPImageBench": "its README",
    "DP-LoRA paper": "Tsai et al. 2025, arXiv 2406.01355",
    "computed here": "RDP upper bound at a sensitivity of k C, released settings",
}
FULL_SETS = {"mnist5k": "mnist"}
"""Sets that are a part of one for which figures were published."""

MARK = "†"
MARK_MEANS = (
    "† the guarantee behind this figure does not hold: the code clips each of the k draws by itself, so one "
    "image can move a step k times as far as its noise covers"
)


@dataclass(frozen=True)
class Figure:
    """One published figure."""

    data: str
    method: str
    metric: str
    """fid (Inception, against the training images), accuracy in [0, 1], trainable_parameters or
    actual_epsilon."""
    value: float
    epsilon: float | None
    trainable: str
    rank: int | None
    noise_multiplicity: int | None
    broken: bool
    source: str
    """A key of `SOURCES`."""

    @property
    def title(self) -> str:
        """Method and metric, with the mark of a guarantee that does not hold."""
        metric = {"fid": "FID", "trainable_parameters": "parameters"}.get(self.metric, self.metric)
        return f"{self.method} {metric}{MARK if self.broken else ''}"

    def matches(self, group: Group) -> bool:
        """Whether it is of the set, epsilon, trained parts, rank and k of a group, as far as it says them.

        Methods that train something else from scratch match by the number of draws alone.
        """
        trained = str(group.value("trainable")).partition("(")[0]
        same_k = self.noise_multiplicity in (None, group.value("noise_multiplicity"))
        by_draws = self.trainable == "scratch" and self.noise_multiplicity is not None
        return (
            self.data == group.value("data")
            and self.epsilon in (None, group.value("target_epsilon"))
            and self.rank in (None, group.value("rank"))
            and same_k
            and (self.trainable == trained or by_draws)
        )


@functools.cache
def figures() -> tuple[Figure, ...]:
    """All published figures, in the order of the file."""
    path = Path(__file__).with_name("published.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(
            Figure(
                data=row["data"],
                method=row["method"],
                metric=row["metric"],
                value=float(row["value"]),
                epsilon=float(row["epsilon"]) if row["epsilon"] else None,
                trainable=row["trainable"],
                rank=int(row["rank"]) if row["rank"] else None,
                noise_multiplicity=int(row["noise_multiplicity"]) if row["noise_multiplicity"] else None,
                broken=row["guarantee"] == "broken",
                source=row["source"],
            )
            for row in csv.DictReader(file)
        )


def beside(groups: Sequence[Group]) -> dict[int, list[Figure]]:
    """The figures that match each group, by its place; groups without one are left out."""
    measured = [figure for figure in figures() if figure.metric != "actual_epsilon"]
    found = {place: [f for f in measured if f.matches(group)] for place, group in enumerate(groups)}
    return {place: matching for place, matching in found.items() if matching}


def on(data: str | None) -> list[Figure]:
    """The figures on a private set, or on the one that it is a part of."""
    return [figure for figure in figures() if figure.data == FULL_SETS.get(str(data), data)]
