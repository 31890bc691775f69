"""Mistakes of whoever writes a loop around `PrivateTraining`, and of whoever resumes it, are one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_lora import PlanError, PrivateTraining, UserError
from dp_lora.jobs.begun import begun
from dp_lora.privacy.executions import ORIGIN, Executions
from dp_lora.storage.files import append_line, read_json
from dp_lora.training import private_training
from dp_lora.training.steps_left import steps_to_finish
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

PLAN = plan_of()


def _mean_of_all(model: nn.Module, rows: Tensor) -> Tensor:
    return losses(model, rows).mean().expand(len(rows))


def _wrong_order_of_draws(model: nn.Module, rows: Tensor) -> Tensor:
    """The k rows of an example do not follow each other."""
    return losses(model, rows.repeat(2)).view(2, -1).mean(0)


def _right_order_of_draws(model: nn.Module, rows: Tensor) -> Tensor:
    return losses(model, rows.repeat_interleave(2)).view(-1, 2).mean(1)


def _unlike_the_one_before(model: nn.Module, rows: Tensor) -> Tensor:
    """Each loss but the first depends on the example before."""
    own = losses(model, rows)
    return own + torch.cat([own.new_zeros(1), (own[1:] - own[:-1]).square()])


def _last_sees_all(model: nn.Module, rows: Tensor) -> Tensor:
    own = losses(model, rows)
    return torch.cat([own[:-1], own.sum()[None]])


def _two_that_cancel(model: nn.Module, rows: Tensor) -> Tensor:
    """What the first example gives to the second and to the last has the sum 0."""
    own = losses(model, rows)
    others = torch.zeros_like(own)
    others[1], others[-1] = own[0], -own[0] if len(own) > 2 else own[0]
    return own + others


@pytest.mark.parametrize(
    ("wrong", "k"),
    [
        (_mean_of_all, 1),
        (_wrong_order_of_draws, 2),
        (_unlike_the_one_before, 1),
        (_last_sees_all, 1),
        (_two_that_cancel, 1),
    ],
)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_loss_that_mixes_examples_in_the_loop_alone_is_refused(
    wrong: Callable[[nn.Module, Tensor], Tensor], k: int, size: int, tmp_path: Path
) -> None:
    """The preflight sees another function, or none."""
    private = training(tmp_path / "run", plan=plan_of(noise_multiplicity=k), synthetic_losses=None)
    before = parameters(private)
    step = next(_steps := private.steps())
    rows, weights, _ = next(step.microbatches(size))
    with pytest.raises(UserError, match=r"^losses: that of one example depends on other examples"):
        step.add(wrong(private.sgd.module, rows), weights)
    assert torch.equal(parameters(private), before)
    assert not private.sgd.gradients.total().any()


def test_an_example_that_is_not_finite_does_not_hide_that_losses_are_mixed(tmp_path: Path) -> None:
    """Nothing can be told of its microbatch, so the next one is looked at."""
    private = training(tmp_path / "run", synthetic_losses=None)
    module = private.sgd.module
    step = next(_steps := private.steps())
    microbatches = step.microbatches(4)
    rows, weights, _ = next(microbatches)
    spoilt = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    step.add(losses(module, rows) * spoilt[: len(rows)], weights)
    rows, weights, _ = next(microbatches)
    with pytest.raises(UserError, match=r"^losses: that of one example depends on other examples"):
        step.add(_unlike_the_one_before(module, rows), weights)


def test_looking_for_mixed_examples_changes_no_sum(tmp_path: Path) -> None:
    def sum_of(look: bool, k: int) -> Tensor:
        plan = plan_of(noise_multiplicity=k)
        private = training(tmp_path / f"{look}{k}", plan=plan, synthetic_losses=None)
        private.sgd.foreign_losses = look
        step = next(_steps := private.steps())
        of = _right_order_of_draws if k == 2 else losses
        for rows, weights, _ in step.microbatches(4):
            step.add(of(private.sgd.module, rows), weights)
        return private.sgd.gradients.total()

    for k in (1, 2):
        assert torch.equal(sum_of(True, k), sum_of(False, k))
        assert sum_of(True, k).any()


def test_a_module_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^module: no parameter is trainable"):
        training(tmp_path / "run", network().requires_grad_(False))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.optim.SGD, torch.optim.Adam),
        (torch.optim.Adam, torch.optim.SGD),
        (torch.optim.AdamW, torch.optim.Adam),
    ],
)
def test_another_optimiser_does_not_go_on(first: Any, second: Any, tmp_path: Path) -> None:
    """Also where both have options of the same names."""
    model = network()

    def begin(kind: Any) -> PrivateTraining:
        return PrivateTraining(
            model, kind(model.parameters(), lr=0.1), plan_of(), tmp_path / "run", synthetic_losses=None
        )

    with pytest.raises(Crash):
        run(begin(first), stop_in=1)
    with pytest.raises(UserError, match=f"={second.__name__}: this training began with {first.__name__};"):
        begin(second)
    run(begin(first))


def test_a_schedule_that_is_forgotten_at_the_resume_is_refused(tmp_path: Path) -> None:
    """Its learning rate would stay where it was."""
    model = network()

    def begin(scheduled: bool) -> PrivateTraining:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        also = {"schedule": torch.optim.lr_scheduler.StepLR(optimizer, 1)} if scheduled else None
        return PrivateTraining(
            model, optimizer, plan_of(), tmp_path / "run", synthetic_losses=None, also=also
        )

    with pytest.raises(Crash):
        run(begin(True), stop_in=1)
    with pytest.raises(UserError, match=r"^also: lacks 'schedule'"):
        begin(False)
    run(begin(True))


def test_a_plan_without_the_number_of_examples_names_it() -> None:
    with pytest.raises(PlanError, match=r"^num_examples=None"):
        plan_of(num_examples=None)


def test_the_number_of_examples_is_the_plan_s_or_else_the_caller_s() -> None:
    hidden = replace(PLAN, num_examples=None)
    assert private_training._number_of_examples(PLAN, None) == N
    assert private_training._number_of_examples(PLAN, N) == N
    assert private_training._number_of_examples(hidden, 7) == 7
    with pytest.raises(UserError, match=r"^num_examples=7: expected 60"):
        private_training._number_of_examples(PLAN, 7)
    with pytest.raises(UserError, match=r"^num_examples=None: expected the number"):
        private_training._number_of_examples(hidden, None)


def test_a_folder_keeps_the_plan_of_its_first_step(tmp_path: Path) -> None:
    plan, other, keep = PLAN, replace(PLAN, max_grad_norm=0.4), private_training._same_plan
    keep(plan, tmp_path, seeded=True)
    keep(other, tmp_path, seeded=True)
    assert read_json(tmp_path / "plan.json")["max_grad_norm"] == 0.4, "nothing was begun under the first"
    append_line(tmp_path / "executions.jsonl", {"step": 0, "execution": "a"})
    before = (tmp_path / "plan.json").read_bytes()
    keep(other, tmp_path, seeded=True)
    with pytest.raises(UserError, match=r"this run began with max_grad_norm=0\.4"):
        keep(plan, tmp_path, seeded=True)
    with pytest.raises(UserError, match="began with a seed"):
        keep(other, tmp_path, seeded=False)
    assert (tmp_path / "plan.json").read_bytes() == before
    (tmp_path / "plan.json").unlink()
    with pytest.raises(UserError, match=r"plan\.json: is missing, and steps were begun"):
        keep(other, tmp_path, seeded=True)


def test_a_loop_that_is_left_early_is_saved_before_its_key_is_gone(tmp_path: Path) -> None:
    private = training(tmp_path / "run", synthetic_losses=None, checkpoint_minutes=60)
    step = next(_steps := private.steps())
    assert step.apply()
    private.finish()
    again = training(tmp_path / "run", synthetic_losses=None)
    assert again.finished == again.total == 1 and torch.equal(parameters(again), parameters(private))


def test_what_belongs_to_a_checkpoint_is_taken_over_by_its_name(tmp_path: Path) -> None:
    counter = Counter()
    private = training(tmp_path / "run", synthetic_losses=None, also={"counter": counter})
    counter.steps = 3
    private.save()
    counter.steps = 0
    assert private._resumed() == 0 and counter.steps == 3
    private._also["other"] = Counter()
    with pytest.raises(UserError, match="has no state of 'other'"):
        private._resumed()
    private._also.clear()
    with pytest.raises(UserError, match=r"^also: lacks 'counter'"):
        private._resumed()


def test_a_training_ends_early_with_steps_that_it_finished_alone(tmp_path: Path) -> None:
    private = training(tmp_path / "run", synthetic_losses=None)
    with pytest.raises(UserError, match="the privacy of this run is spent"):
        private.end_early(0)
    assert private.checkpoint.load() is None
    private.end_early(1)
    kept = private.checkpoint.load()
    assert kept is not None and kept[0] == 1


def test_what_can_be_replayed_is_no_step_of_the_plan_once_more(tmp_path: Path) -> None:
    plan, record = PLAN, Executions(tmp_path / "executions.jsonl", {})
    lineages = [ORIGIN]
    for step in range(3):
        after = record.keep_sum(record.begin(step, lineages[-1]), f"sum {step}")
        assert after is not None
        lineages.append(after)
    finish = steps_to_finish
    assert [finish(plan, record, step, lineage) for step, lineage in enumerate(lineages)] == [STEPS] * 4
    # From a state that came another way none is replayed: three are left for what is begun anew.
    assert finish(plan, record, 0, "another") == STEPS - 3
    for step in range(3, STEPS):
        record.begin(step, "another")
    with pytest.raises(UserError, match="the privacy of this run is spent"):
        finish(plan, record, 0, "another")


def test_a_step_that_is_not_in_hand_takes_no_example(tmp_path: Path) -> None:
    """Two steps over one sum: each example would move it by 2 C."""
    private = training(tmp_path / "run")
    first = next(_steps := private.steps())
    rows, weights, _ = next(_parts := first.microbatches(N))
    with pytest.raises(RuntimeError, match=r"^steps\(\) twice at once: expected one loop"):
        next(private.steps())
    other = private.sgd.begin(0)
    for call in (
        lambda: first.add(losses(private.sgd.module, rows), weights),
        first.apply,
    ):
        with pytest.raises(RuntimeError, match="after another step was begun; expected that one"):
            call()
    assert not private.sgd.gradients.total().any() and not first.applied
    for rows, weights, _ in other.microbatches(N):
        other.add(losses(private.sgd.module, rows), weights)
    longest = len(other._batch) * PLAN.max_grad_norm
    assert 0 < float(private.sgd.gradients.total().norm()) <= longest * (1 + 1e-6)


def _refused_in_a_fork(call: Callable[[], object]) -> bool:
    child = os.fork()
    if not child:
        try:
            call()
            os._exit(0)
        except RuntimeError as error:
            os._exit(7 if "belongs to the process that made it" in str(error) else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_forked_process_begins_no_step_and_ends_none(tmp_path: Path) -> None:
    private = training(tmp_path / "run")
    assert _refused_in_a_fork(lambda: next(private.steps()))
    assert begun(tmp_path / "run") == 0
    for step in private.steps():
        for rows, weights, _ in step.microbatches(N):
            given = losses(private.sgd.module, rows)
            assert _refused_in_a_fork(partial(step.add, given, weights))
            step.add(given, weights)
        assert _refused_in_a_fork(step.apply)
        assert step.apply()
    assert begun(tmp_path / "run") == STEPS
