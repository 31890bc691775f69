"""What a step's random numbers are bound to, on a network of two parameters."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dp_lora.errors import UserError
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.executions import ORIGIN, Execution, Executions
from dp_lora.privacy.plan import make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.refusals import check_optimizer
from dp_lora.privacy.step import DPSGD

PLAN = make_plan(
    num_examples=40, expected_batch_size=10, steps=3, noise_multiplier=1.0, delta=1e-3, max_grad_norm=0.5
)


def state(folder: Path, randomness: Randomness | None = None, *, frozen: bool = False) -> DPSGD:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(not frozen)
    trained = [p for p in module.parameters() if p.requires_grad]
    executions = Executions(folder / "executions.jsonl", {})
    key = randomness or Randomness.from_system()
    return DPSGD(module, torch.optim.SGD(trained, lr=0.1), PLAN, key, executions, 40)


def words(sgd: DPSGD, execution: Execution, digest: str) -> bytes:
    return sgd.randomness_of(execution, digest).bits64("noise", 0, range(2)).tobytes()


def tensors(sgd: DPSGD) -> list[Tensor]:
    return [*sgd.parameters, *sgd.average.values]


def execution(name: str, generation: int = 0) -> Execution:
    return Execution(0, ORIGIN, 0, name, generation)


def test_every_bit_of_every_trained_parameter_is_in_the_digest_of_the_state(tmp_path: Path) -> None:
    sgd = state(tmp_path)
    digests = [sgd.state_digest(), sgd.state_digest()]
    assert digests[0] == digests[1]
    for parameter in sgd.parameters:
        for place in (0, -1):
            flat = parameter.data.view(-1)
            flat[place] = torch.nextafter(flat[place], torch.tensor(9.0))
            digests.append(sgd.state_digest())
    assert len(set(digests)) == 1 + 2 * len(sgd.parameters) == 5


def test_with_a_key_no_two_executions_and_no_two_states_share_a_stream(tmp_path: Path) -> None:
    sgd = state(tmp_path)
    cases = [
        (execution(name, generation), digest) for name in "ab" for generation in (0, 1) for digest in "xy"
    ]
    found = {(one.name, digest): words(sgd, one, digest) for one, digest in cases}
    assert len(set(found.values())) == 4
    assert words(sgd, *cases[0]) == words(sgd, *cases[0])
    # Nor is it that of the key itself, from which other streams come.
    key = sgd.randomness_of(execution("a"), "x").key
    assert key not in {sgd.randomness_of(execution("b"), "x").key, sgd._randomness.key}


def test_with_a_seed_a_stream_depends_on_how_often_the_step_was_begun_alone(tmp_path: Path) -> None:
    seed = Randomness.from_seed(5)
    sgd = state(tmp_path, seed)
    first = words(sgd, execution("a"), "x")
    assert first == words(sgd, execution("b"), "y") == seed.bits64("noise", 0, range(2)).tobytes()
    again = words(sgd, execution("a", 1), "x")
    assert first != again == words(sgd, execution("b", 1), "y") != words(sgd, execution("a", 2), "x")


def test_a_step_of_another_state_draws_another_batch_and_other_noise(tmp_path: Path) -> None:
    """Two copies of one run whose parameters differ in a bit, under one key and one name of the execution."""
    key = Randomness.from_system()
    batches: list[Tensor] = []
    released: list[Tensor] = []
    for copy in range(3):
        folder = tmp_path / str(copy)
        folder.mkdir()
        sgd = state(folder, key)
        weight = sgd.parameters[0].data.view(-1)
        if copy == 2:
            weight[1] = torch.nextafter(weight[1], torch.tensor(9.0))
        before = weight.clone()
        step = sgd.begin(0)
        batches.append(step._batch)
        sgd.gradients.reset()
        assert step.apply()
        # No example was added, so what moves the parameters is the noise.
        released.append((before - sgd.parameters[0].data.view(-1)) / 0.1)
        sgd.detach()
    assert torch.equal(batches[0], batches[1]) and torch.equal(released[0], released[1])
    assert not torch.equal(batches[0], batches[2])
    assert not torch.allclose(released[0], released[2], atol=1e-3)


def test_a_step_begins_on_record_and_from_an_empty_sum(tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []
    sgd = state(tmp_path, Randomness.from_seed(0))
    sgd.begun = lambda executions, epsilon: told.append((executions, epsilon))
    sgd.gradients._total += 7.0
    step = sgd.begin(0)
    assert (step.number, step.attempt, step.applied, step.spent) == (0, 1, False, False)
    assert told == [(1, sgd.epsilon())] and sgd.executions.count == 1
    assert torch.count_nonzero(sgd.gradients.total()) == 0
    sgd.tell_begun()
    assert len(told) == 1, "each once"


def test_nothing_is_added_to_a_step_that_has_ended(tmp_path: Path) -> None:
    sgd = state(tmp_path, Randomness.from_seed(0))
    step = sgd.begin(0)
    for rows, _, _ in step.microbatches(4):
        losses = sgd.module(torch.ones(len(rows), 3)).square().sum(1)
        step.add(losses)
    assert step.apply() and len(rows) == 4
    for call in (lambda: step.add(losses), step.apply):
        with pytest.raises(RuntimeError, match="after the step has ended"):
            call()


def test_a_state_that_is_loaded_is_the_one_that_was_saved(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first, other = state(tmp_path / "a"), state(tmp_path / "b")
    assert first.begin(0).apply()
    saved = deepcopy(first.state_dict())
    assert not torch.equal(first.parameters[0], other.parameters[0]) and first.lineage != other.lineage
    other.load_state_dict(saved)
    for one, again in zip(tensors(first), tensors(other), strict=True):
        assert torch.equal(one, again)
    assert other.lineage == first.lineage and other.state_digest() == first.state_digest()


@pytest.mark.parametrize(
    ("foreign", "examples", "looked"), [(True, 3, 1), (False, 3, 0), (True, 1, 0), (False, 1, 0)]
)
def test_the_first_losses_are_looked_at_if_they_are_the_caller_s(
    foreign: bool, examples: int, looked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no loss for each example is left to `ClippedGradientSum.add`, which refuses it."""
    for wrong in (False, True):
        sgd, seen = state(tmp_path), list[Tensor]()
        sgd.foreign_losses = foreign
        monkeypatch.setattr(sgd.gradients, "refuse_mixed", lambda losses, seen=seen: not seen.append(losses))
        losses = sgd.module(torch.ones(examples, 3)).sum(1)
        for _ in range(2):
            sgd.refuse_others(losses.mean() if wrong else losses, examples, examples, 0)
        assert len(seen) == (0 if wrong else looked)


def test_losses_are_looked_at_again_when_there_are_twice_as_many_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of padding are copies of an example's own, and hide that others are mixed in."""
    sgd, seen = state(tmp_path), list[Tensor]()
    sgd.foreign_losses = True
    monkeypatch.setattr(sgd.gradients, "refuse_mixed", lambda losses: not seen.append(losses))
    losses = sgd.module(torch.ones(8, 3)).sum(1)
    looked = []
    for examples in (0, 1, 2, 3, 4, 7, 8, 2):
        sgd.refuse_others(losses, 8, examples, 0)
        looked.append(len(seen))
    assert looked == [0, 0, 1, 1, 2, 2, 3, 3]


def test_processes_with_different_sums_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any noise: two sums with the same noise would differ by their gradients alone."""
    assert algorithm._same_everywhere("a") == "a"
    monkeypatch.setattr(algorithm, "everyone", lambda digest: ["a", digest])
    assert algorithm._same_everywhere("a") == "a"
    with pytest.raises(RuntimeError, match="different sums of one batch: nothing was released"):
        algorithm._same_everywhere("b")


def test_only_what_is_trained_has_to_be_in_the_optimiser(tmp_path: Path) -> None:
    sgd = state(tmp_path, frozen=True)
    assert len(sgd.parameters) == 1
    sgd.refuse_changed()
    sgd.module.bias.requires_grad_(True)
    with pytest.raises(UserError, match="other parameters are trainable"):
        sgd.refuse_changed()


def test_an_optimiser_that_is_not_torch_s_own_is_refused() -> None:
    module = nn.Linear(3, 2)
    wrapped = torch.optim.SGD(module.parameters(), lr=0.1)
    check_optimizer(wrapped, module)
    wrapped.accelerator_state = object()  # type: ignore[attr-defined]
    for optimizer in (wrapped, object()):
        with pytest.raises(UserError, match=r"before accelerator\.prepare"):
            check_optimizer(optimizer, module)  # type: ignore[arg-type]
