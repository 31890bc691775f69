"""Tidy rows from run directories: what failed and what is missing among them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest

from dp_lora.config.identity import fingerprint
from dp_lora.errors import UserError
from sweeps.collect import COLUMNS, collect, frame, metric_names, run_row, write_frame
from sweeps.folders import find, read
from tests.builders.sweep_folder import SHA, configured, grid, write_run, write_sweep

STATES = ["done", "failed", "running", "missing", "done"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "outputs", "mine", grid(seed=range(5)), STATES)


def directory(sweep: Path, cell: int) -> Path:
    return read(sweep).cells[cell].directory


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_cell_is_a_row_whatever_became_of_it(sweep: Path) -> None:
    rows = collect([read(sweep)])
    assert [row["cell"] for row in rows] == [f"seed={n}" for n in range(5)]
    assert [row["state"] for row in rows] == STATES
    assert {row["setting"] for row in rows} == {"defaults"}
    done, failed, running, missing, _ = rows
    assert done["epsilon"] == 10 and done["delta"] == 1e-5 and done["seconds"] == 272
    assert done["code"] == SHA[:12] and done["reference"] == "test, n=1000" and 0.8 < done["accuracy_cnn"] < 1
    assert failed["error"] == "OutOfMemoryError" and failed["seconds"] is None
    assert (running["steps"], running["planned_steps"]) == (40, 80) and 7 < running["epsilon"] < 7.1
    assert missing == missing | {"rank": None, "epsilon": None, "data": None}
    assert [row["state"] for row in collect([read(sweep)], ended=True)] == [
        "done", "failed", "failed", "missing", "done"
    ]  # fmt: skip


def test_the_line_of_a_failed_start_stays_where_it_is(sweep: Path) -> None:
    missing = read(sweep).cells[3]
    (sweep / "cells" / f"{missing.identity}.failed").write_text("data.source=/secret/name: no such folder\n")
    row = collect([read(sweep)])[3]
    assert (row["state"], row["error"]) == ("failed", "see its log")


def test_settings_are_those_of_the_configuration(tmp_path: Path) -> None:
    choice = {
        "trainable.components": ["lora", "bias", "embedder"], "lora.target_modules": ["qkv"], "lora.rank": 4,
        "privacy.epsilon": math.inf, "data.name": "celeba", "data.image_size": 64, "seed": 3,
    }  # fmt: skip
    config = configured(tmp_path, choice)
    row = run_row(write_run(tmp_path / "default" / f"x-{fingerprint(config)}", config))
    assert row["trainable"] == "lora(qkv)+bias" and row["rank"] == 4 and row["data"] == "celeba64"
    assert row["target_epsilon"] == row["epsilon"] == math.inf and row["seed"] == 3
    config = dataclasses.replace(
        config, trainable=dataclasses.replace(config.trainable, components=["embedder"])
    )
    row = run_row(write_run(tmp_path / "default" / "y-00000000", config))
    assert row["trainable"] == "embedder" and row["rank"] is None


def test_a_folder_of_runs_is_collected_too(tmp_path: Path) -> None:
    write_sweep(tmp_path, "mine", grid(lora__rank=[4, 8], seed=[0, 1]))
    (found,) = find([tmp_path / "default"])
    assert not found.launched
    rows = collect([found])
    assert len(rows) == 4 and {row["rank"] for row in rows} == {4, 8}
    assert len({row["setting"] for row in rows}) == 2, "seeds apart, the runs of a rank are of one setting"


def test_sweeps_are_found_by_their_folder_or_in_outputs(
    tmp_path: Path, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path / "outputs", "other", grid(seed=[7]))
    monkeypatch.chdir(tmp_path)
    assert [found.folder.name for found in find([])] == ["mine", "other"]
    assert [found.folder.name for found in find([sweep, tmp_path / "outputs/sweeps"])] == ["mine", "other"]
    monkeypatch.chdir(tmp_path / "outputs")
    with pytest.raises(UserError, match="outputs/sweeps: no sweep and no run is in it; expected"):
        find([])


def test_a_sweep_that_was_moved_is_found_beside_its_runs(tmp_path: Path, sweep: Path) -> None:
    shutil.move(tmp_path / "outputs", tmp_path / "elsewhere")
    rows = collect([read(tmp_path / "elsewhere" / "sweeps" / "mine")])
    assert [row["state"] for row in rows] == STATES


def test_the_frame_is_tidy_and_keeps_whole_numbers(sweep: Path, tmp_path: Path) -> None:
    rows = collect([read(sweep)])
    table = frame(rows)
    assert list(table.columns[: len(COLUMNS)]) == list(COLUMNS) and len(table) == 5
    written = write_frame(rows, tmp_path / "runs.csv")
    assert [path.name for path in written] == ["runs.csv", "runs.parquet"]
    for again in (pandas.read_csv(written[0]), pandas.read_parquet(written[1])):
        assert list(again["state"]) == STATES
        assert again["accuracy_cnn"].notna().tolist() == [True, False, False, False, True]
    assert ",8,2," in written[0].read_text().splitlines()[1], "rank and k are no 8.0 and 2.0"


def test_metrics_are_told_from_their_baselines(sweep: Path) -> None:
    assert metric_names(collect([read(sweep)])) == ["accuracy_cnn", "fd_lite0", "kid_lite0"]


Break = Callable[[Path], object]


def half_written(sweep: Path) -> None:
    path = directory(sweep, 0) / "result.json"
    path.write_text(path.read_text()[:40])


def two_claims(sweep: Path) -> None:
    first = directory(sweep, 0)
    shutil.copytree(first, first.with_name("other-" + first.name.rpartition("-")[2]))


def foreign(sweep: Path) -> None:
    record = json.loads((sweep / "sweep.json").read_text())
    record["cells"][0]["directory"] = record["cells"][1]["directory"]
    (sweep / "sweep.json").write_text(json.dumps(record))


def of_first(name: str, text: str | None = None) -> Break:
    """Breaks a file of the first cell: other text, or none at all."""

    def breaks(sweep: Path) -> None:
        path = directory(sweep, 0) / name
        path.unlink() if text is None else path.write_text(text)

    return breaks


def of_last(name: str, **values: object) -> Break:
    """Changes a file of the last cell."""
    return lambda sweep: change(directory(sweep, 4) / name, **values)


OTHER = {"lite0": {"version": "2", "preprocessing": "-"}}
REFUSED: dict[str, tuple[Break, str]] = {
    "half-written": (half_written, r"result.json: no JSON \(.*\); expected a file that dp-lora wrote"),
    "no object": (of_first("status.json", "[]"), "expected a JSON object, found list"),
    "no privacy": (of_first("privacy.json"), r"done, and without privacy\.json; expected"),
    "two claims": (two_claims, "both claim cell .* of mine; expected one: move the other away"),
    "foreign cell": (foreign, "is not the directory of cell"),
    "foreign privacy": (
        of_last("privacy.json", noise_multiplicity=9),
        r"privacy.json is of another run \(noise_multiplicity=9, config.yaml has 2\); expected",
    ),
    "no settings": (of_first("config.yaml", "a: 1"), "not the settings of a run"),
    "no YAML": (of_first("config.yaml", "a: ["), r"config\.yaml: no YAML"),
    "no sweep": (lambda s: change(s / "sweep.json", cells=[{}]), "not the record of a sweep; expected comm"),
    "code": (
        of_last("provenance.json", git={"sha": "f" * 40, "dirty": "0123"}),
        r"the runs mix code versions: e33cf45027fa in 3 runs, f{12}\+0123 in 1 run; expected one. --mixed",
    ),
    "extractor": (
        of_last("result.json", extractors=OTHER),
        "the runs mix extractors on mnist5k: .*lite0: 2; - in 1 run; expected one",
    ),
    "images": (of_last("result.json", n_samples=9), "mix n_samples on mnist5k"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_collected_is_one_line(name: str, sweep: Path) -> None:
    breaks, expected = REFUSED[name]
    breaks(sweep)
    with pytest.raises(UserError, match=expected) as said:
        collect([read(sweep)])
    assert "\n" not in str(said.value)


def test_one_delta_a_private_set(tmp_path: Path) -> None:
    two = grid(privacy__delta=[1e-5, 1e-6])
    folder = write_sweep(tmp_path / "same", "mine", two)
    with pytest.raises(UserError, match="mix deltas on mnist5k: delta=1e-05 in 1 run, delta=1e-06 in 1 run"):
        collect([read(folder)])
    assert len(collect([read(folder)], mixed=True)) == 2
    apart = [{**choice, "data.name": name} for choice, name in zip(two, ("mnist", "cifar10"), strict=True)]
    assert len(collect([read(write_sweep(tmp_path / "apart", "mine", apart))])) == 2


def test_a_run_directory_is_a_folder_of_one_run(sweep: Path) -> None:
    (found,) = find([sweep])
    run = found.cells[0].directory
    (alone,) = find([run])
    assert [cell.directory.resolve() for cell in alone.cells] == [run.resolve()] and not alone.launched
