"""`dp-lora-evaluate`: metrics of a finished run's images again, what they cost, and what they leave."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dp_lora.commands.evaluate import main
from dp_lora.commands.sample import main as sample_main
from dp_lora.config.load import read_config
from dp_lora.evaluation import features
from dp_lora.evaluation.inception import Inception2015
from dp_lora.jobs.begun import releases_of
from dp_lora.privacy.ledger import Ledger
from dp_lora.storage.files import read_json, read_lines
from sweeps.bill import bill
from tests.builders.commands import FOLDER, dp_lora, state_of
from tests.builders.exported import export
from tests.builders.image_sets import pixels, write_folder
from tests.builders.tiny import words

pytestmark = pytest.mark.usefixtures("unchecked")

QUICK = ("evaluation.classifier_epochs=1", "evaluation.classifiers=[cnn]")


@pytest.fixture(scope="module")
def place(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in outputs/, the images in set/ and the ledger beside."""
    folder = tmp_path_factory.mktemp("place")
    write_folder(folder / "set", pixels(5, 60))
    assert dp_lora(*job_of(cache, folder)) == 0
    return folder


def job_of(cache: Path, folder: Path) -> tuple[str, ...]:
    """The words of the run's job."""
    return (*words(cache, folder / "outputs"), *FOLDER, f"data.source={folder / 'set'}",
            "sampler.num_samples=12", "data.test_size=0.4", *QUICK)  # fmt: skip


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Iterator[Path]:
    """The run as the job left it; what a test adds to it or beside it is gone afterwards."""
    shutil.copytree(place, tmp_path / "kept")
    (directory,) = (place / "outputs" / "default").iterdir()
    yield directory
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(tmp_path / "kept", place, dirs_exist_ok=True)
    directory.chmod(0o700)


class Scores(Inception2015):
    """In place of Inception: its logits are random sums of the pixels."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(torch.randn(64, 10, generator=generator) / 500)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() @ self.weights

    def logits(self, features: Tensor) -> Tensor:
        return features


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> str:
    """The word of an evaluation by Inception alone, whose place a small network takes."""
    small = replace(
        features.EXTRACTORS["inception"], check=lambda config: None, load=lambda config: (Scores(), "small")
    )
    monkeypatch.setitem(features.EXTRACTORS, "inception", small)
    return "evaluation.extractors=[inception]"


def command(name: str, *given: object) -> int:
    """The exit status of `dp-lora-evaluate` or `dp-lora-sample`."""
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", [name, *map(str, given)])
            (main if name == "dp-lora-evaluate" else sample_main)()
        return 0
    except SystemExit as stopped:
        return int(stopped.code or 0)


def evaluate(*given: object) -> int:
    return command("dp-lora-evaluate", *given)


def found(run: Path, name: str) -> dict[str, Any]:
    return dict(read_json(run / "evaluations" / f"{name}.json"))


def ledger_of(run: Path) -> Path:
    return run.parents[2] / "outputs.privacy_ledger.jsonl"


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    path.chmod(0o400)
    try:
        yield
    finally:
        path.chmod(0o600)


def test_the_run_s_own_settings_give_its_own_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = read_json(run / "result.json")
    before = state_of(run)
    assert evaluate(run, "name=same") == 0
    again = found(run, "same")
    for field in ("metrics", "private_metrics_note", "reference", "real_baseline", "n_before"):
        assert again[field] == own[field]
    assert set(again["private_metrics"]) == set(own["private_metrics"]) == own["metrics"].keys()
    assert {"accuracy_cnn", "accuracy_cnn_before", "fd_lite0_real"} <= again["metrics"].keys()
    assert "fd_lite0 *" in (said := capsys.readouterr().out) and "* computed on private data" in said
    assert {path: digest for path, digest in state_of(run).items() if "/evaluations/" not in path} == before
    assert stat.S_IMODE((run / "evaluations").stat().st_mode) == 0o700


def test_other_settings_give_other_numbers_and_the_same_command_finds_them(run: Path) -> None:
    given = (run, "evaluation.extractors=[]", "evaluation.classifier_epochs=3", "evaluation.reference=train")
    assert evaluate(*given) == 0
    (path,) = (run / "evaluations").iterdir()
    settings = read_json(path)["settings"]["evaluation"]
    assert (settings["reference"], settings["classifier_epochs"]) == ("train", 3)
    before = state_of(run, path.parent), path.stat().st_mtime_ns
    with read_only(ledger_of(run)):
        shutil.rmtree(run.parents[2] / "set")
        assert evaluate(*given) == 0
    assert (state_of(run, path.parent), path.stat().st_mtime_ns) == before


def test_a_set_that_was_drawn_afterwards(run: Path, tmp_path: Path) -> None:
    given = ("classes={c0:9,c1:5}", "guidance=3", "seed=4")
    assert command("dp-lora-sample", run, *given, "name=more") == 0
    assert command("dp-lora-sample", run, *given, f"out={tmp_path / 'elsewhere'}") == 0
    settings = ("evaluation.classifiers=[]", "evaluation.extractors=[lite0]")
    assert evaluate(run, "samples=more", *settings, "name=one") == 0
    one = found(run, "one")
    assert (one["n_samples"], one["n_before"], one["settings"]["samples"]) == (14, 14, "more")
    assert one["metrics"].keys() == {
        f"{name}_lite0{end}"
        for name in ("fd", "kid", "precision", "recall", "density", "coverage")
        for end in ("", "_before", "_real")
    }
    assert one["metrics"]["fd_lite0"] != read_json(run / "result.json")["metrics"]["fd_lite0"]
    assert evaluate(run / "samples" / "more", *settings, "name=two") == 0
    assert evaluate(run, f"samples={tmp_path / 'elsewhere'}", *settings, "name=three") == 0
    assert found(run, "two")["metrics"] == found(run, "three")["metrics"] == one["metrics"]


def test_images_of_another_adapter_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("dp-lora-sample", run, f"out={tmp_path / 'images'}") == 0
    record = tmp_path / "images" / "sampling.json"
    drawn = read_json(record)
    drawn["settings"]["adapter_sha256"] = "0" * 64
    record.write_text(json.dumps(drawn))
    assert evaluate(run, f"samples={tmp_path / 'images'}") == 2
    assert "were drawn from another adapter" in capsys.readouterr().err
    assert not (run / "evaluations").exists()


def test_metrics_of_generated_images_alone_need_nothing_private(
    run: Path, inception: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, index = ledger_of(run), run.parents[2] / "outputs.image_index"
    assert evaluate(run, inception, "evaluation.classifiers=[]", "name=with") == 0
    compared = found(run, "with")
    shutil.move(run.parents[2] / "set", run.parents[2] / "away")
    shutil.move(index, index.with_name("index_away"))
    before = ledger.read_bytes()
    capsys.readouterr()
    with read_only(ledger):
        assert evaluate(run, inception, "evaluation.reference=none", "name=alone") == 0
    alone = found(run, "alone")
    assert ledger.read_bytes() == before and not index.exists()
    assert alone["metrics"].keys() == {"inception_score", "inception_score_before"}
    assert {name: compared["metrics"][name] for name in alone["metrics"]} == alone["metrics"]
    assert alone["private_metrics"] == [] and "reference" not in alone
    said = capsys.readouterr().out
    assert "covered by the adapter's own epsilon" in said and "*" not in said


def test_private_metrics_are_entered_as_not_covered(run: Path) -> None:
    ledger = Ledger(ledger_of(run))
    charges, billed = ledger.charges(), bill([run]).sets[0]
    assert evaluate(run, "evaluation.classifier_epochs=2") == 0
    (use,) = ledger.uncovered()
    receipt = read_json(run / "checkpoint" / "charge.json")
    assert (use.run, use.private_set, use.by) == (receipt["run"], receipt["private_set"], ("cnn", "lite0"))
    assert ledger.charges() == charges
    now = bill([run]).sets[0]
    assert (now.epsilon, now.ledger_epsilon, now.ledger_runs) == (
        billed.epsilon, billed.ledger_epsilon, billed.ledger_runs,
    )  # fmt: skip
    assert (billed.ledger_uncovered, now.ledger_uncovered) == (0, 1)
    assert any("1 use of the images that no epsilon covers" in line for line in now.lines())
    # What was entered before a kill is not entered again.
    shutil.rmtree(run / "evaluations")
    assert evaluate(run, "evaluation.classifier_epochs=2") == 0 and len(ledger.uncovered()) == 1


def test_without_the_ledger_nothing_private_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = ledger_of(run)
    ledger.unlink()
    ledger.mkdir()
    capsys.readouterr()
    assert evaluate(run, "evaluation.classifier_epochs=2") == 2
    said = capsys.readouterr()
    assert "the ledger cannot be" in said.err and "accuracy" not in said.out
    assert not (run / "evaluations").exists()


def test_a_release_stays_stated_when_the_adapter_is_made_again(
    run: Path, place: Path, cache: Path, tmp_path: Path
) -> None:
    assert evaluate(run, "evaluation=release", *QUICK, "evaluation.release_epsilon=2") == 0
    stated = read_json(run / "privacy.json")
    for lost in (["adapter"], ["adapter", "privacy.json"]):
        for name in lost:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
        assert dp_lora(*job_of(cache, place)) == 0
        again = read_json(run / "privacy.json")
        assert again["release"]["epsilon"] == stated["release"]["epsilon"]
        assert again["release"]["with_training"] == stated["release"]["with_training"]
    assert again["steps"] == stated["steps"]
    exported = read_json(export(run, tmp_path / "exported") / "privacy.json")
    assert exported["release"]["releases"] == 1


def test_an_exported_folder_is_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(run, tmp_path / "exported", "--with-uncovered")
    shutil.copy(run / "config.yaml", folder)
    before, ledger = state_of(folder), ledger_of(run).read_bytes()
    for given in (["evaluation=release"], ["evaluation.classifiers=[]"], ["evaluation.reference=none"]):
        assert evaluate(folder, *given, f"samples={run}") == 2
        assert "has no checkpoint/, as an exported folder has none" in capsys.readouterr().err
    assert state_of(folder) == before and ledger_of(run).read_bytes() == ledger


def test_images_that_changed_or_do_not_fit_are_refused_and_enter_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    assert command("dp-lora-sample", run, f"out={folder}", "seed=3") == 0
    record, ledger = read_json(folder / "sampling.json"), ledger_of(run).read_bytes()
    with np.load(folder / "samples.npz") as saved:
        drawn = dict(saved)

    def refused(said: str, **changed: Any) -> None:
        assert evaluate(run, f"samples={folder}", *QUICK) == 2
        assert said in capsys.readouterr().err
        assert ledger_of(run).read_bytes() == ledger and not (run / "evaluations").exists()

    np.savez(folder / "samples.npz", **{**drawn, "images": 255 - drawn["images"]})
    refused("has changed since it was drawn")
    # The same command draws them again.
    assert command("dp-lora-sample", run, f"out={folder}", "seed=3") == 0
    assert read_json(folder / "sampling.json") == record
    for name, value, said in (
        ("images", drawn["images"].astype(np.float32), "the samples cannot be read"),
        ("images", np.kron(drawn["images"], np.ones((2, 2), np.uint8)), "expected 1 x 8 x 8"),
        ("labels", drawn["labels"] + 99, "the samples cannot be read"),
        ("labels", drawn["labels"][0], "the samples cannot be read"),
    ):
        np.savez(folder / "samples.npz", **{**drawn, name: value})
        digest = hashlib.sha256((folder / "samples.npz").read_bytes()).hexdigest()
        (folder / "sampling.json").write_text(json.dumps({**record, "samples_sha256": digest}))
        refused(said)
    np.savez(folder / "samples.npz", **drawn)
    for settings in ({"seed": {}}, {"sampler": {**record["settings"]["sampler"], "steps": "x"}}):
        wrong = {**record, "settings": {**record["settings"], **settings}}
        (folder / "sampling.json").write_text(json.dumps(wrong))
        refused("expected what dp-lora-sample wrote there")


def test_a_run_knows_its_places_in_every_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "set", pixels(6, 60))
    monkeypatch.chdir(tmp_path)
    given = (*job_of(cache, tmp_path), "stages=[finetune]", "paths.ledger=led.jsonl", "paths.index=idx")
    assert dp_lora(*given) == 0
    (run,) = (tmp_path / "outputs" / "default").iterdir()
    places = read_config(run / "config.yaml").paths
    assert (places.ledger, places.index) == (str(tmp_path / "led.jsonl"), str(tmp_path / "idx"))
    assert dp_lora(*given) == 0


def test_a_release_is_charged_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = (run, "evaluation=release", *QUICK, "evaluation.release_epsilon=2")
    ledger, own = Ledger(ledger_of(run)), read_json(run / "result.json")
    (training,) = ledger.charges()
    assert evaluate(*given, "name=first") == 0
    assert "dp_*: epsilon" in capsys.readouterr().out
    first = found(run, "first")
    assert first["metrics"].keys() == {"dp_accuracy_cnn"} and first["private_metrics"] == []
    charges = ledger.charges()
    assert charges[0] == training and [c.run for c in charges] == [training.run, f"{training.run}-release-0"]
    assert ledger.uncovered() == []
    stated = read_json(run / "privacy.json")["release"]
    assert 1.9 < stated["epsilon"] <= 2 and stated["releases"] == 1
    lines = ledger_of(run).read_bytes()
    assert evaluate(*given, "name=first") == 0 and evaluate(*given, "name=second") == 0
    assert found(run, "second")["metrics"] == first["metrics"]
    assert ledger_of(run).read_bytes() == lines and len(releases_of(run / "checkpoint")) == 1
    # The run's own result is of no release, whatever privacy.json states by now: no number of it leaves.
    assert read_json(run / "result.json") == own and isinstance(own["reference"]["n"], int)
    folder = export(run, tmp_path / "out")
    assert read_json(folder / "result.json")["reference"] == {"split": "test"}


def test_an_export_leaves_evaluations_behind(run: Path, tmp_path: Path) -> None:
    assert evaluate(run, "evaluation.classifier_epochs=2") == 0
    for number, more in enumerate(([], ["--with-uncovered"])):
        folder = export(run, tmp_path / f"out{number}", *more)
        assert not (folder / "evaluations").exists()


def test_images_that_changed_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = run.parents[2] / "set"
    path = next(source.rglob("*.png"))
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(path)
    before = state_of(run), ledger_of(run).read_bytes()
    for given in ((*QUICK, "evaluation.bootstrap=100"), ("evaluation=release", *QUICK)):
        assert evaluate(run, *given) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("dp-lora-evaluate: data: ") and "changed since this run began" in line
    assert (state_of(run), ledger_of(run).read_bytes()) == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["evaluation.clasifiers=[cnn]"], "no such field; did you mean 'evaluation.classifiers'?"),
        (
            ["evaluation=releas"],
            "evaluation=releas: expected one of default, fid, full, release; did you mean",
        ),
        (["evaluation.bootstrap=x"], "evaluation.bootstrap=x: expected a whole number"),
        (["evaluation.bootstrap=3"], "evaluation.bootstrap=3: expected 0"),
        (["evaluation.fid_infinity=maybe"], "evaluation.fid_infinity=maybe: expected true or false"),
        (["evaluation.release_delta=none"], "expected a number, or null"),
        (["evaluation.classifiers=[cnm]"], "did you mean 'cnn'?"),
        (["evaluation.reference=tset"], "evaluation.reference='tset': expected one of train"),
        (["evaluation.reference=none"], "expected inception among them"),
        (["evaluation=release", "evaluation.reference=none"], "expected evaluation.release=none"),
        (["samples=nothing"], "holds no images that dp-lora-sample drew"),
        (["name=../x"], "name=../x: expected the name of one folder"),
        (["bootstrap=100", "evaluation.bootstrap=100"], "evaluation.bootstrap: is given twice"),
        (["device=cuba"], "resources.device='cuba': expected one of"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    (directory,) = (place / "outputs" / "default").iterdir()
    before = state_of(place)
    capsys.readouterr()
    assert evaluate(directory, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dp-lora-evaluate: ") and said in line
    assert state_of(place) == before


def test_places_without_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*given: object) -> str:
        capsys.readouterr()
        assert evaluate(*given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "expected a run directory" in refused(tmp_path)
    assert "an adapter without its run" in refused(run / "adapter")
    (run / "samples.npz").unlink()
    assert "has no samples that can be read" in refused(run)


def test_another_evaluation_of_the_same_name_is_left_alone(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run, *QUICK, "evaluation.extractors=[]", "name=one") == 0
    before, lines = state_of(run), len(read_lines(ledger_of(run)))
    assert evaluate(run, "evaluation.extractors=[]", "evaluation.classifier_epochs=2", "name=one") == 2
    assert "holds another evaluation; expected a new name" in capsys.readouterr().err
    assert state_of(run) == before and len(read_lines(ledger_of(run))) == lines
