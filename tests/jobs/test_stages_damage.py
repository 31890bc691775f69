"""Damaged files of a run: what costs nothing is made again, everything else is one line before anything."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import save

from dp_lora.__main__ import main
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs.job import _check_stages
from dp_lora.jobs.summary import summary
from dp_lora.records.run_directory import is_whole, result
from dp_lora.storage.files import Damaged, read_json, read_lines
from tests.builders.tiny import words

pytestmark = pytest.mark.usefixtures("unchecked")

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs and the ledger of a finished job; each test damages a copy."""
    folder = tmp_path_factory.mktemp("finished")
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            sys, "argv", ["dp-lora", *words(cache, folder / "outputs"), "stages=[finetune,sample]"]
        )
        main()
    GlobalHydra.instance().clear()
    return folder


@pytest.fixture
def directory(finished: Path, tmp_path: Path) -> Path:
    """The run directory of the copy."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, symlinks=True)
    (found,) = (tmp_path / "outputs" / "default").iterdir()
    return found


@pytest.fixture
def dp_lora(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Run:
    """Gives the job's command again: its exit status and the lines of stderr."""

    def call(stages: str = "finetune,sample") -> tuple[int, list[str]]:
        GlobalHydra.instance().clear()
        given = [*words(cache, tmp_path / "outputs"), f"stages=[{stages}]"]
        monkeypatch.setattr(sys, "argv", ["dp-lora", *given])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        GlobalHydra.instance().clear()
        return status, capfd.readouterr().err.splitlines()

    return call


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


JSON = "no JSON (it is empty); expected what this program wrote there"
ADAPTER = (
    "expected the files that the training left: put them back, or remove the folder, and the same command "
    "writes it again from checkpoint/ at no further epsilon"
)
WAY_OUT = "put it back, or remove the run directory to start again, and count what was spent"
GONE, ZEROS = b"gone", b"zeros"
"""What is done in place of writing these."""
REFUSED = {
    "privacy.json empty": ("privacy.json", b"", f"/privacy.json: {JSON}"),
    "privacy.json a list": (
        "privacy.json", b"[]", "/privacy.json: expected a JSON object as this program writes it"
    ),
    "privacy.json of nothing": ("privacy.json", b"{}", "/privacy.json: says nothing of delta; expected the"),
    "provenance.json empty": ("provenance.json", b"", f"/provenance.json: {JSON}"),
    "charge.json empty": ("checkpoint/charge.json", b"", f"/checkpoint/charge.json: {JSON}"),
    "plan.json empty": ("checkpoint/plan.json", b"\n", f"/checkpoint/plan.json: {JSON}"),
    "plan.json a list": ("checkpoint/plan.json", b"[]", "/checkpoint/plan.json: expected a JSON object as"),
    "plan.json a number": ("checkpoint/plan.json", b"1", "/checkpoint/plan.json: expected a JSON object as"),
    "plan.json deep": (
        "checkpoint/plan.json", b"[" * 100_000,
        "/checkpoint/plan.json: no JSON (nested too deeply); expected what this program wrote there",
    ),
    "adapter description deep": (
        "adapter/adapter_config.json", b"[" * 100_000,
        f"/adapter: adapter_config.json is missing or damaged; {ADAPTER}",
    ),
    "config.yaml empty": ("config.yaml", b"", "/config.yaml: says no longer what this run is ("),
    "config.yaml else": ("config.yaml", b"a: [", "/config.yaml: says no longer what this run is ("),
    "metrics.jsonl": ("metrics.jsonl", b"no json\n{}\n", "/metrics.jsonl, line 1: no JSON ("),
    "adapter description": (
        "adapter/adapter_config.json", b"", f"/adapter: adapter_config.json is missing or damaged; {ADAPTER}"
    ),
    "adapter weights empty": (
        "adapter/adapter_model.safetensors", b"", f"/adapter: adapter_model.safetensors is damaged; {ADAPTER}"
    ),
    "adapter weights cut off": (
        "adapter/trained.safetensors", None, f"/adapter: trained.safetensors is damaged; {ADAPTER}"
    ),
    "adapter weights gone": (
        "adapter/adapter_model.safetensors", GONE,
        f"/adapter: adapter_model.safetensors is missing; {ADAPTER}"
    ),
    "trained weights gone": (
        "adapter/trained.safetensors", GONE, f"/adapter: trained.safetensors is missing; {ADAPTER}"
    ),
    "adapter description gone": (
        "adapter/adapter_config.json", GONE, f"/adapter: adapter_config.json is missing or damaged; {ADAPTER}"
    ),
    "another description": (
        "adapter/adapter_config.json", b'{"r": 4}',
        f"/adapter: adapter_config.json is not the file that the training left; {ADAPTER}"
    ),
    "zeros at the end of the weights": (
        "adapter/adapter_model.safetensors", ZEROS,
        f"/adapter: adapter_model.safetensors is not the file that the training left; {ADAPTER}"
    ),
    "adapter.json empty": ("checkpoint/adapter.json", b"", f"/checkpoint/adapter.json: {JSON}"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_again_is_refused(
    name: str, directory: Path, dp_lora: Run, tmp_path: Path
) -> None:
    file, damage, expected = REFUSED[name]
    path = directory / file
    whole = path.read_bytes()
    if damage == GONE:
        path.unlink()
    else:
        path.write_bytes(
            whole[:-7] if damage is None else whole[:-64] + bytes(64) if damage == ZEROS else damage
        )
    before = content(tmp_path)
    status, lines = dp_lora()
    assert status == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"dp-lora: {directory}{expected}")
    assert lines[0].endswith(WAY_OUT) or file in ("config.yaml",) or "adapter" in file
    assert content(tmp_path) == before, "nothing was written and nothing charged"


A_FOLDER = {
    "privacy.json": "/privacy.json: a folder; expected a file as this program writes it",
    "metrics.jsonl": "/metrics.jsonl: a folder; expected a file as this program writes it",
    "checkpoint/charge.json": "/checkpoint/charge.json: a folder; expected a file as this program writes it",
    "adapter/adapter_config.json": f"/adapter: adapter_config.json is missing or damaged; {ADAPTER}",
    "adapter/trained.safetensors": f"/adapter: trained.safetensors is damaged; {ADAPTER}",
}


@pytest.mark.parametrize("name", A_FOLDER)
def test_a_folder_in_the_place_of_a_file_is_damage(
    name: str, directory: Path, dp_lora: Run, tmp_path: Path
) -> None:
    (directory / name).unlink()
    (directory / name).mkdir()
    before = content(tmp_path)
    way_out = "" if name.startswith("adapter") else f": {WAY_OUT}"
    assert dp_lora() == (2, [f"dp-lora: {directory}{A_FOLDER[name]}{way_out}"])
    assert content(tmp_path) == before, "nothing was written and nothing charged"


def test_an_adapter_that_is_gone_is_written_again_at_no_epsilon(
    directory: Path, dp_lora: Run, tmp_path: Path
) -> None:
    adapter, ledger = content(directory / "adapter"), tmp_path / "outputs.privacy_ledger.jsonl"
    spent = read_lines(ledger)[-1]["steps"]
    for path in (directory / "adapter").iterdir():
        path.unlink()
    status, lines = dp_lora()
    assert (status, lines) == (2, [f"dp-lora: {directory}/adapter: it holds no weights; {ADAPTER}"])
    (directory / "adapter").rmdir()
    status, _ = dp_lora()
    assert status == 0
    assert content(directory / "adapter") == adapter
    assert {row["steps"] for row in read_lines(ledger)} == {spent}


def test_an_adapter_without_a_record_goes_on_as_before(directory: Path, dp_lora: Run) -> None:
    """As earlier versions left it; half of it is still refused."""
    (directory / "checkpoint" / "adapter.json").unlink()
    (directory / "adapter" / "README.md").write_text("my own card")
    assert dp_lora()[0] == 0
    (directory / "adapter" / "adapter_model.safetensors").unlink()
    assert dp_lora()[1][0].startswith(f"dp-lora: {directory}/adapter: adapter_model.safetensors is missing; ")


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half", None])
def test_damaged_samples_are_drawn_again(damage: bytes | None, directory: Path, dp_lora: Run) -> None:
    path = directory / "samples.npz"
    with np.load(path) as saved:
        images = saved["images"]
    path.write_bytes(path.read_bytes()[:-30] if damage is None else damage)
    status, lines = dp_lora("evaluate")
    assert status == 2 and len(lines) == 1
    assert lines[0].endswith(f"evaluate needs {path}; expected sample among the stages")
    status, lines = dp_lora()
    assert status == 0 and f"sample: {path} is damaged and is made again" in lines
    with np.load(path) as saved:
        assert (saved["images"] == images).all()


def test_a_result_whose_metrics_are_a_list_is_none(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"metrics": []}')
    assert not is_whole(tmp_path, "evaluate") and result(tmp_path) == {}
    (tmp_path / "result.json").write_text('{"metrics": {"fd_lite0": 1.0}}')
    assert is_whole(tmp_path, "evaluate") and result(tmp_path)["metrics"] == {"fd_lite0": 1.0}


@pytest.mark.parametrize("damage", [b"", b'{"state": "do', b"[]", b"{}"])
def test_a_damaged_status_is_written_again(damage: bytes, directory: Path, dp_lora: Run) -> None:
    (directory / "status.json").write_bytes(damage)
    (directory / "result.json").write_bytes(b"")
    status, lines = dp_lora()
    assert status == 0 and not any("Traceback" in line for line in lines)
    assert read_json(directory / "status.json")["state"] == "done"


def test_half_a_line_of_metrics_is_cut_off(directory: Path, dp_lora: Run) -> None:
    path = directory / "metrics.jsonl"
    rows = read_lines(path)
    with path.open("ab") as file:
        file.write(b'{"stage": "finetune", "st')
    (directory / "status.json").write_bytes(b"")
    assert dp_lora()[0] == 0
    assert read_lines(path) == rows and path.read_bytes().endswith(b"}\n")


def test_what_is_no_json_says_why(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, reason in (
        (b"", "it is empty"),
        (b'{"a": ', "Expecting value"),
        (b"\xff", "codec can't decode"),
    ):
        path.write_bytes(text)
        with pytest.raises(Damaged, match=f"a.json: no JSON .*{reason}"):
            read_json(path)


def test_samples_of_which_a_byte_is_changed_are_not_whole(tmp_path: Path) -> None:
    """Wherever the byte lies, what counts as whole can be loaded as it was written."""
    path, rng = tmp_path / "samples.npz", np.random.default_rng(0)
    arrays = {"images": rng.integers(0, 256, (2, 1, 8, 8), np.uint8), "labels": np.arange(2)}
    np.savez_compressed(path, classes=np.array(["a", "b"]), **arrays)
    assert is_whole(tmp_path, "sample")
    whole = path.read_bytes()
    missed = []
    for at in range(0, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        if is_whole(tmp_path, "sample"):
            with np.load(path) as found:
                missed += [at] if any((found[name] != arrays[name]).any() for name in arrays) else []
    assert not missed


def test_a_finished_run_without_its_statement_says_so(tmp_path: Path) -> None:
    job: Any = SimpleNamespace(directory=tmp_path)
    (tmp_path / "adapter").mkdir()
    assert summary(job, {}).splitlines()[0] == (
        f"what was spent is not known here: {tmp_path}/privacy.json is missing; put it back, or read it in "
        "adapter/README.md and in the ledger (python -m sweeps bill)"
    )


def test_a_release_is_refused_where_there_is_no_statement_to_add_to(tmp_path: Path) -> None:
    config = Config()
    config.evaluation.release, config.stages = "dp", ["sample", "evaluate"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "trained.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    with pytest.raises(UserError, match=f"{tmp_path}/privacy.json: is missing; expected what the training"):
        _check_stages(config, tmp_path)
    (tmp_path / "privacy.json").write_text("{}")
    _check_stages(config, tmp_path)
