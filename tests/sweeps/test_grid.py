"""The ablations of conf/sweep: their cells, how the command line narrows them, what identifies a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext, RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from dp_lora.__main__ import main
from dp_lora.commands.command_line import hydra_words
from dp_lora.config.identity import fingerprint, run_directory
from dp_lora.config.load import config_directory
from dp_lora.errors import UserError
from sweeps.grid import jobs
from tests.builders.tiny import composed

SWEEPS = sorted(
    path.stem
    for path in (config_directory() / "sweep").glob("*.yaml")
    if path.stem not in ("none", "private_search")
)
"""Those that are grids."""

Plan = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Plan:
    """Runs `dp-lora` with `--dry-run`: the exit status, the words of each cell, and all that was said."""
    monkeypatch.chdir(tmp_path)

    def call(*given: str) -> tuple[int, list[str], str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["dp-lora", *given, "--dry-run"])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            GlobalHydra.instance().clear()
        said = capfd.readouterr().err
        rows = [line for line in said.splitlines() if "  [time=" in line]
        return status, [row[23:].partition("  [")[0] for row in rows], said

    return call


SIZES = {
    "rank": 7, "noise_multiplicity": 4, "noise_multiplier": 5, "components": 6, "clip_norm": 3, "batch": 4,
    "epsilon": 4, "baselines": 6, "headline": 18, "salience": 15,
}  # fmt: skip


def expanded(name: str, *words: str) -> tuple[DictConfig, list[list[str]]]:
    """The configuration of `dp-lora sweep=NAME WORDS`, and the words of its jobs."""
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        loader = hydra.config_loader
        config = loader.load_configuration("config", [f"sweep={name}"], run_mode=RunMode.MULTIRUN)
        # Hydra imports its plugins anew, so that this is a GridSweeper of another import.
        sweeper: Any = instantiate(config.hydra.sweeper)
        sweeper.hydra_context = HydraContext(config_loader=loader, callbacks=Callbacks())
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(
            [*sweeper._parse_config(), *hydra_words(words)]
        )
        (batch,) = sweeper.split_arguments(parsed, None)
    return config, batch


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_has_its_cells_three_times(name: str) -> None:
    config, cells = expanded(name)
    assert len({tuple(cell) for cell in cells}) == len(cells) == 3 * SIZES[name]
    for seed in range(3):
        assert sum(f"seed={seed}" in cell for cell in cells) == SIZES[name]
    assert config.hydra.mode == RunMode.MULTIRUN and config.hydra.launcher.where == "local"
    for cell in (cells[0], cells[-1]):
        job = composed(f"sweep={name}", *cell)
        assert job.tracking.group == (name if name == "headline" else f"{name}-default")


def test_a_sweep_keeps_the_experiment(plan: Plan) -> None:
    words = ("experiment=celeba64", "seed=0", "lora_rank=r4,r8")
    status, cells, said = plan("-m", "sweep=rank", *words)
    assert status == 0 and cells == ["lora_rank=r4", "lora_rank=r8"]
    assert "/outputs/sweeps/rank-celeba64-" in said
    config = composed("sweep=rank", "experiment=celeba64", "lora_rank=r2")
    plain = composed("experiment=celeba64", "lora_rank=r2")
    assert config.lora.rank == 2 and config.tracking.group == "rank-celeba64"
    assert fingerprint(config) == fingerprint(plain)


def test_the_command_line_narrows_a_sweep() -> None:
    assert expanded("rank", "lora_rank=r4,r8", "seed=0")[1] == [
        ["lora_rank=r4", "seed=0"], ["lora_rank=r8", "seed=0"]
    ]  # fmt: skip
    assert expanded("epsilon", "epsilon=inf", "seed=2")[1] == [["epsilon='inf'", "seed=2"]]
    assert expanded("headline", "experiment=mnist", "epsilon=eps1", "seed=range(2)")[1] == [
        ["experiment=mnist", "epsilon=eps1", "seed=0"], ["experiment=mnist", "epsilon=eps1", "seed=1"]
    ]  # fmt: skip


def test_the_command_line_narrows_cells(plan: Plan) -> None:
    one = expanded("baselines", "seed=0", "epsilon=eps1")[1]
    assert one[0] == ["trainable=lora", "seed=0", "epsilon=eps1"] and len(one) == 6
    assert one[-1] == ["trainable=lora", "epsilon='inf'", "seed=0"]
    assert [cell[0] for cell in expanded("baselines", "seed=0", "trainable=lora,bias")[1]] == [
        "trainable=lora", "trainable=bias", "trainable=lora"
    ]  # fmt: skip
    assert len(expanded("baselines", "seed=0", "epsilon=inf")[1]) == 5, "one run is not made twice"
    status, cells, said = plan("sweep=baselines", "trainable=norm")
    assert (status, cells) == (2, [])
    assert said == (
        "dp-lora: trainable=norm: no cell of this sweep has it; expected some of lora, attention, full, "
        "bias, embedder\n"
    )


def test_a_choice_that_some_cells_make_keeps_these_and_fills_the_others() -> None:
    cells = [{"a": "1"}, {"a": "2", "b": "x"}, {"b": "y"}]
    assert jobs(cells, {}) == [["a=1"], ["a=2", "b=x"], ["b=y"]]
    assert jobs(cells, {"a": ["2", "3"]}) == [["a=2", "b=x"], ["b=y", "a=2"], ["b=y", "a=3"]]
    assert jobs(cells, {"b": ["z"]}) == [["a=1", "b=z"], ["a=2", "b=x"], ["b=y"]]
    with pytest.raises(UserError, match="a=9: no cell of this sweep has it; expected some of 1, 2"):
        jobs(cells[:2], {"a": ["9"]})


def test_an_unknown_sweep_is_one_line_with_the_nearest(plan: Plan) -> None:
    status, _, said = plan("-m", "sweep=rnak")
    assert status == 2 and said.count("\n") == 1
    assert "sweep=rnak: expected one of baselines, batch" in said and "did you mean 'rank'?" in said


def test_the_same_cell_of_two_sweeps_is_one_run() -> None:
    by_rank = composed("sweep=rank", "lora_rank=r8", "seed=1")
    by_epsilon = composed("sweep=epsilon", "epsilon=eps10", "seed=1")
    assert by_rank.tracking.group == "rank-default" and by_epsilon.tracking.group == "epsilon-default"
    assert fingerprint(by_rank) == fingerprint(by_epsilon)
    named = run_directory(by_rank, ["sweep=rank", "lora_rank=r8", "seed=1"])
    assert named.name == f"lora_rank=r8,seed=1-{fingerprint(by_rank)}"
    assert composed("sweep=rank", "tracking.group=mine").tracking.group == "mine"
