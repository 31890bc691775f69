"""Metrics of a finished run's images with other settings, without another training.

Guarantees:
    * Metrics of generated images alone are a function of the released adapter. Neither private images, nor
      the ledger, nor the index is read for them, and nothing is charged.
    * Metrics on private images are marked, and their use is entered in the ledger as not covered before an
      image is compared. The images are those that the run was made from, or the command ends with one line.
    * A release is charged as in a job (`dp_lora.jobs.release`), and privacy.json then states it. The same
      question gets the same answer and is charged once.
    * The result lies in `evaluations/` of the run directory, whole or not at all, and stays behind in an
      export. The run's own result is not touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dp_lora.config.checks import check
from dp_lora.config.schema import Config, EvaluationConfig, SamplerConfig
from dp_lora.errors import UserError, did_you_mean
from dp_lora.jobs.drawing import FOLDER as DRAWN
from dp_lora.jobs.drawing import (
    RECORD,
    Source,
    base_of,
    digest_of,
    note_of,
    one_name,
    samples_digest,
    source_of,
)
from dp_lora.records.run_directory import OUTPUTS, WAY_OUT, check_records, is_whole_archive
from dp_lora.storage.files import (
    Damaged,
    check_writable,
    expanded,
    private_directory,
    read_json,
    write_json,
)
from dp_lora.storage.imports import uncollected

if TYPE_CHECKING:
    import torch

    from dp_lora.data.sets import ImageSplits
    from dp_lora.evaluation.evaluate import Evaluation
    from dp_lora.models.sample import Samples

FOLDER = "evaluations"
"""In a run directory: a file for each evaluation that was made afterwards."""

NO_IMAGES = "none"
"""As `evaluation.reference`: no real image is looked at."""

_ALONE = "inception"
"""The extractor whose metric needs no real image."""


@dataclass(frozen=True)
class Asked:
    """Which images of which run are evaluated, and how."""

    run: Path
    evaluation: EvaluationConfig
    compares: bool = True
    """With real images; False: only what is computed from generated images alone."""
    samples: str | None = None
    """The name of a set in RUN/samples/, or its folder elsewhere; None: the run's own."""
    name: str | None = None
    pretrained: str | None = None
    """The pre-trained model, where the run does not tell."""
    device: str = "auto"


class Evaluated(NamedTuple):
    """What was found."""

    path: Path
    record: dict[str, Any]
    """The content of `path`."""


@dataclass(frozen=True)
class _Images:
    """A set of generated images, and what they were drawn by."""

    folder: Path
    shown: str
    sampler: SamplerConfig
    seed: int
    prompt: str


def run_of(place: Path) -> tuple[Path, str | None]:
    """The run directory that `place` is, or whose images it holds, and then their name."""
    run = place.resolve().parents[1] if len(place.resolve().parents) > 1 else place
    if (
        (place / RECORD).is_file()
        and place.resolve().parent == run / DRAWN
        and (run / "config.yaml").exists()
    ):
        return run, place.resolve().name
    return place, None


def evaluate(asked: Asked) -> Evaluated:
    """Evaluates the images; an evaluation that is there already is left as it is.

    Raises UserError for what does not fit the run, before anything is written or charged.
    """
    source = source_of(asked.run)
    if source.run is None:
        raise UserError(f"{asked.run}: an adapter without its run; expected a run directory")
    directory = source.run
    if not (directory / "checkpoint").is_dir():
        raise UserError(
            f"{asked.run}: has no checkpoint/, as an exported folder has none; expected the run directory, "
            "which knows what was spent"
        )
    check_records(directory)
    images = _images(source, asked.samples)
    config = _config(source, asked)
    settings = _settings(images, config, asked)
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = directory / FOLDER / f"{one_name(asked.name or f'{images.shown}-{identity[:8]}')}.json"
    found = _found(path, settings)
    if found is not None:
        return Evaluated(path, found)
    check_writable(path.parent, f"{path.parent}")
    started = time.monotonic()
    result = _measured(source, images, config, asked, identity)
    seconds = {"evaluate": float(f"{time.monotonic() - started:.2g}")}
    record = {"settings": settings, **result, "seed": config.seed, "seconds": seconds}
    private_directory(path.parent)
    write_json(path, record)
    return Evaluated(path, read_json(path))


def _images(source: Source, chosen: str | None) -> _Images:
    """The images that are evaluated, which have to be of the run's own adapter."""
    config, run = source.config, source.run
    assert run is not None
    if chosen is None:
        if not is_whole_archive(run / OUTPUTS["sample"]):
            raise UserError(
                f"{run}: has no samples that can be read; expected a run whose stage sample has ended, or "
                "samples=NAME of a set that dp-lora-sample drew"
            )
        return _Images(run, "run", config.sampler, config.seed, config.model.prompt)
    folder = expanded(chosen, f"samples={chosen}") if os.sep in chosen else run / DRAWN / chosen
    if not is_whole_archive(folder / "samples.npz") or not (folder / RECORD).is_file():
        there = sorted(path.parent.name for path in (run / DRAWN).glob(f"*/{RECORD}"))
        expected = f"one of {', '.join(there)}" if there else "their folder"
        raise UserError(
            f"samples={chosen}: {folder} holds no images that dp-lora-sample drew; expected {expected}"
            f"{did_you_mean(chosen, there)}"
        )
    try:
        record = read_json(folder / RECORD)
        drawn, digest = record["settings"], record["samples_sha256"]
        sampler = replace(config.sampler, **drawn["sampler"])
        seed, prompt, adapter = drawn["seed"], drawn["prompt"] or config.model.prompt, drawn["adapter_sha256"]
        check(replace(config, sampler=sampler, seed=seed, model=replace(config.model, prompt=prompt)))
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise Damaged(f"{folder / RECORD}: expected what dp-lora-sample wrote there") from error
    if digest != samples_digest(folder):
        raise UserError(
            f"samples={chosen}: {folder / 'samples.npz'} has changed since it was drawn; expected the images "
            "of the adapter, which its epsilon covers: draw them again"
        )
    images = _Images(folder, folder.resolve().name, sampler, seed, prompt)
    if adapter != digest_of(source.adapter):
        raise UserError(
            f"samples={chosen}: were drawn from another adapter than {source.adapter}; expected images of "
            "this run, which its epsilon covers"
        )
    return images


def _config(source: Source, asked: Asked) -> Config:
    """The run's configuration with the evaluation that is asked for, checked."""
    evaluation = asked.evaluation
    if not asked.compares:
        if evaluation.release == "dp":
            raise UserError(
                f"evaluation.release=dp with evaluation.reference={NO_IMAGES}: expected "
                "evaluation.release=none, since no real image is looked at"
            )
        if _ALONE not in evaluation.extractors:
            raise UserError(
                f"evaluation.extractors={evaluation.extractors} with evaluation.reference={NO_IMAGES}: "
                f"expected {_ALONE} among them, whose Inception score alone needs no real image"
            )
        evaluation = replace(evaluation, extractors=[_ALONE], classifiers=[], bootstrap=0, fid_infinity=False)
    resources = replace(source.config.resources, device=asked.device)
    config = replace(source.config, evaluation=evaluation, resources=resources)
    check(config)
    if source.run is not None and evaluation.release == "dp" and not (source.run / "privacy.json").exists():
        raise UserError(
            f"{source.run / 'privacy.json'}: is missing; expected what the training left, to which "
            f"evaluation.release=dp adds its own: {WAY_OUT}"
        )
    return config


def _settings(images: _Images, config: Config, asked: Asked) -> dict[str, Any]:
    """What the numbers follow from, beside the run and its private images."""
    evaluation = asdict(config.evaluation)
    for name in ("batch_size", "inception_weights"):  # which change no number
        del evaluation[name]
    if not asked.compares:
        evaluation["reference"] = NO_IMAGES
    return {
        "samples": images.shown,
        "samples_sha256": samples_digest(images.folder),
        "evaluation": evaluation,
        "seed": config.seed,
    }


def _found(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The evaluation that `path` holds; None if it has to be made. Raises UserError for another one."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a new name")
    if not path.exists():
        return None
    try:
        found = read_json(path)
    except Damaged:
        return None
    if not isinstance(found, dict) or found.get("settings") != json.loads(json.dumps(settings)):
        raise UserError(f"{path}: holds another evaluation; expected a new name")
    return found


def _measured(source: Source, images: _Images, config: Config, asked: Asked, identity: str) -> dict[str, Any]:
    """The metrics, the metadata and what covers them."""
    from dp_lora.jobs.device import device_of

    with uncollected():
        from dp_lora.models import sample

    device = device_of(config)
    samples = sample.load(images.folder)
    if not asked.compares:
        return _of_generated(source, samples, images, config, asked, device)
    return _of_real(source, samples, images, config, asked, device, identity)


def _of_generated(
    source: Source, samples: Samples, images: _Images, config: Config, asked: Asked, device: torch.device
) -> dict[str, Any]:
    """The metrics that need no real image, of the samples and of images before fine-tuning."""
    import torch

    from dp_lora.evaluation.evaluate import Instruments, described
    from dp_lora.evaluation.features import check_extractors
    from dp_lora.evaluation.images import Images
    from dp_lora.jobs.job import say
    from dp_lora.jobs.release import generated_scores

    n = len(samples.labels)
    if n < 2:
        raise UserError(f"samples: {n} images: too few, expected at least 2")
    check_extractors(config.evaluation)
    before = _before(source, samples, images, config, asked, device)
    instruments = Instruments(config.evaluation, config.seed, device, say)
    metrics: dict[str, float] = {}
    for end, one in (("", samples), ("_before", before)):
        given = Images(torch.from_numpy(one.images), torch.from_numpy(one.labels))
        metrics |= {f"{name}{end}": value for name, value in generated_scores(given, instruments).items()}
    return {
        "note": note_of(source),
        "metrics": metrics,
        "n_samples": n,
        "n_before": len(before.labels),
        **described(instruments),
        "private_metrics": [],
        "private_metrics_note": "",
        "device": str(device),
    }


def _before(
    source: Source, samples: Samples, images: _Images, config: Config, asked: Asked, device: torch.device
) -> Samples:
    """Images of the model before fine-tuning, as many of each class and drawn as `samples` were."""
    import torch

    from dp_lora.jobs.stages import images_before
    from dp_lora.jobs.start import adapter_before, first_values, with_classes
    from dp_lora.models.diffusion import class_balanced
    from dp_lora.models.folders import load

    own = config.model
    model = load(
        base_of(source, asked.pretrained),
        images.prompt,
        image_size=config.data.image_size,
        prompt_length=own.prompt_length,
        precision=own.base_precision,
    )
    # As the job does, whatever the images were drawn by.
    adapter = None if source.run is None else adapter_before(source.run)
    make = with_classes if adapter is None else first_values
    model = make(model, config, samples.classes, adapter)
    n, labels = len(samples.labels), torch.from_numpy(samples.labels)
    drawing = replace(
        config,
        sampler=replace(images.sampler, num_samples=n, classes=None),
        seed=images.seed,
        model=replace(config.model, prompt=images.prompt),
    )
    balanced = torch.equal(labels, class_balanced(n, len(samples.classes)))
    return images_before(model.to(device), drawing, device, None if balanced else labels)


def _of_real(
    source: Source,
    samples: Samples,
    images: _Images,
    config: Config,
    asked: Asked,
    device: torch.device,
    identity: str,
) -> dict[str, Any]:
    """The metrics against the run's real images, with or without a budget of their own."""
    from dp_lora.data import sets
    from dp_lora.evaluation import evaluate as evaluation
    from dp_lora.evaluation.images import checked_samples, real_images
    from dp_lora.jobs import content, release
    from dp_lora.jobs.job import check_content, say
    from dp_lora.jobs.stages import own, shown_metadata

    assert source.run is not None
    real = sets.load(config.data, config.paths)
    check_content(real, source.run)
    evaluation.check(config.evaluation, real, len(samples.labels), "samples")
    if config.evaluation.classifiers and samples.classes != real.train.classes:
        raise UserError(
            f"samples={images.shown}: their classes ({', '.join(samples.classes[:12])}) are not those of the "
            "run's images, on which classifiers are tested; expected evaluation.classifiers=[]"
        )
    released = config.evaluation.release == "dp"
    if released:
        release.check(config, real)
    with own(source.run):
        if released:
            found, statement = release.release_in(source.run, samples, real, config, device=device, say=say)
            write_json(source.run / "privacy.json", statement)
        else:
            checked_samples("samples", samples, real_images(real, config.evaluation), config.evaluation)
            before = _before(source, samples, images, config, asked, device)
            _enter_uncovered(source.run, config, real, identity)
            found = _compared(samples, before, real, config, device)
    return {
        "note": _note(source, found, config),
        "metrics": found.metrics,
        **shown_metadata(found.metadata, config),
        "images_compared": content.unknown(source.run) is None,
        "device": str(device),
    }


def _compared(
    samples: Samples, before: Samples, real: ImageSplits, config: Config, device: torch.device
) -> Evaluation:
    from dp_lora.evaluation.evaluate import evaluate_all
    from dp_lora.jobs.job import say

    return evaluate_all(
        samples,
        real,
        config.evaluation,
        before=before,
        seed=config.seed,
        device=device,
        cache=Path(config.paths.cache).expanduser(),
        progress=say,
    )


def _enter_uncovered(run: Path, config: Config, real: ImageSplits, identity: str) -> None:
    """Enters in the ledger that private images are compared with, which no epsilon covers."""
    from dp_lora.evaluation.images import real_images
    from dp_lora.jobs import reuse
    from dp_lora.jobs.spending import ledger_path, private_set
    from dp_lora.privacy.ledger import Ledger, Uncovered
    from dp_lora.training.receipts import read_receipt

    if real_images(real, config.evaluation).public:
        return
    trained = reuse.taken(run)
    receipt = read_receipt(run / "checkpoint") if trained is None else trained.receipt
    # A run of an earlier version has no number of its own.
    number = secrets.token_hex(8) if receipt is None else receipt.run
    name = private_set(config.data.name) if receipt is None else receipt.private_set
    by = (*config.evaluation.classifiers, *config.evaluation.extractors)
    use = Uncovered(number, name, identity, by)
    Ledger(ledger_path(config)).enter_uncovered(use, config.privacy.delta)


def _note(source: Source, found: Evaluation, config: Config) -> str:
    from dp_lora.jobs.release import covers
    from dp_lora.jobs.spending import ledger_path

    if "release" in found.metadata:
        secret = config.privacy.insecure_seed is None
        if not secret:
            return "Nothing is covered: seeded noise."
        return covers(config.privacy.unit).replace("result.json", "this file")
    if not found.metadata["private_metrics"]:
        return "All images are public."
    return f"The use of private images is entered as not covered in {ledger_path(config)}."
