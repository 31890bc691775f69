"""Nothing private leaves, no step is lost or doubled, W&B says what the files say and never stops a run."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import logging
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from dp_lora.jobs.stages import privacy_record
from dp_lora.records import manifest, tracker
from dp_lora.records.tracker import PrivateValueError, baseline_table
from dp_lora.storage.files import Damaged, read_json, read_lines
from tests.builders.tracked import PUBLIC, RUN_ID, job, open_tracker, row
from tests.builders.wandb_file import WandbRun, read_run

pytestmark = pytest.mark.usefixtures("unchecked")

PRIVATE = ["loss", "grad_norm", "clip_fraction", "batch_size", "label_counts", "indices", "Epsilon", "step "]
PRIVATE += ["examples_per_second", "steps_per_second", "seconds"]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "outputs" / "run"
    directory.mkdir(parents=True)
    return directory


# What may leave


def leaks(directory: Path, name: str) -> bool:
    """Whether a private stage can get a value under `name` into the record."""
    with open_tracker(directory, job()) as tracker, contextlib.suppress(PrivateValueError):
        tracker.log(1, {"epsilon": 1.0, name: 0.731}, "finetune")
    return "0.731" in (directory / "metrics.jsonl").read_text()


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_value_leaves_no_trace(run_directory: Path, name: str) -> None:
    assert not leaks(run_directory, name)


def test_the_check_sees_a_tracker_without_its_allowlist(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "check_released", lambda *args, **kwargs: None)
    assert all(leaks(run_directory, name) for name in PRIVATE[:4])


@pytest.mark.parametrize("stage", ["finetune", "sample", "evaluate", "a stage nobody thought of"])
def test_every_stage_is_private_unless_it_is_known_as_public(run_directory: Path, stage: str) -> None:
    tracker = open_tracker(run_directory, job())
    with pytest.raises(PrivateValueError, match=f"loss may not leave stage {stage}"):
        tracker.log(1, {"loss": 0.5}, stage)


def test_losses_on_public_data_are_logged(run_directory: Path) -> None:
    with open_tracker(run_directory, job(data=PUBLIC)) as tracker:
        tracker.log(1, {"loss": 0.5}, "pretrain")
        tracker.log(1, {"loss": 0.25}, "finetune")
    assert [row["loss"] for row in read_lines(run_directory / "metrics.jsonl")] == [0.5, 0.25]


def test_only_numbers_are_logged_and_a_private_row_has_no_time(run_directory: Path) -> None:
    with open_tracker(run_directory, job()) as tracker:
        for wrong in ([1, 2], "0.5", None, True):
            with pytest.raises(TypeError, match="epsilon: expected a number"):
                tracker.log(1, {"epsilon": wrong}, "finetune")  # type: ignore[dict-item]
        tracker.log(1, {"epsilon": math.inf, "update_norm": 0.25}, "finetune")
    (logged,) = read_lines(run_directory / "metrics.jsonl")
    assert logged == {"stage": "finetune", "step": 1, "epsilon": "inf", "update_norm": 0.25}


def test_only_generated_images_and_clean_adapters_leave(run_directory: Path, tmp_path: Path) -> None:
    (run_directory / "checkpoint").mkdir()
    with open_tracker(run_directory, job()) as tracker:
        for path in (
            run_directory / "batch.png",
            run_directory / "samples.npz",
            run_directory / "checkpoint" / "samples.png",
            tmp_path / "samples.png",
        ):
            path.touch()
            with pytest.raises(PrivateValueError, match="may not leave the run"):
                tracker.images("grid", path)
        (run_directory / "checkpoint" / "noise_key.bin").touch()
        with pytest.raises(PrivateValueError, match=r"noise_key\.bin may not leave"):
            tracker.adapter(run_directory / "checkpoint")


# The files


def test_a_resumed_run_has_one_row_per_step_and_no_gap(run_directory: Path) -> None:
    with open_tracker(run_directory, job()) as tracker:
        tracker.log(0, {"loss": 1.0}, "pretrain")
        for step in range(8):
            tracker.log(step, row(step), "finetune")
    with (run_directory / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "finetune", "st')
    with open_tracker(run_directory, job(), resume_step=5) as tracker:
        for step in range(5, 12):
            tracker.log(step, row(step), "finetune")
    rows = read_lines(run_directory / "metrics.jsonl")
    assert rows[0]["stage"] == "pretrain"
    assert [row["step"] for row in rows[1:]] == list(range(12))


def test_a_step_is_logged_once(run_directory: Path) -> None:
    with open_tracker(run_directory, job()) as tracker:
        tracker.log(3, row(3), "finetune")
        with pytest.raises(AssertionError, match="step 3 is no new one"):
            tracker.log(3, row(3), "finetune")
    with open_tracker(run_directory, job(), resume_step=4) as tracker, pytest.raises(AssertionError):
        tracker.log(2, row(2), "finetune")


def rows_in_wandb(directory: Path) -> int:
    runs = [read_run(path) for path in directory.glob("wandb/offline-run-*/*.wandb")]
    return sum("update_norm" in row for run in runs for row in run.history)


@pytest.mark.parametrize("live", [False, True])
def test_wandb_gets_the_rows_of_a_private_training_live_when_asked_for_alone(
    run_directory: Path, live: bool
) -> None:
    config = job("offline")
    config.tracking.live = live
    with open_tracker(run_directory, config) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, row(step), "finetune")
    assert rows_in_wandb(run_directory) == (3 if live else 0)


def test_rows_that_were_sent_live_are_not_sent_again_at_the_end(run_directory: Path) -> None:
    config = job("offline")
    config.tracking.live = True
    with open_tracker(run_directory, config) as tracker:
        tracker.log(1, row(1), "finetune")
        tracker.stage_ended("finetune")
    assert rows_in_wandb(run_directory) == 1


@pytest.mark.parametrize("live", [False, True])
def test_privacy_json_says_that_arrival_times_of_live_rows_are_not_covered(
    live: bool, tmp_path: Path
) -> None:
    config = job()
    config.tracking.live = live
    plan = SimpleNamespace(to_dict=dict, steps=4, unit="image")
    record = privacy_record(
        SimpleNamespace(config=config, plan=plan, directory=tmp_path, start=None, choice=None),  # type: ignore[arg-type]
        epsilon=1.0,
        steps=4,
        complete=True,
    )
    assert any("W&B got the rows while the job trained" in line for line in record["does_not_cover"]) == live


def test_a_failure_of_the_record_itself_stops_the_run(run_directory: Path) -> None:
    with open_tracker(run_directory, job()) as tracker:
        (run_directory / "metrics.jsonl").unlink()
        (run_directory / "metrics.jsonl").mkdir()
        with pytest.raises(Damaged):
            tracker.log(1, row(1), "finetune")


def test_status_says_the_state_and_nothing_private(run_directory: Path) -> None:
    with open_tracker(run_directory, job()) as tracker:
        tracker.status("running", stage="finetune", step=3, steps=80, epsilon=1.5)
        running = read_json(run_directory / "status.json")
        assert {"state": "running", "step": 3, "epsilon": 1.5}.items() <= running.items()
        with pytest.raises(PrivateValueError, match="loss may not be"):
            tracker.status("running", loss=0.5)
        tracker.status("failed", error="the disk is full")
        assert read_json(run_directory / "status.json")["error"] == "the disk is full"
        with pytest.raises(AssertionError):
            tracker.status("finished")


# W&B


def wandb_runs(directory: Path) -> list[WandbRun]:
    files = sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [read_run(path) for path in files]


@pytest.fixture(scope="module")
def two_starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after three starts: to step 7; from step 5 to the end of training; the evaluation."""
    directory = tmp_path_factory.mktemp("outputs") / "private_folder_name"
    directory.mkdir()
    (directory / "adapter").mkdir()
    (directory / "adapter" / "README.md").write_text("card")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(directory / "samples.png")
    with open_tracker(directory, job("offline")) as tracker:
        for step in range(8):
            tracker.log(step, row(step), "finetune")
        tracker.preempting()
        tracker.close(exit_code=1)
    with open_tracker(directory, job("offline"), resume_step=5) as tracker:
        for step in range(5, 12):
            tracker.log(step, row(step), "finetune")
        tracker.stage_ended("finetune")
        tracker.privacy({"epsilon": 9.99, "delta": 1e-5, "target_epsilon": math.inf, "covers": ["weights"]})
        tracker.images("samples", directory / "samples.png")
        tracker.preempting()
        tracker.close(exit_code=1)
    with open_tracker(directory, job("offline"), resume_step=12) as tracker:
        metrics = {"accuracy_cnn": 0.8, "accuracy_cnn_before": 0.1, "accuracy_cnn_real": 0.95}
        marks = {"private_metrics": ["accuracy_cnn"], "private_metrics_note": "not covered"}
        tracker.result({"metrics": metrics, "n_samples": 100, "seconds": {"finetune": 3.0}, **marks})
        tracker.adapter(directory / "adapter", also_offline=True)
        print("text of the console")
    return directory


def test_all_starts_are_one_wandb_run_whose_history_is_metrics_jsonl(two_starts: Path) -> None:
    first, second = wandb_runs(two_starts)
    assert {first.run_id, second.run_id} == {RUN_ID}
    assert (first.exit_code, second.exit_code) == (1, 0)
    history = [item for run in (first, second) for item in run.history if "stage" in item]
    rows = read_lines(two_starts / "metrics.jsonl")
    assert [item["_step"] for item in history] == list(range(12))
    for item, expected in zip(history, rows, strict=True):
        assert {name: value for name, value in item.items() if not name.startswith("_")} == expected


def test_wandb_knows_the_job(two_starts: Path) -> None:
    for run in wandb_runs(two_starts):
        assert (run.project, run.group, run.name) == ("dp-lora", "default", "lora.rank=8")
        assert run.job_type == "finetune+sample+evaluate"
        assert run.tags == ["rank8", "eps10"]
        assert run.config["lora"]["rank"] == 8
        assert run.config["privacy"]["epsilon"] == 10.0
        assert run.step_metric["epsilon"] == "step"
        assert run.step_metric["signal_to_noise"] == "epsilon"


def test_wandb_takes_the_names_and_the_folder_of_the_configuration(tmp_path: Path) -> None:
    config = job("offline")
    config.tracking.entity, config.tracking.project = "team-a", "scans"
    config.tracking.name, config.tracking.folder = "first try", str(tmp_path / "logs")
    (tmp_path / "run").mkdir()
    with open_tracker(tmp_path / "run", config) as tracker:
        tracker.log(1, row(1), "finetune")
        tracker.stage_ended("finetune")
    assert not (tmp_path / "run" / "wandb").exists()
    (found,) = wandb_runs(tmp_path / "logs")
    assert (found.entity, found.project, found.name) == ("team-a", "scans", "first try")
    assert "folder" not in found.config["tracking"] and str(tmp_path).encode() not in found.shown


def test_wandbs_summary_has_the_privacy_and_the_metrics(two_starts: Path) -> None:
    trained, run = wandb_runs(two_starts)
    assert trained.summary["privacy"] == {"epsilon": 9.99, "delta": 1e-5, "target_epsilon": "inf"}
    assert run.summary["accuracy_cnn"] == 0.8
    assert run.summary["result"]["seconds"] == {"finetune": 3.0}
    names = "accuracy_cnn, accuracy_cnn_before, accuracy_cnn_real"
    assert run.summary["result"]["private_metrics"] == names
    assert run.summary["result"]["private_metrics_note"].endswith("is not covered by epsilon")
    assert f"adapter-{RUN_ID}" in run.artifacts
    first, media = (next(i for i in one.history if "stage" not in i) for one in wandb_runs(two_starts))
    assert first["samples._type"] == "image-file"
    # metric, value, two baselines, and the note on what no epsilon covers
    assert (media["baselines.ncols"], media["baselines.nrows"]) == (5, 1)
    assert any(path.startswith("media/images/samples") for path in wandb_runs(two_starts)[0].files)


def test_wandb_holds_no_code_console_host_or_folder(two_starts: Path) -> None:
    secrets = ["dr_who", "patients", "text of the console", "test_tracker", "private_folder_name"]
    secrets += [f"{Path.home()}/", f'"{socket.gethostname()}"', f'"{getpass.getuser()}"']
    runs = wandb_runs(two_starts)
    assert len(runs) == 2
    for run in runs:
        assert not run.kinds & {"output", "output_raw", "stats", "environment"}
        assert run.host == ""
        assert not [secret for secret in secrets if secret.encode() in run.shown]
    assert {path.name for path in two_starts.glob("wandb/offline*/files/*")} == {"media"}


def test_wandb_sends_no_error_reports_whatever_the_environment_says(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    with open_tracker(run_directory, job("offline")) as tracker:
        tracker.stage_ended("finetune")
        service = [process.cmdline() for process in psutil.Process().children(recursive=True)]
        started = [words for words in service if any("wandb-core" in word for word in words)]
    assert started
    assert all("--no-observability" in words for words in started)


def test_the_check_for_folders_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "settings", dataclasses.asdict)
    with open_tracker(tmp_path, job("offline")) as tracker:
        tracker.stage_ended("finetune")
    (run,) = wandb_runs(tmp_path)
    assert b"dr_who" in run.shown


def test_a_frame_with_a_wrong_checksum_is_seen_and_a_cut_one_is_left_out(
    two_starts: Path, tmp_path: Path
) -> None:
    source = next(two_starts.glob("wandb/offline*/*.wandb"))
    data = source.read_bytes()
    copy = tmp_path / "copy.wandb"
    copy.write_bytes(data[:-3])
    assert read_run(copy).exit_code is None
    copy.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(ValueError, match="checksum"):
        read_run(copy)


KILLED_SERVICE = """
import sys, os, psutil
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.builders import tracked as t
directory = Path(sys.argv[1])
with t.open_tracker(directory, t.job("offline", data=t.PUBLIC)) as tracker:
    tracker.log(1, t.row(1), "finetune")
    children = psutil.Process().children(recursive=True)
    assert children
    for child in children:
        child.kill()
    psutil.wait_procs(children)
    for step in range(2, 6):
        tracker.log(step, t.row(step), "finetune")
    tracker.privacy({"epsilon": 1.0})
print("done")
"""


def test_the_death_of_wandb_is_said_once_and_the_record_goes_on(run_directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SERVICE, str(run_directory), str(Path(__file__).parents[2])],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert done.stderr.count("W&B stopped") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert [row["step"] for row in read_lines(run_directory / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert read_json(run_directory / "privacy.json") == {"epsilon": 1.0}


def test_a_wandb_that_cannot_start_does_not_stop_the_run(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**kwargs: Any) -> None:
        raise OSError(f"no {kwargs['mode']} today")

    monkeypatch.setattr("wandb.init", broken)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with caplog.at_level(logging.WARNING), open_tracker(run_directory, job("auto")) as tracker:
        tracker.log(1, row(1), "finetune")
        tracker.stage_ended("finetune")
    first, second = (record.getMessage() for record in caplog.records)
    assert "no online today" in first
    assert "no offline today" in second
    assert len(read_lines(run_directory / "metrics.jsonl")) == 1


def test_a_disabled_wandb_is_not_imported(run_directory: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from dp_lora.config.schema import Config, DataConfig, ModelConfig\n"
        "from dp_lora.records.tracker import Tracker\n"
        "c = Config(); c.tracking.wandb = 'disabled'\n"
        "Tracker(Path(sys.argv[1]), c, run_id='a', name='b').log(1, {'epsilon': 1.0}, 'finetune')\n"
        "print(sorted({'wandb', 'torch', 'tqdm'} & set(sys.modules)))"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_directory), root], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_the_table_of_baselines_has_a_row_a_metric() -> None:
    columns, rows = baseline_table(
        {"fd_lite0": 9.0, "fd_lite0_before": 90.0, "fd_lite0_real": 1.0, "n": 5, "accuracy_cnn_real": 1.0}
    )
    assert columns == ["metric", "value", "before", "real"]
    assert rows == [
        ["fd_lite0", 9.0, 90.0, 1.0],
        ["n", 5, None, None],
        ["accuracy_cnn_real", 1.0, None, None],
    ]
