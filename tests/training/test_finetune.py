"""Private fine-tuning: frozen weights, resume to the bit, all steps accounted, nothing released but noise."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import math
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dp_lora.config.schema import Config
from dp_lora.data import sets
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.jobs import job as jobs
from dp_lora.jobs import stages
from dp_lora.jobs.begun import begun
from dp_lora.models import adapters, latents
from dp_lora.models.folders import LatentDiffusion, load
from dp_lora.models.latents import Latents
from dp_lora.privacy import executions
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.preflight import PreflightError
from dp_lora.privacy.randomness import Randomness
from dp_lora.records.tracker import RELEASED
from dp_lora.storage.files import read_lines
from dp_lora.training import finetune, loop, private_training, tuning
from dp_lora.training.inputs import digest
from tests.builders.architectures import stable_diffusion
from tests.builders.tiny import TINY, composed

SHORT = ("train.expected_batch_size=20", "train.max_steps=5", "noise_multiplicity=k2", "lora.rank=2")
SEEDED = "privacy.insecure_seed=7"


CHECK_ENGINE = finetune.check_engine


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the preflight, which costs as much as ten steps; tests of its own check it."""
    monkeypatch.setattr(finetune, "check_engine", lambda *args: None)


@dataclasses.dataclass
class Given:
    """What a fine-tuning starts from."""

    config: Config
    plan: PrivacyPlan
    latents: Latents
    labels: torch.Tensor
    pretrained: Path

    def model(self) -> LatentDiffusion:
        model = load(self.pretrained)
        adapters.attach(model, self.config.trainable.components, self.config.lora, seed=0)
        return model

    def run(self, folder: Path, model: LatentDiffusion | None = None) -> tuple[dict[str, Any], torch.Tensor]:
        """(executed steps, logged rows, ...), and the released parameters."""
        model = model or self.model()
        rows: dict[int, dict[str, float]] = {}
        starts: list[int] = []
        executed = finetune.finetune(
            self.config, model, self.latents, self.labels, self.plan, folder, rows.__setitem__, starts.append
        )
        released = [p.detach().flatten() for p in adapters.trainable_parameters(model).values()]
        return {"executed": executed, "rows": rows, "started": starts}, torch.cat(released)


def given(pretrained: Path, digits: ImageSplits, *overrides: str, seeded: bool = True) -> Given:
    config = composed(*TINY, *SHORT, "train.checkpoint_minutes=0", *([SEEDED] if seeded else []), *overrides)
    images = digits.train.subset(range(400))  # type: ignore[arg-type]
    encoded = latents.encode(load(pretrained), images)
    plan = make_plan(
        num_examples=400,
        expected_batch_size=config.train.expected_batch_size,
        steps=config.train.max_steps,
        noise_multiplier=0.8,
        target_epsilon=None,
        delta=1e-4,
        noise_multiplicity=config.privacy.noise_multiplicity,
        max_grad_norm=0.1,
    )
    return Given(config, plan, encoded, torch.from_numpy(images.labels), pretrained)


@pytest.fixture(scope="module")
def job(pretrained: Path, digits: ImageSplits) -> Given:
    return given(pretrained, digits)


@pytest.fixture(scope="module")
def uninterrupted(
    job: Given, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], torch.Tensor]:
    return job.run(tmp_path_factory.mktemp("whole") / "checkpoint")


def test_every_step_is_logged_with_released_values_alone(
    uninterrupted: tuple[dict[str, Any], torch.Tensor], job: Given
) -> None:
    told, _ = uninterrupted
    assert told["executed"] == 5 and list(told["rows"]) == [1, 2, 3, 4, 5] and told["started"] == [0]
    epsilons = [row["epsilon"] for row in told["rows"].values()]
    assert epsilons == sorted(epsilons) and epsilons[-1] <= job.plan.epsilon * 1.001
    assert all(row.keys() <= RELEASED for row in told["rows"].values())


@pytest.mark.parametrize("components", ["lora,embedder", "norm", "full"])
def test_frozen_weights_are_bit_identical_and_chosen_ones_move(
    components: str, pretrained: Path, digits: ImageSplits, tmp_path: Path
) -> None:
    job = given(pretrained, digits, f"trainable.components=[{components}]", "train.max_steps=2")
    model = job.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = set(adapters.trainable_parameters(model))
    job.run(tmp_path / "checkpoint", model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name in chosen), name


def test_the_engine_is_checked_before_a_step_begins(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise Crash

    monkeypatch.setattr(finetune, "preflight", fail)
    monkeypatch.setattr(finetune, "check_engine", CHECK_ENGINE)
    with pytest.raises(Crash):
        job.run(tmp_path)
    assert not (tmp_path / "executions.jsonl").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_preflight_runs_in_the_precision_of_the_run(
    pretrained: Path, digits: ImageSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    low: list[bool] = []
    loss = tuning.per_example_loss

    def seen(*args: Any) -> torch.Tensor:
        low.append(torch.is_autocast_enabled("cpu"))
        return loss(*args)

    monkeypatch.setattr(tuning, "per_example_loss", seen)
    monkeypatch.setattr(finetune, "check_engine", CHECK_ENGINE)
    given(pretrained, digits, f"train.precision={precision}", "train.max_steps=1").run(tmp_path)
    assert set(low) == ({False} if precision == "float32" else {False, True})
    # The broken twin: an engine that clips in float32 only.
    factors = ClippedGradientSum._factors

    def careless(self: ClippedGradientSum, norms: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(norms) if low[-1] else factors(self, norms)

    monkeypatch.setattr(ClippedGradientSum, "_factors", careless)
    other = given(pretrained, digits, f"train.precision={precision}", "train.max_steps=1")
    with contextlib.nullcontext() if precision == "float32" else pytest.raises(PreflightError):
        other.run(tmp_path / "twin")


def test_learning_rates_have_factors_by_component(
    pretrained: Path, digits: ImageSplits, tmp_path: Path
) -> None:
    moved = []
    for number, factor in enumerate((1.0, 0.5)):
        job = given(
            pretrained, digits, "train.max_steps=1", "train.schedule=constant",
            f"trainable.learning_rate_factor={factor}", "train.embedder_learning_rate_factor=3",
        )  # fmt: skip
        model = job.model()
        before = {n: p.detach().clone() for n, p in adapters.trainable_parameters(model).items()}
        job.run(tmp_path / str(number), model)
        moved.append({n: p.detach() - before[n] for n, p in adapters.trainable_parameters(model).items()})
    for name, full in moved[0].items():
        rate = 3.0 if name.startswith("class_embedder") else 0.5
        # Adam's first step is the learning rate in every coordinate, whatever the gradient.
        expected = full if name.startswith("class_embedder") else full * rate
        assert torch.allclose(moved[1][name], expected, rtol=1e-3, atol=1e-7), name
    rates = {name: float(change.abs().median()) for name, change in moved[0].items()}
    embedder = rates.pop("class_embedder.weight")
    assert embedder == pytest.approx(3 * max(rates.values()), rel=1e-2)


# Resume


class Crash(BaseException):
    """The process dies here."""


def crashing(function: Callable[..., Any], after: int, *, late: bool) -> Callable[..., Any]:
    """`function`, of which call number `after` dies before or after its work."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after and not late:
            raise Crash
        result = function(*args, **kwargs)
        if calls == after and late:
            raise Crash
        return result

    return call


BOUNDARIES: dict[str, tuple[Any, str]] = {
    "write-ahead": (executions, "append_line"),
    "clip": (ClippedGradientSum, "add"),
    "noise": (algorithm, "noised_mean"),
    "checkpoint": (loop, "write_atomic"),
    "optimiser": (algorithm.PrivateStep, "_descend"),
    "end": (private_training, "forget_key"),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_run_that_dies_at_a_boundary_ends_bit_identical(
    boundary: str,
    late: bool,
    job: Given,
    uninterrupted: tuple[dict[str, Any], torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name = BOUNDARIES[boundary]
    for after in [1] if boundary == "end" else [3]:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, crashing(getattr(owner, name), after, late=late))
            with pytest.raises(Crash):
                job.run(tmp_path / "checkpoint")
    told, released = job.run(tmp_path / "checkpoint")
    assert told["executed"] == 5
    assert torch.equal(released, uninterrupted[1])
    for step, row in told["rows"].items():
        assert row == pytest.approx({**uninterrupted[0]["rows"][step], "epsilon": row["epsilon"]}, abs=0)
    # A killed run has begun a step more than it logged: never less is accounted than was.
    assert all(row["epsilon"] >= uninterrupted[0]["rows"][s]["epsilon"] for s, row in told["rows"].items())


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Starts processes that have imported this module already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "dp_lora.records.tracker"])
    with pytest.MonkeyPatch.context() as patched:
        # The server does not take over sys.path.
        patched.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        yield context


def _job_in_a_process(config: Config, images: ImageSplits, plan: PrivacyPlan) -> None:
    """One job; what takes long before its first step is given."""
    torch.set_num_threads(1)
    finetune.check_engine = lambda *args: None
    sets.load = lambda *args: images
    jobs.plan_of = lambda *args: plan
    stages.run(config)


def _released(directory: Path) -> dict[str, str]:
    """Hashes of what a finished run gives away."""
    files = [*(directory / "adapter").iterdir(), directory / "privacy.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_kill_9_at_thirty_random_moments(
    cache: Path, digits: ImageSplits, processes: ForkServerContext, tmp_path: Path
) -> None:
    """One job is killed again and again, in its preparation, its steps, its writes and its export."""
    words = (
        *TINY, "train.expected_batch_size=20", "train.max_steps=40", "noise_multiplicity=k1", SEEDED,
        "stages=[finetune]", "train.checkpoint_minutes=0", f"paths.cache={cache}",
    )  # fmt: skip
    config = composed(*words)
    plan = jobs.plan_of(config, len(digits.train))

    def start(name: str) -> Any:
        paths = dataclasses.replace(config.paths, outputs=str(tmp_path / name))
        target = dataclasses.replace(config, paths=paths)
        process = processes.Process(target=_job_in_a_process, args=(target, digits, plan))
        process.start()
        return process

    def checkpoints() -> set[int]:
        return {path.stat().st_mtime_ns for path in tmp_path.glob("killed/default/*/checkpoint/state.pt")}

    whole = start("whole")
    whole.join(1800)
    assert whole.exitcode == 0
    chance, killed = random.Random(4), 0
    while killed < 30:
        before, process = checkpoints(), start("killed")
        # Two of three are killed after they have saved a step, whatever else the machine does meanwhile.
        while killed % 3 and checkpoints() == before and process.exitcode is None:
            time.sleep(0.002)
        process.join(chance.uniform(0, 0.1 if killed % 3 else 0.6))
        if process.exitcode is not None:
            break
        process.kill()
        process.join(1800)
        killed += 1
    last = start("killed")
    last.join(1800)
    assert last.exitcode == 0 and killed >= 15
    (a,), (b,) = ((tmp_path / name / "default").iterdir() for name in ("whole", "killed"))
    assert _released(a) == _released(b)
    rows = [[row["step"] for row in read_lines(d / "metrics.jsonl")] for d in (a, b)]
    assert rows[0] == rows[1] == list(range(1, 41))


def test_a_redone_step_under_other_numerics_draws_fresh_noise_and_is_counted(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run dies in step 2 of 5 and goes on with another microbatch: the redone step is one of the five."""
    draws: list[tuple[bytes, int]] = []

    def recorded(total: Any, plan: Any, randomness: Randomness, step: int) -> torch.Tensor:
        draws.append((randomness.key, step))
        return original(total, plan, randomness, step)

    original = algorithm.noised_mean
    monkeypatch.setattr(algorithm, "noised_mean", recorded)
    with monkeypatch.context() as patched:
        patched.setattr(
            algorithm.PrivateStep, "_descend", crashing(algorithm.PrivateStep._descend, 3, late=False)
        )
        with pytest.raises(Crash):
            job.run(tmp_path / "checkpoint")
    other = dataclasses.replace(
        job, config=dataclasses.replace(job.config, train=dataclasses.replace(job.config.train, microbatch=7))
    )
    told, _ = other.run(tmp_path / "checkpoint")
    assert told["started"] == [2] and told["executed"] == 5
    assert list(told["rows"]) == [3, 4]  # 0, 1, 2 and 2 again, 3: five executions
    assert [step for _, step in draws] == [0, 1, 2, 2, 3]
    assert len(set(draws)) == 5, "no noise is drawn twice for a step that may differ"
    assert max(row["epsilon"] for row in told["rows"].values()) <= job.plan.epsilon * 1.001
    assert begun(tmp_path / "checkpoint") == 5


def test_a_run_that_can_replay_nothing_stops_at_its_budget(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in range(1, 20):
        changed = dataclasses.replace(job.config.train, microbatch=size, checkpoint_minutes=60)
        other = dataclasses.replace(job, config=dataclasses.replace(job.config, train=changed))
        with monkeypatch.context() as patched:
            patched.setattr(
                algorithm.PrivateStep, "_descend", crashing(algorithm.PrivateStep._descend, 1, late=False)
            )
            if size <= 5:
                with pytest.raises(Crash):
                    other.run(tmp_path / "checkpoint")
            else:
                with pytest.raises(UserError, match="the privacy of this run is spent"):
                    other.run(tmp_path / "checkpoint")
                break
    assert begun(tmp_path / "checkpoint") == job.plan.steps == 5


# Memory that runs out


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int, after: int = 0) -> None:
    """Makes every microbatch of more than `most` examples fail, but for the first `after` ones."""
    add, calls = ClippedGradientSum.add, 0

    def short(self: ClippedGradientSum, losses: torch.Tensor, weights: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        add(self, losses, weights)
        if calls > after and len(losses) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ClippedGradientSum, "add", short)


def test_a_step_that_runs_out_of_memory_is_taken_in_smaller_microbatches(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = dataclasses.replace(job, config=composed(*TINY, *SHORT, SEEDED, "train.microbatch=12"))
    whole, expected = job.run(tmp_path / "whole")
    short_of_memory(monkeypatch, most=3, after=5)
    told, released = job.run(tmp_path / "short")
    assert told["executed"] == 5 and list(told["rows"]) == [1, 2, 3, 4, 5]
    for step, row in told["rows"].items():
        assert row == pytest.approx(whole["rows"][step], rel=1e-3)
    assert float((released - expected).norm() / expected.norm()) < 1e-6
    record = read_lines(tmp_path / "short" / "executions.jsonl")
    assert [row.get("instead_of") is not None for row in record].count(True) == 2, "12, 6 and then 3"
    assert '"microbatch": 3' in (tmp_path / "short" / "microbatch.json").read_text()


def test_a_sum_that_keeps_what_a_failed_attempt_added_is_told_apart(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: some examples of the step that ran out of memory are counted twice."""
    job = dataclasses.replace(job, config=composed(*TINY, *SHORT, SEEDED, "train.microbatch=12"))
    _, expected = job.run(tmp_path / "whole")
    short_of_memory(monkeypatch, most=3)
    monkeypatch.setattr(ClippedGradientSum, "reset", lambda self: None)
    _, released = job.run(tmp_path / "short")
    assert float((released - expected).norm() / expected.norm()) > 1e-3


def test_a_run_killed_after_memory_ran_out_ends_like_one_that_was_not(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*TINY, *SHORT, SEEDED, "train.checkpoint_minutes=0")
    job = dataclasses.replace(job, config=composed(*words))
    endings = []
    for name, killed in (("whole", False), ("killed", True)):
        with monkeypatch.context() as patched:
            short_of_memory(patched, most=3)
            if killed:
                with patched.context() as crash:
                    noised = algorithm.noised_mean
                    crash.setattr(algorithm, "noised_mean", crashing(noised, 3, late=True))
                    with pytest.raises(Crash):
                        job.run(tmp_path / name)
            endings.append(job.run(tmp_path / name))
    (whole, expected), (told, released) = endings
    assert torch.equal(released, expected) and told["executed"] == whole["executed"] == 5


def test_memory_for_no_example_is_one_line(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, most=0)
    with pytest.raises(UserError, match="not even one example"):
        job.run(tmp_path)


# The step


def a_step(job: Given, folder: Path, microbatch: int = 8, *overrides: str) -> finetune.FinetuneStep:
    config = composed(*TINY, *SHORT, *overrides)
    record = Executions(folder / f"{microbatch}.jsonl", {})
    key = Randomness.from_seed(3)
    return finetune.FinetuneStep.on(
        job.model(), job.latents, job.labels, job.plan, key, config.train, microbatch, record
    )


def test_an_empty_batch_takes_a_noisy_step_that_is_accounted(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = a_step(job, tmp_path)
    monkeypatch.setattr(algorithm, "poisson_batch", lambda *args: torch.empty(0, dtype=torch.int64))
    seen: list[torch.Tensor] = []
    descend = algorithm.PrivateStep._descend
    monkeypatch.setattr(
        algorithm.PrivateStep, "_descend", lambda own, update: (seen.append(update), descend(own, update))
    )
    rows = [step(0), step(1)]
    assert rows[0].keys() == rows[1].keys() and 0 < rows[0]["epsilon"] < rows[1]["epsilon"]
    std = job.plan.noise_std / job.plan.expected_batch_size
    for update in seen:
        # A mean of n squares of standard normals: six deviations, which fails once in 5e8 keys.
        assert float((update / std).square().mean()) == pytest.approx(
            1, abs=6 * math.sqrt(2 / update.numel())
        )
    assert not torch.equal(*seen)


@pytest.mark.parametrize("microbatch", [1, 20])
def test_the_moving_average_moves_once_a_batch(microbatch: int, job: Given, tmp_path: Path) -> None:
    step = a_step(job, tmp_path, microbatch, "train.ema_decay=0.5")
    expected = [p.detach().clone() for p in step.sgd.parameters]
    for number in range(3):
        step(number)
        decay = min(0.5, (1 + number) / (10 + number))
        for averaged, parameter in zip(expected, step.sgd.parameters, strict=True):
            averaged.copy_(decay * averaged + (1 - decay) * parameter.detach())
    for averaged, own in zip(expected, step.sgd.average.values, strict=True):
        assert torch.allclose(averaged, own, atol=1e-7)
    assert not torch.allclose(step.sgd.average.values[0], step.sgd.parameters[0], atol=1e-7)


def test_the_private_loss_is_logged_when_asked_for_alone(job: Given, tmp_path: Path) -> None:
    asked = dataclasses.replace(job, plan=dataclasses.replace(job.plan, loss_share=jobs.LOSS_SHARE))
    step = a_step(asked, tmp_path)
    row = step(0)
    assert row.keys() - a_step(job, tmp_path, 4)(0).keys() == {"private_loss"}
    assert row.keys() <= RELEASED
    # Its noise has a standard deviation of 0.8 / (0.1 x 20) = 0.4: five of them beside a loss in [0, 1].
    assert -2 < row["private_loss"] < 3.5


def test_what_a_step_starts_from_is_part_of_its_lineage(job: Given) -> None:
    model, key = job.model(), Randomness.from_seed(1)
    own = digest(model, job.latents, job.labels, job.plan, key)
    assert own == digest(job.model(), job.latents, job.labels, job.plan, key)
    shifted = Latents(job.latents.mean + 1e-6, job.latents.std)
    noisier = dataclasses.replace(job.plan, noise_multiplier=job.plan.noise_multiplier + 1e-9)
    others = [
        digest(model, shifted, job.labels, job.plan, key),
        digest(model, job.latents, job.labels.flip(0), job.plan, key),
        digest(model, job.latents, job.labels, noisier, key),
        digest(model, job.latents, job.labels, job.plan, Randomness.from_seed(2)),
    ]
    next(model.parameters()).data += 1
    others.append(digest(model, job.latents, job.labels, job.plan, key))
    assert len({own, *others}) == 6


# The key


def test_the_key_lives_in_the_checkpoint_and_goes_with_the_end(
    pretrained: Path, digits: ImageSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = given(pretrained, digits, seeded=False)
    folder = tmp_path / "checkpoint"
    with monkeypatch.context() as patched:
        patched.setattr(algorithm, "noised_mean", crashing(algorithm.noised_mean, 3, late=True))
        with pytest.raises(Crash):
            job.run(folder)
    key = (folder / "key").read_bytes()
    assert len(key) == 32 and (folder / "key").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    told, first = job.run(folder)
    assert told["executed"] == 5 and not (folder / "key").exists()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert key not in content and key.hex().encode() not in content, path
    # A run that ended and lost its adapter gives the same one again, without any key.
    told, again = job.run(folder)
    assert told["executed"] == 5 and torch.equal(first, again) and not (folder / "key").exists()
    # Two runs of one configuration have two keys.
    assert not torch.equal(job.run(tmp_path / "other" / "checkpoint")[1], first)


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_missing_key_is_an_error(
    damage: str, pretrained: Path, digits: ImageSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = given(pretrained, digits, seeded=False)
    with monkeypatch.context() as patched:
        patched.setattr(algorithm, "noised_mean", crashing(algorithm.noised_mean, 2, late=True))
        with pytest.raises(Crash):
            job.run(tmp_path)
    (tmp_path / "key").unlink() if damage == "gone" else (tmp_path / "key").write_bytes(b"x")
    with pytest.raises(UserError, match="noise key"):
        job.run(tmp_path)


def test_other_private_images_under_the_same_run_are_refused(job: Given, tmp_path: Path) -> None:
    job.run(tmp_path)
    fewer = dataclasses.replace(job.plan, num_examples=399)
    latents = Latents(job.latents.mean[:399], job.latents.std[:399])
    other = dataclasses.replace(job, plan=fewer, latents=latents, labels=job.labels[:399])
    with pytest.raises(UserError, match="num_examples=400 and now has 399"):
        other.run(tmp_path)


def test_a_checkpoint_of_other_parameters_is_refused(
    job: Given, pretrained: Path, digits: ImageSplits, tmp_path: Path
) -> None:
    job.run(tmp_path)
    with pytest.raises(UserError, match="other shapes"):
        given(pretrained, digits, "lora.rank=3").run(tmp_path)


# One example


def _sums(job: Given, folder: Path, examples: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The clipped sum of each of three steps from the initial parameters, and the batches."""
    plan = dataclasses.replace(job.plan, num_examples=examples)
    encoded = Latents(job.latents.mean[:examples], job.latents.std[:examples])
    model, key = job.model(), Randomness.from_seed(3)
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.02  # else B is zero and A has no gradient
    record = Executions(folder / f"{examples}.jsonl", {})
    step = finetune.FinetuneStep.on(
        model, encoded, job.labels[:examples], plan, key, job.config.train, 8, record
    )
    sums, batches = [], []
    for number in range(3):
        batch = algorithm.poisson_batch(key, number, examples, plan.sample_rate)
        taken = step.sgd.begin(number)
        for rows, weights, draws in taken.microbatches(8):
            taken.add(step.losses(rows, draws), weights)
        sums.append(step.sgd.gradients.total())
        batches.append(batch)
    return sums, batches


def test_removing_one_example_removes_its_contribution_and_nothing_else(
    pretrained: Path, digits: ImageSplits, tmp_path: Path
) -> None:
    job = given(pretrained, digits)
    job = dataclasses.replace(job, plan=dataclasses.replace(job.plan, sample_rate=0.3))
    with_it, batches = _sums(job, tmp_path, 60)
    without, fewer = _sums(job, tmp_path, 59)
    joined = 0
    for a, b, batch, other in zip(with_it, without, batches, fewer, strict=True):
        assert torch.equal(batch[batch < 59], other)
        distance = float((a - b).norm())
        if 59 in batch:
            joined += 1
            assert 0 < distance <= job.plan.max_grad_norm * (1 + 1e-6)
        else:
            assert torch.equal(a, b)
    assert 0 < joined < 3, "both cases are seen"
    # The broken twin: removing another one as well passes the bound or moves a step without it.
    third = _sums(job, tmp_path, 40)[0]
    assert max(float((a - b).norm()) for a, b in zip(with_it, third, strict=True)) > job.plan.max_grad_norm


# Captions


def _captioned(folder: Path, captions: list[str], pretrained: Path) -> tuple[torch.Tensor, LatentDiffusion]:
    """The released parameters of a text-to-image model trained with `captions` under a fixed key."""
    config = composed(
        *TINY, *SHORT, SEEDED, "trainable=lora_alone", "train.checkpoint_minutes=0", "train.max_steps=3"
    )
    config.lora.target_modules = ["to_k", "to_v"]
    model = load(pretrained, "a {}")
    model.new_classes(["cat", "dog"], torch.Generator())
    adapters.attach(model, config.trainable.components, config.lora, seed=0)
    for name, parameter in adapters.trainable_parameters(model).items():
        parameter.data += 0.05 * ("lora_B" in name)
    generator = torch.Generator().manual_seed(1)
    latents_ = Latents(
        torch.randn(len(captions), 3, 4, 4, generator=generator), torch.zeros(len(captions), 3, 4, 4)
    )
    plan = make_plan(
        num_examples=len(captions),
        expected_batch_size=len(captions) / 2,
        steps=3,
        noise_multiplier=0.8,
        target_epsilon=None,
        delta=1e-4,
        noise_multiplicity=2,
        max_grad_norm=0.1,
    )
    labels = torch.zeros(len(captions), dtype=torch.int64)
    log: dict[int, dict[str, float]] = {}
    finetune.finetune(
        config, model, latents_, labels, plan, folder, log.__setitem__, lambda done: None, captions=captions
    )
    return torch.cat([p.detach().flatten() for p in adapters.trainable_parameters(model).values()]), model


@pytest.mark.parametrize("count", [20, 200])  # embeddings that are kept, and others
def test_a_caption_is_trained_with_and_forgotten(count: int, tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "sd")
    letters = "abcdefghijklmnopqrstuvwxyz"  # the tokenizer knows these
    captions = [letters[i % 26] + letters[i // 26] for i in range(count)]
    released, model = _captioned(tmp_path / "a", captions, folder)
    assert torch.equal(released, _captioned(tmp_path / "b", captions, folder)[0])
    other = _captioned(tmp_path / "c", ["zz", *captions[1:]], folder)[0]
    same = _captioned(tmp_path / "d", ["aa"] * count, folder)[0]
    assert not torch.equal(released, other) and not torch.equal(released, same)
    # What the model knows afterwards are its classes.
    assert model.prompts is not None and len(model.prompts.ids) == 1 + len(model.classes)
    assert torch.equal(model.prompts.ids[1:], _ids(model, ["a cat", "a dog"]))


def _ids(model: LatentDiffusion, prompts: list[str]) -> torch.Tensor:
    assert model.prompts is not None
    words = {"padding": "max_length", "max_length": 8, "truncation": True, "return_tensors": "pt"}
    ids: torch.Tensor = model.prompts.tokenizer(prompts, **words)["input_ids"]
    return ids


def test_the_engine_is_tried_without_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def look(config: Config, model: LatentDiffusion, plan: PrivacyPlan) -> None:
        assert model.prompts is not None
        seen.append(len(model.prompts.ids))

    monkeypatch.setattr(finetune, "check_engine", look)
    _captioned(tmp_path / "run", [f"secret {i}" for i in range(20)], stable_diffusion(tmp_path / "sd"))
    assert seen == [3]  # the empty prompt and two classes


def test_a_caption_that_changed_is_no_replay(tmp_path: Path) -> None:
    model = load(stable_diffusion(tmp_path / "sd"))
    latents_ = Latents(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    key, labels = Randomness.from_seed(0), torch.zeros(2)
    plan = make_plan(
        num_examples=2, expected_batch_size=1, steps=1, noise_multiplier=1.0, target_epsilon=None,
        delta=1e-4, noise_multiplicity=1, max_grad_norm=0.1,
    )  # fmt: skip
    digests = {digest(model, latents_, labels, plan, key, c) for c in (None, ["a", "b"], ["a", "c"])}
    assert len(digests) == 3


_TIMES = re.compile(r'("(?:updated|start|end)": )[^,}\n]+')


class _Clock:
    """A clock that says how often it was asked: a time that depends on the data is asked for more often."""

    def __init__(self) -> None:
        self._now = 1e9

    def monotonic(self) -> float:
        self._now += 1
        return self._now

    time = monotonic


def _everything_released(directory: Path) -> dict[str, bytes]:
    """All files of a run but its private folder, without the dates of its start and end."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and "checkpoint" not in path.parts:
            content = path.read_bytes()
            if path.suffix in (".json", ".jsonl"):
                content = _TIMES.sub(r"\1T", content.decode()).encode()
            found[str(path.relative_to(directory))] = content
    return found


def _neighbours(cache: Path, tmp_path: Path, digits: ImageSplits, capsys: Any, patch: Any) -> list[Any]:
    """Files and lines of two runs on neighbouring sets whose gradients are all zero."""
    train = digits.train
    changed = train.images.copy()
    changed[700] = 255 - changed[700]
    labels = train.labels.copy()
    labels[700] = (labels[700] + 1) % 10
    neighbour = ImageSet(changed, labels, train.classes, train.name, train.role, train.public)
    drawn, noised = algorithm.poisson_batch, algorithm.noised_mean
    runs = []
    for name, images, removed in (("a", train, False), ("b", neighbour, False), ("c", train, True)):
        with patch.context() as patched:
            patched.setattr("dp_lora.data.sets.load", lambda *args, i=images: digits._replace(train=i))
            patched.setattr(algorithm, "noised_mean", lambda total, *rest: noised(0 * total, *rest))
            for module in ("jobs.stages", "records.tracker", "training.loop"):
                patched.setattr(f"dp_lora.{module}.time", _Clock())
            if removed:  # never in a batch: what a set without the image does
                patched.setattr(algorithm, "poisson_batch", lambda *args: (b := drawn(*args))[b != 700])
            words = (*TINY, SEEDED, "stages=[finetune,sample]", "tracking.progress=lines")
            places = (
                f"paths.outputs={tmp_path / name}",
                f"paths.ledger={tmp_path / name}.jsonl",
                f"paths.index={tmp_path / name}.index",
            )
            stages.run(composed(*words, f"paths.cache={cache}", *places))
        said = capsys.readouterr()
        (directory,) = (tmp_path / name / "default").iterdir()
        lines = re.sub(
            r"\d[\d.:]* (steps|images|s)/(step|image|s)|took \d+:\d+|\S*/tmp/\S*", "", said.out + said.err
        )
        files = _everything_released(directory)
        files["config.yaml"] = re.sub(rb"(outputs|ledger|index): .*", b"", files["config.yaml"])
        runs.append((files, lines))
    return runs


def test_what_is_written_tells_nothing_of_an_image_but_through_the_noised_sum(
    cache: Path, tmp_path: Path, digits: ImageSplits, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all sums zero, runs on neighbouring sets write the same bytes, names, times and lines."""
    runs = _neighbours(cache, tmp_path, digits, capsys, monkeypatch)
    assert len(runs[0][0]) >= 10
    assert {"adapter/adapter_model.safetensors", "metrics.jsonl", "samples.npz"} <= runs[0][0].keys()
    for files, lines in runs[1:]:
        assert files.keys() == runs[0][0].keys()
        for name, content in files.items():
            assert content == runs[0][0][name], name
        assert lines == runs[0][1]


def test_the_neighbour_test_sees_a_batch_size_that_is_logged(
    cache: Path, tmp_path: Path, digits: ImageSplits, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: the size of the last batch instead of the learning rate."""
    call = finetune.FinetuneStep.__call__

    def leaking(self: finetune.FinetuneStep, step: int) -> dict[str, float]:
        sizes: list[int] = []
        positions = self.sgd.positions
        self.sgd.positions = lambda size: (sizes.append(size), positions(size))[1]  # type: ignore[method-assign]
        values = call(self, step)
        del self.sgd.positions
        return {**values, "learning_rate": float(sizes[0])}

    monkeypatch.setattr(finetune.FinetuneStep, "__call__", leaking)
    # Image 700 joins some batch of the four with probability 1 - 0.96^4 for a free seed; this one is fixed.
    monkeypatch.setattr(f"{__name__}.TINY", (*TINY, "train.expected_batch_size=700"))
    runs = _neighbours(cache, tmp_path, digits, capsys, monkeypatch)
    assert runs[0][0]["metrics.jsonl"] == runs[1][0]["metrics.jsonl"] != runs[2][0]["metrics.jsonl"]


# Several processes


def _process(rank: int, store: str, job: Given, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=900),
    )
    os.environ["RANK"] = str(rank)
    told, released = job.run(Path(folder))
    torch.save({"released": released, **told}, f"{out}{rank}")
    dist.destroy_process_group()


def test_two_processes_end_where_one_does(
    pretrained: Path, digits: ImageSplits, processes: ForkServerContext, tmp_path: Path
) -> None:
    # Batches of 20 on average in slices of 10 and microbatches of 7: nothing divides anything.
    job = given(pretrained, digits, "train.microbatch=7", "train.max_steps=3")
    told, alone = job.run(tmp_path / "alone")
    out = str(tmp_path / "out")
    both = [
        processes.Process(target=_process, args=(rank, str(tmp_path / "s"), job, str(tmp_path / "both"), out))
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(1800)
        assert process.exitcode == 0
    first, second = (torch.load(f"{out}{rank}", weights_only=True) for rank in range(2))
    assert torch.equal(first["released"], second["released"])
    assert float((first["released"] - alone).norm() / alone.norm()) < 1e-6
    assert first["executed"] == second["executed"] == told["executed"] == 3
    assert list(first["rows"]) == [1, 2, 3] and not second["rows"], "the first process logs"
    assert begun(tmp_path / "both") == 3


def test_the_baseline_without_privacy_trains(pretrained: Path, digits: ImageSplits, tmp_path: Path) -> None:
    job = given(pretrained, digits)
    plan = make_plan(
        num_examples=400, expected_batch_size=20, steps=2, noise_multiplier=None, target_epsilon=math.inf,
        delta=1e-4, noise_multiplicity=2, max_grad_norm=0.1,
    )  # fmt: skip
    told, _ = dataclasses.replace(job, plan=plan).run(tmp_path / "checkpoint")
    assert all(row["epsilon"] == math.inf for row in told["rows"].values())


def test_steps_of() -> None:
    def steps(*overrides: str) -> int | None:
        return jobs.steps_of(composed(*TINY, "train.expected_batch_size=100", *overrides), 1050)

    assert steps("train.max_steps=7") == 7
    assert steps("train.max_steps=null", "train.epochs=2") == 21
    assert steps("train.max_steps=7", "train.epochs=2") == 7
    assert steps("train.max_steps=null", "privacy.noise_multiplier=1") is None
