"""A fine-tuning that dies, runs out of memory or has several processes ends as one that did not."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
import random
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dp_lora.config.schema import Config
from dp_lora.data import sets
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.jobs import job as jobs
from dp_lora.jobs import stages
from dp_lora.jobs.begun import begun
from dp_lora.models.latents import Latents
from dp_lora.privacy import executions
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.storage.files import read_lines
from dp_lora.training import finetune, loop, private_training
from tests.builders.finetuning import SEEDED, SHORT, Crash, Given, crashing, given, plan_of, short_of_memory
from tests.builders.tiny import TINY, composed

pytestmark = pytest.mark.usefixtures("unchecked")


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
    fewer = plan_of(job.config, 399)
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
