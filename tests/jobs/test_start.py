"""Trainings that start from a released adapter: their first values, and what their statement counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dp_lora.auditing.audit import _check_claim
from dp_lora.commands import evaluate as evaluate_command
from dp_lora.commands.export import export
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs.job import prepare
from dp_lora.jobs.spending import ledger_path
from dp_lora.jobs.stages import run
from dp_lora.jobs.start import OTHER_IMAGES, UNPROTECTED
from dp_lora.privacy import accounting
from dp_lora.privacy.ledger import Charge, Ledger, spent_adaptively
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import read_json, read_lines
from sweeps.bill import bill
from sweeps.collect import collect
from sweeps.folders import find
from tests.builders.commands import dp_lora
from tests.builders.image_sets import pixels, write_folder
from tests.builders.starts import DELTA, SHORT, mechanism, on, trained

pytestmark = pytest.mark.usefixtures("unchecked")


def by_filter(*mechanisms: Mechanism) -> float:
    return spent_adaptively([Charge(str(i), "x", one, DELTA) for i, one in enumerate(mechanisms)], DELTA)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    adapter = directory / "adapter"
    return load_file(adapter / "adapter_model.safetensors") | load_file(adapter / "trained.safetensors")


def test_going_on_starts_from_the_adapter_and_counts_both(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    first = trained(tiny(*SHORT))
    words = (*SHORT, f"train.continue_from={first}", "privacy.epsilon=2")
    config = tiny(*words, "train.learning_rate=1e-12")
    second = trained(config)
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    assert any(value.abs().max() > 1e-4 for name, value in before.items() if "lora_B" in name)
    stated = read_json(second / "privacy.json")
    expected = by_filter(mechanism(first), mechanism(second))
    assert stated["epsilon"] == pytest.approx(expected, rel=1e-9) and stated["epsilon"] > 4
    assert stated["accountant"] == "Renyi filter" and stated["private"] is True
    assert 1.9 < stated["epsilon_of_this_training"] <= 2
    (earlier,) = stated["earlier_trainings"]
    assert Mechanism(**earlier) == mechanism(first) and "epsilon_by_accountant" not in stated
    rows = [row["epsilon"] for row in read_lines(second / "metrics.jsonl")]
    assert rows[-1] == pytest.approx(expected, rel=1e-6) and all(row > 4 for row in rows)
    card = (second / "adapter" / "README.md").read_text()
    assert (
        "one earlier training on the same images" in card
        and f"**({float(f'{expected + 5e-4:.3f}'):.4g}" in card
    )
    # To the ledger they are two runs.
    assert [c.mechanism for c in Ledger(ledger_path(config)).charges()] == [
        mechanism(first),
        mechanism(second),
    ]
    copy = export(second, tmp_path / "export")
    assert read_json(copy / "privacy.json")["earlier_trainings"] == stated["earlier_trainings"]
    assert str(first) not in "".join(
        path.read_text() for path in copy.rglob("*.*") if path.suffix in (".md", ".json", ".yaml", ".jsonl")
    )
    # The bill counts the first one too, though it is not asked for it.
    ((of_set,),) = [bill([second]).sets]
    assert of_set.runs == 2 and of_set.adaptive_epsilon == pytest.approx(expected, rel=1e-9)
    assert bill([first, second]).sets[0].epsilon == of_set.epsilon
    _check_claim(prepare(config, second).plan, stated, second)  # an audit is of this training alone
    # Nor are the two of one setting to a report.
    assert len({row["setting"] for row in collect(find([first.parent]))}) == 2
    # The same command has nothing left to do; a third one counts three.
    assert trained(config) == second and read_json(second / "privacy.json") == stated
    third = trained(tiny(*SHORT, f"train.continue_from={second}", "train.max_steps=2"))
    found = read_json(third / "privacy.json")
    assert found["epsilon"] == pytest.approx(by_filter(*map(mechanism, (first, second, third))), rel=1e-9)
    assert len(found["earlier_trainings"]) == 2


def test_plans_that_were_fixed_beforehand_compose_as_such(tiny: Callable[..., Config]) -> None:
    first = trained(tiny(*SHORT))
    second = trained(tiny(*SHORT, f"train.continue_from={first}", "privacy.fixed_beforehand=true"))
    stated = read_json(second / "privacy.json")
    expected = accounting.composed([mechanism(first), mechanism(second)], DELTA)
    assert (stated["epsilon"], stated["accountant"]) == (expected.epsilon, expected.accountant)
    assert stated["epsilon"] < by_filter(mechanism(first), mechanism(second))
    assert "provided that all settings were fixed" in (second / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("seeded", [0, 1])
def test_no_part_without_privacy_makes_a_whole_with_it(seeded: int, tiny: Callable[..., Config]) -> None:
    given = [["privacy.insecure_seed=3"], []]
    first = trained(tiny(*SHORT, *given[seeded]))
    second = trained(tiny(*SHORT, f"train.continue_from={first}", *given[1 - seeded]))
    stated, card = read_json(second / "privacy.json"), (second / "adapter" / "README.md").read_text()
    assert stated["reproducible_noise"] is True and stated["epsilon"] > 4
    assert "NO privacy guarantee: its noise was derived from a seed" in card
    assert "differential privacy**" not in card and "NO privacy" in stated["covers"]


def test_a_baseline_without_noise_stays_without_a_guarantee(tiny: Callable[..., Config]) -> None:
    first = trained(tiny(*SHORT, "privacy.epsilon=inf"))
    second = trained(tiny(*SHORT, f"train.continue_from={first}"))
    stated = read_json(second / "privacy.json")
    assert stated["epsilon"] == "inf" and stated["private"] is False
    assert "NO privacy guarantee" in (second / "adapter" / "README.md").read_text()


# Adapters of other images


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two sets of private images that have none in common."""
    return tuple(write_folder(tmp_path / f"set{i}", pixels(i, 40)) for i in range(2))  # type: ignore[return-value]


def test_an_adapter_of_other_images_costs_nothing_here(
    tiny: Callable[..., Config], folders: tuple[Path, Path]
) -> None:
    first = trained(tiny(*on(folders[0])))
    words = on(folders[1], f"model.adapter={first}", "train.learning_rate=1e-12")
    second = trained(tiny(*words))
    stated = read_json(second / "privacy.json")
    assert stated["epsilon"] <= 4 and "earlier_trainings" not in stated
    assert OTHER_IMAGES in stated["does_not_cover"]
    before, after = weights(first), weights(second)
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    # From the folder of the adapter alone, as somebody was given it.
    given = shutil.copytree(first / "adapter", first.parents[2] / "given")
    third = trained(tiny(*on(folders[1], f"model.adapter={given}", "train.learning_rate=1e-12")))
    assert all(torch.allclose(before[name], weights(third)[name], atol=1e-9) for name in before)
    # Nobody can tell what that was trained on, so what the ledger has on these images counts.
    found = read_json(third / "privacy.json")
    assert OTHER_IMAGES in found["does_not_cover"]
    assert [Mechanism(**one) for one in found["earlier_trainings"]] == [mechanism(second)]


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_what_comes_of_an_adapter_without_a_guarantee_has_none(
    alone: bool, public: bool, tiny: Callable[..., Config], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    first = trained(tiny(*on(folders[0], "privacy.epsilon=inf")))
    start = shutil.copytree(first / "adapter", tmp_path / "given") if alone else first
    private = ["privacy.epsilon=inf", "data.public=true"] if public else []
    second = trained(tiny(*on(folders[1], f"model.adapter={start}", *private)))
    third = trained(tiny(*on(folders[0], f"model.adapter={second}", "data.public=true")))
    for last in (second, third):
        stated, card = read_json(last / "privacy.json"), (last / "adapter" / "README.md").read_text()
        assert stated["unprotected_start"] is True and UNPROTECTED in stated["does_not_cover"]
        assert "NO privacy guarantee" in stated["covers"] and "NO privacy guarantee" in card
        assert "Protects" not in card
        with pytest.raises(UserError, match="--with-uncovered"):
            export(last, tmp_path / f"out-{last.name[-8:]}")
    assert "from an adapter without one" in (second / "adapter" / "README.md").read_text() or public


def test_an_adapter_of_public_images_needs_no_guarantee(
    tiny: Callable[..., Config], folders: tuple[Path, Path]
) -> None:
    first = trained(tiny(*on(folders[0], "privacy.epsilon=inf", "data.public=true")))
    second = trained(tiny(*on(folders[1], f"model.adapter={first}")))
    assert "unprotected_start" not in read_json(second / "privacy.json")
    assert "**Protects" in (second / "adapter" / "README.md").read_text()


def test_a_training_on_the_same_images_counts_however_it_is_named(
    tiny: Callable[..., Config], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    first = trained(tiny(*on(folders[0])))
    # The same set in another place, under another ledger and index: the record of the images tells.
    elsewhere = shutil.copytree(folders[0], tmp_path / "copy")
    books = (f"paths.ledger={tmp_path / 'other.jsonl'}", f"paths.index={tmp_path / 'other'}")
    second = trained(tiny(*on(elsewhere, f"model.adapter={first}", *books)))
    # By the folder of the adapter, in the run or given away.
    given = shutil.copytree(first / "adapter", tmp_path / "given")
    for place in (first / "adapter", given):
        by_folder = trained(
            tiny(*on(folders[0], f"model.adapter={place}", f"privacy.epsilon={3.5 if place == given else 3}"))
        )
        counted = [Mechanism(**one) for one in read_json(by_folder / "privacy.json")["earlier_trainings"]]
        assert counted[0] == mechanism(first) and len(counted) == (2 if place == given else 1)
    # By way of an adapter of other images, and on a set that shares a part with the first one.
    between = trained(tiny(*on(folders[1], f"model.adapter={first}")))
    mixed = shutil.copytree(folders[0], tmp_path / "mixed")
    write_folder(mixed, pixels(7, 10), suffix="-new.png")
    last = trained(tiny(*on(mixed, f"model.adapter={between}")))
    for run_, others in ((second, False), (last, True)):
        stated = read_json(run_ / "privacy.json")
        (earlier,) = stated["earlier_trainings"]
        assert Mechanism(**earlier) == mechanism(first)
        assert stated["epsilon"] > 5 and (OTHER_IMAGES in stated["does_not_cover"]) == others
    assert "earlier_trainings" not in read_json(between / "privacy.json")


def test_what_the_books_do_not_know_counts_by_the_runs_that_are_there(
    tiny: Callable[..., Config], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """From one set to another and back, each time on another machine with books of its own; budgets too."""
    first = trained(tiny(*on(folders[0])))
    between = trained(tiny(*on(folders[1], f"model.adapter={first}")))
    books = (f"paths.ledger={tmp_path / 'other.jsonl'}", f"paths.index={tmp_path / 'other'}")
    words = on(folders[0], f"model.adapter={between}", *books)
    with pytest.raises(UserError, match=r"^privacy\.budget_epsilon=5: 1 run on imagefolder spent epsilon"):
        run(tiny(*words, "privacy.budget_epsilon=5"))
    assert not (tmp_path / "other.jsonl").exists()
    last = trained(tiny(*words, "privacy.budget_epsilon=20"))
    (earlier,) = read_json(last / "privacy.json")["earlier_trainings"]
    assert Mechanism(**earlier) == mechanism(first)


def test_a_statement_that_knows_less_of_earlier_trainings_is_not_taken(
    tiny: Callable[..., Config], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    first = trained(tiny(*on(folders[0])))
    mixed = shutil.copytree(folders[0], tmp_path / "mixed")
    write_folder(mixed, pixels(7, 10), suffix="-new.png")
    words = on(mixed, f"model.adapter={first}")
    books = (f"paths.ledger={tmp_path / 'other.jsonl'}", f"paths.index={tmp_path / 'other'}")
    without = trained(tiny(*words, *books))
    assert "earlier_trainings" not in read_json(without / "privacy.json")
    again = trained(tiny(*words, "sampler.guidance=2"))
    assert (again / "checkpoint" / "executions.jsonl").exists(), "it trained by itself"
    assert len(read_json(again / "privacy.json")["earlier_trainings"]) == 1


def test_records_that_were_edited_or_cut_are_refused(
    tiny: Callable[..., Config], folders: tuple[Path, Path]
) -> None:
    first = trained(tiny(*on(folders[0])))
    second = trained(tiny(*on(folders[0], f"train.continue_from={first}")))
    words = on(folders[0], f"train.continue_from={second}", "privacy.epsilon=1")
    record = second / "checkpoint" / "start.json"
    shorter = {**read_json(record), "trainings": []}
    for cut, line in ((shorter, "says less of earlier trainings"), (3, "expected what the run")):
        record.write_text(json.dumps(cut))
        with pytest.raises(UserError, match=rf"start\.json: .*{line}"):
            run(tiny(*words))
    path = first / "privacy.json"
    path.write_text(json.dumps({**read_json(path), "noise_multiplier": 40.0}))
    with pytest.raises(UserError, match=r"privacy\.json: noise_multiplier 40\.0 is not that of the training"):
        run(tiny(*on(folders[0], f"train.continue_from={first}", "privacy.epsilon=1")))


def test_what_was_known_when_a_run_began_stays_known(
    tiny: Callable[..., Config], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """A ledger and an index that are gone later take nothing out of the statement."""
    first = trained(tiny(*on(folders[0])))
    mixed = shutil.copytree(folders[0], tmp_path / "mixed")
    write_folder(mixed, pixels(7, 10), suffix="-new.png")
    config = tiny(*on(mixed, f"model.adapter={first}"))
    second = trained(config)
    ledger_path(config).unlink()
    shutil.rmtree(str(config.paths.index))
    start = prepare(config, second).start
    assert start is not None and [one.mechanism for one in start.before] == [mechanism(first)]


# What cannot be started from


def test_images_that_changed_are_no_same_images(
    tiny: Callable[..., Config], folders: tuple[Path, Path]
) -> None:
    first = trained(tiny(*on(folders[0])))
    with pytest.raises(UserError, match=r"^train\.continue_from=.*: was trained on other images than these"):
        run(tiny(*on(folders[1], f"train.continue_from={first}")))
    given = shutil.copytree(first / "adapter", first.parents[2] / "given")
    with pytest.raises(UserError, match=r"^train\.continue_from=.*given: the folder of an adapter; expected"):
        run(tiny(*on(folders[0], f"train.continue_from={given}")))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["lora.rank=2"],
            r"lora\.rank: the adapter in .* has r 8, and this training 2; expected the settings",
        ),
        (["lora.alpha=4"], r"lora\.alpha: the adapter in .* has lora_alpha 8"),
        (["lora.target_modules=[to_v]"], r"lora\.target_modules: the adapter in .* has target_modules"),
        (["trainable=embedder"], r"lora\.rank: the adapter in .* has r 8, and this training None"),
        (
            ["trainable=lora_alone"],
            r"trainable\.components: the adapter in .* also holds class_embedder\.weight",
        ),
        (["model.adapter=x"], r"train\.continue_from=.* with model\.adapter=x: a training starts from one"),
    ],
)
def test_an_adapter_of_other_settings_is_one_line(
    words: list[str], line: str, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    first = trained(tiny(*SHORT))
    ledger = ledger_path(tiny()).read_bytes()
    with pytest.raises(UserError, match=f"^{line}"):
        run(tiny(*SHORT, f"train.continue_from={first}", *words))
    assert ledger_path(tiny()).read_bytes() == ledger, "nothing is charged"
    assert len(list((tmp_path / "outputs" / "default").iterdir())) == 1, "and nothing written"


def test_no_training_whose_plan_tells_the_number_of_images_is_added_to_or_removed_from(
    tiny: Callable[..., Config],
) -> None:
    other = ("privacy.adjacency=add_or_remove", "train.sample_rate=0.04")
    first = trained(tiny(*SHORT))
    with pytest.raises(UserError, match=r"under privacy\.adjacency=zero_out, whose sample rate and noise"):
        run(tiny(*SHORT, f"train.continue_from={first}", *other))
    # The other way round the stronger promise of the first one stays true.
    second = trained(tiny(*SHORT, *other))
    third = trained(tiny(*SHORT, f"train.continue_from={second}"))
    assert read_json(third / "privacy.json")["adjacency"].startswith("zero out one image")
    trained(tiny(*SHORT, f"train.continue_from={second}", *other, "privacy.epsilon=3"))


def test_what_is_no_finished_run_is_one_line(tiny: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^model\.adapter=nowhere: nowhere: expected a run directory, or the"
    ):
        run(tiny(*SHORT, "model.adapter=nowhere"))
    with pytest.raises(UserError, match=r"^privacy\.fixed_beforehand=true: says how train\.continue_from"):
        tiny(*SHORT, "privacy.fixed_beforehand=true")
    first = trained(tiny(*SHORT))
    other = shutil.copytree(first, tmp_path / "unfinished")
    record = read_json(other / "privacy.json")
    (other / "privacy.json").write_text(json.dumps({**record, "complete": False}))
    with pytest.raises(UserError, match=r"the run is done; expected one whose training has ended"):
        run(tiny(*SHORT, f"train.continue_from={other}"))


def test_an_adapter_that_changed_since_the_run_began_is_refused(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    first = trained(tiny(*SHORT))
    given = shutil.copytree(first / "adapter", tmp_path / "given")
    words = (*SHORT, f"model.adapter={given}")
    trained(tiny(*words))
    path = given / "trained.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"the adapter is not the one that this run .* began with; expected it"
    ):
        run(tiny(*words))
    # Nor does a job with other images of it take that training.
    again = trained(tiny(*words, "sampler.guidance=2"))
    assert (again / "checkpoint" / "executions.jsonl").exists()


def test_another_seed_pre_trains_no_other_model(tiny: Callable[..., Config], cache: Path) -> None:
    first = trained(tiny(*SHORT))
    models = set((cache / "models").iterdir())
    with pytest.raises(
        UserError, match=r"^train\.continue_from=.*: these settings ask for a pre-trained model"
    ):
        run(tiny(*SHORT, f"train.continue_from={first}", "seed=77"))
    assert set((cache / "models").iterdir()) == models


def test_a_finished_run_stays_finished_when_what_it_started_from_is_moved(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    first = trained(tiny(*SHORT))
    words = (*SHORT, f"train.continue_from={first}")
    second = trained(tiny(*words, "stages=[finetune,sample]"))
    first.rename(tmp_path / "elsewhere")
    assert trained(tiny(*words, "stages=[finetune,sample]")) == second
    with pytest.raises(
        UserError, match=r"the adapter that the training started from is missing; put it back"
    ):
        run(tiny(*words, "stages=[finetune,sample,evaluate]"))


def test_the_images_before_are_those_of_the_adapter_that_it_started_from(
    tiny: Callable[..., Config],
) -> None:
    """In the job itself, and when the run is evaluated afterwards."""
    short = (*SHORT, "evaluation.classifiers=[]")
    first = trained(tiny(*short, "stages=[finetune,sample,evaluate]", "train.learning_rate=0.3"))
    words = (*short, "stages=[finetune,sample,evaluate]", f"train.continue_from={first}")
    second = trained(tiny(*words))
    one, two = (read_json(run_ / "result.json")["metrics"] for run_ in (first, second))
    assert two["fd_lite0_before"] == pytest.approx(one["fd_lite0"], rel=1e-4)
    assert one["fd_lite0_before"] != pytest.approx(one["fd_lite0"], rel=1e-3)
    assert dp_lora(str(second), "evaluation.bootstrap=40", "name=again", command=evaluate_command.main) == 0
    again = read_json(second / "evaluations" / "again.json")["metrics"]
    assert again["fd_lite0_before"] == two["fd_lite0_before"]
