"""A job that chooses its matrices: what it says of the choice, what leaves it, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from dp_lora.auditing import audit as auditing
from dp_lora.config.schema import Config
from dp_lora.errors import PrivateRefusal, UserError
from dp_lora.jobs import apart, choosing
from dp_lora.jobs.job import plan_of, prepare
from dp_lora.jobs.stages import finetuned_model, model_to_train, run
from dp_lora.models import adapters, candidates
from dp_lora.privacy.ledger import Ledger
from dp_lora.records import manifest
from dp_lora.records.card import model_card
from dp_lora.storage.files import read_json, write_json
from tests.builders.exported import export
from tests.builders.tiny import composed, words

pytestmark = pytest.mark.usefixtures("unchecked")

SALIENT = ("trainable=salient", "trainable.scout_steps=2", "trainable.share=0.25", "evaluation.extractors=[]",
           "evaluation.classifier_epochs=1")  # fmt: skip


@pytest.fixture(scope="module")
def done(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run with a choice by its first noisy steps."""
    outputs = tmp_path_factory.mktemp("salient") / "outputs"
    return Path(run(composed(*words(cache, outputs), *SALIENT), SALIENT)["directory"])


def again(done: Path, cache: Path, *given: str) -> Config:
    return composed(*words(cache, done.parents[1]), *SALIENT, *given)


def test_statement_result_and_card_say_what_was_chosen_and_by_what(done: Path) -> None:
    privacy, result = read_json(done / "privacy.json"), read_json(done / "result.json")
    choice = privacy["choice"]
    assert result["choice"] == choice and privacy["steps"] == privacy["planned_steps"] == 4
    assert (choice["by"], choice["scout_steps"], choice["number"], choice["of"]) == ("salient", 2, 6, 24)
    assert len(choice["scores"]) == 24 and set(choice["chosen"]) < choice["scores"].keys()
    assert choosing.COVERED in privacy["covers"]
    card = (done / "adapter" / "README.md").read_text()
    assert "6 of 24 matrices have adapters, chosen by the first 2 noisy steps" in card
    assert all(f"| `{name}` |" in card for name in choice["scores"]) and card.count("| yes |") == 6


def test_the_ledger_is_charged_with_scouting_and_training_steps(done: Path) -> None:
    outputs = done.parents[1]
    (charge,) = Ledger(outputs.with_name(f"{outputs.name}.privacy_ledger.jsonl")).charges()
    assert charge.mechanism.steps == 4


def test_the_adapter_lists_the_chosen_matrices_and_loads_elsewhere(done: Path, cache: Path) -> None:
    choice = read_json(done / "privacy.json")["choice"]
    config = LoraConfig.from_pretrained(str(done / "adapter"))
    assert set(config.target_modules) == set(choice["chosen"])
    state = load_file(done / "adapter" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in state} == set(
        choice["chosen"]
    )
    job = prepare(again(done, cache), done)
    restored, trained = finetuned_model(job), model_to_train(job)
    assert list(candidates.candidates(restored)) == choice["chosen"] == list(candidates.candidates(trained))
    assert adapters.count(trained) == read_json(done / "result.json")["trainable_parameters"]


def test_what_leaves_holds_the_choice_and_nothing_of_the_sums(done: Path, tmp_path: Path) -> None:
    folder = export(done, tmp_path / "given")
    choice = read_json(done / "privacy.json")["choice"]
    assert (
        read_json(folder / "privacy.json")["choice"] == choice == read_json(folder / "result.json")["choice"]
    )
    assert not list(folder.rglob("*.pt")) and not (folder / "checkpoint").exists()


def test_a_choice_of_another_shape_does_not_leave() -> None:
    for wrong in ({"chosen": ["/home/ann/a"]}, {"scores": {"a": "text"}}, {"by": 3}):
        with pytest.raises(UserError):
            manifest.privacy({"choice": wrong})
    assert manifest.privacy({"choice": {"by": "random", "sums": [1.0]}}) == {"choice": {"by": "random"}}


def test_a_run_that_shares_the_training_has_its_choice(done: Path, cache: Path) -> None:
    other = Path(run(again(done, cache, "sampler.steps=3"), [*SALIENT, "sampler.steps=3"])["directory"])
    assert other != done and (other / "checkpoint" / "training.json").exists()
    assert read_json(other / "result.json")["choice"] == read_json(done / "privacy.json")["choice"]


def test_a_training_goes_on_from_the_chosen_matrices(done: Path, cache: Path) -> None:
    chosen = read_json(done / "privacy.json")["choice"]["chosen"]
    targets = f"lora.target_modules=[{','.join(chosen)}]"
    given = (f"train.continue_from='{done}'", targets, "stages=[finetune]", "train.max_steps=1")
    after = Path(run(composed(*words(cache, done.parents[1]), *given), given)["directory"])
    record = read_json(after / "privacy.json")
    assert [one["steps"] for one in record["earlier_trainings"]] == [4], "all that was spent to choose, too"
    assert "choice" not in record


def test_the_audit_knows_how_many_coordinates_a_scouting_step_released(done: Path, cache: Path) -> None:
    job, norms = prepare(again(done, cache), done), auditing._update_norms(done)
    trained = adapters.count(model_to_train(job))
    dimension = read_json(done / "privacy.json")["choice"]["dimension"]
    assert auditing._dimensions(job, norms, trained) == [dimension, dimension, trained, trained]
    assert dimension == 24 * 32 * 8 != trained


@pytest.mark.parametrize("way", ["random", "salient_public"])
def test_a_choice_without_private_images_is_made_once_and_before_the_training(
    way: str, tiny: Callable[..., Config]
) -> None:
    steps = ["trainable.scout_steps=2"] if way == "salient_public" else []
    given = (f"trainable={way}", "trainable.share=0.25", *steps, "stages=[finetune]", "train.max_steps=2")
    # The public set is the private one here: digits that anybody may see.
    config = tiny(*given, "data.public=true")
    directory = Path(run(config, given)["directory"])
    record = read_json(directory / "privacy.json")
    choice, kept = record["choice"], read_json(directory / "checkpoint" / choosing.CHOICE)
    assert choice == kept and choice["by"] == way and len(choice["chosen"]) == 6
    assert ("scores" in choice) == (way == "salient_public")
    assert record["steps"] == 2 and choosing.COVERED not in record["covers"]
    assert (
        f"chosen {'by a seed' if way == 'random' else 'by 2 batches of the public images'}"
        in (directory / "adapter" / "README.md").read_text()
    )
    # A run that goes on keeps it.
    job = prepare(config, directory)
    model = model_to_train(job)
    first = [name for name in choice["chosen"] if name != choice["chosen"][0]]
    write_json(directory / "checkpoint" / choosing.CHOICE, {**kept, "chosen": first})
    job.choice = None
    whole = model_to_train(job)
    assert len(candidates.candidates(whole)) == 24 and len(candidates.candidates(model)) == 6
    found = choosing.before_training(config, whole, job.plan, job.images, directory / "checkpoint")
    assert found is not None and list(candidates.candidates(whole)) == found["chosen"] == first


def test_the_public_choice_is_no_function_of_a_private_image(tiny: Callable[..., Config]) -> None:
    config = tiny("trainable=salient_public", "trainable.scout_steps=2", "trainable.share=0.25")
    job = prepare(config, Path(config.paths.outputs) / "run")
    found = []
    for shift in (0, 50):
        images = job.images._replace(
            train=job.images.train.subset(np.arange(len(job.images.train))[::-1])
            if shift
            else job.images.train
        )
        folder = Path(config.paths.outputs) / f"checkpoint{shift}"
        found.append(choosing.before_training(config, model_to_train(job), job.plan, images, folder))
    assert found[0] == found[1]


def test_private_images_do_not_choose_as_public_ones(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise PrivateRefusal("public_data.source: 3 of the private images are among the public ones")

    monkeypatch.setattr(apart, "refuse_shared_images", refuse)
    config = tiny("trainable=salient_public", "trainable.scout_steps=2")
    with pytest.raises(PrivateRefusal, match="among the public ones"):
        prepare(config, Path(config.paths.outputs) / "run")


def test_scouting_that_leaves_no_step_to_train_is_refused_before_anything_is_written(
    tiny: Callable[..., Config],
) -> None:
    config = tiny("trainable=salient", "trainable.scout_steps=4", "train.max_steps=null", "train.epochs=0.1")
    with pytest.raises(UserError, match=r"trainable.scout_steps=4: expected fewer than the \d+ noisy steps"):
        run(config)
    assert not Path(config.paths.outputs).exists() or not list(
        Path(config.paths.outputs).rglob("privacy.json")
    )


def test_the_plan_of_a_scouting_job_is_that_of_a_job_of_as_many_steps(tiny: Callable[..., Config]) -> None:
    with_scouting, without = tiny(*SALIENT), tiny()
    assert plan_of(with_scouting, 1500) == plan_of(without, 1500)


def test_a_card_of_a_run_without_a_choice_has_no_such_section() -> None:
    record = {"epsilon": 1.0, "delta": 1e-5, "adjacency": "zero out", "covers": "x", "does_not_cover": "y"}
    card = model_card(
        record,
        base_model="m",
        data_name="d",
        trainable=["lora"],
        rank=2,
        target_modules=["qkv"],
        parameters=3,
    )
    assert "## Matrices" not in card
