"""The ledger against a model: runs that start, are killed at any write, are copied, brought back and ended.

The model counts executions: a step of a run counts from the moment at which something of it may be released.
Whatever happens in whatever order, at least as many are charged; and where nobody made a copy, no more than
each run's plan.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from dp_lora.config.schema import Config, DataConfig, PathsConfig
from dp_lora.errors import UserError
from dp_lora.jobs import image_index, spending
from dp_lora.jobs.image_index import ImageIndex
from dp_lora.jobs.spending import charged
from dp_lora.privacy import ledger as ledgers
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.marks import Mark
from dp_lora.privacy.plan import make_plan
from dp_lora.storage.files import append_line, read_lines
from dp_lora.training.receipts import read_receipt
from tests.builders.image_sets import private_images

STEPS = 4
PLAN = make_plan(
    num_examples=1000, expected_batch_size=100, steps=STEPS, noise_multiplier=1.0, target_epsilon=None,
    delta=1e-5, noise_multiplicity=1, max_grad_norm=0.1,
)  # fmt: skip
IMAGES = private_images(3, 8)


class Killed(BaseException):
    """The process is gone: nothing that it would still do happens."""


class Faults:
    """Kills the process in the place of its n-th write from now on, or right after it."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.dead = False
        self.written = 0

    def around(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            self._point()
            found = write(*args, **named)
            self.written += 1
            self._point()
            return found

        return wrapped

    def _point(self) -> None:
        if self.left is not None:
            self.left -= 1
            self.dead = self.dead or self.left < 0
        if self.dead:
            raise Killed


class World:
    """Run directories on one private set, with the executions that were released."""

    def __init__(self, root: Path) -> None:
        places = {name: str(root / name) for name in ("outputs", "data", "index", "cache")}
        self.root, self.config = root, Config(data=DataConfig("mnist5k"), paths=PathsConfig(**places))
        self.projects: dict[str, str] = {}
        """Of runs that were copied with their ledger: the folder that it lies in."""
        self.faults, self.patch = Faults(), pytest.MonkeyPatch()
        for owner, name in (
            (spending, "write_json"), (ledgers, "append_line"), (image_index, "append_line"),
            (image_index, "write_atomic"), (Mark, "_write"), (Mark, "end"),
            (ledgers, "write_atomic"),
        ):  # fmt: skip
            self.patch.setattr(owner, name, self.faults.around(getattr(owner, name)))
        self.open: dict[str, tuple[AbstractContextManager[Any], Callable[[], None]]] = {}
        self.released: dict[str, set[str]] = {}
        """The executions of each run, by its number."""
        self.copied, self.refused, self.numbers = False, 0, itertools.count()

    def close(self) -> None:
        for name in list(self.open):
            self.kill(name)
        self.patch.undo()
        shutil.rmtree(self.root)

    def folder(self, name: str) -> Path:
        return self.root / name / "checkpoint"

    def config_of(self, name: str) -> Config:
        data = str(self.root / self.projects.get(name, "data"))
        return replace(self.config, paths=replace(self.config.paths, data=data))

    def make(self) -> str:
        name = f"run{next(self.numbers)}"
        self.folder(name).mkdir(parents=True)
        return name

    def start(self, name: str, dies_at: int | None = None) -> None:
        if name in self.open:
            return
        context = charged(self.config_of(name), PLAN, self.folder(name), IMAGES)
        self.faults.left = dies_at
        try:
            note = context.__enter__()
            self.open[name] = (context, note)
        except Killed:
            pass
        except UserError:
            assert self.copied, "a run of which there is no copy goes on"
            self.refused += 1
        self._revive()

    def step(self, name: str, dies_at: int | None = None) -> None:
        record = self.folder(name) / "executions.jsonl"
        if name not in self.open or len(read_lines(record)) >= STEPS:
            return
        execution = f"x{next(self.numbers)}"
        append_line(record, {"step": len(read_lines(record)), "execution": execution})
        self.faults.left = dies_at
        try:
            self.open[name][1]()
            receipt = read_receipt(self.folder(name))
            assert receipt is not None
            self.released.setdefault(receipt.run, set()).add(execution)
        except Killed:
            self._leave(name, Killed())
        except UserError as error:
            assert self.copied
            self._leave(name, error)
        self._revive()

    def kill(self, name: str) -> None:
        if name in self.open:
            self.faults.dead = True
            self._leave(name, Killed())
            self._revive()

    def end(self, name: str, error: Exception | None = None, dies_at: int | None = None) -> None:
        if name in self.open:
            self.faults.left = dies_at
            self._leave(name, error)
            self._revive()

    def _leave(self, name: str, error: BaseException | None) -> None:
        context, _ = self.open.pop(name)
        with contextlib.suppress(Killed, UserError, RuntimeError):
            context.__exit__(None if error is None else type(error), error, None)

    def _revive(self) -> None:
        self.faults.left, self.faults.dead = None, False

    def copy(self, name: str) -> str:
        self.copied, other = True, f"run{next(self.numbers)}"
        shutil.copytree(self.root / name, self.root / other)
        self.projects[other] = self.projects.get(name, "data")
        return other

    def copy_with_ledger(self, name: str) -> str:
        """A project is copied as a whole: the run, the ledger beside its data, and the marks."""
        other = self.copy(name)
        self.projects[other] = f"data_{other}"
        data = self.root / self.projects.get(name, "data")
        if data.exists():
            shutil.copytree(data, self.root / self.projects[other])
        return other

    def bring_back(self, name: str, backup: str) -> None:
        """The state of the directory `backup` in the place of that of `name`, file by file."""
        if name not in self.open:
            self.copied = True
            for path in self.folder(name).iterdir():
                path.unlink()
            shutil.copytree(self.folder(backup), self.folder(name), dirs_exist_ok=True)

    def begin_anew(self, name: str) -> None:
        """The way out that the refusal names."""
        if name not in self.open:
            shutil.rmtree(self.folder(name))
            self.folder(name).mkdir()

    def charged(self) -> dict[str, int]:
        """By the ledgers of all projects: for each run the most that one of them says."""
        found: dict[str, int] = {}
        for data in {"data", *self.projects.values()}:
            for charge in Ledger(self.root / data / spending.NAME).charges():
                found[charge.run] = max(charge.mechanism.steps, found.get(charge.run, 0))
        return found

    def indexed(self) -> dict[str, int]:
        assert self.config.paths.index is not None
        return {c.run: c.mechanism.steps for c in ImageIndex(Path(self.config.paths.index)).charges()}

    def check(self) -> None:
        for charges in (self.charged(), self.indexed()):
            for run, executions in self.released.items():
                assert charges[run] >= len(executions), "executions that nobody paid for"


class Interleavings(RuleBasedStateMachine):
    """All that can happen to a few run directories, in any order."""

    which = st.integers(0, 3)
    when = st.one_of(st.none(), st.none(), st.integers(0, 12))

    def __init__(self) -> None:
        super().__init__()
        self.world = World(Path(tempfile.mkdtemp(prefix="dp_lora_model")))
        self.names, self.anew = [self.world.make()], False

    def teardown(self) -> None:
        self.world.close()

    def name(self, which: int) -> str:
        return self.names[which % len(self.names)]

    @rule(which=which, steps=st.integers(0, STEPS), start=when, step=when)
    def go_on(self, which: int, steps: int, start: int | None, step: int | None) -> None:
        self.world.start(self.name(which), start)
        for number in range(steps):
            self.world.step(self.name(which), step if number == 1 else None)

    @rule(which=which)
    def kill(self, which: int) -> None:
        self.world.kill(self.name(which))

    @rule(which=which, dies_at=when, fails=st.booleans())
    def end(self, which: int, dies_at: int | None, *, fails: bool) -> None:
        self.world.end(self.name(which), ValueError() if fails else None, dies_at)

    @rule()
    def make(self) -> None:
        if len(self.names) < 4:
            self.names.append(self.world.make())

    @rule(which=which, with_ledger=st.booleans())
    def copy(self, which: int, *, with_ledger: bool) -> None:
        if len(self.names) < 4:
            copy = self.world.copy_with_ledger if with_ledger else self.world.copy
            self.names.append(copy(self.name(which)))

    @rule(which=which, other=which)
    def bring_back(self, which: int, other: int) -> None:
        if self.name(which) != self.name(other):
            self.world.bring_back(self.name(which), self.name(other))

    @rule(which=which)
    def begin_anew(self, which: int) -> None:
        self.anew = True
        self.world.begin_anew(self.name(which))

    @invariant()
    def what_was_released_was_charged(self) -> None:
        self.world.check()

    @invariant()
    def without_copies_nothing_is_charged_twice(self) -> None:
        charges = self.world.charged()
        assert all(steps <= STEPS for steps in charges.values())
        if not self.world.copied and not self.anew:
            assert len(charges) <= len(self.names)


EXAMPLES = settings(max_examples=40, stateful_step_count=24, derandomize=True, database=None)


def test_whatever_happens_in_whatever_order_is_charged() -> None:
    run_state_machine_as_test(Interleavings, settings=EXAMPLES)


def test_the_model_finds_a_ledger_that_knows_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    know_no_copies(monkeypatch)
    more = settings(EXAMPLES, phases=[Phase.generate], max_examples=200)
    with pytest.raises(AssertionError, match="nobody paid"):
        run_state_machine_as_test(Interleavings, settings=more)


def know_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger, the marks and the record as they were before they knew copies."""
    monkeypatch.setattr(Ledger, "_check", lambda self, turn, entries: None)
    monkeypatch.setattr(spending, "check_record", lambda *args: None)
    for name in ("note", "begin", "check"):
        monkeypatch.setattr(Mark, name, lambda self, *args, **named: None)


def index_knows_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index as it was before it knew copies: the ledger beside the data has the only word."""
    enter = ImageIndex.enter
    monkeypatch.setattr(ImageIndex, "check", lambda self, turn: None)
    monkeypatch.setattr(ImageIndex, "settled", lambda self, owner: ledgers.Settled())
    monkeypatch.setattr(ImageIndex, "enter", lambda self, *args: enter(self, *args[:4]))
    monkeypatch.setattr(
        spending.Books, "note", lambda self, turn, size: self.ledger.mark(turn.owner).note(turn.nonce, size)
    )


# The same in a few words, with the twins that have to fail


@pytest.fixture
def world(tmp_path: Path) -> Any:
    made = World(tmp_path / "world")
    yield made
    made.close()


def steps(world: World, name: str, number: int) -> None:
    for _ in range(number):
        world.step(name)


def copied_after_a_kill(world: World) -> None:
    first = world.make()
    world.start(first)
    steps(world, first, 2)
    world.kill(first)
    second = world.copy(first)
    for name in (first, second):
        world.start(name)
        steps(world, name, 2)
        world.end(name)


def copied_while_it_runs(world: World) -> None:
    first = world.make()
    world.start(first)
    steps(world, first, 1)
    second = world.copy(first)
    steps(world, first, 2)
    world.kill(first)
    world.start(second)
    steps(world, second, 3)
    world.kill(second)


def both_at_once(world: World) -> None:
    first = world.make()
    world.start(first)
    steps(world, first, 1)
    second = world.copy(first)
    world.start(second)
    for _ in range(3):
        world.step(first)
        world.step(second)
    world.end(first)
    world.end(second)


def an_older_state_is_brought_back(world: World) -> None:
    first = world.make()
    world.start(first)
    steps(world, first, 1)
    backup = world.copy(first)
    steps(world, first, 3)
    world.kill(first)
    world.bring_back(first, backup)
    world.start(first)
    steps(world, first, 3)


def copied_with_its_ledger(world: World) -> None:
    first = world.make()
    world.start(first)
    steps(world, first, 2)
    world.kill(first)
    second = world.copy_with_ledger(first)
    for name in (first, second):
        world.start(name)
        steps(world, name, 2)
        world.end(name)


def copied_with_its_ledger_while_it_runs(world: World) -> None:
    first = world.make()
    world.start(first)
    steps(world, first, 1)
    second = world.copy_with_ledger(first)
    steps(world, first, 2)
    world.kill(first)
    world.start(second)
    steps(world, second, 3)
    world.end(second)


def both_at_once_with_their_ledgers(world: World) -> None:
    first = world.make()
    world.start(first)
    steps(world, first, 1)
    second = world.copy_with_ledger(first)
    world.start(second)
    for _ in range(3):
        world.step(first)
        world.step(second)
    world.end(first)
    world.end(second)


WITH_LEDGERS = [copied_with_its_ledger, copied_with_its_ledger_while_it_runs, both_at_once_with_their_ledgers]
ATTACKS = [copied_after_a_kill, copied_while_it_runs, both_at_once, an_older_state_is_brought_back]


@pytest.mark.parametrize("attack", [*ATTACKS, *WITH_LEDGERS])
def test_a_copy_never_trains_for_free(attack: Callable[[World], None], world: World) -> None:
    attack(world)
    world.check()
    assert list(world.charged().values()) == [STEPS], "one run, charged once"


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_ledger_that_knows_no_copies_lets_them_train_for_free(
    attack: Callable[[World], None], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_no_copies(monkeypatch)
    attack(world)
    with pytest.raises(AssertionError, match="nobody paid"):
        world.check()


@pytest.mark.parametrize("attack", WITH_LEDGERS)
def test_an_index_that_knows_no_copies_lets_a_copied_ledger_speak_for_itself(
    attack: Callable[[World], None], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_knows_no_copies(monkeypatch)
    attack(world)
    with pytest.raises(AssertionError, match="nobody paid"):
        world.check()


@pytest.mark.parametrize("attack", [copied_while_it_runs, both_at_once, an_older_state_is_brought_back])
def test_nonces_without_marks_are_not_enough(
    attack: Callable[[World], None], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("note", "begin", "check"):
        monkeypatch.setattr(Mark, name, lambda self, *args, **named: None)
    attack(world)
    with pytest.raises(AssertionError, match="nobody paid"):
        world.check()


def test_a_start_that_is_killed_at_any_write_goes_on_and_is_charged_once(world: World) -> None:
    for dies_at in itertools.count():
        name = world.make()
        world.start(name, dies_at)
        whole = name in world.open
        world.kill(name)
        world.start(name)
        steps(world, name, STEPS)
        world.end(name, dies_at=dies_at)
        world.start(name)
        world.end(name)
        if whole:
            break
    assert dies_at >= 10, "before and after each of the writes of a start"
    assert world.charged() == dict.fromkeys(world.released, STEPS) and len(world.released) == dies_at + 1
    assert all(len(executions) == STEPS for executions in world.released.values())


def test_the_way_out_is_a_run_that_is_charged_in_full(world: World) -> None:
    first = world.make()
    world.start(first)
    second = world.copy(first)
    steps(world, first, STEPS)
    world.end(first)
    world.start(second)
    assert world.refused == 1 and second not in world.open
    world.begin_anew(second)
    world.start(second)
    steps(world, second, STEPS)
    world.end(second)
    assert list(world.charged().values()) == [STEPS, STEPS] and len(world.released) == 2
