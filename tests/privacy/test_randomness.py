"""Distribution, independence and exact replay of the streams.

Every statistical test passes by chance unless an event of probability below 1e-6 happens; keys are fixed,
so the outcome never changes from one run of the suite to the next.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dp_lora.privacy.randomness import Randomness

FALSE_FAILURE_RATE = 1e-6
SEED = Randomness.from_seed(11)


def draw_normal(step: int, size: int = 200_000) -> torch.Tensor:
    return SEED.normal("diffusion", step, (size // 100, 100)).flatten().double()


def draw_secure(step: int, size: int = 200_000) -> torch.Tensor:
    return SEED.secure_normal("noise", step, size)


def looks_standard_normal(draws: torch.Tensor) -> bool:
    """Kolmogorov-Smirnov on the whole and chi-square on the variance, half of the rate each."""
    values = draws.numpy()
    shape = stats.kstest(values, "norm").pvalue
    tail = stats.chi2(len(values)).cdf((values**2).sum())
    return bool(shape > FALSE_FAILURE_RATE / 2 and FALSE_FAILURE_RATE / 4 < tail < 1 - FALSE_FAILURE_RATE / 4)


def look_independent(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The correlation times sqrt(n) is standard normal for independent draws; so is that of squares."""
    limit = stats.norm.isf(FALSE_FAILURE_RATE / 4)
    pairs = ((one, other), (one.square() - 1, other.square() - 1))
    return all(abs(float(torch.corrcoef(torch.stack(p))[0, 1])) * len(one) ** 0.5 < limit for p in pairs)


@pytest.mark.parametrize("draw", [draw_normal, draw_secure])
def test_normals_are_standard_normal(draw: Callable[[int], torch.Tensor]) -> None:
    draws = draw(3)
    assert looks_standard_normal(draws)
    assert float(draws.abs().max()) > 4


@pytest.mark.parametrize("draw", [draw_normal, draw_secure])
def test_the_broken_twins_are_told_apart(draw: Callable[[int], torch.Tensor]) -> None:
    assert not looks_standard_normal(draw(3) * 0.99)
    assert not looks_standard_normal(draw(3) + 0.02)
    uniforms = torch.rand(3, 200_000, generator=torch.Generator().manual_seed(0)).double()
    assert not looks_standard_normal(2 * (uniforms.sum(0) - 1.5))
    assert not look_independent(draw(3), 0.02 * draw(3) + draw(4))


@pytest.mark.parametrize("draw", [draw_normal, draw_secure])
def test_steps_purposes_and_neighbours_are_independent(draw: Callable[[int], torch.Tensor]) -> None:
    draws = draw(0)
    assert look_independent(draws, draw(1))
    assert look_independent(draws[:-1], draws[1:])
    assert look_independent(draw_normal(0), draw_secure(0))
    other = SEED.derive("again").secure_normal("noise", 0, 200_000)
    assert look_independent(draw_secure(0), other)


def test_no_two_streams_share_a_block() -> None:
    blocks: set[bytes] = set()
    sources = [SEED, SEED.derive("attempt 1"), SEED.derive("attempt 2"), Randomness.from_seed(12)]
    for source in sources:
        for purpose in ("noise", "batch", "noise/1", "noise/"):
            for step in (0, 1, 256, 2**40):
                words = source.bits64(purpose, step, range(100), 2)
                blocks |= {row.tobytes() for row in words}
    assert len(blocks) == len(sources) * 4 * 4 * 100


# How a stream is reached from the key: labels of `derive`, then its purpose and step.
PATHS = st.tuples(st.lists(st.text(max_size=6), max_size=3), st.text(max_size=6), st.integers(0, 2**64 - 1))


@given(PATHS, PATHS)
def test_two_ways_from_the_key_lead_to_two_streams(
    one: tuple[list[str], str, int], other: tuple[list[str], str, int]
) -> None:
    def words(labels: list[str], purpose: str, step: int) -> bytes:
        source = SEED
        for label in labels:
            source = source.derive(label)
        return source.bits64(purpose, step, range(2)).tobytes()

    assert (words(*one) == words(*other)) == (one == other)


@given(st.text(max_size=6), st.text(max_size=6), st.integers(0, 12))
def test_no_name_runs_into_another_one(purpose: str, label: str, split: int) -> None:
    """Purposes, labels and digests that read alike when they are put together."""
    text = f"{purpose}{label}"
    left, right = text[:split], text[split:]
    ways = {((), text), ((text,), ""), ((left,), right), (("",), text)}
    found = {SEED.keyed_digest(text, b"")[:32]}
    for labels, last in ways:
        source = SEED
        for name in labels:
            source = source.derive(name)
        found.add(source.bits64(last, 0, range(2)).tobytes().hex())
    assert len(found) == len(ways) + 1


def test_a_seed_binds_its_streams_to_nothing_and_a_key_does() -> None:
    system = Randomness.from_system()
    assert SEED.bound_to("x") is SEED
    assert system.bound_to("x").key == system.derive("x").key != system.bound_to("y").key
    assert system.bound_to("x").secure and system.key not in (system.bound_to("x").key, b"")


def test_a_digest_needs_the_key_its_purpose_and_its_content() -> None:
    digests = {
        source.keyed_digest(purpose, content)
        for source in (SEED, Randomness.from_seed(12))
        for purpose in ("sum", "file")
        for content in (b"", b"a", b"b")
    }
    assert len(digests) == 12 and all(len(bytes.fromhex(digest)) == 32 for digest in digests)
    assert SEED.keyed_digest("sum", b"a") == Randomness.from_seed(11).keyed_digest("sum", b"a")


@pytest.mark.parametrize("width", [(1,), (7, 5), (4, 8, 8), (3, 16, 16)])
def test_a_slice_of_rows_is_the_slice_of_the_whole(width: tuple[int, ...]) -> None:
    whole = SEED.normal("diffusion", 5, (50, *width))
    for first, rows in ((0, 1), (1, 2), (13, 37), (49, 1)):
        assert torch.equal(SEED.normal("diffusion", 5, (rows, *width), first), whole[first : first + rows])
        words = SEED.bits64("x", 5, range(first, first + rows), 3)
        assert np.array_equal(words, SEED.bits64("x", 5, slice(0, 50), 3)[first : first + rows])
    assert np.array_equal(SEED.bits64("x", 5, range(4)), SEED.bits64("x", 5, range(4), 1)), "a word for a row"
    times = SEED.timesteps(5, 50, 3, 1000, True)
    assert torch.equal(SEED.timesteps(5, 7, 3, 1000, True, first_row=9), times[9:16])


def test_another_process_draws_the_same() -> None:
    code = (
        "from dp_lora.privacy.randomness import Randomness\n"
        "r = Randomness.from_seed(11)\n"
        "print(r.secure_normal('noise', 7, 1000).numpy().tobytes().hex()[-64:],"
        " r.normal('x', 7, (9, 33)).numpy().tobytes().hex()[-64:])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = (SEED.secure_normal("noise", 7, 1000), SEED.normal("x", 7, (9, 33)))
    assert there.split() == [draws.numpy().tobytes().hex()[-64:] for draws in here]


def test_timesteps_are_uniform_and_stratified() -> None:
    rows, k, total = 20_000, 4, 1000
    for stratified in (False, True):
        drawn = SEED.timesteps(0, rows, k, total, stratified)
        assert drawn.dtype == torch.int64 and int(drawn.min()) >= 0 and int(drawn.max()) < total
        counts = torch.bincount(drawn.flatten(), minlength=total).numpy()
        assert stats.chisquare(counts).pvalue > FALSE_FAILURE_RATE
        assert bool((drawn // (total // k) == torch.arange(k)).all()) == stratified
        skewed = counts + 20 * (np.arange(total) < 100) - 20 * (np.arange(total) >= total - 100)
        assert stats.chisquare(skewed).pvalue < FALSE_FAILURE_RATE
    uneven = SEED.timesteps(0, rows, 7, 10, True)
    edges = torch.arange(8) * 10 / 7
    assert bool((uneven >= edges[:-1].floor()).all() and (uneven < edges[1:].ceil()).all())
    assert stats.chisquare(torch.bincount(uneven.flatten(), minlength=10).numpy()).pvalue > FALSE_FAILURE_RATE
    assert not stratified or int(SEED.timesteps(0, 1000, 1, 10, True).max()) == 9


def test_the_key_is_hidden_and_never_pickled_or_copied() -> None:
    system = Randomness.from_system()
    assert system.secure and not SEED.secure and SEED.derive("x").secure is False
    assert system.key != Randomness.from_system().key and len(system.key) == 32
    assert system.key.hex() not in repr(system) and repr(system.key) not in repr(system)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled"):
            attempt(system)
    restored = Randomness(system.key, secure=True)
    assert torch.equal(restored.secure_normal("noise", 1, 8), system.secure_normal("noise", 1, 8))
    with pytest.raises(ValueError, match="32"):
        Randomness(b"short", secure=True)
    with pytest.raises(ValueError, match="step=-1"):
        system.bits64("noise", -1, range(1))
