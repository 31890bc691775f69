"""Released metrics: one image's part measured, with broken twins; the noise; what is kept and counted."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.evaluation.evaluate import Evaluation
from dp_lora.jobs import release
from dp_lora.jobs.begun import releases_of
from dp_lora.jobs.release import Counts, evaluate_privately, keep, noised_sum, release_record
from dp_lora.privacy.accounting import epsilon, noise_multiplier_for
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import read_json

pytestmark = pytest.mark.usefixtures("unchecked")

NAMES = ("cnn", "wrn", "resnet")


def answers(n: int) -> list[Tensor]:
    """Which of `n` images three classifiers get right: 4 of 5, 1 of 2, all."""
    place = torch.arange(n)
    return [place % 5 > 0, place % 2 > 0, place >= 0]


# Sensitivity


@pytest.mark.parametrize("classifiers", [1, 3])
def test_one_image_moves_the_sum_by_exactly_one(classifiers: int) -> None:
    counts, right = Counts(NAMES[:classifiers]), answers(10)[:classifiers]
    whole = counts.rows(right).sum(dim=0)
    for i in range(10):
        kept = torch.arange(10) != i
        without = counts.rows([one[kept] for one in right]).sum(dim=0)
        assert float((whole - without).norm()) == pytest.approx(1)


def test_without_the_shares_one_image_does_move_it_further() -> None:
    counts = Counts(NAMES)
    counts.scale = 1.0
    rows = counts.rows(answers(10))
    assert rows.norm(dim=1).tolist() == pytest.approx([3**0.5] * 10)
    with pytest.raises(AssertionError):
        noised_sum(rows, 3.0, Randomness.from_seed(0))


# What the sums say


def test_without_noise_the_sums_tell_accuracies_and_number() -> None:
    counts = Counts(NAMES)
    sums = counts.rows(answers(50)).sum(dim=0)
    assert counts.values(sums) == {
        "dp_accuracy_cnn": pytest.approx(0.8),
        "dp_accuracy_wrn": pytest.approx(0.5),
        "dp_accuracy_resnet": pytest.approx(1.0),
    }
    assert counts.number(sums) == pytest.approx(50)


def test_sums_of_noise_alone_have_values() -> None:
    counts = Counts(NAMES)
    noise = torch.randn(6, generator=torch.Generator().manual_seed(0)).double()
    for sums in (noise, -100 * noise, torch.zeros_like(noise)):
        assert all(0 <= value <= 1 for value in counts.values(sums).values())


def test_the_simulated_deviation_is_that_of_the_accuracy() -> None:
    # To first order the accuracy a = r / (r + w) of noise with deviation s on r and w varies by
    # s sqrt(a^2 + (1 - a)^2) / n; 200 simulations know a deviation to 5 %, so 30 % is six of theirs.
    counts, n, sigma = Counts(NAMES), 1000, 4.0
    sums = counts.rows(answers(n)).sum(dim=0)
    found = counts.noise_effects(sums, sigma, seed=0)
    for name, accuracy in counts.values(sums).items():
        expected = sigma * 3**0.5 * (accuracy**2 + (1 - accuracy) ** 2) ** 0.5 / n
        if accuracy < 1:
            assert found[name]["deviation"] == pytest.approx(expected, rel=0.3)
            assert abs(found[name]["bias"]) < expected
        else:  # what would pass 1 is cut off
            assert found[name]["bias"] < 0


# The noise and what is kept


def test_the_noise_has_its_deviation_and_is_drawn_anew() -> None:
    # 4,000 coordinates: the deviation of the estimate is 1.1 %, so 6 % is over 5 of them: a false failure has
    # probability below 1e-6. The twin, noise of half the size, lies at 50 %.
    rows = torch.zeros(10, 4000, dtype=torch.float64)
    first, second = (noised_sum(rows, 3.0, Randomness.from_system()) for _ in range(2))
    for noise in (first, second, (first - second) / 2**0.5):
        assert float(noise.std()) == pytest.approx(3.0, rel=0.06)
        assert float(noise.mean()) == pytest.approx(0, abs=0.25)
    assert float((first / 2).std()) != pytest.approx(3.0, rel=0.06)


def test_a_row_beyond_the_bound_is_never_summed() -> None:
    with pytest.raises(AssertionError):
        noised_sum(torch.full((3, 2), 0.8), 3.0, Randomness.from_seed(0))


def test_releases_are_kept_for_their_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    for name in ("one", "two"):
        keep(folder, name, 2.0, Evaluation({"dp_accuracy_cnn": 0.5}, {}))
    assert [one["inputs"] for one in releases_of(folder)] == ["one", "two"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "releases.json").stat().st_mode) == 0o600


# As a whole


def splits(n: int, *, public: bool = False) -> ImageSplits:
    generator = np.random.default_rng(0)

    def part(role: str, number: int) -> ImageSet:
        labels = np.arange(number) % 4
        noise = generator.integers(0, 60, (number, 1, 8, 8), dtype=np.uint8)
        images = (noise + 60 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8)
        return ImageSet(images, labels, tuple("abcd"), "bands", role, public=public)

    return ImageSplits(part("train", 40), part("validation", 40), part("test", n))


@pytest.fixture
def config(tiny: Callable[..., Config]) -> Config:
    return tiny(
        "evaluation=release",
        "evaluation.classifier_epochs=60",
        "privacy.delta=1e-4",
        "evaluation.release_epsilon=10",
    )


def test_a_release_meets_its_budget_and_is_near_what_it_hides(config: Config, tmp_path: Path) -> None:
    real = splits(300)
    # One label of five is wrong, so that the classifier is right four times of five.
    real.test.labels[::5] = (real.test.labels[::5] + 1) % 4
    said: list[str] = []

    def run() -> Evaluation:
        return evaluate_privately(
            real.validation,
            real,
            config,
            folder=tmp_path,
            device="cpu",
            progress=said.append,
        )

    metrics, metadata = run()
    assert metrics.keys() == {"dp_accuracy_cnn"}
    assert metadata["private_metrics"] == []
    sigma = metadata["release"]["noise_multiplier"]
    spent, more = (epsilon([Mechanism(factor * sigma, 1.0, 1)], 1e-4).epsilon for factor in (1, 0.98))
    assert spent <= 10 < more
    # Five deviations of the noise: a false failure has probability below 1e-6 for each.
    deviation = metadata["noise"]["dp_accuracy_cnn"]["deviation"]
    assert 0 < deviation < 0.05 and 0.7 - 5 * deviation < metrics["dp_accuracy_cnn"] < 0.8 + 5 * deviation
    assert abs(metadata["reference"]["n"] - 300) < 5 * sigma * 2**0.5
    assert not any("300" in line for line in said)
    said.clear()
    assert run().metrics == metrics and len(releases_of(tmp_path)) == 1 and not said
    # Another question draws anew, and both are counted.
    config.seed += 1
    assert run().metrics != metrics and len(releases_of(tmp_path)) == 2


def test_the_record_composes_the_releases_with_the_training(config: Config, tmp_path: Path) -> None:
    sigma = noise_multiplier_for(1.0, 1e-4, 1.0, 1)
    shown = Evaluation({}, {})
    training = {"noise_multiplier": 2.0, "sample_rate": 0.1, "steps": 50, "delta": 1e-5}
    keep(tmp_path, "one", sigma, shown)
    once = release_record(training, config, tmp_path)
    assert 0.99 < once["epsilon"] <= 1 and once["delta"] == 1e-4
    assert once["target_epsilon"] == config.evaluation.release_epsilon
    alone = epsilon([Mechanism(2.0, 0.1, 50)], 1e-5).epsilon
    released = epsilon([Mechanism(sigma, 1.0, 1)], 1e-5).epsilon
    assert max(alone, released) < once["with_training"]["epsilon"] <= alone + released
    # An earlier training without noise leaves nobody with a guarantee, whatever this one's noise is.
    without = release_record({**training, "epsilon": "inf"}, config, tmp_path)
    assert without["with_training"]["epsilon"] == "inf" and without["epsilon"] == once["epsilon"]
    keep(tmp_path, "two", sigma, shown)
    twice = release_record(training, config, tmp_path)
    assert twice["releases"] == 2 and twice["epsilon"] > 1.3 * once["epsilon"]
    assert twice["with_training"]["epsilon"] > once["with_training"]["epsilon"]


@pytest.mark.parametrize(
    ("public", "overrides", "message"),
    [
        (True, [], r"^evaluation\.release=dp: the test split is public"),
        (False, ["evaluation.release_delta=0.1"], r"^evaluation\.release_delta=0\.1: .*\(0, 1/N\)"),
        (
            False,
            ["evaluation.classifiers=[]"],
            r"^evaluation\.release=dp with evaluation\.classifiers=\[\]: ",
        ),
    ],
)
def test_a_release_that_means_nothing_is_refused(
    tiny: Callable[..., Config], public: bool, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        release.check(tiny("evaluation=release", *overrides), splits(40, public=public))


def test_a_job_shows_nothing_but_what_the_two_budgets_cover(
    tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    from dp_lora.jobs.stages import run

    words = ["evaluation=release", "evaluation.classifier_epochs=1", "evaluation.release_epsilon=2"]
    job = tiny(*words, "train.max_steps=1", "privacy.delta=1e-4", "data.train_size=200")
    directory = Path(run(job)["directory"])
    result, privacy = (read_json(directory / name) for name in ("result.json", "privacy.json"))
    assert result["metrics"].keys() == {"dp_accuracy_cnn"}
    assert result["private_metrics"] == []
    assert 1.9 < privacy["release"]["epsilon"] <= 2
    assert privacy["release"]["with_training"]["epsilon"] > privacy["epsilon"]
    said = capsys.readouterr()
    assert "dp_accuracy_cnn" in said.out and "dp_*: epsilon" in said.out
    assert "accuracy_cnn_real" not in said.out and not _THEIR_NUMBER.search(said.out + said.err)
    # The noised number may be the true one by chance.
    result["reference"].pop("n")
    kept = _everything(directory) | {"result.json": json.dumps(result)}
    released = {name: text for name, text in kept.items() if not name.startswith(("checkpoint", "wandb"))}
    assert {"result.json", "privacy.json", "metrics.jsonl"} <= released.keys()
    assert not [name for name, text in released.items() if _THEIR_NUMBER.search(text)]


_THEIR_NUMBER = re.compile(r"(?<![\d.:])297(?![\d.:])")
"""Of the images in the test split of digits, by itself and not among the digits of another number."""


def _everything(directory: Path) -> dict[str, str]:
    texts: dict[str, Any] = {}
    for path in directory.rglob("*.json*"):
        record = path.read_text()
        texts[str(path.relative_to(directory))] = record
    return texts
