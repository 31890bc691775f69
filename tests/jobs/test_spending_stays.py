"""What was charged stays charged: records that were lost, plans that changed, releases that were removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from dp_lora.config.schema import Config, DataConfig, PathsConfig
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.jobs.begun import releases_of
from dp_lora.jobs.image_index import ImageIndex
from dp_lora.jobs.release import next_release
from dp_lora.jobs.spending import Books, charge_release, charged, ledger_path, refusal
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.ledger import Charge, Ledger, fits, spent, spent_adaptively
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import append_line, read_lines, write_json
from dp_lora.training.receipts import read_receipt
from tests.builders.image_sets import private_images

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    places = {name: str(tmp_path / name) for name in ("outputs", "data", "index")}
    return Config(data=DataConfig("mnist5k"), paths=PathsConfig(**places))


def plan_of(num_examples: int = 1000, noise_multiplier: float = 1.0) -> PrivacyPlan:
    return make_plan(
        num_examples=num_examples, expected_batch_size=100, steps=80, noise_multiplier=noise_multiplier,
        target_epsilon=None, delta=1e-5, noise_multiplicity=1, max_grad_norm=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return plan_of()


@pytest.fixture(scope="module")
def images() -> ImageSplits:
    return private_images()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoint"
    path.mkdir(parents=True)
    return path


def begin_steps(folder: Path, first: int, last: int) -> None:
    for step in range(first, last):
        append_line(folder / "executions.jsonl", {"step": step, "execution": f"x{step}"})


def interrupted(config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits, *steps: int) -> None:
    """A start that begins the steps from the first of `steps` to before the second, and is then stopped."""

    def train() -> None:
        with charged(config, plan, folder, images):
            begin_steps(folder, *(steps or (0, 0)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()


def in_both(config: Config) -> list[list[Mechanism]]:
    """What ledger and index say is charged."""
    assert config.paths.index is not None
    books = (Ledger(ledger_path(config)), ImageIndex(Path(config.paths.index)))
    return [[charge.mechanism for charge in book.charges()] for book in books]


@pytest.mark.parametrize("left", [0, 79], ids=["removed", "cut"])
def test_an_ended_run_whose_record_was_lost_does_not_train_again(
    left: int, config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    with charged(config, plan, folder, images):
        begin_steps(folder, 0, 80)
    before, record = in_both(config), folder / "executions.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:left]))
    reason = refusal(config, plan, folder.parent, images)
    assert reason is not None and f"names {left} executions" in reason and "at least 80" in reason
    assert "Bring it back" in reason and "charged in full" in reason and "\n" not in reason
    with pytest.raises(UserError, match="the record was removed"), charged(config, plan, folder, images):
        raise AssertionError("it trained for free")
    assert in_both(config) == before == [[plan.mechanism]] * 2


def test_a_line_of_before_says_that_a_record_is_gone(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of earlier versions do not say how many executions were on record, only that there were some."""
    append = Ledger._append
    with monkeypatch.context() as patched:
        patched.setattr(
            Ledger, "_append", lambda self, charge, previous, turn=None: append(
                self, charge, previous, turn and turn._replace(begun=None)
            )
        )  # fmt: skip
        interrupted(config, plan, folder, images, 0, 30)
    assert not any("begun" in line for line in read_lines(ledger_path(config)))
    assert refusal(config, plan, folder.parent, images) is None
    (folder / "executions.jsonl").unlink()
    reason = refusal(config, plan, folder.parent, images)
    assert reason is not None and "names 0 executions" in reason


def test_a_start_that_is_stopped_takes_nothing_back(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    """Not the whole plan of a run that once filled its budget, when the budget is left out later."""
    config.privacy.budget_epsilon = plan.epsilon * 1.001
    interrupted(config, plan, folder, images, 0, 79)
    assert in_both(config) == [[plan.mechanism]] * 2
    config.privacy.budget_epsilon = None
    interrupted(config, plan, folder, images)
    assert in_both(config) == [[plan.mechanism]] * 2, "no other run was ever to be admitted"


def test_what_a_stopped_run_did_not_begin_is_given_back(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    for first, last in ((0, 30), (30, 30), (30, 45)):
        interrupted(config, plan, folder, images, first, last)
        assert [[one.steps for one in book] for book in in_both(config)] == [[last]] * 2


@pytest.mark.parametrize("kept", [True, False], ids=["with its plan.json", "without it"])
@pytest.mark.parametrize("other", [plan_of(10_000), plan_of(noise_multiplier=3.0)], ids=["images", "noise"])
def test_steps_stay_charged_with_the_noise_and_the_rate_that_they_had(
    other: PrivacyPlan, kept: bool, config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    if kept:
        write_json(folder / "plan.json", plan.to_dict())
    interrupted(config, plan, folder, images, 0, 79)
    before = ledger_path(config).read_bytes()
    reason = refusal(config, other, folder.parent, images)
    assert reason is not None and "this run began with " in reason and "\n" not in reason
    with pytest.raises(UserError, match="this run began with"), charged(config, other, folder, images):
        raise AssertionError("it trained")
    assert ledger_path(config).read_bytes() == before
    assert in_both(config) == [[dataclasses.replace(plan.mechanism, steps=79)]] * 2


def test_a_training_asks_the_budget_itself_before_it_begins(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    """Whatever `refusal` said before: another run may have come in between."""
    config.privacy.budget_epsilon = plan.epsilon / 2
    with (
        pytest.raises(UserError, match=r"^privacy\.budget_epsilon="),
        charged(config, plan, folder, images),
    ):
        raise AssertionError("it trained")
    assert in_both(config) == [[], []]


# Releases


def test_a_release_never_takes_the_place_of_another(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    first, second = Mechanism(0.8, 1.0, 1), Mechanism(40.0, 1.0, 1)
    with charged(config, plan, folder, images):
        begin_steps(folder, 0, 80)
    for number, mechanism in enumerate((first, second)):
        assert next_release(config, folder, images) == number
        with charge_release(config, mechanism, 1e-5, folder, number, images):
            pass  # releases.json is not there: it was removed
    assert in_both(config) == [[plan.mechanism, first, second]] * 2
    again = charge_release(config, second, 1e-5, folder, 0, images)
    with pytest.raises(UserError, match="another release was charged as number 0"), again:
        raise AssertionError("it was made")
    assert in_both(config) == [[plan.mechanism, first, second]] * 2


@pytest.mark.parametrize(("seed", "noise"), [(3, 4.0), (None, 0.0)])
def test_a_release_whose_noise_protects_nothing_is_charged_as_no_privacy(
    seed: int | None, noise: float, config: Config, folder: Path, images: ImageSplits
) -> None:
    for private_seed, mechanism in ((seed, Mechanism(noise, 1.0, 1)), (None, Mechanism(4.0, 1.0, 1))):
        config.privacy.insecure_seed = private_seed
        number = next_release(config, folder, images)
        with charge_release(config, mechanism, 1e-5, folder, number, images):
            pass
    assert [charge.private for charge in Ledger(ledger_path(config)).charges()] == [False, True]


@pytest.mark.parametrize(
    ("stages", "release", "evaluated", "asked"),
    [
        (["finetune", "sample", "evaluate"], "dp", False, True),
        (["evaluate"], "dp", False, True),
        (["evaluate"], "none", False, False),
        (["finetune", "sample"], "dp", False, False),
        (["evaluate"], "dp", True, False),
    ],
)
def test_after_the_training_the_books_are_asked_for_a_release_that_is_charged_alone(
    stages: list[str],
    release: str,
    evaluated: bool,
    asked: bool,
    config: Config,
    plan: PrivacyPlan,
    folder: Path,
    images: ImageSplits,
) -> None:
    """A ledger that was edited refuses the jobs that would be charged, and no other."""
    ledger_path(config).parent.mkdir(parents=True)
    ledger_path(config).write_text("no line of a ledger\n")
    (folder.parent / "adapter").mkdir()
    if evaluated:
        (folder.parent / "result.json").write_text("{}")
    config.stages, config.evaluation.release = stages, release
    assert (refusal(config, plan, folder.parent, images) is not None) is asked


# The delta of a budget


def charge(run: str, mechanism: Mechanism, delta: float) -> Charge:
    return Charge(run, "mnist", mechanism, delta)


def test_a_budget_is_judged_at_the_smallest_delta_whoever_asks() -> None:
    """First a run that fills epsilon 10 at delta 1e-5, then what would fit at a larger delta of its own."""
    run = charge("a", Mechanism(1.355, 0.25, 80), 1e-5)
    assert fits(run, [], 10.0)
    for mechanism in (Mechanism(5.0, 1.0, 1), Mechanism(1.355, 0.25, 1)):
        release = charge("r", mechanism, 1e-3)
        assert not fits(release, [run], 10.0)
        assert spent([run, release], 1e-5).epsilon > 9.97
    # The other way round: the second one brings the smaller delta.
    small, large = charge("b", Mechanism(2.0, 0.1, 40), 1e-5), charge("c", Mechanism(2.0, 0.1, 40), 1e-2)
    budget = spent_adaptively([small, large], 1e-2) * 1.05
    assert fits(large, [], budget) and not fits(small, [large], budget)
    # A charge of no step has no say.
    assert fits(large, [charge("d", Mechanism(2.0, 0.1, 0), 1e-9)], spent_adaptively([large], 1e-2) * 1.01)


def test_the_refusal_says_at_which_delta_and_by_what_it_counts(
    config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    with charged(config, plan, folder, images):
        begin_steps(folder, 0, 80)
    config.privacy.budget_epsilon = plan.epsilon * 1.01
    at_more = dataclasses.replace(plan, delta=1e-3)
    reason = refusal(config, at_more, folder.parent.parent / "another", images)
    assert reason is not None and "counted by the Renyi filter" in reason
    assert "smallest delta of all, 1e-05" in reason


# Files that are something else


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[]", "list in place of an object"),
        ('{"run": "a"}', "private_set is missing"),
        ('{"run": "a", "private_set": "mnist", "new": 1}', "new is unknown"),
        ('{"run": 3, "private_set": "mnist"}', "run is no text"),
        ('{"run": "a", "private_set": "mnist", "nonce": []}', "nonce is no text"),
    ],
)
def test_a_receipt_that_is_something_else_is_one_line(
    content: str, why: str, config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    (folder / "charge.json").write_text(content)
    actions: list[Callable[[], object]] = [
        lambda: read_receipt(folder), lambda: refusal(config, plan, folder.parent, images)
    ]  # fmt: skip
    for action in actions:
        with pytest.raises(UserError, match=rf"charge\.json: {why}; expected") as caught:
            action()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 0}',
        '{"step": 0, "execution": "c", "instead_of": "zz"}',
        '{"step": 0, "execution": []}',
        '{"step": {}, "execution": "c"}',
    ],
)
def test_a_record_that_is_something_else_is_one_line(
    line: str, config: Config, plan: PrivacyPlan, folder: Path, images: ImageSplits
) -> None:
    begin_steps(folder, 0, 1)
    with (folder / "executions.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"executions\.jsonl, line 2: no execution .*expected"):
        Executions(folder / "executions.jsonl", {}, writes=False)
    reason = refusal(config, plan, folder.parent, images)
    assert reason is not None and "line 2: no execution" in reason and "\n" not in reason


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"inputs": "a"}]'])
def test_releases_that_are_something_else_are_one_line(content: str, folder: Path) -> None:
    (folder / "releases.json").write_text(content)
    with pytest.raises(UserError, match=r"releases\.json: no list of releases; expected"):
        releases_of(folder)


def test_of_a_ledger_of_several_sets_those_count_that_may_be_on_the_images(
    config: Config, plan: PrivacyPlan, images: ImageSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.paths.ledger = str(tmp_path / "shared.jsonl")
    books, mine = Books(config, images), Charge("mine", "mnist", plan.mechanism, 1e-5)
    sets = {"same": "mnist", "other": "cifar10", "own": "imagefolder", "own, seen on others": "imagefolder"}
    for run, name in {"mine": "mnist", **sets}.items():
        books.ledger.enter(Charge(run, name, plan.mechanism, 1e-5))
    monkeypatch.setattr(ImageIndex, "apart", lambda self, found: {"own, seen on others"})
    unknown = [charge.run for charge in books.in_ledger(mine)]
    assert unknown == ["same", "own", "own, seen on others"]
    books.index.register(images)
    assert [charge.run for charge in books.in_ledger(mine)] == ["same", "own"]
