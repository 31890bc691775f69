"""The dashboard as code: its panels ask for what runs log, it is whole offline, and it says what it cost."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dp_lora.errors import UserError
from dp_lora.records.manifest import settings
from dp_lora.records.tracker import RELEASED
from dp_lora.storage.files import read_json
from sweeps import dashboard as dashboards
from sweeps.dashboard import SETTINGS, Shown, dashboard, look
from tests.builders.bill_runs import logged_run
from tests.builders.tracked import job

METRICS = {"accuracy_cnn": 0.8, "accuracy_cnn_before": 0.1, "fd_lite0": 12.0, "fd_lite0_before": 80.0}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    done = logged_run(tmp_path / "default" / "a", metrics=METRICS, private_metrics=["accuracy_cnn"])
    return [done, logged_run(tmp_path / "default" / "b"), tmp_path / "default" / "missing"]


def every(node: Any, name: str) -> Iterator[Any]:
    """All values under `name`, however deep."""
    if isinstance(node, dict):
        if name in node:
            yield node[name]
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from every(part, name)


def test_what_runs_have_to_show(runs: list[Path]) -> None:
    assert look(runs) == Shown("dp-lora", ("rank",), ("accuracy_cnn", "fd_lite0"), ("accuracy_cnn",))
    alone = logged_run(runs[0].parent / "c", group=None)
    assert look([alone]).groups == ("default",), "what the job itself tells W&B"


def test_without_a_key_the_workspace_is_a_file(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "rank").mkdir()
    assert dashboard(tmp_path / "rank", runs) == str(tmp_path / "rank" / "dashboard.json")
    written = read_json(tmp_path / "rank" / "dashboard.json")
    assert written["project"] == "dp-lora" and written["displayName"] == "rank: privacy and utility"
    axes = [(panel["xAxis"], panel["yAxis"]) for panel in every(written, "config") if "yAxis" in panel]
    text = json.dumps(written)
    for metric in ("accuracy_cnn", "fd_lite0"):
        assert ("summary:privacy.epsilon", f"summary:{metric}") in axes
        assert ("config:lora.value.rank", f"summary:{metric}") in axes
        assert ("config:privacy.value.noise_multiplicity", f"summary:{metric}") in axes
        assert ("summary:privacy.noise_multiplier", f"summary:{metric}") in axes
    names = {section["name"] for section in next(every(written, "sections"))}
    assert {
        "Privacy and utility",
        "Training",
        "Samples",
        "fd_lite0",
        "accuracy_cnn (on private images)",
    } <= names
    assert ["samples"] in list(every(written, "mediaKeys"))
    assert "mnist: 2 runs, 160 steps" in text and "at delta 1e-05" in text
    assert '"rank"' in json.dumps(list(every(written, "filters")) + list(every(written, "filtersV2")))
    assert str(tmp_path) not in text


def test_panels_ask_for_values_that_a_job_logs(runs: list[Path]) -> None:
    config = settings(job())
    for place in SETTINGS.values():
        where, _, name = place.partition(":")
        group, _, field = name.partition(".")
        if where == "config":
            assert field in config[group]
        else:
            # privacy.json, which the summary holds as `privacy`.
            assert group == "privacy" and field in read_json(runs[0] / "privacy.json")
    section = dashboards._step_section(Shown("p", ("g",), (), private_loss=True))
    asked = {name for panel in section.panels for name in [panel.x, *panel.y]}
    assert {getattr(name, "name", name) for name in asked} <= RELEASED


def test_what_cannot_be_shown_is_one_line(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no run of this sweep has begun"):
        dashboard(tmp_path, [tmp_path / "missing"])
    with pytest.raises(UserError, match="the runs are in dp-lora, another; expected one project"):
        dashboard(tmp_path, [*runs, logged_run(tmp_path / "x", project="another")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb-workspaces is not installed.*pip install"):
        dashboard(tmp_path, runs)
    assert not (tmp_path / "dashboard.json").exists()
