"""The stages of one job: pretrain -> finetune -> sample -> evaluate.

A stage whose output is there is skipped, so the same command continues an interrupted job and returns at
once from a finished one.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config.identity import absolute_paths, run_directory
from dp_lora.config.schema import Config
from dp_lora.config.search import refuse_one_job
from dp_lora.errors import Busy, UserError, recorded
from dp_lora.jobs import choosing, reuse
from dp_lora.jobs.ancestry import is_release, name_of
from dp_lora.jobs.device import device_of
from dp_lora.jobs.drawing import IMAGES, export_images
from dp_lora.jobs.job import Job, prepare, pretrained_model, say
from dp_lora.jobs.spending import charged, refusal
from dp_lora.jobs.start import first_values, keep, with_classes
from dp_lora.jobs.statement import epsilon_so_far, privacy_record
from dp_lora.jobs.summary import guarantee, summary
from dp_lora.records import manifest
from dp_lora.records.rounding import coarse, power_of_two
from dp_lora.records.run_directory import OUTPUTS, is_whole, keep_adapter, result, state
from dp_lora.storage.files import (
    check_writable,
    file_lock,
    private_directory,
    read_json,
    write_atomic,
    write_json,
)
from dp_lora.storage.imports import uncollected
from dp_lora.training.processes import Team, joined
from dp_lora.training.signals import Preempted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dp_lora.evaluation.evaluate import Evaluation
    from dp_lora.models.folders import LatentDiffusion
    from dp_lora.models.sample import Samples
    from dp_lora.records.tracker import Tracker


def run(config: Config, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the chosen stages of one job and returns its result.

    In a job of several processes each of them calls it; see `processes`.

    Args:
        config: checked.
        overrides: the command line's words, for the readable part of the run directory's name.

    Raises:
        UserError: something that the user gave is wrong; nothing was written.
    """
    refuse_one_job(config.search)
    with joined(device_of(config)) as team:
        if config.stages == ["pretrain"]:
            return _pretrain_alone(config, team)
        outputs = config.paths.outputs
        check_writable(Path(outputs).expanduser(), f"paths.outputs={outputs}")
        directory = run_directory(config, overrides)
        if not team.first:
            return _follow(config, directory, team)
        return _lead(config, directory, team, manifest.run_name(config, overrides))


def _pretrain_alone(config: Config, team: Team) -> dict[str, Any]:
    """Runs stages=[pretrain]; all processes of the job take part."""
    check_writable(Path(config.paths.cache).expanduser(), f"paths.cache={config.paths.cache}")
    folder = pretrained_model(config, again=True)
    if team.first:
        print(f"pre-trained model  {folder}")
    return {"model": str(folder)}


def _lead(config: Config, directory: Path, team: Team, shown_name: str) -> dict[str, Any]:
    """The job, as its first or only process runs it; W&B calls it by `shown_name`."""
    job = prepare(config, directory)
    with own(job.directory), ExitStack() as alone:
        asked = [name for name in OUTPUTS if name in config.stages]
        left = [name for name in asked if not is_whole(job.directory, name)]
        source = None
        if "finetune" in left:
            start = None
            if job.start is not None:
                # What its ancestors released since a run began was no part of its training.
                before = frozenset(name_of(one) for one in job.start.before if not is_release(one))
                start = reuse.Begun(job.start.digest, before)
            source = reuse.find(job.config, job.directory, job.images, job.pretrained, start, alone, say)
        if "finetune" in left and source is None:
            reason = refusal(job.config, job.plan, job.directory, job.images, alone=True)
            if reason is not None:
                raise UserError(reason)
        team.tell("stages", [name for name in left if source is None or name != "finetune"])

        def finetune(job: Job, tracker: Tracker) -> None:
            if source is not None:
                say(f"finetune: taken from {source}, which differs in sampler or evaluation only: no epsilon")
                reuse.take(source, job.directory, tracker)
                job.choice = choosing.recorded(job.directory)
                return
            reuse.begin(job.directory, job.pretrained)
            _finetune(job, tracker, team)
            reuse.offer(job.config, job.directory)
            alone.close()

        if "finetune" in asked and "finetune" not in left:
            reuse.offer(job.config, job.directory)  # unless a kill came before it was
        stages = {"finetune": finetune, "sample": _sample, "evaluate": _evaluate}
        for name in asked:
            output = job.directory / OUTPUTS[name]
            if name not in left:
                say(f"{name}: done already, {output}")
            elif output.exists():
                say(f"{name}: {output} is damaged and is made again")
        if left or state(job.directory) != "done":
            with _record(job, shown_name) as tracker:
                for name in left:
                    tracker.status("running", stage=name)
                    stages[name](job, tracker)
        if "sample" in asked and job.config.sampler.export == "png":
            export_images(job.directory)
    team.tell("finished")
    found = result(job.directory)
    print(summary(job, found))
    return {"directory": str(job.directory), **found.get("metrics", {})}


def _follow(config: Config, directory: Path, team: Team) -> dict[str, Any]:
    """The job, as its other processes run it: they take their part of the training and then wait."""
    # As the first process does, since all pre-train together when the model has no weights yet.
    job = prepare(config, directory)
    left = team.told("stages")
    if "finetune" in left:
        team.told("latents")
        _train(job, team)
    team.told("finished")
    return {"directory": str(directory)}


@contextmanager
def own(directory: Path) -> Iterator[None]:
    """The run directory, made and held by this process alone; nobody but its owner can enter it."""

    def refuse() -> None:
        raise Busy(f"{directory}: another process is running this job; wait for it or stop it")

    private_directory(directory)
    private_directory(directory / "checkpoint")
    with file_lock(directory / "checkpoint" / "lock", waiting=refuse):
        yield


@contextmanager
def _record(job: Job, name: str) -> Iterator[Tracker]:
    """config.yaml, provenance.json and status.json around the stages; the tracker is passed to them."""
    from omegaconf import OmegaConf

    from dp_lora.records.provenance import finished, provenance
    from dp_lora.records.tracker import Tracker, wandb_id

    path = job.directory / "provenance.json"
    record = provenance(job.config, read_json(path) if path.exists() else None)
    job.seconds.update(record.setdefault("seconds", {}))
    # Commands that take the run later may be given in another folder.
    config = replace(job.config, paths=absolute_paths(job.config.paths))
    write_atomic(job.directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_json(path, record)
    identity = wandb_id(job.directory / "checkpoint")
    with Tracker(job.directory, job.config, run_id=identity, name=name, resume_step=sys.maxsize) as tracker:
        try:
            yield tracker
        except Preempted:
            # It goes on when the cluster starts it again: neither done nor failed, and the same W&B run.
            tracker.preempting()
            write_json(path, {**record, "seconds": job.seconds})
            raise
        except BaseException as error:
            text = recorded(error)
            # What went wrong counts, not that a full disk has no room to say so.
            with suppress(OSError):
                tracker.status("failed", text)
                write_json(path, {**finished(record), "seconds": job.seconds})
            raise
        write_json(path, {**finished(record), "seconds": job.seconds})
        tracker.status("done")


@contextmanager
def _timed(job: Job, stage: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        # An exact time would tell how large the private batches were; the other stages have none.
        taken = job.seconds.get(stage, 0.0) + time.monotonic() - started
        job.seconds[stage] = coarse(taken) if stage == "finetune" else float(f"{taken:.2g}")


def model_before(job: Job) -> LatentDiffusion:
    """The model before the training on the job's device, conditioned on the classes of the private data.

    That is the pre-trained one, with the adapter that the training starts from where there is one.
    """
    if job.start is not None:
        return model_to_train(job)
    model = with_classes(job.model.sharing_weights(), job.config, job.images.train.classes, None)
    return model.to(job.device)


def model_to_train(job: Job) -> LatentDiffusion:
    """The same, with what is trained chosen and at its first values; all candidates before a choice."""
    adapter = None if job.start is None else job.start.adapter
    model = first_values(job.model.sharing_weights(), job.config, job.images.train.classes, adapter)
    return choosing.narrowed(model, job.choice).to(job.device)


def _finetune(job: Job, tracker: Tracker, team: Team) -> None:
    from dp_lora.jobs import content

    config = job.config

    executed = 0

    def log(step: int, values: dict[str, float]) -> None:
        note()
        if job.start is not None and "epsilon" in values:
            values = {**values, "epsilon": epsilon_so_far(job, executed, values["epsilon"])}
        if step % config.tracking.log_every == 0 or step == job.plan.steps:
            tracker.log(step, values, "finetune")

    def begun(executions: int, epsilon: float) -> None:
        nonlocal executed
        executed = executions
        tracker.privacy(privacy_record(job, epsilon=epsilon, steps=executions, complete=False))

    def started(finished: int) -> None:
        tracker.rewind("finetune", finished + 1)

    folder = job.directory / "checkpoint"
    with charged(config, job.plan, folder, job.images) as note, _timed(job, "finetune"):
        content.keep(job.images, folder)
        if job.start is not None:
            say(f"finetune: starts from {job.start.described()}")
            keep(job.start, folder)
        model, executed = _train(job, team, log, started, begun)
    tracker.stage_ended("finetune")
    record = privacy_record(job, epsilon=job.plan.epsilon, steps=executed, complete=True)
    tracker.privacy(record)
    _export(job, model, record)
    tracker.adapter(job.directory / "adapter")


def _train(
    job: Job,
    team: Team,
    log: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    started: Callable[[int], None] = lambda finished: None,
    begun: Callable[[int, float], None] = lambda executions, epsilon: None,
) -> tuple[LatentDiffusion, int]:
    """The fine-tuned model and the number of executed steps; the three calls as in `finetune`."""
    import torch

    with uncollected():
        from dp_lora.models import adapters, latents
        from dp_lora.privacy.persons import Persons
        from dp_lora.training.finetune import finetune

    config, train, folder = job.config, job.images.train, job.directory / "checkpoint"
    job.choice = None  # a training that goes on chooses as it did before
    model = model_to_train(job)
    job.choice = choosing.before_training(config, model, job.plan, job.images, folder)
    if model.source is not None:
        # The training gives up text encoders and autoencoder.
        job.forget_model()
    if team.first:
        seeded = config.privacy.insecure_seed is not None
        planned = {**job.plan.to_dict(), "reproducible_noise": seeded}
        spends = "; ".join(" ".join(line.split()) for line in guarantee(planned))
        by_component = adapters.count_by_component(model, config.trainable.components)
        trained = ", ".join(f"{component} {number:,}" for component, number in by_component.items())
        say(f"finetune: {adapters.count(model):,} trained parameters ({trained}); {spends}")
    cache = Path(config.paths.cache).expanduser()
    encoded = latents.cached(model, train, cache, config.tracking.progress)
    team.tell("latents")
    labels = torch.from_numpy(train.labels)
    captions = None if train.captions is None else list(train.captions)
    persons = None
    if job.plan.unit == "person":
        assert train.persons is not None
        persons = Persons(train.persons)

    executed = finetune(
        config, model, encoded, labels, job.plan, folder, log, started, captions, begun, persons,
        job.keep_choice,
    )  # fmt: skip
    return model, executed


def _export(job: Job, model: LatentDiffusion, record: Mapping[str, Any]) -> None:
    """Writes adapter/ as a whole: it appears complete or not at all."""
    from dp_lora.models import adapters
    from dp_lora.records.card import TextToImage, model_card
    from dp_lora.records.provenance import versions

    config = job.config
    lora = "lora" in config.trainable.components
    text = None
    if model.prompts is not None:
        text = TextToImage(
            model.prompts.template,
            model.classes,
            captions=config.data.caption_column is not None,
            in_place=any("lora_" not in name for name in adapters.trainable_parameters(model)),
            base_precision=config.model.base_precision,
        )
    card = model_card(
        record,
        base_model=job.base_model,
        data_name=config.data.name,
        trainable=config.trainable.components,
        rank=config.lora.rank if lora else None,
        target_modules=config.lora.target_modules if lora else [],
        parameters=adapters.count(model),
        versions=versions(),
        reproducible_noise=record["reproducible_noise"],
        text=text,
    )
    partial = job.directory / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    adapters.export(model, partial, base_model=job.base_model, card=card)
    keep_adapter(partial, job.directory / "checkpoint")
    partial.replace(job.directory / "adapter")


def _sample(job: Job, tracker: Tracker) -> None:
    from dp_lora.models import sample

    shutil.rmtree(job.directory / IMAGES, ignore_errors=True)
    with _timed(job, "sample"):
        samples = sample.generate(finetuned_model(job), job.config)
        sample.save(samples, job.directory)
    if plain := sample.plain(samples):
        say(
            f"sample: {plain} of {len(samples.labels)} images are of one colour; if they should not be, the "
            "training has diverged or the model does not know these images"
        )
    tracker.images("samples", job.directory / "samples.png")


def finetuned_model(job: Job) -> LatentDiffusion:
    """The model with the run's adapter, as somebody who was given only the adapter would load it."""
    from dp_lora.models import adapters

    model, adapter = job.model.sharing_weights(), job.directory / "adapter"
    adapters.restore(model, adapter, adapters.class_names(adapter) or job.images.train.classes)
    return model.to(job.device)


def images_before(
    model: LatentDiffusion, config: Config, device: torch.device, labels: Tensor | None = None
) -> Samples:
    """Images of the model before fine-tuning, drawn once for all that would draw the same ones.

    Args:
        model: pre-trained, on the device, conditioned on the classes.
        config: whose sampler and seed draw them.
        device: of the model.
        labels: int64 [N], one for each image; None: `sampler.num_samples` images, as many of each class.
    """
    import torch

    from dp_lora.models import sample
    from dp_lora.models.folders import digest
    from dp_lora.records.provenance import versions
    from dp_lora.storage.tensors import cached

    packages, what = versions(), "sample before fine-tuning"
    key = {
        "before": digest(model),
        "classes": list(model.classes),
        "prompt": config.model.prompt,
        "sampler": {k: v for k, v in asdict(config.sampler).items() if k not in ("classes", "export")},
        "seed": config.seed,
        "device": device.type,
        "versions": {name: packages[name] for name in ("dp-lora", "torch", "diffusers")},
    }
    if labels is None and config.sampler.classes is not None:
        labels = sample.labels_of(model.classes, 0, config.sampler.counts)
    if labels is not None:
        key["labels"] = labels.tolist()

    def draw() -> dict[str, Tensor]:
        if labels is None:
            samples = sample.generate(model, config, what)
        else:
            mode = config.tracking.progress
            samples = sample.draw(model, labels, config.sampler, config.seed, mode, what)
        return {"images": torch.from_numpy(samples.images), "labels": torch.from_numpy(samples.labels)}

    drawn = cached(Path(config.paths.cache), key, draw)
    return sample.Samples(drawn["images"].numpy(), drawn["labels"].numpy(), model.classes)


def _evaluate(job: Job, tracker: Tracker) -> None:
    from dp_lora.jobs import content
    from dp_lora.models import adapters

    config = job.config
    with _timed(job, "evaluate"):
        evaluation = _released(job, tracker) if config.evaluation.release == "dp" else _compared(job)
    metadata = shown_metadata(evaluation.metadata, config)
    model = model_to_train(job)
    tracker.result(
        {
            "metrics": evaluation.metrics,
            **metadata,
            # Whether the run knows that these are the images that it was made from; see job.check_content.
            "images_compared": content.unknown(job.directory) is None,
            "seed": config.seed,
            **({} if job.choice is None else {"choice": job.choice}),
            "trainable_parameters": adapters.count(model),
            "trainable_parameters_by_component": adapters.count_by_component(
                model, config.trainable.components
            ),
            **_costs(job),
            "device": str(job.device),
        }
    )


def _costs(job: Job) -> dict[str, Any]:
    """Times and memory for result.json; of persons those alone that do not follow the number of images."""
    if job.plan.unit == "person" and not job.config.data.public:
        # Encoding and evaluating go through all images, which are in memory too.
        return {"seconds": {k: v for k, v in job.seconds.items() if k == "sample"}, "peak_memory_bytes": None}
    memory = power_of_two(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"seconds": job.seconds, "peak_memory_bytes": memory}


def shown_metadata(metadata: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The metadata of an evaluation; where the numbers of real images are private, without them.

    A number that was read from a noised sum, as `evaluation.release=dp` does, stays.
    """
    private = config.privacy.adjacency == "add_or_remove" or config.privacy.unit == "person"
    hidden = private and not config.data.public
    if "release" in metadata or not hidden:
        return dict(metadata)
    kept = dict(metadata)
    for name in ("reference", "tested_on"):
        kept[name] = {**kept[name], "n": None}
    kept["real_baseline"] = {of: {**part, "n": None} for of, part in kept["real_baseline"].items()}
    return kept


def _compared(job: Job) -> Evaluation:
    """The metrics with their baselines, without noise."""
    from dp_lora.evaluation.evaluate import evaluate_all
    from dp_lora.models import sample

    config = job.config
    return evaluate_all(
        sample.load(job.directory),
        job.images,
        config.evaluation,
        before=images_before(model_before(job), config, job.device),
        seed=config.seed,
        device=job.device,
        cache=Path(config.paths.cache).expanduser(),
        progress=say,
    )


def _released(job: Job, tracker: Tracker) -> Evaluation:
    """The metrics that a budget of their own covers, which privacy.json then states."""
    from dp_lora.jobs.release import release_in
    from dp_lora.models import sample

    evaluation, statement = release_in(
        job.directory, sample.load(job.directory), job.images, job.config, device=job.device, say=say
    )
    tracker.privacy(statement)
    return evaluation
