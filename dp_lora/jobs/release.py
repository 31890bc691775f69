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
      from images of the model, fine-tuned and before, and the number of held-out images is itself read from
      the noised sum.
    * A release is written to `checkpoint/` before it is shown. The same question asked again gets the same
      answer; another one is one more mechanism, and all of them are counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.evaluation.evaluate import Evaluation, Instruments, Say, described
from dp_lora.evaluation.images import Images, Labelled, Real, RealPart, checked_samples, real_images
from dp_lora.evaluation.metrics import inception_score
from dp_lora.evaluation.queries import (
    CLIPPED_SHARE,
    DIRECTIONS,
    AccuracyQuery,
    FrechetFrame,
    FrechetQuery,
    Query,
    Questions,
)
from dp_lora.jobs.begun import releases_of
from dp_lora.jobs.spending import charge_release, next_release
from dp_lora.privacy import accounting
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import private_directory, write_json
from dp_lora.storage.tensors import digest

COVERS = (
    "The metrics that begin with dp_ in result.json: (epsilon, delta)-differentially private with respect to "
    "one held-out image with its label, as the division into training and held-out images stands."
)


def noised_sum(rows: Tensor, noise_multiplier: float, randomness: Randomness) -> Tensor:
    """The sum float64 [D] of private `rows` [N, D] with Gaussian noise of std `noise_multiplier`.

    Sensitivity 1: every row has norm at most 1. Rounded to float32 only after the noise was added; see
    `Randomness.secure_normal`.

    Args:
        rows: private.
        noise_multiplier: sigma.
        randomness: of this sum alone.
    """
    assert float(rows.norm(dim=1).max()) <= 1 + 1e-9
    noise = noise_multiplier * randomness.secure_normal("release", 0, rows.shape[1])
    return (rows.sum(dim=0).cpu() + noise).float().double()


def _randomness(config: Config, inputs: str) -> Randomness:
    """A key from the operating system that nobody keeps, or what the seed for tests makes of `inputs`."""
    seed = config.privacy.insecure_seed
    return Randomness.from_system() if seed is None else Randomness.from_seed(seed).derive(inputs)


def keep(
    folder: Path, inputs: str, noise_multiplier: float, evaluation: Evaluation, number: int | None = None
) -> None:
    """Adds a release to `folder`/releases.json, which only the owner can read; it may not be shown yet.

    Args:
        folder: the run's private `checkpoint/`.
        inputs: names everything that the release depends on.
        noise_multiplier: sigma.
        evaluation: what is shown, whenever the same is asked, once the release was confirmed.
        number: under which it is charged; None: its place in the file.
    """
    entry = {"inputs": inputs, "noise_multiplier": noise_multiplier, **evaluation._asdict(), "charged": False}
    entry |= {} if number is None else {"number": number}
    write_json(private_directory(folder) / "releases.json", [*releases_of(folder), entry], mode=0o600)


def confirm(folder: Path, place: int) -> None:
    """Notes that the release at `place` in `folder` is charged to this run alone: it may be shown."""
    rows = releases_of(folder)
    rows[place] = {**rows[place], "charged": True}
    write_json(folder / "releases.json", rows, mode=0o600)


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
    # Where the number of images is private, whether a job is refused must not tell it.
    if config.privacy.adjacency == "zero_out" and not delta * n < 1:
        raise UserError(
            f"evaluation.release_delta={delta:g}: expected a number in (0, 1/N), N the number of images in "
            f"the {evaluation.reference} split, or one of them may be given away whole"
        )


def evaluate_privately(
    samples: Labelled,
    references: ImageSplits,
    config: Config,
    *,
    before: Labelled,
    folder: Path,
    device: torch.device | str,
    progress: Say = lambda message: None,
) -> Evaluation:
    """`dp_accuracy_<classifier>` and `dp_fd_<extractor>` on the held-out images, and what has to be said.

    `dp_fd_*` is the Frechet distance of clipped features in the directions of `FrechetFrame`: compare it with
    `dp_fd_*_before` of the same run, which the same noised sum tells. Over Inception the Inception score is
    there too, which sees no real image.

    Args:
        samples: generated images with their labels.
        references: the real images; only the split `evaluation.reference` is looked at.
        config: the job.
        before: images of the model before fine-tuning.
        folder: the run's private `checkpoint/`.
        device: of the networks.
        progress: told what is being computed.

    Raises UserError as `check` and `evaluate_all`.
    """
    check(config, references)
    evaluation = config.evaluation
    real = real_images(references, evaluation)
    generated = checked_samples("sampler.num_samples", samples, real, evaluation)
    earlier = checked_samples("images before fine-tuning", before, real, evaluation)
    sigma = accounting.noise_multiplier_for(
        evaluation.release_epsilon, _delta(config), 1.0, 1, Path(config.paths.cache).expanduser()
    )
    inputs = _inputs(generated, earlier, real.reference, config, sigma)
    made = releases_of(folder)
    asked = [one["inputs"] for one in made]
    place = asked.index(inputs) if inputs in asked else len(asked)
    if inputs in asked and made[place].get("charged", True):
        return _kept(folder, place)
    number = made[place].get("number", place) if inputs in asked else next_release(config, folder, references)
    with charge_release(config, Mechanism(sigma, 1.0, 1), _delta(config), folder, number, references):
        if inputs not in asked:
            instruments = Instruments(evaluation, config.seed, torch.device(device), progress)
            released = _release(generated, earlier, real, instruments, config, inputs, sigma)
            keep(folder, inputs, sigma, released, number)
    confirm(folder, place)
    return _kept(folder, place)


def _kept(folder: Path, place: int) -> Evaluation:
    one = releases_of(folder)[place]
    return Evaluation(one["metrics"], one["metadata"])


def _release(
    generated: Images,
    earlier: Images,
    real: Real,
    instruments: Instruments,
    config: Config,
    inputs: str,
    sigma: float,
) -> Evaluation:
    """All metrics, read from one noised sum."""
    evaluation = config.evaluation
    questions, scores = _questions(generated, earlier, real, instruments)
    sums = noised_sum(questions.rows(), sigma, _randomness(config, inputs))
    metadata = {
        "n_samples": len(generated.images),
        "reference": {"split": evaluation.reference, "n": max(0, round(questions.number(sums)))},
        "n_note": "the number of reference images is read from the noised sum",
        **described(instruments),
        "noise": questions.noise_effects(sums, sigma, config.seed),
        "release": {"directions": DIRECTIONS, "clipped_share": CLIPPED_SHARE, "noise_multiplier": sigma},
        "private_metrics": [],
        "private_metrics_note": "",
    }
    return Evaluation({**questions.values(sums), **scores}, metadata)


def _questions(
    generated: Images, earlier: Images, real: Real, instruments: Instruments
) -> tuple[Questions, dict[str, float]]:
    """All queries with their rows, and the Inception score where its network is among the extractors."""
    config, scores = instruments.config, dict[str, float]()
    asked: list[Query] = [_ask_accuracy(name, generated, real, instruments) for name in config.classifiers]
    for name in config.extractors:
        query, found = _ask_distance(name, generated, earlier, real.reference, instruments)
        asked.append(query)
        scores |= found
    return Questions(asked), scores


def _ask_accuracy(name: str, generated: Images, real: Real, instruments: Instruments) -> AccuracyQuery:
    what = f"{len(generated.images)} generated images"
    classifier = instruments.classifier(name, what, generated, real.num_classes)
    return AccuracyQuery.of(f"dp_accuracy_{name}", instruments.correct(classifier, real.reference))


def _ask_distance(
    name: str, generated: Images, earlier: Images, held_out: RealPart, instruments: Instruments
) -> tuple[FrechetQuery, dict[str, float]]:
    """The query with its rows, and the Inception score over the network that has one."""
    what = f"{len(generated.images)} generated images"
    features = instruments.features(name, what, generated.images)
    before = instruments.features(name, f"{len(earlier.images)} earlier images", earlier.images)
    frame = FrechetFrame(torch.cat([features, before]))
    metric = f"dp_fd_{name}"
    sets = {metric: features, f"{metric}_before": before}
    compared = {key: frame.moments(frame.rows(values).sum(dim=0)) for key, values in sets.items()}
    rows = frame.rows(instruments.features(name, "held-out images", held_out.images))
    logits = instruments.extractors[name].logits(features.to(instruments.device))
    scores = {} if logits is None else {"inception_score": inception_score(logits, seed=instruments.seed)}
    return FrechetQuery(frame, rows, compared), scores


def _inputs(generated: Images, earlier: Images, held_out: RealPart, config: Config, sigma: float) -> str:
    """A hash of all that the sum depends on. Private: it tells whether a guess of the images is right."""
    evaluation = asdict(config.evaluation)
    for name in ("batch_size", "inception_weights"):
        del evaluation[name]
    what = {
        "generated": digest(*generated),
        "before": digest(*earlier),
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
    """The entry of privacy.json about the releases of a run, each of which is counted.

    `epsilon` and `delta` are for one held-out image. `with_training` is the composition with the training,
    for one person with an image in each set.

    Args:
        training: the content of privacy.json.
        config: the job.
        folder: the run's private `checkpoint/`.
    """
    mechanisms = [Mechanism(float(one["noise_multiplier"]), 1.0, 1) for one in releases_of(folder)]
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
