"""Metrics over features against their definitions, other implementations, and broken twins."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from dp_lora.evaluation.distances import (
    Given,
    WeightedFrechet,
    frechet_distance,
    frechet_distance_at_infinity,
    gaussian,
    resamples,
)
from dp_lora.evaluation.features import extract_features
from dp_lora.evaluation.metrics import Options, Reference, inception_score, measure
from dp_lora.evaluation.pairs import across, kernel_distance, within

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")


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
    # Rounding moves the sum of the 48 roots, which are of the order of 1.
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, one.double() + 0.5) == pytest.approx(48 * 0.25, rel=1e-5)


def test_frechet_distance_of_known_gaussians() -> None:
    # N(0, I) and N(0, 4 I) in 4 dimensions: tr(1 + 4 - 2 * 2) = 4. With n = 200,000 the standard error of
    # each of the four variances is below 0.013, so of the distance below 0.03; 0.15 is 5 of them: a false
    # failure has probability below 1e-6, and the seed is fixed.
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(200_000, 4, generator=generator)
    second = 2 * torch.randn(200_000, 4, generator=generator)
    assert frechet_distance(first, second) == pytest.approx(4, abs=0.15)


def test_the_distance_is_that_of_torchmetrics_over_the_network_itself() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (120, 3, 4, 4), generator=generator, dtype=torch.uint8)
    fake = torch.randint(0, 200, (120, 3, 4, 4), generator=generator, dtype=torch.uint8)
    metric = FrechetInceptionDistance(feature=Flat())
    metric.update(real, real=True)
    metric.update(fake, real=False)
    generated, reference = (extract_features(Flat(), x, batch_size=50, device=CPU) for x in (fake, real))
    ours = measure("flat", generated, Reference.of(reference)).metrics
    # Over a network whose features are float32 torchmetrics rounds its result to float32.
    assert ours["fd_flat"] == pytest.approx(float(metric.compute()), rel=1e-6)


def test_no_process_waits_for_others_that_do_not_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = features(20, 8, seed=0), features(20, 8, seed=1)
    expected = frechet_distance(one, other), inception_score(one)
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    assert (frechet_distance(one, other), inception_score(one)) == expected
    twin = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=2)
    for real in (True, False):
        twin.update(one, real=real)
    with pytest.raises((RuntimeError, ValueError), match="process group"):
        twin.compute()


def test_torchvision_and_torch_fidelity_are_not_needed() -> None:
    """Their mere presence breaks torchmetrics on a CPU build of torch."""
    code = (
        "import sys\n"
        "sys.modules['torchvision'] = sys.modules['torch_fidelity'] = None\n"
        "import torch\n"
        "from dp_lora.evaluation.distances import frechet_distance\n"
        "from dp_lora.evaluation.metrics import inception_score\n"
        "one = torch.arange(24.0).reshape(8, 3).sin()\n"
        "print(frechet_distance(one, one.cos()) > 0, inception_score(one) >= 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr


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


def test_kernel_distance_is_torchmetrics_over_one_subset_of_all() -> None:
    first, second = features(120, 48, seed=0), features(120, 48, seed=1, shift=0.1)
    metric = KernelInceptionDistance(feature=Given(48), subsets=1, subset_size=120)
    metric.update(second.double(), real=True)
    metric.update(first.double(), real=False)
    assert kernel_distance(first, second) == pytest.approx(float(metric.compute()[0]), rel=1e-9)


def test_kernel_distance_is_what_torchmetrics_subsets_scatter_around() -> None:
    # The mean over 100 subsets of 60 of 120 varies from seed to seed. Ours lies within six standard errors of
    # the mean over ten seeds, a kernel of degree 2 far outside.
    first, second = features(120, 48, seed=0), features(120, 48, seed=1, shift=0.1)

    def mean(seed: int, degree: int) -> float:
        metric = KernelInceptionDistance(feature=Given(48), subsets=100, subset_size=60, degree=degree)
        metric.update(second.double(), real=True)
        metric.update(first.double(), real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return float(metric.compute()[0])

    found = torch.tensor([mean(seed, 3) for seed in range(10)])
    error = float(found.std()) / 10**0.5
    assert 0 < abs(kernel_distance(first, second) - float(found.mean())) < 6 * error
    assert abs(kernel_distance(first, second) - mean(0, 2)) > 6 * error


def test_kernel_distance_does_not_depend_on_how_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = features(25, 16, seed=0), features(18, 16, seed=1, shift=0.3)
    whole = kernel_distance(first, second), frechet_distance(first, second)
    monkeypatch.setattr("dp_lora.evaluation.distances._ROWS", 7)
    monkeypatch.setattr("dp_lora.evaluation.pairs._BLOCK", 7)
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


# Precision, recall, density, coverage


def manifold_metrics_by_definition(generated: Tensor, real: Tensor) -> dict[str, float]:
    """From whole matrices of distances, as the two papers write them."""
    x, y = generated.double().numpy(), real.double().numpy()
    between = cdist(x, y)

    def radii(points: np.ndarray, k: int) -> np.ndarray:
        # Column 0 is the distance of a point to itself.
        return np.sort(cdist(points, points), axis=1)[:, k]

    return {
        "precision_flat": (between <= radii(y, 3)).any(axis=1).mean(),
        "recall_flat": (between <= radii(x, 3)[:, None]).any(axis=0).mean(),
        "density_flat": (between <= radii(y, 5)).sum(axis=1).mean() / 5,
        "coverage_flat": (between.min(axis=0) <= radii(y, 5)).mean(),
    }


@pytest.mark.parametrize("block", [2048, 7])
@pytest.mark.parametrize(("n", "m", "shift"), [(60, 40, 0.0), (40, 60, 0.4)])
def test_manifold_metrics_are_those_of_whole_distance_matrices(
    monkeypatch: pytest.MonkeyPatch, n: int, m: int, shift: float, block: int
) -> None:
    monkeypatch.setattr("dp_lora.evaluation.pairs._BLOCK", block)
    generated, real = features(n, 8, seed=0, shift=shift), features(m, 8, seed=1)
    found = measure("flat", generated, Reference.of(real)).metrics
    expected = manifold_metrics_by_definition(generated, real)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert any(0 < value < 1 for value in expected.values())


def test_manifold_metrics_tell_what_they_are_for() -> None:
    real, same = features(400, 8, seed=0).split(200)
    far, one_kind = same + 9, real[:1] + 0.01 * same

    def of(generated: Tensor) -> dict[str, float]:
        return measure("x", generated, Reference.of(real)).metrics

    assert of(far)["precision_x"] == of(far)["recall_x"] == of(far)["density_x"] == of(far)["coverage_x"] == 0
    assert of(one_kind)["precision_x"] == 1 and of(one_kind)["recall_x"] < 0.1
    assert of(one_kind)["density_x"] > 0 and of(one_kind)["coverage_x"] < 0.2
    assert min(of(same)[f"{name}_x"] for name in ("precision", "recall", "density", "coverage")) > 0.7


def test_the_real_images_themselves_are_perfect() -> None:
    real = features(50, 8, seed=0)
    found = measure("x", real, Reference.of(real)).metrics
    assert found["fd_x"] == pytest.approx(0, abs=1e-6)
    assert found["precision_x"] == found["recall_x"] == found["coverage_x"] == 1


# Intervals and extrapolation


def test_weighted_distances_are_those_of_repeated_rows() -> None:
    for n, dimension in ((60, 8), (12, 32)):
        rows, real = features(n, dimension, seed=0), features(40, dimension, seed=1, shift=0.2)
        weights = resamples(n, 1, seed=2)[0]
        repeated = rows.repeat_interleave(weights.long(), dim=0)
        expected = frechet_distance(repeated, real)
        assert WeightedFrechet(rows, gaussian(real))(weights) == pytest.approx(expected, rel=1e-6)
        assert weights.sum() == n and weights.max() > 1


def test_kernel_means_of_resamples_leave_out_a_row_s_own_copies() -> None:
    rows = features(20, 8, seed=0)
    weights = resamples(20, 3, seed=1)
    for weighting, mean in zip(weights, within(rows, weights).kernel[1:], strict=True):
        pairs = [
            (weighting[i] * weighting[j], (float(rows[i].double() @ rows[j].double()) / 8 + 1) ** 3)
            for i in range(20)
            for j in range(20)
            if i != j
        ]
        expected = sum(float(w) * k for w, k in pairs) / sum(float(w) for w, _ in pairs)
        assert float(mean) == pytest.approx(expected, rel=1e-9)


def test_intervals_are_as_wide_as_metrics_of_new_images_scatter() -> None:
    # 40 sets of new images give each metric's own deviation, to within 11 %; 200 resamples of one set give an
    # interval of about 4 of them. A quarter and four times are far beyond both errors; the seeds are fixed.
    reference = Reference.of(features(80, 6, seed=0))

    def new(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        return features(4000, 6, seed=0)[torch.randperm(4000, generator=generator)[:80]] + 0.1

    found = measure("x", new(0), reference, Options(bootstrap=200))
    assert found.intervals.keys() == found.metrics.keys()
    scattered = [measure("x", new(seed), reference).metrics for seed in range(1, 41)]
    for name in ("fd_x", "kid_x", "precision_x", "density_x"):
        low, high = found.intervals[name]
        deviation = float(torch.tensor([values[name] for values in scattered]).std())
        assert 0.25 < (high - low) / (3.92 * deviation) < 4, name
        assert low < found.metrics[name] < high


def test_intervals_shrink_with_the_number_of_images_and_repeat_with_the_seed() -> None:
    reference = Reference.of(features(100, 6, seed=0))

    def width(n: int, seed: int = 0) -> float:
        found = measure("x", features(n, 6, seed=1), reference, Options(bootstrap=60, seed=seed))
        low, high = found.intervals["fd_x"]
        return high - low

    assert width(1600) < 0.5 * width(100)
    assert width(100) == width(100) != width(100, seed=1)


def test_the_distance_at_infinity_is_nearer_the_truth_than_that_of_few_images() -> None:
    # Reference: the population itself, N(0, I) in 16 dimensions, so that the truth is 0. The distance of 400
    # images is about 16 * 17 / (4 * 400) = 0.17 too large; the twin, which does not extrapolate, keeps that.
    everyone = torch.randn(50_000, 16, generator=torch.Generator().manual_seed(0))
    population = gaussian(everyone)
    generator = torch.Generator().manual_seed(1)
    errors, biased = [], []
    for seed in range(10):
        rows = torch.randn(400, 16, generator=generator)
        errors.append(frechet_distance_at_infinity(rows, population, seed=seed))
        biased.append(frechet_distance(rows, everyone))
    assert abs(np.mean(errors)) < 0.25 * np.mean(biased)
    assert np.mean(biased) > 0.1


# Inception score


def test_the_inception_score_of_known_predictions() -> None:
    classes = 7
    certain = 60.0 * torch.eye(classes).repeat(30, 1)
    # Each part sees every class about as often as the others, and is certain: nearly the number of classes.
    assert inception_score(certain, splits=1) == pytest.approx(classes, rel=1e-6)
    assert inception_score(torch.zeros(50, classes)) == pytest.approx(1)
    assert inception_score(certain[:1].expand(50, -1)) == pytest.approx(1)
    # Sorted by class the parts would each see one class: hence the random order.
    by_class = certain[certain.argmax(dim=1).argsort()]
    assert inception_score(by_class, splits=3) > 0.8 * classes


def test_the_inception_score_is_torchmetrics_and_its_order_follows_the_seed() -> None:
    logits = torch.randn(95, 9, generator=torch.Generator().manual_seed(0)) * 2
    before = torch.random.get_rng_state()
    found = [inception_score(logits, seed=seed) for seed in (0, 1, 0)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found[0] == found[2] != found[1]
    order = torch.randperm(95, generator=torch.Generator().manual_seed(0))
    scores = []
    for part in logits.double()[order].split(10):
        chances = part.softmax(dim=1)
        scores.append((chances * (chances / chances.mean(dim=0)).log()).sum(dim=1).mean().exp())
    assert len(scores) == 10 and found[0] == pytest.approx(float(sum(scores)) / 10, rel=1e-9)


def test_a_class_without_a_chance_does_not_make_the_inception_score_no_number() -> None:
    # In float32 a probability of e^-200 is 0, and 0 log 0 is no number.
    logits = torch.zeros(20, 3)
    logits[:, 0] = 200
    assert inception_score(logits) == pytest.approx(1)


def test_the_pass_over_pairs_gives_one_entry_an_image() -> None:
    generated, real = features(9, 4, seed=0), features(11, 4, seed=1)
    found = across(generated, real, within(generated).radii, within(real).radii)
    assert [len(values) for values in found] == [9, 9, 11, 9, 11]
