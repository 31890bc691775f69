"""Released metrics: one image's part measured, with broken twins; the noise; what is kept and counted."""

from __future__ import annotations

import json
import math
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
from dp_lora.evaluation import queries
from dp_lora.evaluation.evaluate import Evaluation
from dp_lora.evaluation.images import Images
from dp_lora.evaluation.queries import AccuracyQuery, FrechetFrame, FrechetQuery, Query, Questions
from dp_lora.jobs import release
from dp_lora.jobs.begun import releases_of
from dp_lora.jobs.release import evaluate_privately, keep, noised_sum, release_record
from dp_lora.privacy.accounting import epsilon, noise_multiplier_for
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import read_json


def features(n: int, dimension: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(3, 0.1, dimension)
    return torch.randn(n, dimension, generator=generator) * scales + shift


def odd_features(dimension: int) -> Tensor:
    """Features that try to move the sum far."""
    huge = torch.full((1, dimension), 1e6)
    one = torch.zeros(1, dimension)
    one[0, 0] = -1e30
    return torch.cat([huge, -huge, one, one * math.inf, one * math.nan, torch.zeros(1, dimension)])


def questions(held_out: Tensor, right: Tensor) -> Questions:
    """Two classifiers and two extractors."""
    asked: list[Query] = [AccuracyQuery.of(f"dp_accuracy_{name}", right) for name in ("cnn", "wrn")]
    for name, dimension in (("lite0", 40), ("dinov2", 9)):
        frame = FrechetFrame(features(100, 40, seed=0)[:, :dimension])
        own = frame.moments(frame.rows(features(100, 40, seed=5)[:, :dimension]).sum(dim=0))
        asked.append(FrechetQuery(frame, frame.rows(held_out[:, :dimension]), {f"dp_fd_{name}": own}))
    return Questions(asked)


# Sensitivity


@pytest.mark.parametrize(
    "held_out", [features(50, 40, seed=1), features(50, 40, 2, shift=99), odd_features(40)]
)
def test_no_image_moves_the_sum_by_more_than_one(held_out: Tensor) -> None:
    right = torch.arange(len(held_out)) % 3 > 0
    rows = questions(held_out, right).rows()
    whole = rows.sum(dim=0)
    for i in range(len(held_out)):
        kept = torch.arange(len(held_out)) != i
        without = questions(held_out[kept], right[kept]).rows().sum(dim=0)
        assert float((whole - without).norm()) <= 1 + 1e-9
    assert torch.isfinite(whole).all()


def test_the_bound_is_met_and_not_beaten_by_each_query_alone() -> None:
    distance = FrechetFrame(features(100, 40, seed=0))
    far = distance.rows(odd_features(40)[:2])
    assert far.norm(dim=1).tolist() == pytest.approx([1, 1])
    assert AccuracyQuery.of("a", torch.tensor([True, False])).rows.norm(dim=1).tolist() == [1, 1]
    assert questions(odd_features(40)[:2], torch.tensor([True, False])).rows().norm(dim=1).tolist() == (
        pytest.approx([1, 1])
    )


def test_without_the_clip_or_the_shares_one_image_does_move_it_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_out, right = odd_features(40)[:1], torch.tensor([True])
    asked = questions(held_out, right)
    asked.scales = [1.0] * 4
    assert float(asked.rows().norm()) == pytest.approx(2)
    monkeypatch.setattr(torch.Tensor, "clamp", lambda values, **bounds: torch.ones_like(values))
    assert float(questions(held_out, right).rows().norm()) > 1e3


# What the sums say


def test_without_noise_the_sums_tell_accuracy_and_number() -> None:
    right = torch.arange(50) % 5 > 0
    asked = questions(features(50, 40, seed=1), right)
    sums = asked.rows().sum(dim=0)
    values = asked.values(sums)
    assert values["dp_accuracy_cnn"] == values["dp_accuracy_wrn"] == pytest.approx(0.8)
    assert asked.number(sums) == pytest.approx(50)


def test_without_noise_and_clipping_the_distance_is_frechet_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "CLIPPED_SHARE", 0.0)
    generated, held_out = features(300, 6, seed=0), features(200, 6, seed=1) * 0.5 + 0.1
    frame = FrechetFrame(torch.cat([generated, held_out]))
    assert len(frame.directions) == 6

    def moments(values: Tensor) -> tuple[Tensor, Tensor]:
        # The covariances of sums divide by n in place of n - 1.
        return values.double().mean(dim=0), torch.cov(values.double().T, correction=0)

    (mean, covariance), (own_mean, own_covariance) = moments(held_out), moments(generated)
    roots = torch.linalg.eigvals(covariance @ own_covariance).real.clamp(min=0).sqrt().sum()
    expected = (mean - own_mean).square().sum() + (covariance + own_covariance).trace() - 2 * roots
    sums = [frame.rows(values).sum(dim=0) for values in (generated, held_out)]
    own = frame.moments(sums[0])
    assert frame.distance(own, sums[1]) == pytest.approx(float(expected), rel=1e-6)
    assert frame.distance(own, sums[0]) == pytest.approx(0, abs=1e-9)


def test_a_model_that_repeats_one_image_is_not_near() -> None:
    good, before, held_out = (
        features(300, 40, seed=0),
        features(300, 40, 1, shift=1),
        features(300, 40, seed=2),
    )

    def distance(generated: Tensor) -> float:
        frame = FrechetFrame(torch.cat([generated, before]))
        own, other = (frame.rows(values).sum(dim=0) for values in (generated, held_out))
        return frame.distance(frame.moments(own), other)

    assert distance(good[:1].expand(300, -1)) > 5 * distance(good)


def test_images_that_are_all_the_same_and_sums_of_noise_alone_have_values() -> None:
    same = FrechetFrame(torch.ones(20, 8))
    own, other = (same.rows(values).sum(dim=0) for values in (torch.ones(20, 8), features(10, 8, seed=0)))
    assert math.isfinite(same.distance(same.moments(own), other))
    asked = questions(features(50, 40, seed=1), torch.ones(50, dtype=torch.bool))
    noise = torch.randn(asked.rows().shape[1], generator=torch.Generator().manual_seed(0)).double()
    for sums in (noise, -100 * noise, torch.zeros_like(noise)):
        values = asked.values(sums)
        assert all(math.isfinite(value) and value >= 0 for value in values.values())
        assert values["dp_accuracy_cnn"] <= 1


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
    said: list[str] = []
    dark = Images(real.validation.images // 16, real.validation.labels)

    def run() -> Evaluation:
        return evaluate_privately(
            real.validation,
            real,
            config,
            before=dark,
            folder=tmp_path,
            device="cpu",
            progress=said.append,
        )

    metrics, metadata = run()
    assert metrics.keys() == {"dp_accuracy_cnn", "dp_fd_lite0", "dp_fd_lite0_before"}
    assert metrics["dp_fd_lite0"] < metrics["dp_fd_lite0_before"]
    assert metadata["private_metrics"] == []
    sigma = metadata["release"]["noise_multiplier"]
    spent, more = (epsilon([Mechanism(factor * sigma, 1.0, 1)], 1e-4).epsilon for factor in (1, 0.98))
    assert spent <= 10 < more
    # Five deviations of the noise: a false failure has probability below 1e-6 for each.
    deviation = metadata["noise"]["dp_accuracy_cnn"]["deviation"]
    assert 0 < deviation < 0.05 and metrics["dp_accuracy_cnn"] > 0.9 - 5 * deviation
    assert abs(metadata["reference"]["n"] - 300) < 5 * sigma / (0.5 * 0.11) ** 0.5
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
    keep(tmp_path, "two", sigma, shown)
    twice = release_record(training, config, tmp_path)
    assert twice["releases"] == 2 and twice["epsilon"] > 1.3 * once["epsilon"]
    assert twice["with_training"]["epsilon"] > once["with_training"]["epsilon"]


@pytest.mark.parametrize(
    ("public", "overrides", "message"),
    [
        (True, [], r"^evaluation\.release=dp: the test split is public"),
        (False, ["evaluation.release_delta=0.1"], r"^evaluation\.release_delta=0\.1: .*\(0, 1/N\)"),
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
    assert result["metrics"].keys() == {"dp_accuracy_cnn", "dp_fd_lite0", "dp_fd_lite0_before"}
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
