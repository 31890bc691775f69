"""Attacks that take away the noise: two readings of a step that share it differ by the private data alone.

A reading is what a step releases, as an observer has it who keeps every checkpoint: after the first step,
Adam's first moment is a tenth of the released gradient. In each attack the run dies when its first step has
been released and is not yet saved; something is changed; the same command is given again.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_lora.config.schema import Config
from dp_lora.jobs import stages
from dp_lora.jobs.begun import begun
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.mechanism import noised_mean
from dp_lora.privacy.randomness import Randomness
from dp_lora.storage.files import read_json, read_lines
from dp_lora.training import finetune, numerics
from dp_lora.training.loop import Checkpoint
from tests.builders.tiny import composed, words

pytestmark = pytest.mark.usefixtures("unchecked")

PLAN = (
    "stages=[finetune]", "epsilon=none", "privacy.noise_multiplier=8", "train.expected_batch_size=20",
    "train.max_steps=3", "noise_multiplicity=k1", "lora.rank=2", "train.checkpoint_minutes=0",
)  # fmt: skip


class Crash(BaseException):
    """The process dies here."""


class Attacked:
    """One run under attack, started as often as the attacker likes.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def checkpoint(self) -> Path:
        (directory,) = (Path(self.config.paths.outputs) / "default").iterdir()
        return directory / "checkpoint"

    def reading(self) -> torch.Tensor:
        """Starts the run, which dies when its first step is released: what that step released."""
        seen: list[torch.Tensor] = []

        def keep(self: Checkpoint, finished: int, state: Any) -> None:
            assert finished == 1
            moments = [values["exp_avg"] for values in state["optimizer"]["state"].values()]
            seen.append(torch.cat([moment.flatten() for moment in moments]).double() / 0.1)
            raise Crash

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Checkpoint, "save", keep)
            with pytest.raises(Crash):
                stages.run(self.config)
        return seen[0]

    def executions(self) -> int:
        return begun(self.checkpoint)

    def names(self) -> list[str]:
        """What the batches of the executions were derived from, in the order in which they began."""
        rows = read_lines(self.checkpoint / "executions.jsonl")
        return list(dict.fromkeys(row["execution"] for row in rows))

    def noise_is_shared(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether two readings of one step are as close as no two independent draws of the noise are.

        The squared distance over that of the noise is about 1 or more for two draws: below 0.7 once in 10^11
        with 1,000 parameters or more. With one noise it is that of two clipped sums of some 20 examples: at
        most 20^2 / 2P.
        """
        plan = read_json(self.checkpoint / "plan.json")
        noise = float(plan["noise_multiplier"]) * float(plan["max_grad_norm"])
        distance = (one - other).square().sum() * float(plan["expected_batch_size"]) ** 2
        assert len(one) >= 1000
        return float(distance) / (2 * len(one) * noise**2) < 0.7


@pytest.fixture
def attacked(cache: Path, tmp_path: Path) -> Callable[..., Attacked]:
    def build(*overrides: str, outputs: str = "outputs") -> Attacked:
        return Attacked(composed(*words(cache, tmp_path / outputs), *PLAN, *overrides))

    return build


def edit_the_loss(patched: pytest.MonkeyPatch, attacked: Attacked) -> None:
    """A factor of 1 + 1e-6 in the code, which changes no file that the run looks at."""
    loss = finetune.per_example_loss
    patched.setattr(finetune, "per_example_loss", lambda *given: loss(*given) * (1 + 1e-6))


def edit_the_package(patched: pytest.MonkeyPatch, attacked: Attacked) -> None:
    patched.setattr(numerics, "code_digest", lambda package: "of an edited package")


def edit_the_schedule(patched: pytest.MonkeyPatch, attacked: Attacked) -> None:
    """`beta_end` in the folder of the pre-trained model."""
    path = Path(str(attacked.config.model.pretrained)) / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"beta_end": settings["beta_end"] * (1 + 1e-6)}))


def change_mkl(patched: pytest.MonkeyPatch, attacked: Attacked) -> None:
    patched.setenv("MKL_CBWR", "COMPATIBLE")


def change_another_process(patched: pytest.MonkeyPatch, attacked: Attacked) -> None:
    """The hardware of a process that is not the first."""
    patched.setattr(numerics, "everyone", lambda own: [own, own | {"device": "another processor"}])


CHANGES = (edit_the_package, edit_the_schedule, change_mkl, change_another_process)


def test_a_step_redone_after_a_change_has_another_batch_and_another_noise_and_is_counted(
    attacked: Callable[..., Attacked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is one that the run cannot know of; the ledger and all else are as they are."""
    run_ = attacked()
    first = run_.reading()
    assert torch.equal(run_.reading(), first) and run_.executions() == 1, "nothing changed: the same release"
    edit_the_loss(monkeypatch, run_)
    second = run_.reading()
    assert not run_.noise_is_shared(first, second)
    assert run_.executions() == 2 and len(run_.names()) == 2
    # Once more after the same change: nothing new is released.
    assert torch.equal(run_.reading(), second) and run_.executions() == 2
    # It ends within its plan, and says so.
    directory = Path(stages.run(run_.config)["directory"])
    said = read_json(directory / "privacy.json")
    assert said["steps"] == said["planned_steps"] == 3 and said["complete"]
    assert len(read_lines(directory / "metrics.jsonl")) == 2, "one step of three was taken twice"


def test_a_step_redone_after_a_known_change_has_another_batch_at_once(
    attacked: Callable[..., Attacked], pretrained: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(pretrained, tmp_path / "pretrained")
    run_ = attacked("train.max_steps=6", f"model.pretrained={copy}")
    readings = [run_.reading()]
    for number, change in enumerate(CHANGES, start=2):
        with pytest.MonkeyPatch.context() as patched:
            change(patched, run_)
            readings.append(run_.reading())
        assert not any(run_.noise_is_shared(one, readings[-1]) for one in readings[:-1]), change.__name__
        assert run_.executions() == len(run_.names()) == number


def test_noise_that_is_keyed_by_the_step_alone_is_found(
    attacked: Callable[..., Attacked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: streams of (key, purpose, step), and a record that forgets the sums."""
    monkeypatch.setattr(Randomness, "bound_to", lambda self, label: self)
    monkeypatch.setattr(algorithm.DPSGD, "randomness_of", lambda self, *given: self._randomness)
    monkeypatch.setattr(algorithm, "sum_digest", lambda *given: b"")
    run_ = attacked()
    first = run_.reading()
    edit_the_loss(monkeypatch, run_)
    second = run_.reading()
    assert not torch.equal(first, second), "what is left is the difference of two private sums"
    assert run_.noise_is_shared(first, second) and run_.executions() == 1


# Copies. The ledger refuses to go on from one; here two go on all the same, below the ledger.


@pytest.fixture
def uncharged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "charged", lambda *given: nullcontext(lambda: None))


def copies(attacked: Callable[..., Attacked], *names: str) -> tuple[Attacked, ...]:
    """Copies of a run that was begun and has released nothing."""
    one = attacked()

    def die(*given: Any) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(algorithm, "poisson_batch", die)
        with pytest.raises(Crash):
            stages.run(one.config)
    made = tuple(attacked(outputs=name) for name in names)
    for copy in made:
        shutil.copytree(one.config.paths.outputs, copy.config.paths.outputs)
    return made


@pytest.mark.usefixtures("uncharged")
def test_copies_of_a_run_that_go_on_differently_share_no_noise(attacked: Callable[..., Attacked]) -> None:
    one, alike, unknown, known = copies(attacked, "one", "alike", "unknown", "known")
    first = one.reading()
    assert torch.equal(alike.reading(), first) and alike.names() == one.names(), "the same release"
    for copy, change in ((unknown, edit_the_loss), (known, change_mkl)):
        with pytest.MonkeyPatch.context() as patched:
            change(patched, copy)
            assert not one.noise_is_shared(first, copy.reading())
        # A change that is known brings another batch too; of one that is not, only the sums tell.
        assert (one.names()[-1] == copy.names()[-1]) == (change is edit_the_loss)


# What an unfinished run says


def test_what_an_unfinished_run_says_covers_the_step_that_it_died_in(
    attacked: Callable[..., Attacked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in its second step, and then in its first one, which the change has made a third execution."""
    run_ = attacked("train.checkpoint_minutes=60")
    said: list[dict[str, Any]] = []
    for after, mode in ((2, "AUTO"), (1, "COMPATIBLE")):
        calls = 0

        def die(*given: Any, after: int = after) -> Any:
            nonlocal calls
            calls += 1
            if calls == after:
                raise Crash
            return noised_mean(*given)

        with monkeypatch.context() as patched:
            patched.setenv("MKL_CBWR", mode)
            patched.setattr(algorithm, "noised_mean", die)
            with pytest.raises(Crash):
                stages.run(run_.config)
        said.append(read_json(run_.checkpoint.parent / "privacy.json"))
        assert said[-1]["steps"] == run_.executions() and not said[-1]["complete"]
    assert [record["steps"] for record in said] == [2, 3]
    # Three executions are the whole plan.
    plan = read_json(run_.checkpoint / "plan.json")
    assert 0 < said[0]["epsilon"] < said[1]["epsilon"]
    assert math.isclose(said[1]["epsilon"], plan["epsilon"], rel_tol=1e-3)
