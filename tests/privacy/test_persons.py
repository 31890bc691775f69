"""Persons as examples: the index of their records, what a step draws of them, and what one adds to a sum."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from dp_lora.errors import PlanError, UserError
from dp_lora.privacy.batches import poisson_batch
from dp_lora.privacy.persons import Persons
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.step import Draws
from tests.builders.persons import COUNTS, C, sums, sums_of_two_processes

KS = (1, 4, 12)


def _draws(seed: int, first: int, rows: int) -> Draws:
    return Draws(Randomness.from_seed(seed), 0, first, rows)


def test_each_person_has_their_records_in_their_order() -> None:
    owners = ["b", "a", "b", "c", "a", "b"]
    persons = Persons(owners)
    assert len(persons) == 3 and "b" not in repr(persons)
    assert [persons.records(i).tolist() for i in range(3)] == [[0, 2, 5], [1, 4], [3]]
    assert torch.equal(Persons(np.array(owners, dtype=object)).order, persons.order)
    values = torch.arange(6.0)
    assert persons.means(values).tolist() == pytest.approx([7 / 3, 2.5, 3.0])
    assert persons.means(torch.stack([values, -values], 1)).shape == (3, 2)


@pytest.mark.parametrize("kind", [torch.tensor, np.int64, int, str, lambda number: f" {number}\t"])
def test_a_name_is_one_person_whatever_kind_of_value_it_is(kind: Callable[[int], Any]) -> None:
    """As a dataset hands them over, one by one: tensors are equal to themselves alone."""
    owners = [kind(record % 3) for record in range(9)]
    for given in (owners, iter(owners)):
        assert Persons(given).offsets.tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize("wrong", [None, math.nan, np.float64(2), True, "  ", (1, 2), torch.ones(2)])
def test_what_is_no_name_is_one_line(wrong: Any) -> None:
    with pytest.raises(
        UserError, match=r"^owners: record 1 has .*; expected a person's name or whole number"
    ):
        Persons(["a", wrong])


def test_the_index_of_a_million_records_is_small_and_made_in_no_time() -> None:
    """1,000,000 images of 50,000 persons, under 5 s and 200 MB; one person has a fifth of all."""
    drawn = np.random.default_rng(0).integers(0, 50_000, 1_000_000)
    drawn[:200_000] = 7
    owners = np.array([f"patient {i}" for i in range(50_000)], dtype=object)[drawn]
    started = time.process_time()
    persons = Persons(owners)
    assert time.process_time() - started < 5
    tracemalloc.start()
    Persons(owners)
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.reset_peak()
    # The draws of a batch do not grow with anybody's number of records.
    persons.draw(torch.arange(64), _draws(0, 0, 64), 12)
    assert tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0] < 1e5
    tracemalloc.stop()
    assert sorted(persons.order.tolist()) == list(range(1_000_000))


def test_draws_are_the_same_whatever_the_microbatch() -> None:
    persons, k = Persons(np.random.default_rng(1).integers(0, 9, 200)), 5
    batch = torch.tensor([0, 1, 3, 4, 5, 8])
    whole = persons.draw(batch, _draws(2, 0, 6), k)
    parts = [persons.draw(batch[i : i + 2], _draws(2, i, 2), k) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    for person, row in zip(batch.tolist(), whole, strict=True):
        assert set(row.tolist()) <= set(persons.records(person).tolist())
    assert not torch.equal(persons.draw(batch, _draws(3, 0, 6), k), whole)
    with pytest.raises(ValueError, match="purpose='choices'"):
        _draws(2, 0, 6).normal("choices", 1)


def _uniform(counts: np.ndarray) -> float:
    """The p-value of a chi-square test that all cells are as likely."""
    return float(chisquare(counts).pvalue)


@pytest.mark.parametrize("records", [1, 3, 500])
def test_draws_are_uniform_over_a_persons_records(records: int) -> None:
    """By chi-square over 200,000 draws, which fails for one key in a million."""
    owners = np.concatenate([np.zeros(records, np.int64), np.ones(7, np.int64)])
    persons = Persons(owners)
    drawn = persons.draw(torch.zeros(20_000, dtype=torch.int64), _draws(4, 0, 20_000), 10)
    counts = np.bincount(drawn.flatten().numpy(), minlength=records + 7)
    assert counts[records:].sum() == 0 and counts.sum() == 200_000
    if records > 1:
        assert _uniform(counts[:records]) > 1e-6
        # The broken twin: the first record twice as often as the others.
        biased = np.where(drawn.flatten().numpy() == records - 1, 0, drawn.flatten().numpy())
        assert _uniform(np.bincount(biased, minlength=records)) < 1e-12


def test_persons_join_batches_with_the_sample_rate_however_many_records_they_have() -> None:
    """Of 4,000 steps each person is in q = 0.2 of them: 5 deviations fail for one in a million persons."""
    persons, steps, rate = (
        Persons(torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))),
        4000,
        0.2,
    )
    key, joined = Randomness.from_seed(6), torch.zeros(len(COUNTS))
    for step in range(steps):
        joined[poisson_batch(key, step, len(persons), rate)] += 1
    bound = 5 * (rate * (1 - rate) * steps) ** 0.5
    assert float((joined - rate * steps).abs().max()) < bound
    # The broken twin draws records: whoever has 500 of them is in nearly every batch.
    owner, twin = (
        torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS)),
        torch.zeros(len(COUNTS)),
    )
    for step in range(100):
        twin[owner[poisson_batch(key, step, len(owner), rate)].unique()] += 1
    assert float(twin[2]) == 100


@pytest.mark.parametrize("k", KS)
def test_a_person_who_contributes_nothing_moves_the_sum_by_c_at_most(k: int) -> None:
    """Persons with 1, 3 and 500 records and four others, in float64: their gradients are far above C."""
    whole = sums(k)
    moved = [float((whole - sums(k, zeroed)).norm()) for zeroed in range(len(COUNTS))]
    assert max(moved) <= C * (1 + 1e-12) and min(moved) >= C * (1 - 1e-4)
    # In float32 one contribution rounds to C at most.
    one = sums(k, dtype=torch.float32) - sums(k, 2, dtype=torch.float32)
    assert float(one.norm()) <= C
    assert torch.allclose(sums(k, microbatch=7), whole, rtol=1e-12, atol=1e-18)


def test_records_sampled_one_by_one_move_it_by_more() -> None:
    """The broken twin of the test above."""
    whole = sums(1, apart=True)
    moved = [float((whole - sums(1, zeroed, apart=True)).norm()) for zeroed in (0, 1, 2)]
    assert moved[0] <= C * (1 + 1e-12)
    assert moved[1] > 1.2 * C and moved[2] > 20 * C


def test_two_processes_share_the_persons_of_a_batch(tmp_path: Path) -> None:
    shared = sums_of_two_processes(KS, tmp_path / "sums.pt")
    for k, found in zip(KS, shared, strict=True):
        assert torch.allclose(found[0], sums(k), rtol=1e-12, atol=1e-18)
        moved = (found[0] - found[1:]).norm(dim=1)
        assert float(moved.max()) <= C * (1 + 1e-12) and float(moved.min()) >= C * (1 - 1e-4)


def _plan(persons: int, unit: str = "person", **changes: float) -> PrivacyPlan:
    given = {"expected_batch_size": 10, "delta": 1e-3} | changes
    return make_plan(
        num_examples=persons, steps=20, noise_multiplier=1.0, max_grad_norm=1.0, unit=unit, **given
    )  # type: ignore[arg-type]


def test_epsilon_is_that_of_so_many_persons() -> None:
    person, image = _plan(200), _plan(200, "image")
    assert person.epsilon == image.epsilon and person.sample_rate == 0.05
    assert person.adjacency == "zero out one person, the number of persons is public, Poisson sampling"
    assert person.to_dict()["unit"] == "person" and image.to_dict()["unit"] == "image"


@pytest.mark.parametrize(
    ("persons", "changes", "line"),
    [
        (1, {"expected_batch_size": 1}, "there is one person, whom no other one hides; expected at least 2"),
        (200, {"delta": 0.005}, r"expected a number in \(0, 1/N\) = \(0, 0.005\), or one person in N may"),
        (
            200,
            {"expected_batch_size": 201},
            r"expected a number in \(0, 200\], the number of training persons",
        ),
    ],
)
def test_what_persons_do_not_allow_is_one_line(persons: int, changes: dict[str, float], line: str) -> None:
    with pytest.raises(PlanError, match=line):
        _plan(persons, **changes)
