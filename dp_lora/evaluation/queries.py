"""The queries of `dp_lora.jobs.release`: what one held-out image may add to a released sum.

Every query turns an image into a row of numbers of norm at most 1, whatever the image is, and reads its
metric from the sum of all rows after noise was added to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DIRECTIONS = 8
"""Directions in which the Frechet distance is taken: noise grows with their number."""

CLIPPED_SHARE = 0.05
"""Share of the images of the model that lie beyond the clipping radius."""

_MEAN_WEIGHT, _SQUARE_WEIGHT, _COUNT_WEIGHT = 0.5, 0.8, math.sqrt(0.11)
"""Lengths of the parts of a row for the Frechet distance: their squares add up to 1."""

_SIMULATIONS = 200


class Moments(NamedTuple):
    """Mean [d] and covariance [d, d], float64, of clipped vectors in the unit ball."""

    mean: Tensor
    covariance: Tensor


class FrechetFrame:
    """The Frechet distance to held-out features in a few directions, of clipped features.

    Features are taken relative to the mean of `public` ones, along their principal directions, and clipped to
    a radius within which 95 % of them lie. With u such a vector over the radius, |u| <= 1, a row is
    (0.5 u, 0.8 u u^T, sqrt 0.11), the symmetric matrix by its upper triangle with sqrt 2 off the diagonal.

    Sensitivity: |row|^2 = 0.25 |u|^2 + 0.64 |u|^4 + 0.11 <= 1.

    Clipping bounds the distance too: images far from all of `public` count as if at the radius.

    Args:
        public: features [N, F], N at least 2, that no held-out image had a part in: of generated images, and
            of the model before fine-tuning, so that a model which repeats one image does not hide all
            differences by its own narrow frame.
    """

    def __init__(self, public: Tensor) -> None:
        values = public.double()
        self.mean = values.mean(dim=0)
        self.directions = torch.linalg.svd(values - self.mean, full_matrices=False).Vh[:DIRECTIONS]
        norms = ((values - self.mean) @ self.directions.T).norm(dim=1)
        # The floor is for images that are all the same.
        self.radius: float = max(float(norms.quantile(1 - CLIPPED_SHARE)), 1e-6)
        self.upper = torch.triu_indices(len(self.directions), len(self.directions))
        self.multiplicity = (2.0 - (self.upper[0] == self.upper[1]).double()).sqrt()
        self.size = len(self.directions) + self.upper.shape[1] + 1

    def rows(self, features: Tensor) -> Tensor:
        """float64 [N, size] of features [N, F]."""
        vectors = (features.double() - self.mean) @ self.directions.T / self.radius
        # What is not finite counts as the mean: the bound holds for any features.
        vectors = (vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1)).nan_to_num(0.0, 0.0, 0.0)
        first, second = self.upper
        squares = vectors[:, first] * vectors[:, second] * self.multiplicity
        count = vectors.new_full((len(vectors), 1), _COUNT_WEIGHT)
        return torch.cat([_MEAN_WEIGHT * vectors, _SQUARE_WEIGHT * squares, count], dim=1)

    def distance(self, own: Moments, sums: Tensor) -> float:
        """The distance, in the units of the features, of `own` to what noised sums [size] tell."""
        mean, covariance = self.moments(sums)
        root = _root(own.covariance)
        trace_of_root = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        traces = covariance.trace() + own.covariance.trace()
        distance = float((mean - own.mean).square().sum() + traces - 2 * trace_of_root)
        return max(0.0, distance) * self.radius**2

    def number(self, sums: Tensor) -> float:
        """The number of images that sums [size] tell."""
        return max(2.0, float(sums[-1]) / _COUNT_WEIGHT)

    def moments(self, sums: Tensor) -> Moments:
        """The moments that sums [size] tell: of all covariances with their trace, the one nearest to theirs.

        Noise makes a covariance indefinite. To set its negative eigenvalues to 0 would add to the trace, and
        so to every distance; with the trace held, all eigenvalues are lowered by one number first.
        """
        d, n = len(self.directions), self.number(sums)
        mean = sums[:d] / (_MEAN_WEIGHT * n)
        squares = sums.new_zeros(d, d)
        squares[self.upper[0], self.upper[1]] = sums[d:-1] / (_SQUARE_WEIGHT * n * self.multiplicity)
        squares = squares + squares.triu(1).T
        eigenvalues, vectors = torch.linalg.eigh(squares - mean[:, None] * mean)
        return Moments(mean, (vectors * _non_negative(eigenvalues)) @ vectors.T)


def _non_negative(values: Tensor) -> Tensor:
    """The numbers >= 0 nearest to `values` [d] among those of their sum (0 where that is negative)."""
    total = values.sum().clamp(min=0)
    descending = values.sort(descending=True).values
    excess = (descending.cumsum(dim=0) - total) / torch.arange(1, len(values) + 1)
    kept = int((descending > excess).sum())
    lowered: Tensor = values - excess[max(kept, 1) - 1]
    return lowered.clamp(min=0)


def _root(matrix: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    return root


class AccuracyQuery(NamedTuple):
    """How many held-out images a classifier gets right, and how many wrong.

    Sensitivity: a row is (1, 0) or (0, 1), of norm 1. Two counts in place of one and the number of images,
    which is private too.
    """

    name: str
    rows: Tensor
    """float64 [N, 2]. Private."""

    @classmethod
    def of(cls, name: str, right: Tensor) -> AccuracyQuery:
        """The query for the metric `name`, made of bool [N]: which images the classifier gets right."""
        return cls(name, torch.stack([right, ~right], dim=1).double())

    def values(self, sums: Tensor) -> dict[str, float]:
        """The accuracy in [0, 1] by its name, of the noised sums [2] of `rows`."""
        right, wrong = sums.clamp(min=0).tolist()
        return {self.name: float(right / max(right + wrong, 1.0))}

    def number(self, sums: Tensor) -> float:
        """The number of images that the noised sums tell."""
        return float(sums.sum())


class FrechetQuery(NamedTuple):
    """Frechet distances over an extractor.

    Sensitivity: that of `FrechetFrame.rows`, 1.
    """

    frame: FrechetFrame
    rows: Tensor
    """float64 [N, size]: `frame.rows` of the held-out images. Private."""
    compared: dict[str, Moments]
    """The moments of generated images, by the names of the metrics: one noised sum serves them all."""

    def values(self, sums: Tensor) -> dict[str, float]:
        """The metrics by their names, of the noised sums of `rows`."""
        return {name: self.frame.distance(own, sums) for name, own in self.compared.items()}

    def number(self, sums: Tensor) -> float:
        """The number of images that the noised sums tell."""
        return self.frame.number(sums)


Query = AccuracyQuery | FrechetQuery


class Questions:
    """All queries of a release as one vector-valued sum of sensitivity 1.

    Accuracies and distances share the budget in halves, those of a kind evenly: the rows of a query are
    multiplied by the root of its share, so the squared norms of an image's rows add up to at most 1.
    """

    def __init__(self, asked: Sequence[Query]) -> None:
        self.asked = asked
        kinds = [type(one) for one in asked]
        self.scales = [(1 / (len(set(kinds)) * kinds.count(kind))) ** 0.5 for kind in kinds]

    def rows(self) -> Tensor:
        """float64 [N, sizes together], each of norm 1 at most. Private."""
        scaled = [scale * one.rows for scale, one in zip(self.scales, self.asked, strict=True)]
        return torch.cat(scaled, dim=1)

    def values(self, sums: Tensor) -> dict[str, float]:
        """Every metric by its name, of the noised sums of `rows`."""
        return {name: value for one, part in self._parts(sums) for name, value in one.values(part).items()}

    def number(self, sums: Tensor) -> float:
        """The number of images that the noised sums tell."""
        one, part = self._parts(sums)[-1]
        return one.number(part)

    def noise_effects(self, sums: Tensor, noise_multiplier: float, seed: int) -> dict[str, dict[str, float]]:
        """The effect of the noise on each metric, simulated from the released sums alone.

        `deviation` is its standard deviation, `bias` what noise once more adds to the released value.
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(_SIMULATIONS, len(sums), generator=generator, dtype=torch.float64)
        drawn = [self.values(sums + noise_multiplier * row) for row in noise]
        effects = {}
        for name, value in self.values(sums).items():
            found = torch.tensor([values[name] for values in drawn], dtype=torch.float64)
            effects[name] = {"deviation": float(found.std()), "bias": float(found.mean()) - value}
        return effects

    def _parts(self, sums: Tensor) -> list[tuple[Query, Tensor]]:
        parts = torch.split(sums, [one.rows.shape[1] for one in self.asked])
        unscaled = [part / scale for part, scale in zip(parts, self.scales, strict=True)]
        return list(zip(self.asked, unscaled, strict=True))
