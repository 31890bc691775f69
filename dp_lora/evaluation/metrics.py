"""All metrics of one set of generated images over the features of one extractor, with their intervals.

| metric | says |
|---|---|
| `fd_<extractor>`, `fid` over Inception 2015 | Frechet distance to the reference |
| `kid_<extractor>` | kernel distance to the reference |
| `precision_<extractor>`, `density_<extractor>` | whether images are like real ones |
| `recall_<extractor>`, `coverage_<extractor>` | whether all kinds of real images occur |
| `fdinf_<extractor>`, `fidinf` | the Frechet distance extrapolated to infinitely many images |
| `inception_score` | whether images are of clear and different classes, without any reference |

An interval is that of `level` over bootstrap resamples of the generated images; for recall and coverage,
which are means over the reference, of the reference's. It is centred: the resamples say how widely the
value scatters, not how far it is off, since a resample has a bias of its own. So it does not contain the
bias of the Frechet distance for few images, nor that another seed would have trained another model.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dp_lora.config.objective import frechet_name
from dp_lora.evaluation.distances import (
    Gaussian,
    Given,
    WeightedFrechet,
    frechet_distance,
    frechet_distance_at_infinity,
    gaussian,
    resamples,
)
from dp_lora.evaluation.pairs import Across, Within, across, within

LEVEL = 0.95
"""The confidence level of every interval."""


class Interval(NamedTuple):
    """Bounds of a metric's interval of `LEVEL`."""

    low: float
    high: float


class Measured(NamedTuple):
    """Metrics by name, and the intervals of those that have one."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class Options:
    """Settings for what is computed besides the values of the metrics."""

    bootstrap: int = 0
    """Resamples behind each interval; 0: no intervals."""
    infinity: bool = False
    """Also the Frechet distance extrapolated to infinitely many images."""
    seed: int = 0
    """The seed of resamples and subsets."""


@dataclass(frozen=True)
class Reference:
    """Everything about the real images that their comparison with others takes."""

    features: Tensor
    """float32 [M, F]"""
    within: Within

    @classmethod
    def of(cls, features: Tensor) -> Reference:
        """The reference made of features [M, F], M at least 6."""
        return cls(features, within(features))

    @cached_property
    def gaussian(self) -> Gaussian:
        """The Gaussian of the features, for intervals and for the extrapolation."""
        return gaussian(self.features)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a cache."""
        named = {"features": self.features, **self.within._asdict()}
        return {name: value.cpu() for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> Reference:
        """The reference whose `tensors` these are, moved to `device`."""
        moved = {name: value.to(device) for name, value in tensors.items()}
        return cls(moved["features"], Within(moved["kernel"], moved["radii"]))


def measure(
    extractor: str,
    features: Tensor,
    reference: Reference,
    options: Options = Options(),
    logits: Tensor | None = None,
) -> Measured:
    """The metrics of generated `features` [N, F] against `reference`, N at least 6 (10 for infinity).

    Args:
        extractor: its name, which becomes part of the metrics' names.
        features: of the generated images, on the device of `reference`.
        reference: of the real images, by the same extractor.
        options: intervals, extrapolation.
        logits: [N, classes] of the network that the Inception score is defined by; null leaves it out.
    """
    n, m = len(features), len(reference.features)
    weights = resamples(n, options.bootstrap, seed=options.seed)
    own = within(features, weights)
    other = reference.within
    found = across(features, reference.features, own.radii, other.radii)
    values = {
        frechet_name(extractor): frechet_distance(features, reference.features),
        f"kid_{extractor}": float(own.kernel[0] + other.kernel[0] - 2 * found.kernel.mean()),
        f"precision_{extractor}": _mean(found.realistic),
        f"recall_{extractor}": _mean(found.reached),
        f"density_{extractor}": _mean(found.crowded),
        f"coverage_{extractor}": _mean(found.covered),
    }
    if options.infinity:
        name = frechet_name(extractor, infinity=True)
        values[name] = frechet_distance_at_infinity(features, reference.gaussian, seed=options.seed)
    if logits is not None:
        values["inception_score"] = inception_score(logits, seed=options.seed)
    if not options.bootstrap:
        return Measured(values, {})
    weights = weights.to(features.device)
    drawn = _frechet_of_each(features, reference, weights)
    spread = {frechet_name(extractor): drawn, f"kid_{extractor}": _kernel_of_each(own, found, weights)}
    spread |= _means_of_each(extractor, found, weights, resamples(m, options.bootstrap, seed=options.seed))
    if logits is not None:
        spread["inception_score"] = _score_of_each(logits, weights)
    return Measured(values, {name: interval(values[name], draws) for name, draws in spread.items()})


def interval(value: float, resampled: Tensor) -> Interval:
    """The centred percentile interval around `value` of what its resamples [B] gave."""
    tail = (1 - LEVEL) / 2
    ends = torch.quantile(resampled.cpu() - resampled.cpu().mean(), torch.tensor([tail, 1 - tail]).double())
    return Interval(value + float(ends[0]), value + float(ends[1]))


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _frechet_of_each(features: Tensor, reference: Reference, weights: Tensor) -> Tensor:
    distance = WeightedFrechet(features, reference.gaussian)
    return torch.tensor([distance(row) for row in weights], dtype=torch.float64)


def _kernel_of_each(own: Within, found: Across, weights: Tensor) -> Tensor:
    """KID but for the reference's own term, which is the same for all resamples."""
    return own.kernel[1:] - 2 * (weights @ found.kernel) / weights.sum(dim=1)


def _means_of_each(
    extractor: str, found: Across, weights: Tensor, reference_weights: Tensor
) -> dict[str, Tensor]:
    real = reference_weights.to(weights.device)

    def means(taken: Tensor, values: Tensor) -> Tensor:
        return (taken @ values.double()) / taken.sum(dim=1)

    return {
        f"precision_{extractor}": means(weights, found.realistic),
        f"recall_{extractor}": means(real, found.reached),
        f"density_{extractor}": means(weights, found.crowded),
        f"coverage_{extractor}": means(real, found.covered),
    }


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> float:
    """torchmetrics' InceptionScore of logits [N, classes], a function of the generated images alone.

    The mean over `splits` parts, in a random order, of exp of the mean KL(p(y|x) || p(y)). Between 1 and the
    number of classes. Parts have N / `splits` images, rounded up, and the last one fewer; a part of one image
    has a score of 1. Computed in float64, for a rare class has a probability of 0 in float32.

    Salimans et al. 2016, arXiv 1606.03498, with the parts and the logits without bias of their code.
    """
    # Slow to load, and nothing before the evaluation needs it.
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # That it keeps all logits, and that one part has no deviation.
        warnings.filterwarnings("ignore", ".* will save all extracted features in buffer|std", UserWarning)
        # The order is drawn by torch's generator on the CPU.
        torch.default_generator.manual_seed(seed)
        metric = InceptionScore(feature=Given(logits.shape[1]), splits=splits, sync_on_compute=False)
        metric.update(logits.double())
        mean, _ = metric.compute()
    return float(mean)


def _score_of_each(logits: Tensor, weights: Tensor) -> Tensor:
    """Inception scores of the resamples, each in one part."""
    probabilities = logits.double().softmax(dim=1)
    negative_entropies = (probabilities * logits.double().log_softmax(dim=1)).sum(dim=1)
    total = weights.sum(dim=1)
    means = (weights @ probabilities) / total[:, None]
    return ((weights @ negative_entropies) / total - (means * means.log()).sum(dim=1)).exp()
