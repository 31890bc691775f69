"""`dp-lora export` of records that are damaged, say too little, or are of earlier versions; and of kills."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dp_lora.commands import export as export_command
from dp_lora.privacy.marks import Mark
from dp_lora.records import manifest
from dp_lora.storage.files import read_json, read_lines, write_json, write_lines
from tests.builders.exported import NOTE, PLAN, RESULT, export, refused

pytestmark = pytest.mark.usefixtures("unchecked")

ZERO_OUT = "zero out one image, the number of images is public, Poisson sampling"
OLD_CARD = (
    "## Privacy\n\nIt satisfies **(2, 1e-05)-differential privacy** (epsilon, delta).\n\n"
    "| adjacency (which data sets are neighbours) | add or remove one image, Poisson sampling |\n"
)
RELEASE = {"epsilon": 1.0, "delta": 1e-5, "reproducible_noise": False, "noise_multiplier": 4.0, "releases": 1}


# What is not known to be covered


@pytest.mark.parametrize("said", [[], None, "accuracy_cnn", "absent"])
def test_a_metric_leaves_only_if_it_is_known_to_be_covered(said: Any, run: Path, tmp_path: Path) -> None:
    """Whatever the record says of itself."""
    record = {name: value for name, value in RESULT.items() if name != "private_metrics"}
    write_json(run / "result.json", record if said == "absent" else {**record, "private_metrics": said})
    result = read_json(export(run, tmp_path / "out") / "result.json")
    assert result["metrics"] == {"inception_score": 2.0} and result["intervals"] == {}
    assert result["reference"] == {"split": "test"} and "tested_on" not in result
    assert result["left_out"] == ["accuracy_cnn", "audit.membership_inference"]
    marked = read_json(export(run, tmp_path / "marked", "--with-uncovered") / "result.json")
    assert marked["private_metrics"] == ["accuracy_cnn", "audit.membership_inference"]
    assert marked["private_metrics_note"] == NOTE


@pytest.mark.parametrize(
    ("release", "left_out"),
    [
        (RELEASE, ["accuracy_cnn", "audit.membership_inference"]),
        ({**RELEASE, "epsilon": "inf"}, ["accuracy_cnn", "dp_fd_lite0", "audit.membership_inference"]),
        (
            {**RELEASE, "reproducible_noise": True},
            ["accuracy_cnn", "dp_fd_lite0", "audit.membership_inference"],
        ),
        (None, ["accuracy_cnn", "dp_fd_lite0", "audit.membership_inference"]),
    ],
)
def test_released_metrics_need_the_budget_that_privacy_json_states(
    release: Any,
    left_out: list[str],
    run: Path,
    tmp_path: Path,
) -> None:
    write_json(run / "privacy.json", PLAN if release is None else {**PLAN, "release": release})
    # What an earlier version released counts as released.
    metrics = {"accuracy_cnn": 0.8, "dp_fd_lite0": 3.0}
    write_json(run / "result.json", {**RESULT, "metrics": metrics, "intervals": {}})
    assert read_json(export(run, tmp_path / "out") / "result.json")["left_out"] == left_out


def test_metrics_of_public_images_leave() -> None:
    shown = manifest.result({"metrics": {"fd_lite0": 2.0}}, public=True, released=False, with_uncovered=False)
    assert shown["metrics"] == {"fd_lite0": 2.0} and shown["private_metrics"] == []


# Damage

DAMAGE: dict[str, tuple[str, Any, str]] = {
    "seconds of a list": ("result.json", {"seconds": [1]}, "seconds: expected values by name"),
    "seconds of words": ("result.json", {"seconds": {"finetune": "long"}}, "seconds.finetune: expected"),
    "memory": ("result.json", {"peak_memory_bytes": "x"}, "peak_memory_bytes: expected a finite number"),
    "metrics of words": ("result.json", {"metrics": {"inception_score": "ann"}}, "expected a number"),
    "metrics of a list": ("result.json", {"metrics": [1]}, "metrics: expected values by name"),
    "audit of a list": ("result.json", {"audit": [1]}, "audit: expected values by name"),
    "hardware": ("provenance.json", {"hardware": "x"}, "hardware: expected values by name"),
    "a path as the accountant": ("privacy.json", {"accountant": "/home/ann"}, "accountant: expected a few"),
    "a text for a number": ("privacy.json", {"steps": "secret"}, "steps: expected a number"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_value_of_another_kind_is_one_line_that_names_it(
    what: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, change, said = DAMAGE[what]
    write_json(run / name, {**read_json(run / name), **change})
    line = refused(capsys, run, tmp_path / "out")
    assert f"{run / name}: {said}" in line or (f"{run / name}: " in line and said in line)


# Fields inside of fields

NEEDLE = 0.123456789

NESTED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "a new field of a network": ("result", {"extractors": {"lite0": {"losses": [NEEDLE]}}}),
    "a weights file": ("result", {"extractors": {"lite0": {"version": "weights of /srv/ward/7.pth"}}}),
    "scores in a classifier": ("result", {"classifiers": {"cnn": {"epochs": [NEEDLE]}}}),
    "the nearest images": ("result", {"neighbours": {"nearest": NEEDLE}}),
    "seeds": ("result", {"seed": [NEEDLE]}),
    "a number of samples": ("result", {"n_samples": [NEEDLE]}),
    "a device": ("result", {"device": "0.123456789"}),
    "a range": ("result", {"values": "of /srv/ward/7.png"}),
    "scores of canaries": ("result", {"audit": {"guesses": [NEEDLE]}}),
    "losses in a test": ("result", {"audit": {"noise_test": {"losses": [NEEDLE]}}}),
    "losses in a release": ("privacy", {"release": {"epsilon": 1.0, "losses": [NEEDLE]}}),
    "a name as the unit": ("privacy", {"unit": "the patients of /srv/ward"}),
    "a remote": ("provenance", {"git": {"sha": "0" * 40, "remote": "ssh://ward/0.123456789"}}),
    "the seed of the noise": ("provenance", {"seeds": {"public": 1, "noise": NEEDLE}}),
    "a version of one's own": ("provenance", {"versions": {"torch": "/srv/ward"}}),
}


@pytest.mark.parametrize("what", NESTED)
def test_a_field_inside_of_a_field_stays_or_is_refused(
    what: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, changed = NESTED[what]
    path = run / f"{name}.json"
    write_json(path, {**(read_json(path) if path.exists() else {}), **changed})
    with suppress(SystemExit):
        export(run, tmp_path / "out")
    said = capsys.readouterr().err
    assert (tmp_path / "out").exists() or "so this is not what the job wrote" in said
    files = [file.read_text() for file in (tmp_path / "out").glob("*.json*")]
    assert not [text for text in files if str(NEEDLE) in text or "ward" in text]


def test_what_a_job_writes_inside_of_fields_leaves(run: Path, tmp_path: Path) -> None:
    result = {
        "n_samples": 20,
        "reference": {"split": "test", "n": 297},
        "classifiers": {"cnn": {"layers": "conv 32, linear", "dropout": 0.5, "epochs": 10}},
        "extractors": {"lite0": {"version": "EfficientNet-Lite0, sha256 579344248a93 (package 0.1.0)",
                                 "preprocessing": "to 64 px; (x - 127) / 128", "side": 64}},
        "neighbours": {"precision, recall": 3, "density, coverage": 5},
        "audit": {"epsilon": 9.9, "contradicted": False, "kind": "gradient",
                  "noise_test": {"accused": False, "accused_by": [], "interval": [0.4, 0.5],
                                 "p_values": {"variance": 0.5}}},
        "device": "cuda:0",
    }  # fmt: skip
    write_json(run / "result.json", result)
    export(run, tmp_path / "out")
    shown = read_json(tmp_path / "out" / "result.json")
    assert {name: shown[name] for name in result if name != "reference"} == {
        name: value for name, value in result.items() if name != "reference"
    }


def test_a_loss_that_no_noised_sum_told_stays(run: Path, tmp_path: Path) -> None:
    rows = [{**row, "private_loss": NEEDLE} for row in read_lines(run / "metrics.jsonl")]
    write_lines(run / "metrics.jsonl", rows)
    export(run, tmp_path / "out")
    shown = read_lines(tmp_path / "out" / "metrics.jsonl")
    assert shown and not [row for row in shown if "private_loss" in row]
    assert manifest.row(rows[0], private_loss=True)["private_loss"] == NEEDLE


def test_a_picture_with_words_in_it_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = PngInfo()
    words.add_text("Comment", "0.123456789")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(run / "samples.png", pnginfo=words)
    assert "samples.png: holds tEXt beside its pixels" in refused(capsys, run, tmp_path / "out")
    (run / "samples.png").write_bytes(b"0.123456789")
    assert "samples.png: holds no PNG" in refused(capsys, run, tmp_path / "out")


def elsewhere(run: Path) -> None:
    shutil.move(run / "adapter", run.parent / "elsewhere")
    (run / "adapter").symlink_to(run.parent / "elsewhere")


WHOLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "samples": (lambda run: (run / "samples.npz").write_bytes(b"x"), "samples.npz: the samples cannot be"),
    "result": (lambda run: (run / "result.json").write_text("[1]"), "result.json: expected a JSON object"),
    "provenance": (lambda run: (run / "provenance.json").write_text("[]"), "expected a JSON object"),
    "config": (lambda run: (run / "config.yaml").write_text("[1, 2]"), "config.yaml: says no longer what"),
    "no weights": (lambda run: [p.unlink() for p in (run / "adapter").iterdir()], "it holds no weights"),
    "an adapter elsewhere": (elsewhere, "adapter: is a link"),
    "a row": (
        lambda run: write_lines(run / "metrics.jsonl", [{"stage": "/home/ann", "step": 1}]),
        "metrics.jsonl: stage: expected one of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WHOLE)
def test_a_damaged_run_is_one_line(
    what: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, said = WHOLE[what]
    change(run)
    assert said in refused(capsys, run, tmp_path / "out")


def test_no_name_a_link_and_a_name_that_is_too_long_are_one_line(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert "link: is a link" in refused(capsys, run, tmp_path / "link")
    line = refused(capsys, run, tmp_path / ("x" * 300))
    assert "File name too long" in line and "partial" not in line
    with pytest.raises(SystemExit) as ended:
        export_command.main(["", str(tmp_path / "out")])
    assert ended.value.code == 2 and "found an empty name" in capsys.readouterr().err


# A relative source


def test_a_source_of_one_word_is_looked_for(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = OmegaConf.load(run / "config.yaml")
    config.data.source = "patients"
    OmegaConf.save(config, run / "config.yaml")
    export(run, tmp_path / "out")
    capsys.readouterr()
    (run / "adapter" / "README.md").write_text("## Privacy\n\nOf patients.\n")
    assert "README.md: names data.source" in refused(capsys, run, tmp_path / "again")
    config.data.source = "images"  # which every card has
    OmegaConf.save(config, run / "config.yaml")
    (run / "adapter" / "README.md").write_text("## Privacy\n\nOf images.\n")
    export(run, tmp_path / "again")


# Kills


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(
    number: int,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def told(run_: Any, folder: Path) -> None:
        seen.append(folder.stat().st_mode & 0o777)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(export_command, "_check_names", told)
    with pytest.raises(SystemExit) as ended:
        export(run, tmp_path / "out")
    assert ended.value.code == 128 + number and seen == [0o700]
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_the_next_export_removes_what_a_killed_one_left(
    run: Path,
    tmp_path: Path,
) -> None:
    killed = os.fork()
    if killed == 0:
        export_command._check_names = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
        export(run, tmp_path / "out")
        os._exit(0)
    os.waitpid(killed, 0)
    (left,) = tmp_path.glob(".*.partial")
    assert left.stat().st_mode & 0o777 == 0o700
    folder = export(run, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "outputs"}
    mask = os.umask(0)
    os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


# Runs of earlier versions


def test_a_run_whose_rate_tells_the_number_of_images_leaves_as_zero_out(
    run: Path,
    tmp_path: Path,
) -> None:
    """As the default job of an earlier version was: "add or remove", with q of 60 in 1,500 images."""
    config = OmegaConf.load(run / "config.yaml")
    config.privacy.adjacency = "add_or_remove"
    del config.train.sample_rate
    OmegaConf.save(config, run / "config.yaml")
    write_json(run / "privacy.json", {**PLAN, "adjacency": "add or remove one image, Poisson sampling"})
    (run / "adapter" / "README.md").write_text(OLD_CARD)
    folder = export(run, tmp_path / "out")
    privacy, card = read_json(folder / "privacy.json"), (folder / "adapter" / "README.md").read_text()
    assert privacy["adjacency"] == ZERO_OUT and privacy["num_examples"] == 1500
    assert f"| adjacency (which data sets are neighbours) | {ZERO_OUT} |" in card
    assert "add or remove" not in card and "The number of training images is public." in card
    assert OmegaConf.load(folder / "config.yaml").privacy.adjacency == "zero_out"


def test_a_mark_is_its_owners_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Mark(tmp_path / "ledger.jsonl.run").begin("nonce", 0)
    finally:
        os.umask(before)
    assert (tmp_path / "ledger.jsonl.run").stat().st_mode & 0o777 == 0o600
