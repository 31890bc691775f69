"""Metrics from all pairs of features: KID, precision, recall, density and coverage, in one pass.

Shapes and dtypes at the boundaries: features float32 or float64 [N, F]; everything is computed in float64.
Every pair of blocks is multiplied once; the kernel and the squared distances both come from that product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MANIFOLD_NEIGHBOURS = 3
"""k of precision and recall, as in Kynkaanniemi et al. 2019."""

DENSITY_NEIGHBOURS = 5
"""k of density and coverage, as in Naeem et al. 2020."""

FEWEST = max(MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS) + 1
"""Images that a set must have, so that each has enough neighbours."""

_BLOCK = 2048
"""Rows and columns of a block of pairs."""


class Within(NamedTuple):
    """One set of features against itself."""

    kernel: Tensor
    """float64 [1 + B]: sum over pairs i != j of w_i w_j k(x_i, x_j) over sum of w_i w_j; w = 1 first."""
    radii: Tensor
    """float64 [N, 2]: squared distances of each row to its third and its fifth neighbour."""


class Across(NamedTuple):
    """A set of generated features [N, F] against a reference [M, F]."""

    kernel: Tensor
    """float64 [N]: mean over the reference of k(x_i, y_j)."""
    realistic: Tensor
    """bool [N]: within the reference's manifold. Its mean is precision."""
    reached: Tensor
    """bool [M]: within the generated manifold. Its mean is recall."""
    crowded: Tensor
    """float64 [N]: number of reference neighbourhoods around the image over k. Its mean is density."""
    covered: Tensor
    """bool [M]: with a generated image in its neighbourhood. Its mean is coverage."""


def within(features: Tensor, weights: Tensor | None = None) -> Within:
    """Kernel means and neighbourhood radii of features [N, F], N at least `FEWEST`.

    Args:
        features: of one set.
        weights: float64 [B, N], how often each row is taken; a row is never paired with its own copies.
    """
    n = len(features)
    assert n >= FEWEST, n
    taken = torch.ones(1, n, dtype=torch.float64, device=features.device)
    if weights is not None:
        taken = torch.cat([taken, weights.to(features.device)])
    sums = torch.zeros(len(taken), dtype=torch.float64, device=features.device)
    radii = []
    for rows in _slices(n):
        left = features[rows].double()
        nearest = left.new_full((len(left), FEWEST - 1), torch.inf)
        for columns in _slices(n):
            kernel, squared = _block(left, features[columns].double())
            if rows == columns:
                kernel.fill_diagonal_(0)
                squared.fill_diagonal_(torch.inf)
            sums += ((taken[:, rows] @ kernel) * taken[:, columns]).sum(dim=1)
            candidates = torch.cat([nearest, squared], dim=1)
            nearest = candidates.topk(FEWEST - 1, largest=False).values
        radii.append(nearest[:, [MANIFOLD_NEIGHBOURS - 1, DENSITY_NEIGHBOURS - 1]])
    pairs = taken.sum(dim=1).square() - taken.square().sum(dim=1)
    return Within(sums / pairs, torch.cat(radii))


def across(features: Tensor, reference: Tensor, radii: Tensor, reference_radii: Tensor) -> Across:
    """The comparison of `features` [N, F] with `reference` [M, F].

    An image is in the manifold of a set when it lies within the distance of one of the set's images to its
    third neighbour in the set (Kynkaanniemi et al. 2019, arXiv 1904.06991, equation 1); a neighbourhood is
    such a ball to the fifth neighbour (Naeem et al. 2020, arXiv 2002.09797, equations 3 and 5).

    Args:
        features: generated.
        reference: real.
        radii, reference_radii: of `within` of the two sets.
    """
    n, m = len(features), len(reference)
    kernel, crowded = (features.new_zeros(n, dtype=torch.float64) for _ in range(2))
    realistic = torch.zeros(n, dtype=torch.bool, device=features.device)
    reached, covered = (torch.zeros(m, dtype=torch.bool, device=features.device) for _ in range(2))
    for rows in _slices(n):
        left = features[rows].double()
        for columns in _slices(m):
            values, squared = _block(left, reference[columns].double())
            kernel[rows] += values.sum(dim=1) / m
            realistic[rows] |= (squared <= reference_radii[columns, 0]).any(dim=1)
            reached[columns] |= (squared <= radii[rows, :1]).any(dim=0)
            inside = squared <= reference_radii[columns, 1]
            crowded[rows] += inside.double().sum(dim=1) / DENSITY_NEIGHBOURS
            covered[columns] |= inside.any(dim=0)
    return Across(kernel, realistic, reached, crowded, covered)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of the squared MMD between two sets of features [n, F], at least 6 each.

    Kernel (x.y / F + 1)^3. All pairs are used rather than random subsets, so the value needs no seed and
    has the least variance; it takes time quadratic in n. Its expectation does not depend on n, and is 0
    for sets of one distribution, so that it can come out below 0.

    Binkowski et al. 2018, arXiv 1801.01401 (KID).
    """
    own, other = within(first), within(second)
    between = across(first, second, own.radii, other.radii).kernel.mean()
    return float(own.kernel[0] + other.kernel[0] - 2 * between)


def _slices(n: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK))


def _block(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel and the squared distance of all pairs of two blocks of rows in float64."""
    products = left @ right.T
    norms = left.square().sum(dim=1)[:, None] + right.square().sum(dim=1)
    squared = (norms - 2 * products).clamp_(min=0)
    return products.div_(left.shape[1]).add_(1).pow_(3), squared
