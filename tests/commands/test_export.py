"""`dp-lora export`: exactly what the manifest lists, whole or not at all, from finished runs only."""

from __future__ import annotations

import dataclasses
import math
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dp_lora.commands import export as export_command
from dp_lora.config.identity import PRIVATE_SETTINGS, readable
from dp_lora.config.load import from_omegaconf
from dp_lora.config.schema import Config
from dp_lora.records import manifest
from dp_lora.storage.files import append_line, read_json, write_json
from tests.builders.exported import NOTE, PLAN, RESULT, export, refused, save_samples

pytestmark = pytest.mark.usefixtures("unchecked")

Change = Callable[[Path], None]


def test_exactly_what_the_manifest_lists_is_copied(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "new" / "out")
    assert {path.name for path in folder.iterdir()} == set(manifest.FILES) - {"images"}
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md"
    }  # fmt: skip
    kept = {"label_counts"}
    assert read_json(folder / "privacy.json") == {k: v for k, v in PLAN.items() if k not in kept}
    (row,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert row == '{"stage": "finetune", "step": 1, "update_norm": 0.5}'
    assert read_json(folder / "provenance.json") == {
        "git": {}, "hardware": {"system": None, "cpu": None, "gpu": None}
    }  # fmt: skip
    assert read_json(folder / "result.json") == {
        "metrics": {"inception_score": 2.0}, "intervals": {}, "private_metrics": [],
        "private_metrics_note": "", "reference": {"split": "test"}, "n_samples": 40,
        "seconds": {"finetune": 100.0, "sample": 3.0}, "peak_memory_bytes": 1 << 30,
        "audit": {"epsilon": 2.0},
        "left_out": ["accuracy_cnn", "audit.membership_inference"], "left_out_note": NOTE,
    }  # fmt: skip


def test_what_is_not_covered_is_marked_when_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    result = read_json(export(run, tmp_path / "out", "--with-uncovered") / "result.json")
    assert result["metrics"] == RESULT["metrics"] and result["reference"] == RESULT["reference"]
    assert result["private_metrics"] == RESULT["private_metrics"]
    assert result["private_metrics_note"] == NOTE and "batch_sizes" not in result


def test_the_number_of_images_is_nowhere_under_add_or_remove(run: Path, tmp_path: Path) -> None:
    words = {**PLAN, "adjacency": "add or remove one image, Poisson sampling", "num_examples": 1489}
    write_json(run / "privacy.json", words)
    text = (run / "config.yaml").read_text().replace("zero_out", "add_or_remove")
    (run / "config.yaml").write_text(text.replace("sample_rate: null", "sample_rate: 0.04"))
    folder = export(run, tmp_path / "out")
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"1489" not in everything
    assert "train_size" not in OmegaConf.load(folder / "config.yaml").data


def test_the_settings_are_those_of_a_job_without_folders_and_seeds(run: Path, tmp_path: Path) -> None:
    exported = OmegaConf.load(export(run, tmp_path / "out") / "config.yaml")
    config = from_omegaconf(exported)  # type: ignore[arg-type]
    assert config.model.name == "tiny8" and config.train.max_steps == 4
    assert config.paths == Config().paths and config.resources == Config().resources


def test_all_files_have_one_date_and_the_empty_folder_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    folder = export(run, tmp_path / "out")
    assert {path.stat().st_mtime for path in [folder, *folder.rglob("*")]} == {315532800.0}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "outputs"}


REFUSED: dict[str, tuple[Change, str]] = {
    "unfinished": (lambda run: write_json(run / "status.json", {"state": "running"}), "the run is running"),
    "failed": (lambda run: write_json(run / "status.json", {"state": "failed"}), "the run is failed"),
    "incomplete": (lambda run: write_json(run / "privacy.json", {**PLAN, "complete": False}), "finished one"),
    "no run": (lambda run: (run / "config.yaml").unlink(), "no config.yaml in it"),
    "torn": (lambda run: (run / "privacy.json").write_text("{"), "cannot be read"),
    "no guarantee": (
        lambda run: write_json(run / "privacy.json", {**PLAN, "epsilon": "inf"}), "no privacy guarantee"
    ),
    "seeded": (
        lambda run: write_json(run / "privacy.json", {**PLAN, "reproducible_noise": True}),
        "no privacy guarantee",
    ),
    "more steps": (
        lambda run: append_line(run / "metrics.jsonl", {"stage": "finetune", "step": 10**6, "epsilon": 1.0}),
        "names step 1000000",
    ),
    "a stranger": (lambda run: (run / "adapter" / "batch.npz").touch(), "does not belong to an adapter"),
    "a link": (
        lambda run: ((run / "samples.png").unlink(), (run / "samples.png").symlink_to(run / "config.yaml")),
        "is a link",
    ),
    "more arrays": (lambda run: save_samples(run, images=[0], labels=[0], private=[1]), "expected images"),
    "a path": (
        lambda run: (run / "adapter" / "README.md").write_text(f"base model: {run.parent}"), "names "
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_may_not_leave_is_one_line_and_leaves_nothing(
    why: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = REFUSED[why]
    change(run)
    assert said in refused(capsys, run, tmp_path / "out")


def test_a_folder_with_something_in_it_and_one_in_the_run_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "is not empty" in refused(capsys, run, tmp_path / "full")
    assert "is not empty" in refused(capsys, run, tmp_path / "full" / "mine")
    assert "lies in the run directory" in refused(capsys, run, run / "out")


def test_a_crash_leaves_no_half_of_an_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_command, "_date", dies)
    with pytest.raises(SystemExit):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_run_without_a_guarantee_leaves_when_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    write_json(run / "privacy.json", {**PLAN, "epsilon": math.inf})
    assert (export(run, tmp_path / "out", "--with-uncovered") / "adapter").is_dir()
    shutil.rmtree(run / "checkpoint")  # a copy without its private folder
    export(run, tmp_path / "again", "--with-uncovered")


# Names


TEXTS = {
    "experiment", "stages", "trainable.components", "lora.target_modules", "sampler.name",
    "privacy.clipping", "privacy.adjacency", "tracking.wandb", "tracking.project", "tracking.group",
    "tracking.tags", "tracking.progress", "resources.device",
    *(f"train.{name}" for name in ("schedule", "precision", "microbatch")),
    *(f"evaluation.{name}" for name in ("extractors", "reference", "classifiers", "release")),
    *(f"model.{name}" for name in ("name", "prompt", "conditioning", "autoencoder.kind")),
    "model.scheduler.beta_schedule",
    *("optimize", "sampler.classes", "sampler.export", "tracking.name", "tracking.entity"),
    *("train.timesteps", "model.base_precision", "trainable.choice", "trainable.candidates"),
    # Only the default of a search is ever exported: `sweeps.search.cells_of`.
    *(f"search.{name}" for name in ("space", "distribution", "score")),
    *(f"model.pretrain.{name}" for name in ("reconstruction", "schedule", "precision")),
    *(
        f"{data}.{name}"
        for data in ("data", "public_data")
        for name in ("name", "resample", "attribute", "image_column", "label_column", "caption_column",
                     "person_column", "classes", "background", "layout")
    ),
    *("privacy.unit", "public_data.person_pattern"),  # the latter is null in every configuration
}  # fmt: skip
"""Settings that hold words and may leave: choices, labels, and names of columns and classes."""


def texts(kind: type, prefix: str = "") -> set[str]:
    """Dotted names of the settings that can hold text."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= texts(typing.cast(type, hint), f"{prefix}{name}.")
        elif "str" in str(hint) or hint is typing.Any:
            found.add(prefix + name)
    return found


def test_every_setting_that_can_hold_words_is_private_or_known_to_be_harmless() -> None:
    private = {
        name for name in texts(Config) if f"{name}.".startswith(tuple(f"{p}." for p in PRIVATE_SETTINGS))
    }
    assert texts(Config) - private <= TEXTS
    assert {"data.source", "model.pretrained", "paths.outputs", "resources.setup"} <= private


@pytest.mark.parametrize(
    "word",
    [
        "data.source=/home/ann", "+data.source=patients", "++privacy.insecure_seed=7",
        "model.pretrained=mine",
        "privacy={insecure_seed:7}", "paths.outputs=x", "resources.account=ann", "lora.rank=${oc.env:HOME}",
        "model.prompt=~ann", "evaluation.dinov2=weights",
    ],
)  # fmt: skip
def test_a_private_word_is_in_no_name(word: str) -> None:
    assert readable([word, "seed=3"]) == "seed=3"


def test_the_shown_fingerprint_confirms_no_guess_of_what_is_hidden() -> None:
    def fingerprint(**given: Any) -> str:
        config = Config()
        config.privacy.adjacency = "zero_out"
        config.data.source, config.privacy.insecure_seed = given.get("source"), given.get("seed")
        config.lora.rank = given.get("rank", 8)
        return manifest.shown_fingerprint(config)

    assert fingerprint() == fingerprint(source="/home/ann") == fingerprint(seed=7)
    assert fingerprint() != fingerprint(rank=4)


def test_everything_listed_says_why_and_nothing_is_listed_twice() -> None:
    tables = (manifest.FILES, manifest.ROWS, manifest.PRIVACY, manifest.RESULT, manifest.PROVENANCE,
              manifest.WANDB)  # fmt: skip
    assert all(isinstance(why, manifest.Why) for table in tables for why in table.values())
    assert not manifest.FILES.keys() & manifest.KEPT_FILES.keys()
