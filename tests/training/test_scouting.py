"""A fine-tuning that begins with scouting: two phases, one plan, one record; it dies anywhere and goes on."""

from __future__ import annotations

import dataclasses
import datetime
import os
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dp_lora.config.trainable import TrainableConfig
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.models import adapters, candidates
from dp_lora.privacy import executions
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.persons import Persons
from dp_lora.privacy.scouting import ScoutStep, best
from dp_lora.storage.files import read_lines
from dp_lora.training import finetune, loop, private_training
from dp_lora.training.scouting import Choice, Scouting, random_choice
from tests.builders.finetuning import Crash, Given, crashing, given, short_of_memory

SALIENT = ("trainable=salient", "trainable.scout_steps=2", "trainable.share=0.25", "noise_multiplicity=k1")
S = 2

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def scouting(pretrained: Path, digits: ImageSplits) -> Given:
    return given(pretrained, digits, *SALIENT)


@pytest.fixture(scope="module")
def whole(scouting: Given, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "check_engine", lambda *args: None)
        return run(scouting, tmp_path_factory.mktemp("whole") / "checkpoint")


def run(job: Given, folder: Path) -> dict[str, Any]:
    """What a training says and releases, with the matrices that it chose."""
    model, rows, chosen = job.model(), dict[int, dict[str, float]](), list[Choice]()
    executed = finetune.finetune(
        job.config, model, job.latents, job.labels, job.plan, folder, rows.__setitem__, lambda finished: None,
        chosen=chosen.append,
    )  # fmt: skip
    released = {name: p.detach().clone() for name, p in adapters.trainable_parameters(model).items()}
    return {"executed": executed, "rows": rows, "released": released, "choices": chosen, "model": model}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_scouting_and_training_are_the_steps_of_one_plan(whole: dict[str, Any], scouting: Given) -> None:
    (choice,) = whole["choices"]
    assert whole["executed"] == scouting.plan.steps == 5
    rows = [whole["rows"][step] for step in range(1, 6)]
    assert [row["epsilon"] for row in rows] == [scouting.plan.curve()(step) for step in range(1, 6)]
    # The schedule begins with the first step that trains.
    assert [round(row["learning_rate"], 4) for row in rows] == [0, 0, 0.02, 0.0133, 0.0067]
    assert len(choice.matrices) == 24 and len(choice.chosen) == 6
    assert choice.chosen == best(choice.scores, 0.25)
    record = choice.record()
    assert record["scores"].keys() == set(choice.matrices) and record["dimension"] == 24 * 2 * 32


def test_the_chosen_matrices_alone_have_adapters_and_all_of_them_are_trained(
    whole: dict[str, Any], scouting: Given
) -> None:
    model, (choice,) = whole["model"], whole["choices"]
    assert tuple(candidates.candidates(model)) == choice.chosen
    trained = {name.rsplit(".lora_", 1)[0].removeprefix("unet.") for name in whole["released"]}
    assert trained == {*choice.chosen, "class_embedder.weight"}
    # A is that of a training of all: its start has nothing to do with the choice.
    start = adapters.trainable_parameters(scouting.model())
    moved = {name: not torch.equal(value, start[name]) for name, value in whole["released"].items()}
    assert all(moved[name] for name in moved if "lora_B" in name)


BOUNDARIES: dict[str, tuple[Any, str, int]] = {
    "write-ahead in scouting": (executions, "append_line", 3),
    "noise in scouting": (algorithm, "noised_mean", 2),
    "kept": (ScoutStep, "_descend", 2),
    "checkpoint after scouting": (loop, "write_atomic", 3),
    "choice": (Scouting, "narrow", 1),
    "noise after the choice": (algorithm, "noised_mean", 3),
    "checkpoint after the choice": (loop, "write_atomic", 4),
    "end": (private_training, "forget_key", 1),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_run_that_dies_goes_on_to_the_same_choice_and_the_same_adapter(
    boundary: str,
    late: bool,
    scouting: Given,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, after = BOUNDARIES[boundary]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, crashing(getattr(owner, name), after, late=late))
        with pytest.raises(Crash):
            run(scouting, tmp_path / "checkpoint")
    again = run(scouting, tmp_path / "checkpoint")
    assert again["executed"] == 5
    assert again["choices"][-1].record() == whole["choices"][0].record()
    assert same(again["released"], whole["released"])


def test_no_step_begins_twice_unrecorded_when_the_noise_is_secret(
    pretrained: Path, digits: ImageSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in scouting, at the choice and after it: five executions, and one noise for each sum."""
    job, folder = given(pretrained, digits, *SALIENT, seeded=False), tmp_path / "checkpoint"
    released: dict[tuple[int, bytes], set[bytes]] = {}
    noised_mean = algorithm.noised_mean

    def see(total: torch.Tensor, plan: Any, randomness: Any, step: int) -> torch.Tensor:
        found = noised_mean(total, plan, randomness, step)
        released.setdefault((step, total.numpy().tobytes()), set()).add(found.numpy().tobytes())
        return found

    monkeypatch.setattr(algorithm, "noised_mean", see)
    for owner, name, after in (BOUNDARIES[n] for n in ("kept", "choice", "noise after the choice")):
        with monkeypatch.context() as patched:
            patched.setattr(
                owner, name, crashing(getattr(owner, name), 1 if name == "noised_mean" else after, late=True)
            )
            with pytest.raises(Crash):
                run(job, folder)
    assert run(job, folder)["executed"] == 5
    names = {row["execution"] for row in read_lines(folder / "executions.jsonl")}
    assert len(names) == 5 and len(released) == 5, "each step was begun once, and replayed with its own sum"
    assert all(len(values) == 1 for values in released.values())


def test_a_run_that_has_steps_left_for_scouting_alone_is_refused(
    pretrained: Path, digits: ImageSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is redone and cannot be replayed takes the place of one that trains, never of noise."""
    job = given(pretrained, digits, *SALIENT, "train.max_steps=3", seeded=False)
    folder = tmp_path / "checkpoint"
    for start in ("first", "second"):
        monkeypatch.setattr(finetune, "numerics", lambda *given, start=start: {"start": start})
        with monkeypatch.context() as patched:
            patched.setattr(ScoutStep, "_descend", crashing(ScoutStep._descend, 1, late=False))
            with pytest.raises(Crash if start == "first" else UserError) as stopped:
                run(job, folder)
    assert "the privacy of this run is spent" in str(stopped.value)
    assert Executions(folder / "executions.jsonl", {}).count == 1, "nothing more was begun"


def test_the_choice_depends_on_private_images_by_released_sums_alone(
    scouting: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def constant(total: torch.Tensor, plan: Any, randomness: Any, step: int) -> torch.Tensor:
        return torch.randn(len(total), generator=torch.Generator().manual_seed(step)) / 1e3

    monkeypatch.setattr(algorithm, "noised_mean", constant)
    others = scouting.latents.mean.flip(0) * 3
    swapped = Given(
        scouting.config, scouting.plan, type(scouting.latents)(others, scouting.latents.std),
        scouting.labels.flip(0), scouting.pretrained,
    )  # fmt: skip
    one, other = run(scouting, tmp_path / "one"), run(swapped, tmp_path / "other")
    assert one["choices"][0].record() == other["choices"][0].record()
    assert same(one["released"], other["released"])


def test_whole_matrices_are_scouted_and_stay_as_they_are(
    pretrained: Path, digits: ImageSplits, tmp_path: Path
) -> None:
    job = given(pretrained, digits, *SALIENT, "trainable.candidates=matrices")
    before = {name: p.detach().clone() for name, p in job.model().named_parameters() if ".lora_" not in name}
    found = run(job, tmp_path / "checkpoint")
    assert found["choices"][0].dimension == 22528 and len(found["choices"][0].chosen) == 6
    after = {name.replace(".base_layer", ""): p for name, p in found["model"].named_parameters()}
    frozen = {
        name.replace(".base_layer", ""): value for name, value in before.items() if "class_emb" not in name
    }
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not any("base_layer" in name for name in found["released"])


def test_a_scouting_that_runs_out_of_memory_goes_on_in_smaller_microbatches(
    scouting: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, most=3)
    found = run(scouting, tmp_path / "checkpoint")
    assert found["executed"] == 5 and len(found["choices"]) == 1


def test_persons_are_scouted_as_they_are_trained(scouting: Given, tmp_path: Path) -> None:
    model, chosen = scouting.model(), list[Choice]()
    persons = Persons(torch.arange(400) % 100)
    plan = dataclasses.replace(scouting.plan, unit="person", num_examples=100, expected_batch_size=5)
    executed = finetune.finetune(
        scouting.config, model, scouting.latents, scouting.labels, plan, tmp_path / "checkpoint",
        lambda step, values: None, lambda finished: None, persons=persons, chosen=chosen.append,
    )  # fmt: skip
    assert executed == 5 and len(chosen[0].chosen) == 6


def _process(rank: int, store: str, job: Given, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    finetune.check_engine = lambda *args: None
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=900),
    )
    os.environ["RANK"] = str(rank)
    found = run(job, Path(folder))
    torch.save({"released": found["released"], "chosen": list(found["choices"][0].chosen)}, f"{out}{rank}")
    dist.destroy_process_group()


def test_two_processes_choose_and_train_as_one(
    scouting: Given, whole: dict[str, Any], processes: ForkServerContext, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    arguments = [(rank, str(tmp_path / "s"), scouting, str(tmp_path / "both"), out) for rank in range(2)]
    both = [processes.Process(target=_process, args=given) for given in arguments]
    for process in both:
        process.start()
    for process in both:
        process.join(1800)
        assert process.exitcode == 0
    first, second = (torch.load(f"{out}{rank}", weights_only=True) for rank in range(2))
    assert same(first["released"], second["released"])
    assert first["chosen"] == second["chosen"] == list(whole["choices"][0].chosen)
    for name, value in whole["released"].items():
        assert torch.allclose(value, first["released"][name], atol=1e-4)


def test_a_random_choice_is_the_seeds_and_nothing_elses() -> None:
    names = [f"m{i}" for i in range(20)]
    trainable = TrainableConfig(choice="random", share=0.25)
    one = random_choice(trainable, names, 0)
    assert one == random_choice(trainable, names, 0) and len(one.chosen) == 5 and one.scores is None
    assert one.chosen != random_choice(trainable, names, 1).chosen
    assert list(one.chosen) == [name for name in names if name in one.chosen]
