"""The Frechet distance between two sets of features, its interval, and its limit for many images.

Shapes and dtypes at the boundaries: features float32 or float64 [N, F]; everything is computed in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

_ROWS = 4096
"""Rows of a feature matrix that are in float64 at a time."""

_SIZES = 15
"""Sizes between which `frechet_distance_at_infinity` draws its line, as in the paper."""


class Gaussian(NamedTuple):
    """A set of features as `WeightedFrechet` compares with it, in float64."""

    mean: Tensor
    """[F]"""
    factor: Tensor
    """R [min(N, F), F] with R^T R = the unbiased covariance."""


def gaussian(features: Tensor) -> Gaussian:
    """The mean and a factor of the covariance of features [N, F], N at least 2."""
    n, dimension = features.shape
    assert n >= 2, n
    mean = features.mean(dim=0, dtype=torch.float64)
    factor = mean.new_zeros(0, dimension)
    for rows in torch.split(features, _ROWS):
        factor = torch.cat([factor, rows.double() - mean])
        if len(factor) > dimension:
            factor = torch.linalg.qr(factor, mode="r").R
    return Gaussian(mean, factor / (n - 1) ** 0.5)


class Given(nn.Module):
    """Returns what it is given: the network of a torchmetrics metric whose features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """torchmetrics' FrechetInceptionDistance of two sets of features [N, F], at least 2 each.

    ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64. Falls as n grows: compare equal n only. With n
    below F the product is singular, and the roots of its rounded eigenvalues lower the result: by 5e-9 of it
    for 2,000 images of 1,280 features against 1,000, by 2e-6 for 20 against 88.

    Heusel et al. 2017, arXiv 1706.08500, equation 6.
    """
    # Slow to load, and nothing before the evaluation needs it.
    from torchmetrics.image.fid import FrechetInceptionDistance

    # The first process of a job evaluates alone: to wait for the others would be to wait forever.
    metric = FrechetInceptionDistance(feature=Given(first.shape[1]), sync_on_compute=False).to(first.device)
    for features, real in ((first, False), (second, True)):
        for rows in torch.split(features, _ROWS):
            metric.update(rows.double(), real=real)
    return max(0.0, float(metric.compute()))


class WeightedFrechet:
    """Frechet distances of many weightings of one set of features to the same reference.

    A weighting [N] counts how often each row is taken: a bootstrap resample or a subset. All of them share
    the product of the features with the reference's factor, so that one costs a product and the eigenvalues
    of a matrix no larger than the reference's rank. Agrees with `frechet_distance` to 1e-6 of its terms.

    Args:
        features: [N, F].
        reference: what they are compared with.
    """

    def __init__(self, features: Tensor, reference: Gaussian) -> None:
        self.reference = reference
        # Rows relative to the reference's mean, which keeps the sums small.
        self.rows = features.double() - reference.mean
        self.projected = self.rows @ reference.factor.T
        self.squared_norms = self.rows.square().sum(dim=1)
        self.trace = reference.factor.square().sum()

    def __call__(self, weights: Tensor) -> float:
        """The distance of the rows taken `weights` [N] times each, two rows or more in all."""
        total = weights.sum()
        mean = weights @ self.rows / total
        trace = (weights @ self.squared_norms - total * mean.square().sum()) / (total - 1)
        root = self._trace_of_root(weights, total)
        return max(0.0, float(mean.square().sum() + trace + self.trace - 2 * root))

    def _trace_of_root(self, weights: Tensor, total: Tensor) -> Tensor:
        """tr (S1 S2)^(1/2): roots of the eigenvalues of B S1 B^T."""
        taken = weights > 0
        rows, counts = self.projected[taken], weights[taken]
        centred = (rows - counts @ rows / total) * counts.sqrt()[:, None]
        wide = len(centred) < centred.shape[1]
        product = centred @ centred.T if wide else centred.T @ centred
        eigenvalues: Tensor = torch.linalg.eigvalsh(product / (total - 1))
        return eigenvalues.clamp(min=0).sqrt().sum()


def frechet_distance_at_infinity(features: Tensor, reference: Gaussian, *, seed: int) -> float:
    """The Frechet distance extrapolated to infinitely many generated images.

    The distance of n images exceeds its limit by about a constant over n. A line is fitted to the distances
    of random subsets of 15 sizes, from a fifth of the images to all, against 1/n; its value at 1/n = 0 is
    returned. Meant for N several times F: with fewer the distance is no line in 1/n yet. The reference's own
    size is not extrapolated. Can come out below 0.

    Chong and Forsyth 2020, arXiv 1911.07023.

    Args:
        features: [N, F], N at least 10.
        reference: what they are compared with.
        seed: of the subsets.
    """
    n = len(features)
    assert n >= 10, n
    distance = WeightedFrechet(features, reference)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(n / 5, n, _SIZES, dtype=torch.float64).round()
    values = []
    for size in sizes.int().tolist():
        weights = torch.zeros(n, dtype=torch.float64)
        weights[torch.randperm(n, generator=generator)[:size]] = 1
        values.append(distance(weights.to(features.device)))
    inverse, found = 1 / sizes, torch.tensor(values, dtype=torch.float64)
    centred = inverse - inverse.mean()
    slope = (centred @ found) / centred.square().sum()
    return float(found.mean() - slope * inverse.mean())


def resamples(n: int, count: int, *, seed: int) -> Tensor:
    """Bootstrap weightings float64 [count, n]: how often each of n rows is drawn in n draws."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (count, n), generator=generator)
    weights = torch.zeros(count, n, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones(count, n, dtype=torch.float64))
