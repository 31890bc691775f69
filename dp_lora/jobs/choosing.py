"""The choice of the matrices that get adapters: before a training, and as a finished run states it.

With trainable.choice=salient the training itself chooses, from its first noised sums (`training.scouting`).
What is here chooses without a private image, by the public set or by the seed, before the training begins.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.privacy.collectives import agreed, rank, size
from dp_lora.storage.files import Damaged, private_directory, read_json, write_json

if TYPE_CHECKING:
    from dp_lora.data.sets import ImageSplits
    from dp_lora.models.latent_diffusion import LatentDiffusion
    from dp_lora.privacy.plan import PrivacyPlan
    from dp_lora.training.scouting import Choice

CHOICE = "choice.json"
"""In the private `checkpoint/` of a run that chose before its training: what `Choice.record` says."""

COVERED = (
    "Which matrices have adapters, and the scores that decided it: both were read from the first noised sums "
    "of the training, and epsilon counts those steps. Their number, the noise and the sample rate were fixed "
    "before."
)
"""What the guarantee of a run with trainable.choice=salient covers, too."""


def recorded(directory: Path) -> dict[str, Any] | None:
    """The choice that the privacy.json of a run states; None where there is none."""
    path = directory / "privacy.json"
    found = read_json(path) if path.exists() else None
    choice = found.get("choice") if isinstance(found, Mapping) else None
    return dict(choice) if isinstance(choice, Mapping) else None


def narrowed(model: LatentDiffusion, choice: Mapping[str, Any] | None) -> LatentDiffusion:
    """`model`, changed in place, with the adapters of the chosen matrices alone; all without a `choice`."""
    from dp_lora.models import candidates

    if choice is not None:
        candidates.keep(model, choice["chosen"])
    return model


def check(config: Config, plan: PrivacyPlan, images: ImageSplits) -> None:
    """Raises UserError where the steps leave nothing to train, or the public set cannot choose."""
    trainable = config.trainable
    if trainable.choice == "salient" and trainable.scout_steps >= plan.steps:
        raise UserError(
            f"trainable.scout_steps={trainable.scout_steps}: expected fewer than the {plan.steps} noisy "
            "steps of the run, of which they are the first"
        )
    if trainable.choice == "salient_public" and "finetune" in config.stages:
        public_images(config, images)


def public_images(config: Config, private: ImageSplits) -> ImageSplits:
    """The public set that chooses. Raises UserError where its images do not fit, or are private ones."""
    from dp_lora.data import sets
    from dp_lora.jobs.apart import refuse_shared_images

    public = sets.load(config.public_data, config.paths, "public_data")
    refuse_shared_images(config, public, private)
    given, wanted = public.train.images.shape[1:], private.train.images.shape[1:]
    if given != wanted:
        raise UserError(
            f"public_data.name={config.public_data.name} with trainable.choice=salient_public: images of "
            f"{' x '.join(map(str, given))}, expected {' x '.join(map(str, wanted))} as the private ones"
        )
    return public


def before_training(
    config: Config, model: LatentDiffusion, plan: PrivacyPlan, images: ImageSplits, folder: Path
) -> dict[str, Any] | None:
    """Chooses by the public set or by the seed; `model` keeps the adapters of the chosen matrices.

    None, and nothing done, where the training chooses itself or trains all. A run that goes on keeps the
    choice that it began with.

    Args:
        config, plan, images: of the job.
        model: all candidates have adapters; changed in place.
        folder: the private `checkpoint/`.
    """
    if config.trainable.choice not in ("salient_public", "random"):
        return None
    path = folder / CHOICE
    kept = agreed(read_json(path) if rank() == 0 and path.exists() else None)
    if kept is None:
        kept = agreed(_choice(config, model, plan, images).record())
        if rank() == 0:
            write_json(private_directory(folder) / CHOICE, kept, mode=0o600)
    try:
        narrowed(model, kept)
    except (KeyError, TypeError) as error:
        raise Damaged(f"{path}: expected the choice of a run, as this program wrote it") from error
    return dict(kept)


def _choice(config: Config, model: LatentDiffusion, plan: PrivacyPlan, images: ImageSplits) -> Choice:
    from dp_lora.models import candidates
    from dp_lora.training.scouting import random_choice

    if config.trainable.choice == "random":
        return random_choice(config.trainable, list(candidates.candidates(model)), config.seed)
    return _by_public_images(config, model, plan, public_images(config, images))


def _by_public_images(
    config: Config, model: LatentDiffusion, plan: PrivacyPlan, images: ImageSplits
) -> Choice:
    """The choice by gradients of public images, clipped as the private ones are and without noise.

    A class of the public set stands for one of the private set, whose embedding is as new to the model: the
    gradient is then of the same task, to learn new classes.
    """
    import torch

    from dp_lora.models import latents
    from dp_lora.privacy.executions import Executions
    from dp_lora.privacy.randomness import Randomness
    from dp_lora.privacy.scouting import Scout
    from dp_lora.training import tuning
    from dp_lora.training.finetune import FinetuneStep
    from dp_lora.training.scouting import Choice, Scouting

    number, found = len(images.train), list[Choice]()
    rate = min(1.0, plan.expected_batch_size / number)
    without_noise = replace(plan, noise_multiplier=0.0, num_examples=None, sample_rate=rate, loss_share=0.0)
    cache = Path(config.paths.cache).expanduser()
    encoded = latents.cached(model, images.train, cache, config.tracking.progress)
    labels = torch.from_numpy(images.train.labels) % max(1, len(model.classes))
    scouting = Scouting(config, model, found.append)
    optimizer = scouting.open()
    with tempfile.TemporaryDirectory() as folder:
        microbatch = tuning.choose_microbatch(model, without_noise, config.train, size(), Path(folder), cache)
        executions = Executions(Path(folder) / "executions.jsonl", {"public": True})
        key = Randomness.from_seed(config.seed)
        scout = Scout(model, optimizer, without_noise, key, executions, number)
        step = FinetuneStep(scout, encoded, labels, config.train, microbatch, first=scouting.steps)
        for index in range(scouting.steps):
            step(index)
        scouting.narrow(scout, scout.kept)
    return found[0]
