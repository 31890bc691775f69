"""`PrivateTraining` in loops of a caller's own: what it keeps, what it resumes and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import dp_lora
from dp_lora import PlanError, PreflightError, PrivacyPlan, PrivateTraining, UserError, make_plan
from dp_lora.jobs.begun import begun
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.randomness import Randomness

N, STEPS = 60, 6
IMAGES = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 3


class Crash(BaseException):
    """The process dies here."""


def plan_of(**changes: Any) -> PrivacyPlan:
    settings = {
        "num_examples": N, "expected_batch_size": 15, "steps": STEPS, "noise_multiplier": 1.0, "delta": 1e-3,
        "max_grad_norm": 0.5,
    }  # fmt: skip
    return make_plan(**(settings | changes))  # type: ignore[arg-type]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def synthetic(model: nn.Module) -> Callable[[slice], Tensor]:
    inputs = torch.eye(4, 5)
    labels = torch.arange(4) % 3
    return lambda chosen: F.cross_entropy(model(inputs[chosen]), labels[chosen], reduction="none")


def training(
    folder: Path, model: nn.Module | None = None, plan: PrivacyPlan | None = None, **named: Any
) -> PrivateTraining:
    model = model or network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"synthetic_losses": synthetic(model), "insecure_seed": 3} | named
    return PrivateTraining(model, optimizer, plan or plan_of(), folder, **settings)


def losses(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(IMAGES[rows]), LABELS[rows], reduction="none")


def run(private: PrivateTraining, size: int = 4, stop_in: int | None = None) -> list[dict[str, float]]:
    """Takes all steps, or dies before step `stop_in` is applied; the values of those taken."""
    values = []
    for step in private.steps():
        for rows, weights, _ in step.microbatches(size):
            step.add(losses(private.sgd.module, rows), weights)
        if step.number == stop_in:
            raise Crash
        if step.apply():
            values.append(step.values)
    return values


def parameters(private: PrivateTraining) -> Tensor:
    return torch.cat([p.detach().flatten() for p in private.sgd.parameters])


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


# What it says


def test_the_statement_says_what_was_spent(tmp_path: Path) -> None:
    private = training(tmp_path / "run", insecure_seed=None)
    before = private.statement()
    assert before.record["steps"] == 0 and not before.record["complete"]
    with pytest.raises(Crash):
        run(private, stop_in=2)
    begun_three = private.statement()
    # The third step was begun, though not applied.
    assert begun_three.record["steps"] == 3 and 0 < begun_three.epsilon < private.plan.epsilon
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


# What it refuses


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
    refused(torch.optim.LBFGS(model.parameters()), "LBFGS")
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
    with pytest.raises(RuntimeError, match="a backward outside"):
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


def test_no_example_counts_twice(tmp_path: Path) -> None:
    """Padding without its weights, a microbatch that is added twice, a batch that is divided twice."""
    private = training(tmp_path / "run")
    step = next(_steps := private.steps())
    model = private.sgd.module
    with pytest.raises(RuntimeError, match="without a microbatch, or twice for one"):
        step.add(losses(model, torch.arange(4)))
    parts = step.microbatches(50)
    rows, weights, _ = next(parts)
    assert 0 < weights.sum() < 50, "the last rows are padding"
    step.add(losses(model, rows))
    total = private.sgd.gradients.total()
    with pytest.raises(RuntimeError, match="without a microbatch, or twice for one"):
        step.add(losses(model, rows), weights)
    assert next(parts, None) is None
    with pytest.raises(RuntimeError, match="without a microbatch, or twice for one"):
        step.add(losses(model, rows), weights)
    with pytest.raises(RuntimeError, match=r"microbatches\(\) twice for one batch"):
        step.microbatches(50)
    assert torch.equal(private.sgd.gradients.total(), total)
    private.sgd.gradients.reset()
    private.sgd.gradients.add(losses(model, rows[weights > 0]))
    assert torch.allclose(private.sgd.gradients.total(), total, atol=1e-6)


@pytest.mark.parametrize("wrong", [torch.ones_like, lambda w: 2 * w, lambda w: w[:3], lambda w: -w])
def test_weights_above_the_microbatch_s_are_refused(
    wrong: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    private = training(tmp_path / "run")
    step = next(_steps := private.steps())
    rows, weights, _ = next(step.microbatches(50))
    with pytest.raises(UserError, match=r"^weights of shape"):
        step.add(losses(private.sgd.module, rows), wrong(weights))
    assert not private.sgd.gradients.total().any()


def test_an_example_can_be_left_out(tmp_path: Path) -> None:
    private = training(tmp_path / "run")
    step = next(_steps := private.steps())
    rows, weights, _ = next(step.microbatches(50))
    step.add(losses(private.sgd.module, rows), torch.zeros_like(weights))
    assert not private.sgd.gradients.total().any()


def test_a_stream_of_the_step_is_not_given_away(tmp_path: Path) -> None:
    step = next(_steps := training(tmp_path / "run").steps())
    _, _, draws = next(step.microbatches(4))
    for name in ("noise", "batch", "timesteps"):
        with pytest.raises(ValueError, match=f"purpose='{name}'"):
            draws.normal(name, 3)
    assert draws.normal("mine", 3).shape == (4, 3)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_draws_belong_to_positions_in_the_batch(size: int, tmp_path: Path) -> None:
    step = next(_steps := training(tmp_path / "run").steps())
    parts = list(step.microbatches(size))
    kept = [int(weights.sum()) for _, weights, _ in parts]
    noise = torch.cat([d.normal("mine", 2)[:n] for (_, _, d), n in zip(parts, kept, strict=True)])
    times = torch.cat([d.timesteps(3, 1000)[:n] for (_, _, d), n in zip(parts, kept, strict=True)])
    key = Randomness.from_seed(3)
    assert torch.equal(noise, key.normal("mine", 0, (sum(kept), 2)))
    assert torch.equal(times, key.timesteps(0, sum(kept), 3, 1000, stratified=True))


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


def test_two_processes_train_one_module(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "key").write_bytes(bytes(range(32)))
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert torch.equal(first, second) and begun(tmp_path / "run") == STEPS
    # One process under the same key draws other batches, since its numerics have another name.
    assert len(Executions(tmp_path / "run" / "executions.jsonl", {}, writes=False)._begun) == STEPS
    for rank in range(2):
        assert "hold different parameters" in (tmp_path / f"refused{rank}").read_text()
