"""Scouting chooses by released sums alone: what it finds, and what its guarantee rests on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from dp_lora.privacy import accounting
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.mechanism import noised_mean
from dp_lora.privacy.plan import make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.scouting import Kept, Scout, ScoutStep, best, number_of, score, scores
from dp_lora.privacy.subsampled_gaussian import Mechanism
from tests.builders.planted import BATCH, PLANTED, SIZES, Planted, data, plan, scout_of, scouted

NOISY = plan(None, noise_multiplier=1.0)


@pytest.mark.parametrize("kind", ["lora", "matrices"])
@pytest.mark.parametrize("epsilon", [1.0, 10.0])
def test_planted_matrices_are_found(epsilon: float, kind: str) -> None:
    """At a signal of 0.8, in four of four trials at epsilon 10 and in at least three at epsilon 1."""
    given = plan(epsilon)
    found = [set(best(scouted(kind, given, 0.8, seed), 0.25)) == {*PLANTED} for seed in range(4)]
    assert sum(found) >= (4 if epsilon == 10 else 3), found


def test_without_signal_the_choice_is_uniform_over_matrices_of_unequal_size() -> None:
    """Chi-square over how often each of six matrices is among the best two."""
    sizes, trials = [128, 256, 512, 512, 1024, 2048], 600
    given = dataclasses.replace(NOISY, max_grad_norm=0.5)
    key, counts = Randomness.from_seed(5), np.zeros(len(sizes))
    for trial in range(trials):
        total = noised_mean(torch.zeros(sum(sizes)), given, key, trial).double()
        by_name = dict(zip("abcdef", scores(Kept(total, 1), sizes, given), strict=True))
        counts += [name in best(by_name, 1 / 3) for name in by_name]
    expected = 2 * trials / len(sizes)
    # Two of six without replacement: the variance of a count is 2/3 of its mean, and they sum to a constant.
    statistic = ((counts - expected) ** 2).sum() / (expected * 2 / 3) * (len(sizes) - 1) / len(sizes)
    assert chi2.sf(statistic, len(sizes) - 1) > 0.01, counts


def test_energy_that_does_not_know_the_size_would_choose_the_largest() -> None:
    """The twin without the score: the noise of the largest matrix has the most energy."""
    sizes = [128, 256, 512, 512, 1024, 2048]
    total = noised_mean(torch.zeros(sum(sizes)), NOISY, Randomness.from_seed(5), 0).double()
    energies = dict(zip("abcdef", [float(part.square().sum()) for part in total.split(sizes)], strict=True))
    assert best(energies, 1 / 3) == ("e", "f")


def test_the_score_of_noise_has_mean_0_and_variance_1_for_every_number_of_steps() -> None:
    sizes = [256] * 200
    for steps in (1, 9):
        key = Randomness.from_seed(steps)
        releases = [noised_mean(torch.zeros(sum(sizes)), NOISY, key, s).double() for s in range(steps)]
        found = np.array(scores(Kept(sum(releases, torch.zeros(sum(sizes)).double()), steps), sizes, NOISY))
        assert abs(found.mean()) < 4 / math.sqrt(200) and 0.7 < found.var() < 1.4


def test_the_score_is_the_energy_above_the_noise_in_units_of_its_spread() -> None:
    assert score(300.0, 200) == pytest.approx((300 - 200) / (200 * math.sqrt(2 / 200)))
    assert score(300.0, 200, noisy=False) == pytest.approx(300 / math.sqrt(2 * 200))
    without = dataclasses.replace(NOISY, noise_multiplier=0.0)
    assert scores(Kept(torch.zeros(6).double(), 2), [2, 4], without) == [0.0, 0.0]
    few = scores(Kept(torch.tensor([3.0, 0, 0, 0]).double(), 2), [2, 2], without)
    assert few == pytest.approx([4 / 2, 0.0]), "in units of the mean's own energy a coordinate"


@pytest.mark.parametrize(("share", "of", "number"), [(1, 7, 7), (0.5, 7, 4), (0.25, 24, 6), (0.01, 24, 1)])
def test_a_share_is_the_nearest_number_and_at_least_one(share: float, of: int, number: int) -> None:
    assert number_of(share, of) == number
    assert len(best({f"m{i}": float(i) for i in range(of)}, share)) == number


# The guarantee


def a_scouting(
    folder: Path, signal: float = 0.5, steps: int = 3, kind: str = "lora", seed: int = 1
) -> tuple[Scout, list[float]]:
    model, (rows, targets) = Planted(1), data(signal, seed)
    scout, norms = scout_of(model, kind, NOISY, folder, 7), list[float]()
    for number in range(steps):
        step = scout.begin(number)
        for chosen, weights, _ in step.microbatches(BATCH):
            step.add(model.losses([x[chosen] for x in rows], [y[chosen] for y in targets]), weights)
        assert step.apply()
        norms.append(step.values["update_norm"])
    scout.detach()
    return scout, norms


def test_a_scouting_step_releases_what_a_training_step_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One noised mean of one sum in each step, of the plan's scale, and nothing but it is kept."""
    sums, released = list[Tensor](), list[Tensor]()

    def see(total: Tensor, given: Any, *rest: Any) -> Tensor:
        assert given is scouts_plan
        sums.append(total)
        released.append(noised_mean(total, given, *rest))
        return released[-1]

    scouts_plan = NOISY
    monkeypatch.setattr(algorithm, "noised_mean", see)
    scout, _ = a_scouting(tmp_path)
    assert len(sums) == 3
    assert torch.equal(scout.kept.total, sum((r.double() for r in released), torch.zeros(1).double()))
    own = torch.cat(
        [(r.double() * NOISY.expected_batch_size - s) for r, s in zip(released, sums, strict=True)]
    )
    assert float(own.std()) == pytest.approx(NOISY.noise_std, rel=0.05)


@pytest.mark.parametrize("kind", ["lora", "matrices"])
def test_one_example_moves_a_scouting_sum_by_at_most_c(kind: str, tmp_path: Path) -> None:
    model, (rows, targets) = Planted(1), data(0.5, 1)
    scout = scout_of(model, kind, NOISY, tmp_path, 7)
    for example in range(5):
        scout.gradients.reset()
        chosen = torch.tensor([example])
        scout.gradients.add(100 * model.losses([x[chosen] for x in rows], [y[chosen] for y in targets]))
        norm = float(scout.gradients.total().norm())
        assert 0.99 * NOISY.max_grad_norm < norm <= NOISY.max_grad_norm
    scout.detach()


def test_scores_see_nothing_but_what_was_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two private sets, the same releases: the same scores and the same state. A twin that looks is found."""

    def same(total: Tensor, given: Any, randomness: Any, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randn(len(total), generator=generator) / given.expected_batch_size

    monkeypatch.setattr(algorithm, "noised_mean", same)

    def both(name: str) -> tuple[Scout, Scout]:
        found = []
        for seed in (1, 2):
            (folder := tmp_path / f"{name}{seed}").mkdir()
            found.append(a_scouting(folder, seed=seed)[0])
        return found[0], found[1]

    one, other = both("engine")
    assert one.scores() == other.scores() and torch.equal(one.kept.total, other.kept.total)

    def looks(own: ScoutStep, update: Tensor) -> None:
        kept = own.sgd.kept
        own.sgd.kept = Kept(kept.total + looked_at[-1] / own.sgd.plan.expected_batch_size, kept.steps + 1)

    looked_at, reduced = list[Tensor](), algorithm.all_reduced
    monkeypatch.setattr(
        algorithm, "all_reduced", lambda *given: looked_at.append(reduced(*given)) or looked_at[-1]
    )
    monkeypatch.setattr(ScoutStep, "_descend", looks)
    one, other = both("twin")
    assert one.scores() != other.scores()


def test_scouting_moves_no_weight_and_no_state_of_the_optimiser(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = {name: value.clone() for name, value in Planted(1).state_dict().items()}
    scout, norms = a_scouting(tmp_path)
    after = scout.module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert scout.optimizer.state_dict()["state"] == {} and len(norms) == 3
    assert all(torch.equal(a, p) for a, p in zip(scout.average.values, scout.parameters, strict=True))


def test_a_scouting_that_is_restored_scores_the_same(tmp_path: Path) -> None:
    scout, _ = a_scouting(tmp_path)
    (tmp_path / "other").mkdir()
    again = scout_of(Planted(1), "lora", NOISY, tmp_path / "other", 7)
    again.load_state_dict(scout.state_dict())
    again.detach()
    assert again.scores() == scout.scores() and again.kept.steps == 3


def test_epsilon_counts_scouting_and_training_steps_together() -> None:
    """S + T steps at q and sigma, whatever S is; a plan for T alone states too little."""
    whole = make_plan(
        num_examples=4000,
        expected_batch_size=400,
        steps=20,
        noise_multiplier=1.0,
        delta=1e-5,
        max_grad_norm=1.0,
    )
    alone = dataclasses.replace(whole, steps=12)
    apart = [Mechanism(1.0, 0.1, 8), Mechanism(1.0, 0.1, 12)]
    together = accounting.smallest(accounting.epsilon_by_accountant(apart, 1e-5)).epsilon
    assert whole.curve()(20) == pytest.approx(together, rel=0.01)
    assert alone.curve()(12) < 0.9 * whole.epsilon


def test_the_sizes_here_are_unequal() -> None:
    assert len({a * b for a, b in SIZES}) > 2
