"""One job, checked.

Everything that can be wrong with what the user asked for is found here, before its run directory is made.
"""

from __future__ import annotations

import gc
import math
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config.identity import fingerprint, pretrained_fingerprint
from dp_lora.config.load import read_config
from dp_lora.config.schema import Config
from dp_lora.config.wandb_settings import named, wandb_mode
from dp_lora.errors import PlanError, UserError
from dp_lora.jobs import choosing
from dp_lora.jobs.device import device_of
from dp_lora.privacy.collectives import agreed, rank
from dp_lora.records import manifest
from dp_lora.records.run_directory import OUTPUTS, WAY_OUT, check_records, is_whole
from dp_lora.storage.files import append_line, check_writable, expanded, file_lock
from dp_lora.storage.imports import uncollected

if TYPE_CHECKING:
    import torch

    from dp_lora.data.sets import ImageSplits
    from dp_lora.jobs.start import Start
    from dp_lora.models.latent_diffusion import LatentDiffusion
    from dp_lora.privacy.plan import PrivacyPlan
    from dp_lora.training.scouting import Choice

_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")
"""A folder in the cache of the hub, by its owner and name."""

LOSS_SHARE = 0.1
"""Share of the clipping norm that `tracking.private_loss` takes: it leaves 99.5 % to the gradient."""


PLAN_FIELDS = {
    "num_examples": "data",
    "sample_rate": "train.sample_rate",
    "expected_batch_size": "train.expected_batch_size",
    "steps": "train.max_steps",
    "noise_multiplier": "privacy.noise_multiplier",
    "target_epsilon": "privacy.epsilon",
    "delta": "privacy.delta",
    "noise_multiplicity": "privacy.noise_multiplicity",
    "max_grad_norm": "privacy.max_grad_norm",
    "clipping": "privacy.clipping",
    "adjacency": "privacy.adjacency",
    "unit": "privacy.unit",
}
"""The field of the configuration that gives each parameter of the plan."""


@dataclass
class Job:
    """A job as its stages share it, with everything checked."""

    config: Config
    directory: Path
    images: ImageSplits
    plan: PrivacyPlan
    pretrained: Path
    device: torch.device
    seconds: dict[str, float]
    start: Start | None = None
    """The adapter that the training starts from; None: the pre-trained model."""
    choice: dict[str, Any] | None = None
    """The matrices that the run has chosen to train, as privacy.json states them; None: all, or not yet."""

    @cached_property
    def model(self) -> LatentDiffusion:
        """The pre-trained model on the CPU, read once. Stages change copies of it, by `sharing_weights`.

        Raises UserError, see `folders.load`.
        """
        from dp_lora.models.folders import load

        model = self.config.model
        size = self.config.data.image_size
        return load(
            self.pretrained,
            model.prompt,
            image_size=size,
            prompt_length=model.prompt_length,
            precision=model.base_precision,
        )

    def keep_choice(self, choice: Choice) -> None:
        """Notes which matrices are trained, once they are chosen."""
        self.choice = choice.record()

    def forget_model(self) -> None:
        """Lets the model go, so that a copy can free what it needs no more. It is read again if need be."""
        self.__dict__.pop("model", None)
        gc.collect()  # networks refer to themselves

    @property
    def base_model(self) -> str:
        """The name of the pre-trained model on the adapter's card, by `name_of_base`."""
        return name_of_base(self.config, self.pretrained)


def name_of_base(config: Config, pretrained: Path) -> str:
    """The name of the pre-trained model in the folder `pretrained`, as an adapter's card has it.

    That is the name of shipped weights or of a pipeline on the hub, also where its folder in the hub's cache
    was given. Of another folder, whose path stays private, it is the model's name and eight digits of the
    SHA-256 of its weights, by which whoever has it can tell that it is the one.
    """
    from dp_lora.models.folders import sha256_of_weights

    given = config.model.pretrained
    if given is not None and (manifest.is_shipped(config) or not Path(given).expanduser().exists()):
        return given
    if (on_the_hub := _CACHED.search(str(pretrained.resolve()))) is not None:
        return f"{on_the_hub[1]}/{on_the_hub[2]}"
    return f"{config.model.name}-{sha256_of_weights(pretrained)[:8]}"


def prepare(config: Config, directory: Path) -> Job:
    """The job, with everything checked that can be wrong and nothing written but caches.

    Raises UserError.
    """
    from dp_lora.data import sets
    from dp_lora.jobs.apart import refuse_one_place
    from dp_lora.jobs.start import start_of

    _check_directory(config, directory)
    with uncollected():
        from dp_lora.jobs.settings import check_settings
        from dp_lora.models.sample import labels_of

    if wandb_mode(config.tracking.wandb) != "disabled":
        config = replace(config, tracking=named(config.tracking, config.experiment))
        folder = config.tracking.folder
        if folder is not None:
            check_writable(expanded(folder, "tracking.folder"), f"tracking.folder={folder}")
    check_settings(config)
    refuse_one_place(config)
    images = sets.load(config.data, config.paths)
    check_content(images, directory)
    if "finetune" in config.stages and not (directory / OUTPUTS["finetune"]).exists():
        sets.refuse_flat(images.train)
    examples = images.train.examples(config.privacy.unit)
    plan = plan_of(config, examples)
    choosing.check(config, plan, images)
    _say_batch(config, plan, examples)
    _check_budget(config, plan, directory, images)
    device = device_of(config)
    _check_model(config, images)
    if config.sampler.classes is not None:
        labels_of(images.train.classes, 0, config.sampler.counts)
    _check_stages(config, directory)
    _check_evaluation(config, images)
    _check_base(config)
    pretrained = pretrained_model(config, private=images)
    start = start_of(config, directory, images, plan, pretrained)
    choice = None if config.trainable.choice == "all" else choosing.recorded(directory)
    return Job(config, directory, images, plan, pretrained, device, {}, start, choice)


def _check_base(config: Config) -> None:
    """Refuses to pre-train another model for an adapter, which belongs to one that is there."""
    given = config.train.continue_from or config.model.adapter
    if given is None or config.model.pretrained is not None or _folder_of_model(config).exists():
        return
    raise UserError(
        f"{'model.adapter' if config.train.continue_from is None else 'train.continue_from'}={given}: these "
        "settings ask for a pre-trained model that is not there, and an adapter belongs to its own; expected "
        "the seed, model and public_data with which that was made, or model.pretrained=FOLDER"
    )


def has_model(config: Config) -> bool:
    """Whether the job's pre-trained model is there, or is named, so that nobody has to make it first."""
    return config.model.pretrained is not None or _folder_of_model(config).exists()


def _folder_of_model(config: Config) -> Path:
    """The folder in the cache of the model that is pre-trained on public images."""
    name = f"{config.model.name}-{pretrained_fingerprint(config)}"
    return Path(config.paths.cache).expanduser() / "models" / name


def _check_directory(config: Config, directory: Path) -> None:
    """Refuses a place that cannot be written and a run directory that belongs to another configuration."""
    saved = directory / "config.yaml"
    if saved.exists():
        other = fingerprint(read_config(saved))
        if other != fingerprint(config):
            raise UserError(
                f"{directory}: this run directory belongs to another configuration ({other}, expected "
                f"{fingerprint(config)}); move it away or choose another paths.outputs"
            )
    check_records(directory)
    check_writable(directory, f"paths.outputs={config.paths.outputs}")
    check_writable(Path(config.paths.cache).expanduser(), f"paths.cache={config.paths.cache}")


def plan_of(config: Config, num_examples: int) -> PrivacyPlan:
    """The plan of the private fine-tuning on `num_examples` images, or persons with privacy.unit=person.

    Raises UserError as `make_plan` says.

    Under privacy.adjacency=add_or_remove it does not depend on `num_examples`.
    """
    from dp_lora.privacy.plan import make_plan

    privacy = config.privacy
    if num_examples < 1:
        raise UserError(f"data: {num_examples} training {privacy.unit}s: expected at least 1")
    try:
        return make_plan(
            num_examples=public_number(config, num_examples),
            sample_rate=config.train.sample_rate,
            expected_batch_size=config.train.expected_batch_size,
            steps=steps_of(config, num_examples),
            noise_multiplier=privacy.noise_multiplier,
            target_epsilon=privacy.epsilon,
            delta=privacy.delta,
            noise_multiplicity=privacy.noise_multiplicity,
            max_grad_norm=privacy.max_grad_norm,
            clipping=privacy.clipping,
            adjacency=privacy.adjacency,
            unit=privacy.unit,
            loss_share=LOSS_SHARE if config.tracking.private_loss else 0.0,
            cache=Path(config.paths.cache).expanduser(),
        )
    except PlanError as error:
        raise UserError(error.named(PLAN_FIELDS)) from None


def _say_batch(config: Config, plan: PrivacyPlan, num_examples: int) -> None:
    """Tells the owner alone how large batches will be, where that does not follow from public numbers."""
    if config.privacy.adjacency == "add_or_remove" and "finetune" in config.stages and rank() == 0:
        unit, mean = config.privacy.unit, plan.sample_rate * num_examples
        say(
            f"data: {num_examples} training {unit}s, {mean:.4g} in the mean batch; "
            f"their sum is divided by train.expected_batch_size={plan.expected_batch_size:g} (for your eyes: "
            f"privacy.adjacency=add_or_remove keeps the number of {unit}s private)"
        )


def public_number(config: Config, num_examples: int | None) -> int | None:
    """The number of examples where it is public; None under privacy.adjacency=add_or_remove."""
    return None if config.privacy.adjacency == "add_or_remove" else num_examples


def steps_of(config: Config, num_examples: int | None) -> int | None:
    """Number of noisy steps that `train.max_steps` and `train.epochs` ask for; null when left open.

    `num_examples` is looked at for `train.epochs` only, which privacy.adjacency=add_or_remove refuses.
    """
    train = config.train
    asked = [train.max_steps] if train.max_steps is not None else []
    if train.epochs is not None:
        assert num_examples is not None
        asked.append(max(1, round(train.epochs * num_examples / train.expected_batch_size)))
    return min(asked) if asked else None


def check_content(images: ImageSplits, directory: Path) -> None:
    """Refuses images that are not those that the run in `directory` was made from, or differ by process.

    Where the run has no record of its images, the owner is told.
    """
    from dp_lora.jobs import content

    # The first process speaks for all, so that all of them end.
    reason = agreed(content.refusal(images, directory / "checkpoint") if rank() == 0 else None)
    if reason is not None:
        raise UserError(reason)
    content.agree(images)
    if rank() == 0 and (line := content.unknown(directory)) is not None:
        say(line)


def _check_budget(config: Config, plan: PrivacyPlan, directory: Path, images: ImageSplits) -> None:
    """Refuses what the budget or the ledger of the private set does not allow."""
    from dp_lora.jobs import spending

    # The first process speaks for all: what it charges later must not count against the others.
    reason = agreed(spending.refusal(config, plan, directory, images) if rank() == 0 else None)
    if reason is not None:
        raise UserError(reason)


def _check_model(config: Config, images: ImageSplits) -> None:
    """Refuses images and classes that the model cannot take, before it has weights."""
    from dp_lora.data import sets
    from dp_lora.jobs.settings import check_fit, outline_of

    public, components = config.public_data, config.trainable.components
    model = outline_of(config)
    check_fit(config, model, images.train.images.shape[1:])
    known, new = model.classes, images.train.classes
    new_classes_can_be_learnt = not model.learns_classes or bool({"embedder", "full"} & set(components))
    if config.model.pretrained is None and not new_classes_can_be_learnt:
        known = sets.load(public, config.paths, "public_data").train.classes
    if new != known and not new_classes_can_be_learnt:
        raise UserError(
            f"trainable.components={components}: the classes of {config.data.name} "
            f"({', '.join(new[:12])}) are new to the model, which cannot condition on them; "
            "expected embedder or full among the components"
        )


def _check_stages(config: Config, directory: Path) -> None:
    result = directory / OUTPUTS["evaluate"]
    if config.evaluation.release == "dp" and result.exists() and not is_whole(directory, "evaluate"):
        raise UserError(
            f"{result}: cannot be read; expected what the evaluation left: its budget is spent, so put it "
            "back, or remove it to pay for another one"
        )
    if (
        config.evaluation.release == "dp"
        and "evaluate" in config.stages
        and not result.exists()
        and (directory / OUTPUTS["finetune"]).exists()
        and not (directory / "privacy.json").exists()
    ):
        raise UserError(
            f"{directory / 'privacy.json'}: is missing; expected what the training left, to which "
            f"evaluation.release=dp adds its own: {WAY_OUT}"
        )
    for stage, before in (("sample", "finetune"), ("evaluate", "sample")):
        output = directory / OUTPUTS[before]
        if stage in config.stages and before not in config.stages and not is_whole(directory, before):
            raise UserError(
                f"stages={config.stages}: {stage} needs {output}; expected {before} among the stages"
            )


def _check_evaluation(config: Config, images: ImageSplits) -> None:
    """Refuses what the last stage would refuse, before the first one runs."""
    if "evaluate" not in config.stages:
        return
    from dp_lora.evaluation import evaluate
    from dp_lora.jobs import release

    evaluate.check(config.evaluation, images, config.sampler.number)
    if config.evaluation.release == "dp":
        release.check(config, images)


def pretrained_model(config: Config, *, again: bool = False, private: ImageSplits | None = None) -> Path:
    """The folder of the pre-trained model, made first if nobody has: once, for all jobs that wait for it.

    Every process of the job has to ask, since they make it together.

    Args:
        config: `model.pretrained` names one, or `model` and `public_data` say how it is made.
        again: make it even if `model.pretrained` names one: what stages=[pretrain] asks for.
        private: images that must not be among those that it is made from, where they are at hand.

    Raises UserError when it would be made from private images.
    """
    from dp_lora.jobs.apart import refuse_drawn, refuse_one_place, refuse_seen
    from dp_lora.models.folders import find

    refuse_one_place(config)

    if config.model.pretrained is not None and not again:
        found = find(config.model.pretrained)
        if private is not None:
            refuse_seen(config, found, private)
        return found
    refuse_drawn(config)
    folder = _folder_of_model(config)
    if agreed(not folder.exists()):
        _pretrain_once(config, folder, private)
    if private is not None:
        refuse_seen(config, folder, private)
    return folder


def _pretrain_once(config: Config, folder: Path, private: ImageSplits | None) -> None:
    """Makes `folder`, by one job at a time; the processes of a job do it together."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f"{folder.name}.lock")
    with ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(file_lock(lock, waiting=lambda: say(f"waiting for {folder}")))
        if agreed(not folder.exists()):
            _pretrain(config, folder, private)
            if rank() == 0:
                say(f"pre-trained model: {folder}")


def _pretrain(config: Config, folder: Path, private: ImageSplits | None) -> None:
    from dp_lora.data import sets
    from dp_lora.jobs.apart import refuse_shared_images
    from dp_lora.training.pretrain import pretrain

    images = sets.load(config.public_data, config.paths, "public_data")
    sets.refuse_flat(images.train, "public_data")
    if private is not None:
        refuse_shared_images(config, images, private)
    work = folder.with_name(folder.name + ".partial")
    work.mkdir(exist_ok=True)

    def log(step: int, values: dict[str, float]) -> None:
        append_line(work / "metrics.jsonl", {"stage": "pretrain", "step": step, **values})
        if odd := [name for name, value in values.items() if not math.isfinite(value)]:
            raise UserError(
                f"model.pretrain: the pre-training diverged: {odd[0]} is no finite number after step {step}; "
                "expected smaller learning rates"
            )

    source = sets.provenance(config.public_data, config.paths)
    pretrain(config, images, folder, device=device_of(config), log=log, source=source)


def say(line: str) -> None:
    """A line for whoever watches the job, on stderr."""
    print(line, file=sys.stderr, flush=True)
