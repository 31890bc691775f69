"""W&B online: one run over all its starts, what it shows and what it does not, against a backend of our own.

The real wandb-core talks to `wandb_server` on 127.0.0.1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

from dp_lora.config.schema import Config
from dp_lora.records import manifest
from dp_lora.records.tracker import Tracker
from dp_lora.storage.files import read_lines
from sweeps.dashboard import dashboard
from tests.builders.bill_runs import logged_run
from tests.builders.tracked import RUN_ID, job, open_tracker, row
from tests.builders.wandb_file import read_run
from tests.builders.wandb_server import ENTITY, KEY, Backend, serving

pytestmark = pytest.mark.usefixtures("unchecked")

METRICS = {
    "accuracy_cnn": 0.8,
    "accuracy_cnn_before": 0.1,
    "accuracy_cnn_real": 0.95,
    "inception_score": 2.5,
    "inception_score_before": 1.5,
}


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with serving() as served, pytest.MonkeyPatch.context() as patched:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patched.delenv(name)
        patched.setenv("WANDB_BASE_URL", served.url)
        patched.setenv("WANDB_API_KEY", KEY)
        yield served
        wandb.teardown()


def setting(mode: str, group: str = "rank") -> Config:
    config = job(mode)
    config.tracking.group = group
    return config


def directory_of(folder: Path) -> Path:
    directory = folder / "private_folder_name"
    (directory / "adapter").mkdir(parents=True)
    (directory / "adapter" / "README.md").write_text("card")
    (directory / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(directory / "samples.png")
    return directory


def two_starts(directory: Path, mode: str) -> None:
    """A start that is preempted after step 7, one that trains from step 5 to the end, and the rest."""
    with open_tracker(directory, setting(mode)) as tracker:
        for step in range(8):
            tracker.log(step, row(step), "finetune")
        tracker.preempting()
        tracker.close(exit_code=1)
    with open_tracker(directory, setting(mode), resume_step=5) as tracker:
        for step in range(5, 12):
            tracker.log(step, row(step), "finetune")
        tracker.stage_ended("finetune")
        tracker.privacy({"epsilon": 9.99, "delta": 1e-5, "complete": True})
        tracker.images("samples", directory / "samples.png")
        tracker.preempting()
        tracker.close(exit_code=1)
    with open_tracker(directory, setting(mode), resume_step=12) as tracker:
        tracker.result({"metrics": METRICS, "n_samples": 100})
        tracker.adapter(directory / "adapter")


@pytest.fixture(scope="module")
def online(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose two starts were online."""
    directory = directory_of(tmp_path_factory.mktemp("online"))
    two_starts(directory, "online")
    return directory


def test_a_preempted_run_stays_one_run_whose_history_is_metrics_jsonl(backend: Backend, online: Path) -> None:
    run = backend.runs["dp-lora", RUN_ID]
    assert backend.starts == 2 and run.preempted and run.state == "finished" and run.exit_code == 0
    history = [item for item in run.history if "stage" in item]
    rows = read_lines(online / "metrics.jsonl")
    assert [item["_step"] for item in history] == list(range(12))
    for item, expected in zip(history, rows, strict=True):
        assert {name: value for name, value in item.items() if not name.startswith("_")} == expected
    assert backend.unknown == []


def test_nothing_is_sent_before_the_private_training_has_ended(backend: Backend, tmp_path: Path) -> None:
    """So that the times at which rows arrive tell nothing of the steps, and W&B's clocks begin after them."""
    config = setting("online", group="quiet")
    with Tracker(tmp_path, config, run_id="4567cdef", name="lora.rank=8") as tracker:
        for step in range(3):
            tracker.log(step, row(step), "finetune")
            tracker.privacy({"epsilon": 1.0, "complete": False})
        assert ("dp-lora", "4567cdef") not in backend.runs and not (tmp_path / "wandb").exists()
        tracker.stage_ended("finetune")
        assert ("dp-lora", "4567cdef") in backend.runs
    history = backend.runs["dp-lora", "4567cdef"].history
    assert [item["step"] for item in history] == [0, 1, 2]
    assert len({item["_timestamp"] for item in history}) == 1


def test_the_backend_knows_the_job(backend: Backend, online: Path) -> None:
    run = backend.runs["dp-lora", RUN_ID]
    assert (run.group, run.job_type, run.display_name) == ("rank", "finetune+sample+evaluate", "lora.rank=8")
    assert run.tags == ["rank8", "eps10"]
    assert run.config["lora"]["value"]["rank"] == 8
    assert run.config["privacy"]["value"]["epsilon"] == 10.0
    assert run.summary["privacy"] == {"epsilon": 9.99, "delta": 1e-5, "complete": True}
    assert run.summary["accuracy_cnn"] == 0.8 and run.summary["epsilon"] == {"last": 1.1}
    axes = {axis.get("1") or axis.get("2"): axis for axis in run.config["_wandb"]["value"]["m"]}
    assert {"epsilon", "signal_to_noise", "update_norm"} <= axes.keys()


def test_images_tables_and_the_adapter_arrive(backend: Backend, online: Path) -> None:
    run = backend.runs["dp-lora", RUN_ID]
    images = {name: data for name, data in run.files.items() if name.startswith("media/images/samples")}
    assert list(images.values()) == [(online / "samples.png").read_bytes()]
    (table,) = [
        json.loads(data) for name, data in run.files.items() if name.startswith("media/table/baselines")
    ]
    assert table["columns"] == ["metric", "value", "before", "real", "note"]
    assert table["data"] == [
        ["accuracy_cnn", 0.8, 0.1, 0.95, manifest.UNCOVERED_NOTE],
        ["inception_score", 2.5, 1.5, None, ""],
    ]
    (adapter,) = [a for a in backend.artifacts.values() if a.type == "model"]
    assert adapter.committed and adapter.name == f"adapter-{RUN_ID}"
    assert adapter.files["README.md"] == b"card"
    assert adapter.files["adapter_model.safetensors"] == b"weights"


def test_nothing_else_arrives(backend: Backend, online: Path) -> None:
    run = backend.runs["dp-lora", RUN_ID]
    secrets = ["dr_who", "patients", "private_folder_name", f"{Path.home()}/", "test_tracker_online"]
    sent = json.dumps([run.config, run.summary, run.history, run.lines]).encode() + b"".join(
        run.files.values()
    )
    assert not [secret for secret in secrets if secret.encode() in sent]
    kinds = {name.split("/")[0] for name in run.files}
    assert kinds <= {"media", "config.yaml", "wandb-summary.json"}, kinds
    assert not run.lines.get("output.log")
    assert not any("system." in line for line in run.lines.get("wandb-events.jsonl", {}).values())


def test_offline_starts_are_synced_into_one_run(backend: Backend, tmp_path: Path) -> None:
    directory = directory_of(tmp_path)
    two_starts(directory, "offline")
    del backend.runs["dp-lora", RUN_ID]
    starts = sorted(directory.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(starts) == 2
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, starts)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = backend.runs["dp-lora", RUN_ID]
    steps = [item["step"] for item in run.history if "stage" in item]
    assert steps == list(range(12))
    assert run.summary["accuracy_cnn"] == 0.8 and run.summary["privacy"]["epsilon"] == 9.99
    assert any(name.startswith("media/images/samples") for name in run.files)
    assert backend.unknown == []


def test_the_runs_of_a_sweep_are_found_by_their_group(backend: Backend, online: Path) -> None:
    api = wandb.Api()
    (found,) = api.runs(f"{ENTITY}/dp-lora", filters={"group": "rank"})
    assert found.id == RUN_ID and found.summary["accuracy_cnn"] == 0.8
    assert found.config["lora"]["rank"] == 8
    assert not list(api.runs(f"{ENTITY}/dp-lora", filters={"group": "another"}))


AWAY = """
import sys, wandb
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.builders import tracked as t
import dp_lora.records.tracker as tracking
patient = tracking._settings
def impatient_once():
    settings = patient()
    settings.init_timeout = 2
    tracking._settings = patient
    return settings
tracking._settings = impatient_once
with t.open_tracker(Path(sys.argv[1]), t.job("auto")) as tracker:
    tracker.log(1, t.row(1), "finetune")
    tracker.stage_ended("finetune")
"""


def test_a_backend_that_is_away_leaves_an_offline_run(tmp_path: Path) -> None:
    # In a process of its own, since wandb reads its settings once.
    with serving() as gone:
        pass
    root = Path(__file__).parents[2]
    environment = {
        "WANDB_BASE_URL": gone.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "PYTHONPATH": str(root)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", AWAY, str(tmp_path), str(root)], capture_output=True, text=True,
        timeout=900, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be reached") == 1 and "Traceback" not in done.stderr
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [1]
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [item["step"] for item in read_run(file).history] == [1]


def test_the_dashboard_of_a_sweep_is_saved_in_its_project(backend: Backend, tmp_path: Path) -> None:
    runs = [logged_run(tmp_path / "default" / "a", metrics=METRICS, private_metrics=[])]
    (tmp_path / "rank").mkdir()
    where = dashboard(tmp_path / "rank", runs)
    (view,) = backend.views
    assert (view["entityName"], view["projectName"]) == (ENTITY, "dp-lora")
    assert view["displayName"] == "rank: privacy and utility"
    spec = json.loads(view["spec"])
    assert "summary:privacy.epsilon" in json.dumps(spec) and where.startswith("http")
    assert not list((tmp_path / "rank").iterdir()) and backend.unknown == []
