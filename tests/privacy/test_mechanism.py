"""The noise of a release, its division, and several processes against one."""

from __future__ import annotations

import dataclasses
import datetime
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scipy import stats

from dp_lora.privacy.batches import poisson_batch
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.mechanism import all_reduced, microbatches, noised_mean, signal_to_noise, slice_of_batch
from dp_lora.privacy.plan import Clip, PrivacyPlan
from dp_lora.privacy.randomness import Randomness

SEED = Randomness.from_seed(2)
# Of the whole chi-square test over all parameters, when the noise is right; the seed is fixed.
FALSE_FAILURE_RATE = 1e-6


def plan(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "num_examples": 50,
        "sample_rate": 0.5,
        "expected_batch_size": 25,
        "steps": 10,
        "noise_multiplier": 1.5,
        "noise_multiplicity": 2,
        "max_grad_norm": 0.02,
        "clipping": "flat",
        "delta": 1e-3,
        "target_epsilon": None,
        "epsilon": 5.0,
        "accountant": "pld",
        "epsilon_by_accountant": {"prv": 5.01, "pld": 5.0, "rdp": 5.5},
        "adjacency": "add or remove one image, Poisson sampling",
    }
    return PrivacyPlan(**values | changes)


def wrong_parameters(engine: ClippedGradientSum, released: torch.Tensor, std: float) -> list[str]:
    """The parameters whose noise does not have `std`, by a chi-square test of each, Bonferroni-corrected.

    With `released` [draws, P] the power against half the standard deviation is above 1 - 1e-6 for every
    parameter of 8 numbers and 40 draws: 320 degrees of freedom put sigma / 2 twelve deviations off.
    """
    level = FALSE_FAILURE_RATE / len(engine.parameters) / 2
    wrong, start = [], 0
    for name, p in engine.parameters.items():
        part = released[:, start : start + p.numel()].double()
        start += p.numel()
        below = stats.chi2(part.numel()).cdf(float((part / std).square().sum()))
        if not level < below < 1 - level:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("preset", ["lora_embedder", "full"])
def test_noise_has_its_standard_deviation_on_every_parameter(preset: str, diffusion: Any) -> None:
    engine = ClippedGradientSum(diffusion(preset), Clip(2, 0.02))
    fixed = plan()
    std = 1.5 * 0.02 / 25
    released = torch.stack([noised_mean(engine.total(), fixed, SEED, step) for step in range(40)])
    assert released.dtype == torch.float32
    assert wrong_parameters(engine, released, std) == []
    halved = dataclasses.replace(fixed, noise_multiplier=0.75)
    twin = torch.stack([noised_mean(engine.total(), halved, SEED, step) for step in range(40)])
    assert wrong_parameters(engine, twin, std) == list(engine.parameters)


def test_frozen_parameters_get_no_noise(diffusion: Any) -> None:
    model = diffusion()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = ClippedGradientSum(model, Clip(2, 0.02))
    engine.write_gradients(noised_mean(engine.total(), plan(), SEED, 0))
    torch.optim.SGD(list(model.parameters()), lr=1.0).step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad


def test_the_mean_is_over_the_expected_batch_size_and_noise_is_drawn_once() -> None:
    total = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    fixed = plan()
    noise = noised_mean(torch.zeros(3), fixed, SEED, 4)
    assert torch.allclose(noised_mean(total, fixed, SEED, 4) - noise, total.float() / 25, atol=1e-7)
    assert torch.equal(noise, noised_mean(torch.zeros(3), fixed, SEED, 4))
    assert not torch.equal(noise, noised_mean(torch.zeros(3), fixed, SEED, 5))
    baseline = plan(noise_multiplier=0.0, max_grad_norm=math.inf, epsilon=math.inf)
    assert torch.equal(noised_mean(total, baseline, SEED, 4), (total / 25).float())


KEY = Randomness(bytes(range(32)), secure=True)
SUM = torch.arange(2000, dtype=torch.float64)


def noise_of(total: torch.Tensor, fixed: PrivacyPlan, step: int = 0, key: Randomness = KEY) -> torch.Tensor:
    """[P] in units of its standard deviation."""
    released = noised_mean(total, fixed, key, step).double() * fixed.expected_batch_size
    return (released - total) / fixed.noise_std


# What each differs in from the release of SUM at step 0 under `plan()`.
OTHERS = {
    "one bit of one number": (SUM + torch.eye(1, 2000, dtype=torch.float64)[0] * 2**-52, plan(), 0),
    "another sum": (SUM.flip(0), plan(), 0),
    "the noise multiplier": (SUM, plan(noise_multiplier=1.6), 0),
    "the bound": (SUM, plan(max_grad_norm=0.021), 0),
    "the expected size": (SUM, plan(expected_batch_size=26), 0),
    "the step": (SUM, plan(), 1),
}


@pytest.mark.parametrize("other", OTHERS)
def test_no_two_sums_and_no_two_scales_meet_the_same_noise(other: str) -> None:
    """The correlation of 2,000 independent pairs is below 0.13 but once in 10^8; the key is fixed."""

    def correlation(key: Randomness) -> float:
        total, fixed, step = OTHERS[other]
        pair = torch.stack([noise_of(SUM, plan(), 0, key), noise_of(total, fixed, step, key)])
        return abs(float(torch.corrcoef(pair)[0, 1]))

    assert correlation(KEY) < 0.13
    # The broken twin is what a seed does, and says of itself: its streams know the step alone.
    assert (correlation(SEED) > 0.9) == (other != "the step")


def test_the_same_sum_is_released_as_it_was() -> None:
    again = Randomness(KEY.key, secure=True)
    assert torch.equal(noised_mean(SUM, plan(), KEY, 0), noised_mean(SUM.clone(), plan(), again, 0))


def test_noise_bound_to_a_sum_has_its_standard_deviation() -> None:
    """chi-square over 40 sums of 2,000 numbers, 1e-6 in all; the key is fixed."""
    noise = torch.stack([noise_of(SUM * (1 + 1e-9 * i), plan()) for i in range(40)])
    below = stats.chi2(noise.numel()).cdf(float(noise.square().sum()))
    assert FALSE_FAILURE_RATE / 2 < below < 1 - FALSE_FAILURE_RATE / 2


def test_signal_to_noise_is_an_unbiased_post_processing() -> None:
    fixed, signal = plan(), torch.full((2000,), 0.01, dtype=torch.float64)
    expected = float(signal.square().sum()) / (2000 * fixed.noise_std**2)
    found = [signal_to_noise(noised_mean(signal, fixed, SEED, step), fixed) for step in range(50)]
    # The standard error of the mean of 50 is about 0.007 here: five of them.
    assert abs(sum(found) / 50 - expected) < 0.035
    assert signal_to_noise(signal, plan(noise_multiplier=0.0)) == math.inf


def test_signal_to_noise_needs_no_square_of_the_noise() -> None:
    large = plan(max_grad_norm=1e300)
    assert math.isfinite(signal_to_noise(torch.ones(3), large))


def test_microbatches_cover_the_batch_in_one_shape() -> None:
    indices = torch.tensor([3, 5, 8, 13, 21])
    parts = list(microbatches(indices, 2))
    assert all(len(i) == len(w) == 2 and i.dtype == torch.int64 for i, w in parts)
    assert torch.equal(torch.cat([i[w > 0] for i, w in parts]), indices)
    assert parts[-1][0].tolist() == [21, 21] and parts[-1][1].tolist() == [1.0, 0.0]
    assert list(microbatches(indices[:0], 2)) == []


def test_slices_are_consecutive_and_make_up_the_batch() -> None:
    batch = poisson_batch(SEED, 0, 101, 0.3)
    for world_size in (1, 2, 3, 7, 64):
        parts = [slice_of_batch(batch, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def shared_sum(batch: torch.Tensor, world_size: int, size: int, *, apart: bool = False) -> torch.Tensor:
    """The clipped sum [P] over `world_size` slices of `batch` in microbatches of `size`, three draws each."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    images = 100 * torch.randn(50, 6)
    engine = ClippedGradientSum(model, Clip(1 if apart else 3, 0.02))
    for rank in range(world_size):
        for indices, weights in microbatches(slice_of_batch(batch, rank, world_size), size):
            losses = model(images[indices].repeat_interleave(3, 0)).square().sum(1)
            if apart:
                engine.add(losses, weights.repeat_interleave(3))
            else:
                engine.add(losses.view(-1, 3).mean(1), weights)
    return engine.total()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_one_example_moves_the_sum_of_all_processes_by_at_most_c(world_size: int, size: int) -> None:
    batch = poisson_batch(SEED, 0, 50, 0.5)
    for i in range(0, len(batch), 6):
        without = torch.cat([batch[:i], batch[i + 1 :]])
        moved = float((shared_sum(batch, world_size, size) - shared_sum(without, world_size, size)).norm())
        assert 0.99 * 0.02 < moved <= 0.02 * (1 + 1e-6)
    # The broken twin: each draw clipped by itself.
    moved = float(
        (
            shared_sum(batch, world_size, size, apart=True)
            - shared_sum(batch[:-1], world_size, size, apart=True)
        ).norm()
    )
    assert moved > 2.9 * 0.02


PROCESS = """
import datetime, sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}]
from tests.privacy import test_mechanism
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=1, world_size=2,
                        timeout=datetime.timedelta(seconds=900))
torch.save(test_mechanism.three_steps(1, 2, dist.group.WORLD), {out!r})
dist.destroy_process_group()  # gloo's threads may abort a process that ends without it
"""


def three_steps(rank: int, world_size: int, group: Any) -> torch.Tensor:
    """The weights of a small model after three noisy steps, shared between `world_size` processes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    images = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    fixed, engine = plan(), ClippedGradientSum(model, Clip(2, 0.02))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        batch = slice_of_batch(poisson_batch(SEED, step, 50, 0.5), rank, world_size)
        engine.reset()
        for indices, weights in microbatches(batch, 4):
            rows = images[indices].repeat_interleave(2, 0)
            engine.add(model(rows).square().sum(1).view(-1, 2).mean(1), weights)
        engine.write_gradients(noised_mean(all_reduced(engine.total(), group), fixed, SEED, step))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "rank1.pt"
    code = PROCESS.format(root=str(Path(__file__).parents[2]), store=str(store), out=str(out))
    other = subprocess.Popen([sys.executable, "-c", code])
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=2, timeout=datetime.timedelta(seconds=900)
    )
    try:
        both = three_steps(0, 2, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
        assert other.wait(60) == 0
    alone = three_steps(0, 1, None)
    assert float((both - alone).norm() / alone.norm()) < 1e-6
    assert torch.equal(both, torch.load(out, weights_only=True))
    # The broken twin: the slice of one process, without the other's.
    assert float((three_steps(0, 2, None) - alone).norm() / alone.norm()) > 1e-5
