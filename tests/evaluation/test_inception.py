"""Inception 2015: its file of weights, and its features against torch-fidelity's network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dp_lora.config.schema import EvaluationConfig
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.evaluation import features as features_module
from dp_lora.evaluation import inception
from dp_lora.evaluation.evaluate import check, evaluate_all
from dp_lora.evaluation.features import load_extractors
from dp_lora.evaluation.inception import Inception2015, resize_like_tensorflow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> Inception2015:
    """Random weights whose features differ between images."""
    torch.manual_seed(0)
    made = Inception2015()
    for module in made.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(network: Inception2015, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file in the format of the published one."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    yield path
    path.unlink()


@pytest.fixture
def accepted(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The random weights in place of the published ones, checksum and all."""
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(features_module, "WEIGHTS_SHA256", checksum)
    return weights


def splits(n: int) -> ImageSplits:
    generator = np.random.default_rng(0)

    def part(role: str) -> ImageSet:
        images = generator.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
        return ImageSet(images, np.arange(n) % 2, ("a", "b"), "noise", role, public=False)

    return ImageSplits(part("train"), part("validation"), part("test"))


def test_the_file_has_the_published_number_of_tensors(network: Inception2015) -> None:
    # 566 tensors, 95.6 MB: 94 convolutions with their norms, and the linear layer of 1,008 classes.
    state = network.state_dict()
    assert len(state) == 566
    assert state["fc.weight"].shape == (1008, 2048) and state["Conv2d_1a_3x3.conv.weight"].shape[0] == 32
    size = sum(value.numel() * value.element_size() for value in state.values())
    assert 95.2e6 < size < 95.628359e6


def test_resizing_is_that_of_tensorflow_1() -> None:
    # 2 px to 4: positions 0, 0.5, 1 and 1.5, the last of which lies beyond the last pixel.
    image = torch.tensor([[0.0, 10.0], [20.0, 30.0]])[None, None]
    expected = [[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]]
    assert resize_like_tensorflow(image, 4)[0, 0].tolist() == expected
    assert torch.equal(resize_like_tensorflow(image, 2), image)
    # 4 px to 2: pixels 0 and 2, nothing smoothed.
    assert resize_like_tensorflow(torch.arange(16.0).reshape(1, 1, 4, 4), 2)[0, 0].tolist() == [
        [0, 2],
        [8, 10],
    ]


def test_a_run_over_inception_has_fid_and_its_company(accepted: Path) -> None:
    real = splits(6)
    samples = real.validation
    config = EvaluationConfig(extractors=["inception"], classifiers=[], inception_weights=str(accepted))
    metrics, metadata = evaluate_all(samples, real, config, seed=0, device="cpu")
    names = {"fid", "inception_score"} | {
        f"{name}_inception" for name in ("kid", "precision", "recall", "density", "coverage")
    }
    assert metrics.keys() == names | {f"{name}_real" for name in names}
    assert metrics["fid"] > 0 and 1 <= metrics["inception_score"] <= 1008
    # It alone saw generated images only.
    assert set(metadata["private_metrics"]) == metrics.keys() - {"inception_score"}
    said = metadata["extractors"]["inception"]
    assert said["side"] == 299 and "TensorFlow" in said["resize"] and said["values"] == "(x - 128) / 128"


def test_weights_with_a_wrong_checksum_are_refused_before_anything_runs(weights: Path) -> None:
    config = EvaluationConfig(extractors=["inception"], inception_weights=str(weights))
    with pytest.raises(
        UserError, match=r"^evaluation\.inception_weights=.*random\.pth.*expected 6726825d0af5"
    ):
        check(config, splits(12), 100)
    absent = replace(config, inception_weights="/nowhere/at/all.pth")
    with pytest.raises(
        UserError, match=r"^evaluation\.inception_weights=.*are missing: /nowhere/at/all\.pth"
    ):
        check(absent, splits(12), 100)


def test_without_a_path_the_file_of_torch_s_hub_folder_is_taken(
    accepted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / inception.WEIGHTS_NAMES[1]).symlink_to(accepted)
    config = EvaluationConfig(extractors=["inception"])
    assert load_extractors(config, CPU)["inception"].network.num_features == 2048


def test_without_a_file_the_published_one_is_fetched_and_verified(
    accepted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features_module, "WEIGHTS_URL", accepted.as_uri())
    config = EvaluationConfig(extractors=["inception"])
    assert features_module.inception_weights(config) == tmp_path / "checkpoints" / inception.WEIGHTS_NAMES[0]
    (tmp_path / "checkpoints" / inception.WEIGHTS_NAMES[0]).unlink()
    for url in (Path(__file__).as_uri(), "file:///nowhere"):
        monkeypatch.setattr(features_module, "WEIGHTS_URL", url)
        with pytest.raises(
            UserError, match=r"^evaluation\.inception_weights=null: neither .*expected the path"
        ):
            features_module.inception_weights(config)
        assert not list((tmp_path / "checkpoints").iterdir())


COMPARISON = """
import sys
import types
import torch

# Of the package only what the network needs: the rest imports torchvision, which a CPU build of torch breaks.
package = types.ModuleType("torch_fidelity")
package.__path__ = [sys.argv[2] + "/torch_fidelity"]
sys.modules["torch_fidelity"] = package
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from dp_lora.evaluation.inception import Inception2015

torch.set_num_threads(1)
names = ["2048", "logits_unbiased"]
theirs = FeatureExtractorInceptionV3("reference", names, feature_extractor_weights_path=sys.argv[1])
ours = Inception2015()
ours.load_state_dict(torch.load(sys.argv[1], weights_only=True))
ours.eval()
generator = torch.Generator().manual_seed(0)
with torch.inference_mode():
    for side in (32, 320):
        images = torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
        features, logits = theirs(images)
        found = ours(images)
        print(float((found - features).abs().max() / features.std()))
        print(float((ours.logits(found) - logits).abs().max() / logits.std()))
"""
"""Ours against the network that torchmetrics takes: the largest difference over the deviation."""


def test_features_and_logits_are_those_of_torch_fidelity(weights: Path, tmp_path: Path) -> None:
    """In an environment of its own, because the mere presence of torch-fidelity breaks torchmetrics here."""
    extra = tmp_path / "extra"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(extra)]
    pip.append("torch-fidelity==0.4.0")
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode and not os.environ.get("CI"):
        pytest.skip(f"torch-fidelity cannot be installed: {installed.stderr.strip()[-200:]}")
    assert installed.returncode == 0, installed.stderr
    command = [sys.executable, "-c", COMPARISON, str(weights), str(extra)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) == 4 and max(differences) < 1e-3
