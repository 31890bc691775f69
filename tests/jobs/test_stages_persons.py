"""A job that protects persons, from a metadata file through all stages, and what of it tells of images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_lora.auditing.audit import audit
from dp_lora.auditing.options import Options
from dp_lora.jobs import release, stages
from dp_lora.jobs.release import Counts
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.persons import Persons
from dp_lora.records import manifest
from dp_lora.storage.files import read_json
from dp_lora.training import finetune
from sweeps.bill import bill
from tests.builders.commands import FOLDER, dp_lora
from tests.builders.exported import export
from tests.builders.patients import patients
from tests.builders.tiny import TINY, composed, once, words

pytestmark = pytest.mark.usefixtures("unchecked")

COUNTS = {f"P{i:02}": 1 + i % 7 for i in range(40)}
PERSONS = ("data.person_column=patient", "privacy.unit=person")


@pytest.fixture
def job(cache: Path, tmp_path: Path) -> Callable[..., int]:
    folder = patients(tmp_path / "set", COUNTS)

    def run(*given: str) -> int:
        place = f"data.source={folder}"
        return dp_lora(*words(cache, tmp_path / "outputs"), *FOLDER, place, *given)

    return run


def test_all_stages_run_from_a_metadata_file(
    job: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noised, rows = release.noised_sum, list[torch.Tensor]()

    def see(given: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(given)
        return noised(given, *rest)

    monkeypatch.setattr(release, "noised_sum", see)
    words = (*PERSONS, "data.test_size=0.4", "evaluation.release=dp", "evaluation.extractors=[]",
             "evaluation.classifier_epochs=1")  # fmt: skip
    assert job(*words) == 0
    (directory,) = (tmp_path / "outputs/default").iterdir()
    privacy, found = read_json(directory / "privacy.json"), read_json(directory / "result.json")
    persons = privacy["num_examples"]
    assert privacy["unit"] == "person" and 10 < persons < 40
    assert privacy["sample_rate"] == pytest.approx(6 / persons)
    assert privacy["adjacency"].startswith("zero out one person, the number of persons is public")
    assert any("one person with all of their training images" in line for line in privacy["covers"])
    assert "one held-out person with all of their images" in privacy["release"]["covers"]
    assert [len(one) for one in rows] == [40 - persons], "one row for each held-out person"
    assert found["seconds"].keys() == {"sample"} and found["peak_memory_bytes"] is None
    body = (directory / "adapter/README.md").read_text().split("---\n", 2)[2]
    assert "**Protects each person with all of their images**" in "\n".join(body.splitlines()[:6])
    # What one image spends is more: ledger and bill know whom the run protects.
    (beside,) = tmp_path.glob("*.privacy_ledger.jsonl")
    assert {charge.unit for charge in Ledger(beside).charges()} == {"person"}
    (of_set,) = bill([directory]).sets
    assert of_set.unit == "person" and of_set.other_epsilon is not None
    assert of_set.epsilon < of_set.other_epsilon
    assert any("for one image: epsilon" in line for line in of_set.lines())
    exported = export(directory, tmp_path / "exported")
    assert read_json(exported / "privacy.json")["unit"] == "person"
    settings = (exported / "config.yaml").read_text()
    assert "unit: person" in settings and "person_column: patient" in settings
    # The same command is the same run; other persons for the same pixels are another one.
    assert job(*words) == 0
    rows = (tmp_path / "set/metadata.csv").read_text()
    (tmp_path / "set/metadata.csv").write_text(rows.replace("malignant,P06", "malignant,P05"))
    assert job(*words) == 2
    (tmp_path / "set/metadata.csv").write_text(rows)
    # An audit with canary persons, and the membership of persons.
    record = audit(directory, Options(canaries=200, images=10, draws=2, device="cpu"))
    assert not record["noise_test"]["accused"]
    assert record["membership_inference"]["members"] == 10


def test_the_mean_over_a_persons_images_moves_a_release_by_one_at_most() -> None:
    owners, right = torch.tensor([0, 1, 1, 1, 2, 2]), torch.tensor([True, True, True, False, False, False])
    counts = Counts(("cnn", "wrn"))
    rows = Persons(owners).means(counts.rows([right, ~right]))
    assert rows.shape == (3, 4) and float(rows.norm(dim=1).max()) <= 1 + 1e-12
    assert counts.number(rows.sum(0)) == pytest.approx(3)
    assert counts.values(rows.sum(0))["dp_accuracy_cnn"] == pytest.approx((1 + 2 / 3) / 3)
    # The broken twin: one row for each image.
    assert float(counts.rows([right, ~right])[owners == 1].sum(0).norm()) > 1.5


REFUSED = {
    "nothing says whose": (["privacy.unit=person"], "privacy.unit=person: nothing says whose an image is"),
    "nobody asked": (["data.person_column=patient"], "with privacy.unit=image: expected privacy.unit=person"),
    "both": ([*PERSONS, "data.person_pattern='(P)'"], "both say whose an image is; expected one of them"),
    "no group": (["privacy.unit=person", "data.person_pattern=P"], "has no group; expected parentheses"),
    "no pattern": (["privacy.unit=person", "data.person_pattern='(P'"], "no regular expression"),
    "classes": (["privacy.unit=person", "data.person_column=label"], "says the classes, whose names are"),
    "unknown": (
        [*PERSONS[:1], "privacy.unit=patient"],
        "privacy.unit='patient': expected one of image, person",
    ),
    "nothing found": (
        ["privacy.unit=person", "data.person_pattern='(patient)'"],
        "is found in none of the 155 paths of the images, such as 'P00_0.png'",
    ),
    "large delta": ([*PERSONS, "privacy.delta=0.025"], "(0, 0.025), or one person in N may be given away"),
    "large batch": ([*PERSONS, "train.expected_batch_size=41"], "(0, 40], the number of training persons"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line(
    name: str, job: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, line = REFUSED[name]
    assert job(*given) == 2
    said = [one for one in capsys.readouterr().err.splitlines() if one.startswith("dp-lora:")]
    assert len(said) == 1 and line in said[0], said
    assert not (tmp_path / "outputs").exists()


def test_one_person_alone_is_refused(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = patients(tmp_path / "set", {"P": 9})
    place = f"data.source={folder}"
    one = ("train.expected_batch_size=1",)
    assert dp_lora(*words(cache, tmp_path / "outputs"), *FOLDER, place, *PERSONS, *one) == 2
    assert "there is one person, whom no other one hides; expected at least 2" in capsys.readouterr().err


class _Clock:
    def __init__(self) -> None:
        self._now = 1e9

    def monotonic(self) -> float:
        self._now += 1
        return self._now

    time = monotonic


def _released(
    cache: Path, folder: Path, source: Path, patch: pytest.MonkeyPatch, *given: str
) -> dict[str, Any]:
    """All files of a run but its private folder, of a training whose sums are all zero."""
    noised = algorithm.noised_mean
    words = (
        *TINY, *FOLDER, *PERSONS, "privacy.insecure_seed=7", "stages=[finetune,sample]", *given,
        f"data.source={source}", f"paths.cache={cache}", f"paths.outputs={folder}",
        f"paths.ledger={folder}.jsonl", f"paths.index={folder}.index",
    )  # fmt: skip
    with patch.context() as patched:
        patched.setattr(algorithm, "noised_mean", lambda total, *rest: noised(0 * total, *rest))
        for module in ("jobs.stages", "records.tracker", "training.loop"):
            patched.setattr(f"dp_lora.{module}.time", _Clock())
        stages.run(composed(*once(*words)))
    (directory,) = (folder / "default").iterdir()
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and "checkpoint" not in path.parts:
            text = re.sub(rb"(source|outputs|ledger|index): .*", b"", path.read_bytes())
            found[str(path.relative_to(directory))] = re.sub(
                rb'("(?:updated|start|end)": )[^,}\n]+', b"", text
            )
    return found


def test_what_is_released_tells_nothing_of_how_many_images_there_are(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all sums zero, sets in which one person has 3 or 90 images lead to the same bytes."""
    few = patients(tmp_path / "few" / "set", COUNTS | {"P05": 3})
    many = patients(tmp_path / "many" / "set", COUNTS | {"P05": 90})
    runs = [_released(cache, tmp_path / source.parent.name, source, monkeypatch) for source in (few, many)]
    assert len(runs[0]) >= 9 and runs[0].keys() == runs[1].keys()
    differing = {name: (runs[0][name], runs[1][name]) for name in runs[0] if runs[0][name] != runs[1][name]}
    assert not differing
    # The broken twin logs the number of images in place of the learning rate.
    call = finetune.FinetuneStep.__call__

    def leaking(self: finetune.FinetuneStep, step: int) -> dict[str, float]:
        return {**call(self, step), "learning_rate": float(len(self.labels))}

    monkeypatch.setattr(finetune.FinetuneStep, "__call__", leaking)
    twins = [
        _released(cache, tmp_path / f"twin-{source.parent.name}", source, monkeypatch)
        for source in (few, many)
    ]
    assert {name for name in twins[0] if twins[0][name] != twins[1][name]} == {"metrics.jsonl"}


def test_nothing_of_a_pattern_leaves() -> None:
    config = composed(*TINY, "data=imagefolder", "data.source=set", "privacy.unit=person",
                      "data.person_pattern='(Ann|Bob)_'")  # fmt: skip
    shown = json.dumps(manifest.settings(config)) + manifest.run_name(
        config, ["data.person_pattern=(Ann|Bob)_"]
    )
    assert "Ann" not in shown and '"unit": "person"' in shown
