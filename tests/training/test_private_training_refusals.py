"""`PrivateTraining` refuses in one line what cannot be private."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import dp_lora
from dp_lora import PlanError, PreflightError, PrivateTraining, UserError
from dp_lora.jobs.begun import begun
from dp_lora.privacy.refusals import check_optimizer
from tests.builders.private_training import (
    IMAGES,
    LABELS,
    STEPS,
    Crash,
    N,
    losses,
    network,
    parameters,
    plan_of,
    run,
    synthetic,
    training,
)


def wrapped(kind: type, model: nn.Module) -> nn.Module:
    shell = kind.__new__(kind)
    nn.Module.__init__(shell)
    shell.module = model
    return shell


@pytest.mark.parametrize("kind", [nn.parallel.DistributedDataParallel, nn.DataParallel])
def test_a_wrapped_module_is_refused(kind: type, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^module={kind.__name__}: expected the module inside it"):
        training(tmp_path / "run", wrapped(kind, network()), synthetic_losses=None)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^module=OptimizedModule: expected"):
        training(tmp_path / "run", torch.compile(network()), synthetic_losses=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "named"),
    [(nn.BatchNorm1d(8), "mixes the examples"), (nn.Bilinear(8, 8, 8), "Bilinear"), (nn.PReLU(), "PReLU")],
)
def test_a_layer_that_cannot_be_private_is_refused(layer: nn.Module, named: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), layer)
    with pytest.raises(UserError, match=named):
        training(tmp_path / "run", model, synthetic_losses=None)


def test_an_optimiser_of_other_parameters_is_refused(tmp_path: Path) -> None:
    model = network()

    def refused(optimizer: Any, match: str) -> None:
        with pytest.raises(UserError, match=match):
            PrivateTraining(model, optimizer, plan_of(), tmp_path / "run", synthetic_losses=None)
        assert not (tmp_path / "run").exists()

    refused(torch.optim.SGD(model[0].parameters(), lr=1.0), r"^optimizer: lacks 2\.weight")
    refused(torch.optim.SGD([*model.parameters(), *network().parameters()], lr=1.0), "holds 4 parameters")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[0].requires_grad_(False)
    refused(torch.optim.SGD(model.parameters(), lr=1.0), "frozen ones with a gradient")
    model[0].weight.grad = None
    check_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), model)
    refused(torch.optim.LBFGS(model.parameters()), "LBFGS")
    refused(torch.optim.SparseAdam(model.parameters()), "SparseAdam")
    refused(object(), "expected a torch.optim.Optimizer")


def test_a_step_of_the_optimiser_outside_apply_is_refused(tmp_path: Path) -> None:
    """So are GradScaler.step and an optimiser that `accelerate` wrapped: both call it."""
    model = network()
    private = training(tmp_path / "run", model)
    optimizer = private.sgd.optimizer
    step = next(_steps := private.steps())
    before = parameters(private)
    with pytest.raises(RuntimeError, match=r"outside PrivateStep\.apply"):
        optimizer.step()
    assert torch.equal(parameters(private), before)
    # Gradients that somebody else left are not used either.
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e9)
    step.apply()
    assert float((parameters(private) - before).abs().max()) < 1


def test_a_backward_of_ones_own_is_refused(tmp_path: Path) -> None:
    private = training(tmp_path / "run")
    steps = private.steps()
    next(steps)
    with pytest.raises(RuntimeError, match=r"a backward outside step\.add"):
        losses(private.sgd.module, torch.arange(4)).mean().backward()


@pytest.mark.parametrize("reduce", [Tensor.mean, lambda x: x.view(1, -1), lambda x: x[:2], Tensor.detach])
def test_losses_that_are_not_one_an_example_are_refused(
    reduce: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    private = training(tmp_path / "run")
    step = next(_steps := private.steps())
    rows, weights, _ = next(step.microbatches(4))
    with pytest.raises(UserError, match=r"^losses"):
        step.add(reduce(losses(private.sgd.module, rows)), weights)


def test_losses_that_mix_the_examples_fail_the_preflight(tmp_path: Path) -> None:
    model = network()

    def mixed(chosen: slice) -> Tensor:
        own = synthetic(model)(chosen)
        return own.mean().expand(len(own))

    with pytest.raises(PreflightError):
        training(tmp_path / "run", model, synthetic_losses=mixed)
    assert not (tmp_path / "run" / "executions.jsonl").exists()
    # The engine is off again.
    losses(model, torch.arange(3)).sum().backward()


def test_a_step_that_is_not_applied_is_an_error(tmp_path: Path) -> None:
    private = training(tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"step 0 was begun: expected apply\(\)"):
        for _ in private.steps():
            pass
    assert begun(tmp_path / "run") == 1


def test_a_step_is_applied_once(tmp_path: Path) -> None:
    step = next(steps := training(tmp_path / "run").steps())
    assert step.apply()
    for call in (step.apply, lambda: step.add(torch.zeros(1, requires_grad=True))):
        with pytest.raises(RuntimeError, match="after the step has ended"):
            call()
    step = next(steps)
    steps.close()
    with pytest.raises(RuntimeError, match="after the loop over the steps has ended"):
        step.apply()


def test_another_plan_or_number_of_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^num_examples=59: expected 60"):
        training(tmp_path / "run", num_examples=59)
    hidden = plan_of(num_examples=None, adjacency="add_or_remove", sample_rate=0.25)
    with pytest.raises(UserError, match=r"^num_examples=None: expected the number"):
        training(tmp_path / "run", plan=hidden)
    run(training(tmp_path / "hidden", plan=hidden, num_examples=N))
    run(training(tmp_path / "run"))
    with pytest.raises(UserError, match=r"noise_multiplier=1.0 and now has 2.0"):
        training(tmp_path / "run", plan=plan_of(noise_multiplier=2.0))
    with pytest.raises(UserError, match="other shapes"):
        training(tmp_path / "run", nn.Linear(5, 3))


def test_a_plan_names_its_own_parameters() -> None:
    with pytest.raises(ValueError, match=r"^max_grad_norm=0: expected a number from") as refused:
        plan_of(max_grad_norm=0)
    assert isinstance(refused.value, PlanError) and "privacy." not in str(refused.value)


def test_the_names_of_the_library_can_be_imported() -> None:
    for name in dp_lora.__all__:
        assert getattr(dp_lora, name).__name__ == name and name in dir(dp_lora)
    with pytest.raises(AttributeError, match="no attribute 'PrivateTrainer'"):
        dp_lora.PrivateTrainer  # noqa: B018


def test_a_parameter_that_joins_later_is_refused(tmp_path: Path) -> None:
    """It would move by its gradient without noise."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=1.0)
    private = PrivateTraining(model, optimizer, plan_of(), tmp_path / "run", synthetic_losses=None)
    before = model[0].weight.detach().clone()
    for step in private.steps():
        for rows, weights, _ in step.microbatches(8):
            step.add(losses(model, rows), weights)
        if step.number:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters())})
            with pytest.raises(UserError, match="other parameters are trainable than when"):
                step.apply()
            break
        step.apply()
    assert torch.equal(model[0].weight, before)


def test_a_trainable_parameter_outside_the_module_is_refused(tmp_path: Path) -> None:
    encoder, private = nn.Linear(5, 5), training(tmp_path / "run")
    step = next(_steps := private.steps())
    rows, _, _ = next(step.microbatches(8))
    with pytest.raises(UserError, match=r"^losses: they depend on a tensor of shape \[5.*outside the module"):
        step.add(F.cross_entropy(private.sgd.module(encoder(IMAGES[rows])), LABELS[rows], reduction="none"))
    assert encoder.weight.grad is None


def test_a_schedule_that_steers_by_the_loss_is_refused(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    also = {"rates": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)}
    with pytest.raises(UserError, match=r"^also: 'rates' is a ReduceLROnPlateau"):
        PrivateTraining(model, optimizer, plan_of(), tmp_path / "run", synthetic_losses=None, also=also)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("first", [3, None])
def test_a_training_stays_seeded_or_secret(first: int | None, tmp_path: Path) -> None:
    run(training(tmp_path / "run", insecure_seed=first))
    other = None if first == 3 else 3
    with pytest.raises(UserError, match=r"began with(out)? a seed"):
        training(tmp_path / "run", insecure_seed=other)


def test_a_folder_is_open_once(tmp_path: Path) -> None:
    first = training(tmp_path / "run")
    with pytest.raises(UserError, match="a training is open there"):
        training(tmp_path / "run")
    # The module of an open training is not taken twice either, in whatever folder.
    with pytest.raises(UserError, match="is replaced, by another training"):
        training(tmp_path / "other", first.sgd.module)
    first.close()
    with pytest.raises(RuntimeError, match="was closed"):
        next(first.steps())
    assert not (tmp_path / "run" / "executions.jsonl").exists()
    run(training(tmp_path / "run", first.sgd.module))


def test_several_processes_without_a_group_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^WORLD_SIZE=2: expected torch\.distributed"):
        training(tmp_path / "run")


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"steps": 2 * STEPS}, "epsilon"),
        ({"noise_multiplier": 0.5}, "epsilon"),
        ({"epsilon": 0.01}, "epsilon"),
        ({"sample_rate": 0.5}, "epsilon"),
        ({"expected_batch_size": 5.0}, "sample_rate"),
        ({"max_grad_norm": float("inf")}, "noise_multiplier and max_grad_norm"),
    ],
)
def test_an_edited_plan_is_refused(edit: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"^{named}"):
        training(tmp_path / "run", plan=dataclasses.replace(plan_of(), **edit))
    assert not (tmp_path / "run").exists()


def test_a_plan_that_is_edited_in_the_loop_is_refused(tmp_path: Path) -> None:
    private = training(tmp_path / "run", synthetic_losses=None)
    step = next(_steps := private.steps())
    before = parameters(private)
    object.__setattr__(private.plan, "noise_multiplier", 1e-3)
    for rows, weights, _ in step.microbatches(4):
        step.add(losses(private.sgd.module, rows), weights)
    with pytest.raises(UserError, match=r"^plan: was edited after the training began"):
        step.apply()
    assert torch.equal(parameters(private), before)
    with pytest.raises(UserError, match=r"^plan: was edited after the training began"):
        private.statement()


def test_the_statement_is_of_the_plan_that_was_trained_under(tmp_path: Path) -> None:
    private = training(tmp_path / "run", synthetic_losses=None)
    next(_steps := private.steps())
    before = private.statement().record
    private.plan = plan_of(noise_multiplier=40.0)
    assert private.statement().record == before


def test_long_gradients_do_not_hide_that_examples_mix(tmp_path: Path) -> None:
    """After the clip all gradients here have length C, whatever the others are."""
    model = network()

    def mixed(chosen: slice) -> Tensor:
        own = 1e3 * synthetic(model)(chosen)
        return own / own.detach().mean() * 1e3

    with pytest.raises(PreflightError, match="mixes the examples"):
        training(tmp_path / "run", model, plan_of(max_grad_norm=1e-3), synthetic_losses=mixed)


class Centres(nn.Module):
    """Uses the mean of the batch, while it is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.training else x


def test_the_preflight_keeps_the_mode_of_the_module(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), Centres(), nn.Dropout(0.5), nn.Linear(8, 3))
    with pytest.raises(PreflightError, match="mixes the examples"):
        training(tmp_path / "run", model.train())
    assert all(part.training for part in model.modules())
    run(training(tmp_path / "run", model.eval()))


class Remembers(nn.Module):
    """Keeps a mean of the batches in a tensor that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.data.lerp_(x.detach().mean(0), 0.1)
        return x


def test_a_frozen_tensor_that_changes_is_found_before_the_first_step(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), Remembers(), nn.Linear(8, 3))
    with pytest.raises(UserError, match=r"^module: 1\.mean changed in the preflight"):
        training(tmp_path / "run", model)
    assert not (tmp_path / "run" / "executions.jsonl").exists()


def test_without_a_preflight_it_is_found_before_it_is_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), Remembers(), nn.Linear(8, 3))
    private = training(tmp_path / "run", model, synthetic_losses=None)
    changed = pytest.raises(UserError, match=r"^module: 1\.mean changed during the training")
    with changed:
        run(private)
    with changed:
        private.statement()
    with changed:
        private.finish()
    # Nor does a second try, on a module that is as it was, take over what the first one trained.
    model[1].mean.data.zero_()
    again = training(tmp_path / "run", model, synthetic_losses=None)
    assert again.finished == 0 and not again.complete
    with changed:
        run(again)


def test_a_folder_without_its_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(training(tmp_path / "run"), stop_in=2)
    (tmp_path / "run" / "plan.json").unlink()
    with pytest.raises(UserError, match=r"plan\.json: is missing, and steps were begun"):
        training(tmp_path / "run", plan=plan_of(noise_multiplier=5.0))


@pytest.mark.parametrize("content", ["[]", "1", "{}", '{"steps": 6}'])
def test_a_damaged_plan_is_refused(content: str, tmp_path: Path) -> None:
    crashing = training(tmp_path / "run", network())
    with pytest.raises(Crash):
        run(crashing, stop_in=2)
    (tmp_path / "run" / "plan.json").write_text(content)
    with pytest.raises(
        UserError, match=r"plan\.json: no plan of a run; expected what this program wrote there"
    ):
        training(tmp_path / "run", network())


def test_a_record_that_is_removed_before_the_first_checkpoint_is_missed(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(training(tmp_path / "run", checkpoint_minutes=60, insecure_seed=None), stop_in=2)
    (tmp_path / "run" / "executions.jsonl").unlink()
    with pytest.raises(UserError, match=r"executions\.jsonl: is not there or empty"):
        training(tmp_path / "run", insecure_seed=None)


def test_a_record_that_is_emptied_is_missed(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(training(tmp_path / "run"), stop_in=2)
    (tmp_path / "run" / "executions.jsonl").write_text("")
    with pytest.raises(UserError, match=r"executions\.jsonl: is not there or empty"):
        training(tmp_path / "run")


def test_a_plan_under_which_nothing_was_begun_can_be_replaced(tmp_path: Path) -> None:
    training(tmp_path / "run").close()
    private = training(tmp_path / "run", plan=plan_of(max_grad_norm=0.4), insecure_seed=None)
    run(private)
    assert private.statement().record["max_grad_norm"] == 0.4 and private.statement().epsilon < 100


@pytest.mark.parametrize(
    "change",
    [{"max_grad_norm": 0.4}, {"clipping": "automatic"}, {"delta": 1e-4}, {"loss_share": 0.1}],
    ids=str,
)
def test_a_training_goes_on_under_its_plan_alone(change: dict[str, Any], tmp_path: Path) -> None:
    run(training(tmp_path / "run"))
    with pytest.raises(UserError, match=f"this run began with {next(iter(change))}="):
        training(tmp_path / "run", plan=plan_of(**change))


def test_a_state_that_is_saved_in_the_loop_is_one_to_go_on_from(tmp_path: Path) -> None:
    """Also with a learning rate of NumPy's, which torch's safe loading refuses."""
    private = training(tmp_path / "run", checkpoint_minutes=60)
    private.sgd.optimizer.param_groups[0]["lr"] = np.float64(0.1)
    for step in private.steps():
        step.apply()
        if step.number == 2:
            private.save()
            break
    assert training(tmp_path / "run").finished == 3


def test_an_adapter_with_dropout_trains(tmp_path: Path) -> None:
    """In training mode too, where its dropout is at work."""
    model = get_peft_model(network(), LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5)).train()
    private = training(tmp_path / "run", model)
    step = next(_steps := private.steps())
    for rows, weights, _ in step.microbatches(1):
        before = private.sgd.gradients.total()
        step.add(1e4 * losses(model, rows), weights)
        assert float((private.sgd.gradients.total() - before).norm()) <= 0.5
    assert private.sgd.gradients.total().any() and step.apply()
