"""Evaluation as a whole, its cache, and every refusal."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_lora.config.schema import EvaluationConfig
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.evaluation.evaluate import PRIVATE_METRICS_NOTE, check, evaluate, evaluate_all
from dp_lora.storage.tensors import cached
from tests.builders.digit_images import QUICK, Images

pytestmark = pytest.mark.usefixtures("unchecked")

METRICS = ("accuracy_cnn", "fd_lite0", "kid_lite0", "precision_lite0", "recall_lite0", "density_lite0",
           "coverage_lite0")  # fmt: skip


# Evaluation as a whole


def test_samples_may_be_arrays_as_they_are_read_from_a_file(samples: Images, splits: ImageSplits) -> None:
    config = replace(QUICK, extractors=[])
    arrays = ImageSet(samples.images.numpy(), samples.labels.numpy(), (), "generated", "train", public=True)
    arrays.images.flags.writeable = False
    from_arrays = evaluate(arrays, splits, config, seed=0, device="cpu")
    assert from_arrays == evaluate(samples, splits, config, seed=0, device="cpu")


def test_every_metric_has_both_baselines_and_a_second_job_reads_the_same_from_the_cache(
    samples: Images, splits: ImageSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    noise = torch.randint(0, 256, samples.images.shape, dtype=torch.uint8)
    before = samples._replace(images=noise)

    def run(cache: Path | None) -> dict[str, float]:
        return evaluate_all(
            samples, splits, QUICK, before=before, seed=0, device="cpu", cache=cache, progress=said.append
        ).metrics

    fresh = run(tmp_path)
    assert set(fresh) == {f"{metric}{suffix}" for metric in METRICS for suffix in ("", "_before", "_real")}
    assert fresh["fd_lite0"] < fresh["fd_lite0_before"]
    assert fresh["kid_lite0"] < fresh["kid_lite0_before"]
    private = [message for message in said if "real" in message or "reference" in message]
    assert len(private) == 3
    said.clear()
    assert run(tmp_path) == fresh
    assert not [message for message in said if "real" in message or "reference" in message]
    alone = evaluate(samples, splits, QUICK, seed=0, device="cpu", cache=tmp_path)
    assert alone == {name: fresh[name] for name in METRICS}

    folder = tmp_path / "evaluation"
    files = sorted(folder.iterdir())
    assert len(files) == 3
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_the_cache_tells_other_data_seeds_and_epochs_apart(
    samples: Images, splits: ImageSplits, tmp_path: Path
) -> None:
    config = replace(QUICK, extractors=[])
    brighter = splits._replace(train=replace(splits.train, images=splits.train.images // 2))
    relabelled = splits._replace(test=replace(splits.test, labels=splits.test.labels[::-1].copy()))

    def files(references: ImageSplits, config: EvaluationConfig, seed: int) -> int:
        evaluate_all(samples, references, config, seed=seed, device="cpu", cache=tmp_path)
        return len(list((tmp_path / "evaluation").iterdir()))

    assert files(splits, config, 0) == files(splits, config, 0) == 1
    assert files(brighter, config, 0) == 2
    assert files(relabelled, config, 0) == 3
    assert files(splits, config, 1) == 4
    assert files(splits, replace(config, classifier_epochs=2), 0) == 5


@pytest.mark.parametrize("damage", ["one byte", "cut", "another key"])
def test_a_damaged_file_of_the_cache_is_said_so_and_made_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def compute() -> dict[str, Tensor]:
        return {"features": torch.arange(6.0)}

    cached(tmp_path, {"n": 1}, compute)
    (path,) = (tmp_path / "evaluation").iterdir()
    content = path.read_bytes()
    if damage == "one byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
        cached(tmp_path, {"n": 2}, compute)
        (other,) = (tmp_path / "evaluation").iterdir()
        other.rename(path)
    assert torch.equal(cached(tmp_path, {"n": 1}, compute)["features"], torch.arange(6.0))
    said = capsys.readouterr().err
    assert said == f"{tmp_path / 'evaluation'}: a damaged file; it is made again\n"
    cached(tmp_path, {"n": 1}, compute)
    assert capsys.readouterr().err == ""


def test_the_metadata_says_what_was_compared_and_what_is_not_covered(
    samples: Images, splits: ImageSplits
) -> None:
    config = replace(QUICK, extractors=[])
    metrics, metadata = evaluate_all(samples, splits, config, seed=0, device="cpu")
    assert metadata["n_samples"] == 40
    assert metadata["reference"] == {"split": "test", "n": 40}
    assert metadata["real_baseline"]["accuracy"] == {"split": "train", "n": 40}
    assert metadata["private_metrics"] == list(metrics)
    assert metadata["private_metrics_note"] == PRIVATE_METRICS_NOTE

    public = ImageSplits(*(replace(split, public=True) for split in splits))
    assert evaluate_all(samples, public, config, seed=0, device="cpu").metadata["private_metrics"] == []
    one_private = public._replace(test=splits.test)
    metadata = evaluate_all(samples, one_private, config, seed=0, device="cpu").metadata
    assert metadata["private_metrics"] == list(metrics)


def test_numbers_on_the_validation_split_have_not_seen_the_test_split(
    samples: Images, splits: ImageSplits
) -> None:
    config = replace(QUICK, reference="validation")
    absent = splits._replace(test=splits.test.subset(np.arange(0)))
    metrics, metadata = evaluate_all(samples, absent, config, seed=0, device="cpu")
    assert metadata["tested_on"] == {"split": "validation", "n": 30}
    assert metrics == evaluate_all(samples, splits, config, seed=0, device="cpu").metrics


def test_against_the_train_split_the_real_baseline_is_the_test_split(
    samples: Images, splits: ImageSplits
) -> None:
    config = replace(QUICK, reference="train")
    metrics, metadata = evaluate_all(samples, splits, config, seed=0, device="cpu")
    assert metadata["real_baseline"]["distances"] == {"split": "test", "n": 40}
    assert metrics["fd_lite0_real"] > 1e-3


# Refusals


@pytest.mark.parametrize(
    ("role", "reference", "message"),
    [
        ("validation", "validation", "evaluation.reference=validation: the validation split has 0 images"),
        ("test", "test", "evaluation.reference=test: the test split has 0 images"),
        ("test", "train", r"evaluation.reference=train: accuracy_\*: the test split has 0 images"),
    ],
)
def test_an_empty_split_is_refused(
    samples: Images, splits: ImageSplits, role: str, reference: str, message: str
) -> None:
    without = splits._replace(**{role: getattr(splits, role).subset(np.arange(0))})
    with pytest.raises(UserError, match=message):
        evaluate(samples, without, replace(QUICK, reference=reference), seed=0, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, y: (x[:1], y[:1]),
            r"sampler\.num_samples=1: .*at least 10 \(classifiers at least 10, precision.* at least 6\)",
        ),
        (
            lambda x, y: (x[:9], y[:9]),
            r"sampler\.num_samples=9: .*expected at least 10 \(classifiers at least 10\)",
        ),
        (
            lambda x, y: (x[:, :, :20, :20], y),
            "images of 1 x 20 x 20, expected 1 x 28 x 28 as the test split",
        ),
        (lambda x, y: (x.expand(-1, 3, -1, -1), y), "images of 3 x 28 x 28, expected 1 x 28 x 28"),
        (lambda x, y: (x / 255, y), r"torch\.float32 \[40, 1, 28, 28\], expected torch\.uint8"),
        (lambda x, y: (x[:, 0], y), r"torch\.uint8 \[40, 28, 28\], expected torch\.uint8 \[N, C, H, W\]"),
        (lambda x, y: (x // 128, y), r"values in \[0, 1\], expected \[0, 255\]"),
        (lambda x, y: (x, y[:-1]), r"labels torch\.int64 \[39\], expected int64 \[40\]"),
        (lambda x, y: (x, y.float()), r"labels torch\.float32 \[40\], expected int64"),
        (lambda x, y: (x, y + 1), r"labels in \[1, 10\], expected \[0, 9\], the 10 classes"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    samples: Images,
    splits: ImageSplits,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    message: str,
) -> None:
    images, labels = change(samples.images, samples.labels)
    unfit = Images(images, labels)
    with pytest.raises(UserError, match=message):
        evaluate_all(unfit, splits, QUICK, seed=0, device="cpu")
    with pytest.raises(UserError, match="images before fine-tuning"):
        evaluate_all(samples, splits, QUICK, before=unfit, seed=0, device="cpu")


def test_images_of_a_collapsed_model_are_measured_all_the_same(samples: Images, splits: ImageSplits) -> None:
    black = samples._replace(images=torch.zeros_like(samples.images))
    metrics = evaluate(black, splits, QUICK, seed=0, device="cpu")
    assert all(np.isfinite(value) for value in metrics.values())


def test_what_the_last_stage_would_refuse_is_refused_before_the_first(splits: ImageSplits) -> None:
    check(QUICK, splits, 40)
    with pytest.raises(UserError, match=r"sampler\.num_samples=9: too few images"):
        check(QUICK, splits, 9)
    few = splits._replace(test=splits.test.subset(np.arange(5)))
    with pytest.raises(UserError, match="the test split has 5 images, expected at least 6"):
        check(QUICK, few, 40)
    with pytest.raises(UserError, match=r"evaluation\.fid_infinity at least 10"):
        check(replace(QUICK, fid_infinity=True, classifiers=[]), splits, 9)


def test_intervals_surround_every_metric_and_come_from_the_cache_too(
    samples: Images, splits: ImageSplits, tmp_path: Path
) -> None:
    config = replace(QUICK, bootstrap=40, fid_infinity=True)

    def run() -> tuple[dict[str, float], dict[str, Any]]:
        return evaluate_all(samples, splits, config, seed=0, device="cpu", cache=tmp_path)

    metrics, metadata = run()
    again, metadata_again = run()
    assert again == metrics and metadata_again["intervals"] == metadata["intervals"]
    without = {"fdinf_lite0", "fdinf_lite0_real"}
    assert metadata["intervals"].keys() == metrics.keys() - without
    for name, (low, high) in metadata["intervals"].items():
        assert low <= metrics[name] <= high
    assert "40 resamples" in metadata["intervals_note"]
    assert metrics["fdinf_lite0"] != metrics["fd_lite0"]
