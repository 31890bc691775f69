"""Each microbatch of a step is added once, with its own weights, and trains the module alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dp_lora import UserError
from dp_lora.privacy.randomness import Randomness
from tests.builders.private_training import IMAGES, LABELS, losses, plan_of, training


@pytest.mark.parametrize("factor", [0.0, math.nan])
def test_an_example_can_be_left_out(factor: float, tmp_path: Path) -> None:
    private = training(tmp_path / "run")
    step = next(_steps := private.steps())
    for rows, weights, _ in step.microbatches(50):
        step.add(losses(private.sgd.module, rows) * factor, weights)
    assert not private.sgd.gradients.total().any() and step.apply()


@pytest.mark.parametrize("skipped", [0, 1, 2, "rest"])
def test_a_microbatch_that_is_not_added_is_refused(skipped: int | str, tmp_path: Path) -> None:
    """One image that is not finite, or a full memory, would take the others of its microbatch away."""
    private = training(tmp_path / "run", plan=plan_of(expected_batch_size=30))
    before = [p.clone() for p in private.sgd.parameters]
    step = next(_steps := private.steps())

    def loop() -> None:
        for number, (rows, weights, _) in enumerate(step.microbatches(10)):
            if number == skipped:
                continue
            step.add(losses(private.sgd.module, rows), weights)
            if skipped == "rest":
                break
        step.apply()

    with pytest.raises(RuntimeError, match=r"^step 0: the losses of a microbatch were not added"):
        loop()
    assert all(torch.equal(*pair) for pair in zip(before, private.sgd.parameters, strict=True))


def test_an_error_while_adding_does_not_hide_a_microbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = training(tmp_path / "run")
    step = next(_steps := private.steps())
    add = private.sgd.gradients.add
    for number, (rows, weights, _) in enumerate(step.microbatches(4)):
        full = MemoryError() if number == 1 else None
        monkeypatch.setattr(private.sgd.gradients, "add", Mock(side_effect=full, wraps=add))
        with suppress(MemoryError):
            step.add(losses(private.sgd.module, rows), weights)
        with pytest.raises(RuntimeError, match="twice for one"):
            step.add(losses(private.sgd.module, rows), weights)
    with pytest.raises(RuntimeError, match="were not added"):
        step.apply()


@pytest.mark.parametrize("size", [7, 50])
def test_weights_are_those_of_the_microbatch_whatever_is_written_on_them(size: int, tmp_path: Path) -> None:
    """Neither padding nor an example can be made more of, nor less by what the others of the batch are."""
    private = training(tmp_path / "run")
    step = next(_steps := private.steps())
    for rows, weights, _ in step.microbatches(size):
        found = losses(private.sgd.module, rows)
        for wrong in (torch.zeros_like(weights), torch.full_like(weights, 2.0), weights[:-1]):
            with pytest.raises(UserError, match=r"^weights of shape .*: expected those of the microbatch"):
                step.add(found, wrong)
        own = weights.clone()
        weights += 1.0
        with pytest.raises(UserError, match=r"^weights of shape"):
            step.add(found, weights)
        step.add(found, own)
    assert step.apply()


@pytest.mark.parametrize("since", [0, 4])
def test_a_trainable_tensor_outside_the_module_is_refused(since: int, tmp_path: Path) -> None:
    """Such as the token of textual inversion; also one that takes part later, at the next step looked at."""
    token, private = torch.zeros(5, requires_grad=True), training(tmp_path / "run", plan=plan_of(steps=8))

    def loop() -> None:
        for step in private.steps():
            for rows, weights, _ in step.microbatches(50):
                images = IMAGES[rows] + (token if step.number >= since else 0.0)
                found = F.cross_entropy(private.sgd.module(images), LABELS[rows], reduction="none")
                step.add(found, weights)
            step.apply()

    with pytest.raises(
        UserError, match=r"^losses: they depend on a tensor of shape \[5\] outside the module"
    ):
        loop()
    assert token.grad is None and private.finished == since


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


def test_microbatches_of_a_batch_that_was_thrown_away_are_refused(tmp_path: Path) -> None:
    private = training(tmp_path / "run")
    step = next(_steps := private.steps())
    parts = step.microbatches(2)
    next(parts)
    step._give_up(microbatch=1)
    with pytest.raises(RuntimeError, match="of an earlier batch"):
        next(parts)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_draws_belong_to_positions_in_the_batch(size: int, tmp_path: Path) -> None:
    private = training(tmp_path / "run")
    step = next(_steps := private.steps())
    parts = []
    for part in step.microbatches(size):
        parts.append(part)
        step.add(losses(private.sgd.module, part.rows), part.weights)
    kept = [int(weights.sum()) for _, weights, _ in parts]
    noise = torch.cat([d.normal("mine", 2)[:n] for (_, _, d), n in zip(parts, kept, strict=True)])
    times = torch.cat([d.timesteps(3, 1000)[:n] for (_, _, d), n in zip(parts, kept, strict=True)])
    key = Randomness.from_seed(3)
    assert torch.equal(noise, key.normal("mine", 0, (sum(kept), 2)))
    assert torch.equal(times, key.timesteps(0, sum(kept), 3, 1000, stratified=True))


def test_a_stream_of_the_step_is_not_given_away(tmp_path: Path) -> None:
    step = next(_steps := training(tmp_path / "run").steps())
    _, _, draws = next(step.microbatches(4))
    for name in ("noise", "batch", "timesteps"):
        with pytest.raises(ValueError, match=f"purpose='{name}'"):
            draws.normal(name, 3)
    assert draws.normal("mine", 3).shape == (4, 3)
