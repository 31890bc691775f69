"""The stages of one job: pretrain -> finetune -> sample -> evaluate.

A stage whose output is there is skipped, so the same command continues an interrupted job and returns at
once from a finished one. Everything that can be wrong with what the user asked for is found before the
run directory is made.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config import Config, fingerprint, from_omegaconf, pretrained_fingerprint, run_directory
from dp_lora.errors import UserError
from dp_lora.files import append_line, file_lock, private_directory, read_json, write_atomic, write_json

if TYPE_CHECKING:
    import torch

    from dp_lora.data import ImageSplits
    from dp_lora.models import LatentDiffusion
    from dp_lora.privacy.plan import PrivacyPlan
    from dp_lora.tracking import Tracker


OUTPUTS = {"finetune": "adapter", "sample": "samples.npz", "evaluate": "result.json"}
"""What a stage leaves in the run directory, whole or not at all; where it is, the stage is skipped."""


@dataclass
class Job:
    """What the stages share, all of it checked."""

    config: Config
    directory: Path
    images: ImageSplits
    plan: PrivacyPlan
    base_model: str
    device: torch.device
    seconds: dict[str, float]


def run(config: Config, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the chosen stages of one job and returns its result.

    Args:
        config: checked.
        overrides: the command line's words, for the readable part of the run directory's name.

    Raises:
        UserError: something that the user gave is wrong; nothing was written.
    """
    if config.stages == ["pretrain"]:
        _check_writable(Path(config.paths.cache).expanduser(), f"paths.cache={config.paths.cache}")
        folder = pretrained_model(config, again=True)
        print(f"pre-trained model  {folder}")
        return {"model": str(folder)}
    job = prepare(config, run_directory(config, overrides))
    stages: dict[str, Callable[[Job, Tracker], None]] = {
        "finetune": _finetune,
        "sample": _sample,
        "evaluate": _evaluate,
    }
    with _own(job):
        asked = [name for name in stages if name in config.stages]
        left = [name for name in asked if not (job.directory / OUTPUTS[name]).exists()]
        for name in asked:
            if name not in left:
                _say(f"{name}: done already, {job.directory / OUTPUTS[name]}")
        if left or not _is_done(job.directory):
            with _record(job) as tracker:
                for name in left:
                    tracker.status("running", stage=name)
                    stages[name](job, tracker)
    result = read_json(job.directory / "result.json") if (job.directory / "result.json").exists() else {}
    print(_summary(job, result))
    return {"directory": str(job.directory), **result.get("metrics", {})}


def _is_done(directory: Path) -> bool:
    status = directory / "status.json"
    return status.exists() and read_json(status)["state"] == "done"


def prepare(config: Config, directory: Path) -> Job:
    """The job, with everything checked that can be wrong and nothing written but caches.

    Raises UserError.
    """
    from dp_lora import data

    _check_directory(config, directory)
    images = data.load(config.data, config.paths)
    plan = _plan(config, len(images.train))
    device = _device(config)
    _check_model(config, images)
    _check_stages(config, directory)
    folder = pretrained_model(config)
    base_model = config.model.pretrained or folder.name
    return Job(config, directory, images, plan, base_model, device, {})


def _check_directory(config: Config, directory: Path) -> None:
    """Refuses a place that cannot be written and a run directory that belongs to another configuration."""
    saved = directory / "config.yaml"
    if saved.exists():
        from omegaconf import OmegaConf

        other = fingerprint(from_omegaconf(OmegaConf.load(saved)))  # type: ignore[arg-type]
        if other != fingerprint(config):
            raise UserError(
                f"{directory}: this run directory belongs to another configuration ({other}, expected "
                f"{fingerprint(config)}); move it away or choose another paths.outputs"
            )
    _check_writable(directory, f"paths.outputs={config.paths.outputs}")
    _check_writable(Path(config.paths.cache).expanduser(), f"paths.cache={config.paths.cache}")


def _check_writable(folder: Path, field: str) -> None:
    above = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{field}: {above} is not a directory that can be written")


def _plan(config: Config, num_examples: int) -> PrivacyPlan:
    from dp_lora.finetune import steps_of
    from dp_lora.privacy.plan import make_plan

    privacy = config.privacy
    return make_plan(
        num_examples=num_examples,
        expected_batch_size=config.train.expected_batch_size,
        steps=steps_of(config, num_examples),
        noise_multiplier=privacy.noise_multiplier,
        target_epsilon=privacy.epsilon,
        delta=privacy.delta,
        noise_multiplicity=privacy.noise_multiplicity,
        max_grad_norm=privacy.max_grad_norm,
        clipping=privacy.clipping,
        cache=Path(config.paths.cache).expanduser(),
    )


def _device(config: Config) -> torch.device:
    import torch

    if config.resources.threads is not None:
        torch.set_num_threads(config.resources.threads)
    wanted = config.resources.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "resources.device=cuda: this machine has no GPU that torch can use; expected auto or cpu"
        )
    name = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if name == "cuda" and config.train.precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise UserError("train.precision=bfloat16: this GPU has no bfloat16; expected float32")
    return torch.device(name)


def _check_model(config: Config, images: ImageSplits) -> None:
    """Refuses targets, ranks, images and classes that the model cannot take, before it has weights."""
    import torch

    from dp_lora import data
    from dp_lora.adapters import target_names
    from dp_lora.models import build, find, load

    public, components = config.public_data, config.trainable.components
    new_classes_can_be_learnt = "embedder" in components or "full" in components
    if config.model.pretrained is not None:
        model = load(find(config.model.pretrained))
    else:
        with torch.device("meta"):
            model = build(config.model, classes=["?"], channels=public.channels, image_size=public.image_size)
        if not new_classes_can_be_learnt:
            model.classes = data.load(public, config.paths, "public_data").train.classes
    channels, size = (int(model.autoencoder.config[name]) for name in ("in_channels", "sample_size"))
    found = images.train.images.shape[1:]
    if found != (channels, size, size):
        raise UserError(
            f"data.name={config.data.name}: images of {found[0]} x {found[1]} x {found[2]}, expected "
            f"{channels} x {size} x {size}, which the autoencoder of model.name={config.model.name} takes"
        )
    if images.train.classes != model.classes and not new_classes_can_be_learnt:
        raise UserError(
            f"trainable.components={components}: the classes of {config.data.name} "
            f"({', '.join(images.train.classes[:12])}) are new to the model, which cannot condition on them; "
            "expected embedder or full among the components"
        )
    if "lora" in components:
        target_names(model.unet, config.lora.target_modules, config.lora.rank)


def _check_stages(config: Config, directory: Path) -> None:
    for stage, before in (("sample", "finetune"), ("evaluate", "sample")):
        output = directory / OUTPUTS[before]
        if stage in config.stages and before not in config.stages and not output.exists():
            raise UserError(
                f"stages={config.stages}: {stage} needs {output}; expected {before} among the stages"
            )


def pretrained_model(config: Config, *, again: bool = False) -> Path:
    """The folder of the pre-trained model, made first if nobody has: once, for all jobs that wait for it.

    Args:
        config: `model.pretrained` names one, or `model` and `public_data` say how it is made.
        again: make it even if `model.pretrained` names one: what stages=[pretrain] asks for.
    """
    from dp_lora.models import find

    if config.model.pretrained is not None and not again:
        return find(config.model.pretrained)
    models = Path(config.paths.cache).expanduser() / "models"
    folder = models / f"{config.model.name}-{pretrained_fingerprint(config)}"
    if not folder.exists():
        models.mkdir(parents=True, exist_ok=True)
        with file_lock(models / f"{folder.name}.lock", waiting=lambda: _say(f"waiting for {folder}")):
            if not folder.exists():
                _pretrain(config, folder)
                _say(f"pre-trained model: {folder}")
    return folder


def _pretrain(config: Config, folder: Path) -> None:
    from dp_lora import data
    from dp_lora.pretrain import pretrain

    images = data.load(config.public_data, config.paths, "public_data")
    work = folder.with_name(folder.name + ".partial")
    work.mkdir(exist_ok=True)

    def log(step: int, values: dict[str, float]) -> None:
        append_line(work / "metrics.jsonl", {"stage": "pretrain", "step": step, **values})

    source = data.provenance(config.public_data, config.paths)
    pretrain(config, images, folder, device=_device(config), log=log, source=source)


@contextmanager
def _own(job: Job) -> Iterator[None]:
    """The run directory, made and held by this process alone."""

    def refuse() -> None:
        raise UserError(f"{job.directory}: another process is running this job; wait for it or stop it")

    private_directory(job.directory / "checkpoint")
    with file_lock(job.directory / "checkpoint" / "lock", waiting=refuse):
        yield


@contextmanager
def _record(job: Job) -> Iterator[Tracker]:
    """config.yaml, provenance.json and status.json around the stages; the tracker is passed to them."""
    from omegaconf import OmegaConf

    from dp_lora.provenance import finished, provenance
    from dp_lora.tracking import Tracker

    path = job.directory / "provenance.json"
    record = provenance(job.config, read_json(path) if path.exists() else None)
    job.seconds.update(record.setdefault("seconds", {}))
    write_atomic(job.directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(job.config)))
    write_json(path, record)
    identity = fingerprint(job.config)
    with Tracker(
        job.directory, job.config, run_id=identity, name=job.directory.name, resume_step=sys.maxsize
    ) as tracker:
        try:
            yield tracker
        except BaseException as error:
            # The text of an unexpected error may hold what nobody but the owner may read.
            text = str(error) if isinstance(error, UserError) else type(error).__name__
            tracker.status("failed", text)
            raise
        finally:
            write_json(path, {**finished(record), "seconds": job.seconds})
        tracker.status("done")


@contextmanager
def _timed(job: Job, stage: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        job.seconds[stage] = round(job.seconds.get(stage, 0.0) + time.monotonic() - started, 1)


def _model(job: Job) -> LatentDiffusion:
    """The pre-trained model on the job's device, conditioned on the classes of the private data."""
    import torch

    from dp_lora.models import load

    model = load(pretrained_model(job.config))
    if model.classes != job.images.train.classes:
        model.new_classes(job.images.train.classes, torch.Generator().manual_seed(job.config.seed))
    return model.to(job.device)


def _finetune(job: Job, tracker: Tracker) -> None:
    import torch

    from dp_lora import adapters, latents
    from dp_lora.finetune import finetune

    config, folder = job.config, job.directory / "checkpoint"
    model = _model(job)
    adapters.attach(model, config.trainable.components, config.lora, seed=config.seed)
    spends = "; ".join(" ".join(line.split()) for line in _guarantee(job))
    trained = ", ".join(config.trainable.components)
    _say(f"finetune: {adapters.count(model):,} trained parameters ({trained}); {spends}")
    with _timed(job, "finetune"):
        train = job.images.train
        encoded = latents.cached(model, train, Path(config.paths.cache).expanduser())

        def log(step: int, values: dict[str, float]) -> None:
            if step % config.tracking.log_every == 0 or step == job.plan.steps:
                tracker.log(step, values, "finetune")
            tracker.privacy(privacy_record(job, epsilon=values["epsilon"], steps=step, complete=False))

        executed = finetune(
            config,
            model,
            encoded,
            torch.from_numpy(train.labels),
            job.plan,
            folder,
            log,
            started=lambda finished: tracker.rewind("finetune", finished + 1),
        )
    record = privacy_record(job, epsilon=job.plan.epsilon, steps=executed, complete=True)
    tracker.privacy(record)
    _export(job, model, record)
    tracker.adapter(job.directory / "adapter")


def privacy_record(job: Job, *, epsilon: float, steps: int, complete: bool) -> dict[str, Any]:
    """The content of privacy.json after `steps` noisy steps."""
    from dp_lora.card import COVERS, DOES_NOT_COVER, no_guarantee

    secret = job.config.privacy.insecure_seed is None
    record = {
        **job.plan.to_dict(),
        "epsilon": epsilon,
        "steps": steps,
        "planned_steps": job.plan.steps,
        "complete": complete,
        "reproducible_noise": not secret,
    }
    nothing = no_guarantee(record, reproducible_noise=not secret)
    covers = COVERS if nothing is None else nothing
    return {**record, "covers": covers, "does_not_cover": DOES_NOT_COVER}


def _export(job: Job, model: LatentDiffusion, record: Mapping[str, Any]) -> None:
    """Writes adapter/ as a whole: it appears complete or not at all."""
    from dp_lora import adapters
    from dp_lora.card import model_card
    from dp_lora.provenance import versions

    config = job.config
    lora = "lora" in config.trainable.components
    card = model_card(
        record,
        base_model=job.base_model,
        data_name=config.data.name,
        trainable=config.trainable.components,
        rank=config.lora.rank if lora else None,
        target_modules=config.lora.target_modules if lora else [],
        parameters=adapters.count(model),
        versions=versions(),
        reproducible_noise=config.privacy.insecure_seed is not None,
    )
    partial = job.directory / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    adapters.export(model, partial, base_model=job.base_model, card=card)
    partial.replace(job.directory / "adapter")


def _sample(job: Job, tracker: Tracker) -> None:
    from dp_lora import sample

    with _timed(job, "sample"):
        samples = sample.generate(finetuned_model(job), job.config)
        sample.save(samples, job.directory)
    tracker.images("samples", job.directory / "samples.png")


def finetuned_model(job: Job) -> LatentDiffusion:
    """The model with the run's adapter, as somebody who was given only the adapter would load it."""
    from dp_lora import adapters
    from dp_lora.models import load

    model = load(pretrained_model(job.config))
    adapters.restore(model, job.directory / "adapter", job.images.train.classes)
    return model.to(job.device)


def _evaluate(job: Job, tracker: Tracker) -> None:
    from dp_lora import adapters, sample
    from dp_lora.evaluate import evaluate_all

    config = job.config
    with _timed(job, "evaluate"):
        samples = sample.load(job.directory)
        before = sample.generate(_model(job), config, "sample before fine-tuning")
        evaluation = evaluate_all(
            samples,
            job.images,
            config.evaluation,
            before=before,
            seed=config.seed,
            device=job.device,
            cache=Path(config.paths.cache).expanduser(),
            progress=_say,
        )
    model = _model(job)
    adapters.attach(model, config.trainable.components, config.lora, seed=config.seed)
    tracker.result(
        {
            "metrics": evaluation.metrics,
            **evaluation.metadata,
            "seed": config.seed,
            "trainable_parameters": adapters.count(model),
            "seconds": job.seconds,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "device": str(job.device),
        }
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _summary(job: Job, result: Mapping[str, Any]) -> str:
    """The table that a job ends with: what was spent, what came of it, where it lies."""
    from dp_lora.tracking import baseline_table

    lines = [*_guarantee(job), f"noise multiplicity {job.plan.noise_multiplicity}"]
    metrics = result.get("metrics", {})
    if metrics:
        columns, rows = baseline_table(metrics)
        lines += ["", _row(columns), *(_row([row[0], *map(_number, row[1:])]) for row in rows)]
    lines += ["", f"run directory      {job.directory}"]
    return "\n".join(lines)


def _guarantee(job: Job) -> list[str]:
    """What the fine-tuning spends, or why it guarantees nothing."""
    from dp_lora.card import no_guarantee

    plan, seeded = job.plan, job.config.privacy.insecure_seed is not None
    nothing = no_guarantee(plan.to_dict(), reproducible_noise=seeded)
    lines = [nothing.strip("*.")] if nothing else []
    if plan.private:
        lines += [
            f"epsilon            {plan.epsilon:.4g} ({plan.accountant}, {plan.adjacency})",
            f"delta              {plan.delta:g}",
        ]
    sizes = f"{plan.steps} steps, sample rate {plan.sample_rate:.4g}"
    return [*lines, f"noise multiplier   {plan.noise_multiplier:.4g}, {sizes}"]


def _row(cells: Sequence[str]) -> str:
    return f"{cells[0]:<18} " + " ".join(f"{cell:>10}" for cell in cells[1:])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
