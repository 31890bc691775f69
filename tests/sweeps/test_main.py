"""The command `python -m sweeps`: plan, status, collect, report, cancel."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console

from dp_lora.config.schema import Config, DataConfig, PathsConfig
from dp_lora.data.sets import expected_train_size, load
from dp_lora.privacy.accounting import epsilon, noise_multiplier_for
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import append_line, file_lock
from sweeps import plan, status
from sweeps.__main__ import main
from sweeps.folders import find, read
from tests.builders.sweep_folder import configured, grid, write_run, write_sweep
from tests.builders.tiny import TINY, composed

STATES = ["done", "failed", "running", "missing"]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep in `outputs/sweeps` of the working directory."""
    monkeypatch.chdir(tmp_path)
    return write_sweep(tmp_path / "outputs", "rank", grid(lora__rank=[2, 4, 8, 16]), STATES)


# status


def test_status_says_what_every_cell_does(sweep: Path, capsys: Any) -> None:
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "outputs/sweeps/rank  4 cells: 1 running, 1 failed, 1 waiting, 1 done"
    assert lines[1].startswith("  lora.rank=8: running, finetune 40 of 80, epsilon 7.07")
    assert lines[1].endswith(" s ago")
    assert lines[2].startswith("  lora.rank=4: failed,") and lines[2].endswith("OutOfMemoryError")
    assert lines[3:] == ["  lora.rank=16: waiting"]


def test_a_job_that_says_nothing_any_more_is_seen(sweep: Path) -> None:
    directory = read(sweep).cells[2].directory
    for path in directory.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    rows = status.look(read(sweep))
    assert 3599 < rows[2]["last_sign_s"] < 3700
    assert "60 min ago" in status.plain([read(sweep)])


def test_a_failed_start_is_failed_without_its_text(sweep: Path) -> None:
    identity = read(sweep).cells[3].identity
    (sweep / "cells" / f"{identity}.failed").write_text("/secret: no such folder\n")
    text = status.plain([read(sweep)])
    assert "lora.rank=16: failed, see its log" in text and "secret" not in text


def test_the_table_for_a_terminal_fits_it(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, "mine", grid(seed=range(40)), ["missing"] * 39)
    console = Console(width=100, height=24, record=True)
    console.print(status.table(find([folder]), 24))
    text = console.export_text()
    assert (
        len(text.splitlines()) <= 24 and "40 cells: 39 waiting, 1 done" in text and "... and 24 more" in text
    )


def test_watching_ends_with_the_last_cell(sweep: Path, capsys: Any) -> None:
    seen = []

    def found() -> Any:
        seen.append(1)
        if len(seen) == 2:
            for path in (cell.directory / "status.json" for cell in read(sweep).cells[2:]):
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps({"state": "done"}))
        return find([sweep])

    status.watch(found, 0.01)
    assert len(seen) == 2


# collect and report


def test_collect_writes_one_table_of_all_sweeps(sweep: Path, tmp_path: Path, capsys: Any) -> None:
    write_sweep(tmp_path / "outputs", "more", grid(seed=[5]))
    assert main(["collect"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 of 5 runs are done: outputs/sweeps/runs.csv outputs/sweeps/runs.parquet"
    assert said[1] == "mnist: 4 runs, 242 steps on the same images"
    assert main(["collect", "outputs/default", "--out", "all.csv"]) == 0
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + 4


def test_report_writes_into_each_sweep_or_one_of_all(
    sweep: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.figures.script", lambda: "")
    write_sweep(tmp_path / "outputs", "more", grid(seed=[5]))
    assert main(["report"]) == 0
    assert (sweep / "report.html").exists() and (sweep.parent / "more" / "report.html").exists()
    capsys.readouterr()
    assert main(["report", "--together", "--out", "all"]) == 0
    assert "## more, rank: 2 of 5 runs" in capsys.readouterr().out
    assert '<th scope="col" class="label">sweep</th>' in (tmp_path / "all" / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["collect", "nowhere"], "nowhere: no sweep and no run is in it; expected"),
        (
            ["collect", "--out", "no/runs.csv"],
            "--out no/runs.csv: expected a file that ends in .csv, in a folder",
        ),
        (["collect", "--out", "runs.txt"], "--out runs.txt: expected"),
        (["report", "--together", "outputs/sweeps", "outputs/default"], "--together: expected --out with it"),
        (["report", "outputs/sweeps", "outputs/default", "--out", "x"], "--out x: expected one sweep"),
        (["cancel", "outputs/default"], "outputs/default: runs that were started one by one; expected"),
        (["status", "nowhere"], "nowhere: no sweep"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    given: list[str], expected: str, sweep: Path, tmp_path: Path, capsys: Any
) -> None:
    before = set(tmp_path.rglob("*"))
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sweeps: {expected}") and said.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


# cancel


def test_cancel_interrupts_a_driver_of_this_machine(sweep: Path, capsys: Any) -> None:
    holds = """
import sys, time
from pathlib import Path
from dp_lora.storage.files import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", holds, str(sweep / "lock")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert driver.stdout is not None and driver.stdout.readline() == b"held\n"
    (sweep / "driver").write_text(f"process {driver.pid} on {os.uname().nodename}\n")
    assert main(["cancel", str(sweep)]) == 0
    driver.communicate(timeout=600)
    assert driver.returncode == -signal.SIGINT
    assert f"interrupted its driver, process {driver.pid}" in capsys.readouterr().out
    assert main(["cancel", str(sweep)]) == 0, "the number may be another process's by now"
    assert "nothing of it runs or waits" in capsys.readouterr().out


def test_cancel_leaves_a_driver_of_another_machine_alone(sweep: Path, capsys: Any) -> None:
    (sweep / "driver").write_text(f"process {os.getpid()} on elsewhere\n")
    with file_lock(sweep / "lock"):
        assert main(["cancel", str(sweep)]) == 0
    assert f"its driver is process {os.getpid()} on elsewhere: stop it there" in capsys.readouterr().out


def test_cancel_ends_the_jobs_that_a_dead_driver_left(sweep: Path, capsys: Any) -> None:
    folder = sweep / "logs" / "dp-lora-rank-1"
    job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", str(folder)])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    for name, process in (("a", job), ("b", other)):
        rows: list[dict[str, Any]] = [
            {"event": "submitting", "name": name, "cells": [name], "time": 0.0},
            {"event": "submitted", "name": name, "jobs": [str(process.pid)]},
        ]
        for row in rows:
            append_line(sweep / "jobs.jsonl", row)
    try:
        # A job is known by its folder among its words; this one has the folder itself.
        words = Path(f"/proc/{job.pid}/cmdline").read_bytes()
        assert os.fsencode(sweep / "logs") in words
        assert main(["cancel", str(sweep)]) == 0
        assert job.wait(timeout=600) == -signal.SIGTERM
        assert other.poll() is None, "a process that is none of its jobs"
        assert f"its jobs have saved and stopped: {job.pid}" in capsys.readouterr().out
    finally:
        for process in (job, other):
            process.kill()
            process.wait()


# plan


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["sweeps"])
        try:
            answer = main(["plan", *words])
        finally:
            GlobalHydra.instance().clear()
        return answer, capfd.readouterr().err

    return call


def test_a_plan_says_what_all_runs_spend(planned: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    answer, said = planned("sweep=epsilon", "epsilon=eps1,inf", "seed=0,1")
    assert answer == 0
    (line,) = (line for line in said.splitlines() if line.startswith("privacy on "))
    told = re.fullmatch(
        r"privacy on mnist: 2 runs at epsilon 1, 2 runs without any privacy; if all are released, epsilon "
        r"([\d.]+) at delta 1e-05 \(pld\), and what the other 2 spend",
        line,
    )
    # Two runs of one mechanism are one run of twice the steps.
    sigma = noise_multiplier_for(1.0, 1e-5, 0.25, 80)
    assert told and float(told[1]) == pytest.approx(
        epsilon([Mechanism(sigma, 0.25, 160)], 1e-5).epsilon, rel=5e-3
    )
    assert said.splitlines()[-1] == "4 cells, 4 to run; no finished run to go by; nothing was submitted"
    assert not (tmp_path / "outputs" / "sweeps").exists()
    answer, said = planned("sweep=rnk")
    assert answer == 2 and "did you mean 'rank'?" in said


def test_what_a_given_noise_spends_is_known_where_the_number_of_images_is() -> None:
    config = Config(data=DataConfig(name="mnist5k"))
    config.privacy.epsilon, config.privacy.noise_multiplier = None, 1.0
    (line,) = plan.spending([config])
    assert "1 run with a given noise, whose epsilon their privacy.json will say" in line
    spent = epsilon([Mechanism(1.0, 0.25, 80)], 1e-5).epsilon
    assert float(line.split("released, epsilon ")[1].split()[0]) == pytest.approx(spent, rel=5e-3)
    config.data.name = "imagefolder"
    (line,) = plan.spending([config])
    assert line.endswith("if all are released, what these spend")


def test_a_plan_counts_the_releases_on_held_out_images_too() -> None:
    """Each run makes one, also those that take the training of another."""
    runs = [Config(data=DataConfig(name="mnist5k")) for _ in range(3)]
    for guidance, run in enumerate(runs):
        run.sampler.guidance, run.evaluation.release = 1.0 + guidance, "dp"
    training, releases = plan.spending(runs)
    assert "1 run at epsilon 10" in training
    assert releases.startswith("3 releases of metrics on held-out images, epsilon 1 each, at most 3 together")
    runs[0].stages, runs[1].data.public = ["finetune"], True
    assert plan.spending(runs)[-1].startswith("1 release of metrics")


def test_without_the_number_of_images_epsilons_add_up() -> None:
    own = [Config(data=DataConfig(name="imagefolder", source="/images"), seed=seed) for seed in range(3)]
    own[0].privacy.epsilon = 1.0
    (line,) = plan.spending(own)
    assert line.endswith("if all are released, at most epsilon 21 at delta 3e-05")


@pytest.mark.parametrize("name", ["mnist5k", "digits"])
def test_the_number_of_images_is_what_the_loader_finds(name: str) -> None:
    config = DataConfig(name=name, image_size={"mnist5k": 32, "digits": 8}[name], validation_size=100)
    assert expected_train_size(config) == len(load(config, PathsConfig()).train.labels)


def test_a_plan_says_how_many_public_models_are_made_first(tmp_path: Path) -> None:
    without = [configured(tmp_path, {"model.pretrained": None, "seed": n}) for n in (0, 0, 1)]
    for config in without:
        config.paths.cache = str(tmp_path)
    assert plan.pretrainings(without)[0].startswith("pre-trains 2 public models first")
    assert plan.pretrainings([configured(tmp_path, {})]) == []


def test_hours_come_from_runs_of_the_same_kind(tmp_path: Path) -> None:
    config = composed(*TINY, "train.max_steps=40", "noise_multiplicity=k4")
    assert plan.hours(config, plan.rates(tmp_path)) is None
    finished = write_run(tmp_path / "a-1", configured(tmp_path, {}))
    (finished / "config.yaml").unlink()
    assert plan.rates(tmp_path) == [], "a run without its configuration tells nothing"
    (finished / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    # 180 s for 80 x 1000 x 2 draws, and 92 s for the rest.
    expected = 180 / (80 * 1000 * 2) * (40 * 60 * 4) + 92
    assert plan.hours(config, plan.rates(tmp_path)) == pytest.approx(expected / 3600)
    other = composed(*TINY, "resources=gpu1")
    assert plan.hours(other, plan.rates(tmp_path)) is None
    assert plan.hours(composed(*TINY, "train.epochs=2"), plan.rates(tmp_path)) is None


def test_public_runs_spend_nothing() -> None:
    config = Config()
    config.data.public = True
    assert plan.spending([config]) == []


def test_a_place_that_cannot_be_written_is_one_line(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", "--out", "file"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("sweeps: file: ") and "expected a place" in said
    assert (tmp_path / "file").read_text() == ""
