"""Metrics on held-out private images within a privacy budget of their own: `evaluation.release=dp`.

One Gaussian mechanism. Each held-out image adds one row of numbers to a sum; noise of standard deviation
sigma is added to every coordinate of the sum, once; every metric is read from the noised sum alone.

Guarantees, for held-out images x and a fixed set of generated images (which epsilon of the adapter covers):
    * Sensitivity: a row has norm at most 1 whatever the image is, so that adding or removing one image, or
      letting it contribute nothing instead, changes the sum by at most 1. (A classifier sees an image in a
      batch with others, whose number can change the last bits of its answer, and so at a tie the answer.)
    * The release is (`release_epsilon`, `release_delta`)-differentially private for one held-out image:
      it is `Mechanism(noise_multiplier=sigma, sample_rate=1, steps=1)` to the accountant.
    * With privacy.unit=person a row is the mean of the rows of one person's images, whose norm is at most 1
      too. The release is then private for one held-out person with all of their images, and its number is
      that of persons.
    * Nothing else depends on a held-out image: the classifiers learn from images of the model, and the number
      of held-out images is itself read from the noised sum.
    * A release is written to `checkpoint/` before it is shown. The same question asked again gets the same
      answer; another one is one more mechanism, and all of them are counted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dp_lora.config.objective import INCEPTION
from dp_lora.config.schema import Config
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.evaluation.evaluate import Evaluation, Instruments, Say, described
from dp_lora.evaluation.images import Images, Labelled, Real, RealPart, checked_samples, real_images
from dp_lora.evaluation.metrics import inception_score
from dp_lora.jobs import ancestry, reuse
from dp_lora.jobs.begun import releases_of, stated_release
from dp_lora.jobs.spending import Books, charge_release, releases_charged
from dp_lora.privacy import accounting
from dp_lora.privacy.accounting import Spent
from dp_lora.privacy.ledger import FILTER
from dp_lora.privacy.persons import Persons
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.renyi import least_budget, renyi_divergences
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import private_directory, read_json, write_json
from dp_lora.storage.tensors import digest

_SIMULATIONS = 200

COVERS = (
    "The metrics that begin with dp_ in result.json: (epsilon, delta)-differentially private with respect to "
    "{one}, as the division into training and held-out {unit}s stands."
)


def covers(unit: str) -> str:
    """What the budget of a release covers, for one of `schema.UNITS`."""
    all_of_it = "all of their images and labels" if unit == "person" else "its label"
    return COVERS.format(one=f"one held-out {unit} with {all_of_it}", unit=unit)


class Counts:
    """How many held-out images each classifier gets right, and how many wrong, as one vector-valued sum.

    Sensitivity: a row is (1, 0) or (0, 1) for each of C classifiers, over the root of C, so its norm is 1.
    There are two counts, not one and the number of images, because that number is private too.

    Args:
        classifiers: their names, at least one.
    """

    def __init__(self, classifiers: Sequence[str]) -> None:
        self.names = [f"dp_accuracy_{name}" for name in classifiers]
        self.scale: float = len(self.names) ** -0.5

    def rows(self, right: Sequence[Tensor]) -> Tensor:
        """float64 [N, 2 C] of bool [N] for each classifier: which images it gets right. Private."""
        return self.scale * torch.cat([torch.stack([one, ~one], dim=1) for one in right], dim=1).double()

    def values(self, sums: Tensor) -> dict[str, float]:
        """The accuracies in [0, 1] by their names, from noised sums [2 C] of `rows`."""
        return dict(zip(self.names, self._accuracies(sums).tolist(), strict=True))

    def number(self, sums: Tensor) -> float:
        """The number of images that the noised sums tell: the mean over the classifiers."""
        return float(sums.sum()) * self.scale

    def noise_effects(self, sums: Tensor, noise_multiplier: float, seed: int) -> dict[str, dict[str, float]]:
        """What the noise does to each metric, simulated from the released sums alone.

        `deviation` is its standard deviation, `bias` what noise once more adds to the released value.
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(_SIMULATIONS, len(sums), generator=generator, dtype=torch.float64)
        drawn = self._accuracies(sums + noise_multiplier * noise)
        deviations, biases = drawn.std(dim=0), drawn.mean(dim=0) - self._accuracies(sums)
        return {
            name: {"deviation": deviation, "bias": bias}
            for name, deviation, bias in zip(self.names, deviations.tolist(), biases.tolist(), strict=True)
        }

    def _accuracies(self, sums: Tensor) -> Tensor:
        """[..., C] of sums [..., 2 C]."""
        counts = (sums / self.scale).unflatten(-1, (-1, 2)).clamp(min=0)
        accuracies: Tensor = counts[..., 0] / counts.sum(dim=-1).clamp(min=1)
        return accuracies


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
    """Raises UserError unless there are classifiers, and private held-out images to state a budget for."""
    evaluation = config.evaluation
    if not evaluation.classifiers:
        raise UserError(
            "evaluation.release=dp with evaluation.classifiers=[]: expected at least one, since their "
            "accuracies are what is released"
        )
    held_out = getattr(references, evaluation.reference)
    if held_out.public:
        raise UserError(
            f"evaluation.release=dp: the {evaluation.reference} split is public (data.public=true): expected "
            "none, since nothing is to be protected"
        )
    unit = config.privacy.unit
    delta, n = _delta(config), held_out.examples(unit)
    # Where the number of images is private, whether a job is refused must not tell it.
    if config.privacy.adjacency == "zero_out" and not delta * n < 1:
        raise UserError(
            f"evaluation.release_delta={delta:g}: expected a number in (0, 1/N), N the number of {unit}s in "
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
    """`dp_accuracy_<classifier>` on the held-out images, and what has to be said.

    With Inception among the extractors the Inception score is there too, which sees no real image. No other
    extractor is used: distances to real images are not released.

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
    sigma = accounting.noise_multiplier_for(
        evaluation.release_epsilon, _delta(config), 1.0, 1, Path(config.paths.cache).expanduser()
    )
    persons = _persons(references, config)
    inputs = _inputs(generated, real.reference, config, sigma, persons)
    made = releases_of(folder)
    asked = [one["inputs"] for one in made]
    place = asked.index(inputs) if inputs in asked else len(asked)
    if inputs in asked and made[place].get("charged", True):
        return _kept(folder, place)
    number = made[place].get("number", place) if inputs in asked else next_release(config, folder, references)
    with charge_release(config, Mechanism(sigma, 1.0, 1), _delta(config), folder, number, references):
        if inputs not in asked:
            used = [name for name in evaluation.extractors if name == INCEPTION]
            networks = replace(evaluation, extractors=used)
            instruments = Instruments(networks, config.seed, torch.device(device), progress)
            released = _release(generated, real, instruments, config, inputs, sigma, persons)
            keep(folder, inputs, sigma, released, number)
    confirm(folder, place)
    return _kept(folder, place)


def next_release(config: Config, folder: Path, references: ImageSplits) -> int:
    """The number of a release to be made: no release has it in `folder`, in the ledger or in the index."""
    charged = releases_charged(config, folder, references)
    return max([len(releases_of(folder)), *(number + 1 for number in charged)])


def _kept(folder: Path, place: int) -> Evaluation:
    one = releases_of(folder)[place]
    return Evaluation(one["metrics"], one["metadata"])


def _persons(references: ImageSplits, config: Config) -> Persons | None:
    """Whose each held-out image is, where a person is protected."""
    if config.privacy.unit == "image":
        return None
    owners = getattr(references, config.evaluation.reference).persons
    assert owners is not None
    return Persons(owners)


def _release(
    generated: Images,
    real: Real,
    instruments: Instruments,
    config: Config,
    inputs: str,
    sigma: float,
    persons: Persons | None = None,
) -> Evaluation:
    """All metrics, read from one noised sum."""
    evaluation, counts = config.evaluation, Counts(config.evaluation.classifiers)
    what = f"{len(generated.images)} generated images"
    right = []
    for name in evaluation.classifiers:
        classifier = instruments.classifier(name, what, generated, real.num_classes)
        right.append(instruments.correct(classifier, real.reference))
    rows, unit = counts.rows(right), config.privacy.unit
    # A mean of rows is no longer than the longest: one person moves the sum by 1 at most.
    rows = rows if persons is None else persons.means(rows.cpu())
    sums = noised_sum(rows, sigma, _randomness(config, inputs))
    metadata = {
        "n_samples": len(generated.images),
        "reference": {"split": evaluation.reference, "n": max(0, round(counts.number(sums)))},
        "n_note": f"the number of reference {unit}s is read from the noised sum",
        **described(instruments),
        "noise": counts.noise_effects(sums, sigma, config.seed),
        "release": {"noise_multiplier": sigma},
        "private_metrics": [],
        "private_metrics_note": "",
    }
    return Evaluation({**counts.values(sums), **generated_scores(generated, instruments)}, metadata)


def generated_scores(generated: Images, instruments: Instruments) -> dict[str, float]:
    """The metrics of generated images alone: the Inception score, where its network is there."""
    scores = {}
    for name, loaded in instruments.extractors.items():
        features = instruments.features(name, f"{len(generated.images)} generated images", generated.images)
        logits = loaded.logits(features.to(instruments.device))
        if logits is not None:
            scores["inception_score"] = inception_score(logits, seed=instruments.seed)
    return scores


def _inputs(
    generated: Images, held_out: RealPart, config: Config, sigma: float, persons: Persons | None = None
) -> str:
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
    if persons is not None:
        what["persons"] = digest(persons.offsets, persons.order)
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _delta(config: Config) -> float:
    delta = config.evaluation.release_delta
    return config.privacy.delta if delta is None else delta


def release_record(
    training: Mapping[str, Any],
    config: Config,
    folder: Path,
    charged: Mapping[int, Mechanism] | None = None,
    earlier: tuple[Sequence[ancestry.Training], Sequence[ancestry.Training]] = ((), ()),
) -> dict[str, Any]:
    """The entry of privacy.json about the releases of a run, each of which is counted.

    `epsilon` and `delta` are for one held-out image or person, as `unit` says, and count the releases on the
    same images, and the trainings on them, by the runs that this one goes on from. `with_training` is the
    composition with the training, for one person with an image in each set.

    Args:
        training: the content of privacy.json.
        config: the job.
        folder: the run's private `checkpoint/`.
        charged: the run's releases by number in ledger and index; the record of one may be lost.
        earlier: releases and trainings on these held-out images by the runs that it goes on from.
    """
    found = {
        one.get("number", place): Mechanism(float(one["noise_multiplier"]), 1.0, 1)
        for place, one in enumerate(releases_of(folder))
    }
    mechanisms = [one for _, one in sorted({**(charged or {}), **found}.items())]
    delta, secret = _delta(config), config.privacy.insecure_seed is None
    secret = secret and all(one.private for part in earlier for one in part)
    releases, trainings = ([one.mechanism for one in part] for part in earlier)
    before = [*releases, *trainings]
    # Whoever asks again has seen the answer to what was asked before.
    chosen = len(before) + len(mechanisms) > 1 and not config.privacy.fixed_beforehand
    spent = _spent([*before, *mechanisms], delta, chosen=chosen)
    return {
        "epsilon": spent.epsilon,
        "target_epsilon": config.evaluation.release_epsilon,
        "delta": delta,
        "accountant": spent.accountant,
        "noise_multiplier": mechanisms[-1].noise_multiplier,
        "noise_multipliers": [one.noise_multiplier for one in mechanisms],
        "sensitivity": 1.0,
        "releases": len(mechanisms),
        **({"earlier_releases": [asdict(one) for one in releases]} if releases else {}),
        **({"earlier_trainings": [asdict(one) for one in trainings]} if trainings else {}),
        "reference": config.evaluation.reference,
        "unit": config.privacy.unit,
        "reproducible_noise": not secret,
        "covers": covers(config.privacy.unit) if secret else "Nothing: the noise was derived from a seed.",
        "with_training": _with_training(training, [*releases, *mechanisms]),
    }


def _earlier(
    config: Config, folder: Path, images: ImageSplits
) -> tuple[list[ancestry.Training], list[ancestry.Training]]:
    """What the runs that the run of `folder` goes on from may have spent on the held-out images.

    Their releases, the later ones too, and their trainings on other parts of the set than this run's.
    """
    found: dict[str, ancestry.Training] = {}
    for one in ancestry.kept(folder):
        if one.same_images:
            known = () if config.data.public or not one.run else Books(config, images).of_run(one.run)
            for part in (*ancestry.releases(one, known), one):
                found.setdefault(ancestry.name_of(part), part)
    releases = [one for one in found.values() if ancestry.is_release(one)]
    trainings = [one for one in found.values() if one not in releases and not one.same_roles]
    return releases, trainings


def _spent(mechanisms: Sequence[Mechanism], delta: float, *, chosen: bool) -> Spent:
    """Epsilon of all `mechanisms`; `chosen`: of which later ones may have been chosen by earlier results."""
    if chosen and all(one.noise_multiplier > 0 for one in mechanisms):
        return Spent(least_budget(renyi_divergences(mechanisms), delta), FILTER)
    return accounting.epsilon(mechanisms, delta)


def restated(training: Mapping[str, Any], config: Config, directory: Path) -> dict[str, Any]:
    """The entry of privacy.json about the releases of the run in `directory`, beside a new statement.

    What was released stays released when the training is stated anew. Arguments as of `release_record`.
    """
    stated = stated_release(directory)
    if stated is None:
        return release_record(training, config, directory / "checkpoint")
    sigmas = stated.get("noise_multipliers", [stated["noise_multiplier"]])
    earlier = [Mechanism(**one) for one in stated.get("earlier_releases", ())]
    mechanisms = [*earlier, *(Mechanism(float(sigma), 1.0, 1) for sigma in sigmas)]
    return {**stated, "with_training": _with_training(training, mechanisms)}


def _with_training(training: Mapping[str, Any], releases: Sequence[Mechanism]) -> dict[str, Any]:
    """What the training and the releases spend together, for one person with an image in each set."""
    parts = [*training.get("earlier_trainings", ()), training]
    trained = [Mechanism(float(one["noise_multiplier"]), one["sample_rate"], one["steps"]) for one in parts]
    delta = training["delta"]
    if float(training.get("epsilon", 0)) == math.inf:
        return {"epsilon": "inf", "delta": delta, "accountant": "none"}
    both = _spent([*trained, *releases], delta, chosen=training.get("accountant") == FILTER)
    return {"epsilon": both.epsilon, "delta": delta, "accountant": both.accountant}


def release_in(
    directory: Path,
    samples: Labelled,
    references: ImageSplits,
    config: Config,
    *,
    device: torch.device | str,
    say: Say,
) -> tuple[Evaluation, dict[str, Any]]:
    """The metrics with what was spent beside them, and the new content of privacy.json, which states it.

    Args:
        directory: of the run, which this process holds.
        samples, references, config, device: as in `evaluate_privately`.
        say: tells the owner.
    """
    training = read_json(directory / "privacy.json")
    if "search" in training:
        raise UserError(
            f"{directory}: is the winner of a private search, whose statement counts the release that found "
            "it and no other one; expected evaluation.release=none, or evaluation.reference=none"
        )

    def waiting() -> None:
        say(
            "evaluate: another job is at work on the run that trained, to which a release is charged; waiting"
        )

    with reuse.account(directory, waiting) as folder:
        evaluation = evaluate_privately(
            samples, references, config, folder=folder, device=device, progress=say
        )
        charged = releases_charged(config, folder, references)
        earlier = _earlier(config, folder, references)
        record = release_record(training, config, folder, charged, earlier)
    spent = {name: record[name] for name in ("epsilon", "delta", "accountant", "unit")}
    release = {**evaluation.metadata["release"], **spent}
    shown = evaluation._replace(metadata={**evaluation.metadata, "release": release})
    return shown, {**training, "release": record}
