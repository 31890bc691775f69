"""The write-ahead record: what is replayed, what is a new execution, and that a crash anywhere loses neither.

A toy training stands for the real one: the batch is the one of an execution's name and state, the sum is a
function of the batch and of the machine, and the noise belongs to both. What it has released is kept outside
of the process that dies, as by an observer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_lora.privacy import executions
from dp_lora.privacy.executions import ORIGIN, Execution, Executions, Spent
from dp_lora.storage.files import append_line, read_lines


def test_executions_tell_a_replay_from_a_new_release(tmp_path: Path) -> None:
    path = tmp_path / "executions.jsonl"
    record = Executions(path, {"device": "a"})
    lineages = [ORIGIN]
    for step in range(3):
        execution = record.begin(step, lineages[-1])
        assert execution.generation == execution.attempt == 0
        lineages.append(kept(record, execution, f"sum {step}"))
    assert record.count == 3
    again = Executions(path, {"device": "a"})
    assert again.replayable(0, ORIGIN) == 3 and again.count == 3
    for step in range(3):
        replay = again.begin(step, lineages[step])
        assert replay.generation == 0 and kept(again, replay, f"sum {step}") == lineages[step + 1]
    assert again.count == 3
    other = Executions(path, {"device": "b"})
    elsewhere = other.begin(0, ORIGIN)
    assert other.replayable(1, ORIGIN) == 0 and elsewhere.generation == 1 and other.count == 4
    # Back on the first device, from a state that came another way: a third execution of step 1 differs.
    back = Executions(path, {"device": "a"})
    assert back.begin(1, kept(other, elsewhere, "sum")).generation == 1 and back.count == 5
    before = path.read_bytes()
    follower = Executions(path, {"device": "c"}, writes=False)
    assert follower.begin(0, ORIGIN).generation == 2 and path.read_bytes() == before


def test_an_execution_has_one_name_in_whatever_order_its_numerics_are_given(tmp_path: Path) -> None:
    orders = (
        {"device": "cpu", "threads": 1},
        {"threads": 1, "device": "cpu"},
        {"device": "cpu", "threads": 2},
    )
    names = [
        Executions(tmp_path / f"{i}.jsonl", order).begin(0, ORIGIN).name for i, order in enumerate(orders)
    ]
    assert names[0] == names[1] != names[2]


def test_another_sum_of_the_same_step_is_a_new_execution_with_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "executions.jsonl"
    first = Executions(path, {}).begin(0, ORIGIN)
    after = kept(Executions(path, {}), first, "a")
    record = Executions(path, {})
    assert record.begin(0, ORIGIN) == first and record.keep_sum(first, "b") is None and record.count == 1
    second = record.begin_anew(first)
    assert second.name != first.name and second.generation == second.attempt == 1 and record.count == 2
    assert kept(record, second, "c") not in (after, ORIGIN)
    # Whichever of the two a later start computes, it goes on from there and costs nothing.
    for digest, attempt in (("a", 0), ("b", 1)):
        record = Executions(path, {})
        execution = record.begin(0, ORIGIN)
        if record.keep_sum(execution, digest) is None:
            execution = record.begin_anew(execution)
            assert record.keep_sum(execution, "c") is not None
        assert execution.attempt == attempt and record.count == 2
    third = Executions(path, {})
    assert third.keep_sum(third.begin_anew(third.begin(0, ORIGIN)), "d") is None and third.count == 2
    assert third.begin_anew(second).attempt == 2 and third.count == 3


def test_a_step_that_was_begun_and_has_no_sum_may_have_any(tmp_path: Path) -> None:
    """The process died before the sum was known, so nothing was released."""
    path = tmp_path / "executions.jsonl"
    begun = Executions(path, {}).begin(0, ORIGIN)
    record = Executions(path, {})
    assert record.replayable(0, ORIGIN) == 1 and record.begin(0, ORIGIN) == begun
    assert record.keep_sum(begun, "a") is not None and record.count == 1
    assert Executions(path, {}).keep_sum(begun, "b") is None


def test_no_execution_is_begun_beyond_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "executions.jsonl"
    record = Executions(path, {}, most=2)
    first = record.begin(0, ORIGIN)
    second = record.begin(1, kept(record, first, "a"))
    assert record.keep_sum(second, "b") is not None
    before = path.read_bytes()
    for attempt in (
        lambda: record.begin(2, "anything"),
        lambda: record.begin_anew(first),
        lambda: Executions(path, {"device": "b"}, most=2).begin(0, ORIGIN),
        lambda: Executions(path, {"device": "b"}, most=2).begin_again(first, microbatch=1),
    ):
        with pytest.raises(Spent, match="2 executions of 2"):
            attempt()
    assert path.read_bytes() == before
    # A replay costs nothing; nor does what takes the place of an execution that is given up.
    assert Executions(path, {}, most=2).begin(0, ORIGIN) == first
    short = Executions(tmp_path / "short.jsonl", {}, most=1)
    given_up = short.begin(0, ORIGIN)
    assert short.begin_again(given_up, microbatch=1).name != given_up.name and short.count == 1


def test_a_step_given_up_before_it_released_anything_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "executions.jsonl"
    record = Executions(path, {"microbatch": 8})
    whole = kept(record, record.begin(0, ORIGIN), "a")
    given_up = record.begin(1, whole)
    again = record.begin_again(given_up, microbatch=4)
    assert again.generation == given_up.generation == 0 and again.name != given_up.name and record.count == 2
    kept(record, again, "b")
    # Read back, with the first microbatch: not the step that was released, so fresh noise, and counted.
    fresh = Executions(path, {"microbatch": 8})
    assert fresh.count == 2
    larger = fresh.begin(1, whole)
    assert larger.generation == 1 and fresh.count == 3
    # Given up once more: what remains is the replay of the step that was released.
    assert fresh.begin_again(larger, microbatch=4) == again and fresh.count == 2
    # The broken twin of it: the replay of a released step, given up, stays on the count.
    replay = Executions(path, {"microbatch": 4})
    assert replay.begin(1, whole) == again
    assert replay.begin_again(again, microbatch=2).generation == 1 and replay.count == 3
    assert Executions(path, {}).count == 3


def test_a_record_of_an_earlier_version_is_counted_and_never_replayed(tmp_path: Path) -> None:
    """Its steps may have been released although no sum is on record."""
    path = tmp_path / "executions.jsonl"
    for step in range(2):
        append_line(path, {"step": step, "execution": f"{step:016x}"})
    record = Executions(path, {})
    assert record.count == 2 and record.replayable(0, ORIGIN) == 0
    assert record.begin(0, ORIGIN).generation == 1 and record.count == 3


def kept(record: Executions, execution: Execution, digest: str) -> str:
    lineage = record.keep_sum(execution, digest)
    assert lineage is not None
    return lineage


def test_a_state_came_of_steps_that_are_all_on_record(tmp_path: Path) -> None:
    path = tmp_path / "executions.jsonl"
    record, lineages = Executions(path, {}), [ORIGIN]
    for step in range(3):
        lineages.append(kept(record, record.begin(step, lineages[-1]), f"sum {step}"))
    assert all(record.lead_to(step, lineage) for step, lineage in enumerate(lineages))
    assert not record.lead_to(2, lineages[3]) and not record.lead_to(0, lineages[1])
    rows = list(read_lines(path))
    for lost in range(3):
        path.unlink()
        for row in rows:
            if row["step"] != lost:
                append_line(path, row)
        assert not Executions(path, {}).lead_to(3, lineages[3]), f"step {lost} was begun and is not counted"


def test_a_record_is_on_disk_and_so_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(executions, "_sync", synced.append)
    path = tmp_path / "executions.jsonl"
    record = Executions(path, {})
    kept(record, record.begin(0, ORIGIN), "sum")
    assert synced == [path, tmp_path, path]


def test_a_record_leaves_no_file_open(tmp_path: Path) -> None:
    """A training of a thousand steps would find no descriptor left."""
    record, lineage = Executions(tmp_path / "executions.jsonl", {}), ORIGIN
    before = len(os.listdir("/proc/self/fd"))
    for step in range(5):
        lineage = kept(record, record.begin(step, lineage), "sum")
    assert len(os.listdir("/proc/self/fd")) <= before


# A toy training that dies and goes on


class Crash(BaseException):
    """The process dies here."""


class Release(NamedTuple):
    """What an observer sees of a step, and what a reader of this test knows about it."""

    batch: str
    sum: str
    noise: str


class Start(NamedTuple):
    """One start of the run."""

    machine: str
    """What changes the sums and is not known: the code, say."""
    numerics: str
    """What changes the sums and is known."""
    dies: int
    """At which of its writes, or after them."""
    late: bool
    """Whether that write is done."""
    saves: bool
    """Whether it writes checkpoints."""


class Toy:
    """A run of `STEPS` steps on one record, and all that it ever released."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoint = path, (0, ORIGIN, "state")
        self.released: list[Release] = []
        self.counts = [0]

    def start(self, start: Start, keep_sum: Callable[..., str | None] = Executions.keep_sum) -> bool:
        """Whether it ended; else it died."""
        with dying(start):
            try:
                self._run(start, keep_sum)
            except Crash:
                return False
            finally:
                self.counts.append(Executions(self.path, {}).count)
        return True

    def _run(self, start: Start, keep_sum: Callable[..., str | None]) -> None:
        record = Executions(self.path, {"numerics": start.numerics}, STEPS)
        step, lineage, state = self.checkpoint
        total = step + record.replayable(step, lineage) + STEPS - record.count
        while step < total:
            try:
                execution = record.begin(step, lineage)
                while True:
                    batch = f"{execution.name} from {state}"
                    # Every third batch is empty: its sum is the same everywhere.
                    empty = int(short(batch), 16) % 3 == 0
                    content = "0" if empty else f"{batch} on {start.machine}, {start.numerics}"
                    noise = f"{batch}: {content}"
                    after = keep_sum(record, execution, noise)
                    if after is not None:
                        break
                    execution = record.begin_anew(execution)
            except Spent:
                return
            self.released.append(Release(batch, content, noise))
            # The optimiser may be changed too.
            step, lineage, state = step + 1, after, short(f"{state}+{noise} on {start.machine}")
            if start.saves:
                self.checkpoint = step, lineage, state


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


STEPS = 4


@contextmanager
def dying(start: Start) -> Iterator[None]:
    """The write number `start.dies` kills the process, before or after it."""
    writes = 0

    def write(path: Path, row: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == start.dies and not start.late:
            raise Crash
        append_line(path, row)
        if writes == start.dies:
            raise Crash

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(executions, "append_line", write)
        patched.setattr(executions, "_sync", lambda path: None)
        yield


def check(toy: Toy) -> None:
    """No noise for two sums, no batch for two releases, and every release on the count."""
    distinct = set(toy.released)
    assert len({release.noise for release in distinct}) == len(distinct), "noise was used twice"
    assert len({release.batch for release in distinct}) == len(distinct), "two releases share a batch"
    assert toy.counts == sorted(toy.counts), "an execution fell off the count"
    assert len(distinct) <= toy.counts[-1] <= STEPS, "a release is not counted"


STARTS = st.lists(
    st.builds(
        Start,
        machine=st.sampled_from("ab"),
        numerics=st.sampled_from("xy"),
        dies=st.integers(1, 2 * STEPS + 1),
        late=st.booleans(),
        saves=st.booleans(),
    ),
    max_size=6,
)


@given(STARTS)
@settings(max_examples=100)
def test_whatever_dies_and_changes_no_noise_and_no_batch_is_used_twice(
    tmp_path_factory: pytest.TempPathFactory, starts: list[Start]
) -> None:
    toy = Toy(tmp_path_factory.mktemp("toy") / "executions.jsonl")
    for start in starts:
        toy.start(start)
        check(toy)
    toy.start(Start("a", "x", 0, False, True))
    check(toy)


def test_a_record_that_forgets_the_sums_is_told_apart(tmp_path: Path) -> None:
    """The broken twin: whatever was begun is replayed, as if the sum had to be the same."""

    def careless(record: Executions, execution: Execution, digest: str) -> str:
        return Executions.keep_sum(record, execution, digest) or "state after the step"

    toy = Toy(tmp_path / "executions.jsonl")
    toy.start(Start("a", "x", 6, True, False), careless)
    toy.start(Start("b", "x", 0, False, True), careless)
    with pytest.raises(AssertionError, match="share a batch"):
        check(toy)


def test_a_record_of_sums_without_their_noise_is_told_apart(tmp_path: Path) -> None:
    """The broken twin: two empty batches have one sum, but not one noise when their states differ."""

    def careless(record: Executions, execution: Execution, digest: str) -> str | None:
        return Executions.keep_sum(record, execution, digest.split(": ")[1])

    def goes_wrong(number: int) -> bool:
        toy = Toy(tmp_path / f"{number}.jsonl")
        for machine in "ab":
            toy.start(Start(machine, f"x{number}", 0, False, False), careless)
        return len(set(toy.released)) > toy.counts[-1]

    # Steps 0 and 1 have to be empty batches from either state, which one record in 27 has.
    assert any(goes_wrong(number) for number in range(200))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dies", range(1, 2 * STEPS + 1))
def test_a_run_that_dies_at_any_write_and_is_not_changed_ends_like_one_that_did_not(
    dies: int, late: bool, tmp_path: Path
) -> None:
    whole, broken = Toy(tmp_path / "whole.jsonl"), Toy(tmp_path / "broken.jsonl")
    assert whole.start(Start("a", "x", 0, False, True))
    for saves in (False, True):
        assert not broken.start(Start("a", "x", dies, late, saves)) or saves
    assert broken.start(Start("a", "x", 0, False, True))
    assert set(broken.released) == set(whole.released)
    assert broken.counts[-1] == whole.counts[-1] == STEPS == len(whole.released)


def test_a_torn_line_is_a_line_that_was_not_written(tmp_path: Path) -> None:
    path = tmp_path / "executions.jsonl"
    record = Executions(path, {})
    kept(record, record.begin(0, ORIGIN), "a")
    whole = path.read_bytes()
    for size in range(whole.index(b"\n") + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        torn = Executions(path, {})
        assert torn.count == 1
        kept(torn, torn.begin(0, ORIGIN), "b")
        assert [row.get("sum") for row in read_lines(path)] == [None, "b"]


def test_a_line_that_lacks_its_end_alone_was_written(tmp_path: Path) -> None:
    """Its sum may have been released, so another one has to be thrown away."""
    path = tmp_path / "executions.jsonl"
    record = Executions(path, {})
    kept(record, record.begin(0, ORIGIN), "a")
    path.write_bytes(path.read_bytes()[:-1])
    torn = Executions(path, {})
    assert torn.count == 1 and torn.keep_sum(torn.begin(0, ORIGIN), "b") is None
    assert torn.keep_sum(torn.begin(0, ORIGIN), "a") is not None
    assert [row.get("sum") for row in read_lines(path)] == [None, "a"]
