"""What an audit decides, keeps and marks as private, of outcomes that are given."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dp_lora.auditing import audit
from dp_lora.auditing.bounds import OneRun
from dp_lora.auditing.canaries import Trained
from dp_lora.auditing.membership import ATTACKS, Losses
from dp_lora.auditing.noise_tests import SilentNoise
from dp_lora.auditing.options import Options
from dp_lora.errors import UserError
from dp_lora.storage.files import read_json, write_json


def trained(noise: SilentNoise | None = None) -> Trained:
    return Trained(np.array([1.0, -1.0]), np.array([True, False]), noise=noise)


class Images(list[int]):
    """As much of a set as its size."""

    persons = None


def a_job(directory: Path, *, train: int = 2, test: int = 2, public: bool = False) -> Any:
    """As much of a job as an audit looks at."""
    return SimpleNamespace(
        directory=directory,
        choice=None,
        config=SimpleNamespace(
            data=SimpleNamespace(name="digits", public=public),
            tracking=SimpleNamespace(progress="off"),
            privacy=SimpleNamespace(adjacency="zero_out"),
            seed=0,
        ),
        images=SimpleNamespace(train=Images(range(train)), test=Images(range(test))),
        plan=SimpleNamespace(noise_multiplier=2.0, noise_std=1.0, expected_batch_size=10.0),
    )


def test_a_bound_contradicts_what_it_passes_and_not_what_it_only_reaches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim: Any = SimpleNamespace(epsilon=8.0, delta=1e-5)
    for bound, contradicted in ((8.0, False), (math.nextafter(8.0, 9.0), True)):
        monkeypatch.setattr(audit, "one_run", lambda *given, bound=bound: OneRun(bound, 2, 2))
        assert audit._bounds(claim, trained(), Options(kind="image"))["contradicted"] is contradicted


def test_two_bounds_hold_together_with_the_confidence_that_was_asked_for() -> None:
    assert audit._each(Options(kind="gradient", confidence=0.9)) == pytest.approx(0.95)
    assert audit._each(Options(kind="image", confidence=0.9)) == 0.9, "there is one"


def test_the_noise_is_estimated_where_canaries_have_coordinates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "model_to_train", lambda job: None)
    monkeypatch.setattr(audit.adapters, "count", lambda model: 50)
    noise = SilentNoise(100)
    noise.add(0.5 * np.random.default_rng(0).standard_normal(100))
    found = audit._noise_test(a_job(tmp_path), trained(noise), {}, {})
    assert found["estimated_noise_multiplier"] == pytest.approx(2 * noise.ratio())
    assert found["interval"][0] < found["estimated_noise_multiplier"] < found["interval"][1]
    assert found["accused"] is True and "variance" in found["accused_by"]
    of_images = audit._noise_test(a_job(tmp_path), trained(), {}, {})
    assert "estimated_noise_multiplier" not in of_images and of_images["accused"] is False


@pytest.mark.parametrize(("train", "test"), [(1, 2), (2, 1), (2, 0)])
def test_two_images_of_each_kind_can_be_compared_and_fewer_not(train: int, test: int, tmp_path: Path) -> None:
    audit._check_images(a_job(tmp_path), Options(images=2))
    few = a_job(tmp_path, train=train, test=test)
    with pytest.raises(UserError, match=r"--images=2: .*expected at least 2"):
        audit._check_images(few, Options(images=2))
    audit._check_images(few, Options(images=0))


def test_losses_of_single_images_are_kept_for_the_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar counts an image for each of the two models."""
    (tmp_path / "checkpoint").mkdir()
    totals: list[int] = []

    def losses_of(images: Any, *models: Any, progress: Any, **settings: Any) -> Losses:
        totals.append(progress.total)
        return Losses(np.arange(len(images)) + 0.5, np.arange(len(images)) / len(images))

    for name, fake in (
        ("draw", lambda images, count, seed: images),
        ("model_before", lambda job: None),
        ("finetuned_model", lambda job: None),
        ("losses_of", losses_of),
    ):
        monkeypatch.setattr(audit, name, fake)
    found = audit._membership(a_job(tmp_path, train=5, test=3), Options())["membership_inference"]
    assert totals == [16, 16] and found["members"] == 5 and found.keys() >= set(ATTACKS)
    assert all(found[attack]["tpr_at_fpr"].keys() == {"0.01", "0.001"} for attack in ATTACKS)
    path = tmp_path / "checkpoint" / "membership.npz"
    assert path.stat().st_mode & 0o777 == 0o600
    with np.load(path) as kept:
        assert {name: kept[name].tolist() for name in kept.files} == {
            "members_before": [0.5, 1.5, 2.5, 3.5, 4.5],
            "members_after": [0.0, 0.2, 0.4, 0.6, 0.8],
            "others_before": [0.5, 1.5, 2.5],
            "others_after": [0.0, 1 / 3, 2 / 3],
        }


def test_under_add_or_remove_the_sizes_of_private_sets_are_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint").mkdir()
    job = a_job(tmp_path, train=5, test=3)
    job.config.privacy.adjacency = "add_or_remove"
    losses = Losses(np.arange(5.0), np.arange(5.0))
    for name in ("model_before", "finetuned_model"):
        monkeypatch.setattr(audit, name, lambda job: None)
    monkeypatch.setattr(audit, "draw", lambda images, count, seed: images)
    monkeypatch.setattr(audit, "losses_of", lambda *given, **settings: losses)
    found = audit._membership(job, Options())["membership_inference"]
    assert (found["members"], found["others"]) == (None, None)


def test_a_curve_is_drawn_from_end_to_end_at_the_largest_rate_that_each_point_allows() -> None:
    drawn = audit._thinned([(0.0, 0.0), (0.0, 0.2), (0.5, 0.6), (0.7, 0.9), (1.0, 1.0)], points=3)
    assert drawn == {"fpr": [0.0, 0.5, 1.0], "tpr": [0.2, 0.6, 1.0]}


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("compared", [False, True])
def test_the_membership_of_private_images_is_marked_as_private(
    public: bool, compared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "with_audit", lambda text, record: text)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("card")
    write_json(tmp_path / "result.json", {"private_metrics": ["fid"]})
    record = {"epsilon": 8.0} | ({"membership_inference": {"auc": 0.5}} if compared else {})
    audit._write(a_job(tmp_path, public=public), record)
    marked = compared and not public
    result = read_json(tmp_path / "result.json")
    assert result["audit"] == record
    assert result["private_metrics"] == ["fid", *(["audit.membership_inference"] if marked else [])]
    assert ("private_metrics_note" in result) is marked
