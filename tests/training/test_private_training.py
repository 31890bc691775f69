"""`PrivateTraining` in loops of a caller's own: what it keeps, what it resumes and what it refuses."""

from __future__ import annotations

import json
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dp_lora import PrivateTraining, UserError
from dp_lora.jobs.begun import begun
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.randomness import Randomness
from tests.builders.private_training import (
    STEPS,
    Counter,
    Crash,
    N,
    losses,
    network,
    parameters,
    plan_of,
    run,
    training,
)


def test_the_loop_is_dp_sgd(tmp_path: Path) -> None:
    """The parameters are those of a loop over single examples, with the noise of the same key."""
    plan, model = plan_of(), network()
    private = training(tmp_path / "run", model)
    values = run(private)
    assert [row["epsilon"] for row in values] == sorted(row["epsilon"] for row in values)
    assert values[-1]["epsilon"] == pytest.approx(plan.epsilon)
    other, key = network(), Randomness.from_seed(3)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.1)
    for number in range(STEPS):
        total = torch.zeros(sum(p.numel() for p in other.parameters()), dtype=torch.float64)
        for i in algorithm.poisson_batch(key, number, N, 15 / N):
            gradients = torch.autograd.grad(losses(other, i.view(1)).sum(), list(other.parameters()))
            gradient = torch.cat([g.flatten() for g in gradients]).double()
            total += gradient * min(1.0, 0.5 / float(gradient.norm()))
        released = (total + 0.5 * key.secure_normal("noise", number, len(total))) / 15
        for p, part in zip(
            other.parameters(), released.split([p.numel() for p in other.parameters()]), strict=True
        ):
            p.grad = part.view_as(p).float()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in other.parameters()])
    assert torch.allclose(parameters(private), expected, atol=1e-5)


@pytest.mark.parametrize("minutes", [0.0, 60.0])
@pytest.mark.parametrize("seed", [3, None])
def test_a_training_that_dies_goes_on_to_the_bit(tmp_path: Path, minutes: float, seed: int | None) -> None:
    folders = tmp_path / "whole", tmp_path / "broken"
    if seed is None:
        for folder in folders:
            folder.mkdir()
            (folder / "key").write_bytes(bytes(range(32)))
    whole = training(folders[0], insecure_seed=seed)
    run(whole)
    for dies in (0, 2, 2, 4):
        with pytest.raises(Crash):
            run(training(folders[1], insecure_seed=seed, checkpoint_minutes=minutes), stop_in=dies)
    broken = training(folders[1], insecure_seed=seed, checkpoint_minutes=minutes)
    assert broken.finished == (4 if minutes == 0 else 0)
    run(broken)
    assert torch.equal(parameters(whole), parameters(broken))
    assert begun(folders[0]) == begun(folders[1]) == STEPS
    assert broken.statement().record == whole.statement().record
    assert not (folders[1] / "key").exists()


def test_weights_that_are_drawn_anew_are_replaced_by_those_of_the_start(tmp_path: Path) -> None:
    run(whole := training(tmp_path / "whole"))
    with pytest.raises(Crash):
        run(training(tmp_path / "broken", checkpoint_minutes=60), stop_in=2)
    other = network()
    other[0].weight.data += 1
    run(broken := training(tmp_path / "broken", other))
    assert torch.equal(parameters(whole), parameters(broken)) and begun(tmp_path / "broken") == STEPS


def test_a_training_that_is_ended_early_stays_as_it_ended(tmp_path: Path) -> None:
    private = training(tmp_path / "run", ema_decay=0.9, checkpoint_minutes=60)
    for step in private.steps():
        step.apply()
        if step.number == 2:
            break
    private.finish()
    record = private.statement().record
    assert record["complete"] and record["steps"] == 3 < record["planned_steps"]
    # Whoever ends it may have looked at what was released, and the bound for three steps is for no stop.
    assert private.epsilon() < record["epsilon"] == private.plan.epsilon
    again = training(tmp_path / "run", ema_decay=0.9)
    assert again.finished == again.total == 3 and not list(again.steps())
    assert torch.equal(parameters(private), parameters(again))
    assert again.statement().record == record


def test_a_loop_that_draws_elsewhere_counts_its_repetitions(tmp_path: Path) -> None:
    """Its sums differ when they are repeated: they are thrown away, and fewer steps follow."""
    generator, released = torch.Generator().manual_seed(1), list[bytes]()

    def loop(private: PrivateTraining, stop_in: int | None = None) -> None:
        for step in private.steps():
            for rows, weights, _ in step.microbatches(8):
                scale = 1 + torch.rand(len(rows), generator=generator)
                step.add(losses(private.sgd.module, rows) * scale, weights)
            if step.apply():
                released.append(parameters(private).numpy().tobytes())
            if step.number == stop_in:
                raise Crash

    with pytest.raises(Crash):
        loop(training(tmp_path / "run", checkpoint_minutes=60), stop_in=2)
    again = training(tmp_path / "run", checkpoint_minutes=60)
    loop(again)
    # Steps 0, 1 and 2 were begun; step 0 again; then as many as the plan has left.
    assert begun(tmp_path / "run") == STEPS and len(released) == 3 + 3 and len(set(released)) == 6
    assert again.statement().record["steps"] == STEPS and again.epsilon() <= again.plan.epsilon * 1.001


def test_a_training_whose_steps_were_all_begun_ends_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noised = algorithm.noised_mean

    def dies_in_the_last(*given: Any) -> Tensor:
        if given[-1] == STEPS - 1:
            raise Crash
        return noised(*given)

    with monkeypatch.context() as patched:
        patched.setattr(algorithm, "noised_mean", dies_in_the_last)
        with pytest.raises(Crash):
            run(training(tmp_path / "run", checkpoint_minutes=0))
    again = training(tmp_path / "run", checkpoint_minutes=0)
    given: list[int] = []
    for step in again.steps():
        for rows, weights, _ in step.microbatches(4):
            step.add(losses(again.sgd.module, (rows + 1) % N), weights)  # another sum
        assert not step.apply() and step.spent
        given.append(step.number)
    assert given == [STEPS - 1] and again.complete and again.statement().record["steps"] == STEPS


def test_the_moving_average_takes_the_place_of_the_parameters(tmp_path: Path) -> None:
    private = training(tmp_path / "run", ema_decay=0.9)
    run(private)
    assert all(map(torch.equal, private.sgd.parameters, private.sgd.average.values))
    plain = training(tmp_path / "plain")
    run(plain)
    assert not torch.equal(parameters(private), parameters(plain))


def test_a_schedule_is_saved_with_the_checkpoint(tmp_path: Path) -> None:
    def rates(folder: Path, dies: int | None) -> list[float]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        private = PrivateTraining(
            model, optimizer, plan_of(), folder, synthetic_losses=None, insecure_seed=3,
            checkpoint_minutes=0, also={"schedule": schedule},
        )  # fmt: skip
        found = []
        for step in private.steps():
            if step.number == dies:
                raise Crash
            found.append(optimizer.param_groups[0]["lr"])
            step.apply()
            schedule.step()
        return found

    # The state is saved when the body of the loop has ended, the schedule's step included.
    assert rates(tmp_path / "whole", None) == [0.5**i for i in range(STEPS)]
    with pytest.raises(Crash):
        rates(tmp_path / "broken", 3)
    assert rates(tmp_path / "broken", None) == [0.5**i for i in range(3, STEPS)]


def test_what_else_belongs_to_a_checkpoint_goes_on_where_it_was(tmp_path: Path) -> None:
    def counted(dies: int | None, *names: str) -> int:
        counter = Counter()
        also = dict.fromkeys(names, counter)
        private = training(tmp_path / "run", also=also, checkpoint_minutes=0, synthetic_losses=None)
        for step in private.steps():
            if step.number == dies:
                raise Crash
            step.apply()
            counter.steps += 1
        return counter.steps

    with pytest.raises(Crash):
        counted(3, "counter")
    with pytest.raises(UserError, match="has no state of 'other'"):
        counted(None, "counter", "other")
    assert counted(None, "counter") == STEPS


def test_a_training_whose_steps_were_all_begun_and_none_kept_does_not_end_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parameters are those of the start: a statement of what they spent would be about nothing."""
    noised = algorithm.noised_mean

    def dies_in_the_last(*given: Any) -> Tensor:
        if given[-1] == STEPS - 1:
            raise Crash
        return noised(*given)

    with monkeypatch.context() as patched:
        patched.setattr(algorithm, "noised_mean", dies_in_the_last)
        with pytest.raises(Crash):
            run(training(tmp_path / "run", checkpoint_minutes=60))
    again = training(tmp_path / "run", checkpoint_minutes=60)
    step = next(steps := again.steps())
    for rows, weights, _ in step.microbatches(4):
        step.add(losses(again.sgd.module, (rows + 1) % N), weights)  # another sum
    assert not step.apply() and step.spent
    with pytest.raises(UserError, match="the privacy of this run is spent"):
        next(steps)
    assert not again.complete and begun(tmp_path / "run") == STEPS


# What it says


def test_the_statement_says_what_was_spent(tmp_path: Path) -> None:
    private = training(tmp_path / "run", insecure_seed=None)
    before = private.statement()
    assert before.record["steps"] == 0 == before.epsilon and not before.record["complete"]
    with pytest.raises(Crash):
        run(private, stop_in=2)
    begun_three = private.statement()
    # The third step was begun, though not applied. A release may have decided to stop there.
    assert begun_three.record["steps"] == 3 and not begun_three.record["complete"]
    assert 0 < private.epsilon() < private.plan.epsilon == begun_three.epsilon
    run(again := training(tmp_path / "run", insecure_seed=None))
    again.statement().save(tmp_path / "privacy.json")
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert record["epsilon"] == again.plan.epsilon == again.statement().epsilon and record["complete"]
    assert record["steps"] == record["planned_steps"] == STEPS and again.statement().delta == 1e-3
    assert any("private example" in line for line in record["covers"])
    assert not any("preflight" in line for line in record["does_not_cover"])


def test_what_guarantees_nothing_says_so(tmp_path: Path) -> None:
    seeded = training(tmp_path / "seeded").statement()
    assert "seed" in seeded.record["covers"] and seeded.epsilon == float("inf")
    plan = plan_of(noise_multiplier=None, target_epsilon=float("inf"))
    noiseless = training(tmp_path / "noiseless", plan=plan, insecure_seed=None)
    run(noiseless)
    assert "no noise" in noiseless.statement().record["covers"]
    unchecked = training(tmp_path / "unchecked", synthetic_losses=None).statement()
    assert any("preflight" in line for line in unchecked.record["does_not_cover"])


def test_what_was_begun_is_told_before_the_batch_is_drawn(tmp_path: Path) -> None:
    told: list[int] = []
    private = training(tmp_path / "run", begun=lambda steps, epsilon: told.append(steps))
    for step in private.steps():
        assert told[-1] == step.number + 1
        step.apply()


# Several processes


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    private = training(Path(folder) / "run", insecure_seed=None)
    run(private)
    torch.save(parameters(private), f"{folder}/{rank}")
    try:
        model = network()
        model[0].weight.data += rank
        training(Path(folder) / "other", model)
        refused = ""
    except UserError as error:
        refused = str(error)
    Path(f"{folder}/refused{rank}").write_text(refused)
    dist.destroy_process_group()


def test_two_processes_train_one_module(processes: ForkServerContext, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "key").write_bytes(bytes(range(32)))
    both = [processes.Process(target=_process, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(900)
    assert [process.exitcode for process in both] == [0, 0]
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert torch.equal(first, second) and begun(tmp_path / "run") == STEPS
    # One process under the same key draws other batches, since its numerics have another name.
    assert len(Executions(tmp_path / "run" / "executions.jsonl", {}, writes=False)._begun) == STEPS
    for rank in range(2):
        assert "hold different parameters" in (tmp_path / f"refused{rank}").read_text()
