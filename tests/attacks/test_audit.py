"""An engine that adds less noise than it claims, against `dp-lora` and `dp-lora-audit` as users call them."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor

from benchmarks.linear_audit import DEFECTS, noise_of, noise_times
from dp_lora import __main__
from dp_lora.commands import audit as audit_command
from dp_lora.privacy.randomness import Randomness
from tests.builders.tiny import once, words

PLAN = (
    "data.train_size=400",
    "train.expected_batch_size=100",
    "train.max_steps=12",
    "lora.rank=1",
    "stages=[finetune]",
)
"""A sample rate of about a quarter, where the scores for the claimed noise do not see less of it."""


@pytest.fixture(scope="module", autouse=True)
def fixed_keys() -> Iterator[None]:
    """One key for all, as if the system had drawn it: a false alarm cannot come up by chance."""
    key = hashlib.sha256(b"an attack on the audit").digest()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Randomness, "from_system", classmethod(lambda cls: cls(key, secure=True)))
        yield


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """The directory of a finished run whose engine has added so many times the noise that it claims."""

    def finished(factor: float) -> Path:
        outputs = tmp_path_factory.mktemp("outputs")
        GlobalHydra.instance().clear()
        with pytest.MonkeyPatch.context() as patched, _engine(factor):
            patched.setattr(sys, "argv", ["dp-lora", *once(*words(cache, outputs), *PLAN)])
            __main__.main()
        GlobalHydra.instance().clear()
        (directory,) = (outputs / "default").iterdir()
        return directory

    return finished


@pytest.fixture(scope="module")
def right(run: Callable[[float], Path]) -> Path:
    return run(1.0)


def _engine(factor: float) -> AbstractContextManager[object]:
    return nullcontext() if factor == 1 else noise_times(factor)()


def audited(directory: Path, factor: float = 1.0) -> int:
    """The exit status of an audit on a machine whose engine adds `factor` times the noise that it claims."""
    return audited_with(directory, _engine(factor))


def audited_with(directory: Path, engine: AbstractContextManager[object]) -> int:
    """The exit status of an audit on a machine with such an engine."""
    command = ["dp-lora-audit", str(directory), "--canaries", "300", "--images", "0", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patched, engine:
        patched.setattr(sys, "argv", command)
        try:
            audit_command.main()
        except SystemExit as left:
            return int(left.code or 0)
    return 0


def test_an_engine_that_does_what_it_claims_passes(
    right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(right, tmp_path / right.name)
    assert audited(directory) == 0
    assert "accuses" not in capsys.readouterr().out


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.8])
def test_an_engine_with_too_little_noise_does_not_pass(
    factor: float, right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(right, tmp_path / right.name)
    assert audited(directory, factor) == 1
    assert "The audit accuses the noise" in capsys.readouterr().out
    assert "The audit accuses the noise" in (directory / "adapter" / "README.md").read_text()


def _not_in_between(step: int, noise: Tensor, before: list[Tensor]) -> Tensor:
    # The canaries have the last coordinates of their training; these belong to the adapter.
    place = torch.arange(len(noise))
    return noise * ((place < 100) | (place >= 164))


@pytest.mark.parametrize(
    ("defect", "test"),
    [
        (noise_of(_not_in_between), "weakest_trained_coordinate"),
        (DEFECTS["noise that repeats every 300 coordinates"], "repeated_noise"),
    ],
    ids=["a tensor", "repeated"],
)
def test_noise_that_fails_only_where_no_canary_is_does_not_pass(
    defect: Callable[[], AbstractContextManager[object]], test: str, right: Path, tmp_path: Path
) -> None:
    """A tensor of the adapter, which holds no coordinate of a canary; noise that repeats within a step."""
    directory = shutil.copytree(right, tmp_path / right.name)
    assert audited_with(directory, defect()) == 1
    card = (directory / "adapter" / "README.md").read_text()
    assert test in card
    if test == "weakest_trained_coordinate":  # without the steps on no example it would pass
        assert not any(other in card for other in ("weakest_step", "weakest_coordinate", "alike_steps"))


@pytest.mark.parametrize(
    ("defect", "test", "said"),
    [
        ("padding counts as examples", "largest_contribution", "one example adds more than the clip allows"),
        (
            "the sum without noise is descended as well",
            "unreleased_update",
            "parameters changed by something else than what was released",
        ),
        (
            "divided by the size of the batch that came",
            "variance_above",
            "more noise than claimed: the scale of the release depends on the batch",
        ),
        (
            "a step with an empty batch is skipped",
            "missing_release",
            "a step without examples released nothing",
        ),
    ],
)
def test_an_engine_with_enough_noise_that_is_wrong_otherwise_does_not_pass(
    defect: str, test: str, said: str, right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(right, tmp_path / right.name)
    assert audited_with(directory, DEFECTS[defect]()) == 1
    shown = capsys.readouterr().out
    assert f"The audit accuses the engine: {said}." in shown and "as claimed" not in shown
    card = (directory / "adapter" / "README.md").read_text()
    assert test in card and f"The audit accuses the engine: {said}." in card
    assert "The audit accuses the noise" not in card


def test_a_run_with_too_little_noise_does_not_pass_a_right_engine(run: Callable[[float], Path]) -> None:
    """What the run itself has logged gives it away, though the code has been put right since."""
    directory = run(0.5)
    assert audited(directory) == 1
    assert "run_update_norms" in (directory / "adapter" / "README.md").read_text()
