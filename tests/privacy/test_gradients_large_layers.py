"""One example contributes at most C in layers of millions of entries, measured in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from dp_lora.errors import UserError
from dp_lora.privacy import gradients
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip, PrivacyPlan, make_plan
from dp_lora.privacy.preflight import preflight

SIZE = (1280, 11_520)
HUGE = (5000, 10_000)


@contextmanager
def detaching(engine: ClippedGradientSum) -> Iterator[ClippedGradientSum]:
    try:
        yield engine
    finally:
        engine.detach()


def contribution(
    layer: nn.Module, x: Tensor, *, clipping: str = "flat", k: int = 2, bfloat16: bool = False
) -> float:
    """The norm in float64 of what one example of k rows `x` adds to the sum, clipped to C = 1."""
    with detaching(ClippedGradientSum(layer, Clip(k, 1.0, clipping))) as engine:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = layer(x).float().flatten(1).sum(1).view(-1, k).mean(1)
        engine.add(loss)
        return float(engine.total().norm())


def linear(size: tuple[int, int]) -> nn.Linear:
    return nn.Linear(size[1], size[0], bias=False)


def rows(size: tuple[int, int], k: int) -> Tensor:
    """k rows of three tokens whose gradient has the same number in every entry, 0.45: it is rounded down."""
    return torch.full((k, 3, size[1]), 0.15)


@pytest.mark.parametrize(
    ("clipping", "k", "bfloat16"),
    [("flat", 2, False), ("automatic", 1, False), ("per_layer", 2, True)],
)
def test_a_contribution_of_14_million_entries_is_at_most_c(clipping: str, k: int, bfloat16: bool) -> None:
    norm = contribution(linear(SIZE), rows(SIZE, k), clipping=clipping, k=k, bfloat16=bfloat16)
    # `automatic` gives up 0.01 of the gradient's norm, here 40 or more.
    assert (1 - 3e-4 if clipping == "automatic" else 1 - 2e-5) <= norm <= 1


def test_a_norm_in_one_float32_sum_would_pass_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin."""
    monkeypatch.setattr(gradients, "_BLOCK", 1 << 40)
    assert contribution(linear(SIZE), rows(SIZE, 2)) > 1.005


@pytest.mark.parametrize("size", [100, 128, 129, 20_000, 128 * 128 + 1, 128 * 128 * 2 + 300])
def test_every_entry_of_a_layer_counts_in_its_norm(size: int) -> None:
    """Whatever the blocks are: the gradient is as long as its only entry that is not 0."""
    for place in {0, 127, 128, size // 2, size - 1} & set(range(size)):
        x = torch.zeros(2, 2, size)
        x[..., place] = 5.0
        assert contribution(linear((1, size)), x) == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize(("size", "blocks"), [(1, 1), (128, 1), (129, 2), (300, 3), (512, 4)])
def test_norms_are_taken_over_blocks_that_are_short(size: int, blocks: int) -> None:
    """One sum over more entries would be rounded by more than the clip gives up."""
    value = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    norms = gradients._over_blocks(value)
    assert norms.shape == (3, blocks)
    expected = [part.norm(dim=1) for part in value.split(128, dim=1)]
    assert torch.allclose(norms, torch.stack(expected, dim=1), rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 3])
def test_gradients_as_large_as_float32_allows_are_clipped_or_left_out(tokens: int) -> None:
    """Where C over the norm is no normal float32 the product could be anything."""
    for exponent in range(0, 39, 2):
        x = torch.full((2, tokens, 64), 10.0**exponent)
        layer = linear((8, 64))
        with detaching(ClippedGradientSum(layer, Clip(2, 1e-10))) as engine:
            engine.add(layer(x).mul(1e3).sum((1, 2)).view(-1, 2).mean(1))
            assert float(engine.total().norm()) <= 1e-10


def test_a_bound_below_what_float32_can_square_is_refused() -> None:
    for bound in (0.0, 1e-30, float("nan")):
        with pytest.raises(UserError, match="max_grad_norm"):
            ClippedGradientSum(nn.Linear(4, 4), Clip(1, bound))
    with pytest.raises(UserError, match=r"max_grad_norm=1e-30: expected"):
        a_plan(max_grad_norm=1e-30)


def a_plan(max_grad_norm: float) -> PrivacyPlan:
    return make_plan(
        num_examples=1000, expected_batch_size=200, steps=10, noise_multiplier=2.0, target_epsilon=None,
        delta=1e-5, noise_multiplicity=2, max_grad_norm=max_grad_norm,
    )  # fmt: skip


def test_the_preflight_admits_a_correct_layer_of_six_million_entries() -> None:
    layer, size = linear((2560, 2560)), 2560
    x = torch.full((4, 2, size), 0.1) * torch.linspace(1, 2, 4).view(4, 1, 1)

    def losses(examples: slice) -> Tensor:
        part = x.view(2, 2, 2, size)[examples].reshape(-1, 2, size)
        found: Tensor = layer(part).sum((1, 2)).view(-1, 2).mean(1)
        return found

    preflight(layer, losses, a_plan(max_grad_norm=0.01), examples=2)


@pytest.mark.slow
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_a_contribution_of_50_million_entries_is_at_most_c(clipping: str, k: int, bfloat16: bool) -> None:
    norm = contribution(linear(HUGE), rows(HUGE, k), clipping=clipping, k=k, bfloat16=bfloat16)
    assert 1 - 3e-4 <= norm <= 1


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_a_convolution_of_14_million_entries_contributes_at_most_c(k: int) -> None:
    layer, x = nn.Conv2d(1280, 1280, 3, padding=1, bias=False), torch.full((k, 1280, 8, 8), 0.1)
    assert 1 - 2e-5 <= contribution(layer, x, k=k) <= 1


def changed_by_one(examples: int, width: int, at: int) -> float:
    """What one of `examples` in a microbatch changes in the sum, if all gradients point one way; C is 1."""
    sums = []
    for null in (False, True):
        layer = nn.Linear(width, 1, bias=False)
        inputs = torch.full((examples, width), 3.7)
        if null:
            inputs[at] = 0.0
        with detaching(ClippedGradientSum(layer, Clip(1, 1.0))) as engine:
            engine.add(layer(inputs).squeeze(1))
            sums.append(engine.total())
    return float((sums[0] - sums[1]).norm())


@pytest.mark.parametrize("examples", [128, 129, 512, 2048, 8192])
@pytest.mark.parametrize("width", [100, 777])
def test_one_of_many_examples_in_a_microbatch_changes_the_sum_by_at_most_c(examples: int, width: int) -> None:
    assert all(0.99 < changed_by_one(examples, width, at) <= 1.0 for at in (5, examples - 1))


def test_a_sum_of_many_examples_in_float32_would_pass_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_ROWS", 1 << 20)
    assert changed_by_one(8192, 777, 5) > 1 + 1e-4
