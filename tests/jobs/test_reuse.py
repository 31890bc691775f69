"""Runs that differ only in what follows the training train once, and spend once."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from dp_lora.config.identity import fingerprint, training_fingerprint
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs import reuse
from dp_lora.jobs.stages import run
from dp_lora.privacy.ledger import Charge, Ledger
from dp_lora.storage.files import read_json, read_lines
from sweeps import plan
from sweeps.bill import bill
from tests.builders.commands import FOLDER, interrupted
from tests.builders.forked import Nursery
from tests.builders.image_sets import pixels, write_folder
from tests.builders.tiny import composed, once, words

pytestmark = pytest.mark.usefixtures("unchecked")

DRAWS = ("stages=[finetune,sample]",)
Run = Callable[..., Path]


@pytest.fixture
def job(tiny: Callable[..., Config]) -> Run:
    """Runs a tiny job, and gives its run directory."""
    return lambda *given: Path(run(tiny(*given), given)["directory"])


@pytest.fixture(scope="module")
def done(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A run that is done, and how another one in its place is run."""
    outputs = tmp_path_factory.mktemp("done") / "outputs"

    def again(*given: str) -> Path:
        return Path(run(composed(*words(cache, outputs), *given), given)["directory"])

    return again(*DRAWS), again


def charges(directory: Path) -> list[Charge]:
    """The lines of the ledger of a job of `tiny`."""
    outputs = directory.parents[1]
    return Ledger(outputs.with_name(f"{outputs.name}.privacy_ledger.jsonl")).charges()


def adapter(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "adapter").iterdir())}


def test_only_sampler_and_evaluation_may_differ(tiny: Callable[..., Config]) -> None:
    follow = ("sampler.guidance=2", "evaluation.classifier_epochs=3", "sampler=ddim")
    same = [tiny(), *map(tiny, follow)]
    assert len({training_fingerprint(config) for config in same}) == 1
    assert len({fingerprint(config) for config in same}) == len(same)
    others = ["seed=1", "lora.rank=3", "train.max_steps=5", "privacy.delta=1e-4", "data.classes=[1,2]",
              "privacy.insecure_seed=3", "model.pretrain.unet_steps=9",
              "tracking.private_loss=true"]  # fmt: skip
    found = {training_fingerprint(tiny(word)) for word in others}
    assert len(found | {training_fingerprint(tiny())}) == len(others) + 1


def test_another_guidance_takes_the_training_and_spends_nothing(
    job: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    first = job(*DRAWS)
    spent = charges(first)
    capsys.readouterr()
    second = job(*DRAWS, "sampler.guidance=3")
    said = capsys.readouterr().err
    assert f"finetune: taken from {first}, which differs in sampler or evaluation only" in said
    assert second != first and len(spent) == 1 and charges(second) == spent
    assert adapter(second) == adapter(first)
    assert read_json(second / "privacy.json") == read_json(first / "privacy.json")
    assert [row["step"] for row in read_lines(second / "metrics.jsonl")] == [1, 2, 3, 4]
    assert not np.array_equal(*(np.load(one / "samples.npz")["images"] for one in (first, second)))
    # No key, and nothing that could go on with the training.
    assert {path.name for path in (second / "checkpoint").iterdir()} == {
        "adapter.json", "content.json", "lock", "training.json", "wandb_id",
    }  # fmt: skip
    # The third takes it from the first too, and finds it by the second's directory if it is asked again.
    third = job(*DRAWS, "sampler.steps=2")
    assert reuse.taken(third) == reuse.taken(second) and charges(third) == spent
    together, alone = bill([first, second, third]).sets[0], bill([first]).sets[0]
    assert replace(together, ledger=alone.ledger) == alone and together.runs == 1
    assert bill([third]).sets[0] == alone


def test_a_run_that_took_its_training_is_done_when_it_is_asked_again(
    job: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    job(*DRAWS)
    second = job(*DRAWS, "sampler.guidance=3")
    (second / "samples.npz").unlink()
    capsys.readouterr()
    assert job(*DRAWS, "sampler.guidance=3") == second
    assert f"finetune: done already, {second / 'adapter'}" in capsys.readouterr().err
    assert (second / "samples.npz").exists() and len(charges(second)) == 1


def test_a_training_that_is_not_complete_is_not_taken(job: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("dp_lora.privacy.step.noised_mean", interrupted(3))
        with pytest.raises(KeyboardInterrupt):
            job(*DRAWS)
    second = job(*DRAWS, "sampler.guidance=3")
    assert reuse.taken(second) is None and len(charges(second)) == 2


def test_a_kill_while_the_training_is_taken_leaves_no_half(job: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = job(*DRAWS)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dp_lora.jobs.reuse.keep_adapter", killed)
        with pytest.raises(KeyboardInterrupt):
            job(*DRAWS, "sampler.guidance=3")
    second = job(*DRAWS, "sampler.guidance=3")
    assert adapter(second) == adapter(first) and len(charges(first)) == 1
    assert [row["step"] for row in read_lines(second / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_kill_before_the_training_is_made_known_loses_nothing(
    job: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("dp_lora.jobs.reuse.offer", lambda *_: None)
        first = job(*DRAWS)
    assert job(*DRAWS) == first
    assert charges(job(*DRAWS, "sampler.guidance=3")) == charges(first)


def test_without_noise_too_the_training_is_taken(job: Run) -> None:
    first = job(*DRAWS, "privacy.epsilon=inf")
    second = job(*DRAWS, "privacy.epsilon=inf", "sampler.guidance=3")
    rows = [(one / "metrics.jsonl").read_text() for one in (first, second)]
    assert rows[0] == rows[1] and '"epsilon": "inf"' in rows[0]


def test_a_training_from_other_weights_is_not_taken(
    job: Run, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(pretrained, tmp_path / "base")
    first = job(*DRAWS, f"model.pretrained={base}")
    part = base / "class_embedder" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(part).items()}, part)
    second = job(*DRAWS, f"model.pretrained={base}", "sampler.guidance=3")
    assert f"the training of {first} began with other weights" in capsys.readouterr().err
    assert reuse.taken(second) is None and len(charges(second)) == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("checkpoint/content.json", "[]", "content.json: expected the record of a run's images"),
        (
            "metrics.jsonl",
            '{"stage": "finetune"}\n',
            "metrics.jsonl: expected the rows that the training logged",
        ),
        ("metrics.jsonl", "", "metrics.jsonl: expected the steps of the training in their order"),
        ("privacy.json", "[]", "privacy.json: expected a JSON object"),
        ("config.yaml", "x", "config.yaml: says no longer what this run is"),
        (None, "[]", "expected the name of a run as this program wrote it; remove the file"),
    ],
)
def test_damage_to_what_would_be_taken_spends_nothing(
    done: tuple[Path, Run], name: str | None, content: str, said: str
) -> None:
    first, again = done
    path = next((first.parents[1]).glob(".trainings-*/*.json")) if name is None else first / name
    before, spent = path.read_bytes(), charges(first)
    path.write_text(content)
    try:
        with pytest.raises(UserError, match=re.escape(said)):
            again(*DRAWS, "sampler.guidance=3")
    finally:
        path.write_bytes(before)
    assert charges(first) == spent


def test_a_damaged_training_is_refused_and_a_removed_one_is_made_again(job: Run) -> None:
    first = job(*DRAWS)
    weights = next((first / "adapter").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{weights.name} is damaged"):
        job(*DRAWS, "sampler.guidance=3")
    assert len(charges(first)) == 1
    shutil.rmtree(first)
    second = job(*DRAWS, "sampler.guidance=3")
    assert reuse.taken(second) is None and len(charges(second)) == 2


def test_a_run_that_trains_after_all_is_not_the_one_that_it_had_taken(job: Run) -> None:
    first = job(*DRAWS)
    second = job(*DRAWS, "sampler.guidance=3")
    for lost in (first, second / "adapter"):
        shutil.rmtree(lost)
    assert job(*DRAWS, "sampler.guidance=3") == second
    assert reuse.taken(second) is None and len({charge.run for charge in charges(second)}) == 2
    assert bill([second]).sets[0].steps == 4


def test_a_training_on_other_images_is_not_taken(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = pixels(3, 24)
    source = write_folder(tmp_path / "set", images)

    def go(*given: str) -> Path:
        config = composed(
            *words(cache, tmp_path / "outputs"), *FOLDER, f"data.source={source}", *DRAWS, *given
        )
        return Path(run(config, given)["directory"])

    first = go()
    images[5, 0, 0, 0] ^= 1
    write_folder(source, images)
    second = go("sampler.guidance=3")
    assert f"the training of {first} was of other images" in capsys.readouterr().err
    assert reuse.taken(second) is None and len(charges(second)) == 2


def test_a_full_budget_has_room_for_what_costs_nothing(job: Run) -> None:
    budget = "privacy.budget_epsilon=15"
    first = job(*DRAWS, budget)
    with pytest.raises(UserError, match=r"privacy\.budget_epsilon=15"):
        job(*DRAWS, budget, "lora.rank=3")
    assert charges(job(*DRAWS, budget, "sampler.guidance=3")) == charges(first)
    # Without the training there is no room, and nothing is begun.
    shutil.rmtree(first)
    with pytest.raises(UserError, match=r"privacy\.budget_epsilon=15"):
        job(*DRAWS, budget, "sampler.guidance=4")
    (begun,) = (one for one in first.parent.iterdir() if "guidance=4" in one.name)
    assert [path.name for path in begun.rglob("*") if path.is_file()] == ["lock"]


def test_a_release_is_charged_to_the_run_that_trained(job: Run) -> None:
    given = ("evaluation=release", "evaluation.classifier_epochs=1")
    first = job(*given)
    second = job(*given, "sampler.guidance=3")
    (training, *releases) = charges(second)
    assert [c.run for c in releases] == [f"{training.run}-release-0", f"{training.run}-release-1"]
    statements = [read_json(one / "privacy.json")["release"] for one in (first, second)]
    assert [one["releases"] for one in statements] == [1, 2]
    assert statements[1]["epsilon"] > statements[0]["epsilon"]
    (found,) = bill([first, second]).sets
    assert (found.runs, found.steps) == (1, 4)
    assert bill([second]).sets == bill([first, second]).sets
    # Another budget has other noise, and the bill counts each release with its own.
    third = job(*given, "evaluation.release_epsilon=0.5")
    stated = read_json(third / "privacy.json")["release"]
    assert len(set(stated["noise_multipliers"])) == 2 and stated["releases"] == 3
    for one in (third, second):
        spent = read_json(one / "privacy.json")["release"]["with_training"]["epsilon"]
        assert bill([one]).sets[0].epsilon >= spent * (1 - 1e-9)
    whole = bill([second, third]).sets[0].epsilon
    assert whole == pytest.approx(stated["with_training"]["epsilon"])
    # The first goes on where it is, and without it no more can be released.
    (first / "result.json").unlink()
    assert job(*given) == first and len(charges(first)) == 4
    first.rename(first.with_name("away"))
    assert bill([second, third]).sets[0].epsilon == pytest.approx(whole)
    (second / "result.json").unlink()
    with pytest.raises(UserError, match="whose training this one has taken"):
        job(*given, "sampler.guidance=3")


def test_two_jobs_at_once_train_once(nursery: Nursery, cache: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    started = [
        nursery.start(once(*words(cache, outputs), *DRAWS, f"sampler.guidance={guidance}"),
                      tmp_path / f"said{guidance}", tmp_path, os.environ)
        for guidance in (2, 3)
    ]  # fmt: skip
    assert [process.wait(300) for process in started] == [0, 0]
    runs = list((outputs / "default").iterdir())
    assert len(runs) == 2 and len({reuse.taken(one) is None for one in runs}) == 2
    assert len(charges(runs[0])) == 1 and adapter(runs[0]) == adapter(runs[1])


def test_a_plan_counts_a_training_once(tiny: Callable[..., Config]) -> None:
    configs = [tiny(f"sampler.guidance={guidance}") for guidance in (1, 2, 3)]
    (line,) = plan.spending(configs)
    assert line.startswith("privacy on digits: 1 run at epsilon 10")
