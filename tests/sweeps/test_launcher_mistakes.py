"""Settings with which no job of a sweep could work: found by the plan, and a sweep that fails alike stops."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from dp_lora.__main__ import main
from dp_lora.config.schema import EXTRACTORS
from dp_lora.errors import SweepFailed
from dp_lora.evaluation import features
from sweeps.__main__ import main as sweeps
from sweeps.cluster.drive import Drive
from tests.builders.tiny import TINY, once, words

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def dp_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Run:
    """Runs a command with no cache and no data, and gives its exit status and the lines of stderr."""
    for name in ("CACHE", "DATA", "LEDGER"):
        monkeypatch.setenv(f"DP_LORA_{name}", str(tmp_path / name.lower()))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*given: str, command: Callable[..., Any] = main) -> tuple[int, list[str]]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["dp-lora", *once(*given)])
        capfd.readouterr()
        try:
            status = int(command() or 0)
        except SystemExit as stop:
            status = int(stop.code or 0)
        GlobalHydra.instance().clear()
        return status, capfd.readouterr().err.splitlines()

    return call


SIZE = (
    "dp-lora: data.name=digits: images of 1 x 8 x 8, expected 1 x 32 x 32, which the autoencoder of "
    "model.name=tiny8 takes: it is made from public_data.name=letters; expected public images of the same "
    "size and channels"
)
RANK = (
    "dp-lora: lora.rank=32: beyond the width of down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v, "
    "expected 1 to 16;"
)
IMPOSSIBLE = {
    "image size": (["sweep=rank", "model=tiny8", "data=digits", "seed=0", "lora_rank=r4,r8"], SIZE),
    "channels": (
        ["-m", *TINY, "seed=0,1", "data.channels=3"],
        "dp-lora: data.name=digits: images of 3 x 8 x 8, expected 1 x 8 x 8, which the autoencoder of ",
    ),
    "shipped model": (
        ["-m", "data=digits", "seed=0,1"],
        "dp-lora: data.name=digits: images of 1 x 8 x 8, expected 1 x 32 x 32, which the autoencoder of "
        "model.name=ldm32 takes (cell 0:",
    ),
    "rank": (["-m", *TINY, "lora_rank=r4,r32"], RANK),
    "target": (
        ["-m", *TINY, "lora.target_modules=[to_v],[to_vv]"],
        "dp-lora: lora.target_modules: 'to_vv' matches no linear or convolution layer of the UNet2D",
    ),
    "downsampling": (
        ["-m", *TINY, "seed=0,1", "public_data.image_size=7", "data.image_size=7"],
        "dp-lora: public_data.image_size=7: expected a multiple of 2, by which the autoencoder",
    ),
    "batch": (
        ["-m", *TINY, "train.expected_batch_size=60,1501"],
        "dp-lora: train.expected_batch_size=1501: expected a number in (0, 1500], the number of training ",
    ),
    "delta": (
        ["-m", *TINY, "privacy.delta=1e-5,1e-3"],
        "dp-lora: privacy.delta=0.001: expected a number in (0, 1/N) = (0, 0.000667)",
    ),
    "captions": (
        ["-m", "data=imagefolder", "data.source=/x", "seed=0,1", "data.caption_column=text"],
        "dp-lora: data.caption_column=text: the model has no text encoder; expected null or a text-to-image",
    ),
    "folder that is not read": (
        ["-m", *TINY, "seed=0,1", "data.source=/hospital/xrays"],
        "dp-lora: data.source=/hospital/xrays: data=digits comes with its package and reads no folder; ",
    ),
    "extractor": (
        ["-m", *TINY, "seed=0,1", "evaluation.extractors=[lite]"],
        "dp-lora: evaluation.extractors='lite': expected one of lite0, inception, dinov2; did you mean ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_dry_run_finds_what_every_job_would_fail_with(name: str, dp_lora: Run, tmp_path: Path) -> None:
    given, expected = IMPOSSIBLE[name]
    status, lines = dp_lora(*given, "--dry-run")
    assert status == 2 and len(lines) == 1 and lines[0].startswith(expected), lines
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_so_does_a_plan(dp_lora: Run, tmp_path: Path) -> None:
    given, expected = IMPOSSIBLE["image size"]
    status, lines = dp_lora(command=lambda: sweeps(["plan", *given]))
    words = "lora_rank=r4 seed=0 sweep=rank model=tiny8 data=digits"
    assert (status, lines) == (2, [f"{expected} (cell 0: {words})"])


@pytest.mark.parametrize("name", ["rank", "batch"])
def test_a_multirun_begins_no_job_when_one_cannot_work(name: str, dp_lora: Run, tmp_path: Path) -> None:
    given, expected = IMPOSSIBLE[name]
    status, lines = dp_lora(*given)
    assert status == 2 and len(lines) == 1 and lines[0].startswith(expected), lines
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


ONE_RUN = {
    "a preset that a value overrules": (
        ["lora_rank=r4,r8", "lora.rank=4", "--dry-run"],
        "lora_rank=r4,r8: both ask for the same run, since this cannot change its result; expected one value",
    ),
    "and a sweep of that value": (
        ["lora_rank=r4,r8", "lora.rank=4,8"],
        "lora_rank=r4,r8: both ask for the same run, since this cannot change its result; expected one value",
    ),
    "a value twice": (["seed=0,1,1"], "seed=0,1,1: 1 stands there twice; expected every value once"),
    "a cell that a word makes another": (
        ["sweep=baselines", "seed=0", "privacy.epsilon=inf"],
        "epsilon='inf': asks for the same run as the words beside it do alone; expected one of the two",
    ),
    "differences that cancel": (
        [
            "hydra/launcher=local",
            "hydra.sweeper.cells=['trainable=lora lora.target_modules=[to_q]','trainable=lora_qkv "
            "trainable.components=[lora,embedder] lora.target_modules=[to_q]']",
        ],
        "trainable=lora and trainable=lora_qkv trainable.components=[lora,embedder]: both ask for the same "
        "run, since together these cannot change its result; expected one of the two",
    ),
}


@pytest.mark.parametrize("name", ONE_RUN)
def test_two_jobs_of_a_sweep_that_ask_for_one_run_are_refused(
    name: str, dp_lora: Run, tmp_path: Path
) -> None:
    given, expected = ONE_RUN[name]
    status, lines = dp_lora("-m", *TINY, *given)
    assert (status, lines) == (2, [f"dp-lora: {expected}"])
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


LOCAL = ("hydra/launcher=local",)
SLURM = ("hydra/launcher=slurm",)
LAUNCHERS = {
    (*LOCAL, "hydra.launcher.max_parallel=0"): "hydra.launcher.max_parallel=0: expected at least 1, or null",
    (
        *SLURM,
        "hydra.launcher.max_parallel=-1",
    ): "hydra.launcher.max_parallel=-1: expected at least 1, or null",
    (*LOCAL, "hydra.launcher.poll_s=-1"): "hydra.launcher.poll_s=-1.0: expected a number above 0",
    (*LOCAL, "hydra.launcher.max_kills=-1"): "hydra.launcher.max_kills=-1: expected at least 0",
    (*LOCAL, "hydra.launcher.name=../mine"): (
        "hydra.launcher.name=../mine: expected the name of one folder, or null"
    ),
    (*LOCAL, "hydra.launcher.name="): "hydra.launcher.name=: expected the name of one folder, or null",
    (*LOCAL, "hydra.launcher.where=cloud"): "hydra.launcher.where=cloud: expected one of slurm, local",
    (*LOCAL, "hydra.launcher.job=jobs"): "hydra.launcher.job=jobs: expected <module>:<function>",
    (*LOCAL, "hydra.launcher.python=' '"): (
        "hydra.launcher.python= : expected shell words that start Python, or null"
    ),
    (*LOCAL, "+hydra.launcher.max_paralel=2"): (
        "hydra.launcher.max_paralel: no such option; did you mean 'max_parallel'?"
    ),
    (*SLURM, "resources.time_limit_min=1"): (
        "hydra.launcher.preemption_notice_s=90: expected at least 0 and less than the 60 s of "
        "resources.time_limit_min=1, or every job would be told to save when it starts"
    ),
    ("hydra.sweeper.max_batch_size=0",): "hydra.sweeper.max_batch_size=0: expected at least 1, or null",
    (*LOCAL, "hydra.sweeper.max_batch_size=1"): (
        "hydra.sweeper.max_batch_size=1: a sweep is launched as a whole; expected null, and "
        "hydra.launcher.max_parallel for how many jobs run at the same time"
    ),
    ("hydra/sweeper=basic",): (
        "hydra/sweeper=basic: not for these jobs; expected hydra/sweeper=grid, or nothing"
    ),
}


@pytest.mark.parametrize("given", LAUNCHERS, ids=lambda given: given[-1])
def test_a_launcher_is_not_told_what_it_cannot_do(given: Sequence[str], dp_lora: Run, tmp_path: Path) -> None:
    status, lines = dp_lora("-m", *TINY, "seed=0,1", *given, "--dry-run")
    assert (status, lines) == (2, [f"dp-lora: {LAUNCHERS[tuple(given)]}"])
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_possible_settings_pass(dp_lora: Run) -> None:
    status, lines = dp_lora("-m", *TINY, "lora_rank=r4,r64", "lora.cap_rank=true", "--dry-run")
    assert status == 0 and "2 cells, 2 to run" in lines[-1]


def test_a_multirun_whose_first_jobs_fail_alike_stops(dp_lora: Run, tmp_path: Path) -> None:
    missing = ["data=imagefolder", "data.image_size=8", f"data.source={tmp_path}/nowhere"]
    given = [*words(tmp_path / "cache", tmp_path / "outputs"), *missing, "-m", "seed=0,1,2,3"]
    status, lines = dp_lora(*given)
    assert status == 2
    said = [line for line in lines if line.startswith("dp-lora: ")]
    assert [line.partition(" (")[0] for line in said[:2]] == ["dp-lora: job 0", "dp-lora: job 1"]
    assert said[2:] == ["dp-lora: the first 2 jobs failed for one reason; nothing after them was started"]
    assert not (tmp_path / "outputs").exists()


class Waiting:
    """A cluster where cells 2 and 3 wait for room."""

    def drop(self) -> set[str]:
        return {"2", "3"}


@pytest.mark.parametrize(
    ("lines", "done", "dropped"),
    [
        ({"0": "data: no images", "1": "data: no images"}, 0, {"2", "3"}),
        ({"0": "data: no images", "1": "lora.rank=99: no"}, 0, set()),
        ({"0": "data: no images"}, 0, set()),
        ({"0": "", "1": ""}, 0, set()),
        ({"0": "data: no images", "1": "data: no images"}, 1, set()),
    ],
)
def test_a_sweep_whose_first_cells_fail_alike_gives_up_those_that_wait(
    lines: dict[str, str], done: int, dropped: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cell, line in lines.items():
        (tmp_path / f"{cell}.failed").write_text(f"{line}\n")
    cells = [SimpleNamespace(identity=str(number), number=number, words=()) for number in range(4 + done)]
    ledger = SimpleNamespace(failure=lambda cell: tmp_path / f"{cell}.failed", folder=tmp_path)
    drive: Any = Drive(cells, ledger, Waiting(), {}, [])  # type: ignore[arg-type]
    drive.failed = dict.fromkeys(lines, "ended")
    drive.pending = {"0", "1", "2", "3"} - set(lines)
    before = set(drive.pending)
    drive._drop_if_all_fail_alike()
    assert drive.dropped == dropped and drive.pending == before - dropped
    if dropped:
        monkeypatch.setattr("sweeps.report.write", lambda folder: "")
        with pytest.raises(SweepFailed) as end:
            drive._report()
        assert str(end.value) == (
            "the first 2 of 4 cells failed for one reason and the other 2 were not started: data: no images"
        )


def test_the_names_of_extractors_are_the_extractors() -> None:
    assert tuple(features.EXTRACTORS) == EXTRACTORS
