"""Metrics on held-out private images within a privacy budget of their own: `evaluation.release=dp`.

One Gaussian mechanism. Each held-out image adds one row of numbers to a sum; noise of standard deviation
sigma is added to every coordinate of the sum, once; every metric is read from the noised sum alone.

Guarantees, for held-out images x and a fixed set of generated images (which epsilon of the adapter covers):
    * Sensitivity: a row has norm at most 1 whatever the image is, so that adding or removing one image, or
      letting it contribute nothing instead, changes the sum by at most 1. (An image's features are computed
      in a batch with others, which can change their last bits but not their bound.)
    * The release is (`release_epsilon`, `release_delta`)-differentially private for one held-out image:
      it is `Mechanism(noise_multiplier=sigma, sample_rate=1, steps=1)` to the accountant.
    * Nothing else depends on a held-out image: the classifiers, the directions and the clipping radius come
      from generated images, and the number of held-out images is itself read from the noised sum.
    * The noised sum is written to `checkpoint/` before anything is shown. The same question asked again gets
      the same answer; another one is one more mechanism, and all of them are counted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dp_lora.config import Config
from dp_lora.data import ImageSplits
from dp_lora.errors import UserError
from dp_lora.evaluate import Evaluation, Instruments, Say, described
from dp_lora.evaluation_cache import digest
from dp_lora.evaluation_images import Images, Labelled, RealPart, checked_samples, real_images
from dp_lora.files import private_directory, read_json, write_json
from dp_lora.metrics import inception_score
from dp_lora.privacy import accounting
from dp_lora.privacy.accounting import Mechanism
from dp_lora.privacy.randomness import Randomness

DIRECTIONS = 16
"""Directions in which the Frechet distance is taken: noise grows with their number."""

CLIPPED_SHARE = 0.05
"""Share of the generated images that lie beyond the clipping radius."""

_MEAN_WEIGHT, _SQUARE_WEIGHT, _COUNT_WEIGHT = 0.5, 0.5**0.5, 0.5
"""Lengths of the parts of a row for the Frechet distance: their squares add up to 1."""

_SIMULATIONS = 200

COVERS = (
    "The metrics that begin with dp_ in result.json: (epsilon, delta)-differentially private with respect to "
    "one held-out image with its label, as the division into training and held-out images stands."
)


class AccuracyQuery:
    """How many held-out images a classifier gets right, and how many wrong.

    Sensitivity: a row is (1, 0) or (0, 1), of norm 1. Two counts in place of one and the number of images,
    which is private too.
    """

    size = 2

    def rows(self, right: Tensor) -> Tensor:
        """float64 [N, 2] of bool [N]."""
        return torch.stack([right, ~right], dim=1).double()

    def value(self, sums: Tensor) -> float:
        """The accuracy in [0, 1] that noised sums [2] tell."""
        right, wrong = sums.clamp(min=0).tolist()
        return float(right / max(right + wrong, 1.0))


class FrechetQuery:
    """The Frechet distance between generated and held-out features in a few directions, of clipped features.

    Features are taken relative to the generated mean, along the principal directions of the generated ones,
    and clipped to a radius within which 95 % of those lie. With u such a vector over the radius, |u| <= 1, a
    row is (u / 2, u u^T / sqrt 2, 1 / 2), the symmetric matrix by its upper triangle with sqrt 2 off the
    diagonal.

    Sensitivity: |row|^2 = |u|^2 / 4 + |u|^4 / 2 + 1 / 4 <= 1.

    Clipping bounds the distance too: images far from all generated ones count as if at the radius.

    Args:
        generated: features [N, F] of the generated images, N at least 2: public, or covered by the adapter's
            epsilon.
    """

    def __init__(self, generated: Tensor) -> None:
        values = generated.double()
        self.mean = values.mean(dim=0)
        directions = torch.linalg.svd(values - self.mean, full_matrices=False).Vh
        self.directions = directions[:DIRECTIONS]
        norms = ((values - self.mean) @ self.directions.T).norm(dim=1)
        # The floor is for images that are all the same.
        self.radius = max(float(norms.quantile(1 - CLIPPED_SHARE)), 1e-6)
        self.upper = torch.triu_indices(len(self.directions), len(self.directions))
        self.size = len(self.directions) + self.upper.shape[1] + 1
        self.generated = self._moments(self.rows(generated).sum(dim=0))

    def rows(self, features: Tensor) -> Tensor:
        """float64 [N, size] of features [N, F]."""
        vectors = (features.double() - self.mean) @ self.directions.T / self.radius
        # What is not finite counts as the mean: the bound holds for any features.
        vectors = (vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1)).nan_to_num(0.0, 0.0, 0.0)
        first, second = self.upper
        squares = vectors[:, first] * vectors[:, second] * torch.where(first == second, 1.0, math.sqrt(2))
        count = vectors.new_full((len(vectors), 1), _COUNT_WEIGHT)
        return torch.cat([_MEAN_WEIGHT * vectors, _SQUARE_WEIGHT * squares, count], dim=1)

    def value(self, sums: Tensor) -> float:
        """The distance, in the units of the features, that noised sums [size] tell."""
        mean, covariance = self._moments(sums)
        own_mean, own_covariance = self.generated
        root = _root(own_covariance)
        trace_of_root = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        traces = covariance.trace() + own_covariance.trace()
        distance = (mean - own_mean).square().sum() + traces - 2 * trace_of_root
        return max(0.0, float(distance)) * self.radius**2

    def count(self, sums: Tensor) -> float:
        """The number of images that sums [size] tell."""
        return max(2.0, float(sums[-1]) / _COUNT_WEIGHT)

    def _moments(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [d] and covariance [d, d] of u; noise may have made it indefinite, so it is made positive."""
        d, n = len(self.directions), self.count(sums)
        mean = sums[:d] / (_MEAN_WEIGHT * n)
        first, second = self.upper
        squares = sums.new_zeros(d, d)
        squares[first, second] = sums[d:-1] / (_SQUARE_WEIGHT * n)
        squares[first, second] /= torch.where(first == second, 1.0, math.sqrt(2))
        squares = squares + squares.triu(1).T
        eigenvalues, vectors = torch.linalg.eigh(squares - mean[:, None] * mean)
        return mean, (vectors * eigenvalues.clamp(min=0)) @ vectors.T


def _root(matrix: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


class Asked(NamedTuple):
    """One metric of a release."""

    name: str
    query: AccuracyQuery | FrechetQuery
    rows: Tensor
    """float64 [N, size], of norm 1 at most, on the held-out images. Private."""


class Questions:
    """All queries of a release as one vector-valued sum of sensitivity 1.

    Accuracies and distances share the budget in halves, those of a kind evenly: the rows of a query are
    multiplied by the root of its share, so the squared norms of an image's rows add up to at most 1.
    """

    def __init__(self, asked: Sequence[Asked]) -> None:
        self.asked = asked
        kinds = [type(one.query) for one in asked]
        self.scales = [(1 / (len(set(kinds)) * kinds.count(kind))) ** 0.5 for kind in kinds]

    def rows(self) -> Tensor:
        """float64 [N, sizes together], each of norm 1 at most. Private."""
        scaled = [scale * one.rows for scale, one in zip(self.scales, self.asked, strict=True)]
        return torch.cat(scaled, dim=1)

    def values(self, sums: Tensor) -> dict[str, float]:
        """Every metric by its name, of the noised sums of `rows`."""
        return {one.name: one.query.value(part) for one, part in self._parts(sums)}

    def count(self, sums: Tensor) -> float:
        """The number of images that the noised sums tell."""
        one, part = self._parts(sums)[-1]
        return one.query.count(part) if isinstance(one.query, FrechetQuery) else float(part.sum())

    def noise_deviations(self, sums: Tensor, noise_multiplier: float, seed: int) -> dict[str, float]:
        """Standard deviation of each metric under the noise, simulated from the released sums alone."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            self.values(sums + noise_multiplier * torch.randn(len(sums), generator=generator).double())
            for _ in range(_SIMULATIONS)
        ]
        return {
            name: float(torch.tensor([values[name] for values in drawn]).std()) for name in self.values(sums)
        }

    def _parts(self, sums: Tensor) -> list[tuple[Asked, Tensor]]:
        parts = torch.split(sums, [one.query.size for one in self.asked])
        unscaled = [part / scale for part, scale in zip(parts, self.scales, strict=True)]
        return list(zip(self.asked, unscaled, strict=True))


def noised_sum(
    rows: Tensor, noise_multiplier: float, inputs: str, folder: Path, insecure_seed: int | None
) -> Tensor:
    """The sum of `rows` [N, D], each of norm 1 at most, with Gaussian noise of std `noise_multiplier`.

    Sensitivity 1. The noise is drawn from a key of the operating system that nobody keeps, and the result is
    written to `folder`/releases.json before it is returned: the same `inputs` get the same answer for ever.

    Args:
        rows: private.
        noise_multiplier: sigma.
        inputs: names everything that the sum depends on.
        folder: the run's private `checkpoint/`.
        insecure_seed: `privacy.insecure_seed`.
    """
    kept = releases(folder)
    for one in kept:
        if one["inputs"] == inputs:
            return torch.tensor(one["noised"], dtype=torch.float64)
    if insecure_seed is None:
        randomness = Randomness.from_system()
    else:
        randomness = Randomness.from_seed(insecure_seed).derive(f"release {inputs}")
    noise = noise_multiplier * randomness.secure_normal("release", 0, rows.shape[1])
    # Rounded only after the noise was added; see `Randomness.secure_normal`.
    noised = (rows.sum(dim=0).cpu() + noise).float().double()
    entry = {"inputs": inputs, "noise_multiplier": noise_multiplier, "noised": noised.tolist()}
    write_json(private_directory(folder) / "releases.json", [*kept, entry], mode=0o600)
    return noised


def releases(folder: Path) -> list[dict[str, Any]]:
    """All that were made in the run whose private folder this is."""
    path = folder / "releases.json"
    found: list[dict[str, Any]] = read_json(path) if path.exists() else []
    return found


def check(config: Config, references: ImageSplits) -> None:
    """Raises UserError unless there are private held-out images that the budget can be stated for."""
    evaluation = config.evaluation
    held_out = getattr(references, evaluation.reference)
    if held_out.public:
        raise UserError(
            f"evaluation.release=dp: the {evaluation.reference} split is public (data.public=true): expected "
            "none, since nothing is to be protected"
        )
    delta, n = _delta(config), len(held_out)
    if not delta * n < 1:
        raise UserError(
            f"evaluation.release_delta={delta:g}: expected a number in (0, 1/N), N the number of images in "
            f"the {evaluation.reference} split, or one of them may be given away whole"
        )


def evaluate_privately(
    samples: Labelled,
    references: ImageSplits,
    config: Config,
    *,
    folder: Path,
    device: torch.device | str,
    progress: Say = lambda message: None,
) -> Evaluation:
    """`dp_accuracy_<classifier>` and `dp_fd_<extractor>` on the held-out images, and what has to be said.

    `dp_fd_*` is the Frechet distance of clipped features in 16 directions: compare it with others of its
    name only. Over Inception the Inception score is there too, which sees no real image.

    Args:
        samples: generated images with their labels.
        references: the real images; only the split `evaluation.reference` is looked at.
        config: the job.
        folder: the run's private `checkpoint/`.
        device: of the networks.
        progress: told what is being computed.

    Raises UserError as `check` and `evaluate_all`.
    """
    check(config, references)
    evaluation = config.evaluation
    real = real_images(references, evaluation)
    generated = checked_samples("sampler.num_samples", samples, real, evaluation)
    instruments = Instruments(evaluation, config.seed, torch.device(device), progress)
    sigma = accounting.noise_multiplier_for(
        evaluation.release_epsilon, _delta(config), 1.0, 1, Path(config.paths.cache).expanduser()
    )
    scores: dict[str, float] = {}
    questions = Questions(_asked(generated, real.reference, real.num_classes, instruments, scores))
    inputs = _inputs(generated, real.reference, config, sigma)
    sums = noised_sum(questions.rows(), sigma, inputs, folder, config.privacy.insecure_seed)
    metadata = {
        "n_samples": len(generated.images),
        "reference": {"split": evaluation.reference, "n": round(questions.count(sums))},
        "n_note": "the number of reference images is read from the noised sum",
        **described(instruments),
        "noise_deviation": questions.noise_deviations(sums, sigma, config.seed),
        "release": {"directions": DIRECTIONS, "clipped_share": CLIPPED_SHARE, "noise_multiplier": sigma},
        "private_metrics": [],
        "private_metrics_note": "",
    }
    return Evaluation({**questions.values(sums), **scores}, metadata)


def _asked(
    generated: Images,
    held_out: RealPart,
    num_classes: int,
    instruments: Instruments,
    scores: dict[str, float],
) -> list[Asked]:
    """The queries with their rows; an Inception score goes into `scores`."""
    asked: list[Asked] = []
    count = f"{len(generated.images)} generated images"
    for name in instruments.config.classifiers:
        classifier = instruments.classifier(name, count, generated, num_classes)
        query = AccuracyQuery()
        rows = query.rows(instruments.correct(classifier, held_out))
        asked.append(Asked(f"dp_accuracy_{name}", query, rows))
    for name, extractor in instruments.extractors.items():
        features = instruments.features(name, count, generated.images)
        logits = extractor.logits(features.to(instruments.device))
        if logits is not None:
            scores["inception_score"] = inception_score(logits, seed=instruments.seed)
        distance = FrechetQuery(features)
        rows = distance.rows(instruments.features(name, "held-out images", held_out.images))
        asked.append(Asked(f"dp_fd_{name}", distance, rows))
    return asked


def _inputs(generated: Images, held_out: RealPart, config: Config, sigma: float) -> str:
    """A hash of all that the sum depends on. Private: it tells whether a guess of the images is right."""
    evaluation = asdict(config.evaluation)
    for name in ("batch_size", "inception_weights"):
        del evaluation[name]
    what = {
        "generated": digest(*generated),
        "held_out": digest(held_out.images, held_out.labels),
        "evaluation": evaluation,
        "seed": config.seed,
        "noise_multiplier": sigma,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _delta(config: Config) -> float:
    delta = config.evaluation.release_delta
    return config.privacy.delta if delta is None else delta


def release_record(training: Mapping[str, Any], config: Config, folder: Path) -> dict[str, Any]:
    """What privacy.json says of the releases of a run, each of which is counted.

    `epsilon` and `delta` are for one held-out image. `with_training` is the composition with the training,
    for one person with an image in each set.

    Args:
        training: the content of privacy.json.
        config: the job.
        folder: the run's private `checkpoint/`.
    """
    mechanisms = [Mechanism(float(one["noise_multiplier"]), 1.0, 1) for one in releases(folder)]
    delta, secret = _delta(config), config.privacy.insecure_seed is None
    spent = accounting.epsilon(mechanisms, delta)
    trained = Mechanism(float(training["noise_multiplier"]), training["sample_rate"], training["steps"])
    both = accounting.epsilon([trained, *mechanisms], training["delta"])
    return {
        "epsilon": spent.epsilon,
        "target_epsilon": config.evaluation.release_epsilon,
        "delta": delta,
        "accountant": spent.accountant,
        "noise_multiplier": mechanisms[-1].noise_multiplier,
        "sensitivity": 1.0,
        "releases": len(mechanisms),
        "reference": config.evaluation.reference,
        "reproducible_noise": not secret,
        "covers": COVERS if secret else "Nothing: the noise was derived from a seed.",
        "with_training": {"epsilon": both.epsilon, "delta": training["delta"], "accountant": both.accountant},
    }
