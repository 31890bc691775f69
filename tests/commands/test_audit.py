"""The command dp-lora-audit on the run directory of a tiny job."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from dp_lora import __main__
from dp_lora.auditing import audit, noise_tests
from dp_lora.commands import audit as audit_command
from dp_lora.privacy.randomness import Randomness
from dp_lora.records import audit_section
from dp_lora.storage.files import read_json, read_lines, write_json, write_lines
from dp_lora.training.signals import Interrupted
from tests.builders.tiny import once, words

pytestmark = pytest.mark.usefixtures("unchecked")

OPTIONS = ("--canaries", "600", "--images", "120", "--draws", "2", "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def fixed_keys() -> Iterator[None]:
    """Every key is the same, as if the system had drawn it: no test fails by a false alarm in a hundred."""
    key = hashlib.sha256(b"the audit's tests").digest()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Randomness, "from_system", classmethod(lambda cls: cls(key, secure=True)))
        yield


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs a job to its end and gives its run directory."""

    def call(*given: str) -> Path:
        outputs = tmp_path_factory.mktemp("outputs")
        GlobalHydra.instance().clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["dp-lora", *once(*words(cache, outputs), *given)])
            __main__.main()
        GlobalHydra.instance().clear()
        (directory,) = (outputs / "default").iterdir()
        return directory

    return call


@pytest.fixture(scope="module")
def whole(finished: Callable[..., Path]) -> Path:
    return finished("train.expected_batch_size=500", "evaluation.classifier_epochs=1", "lora.rank=2")


@pytest.fixture(scope="module")
def audited(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, audited."""
    directory = tmp_path_factory.mktemp("audited") / whole.name
    shutil.copytree(whole, directory)
    assert call(directory, *OPTIONS) == 0
    return directory


def call(directory: Path, *options: str) -> int:
    """The exit status of the command."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["dp-lora-audit", str(directory), *options])
        try:
            audit_command.main()
        except SystemExit as exit:
            return int(exit.code or 0)
    return 0


def test_both_bounds_are_in_the_result_and_on_the_card(audited: Path, whole: Path) -> None:
    result, before = read_json(audited / "result.json"), read_json(whole / "result.json")
    record = result["audit"]
    assert record["epsilon"] == read_json(audited / "privacy.json")["epsilon"]
    assert 0 < record["epsilon_lower_bound_if_gaussian"] < record["epsilon"] and not record["contradicted"]
    assert 0 <= record["epsilon_lower_bound"] < record["most_that_could_be_shown"]
    assert record["confidence"] == 0.95 and record["canaries"] == 600
    assert record["positives"] + record["negatives"] == 600
    text = (audited / "adapter" / "README.md").read_text()
    proven, *measured = audit_section.bounds(record)
    assert f"- {proven}" in text and all(f"- {line}" in text for line in measured) and len(measured) == 2
    assert f"- {audit_section.noise_line(record)}" in text and audit_section.ACCUSED not in text
    assert text.index("## Privacy") < text.index("## Audit") < text.index("## Loading")
    assert {key: result[key] for key in before if not key.startswith("private_metrics")} == {
        key: value for key, value in before.items() if not key.startswith("private_metrics")
    }


def test_the_noise_of_both_trainings_is_tested_apart_from_the_bounds(audited: Path) -> None:
    """The keys are fixed, so neither a false alarm nor an interval that misses can come up by chance."""
    found = read_json(audited / "result.json")["audit"]["noise_test"]
    claimed = read_json(audited / "privacy.json")["noise_multiplier"]
    assert found["accused"] is False and found["accused_by"] == [] and found["false_alarm"] == 0.01
    assert found["p_values"].keys() == noise_tests.TESTS.keys()
    assert found["p_value"] == min(1, 15 * min(found["p_values"].values())) > 0.01
    assert found["noise_multiplier"] == claimed
    low, high = found["interval"]
    assert low < found["estimated_noise_multiplier"] < high < 1.1 * low
    assert 0.9 < found["estimated_noise_multiplier"] / claimed < 1.1
    rows = [json.loads(line) for line in (audited / "metrics.jsonl").read_text().splitlines()]
    assert found["update_norms"] == sum(row["stage"] == "finetune" for row in rows) > 0
    assert found["parameters"] == read_json(audited / "result.json")["trainable_parameters"]


def test_update_norms_below_the_noise_accuse_the_run_and_contradict_nothing(
    audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record of an engine with half of the noise, in place of that of the right one."""
    directory = tmp_path / audited.name
    shutil.copytree(audited, directory)
    _scale_norms(directory, 0.5)
    assert call(directory, *OPTIONS, "--images", "0") == 1
    said = capsys.readouterr().out
    assert said.startswith("The audit accuses the noise") and "run_update_norms" in said
    record = read_json(directory / "result.json")["audit"]
    assert record["noise_test"]["accused"] is True and record["contradicted"] is False
    text = (directory / "adapter" / "README.md").read_text()
    assert audit_section.ACCUSED in text and audit_section.CONTRADICTED not in text
    # Once the record is right again, the accusation goes.
    _scale_norms(directory, 2.0)
    assert call(directory, *OPTIONS, "--images", "0") == 0
    assert audit_section.ACCUSED not in (directory / "adapter" / "README.md").read_text()


def _scale_norms(directory: Path, factor: float) -> None:
    rows = read_lines(directory / "metrics.jsonl")
    for row in rows:
        if "update_norm" in row:
            row["update_norm"] *= factor
    write_lines(directory / "metrics.jsonl", rows)


def test_membership_is_marked_as_private_and_stays_off_the_card(audited: Path) -> None:
    result = read_json(audited / "result.json")
    found = result["audit"]["membership_inference"]
    assert found["members"] == found["others"] == 120
    for attack in ("loss", "calibrated"):
        low, high = found[attack]["auc_interval"]
        assert 0 <= low <= found[attack]["auc"] <= high <= 1
        assert found[attack]["tpr_at_fpr"].keys() == {"0.01", "0.001"}
        assert found[attack]["roc"]["tpr"] == sorted(found[attack]["roc"]["tpr"])
    assert "audit.membership_inference" in result["private_metrics"] and result["private_metrics_note"]
    assert "embership" not in (audited / "adapter" / "README.md").read_text()


def test_scores_stay_in_the_private_folder(audited: Path, whole: Path) -> None:
    def names(directory: Path) -> set[str]:
        return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}

    new = names(audited) - names(whole)
    kept = (
        "audit_gradient/settings.json",
        "audit_gradient/scores.npz",
        "audit_gradient/silent.json",
        "membership.npz",
    )
    assert new == {f"checkpoint/{name}" for name in kept}
    for name in new:
        assert (audited / name).stat().st_mode & 0o077 == 0, name


def test_a_second_call_trains_nothing_and_says_the_same(
    audited: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (audited / "result.json").read_text(), (audited / "adapter" / "README.md").read_text()
    for name in ("train_with_canaries", "silent_noise"):
        monkeypatch.setattr(audit, name, lambda *args, **kwargs: pytest.fail("trained again"))
    assert call(audited, *OPTIONS) == 0
    assert before == ((audited / "result.json").read_text(), (audited / "adapter" / "README.md").read_text())
    said = capsys.readouterr().out
    assert (
        "Proven: epsilon <= 9.9" in said
        and "Measured: epsilon >=" in said
        and "not covered by epsilon" in said
    )
    # Without images the earlier membership inference stays.
    assert call(audited, *OPTIONS, "--images", "0") == 0
    assert json.loads(before[0])["audit"] == read_json(audited / "result.json")["audit"]


def test_an_interrupted_audit_leaves_the_result_as_it_was(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / whole.name
    shutil.copytree(whole, directory)
    before = (directory / "result.json").read_bytes(), (directory / "adapter" / "README.md").read_bytes()

    def stop(*args: object, **kwargs: object) -> None:
        raise Interrupted("stopped after step 2 of 4")

    monkeypatch.setattr(audit, "losses_of", stop)
    assert call(directory, *OPTIONS) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert before == (
        (directory / "result.json").read_bytes(),
        (directory / "adapter" / "README.md").read_bytes(),
    )


def test_a_contradiction_is_said_everywhere(
    audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scores of an engine without noise, put in place of those of the right one."""
    import numpy as np

    directory = tmp_path / audited.name
    shutil.copytree(audited, directory)
    scores = directory / "checkpoint" / "audit_gradient" / "scores.npz"
    kept = dict(np.load(scores))
    np.savez(scores, **{**kept, "scores": np.where(kept["included"], 9.0, -9.0)})
    assert call(directory, *OPTIONS, "--images", "0") == 1
    assert capsys.readouterr().out.startswith("The audit contradicts the guarantee")
    assert audit_section.CONTRADICTED in (directory / "adapter" / "README.md").read_text()
    record = read_json(directory / "result.json")["audit"]
    assert record["contradicted"] is True and record["noise_test"]["accused"] is False


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--canaries", "4"],
            r"--canaries=4: even if all were guessed right they could not .*; expected \d+ or",
        ),
        (["--canaries", "1"], "--canaries=1: expected at least 2"),
        (["--confidence", "1"], r"--confidence=1: expected a number in \[0.5, 1\)"),
        (["--images", "1"], "--images=1: expected at least 2, or 0"),
        (["--draws", "0"], "--draws=0: expected at least 1"),
        (["--kind", "letter"], "invalid choice: 'letter'.*--help"),
        (["--canaries", "many"], "invalid int value: 'many'"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    options: list[str], expected: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "result.json").read_bytes()
    assert call(whole, *options) == 2
    _one_line(capsys, expected)
    assert (whole / "result.json").read_bytes() == before


def _one_line(capsys: pytest.CaptureFixture[str], expected: str) -> None:
    import re

    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("dp-lora-audit: "), said
    assert re.search(expected, said[0]), said[0]


def test_a_directory_without_a_finished_run_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path / "nowhere") == 2
    _one_line(capsys, "nowhere: no config.yaml in it; expected the run directory of a finished dp-lora job")
    directory = tmp_path / whole.name
    shutil.copytree(whole, directory)
    write_json(directory / "status.json", {"state": "running"})
    assert call(directory) == 2
    _one_line(capsys, "the run is running; expected a finished one")
    (directory / "status.json").write_text("{")
    assert call(directory) == 2
    _one_line(capsys, "(its records cannot be read|says no longer what this run is)")
    shutil.copy(whole / "status.json", directory)
    (directory / "config.yaml").write_text("a: [")
    assert call(directory) == 2
    _one_line(capsys, "(its records cannot be read|says no longer what this run is)")
    shutil.copy(whole / "config.yaml", directory)
    privacy = read_json(whole / "privacy.json")
    write_json(directory / "privacy.json", {**privacy, "noise_multiplier": 2 * privacy["noise_multiplier"]})
    assert call(directory) == 2
    _one_line(capsys, "privacy.json has noise_multiplier=")
    shutil.copy(whole / "privacy.json", directory)
    write_lines(directory / "metrics.jsonl", [{"stage": "finetune", "step": 1, "update_norm": "nan"}])
    assert call(directory) == 2
    _one_line(capsys, "metrics.jsonl: step 1 has update_norm=nan; expected a finite number, 0 or more")
    write_lines(directory / "metrics.jsonl", [{"stage": "finetune", "step": 1}])
    assert call(directory) == 2
    _one_line(capsys, "metrics.jsonl cannot be read")


@pytest.mark.parametrize("given", ["epsilon=inf", "privacy.insecure_seed=1"])
def test_a_run_that_claims_nothing_is_refused(
    given: str, finished: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = finished(given, "stages=[finetune]", "train.max_steps=1", "lora.rank=1")
    capsys.readouterr()
    assert call(directory) == 2
    _one_line(capsys, "NO privacy guarantee.*; expected a run with a guarantee to audit")


def test_without_a_result_the_card_alone_is_written(
    finished: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = finished("stages=[finetune]", "train.max_steps=2", "lora.rank=1")
    assert call(directory, "--canaries", "200", "--images", "0", "--device", "cpu") == 0
    assert "result.json is not there yet" in capsys.readouterr().out
    assert not (directory / "result.json").exists()
    assert "## Audit" in (directory / "adapter" / "README.md").read_text()


def test_help_is_fast_to_load() -> None:
    """Neither torch nor diffusers."""
    code = (
        "import sys, dp_lora.commands.audit as a; sys.argv=['dp-lora-audit', '--help']\n"
        "try: a.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'scipy', 'hydra'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "RUN_DIRECTORY" in ran.stdout
