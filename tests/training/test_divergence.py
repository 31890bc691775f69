"""A training that has diverged ends as failed with what it spent, and images of one colour are said."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from dp_lora.__main__ import main
from dp_lora.config.schema import Config
from dp_lora.models import sample
from dp_lora.models.folders import LatentDiffusion
from dp_lora.storage.files import read_json, read_lines
from dp_lora.training.divergence import Diverged, Watch
from tests.builders.tiny import once, words

pytestmark = pytest.mark.usefixtures("unchecked")

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def dp_lora(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Run:
    """Runs a tiny job and gives its exit status and the lines of stderr."""

    def call(*given: str) -> tuple[int, list[str]]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["dp-lora", *once(*words(cache, tmp_path / "outputs"), *given)])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        GlobalHydra.instance().clear()
        return status, capfd.readouterr().err.splitlines()

    return call


def test_a_diverged_training_ends_as_failed_with_what_it_spent(dp_lora: Run, tmp_path: Path) -> None:
    for _ in range(2):  # the second time the same step is replayed, not paid for again
        status, lines = dp_lora("train.learning_rate=1e6", "train.microbatch=32")
        assert status == 2 and "Traceback" not in "\n".join(lines)
        assert [line for line in lines if line.startswith("dp-lora: ")] == lines[-1:]
        assert lines[-1].startswith(
            "dp-lora: train.learning_rate=1e+06, train.embedder_learning_rate_factor=5, "
        )
        assert ": the training diverged: a trained weight has grown to " in lines[-1]
        (directory,) = (tmp_path / "outputs" / "default").iterdir()
        privacy, recorded = read_json(directory / "privacy.json"), read_json(directory / "status.json")
        spent = f"after step 1 of 4; epsilon {privacy['epsilon']:.4g} at delta 1e-05 is spent; expected a"
        assert spent in lines[-1] and 0 < privacy["epsilon"] < 10
        assert (recorded["state"], recorded["error"]) == ("failed", lines[-1].removeprefix("dp-lora: "))
        assert (privacy["steps"], privacy["complete"]) == (1, False)
        assert not (directory / "adapter").exists() and not (directory / "samples.npz").exists()
        last = read_lines(tmp_path / "outputs.privacy_ledger.jsonl")[-1]
        assert (last["set"], last["steps"]) == ("digits", 1)


def test_without_the_watch_it_is_done_and_the_plain_images_are_said(
    dp_lora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The twin that looks at nothing: what the test above must notice, and the last line of defence.
    monkeypatch.setattr(Watch, "after", lambda *args: None)
    monkeypatch.setattr(Watch, "at_the_end", lambda *args: None)
    status, lines = dp_lora("train.learning_rate=1e6", "stages=[finetune,sample]", "train.microbatch=32")
    (directory,) = (tmp_path / "outputs" / "default").iterdir()
    assert status == 0 and read_json(directory / "status.json")["state"] == "done"
    assert any(
        line.startswith("sample: 20 of 20 images are of one colour; if they should not be, the training has")
        for line in lines
    ), lines


def test_a_model_that_predicts_nonsense_is_found_at_the_end(model: LatentDiffusion) -> None:
    watch = Watch(list(model.unet.parameters()), Config(), 0.0, "epsilon {} at delta 1e-05 is spent")
    watch.at_the_end(model, 2.0)
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(1000)  # each weight stays within its bound
    watch.after(1, 1, 2.0)
    with pytest.raises(Diverged) as refusal:
        watch.at_the_end(model, 2.0)
    assert str(refusal.value).startswith(
        "train.learning_rate=0.01: the training diverged: the trained model's error on synthetic noise is "
    )
    assert str(refusal.value).endswith(
        ", not about 1; epsilon 2 at delta 1e-05 is spent; expected a smaller learning rate"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -20001.0])
def test_the_watch_stops_at_weights_beyond_all_bounds(value: float) -> None:
    weights = [torch.ones(3), torch.tensor([-2.0])]
    watch = Watch(weights, Config(), 0.0, "epsilon {} is spent")
    weights[1].fill_(19999.0)  # the largest was 2
    watch.after(1, 9, 0.5)
    weights[0][1] = value
    with pytest.raises(Diverged, match=r"after step 2 of 9; epsilon 0\.6 is spent"):
        watch.after(2, 9, 0.6)


LESS_NOISE = (
    ", or less noise against the gradients: a larger train.expected_batch_size or epsilon, or a "
    "max_grad_norm that is not far above their norms"
)


@pytest.mark.parametrize(
    ("factors", "noise_multiplier", "settings", "expected"),
    [
        ({}, 0.0, "", ""),
        ({"embedder": 30.0}, 0.0, ", train.embedder_learning_rate_factor=30", " or factor"),
        ({"all": 1e4}, 1.25, ", trainable.learning_rate_factor=10000, privacy.max_grad_norm=0.001 with noise "
         "multiplier 1.25", f" or factor{LESS_NOISE}"),
        ({}, 0.5, ", privacy.max_grad_norm=0.001 with noise multiplier 0.5", LESS_NOISE),
    ],
)  # fmt: skip
def test_every_setting_that_can_have_made_it_diverge_is_named(
    factors: dict[str, float], noise_multiplier: float, settings: str, expected: str
) -> None:
    config, weights = Config(), [torch.ones(3)]
    config.train.embedder_learning_rate_factor = factors.get("embedder", 1.0)
    config.trainable.learning_rate_factor = factors.get("all", 1.0)
    watch = Watch(weights, config, noise_multiplier, "")
    weights[0].fill_(math.nan)
    with pytest.raises(Diverged) as refusal:
        watch.after(2, 9, 0.6)
    assert str(refusal.value) == (
        f"train.learning_rate=0.01{settings}: the training diverged: a trained weight is no finite number "
        f"any more after step 2 of 9; expected a smaller learning rate{expected}"
    )


def test_plain_images_are_counted() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 3, 4, 4)).astype(np.uint8)
    images[1] = 0
    images[2] = np.array([10, 200, 30], np.uint8)[:, None, None]
    images[3] = 255
    images[3, 0, 0, 0] = 252
    labels = np.zeros(5, np.int64)
    assert sample.plain(sample.Samples(images, labels, ("all",))) == 2
