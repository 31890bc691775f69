"""The whole job on 8 x 8 digits, through the command."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from dp_lora.__main__ import main
from dp_lora.config.schema import Config
from dp_lora.jobs.stages import run
from dp_lora.models import folders, sample
from dp_lora.models.folders import LatentDiffusion
from dp_lora.storage.files import read_json, read_lines
from tests.builders.architectures import stable_diffusion
from tests.builders.image_files import write_parquet
from tests.builders.notebooks import executed
from tests.builders.tiny import once, words

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def dp_lora(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs a job to its end and gives its run directory."""
    outputs = tmp_path_factory.mktemp("outputs")

    def call(*given: str, name: str) -> Path:
        GlobalHydra.instance().clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["dp-lora", *once(*words(cache, outputs / name), *given)])
            main()
        GlobalHydra.instance().clear()
        (directory,) = (outputs / name / "default").iterdir()
        return directory

    return call


WHOLE = ("sampler.num_samples=40", "evaluation.classifier_epochs=1")


@pytest.fixture(scope="module")
def whole(dp_lora: Callable[..., Path]) -> Path:
    return dp_lora(*WHOLE, name="whole")


def test_the_model_is_read_once_a_job(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def load(folder: Path, *given: Any, **named: Any) -> LatentDiffusion:
        read.append(folder)
        return folders_load(folder, *given, **named)

    folders_load = folders.load
    monkeypatch.setattr(folders, "load", load)
    run(tiny("evaluation.extractors=[]", "evaluation.classifier_epochs=1", "train.max_steps=1"))
    assert len(read) == 1


def test_every_file_of_a_run_is_there(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names - {"wandb"} == {
        "config.yaml", "provenance.json", "status.json", "metrics.jsonl", "privacy.json", "adapter",
        "checkpoint", "samples.npz", "samples.png", "result.json",
    }  # fmt: skip
    assert (whole / "checkpoint").stat().st_mode & 0o777 == 0o700
    assert not (whole / "checkpoint" / "key").exists()
    assert {"adapter_model.safetensors", "adapter_config.json", "trained.safetensors", "README.md"} == {
        path.name for path in (whole / "adapter").iterdir()
    }


def test_the_records_have_their_fields(whole: Path) -> None:
    assert read_json(whole / "status.json")["state"] == "done"
    provenance = read_json(whole / "provenance.json")
    assert provenance.keys() >= {"git", "versions", "hardware", "seeds", "slurm", "restarts", "start", "end"}
    assert provenance["restarts"] == 0 and provenance["end"]
    rows = read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row.keys() >= {"stage", "epsilon", "update_norm", "signal_to_noise"} for row in rows)
    privacy = read_json(whole / "privacy.json")
    assert privacy.keys() >= {
        "epsilon", "target_epsilon", "delta", "noise_multiplier", "noise_multiplicity", "max_grad_norm",
        "sample_rate", "expected_batch_size", "steps", "accountant", "adjacency", "epsilon_by_accountant",
        "covers", "does_not_cover",
    }  # fmt: skip
    assert 9.9 <= privacy["epsilon"] <= 10 == privacy["target_epsilon"]
    assert privacy["steps"] == 4 and privacy["complete"] is True
    assert privacy["epsilon_by_accountant"].keys() == {"prv", "rdp", "pld"}
    result = read_json(whole / "result.json")
    assert result.keys() >= {
        "metrics", "n_samples", "seed", "reference", "trainable_parameters", "seconds", "peak_memory_bytes",
        "device",
    }  # fmt: skip
    assert result["images_compared"] is True
    assert result["seconds"].keys() >= {"finetune", "sample"} and result["n_samples"] == 40
    for name in ("accuracy_cnn", "fd_lite0", "kid_lite0"):
        assert {name, f"{name}_before", f"{name}_real"} <= result["metrics"].keys()


def test_images_from_before_are_drawn_once_for_all_jobs_that_share_them(
    dp_lora: Callable[..., Path], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    generate = sample.generate

    def counted(model: Any, config: Any, description: str = "sample") -> sample.Samples:
        drawn.append(description)
        return generate(model, config, description)

    monkeypatch.setattr(sample, "generate", counted)
    again = dp_lora(*WHOLE, "privacy.epsilon=5", name="shares")
    assert drawn == ["sample"]
    before = [
        {
            name: value
            for name, value in read_json(run / "result.json")["metrics"].items()
            if "_before" in name
        }
        for run in (whole, again)
    ]
    assert before[0] and before[0] == before[1]
    dp_lora(*WHOLE, "seed=1", name="another_seed")
    assert drawn == ["sample", "sample", "sample before fine-tuning"]


def test_captions_train_a_text_to_image_model_and_stay_private(
    dp_lora: Callable[..., Path], tmp_path: Path
) -> None:
    write_parquet(
        tmp_path / "x.parquet",
        40,
        label=[i % 2 for i in range(40)],
        text=[f"zebra {i} of the secret" for i in range(40)],
    )
    words = (
        f"model.pretrained={stable_diffusion(tmp_path / 'sd')}",
        "data=imagefolder",
        "trainable=lora_alone",
    )
    table = (
        f"data.source={tmp_path / 'x.parquet'}",
        "data.image_size=8",
        "data.channels=3",
        "data.test_size=0.2",
    )
    small = ("train.expected_batch_size=10", "sampler.num_samples=4", "stages=[finetune,sample]")
    captions = "data.caption_column=text"
    directory = dp_lora(*words, *table, *small, captions, "lora.rank=2", name="captions")
    assert read_json(directory / "privacy.json")["complete"] is True
    assert np.load(directory / "samples.npz")["labels"].tolist() == [0, 1, 0, 1]
    for path in directory.rglob("*"):
        assert not path.is_file() or b"zebra" not in path.read_bytes(), path
    without = dp_lora(*words, *table, *small, "lora.rank=2", name="prompts")
    assert without.name != directory.name
    with pytest.raises(SystemExit, match="2"):
        dp_lora(*table[:3], "data=imagefolder", captions, name="no_encoder")


def test_samples_are_labelled_images_of_every_class(whole: Path) -> None:
    samples = np.load(whole / "samples.npz")
    assert samples["images"].shape == (40, 1, 8, 8) and samples["images"].dtype == np.uint8
    assert np.bincount(samples["labels"]).tolist() == [4] * 10
    assert len(samples["classes"]) == 10
    with Image.open(whole / "samples.png") as grid:
        assert grid.width == 2 * 10 * 8


def test_the_card_states_the_guarantee(whole: Path) -> None:
    card = (whole / "adapter" / "README.md").read_text()
    for word in ("differential privacy", "epsilon", "delta", "accountant", "adjacency", "does not cover"):
        assert word in card
    assert "NO privacy guarantee" not in card


def test_the_notebook_of_a_run_shows_it(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed("single_run", monkeypatch, DP_LORA_RUN=whole)
    for expected in ("does not cover", "1 run, 4 steps on the same images", "accuracy_cnn", "image/png"):
        assert expected in shown


def _content(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_second_call_does_nothing(whole: Path, dp_lora: Callable[..., Path], capsys: Any) -> None:
    before = _content(whole)
    assert dp_lora(*WHOLE, name="whole") == whole
    assert _content(whole) == before
    said = capsys.readouterr()
    assert said.err.count("done already") == 3 and "epsilon" in said.out and str(whole) in said.out
    assert "accuracy_cnn *" in said.out and "* computed on private data; releasing it is not" in said.out
    # The same run in other words.
    assert dp_lora(*WHOLE, "privacy.epsilon=10.0", "resources.threads=1", name="whole") == whole


def test_a_stage_whose_output_is_gone_is_done_again(whole: Path, dp_lora: Callable[..., Path]) -> None:
    before = _content(whole)
    for name in ("samples.npz", "samples.png"):
        (whole / name).unlink()
    dp_lora(*WHOLE, "stages=[sample]", name="whole")
    after = _content(whole)
    assert after["samples.png"] == before["samples.png"]
    assert {n for n in before if before[n] != after.get(n)} <= {
        "status.json", "provenance.json", "config.yaml", "samples.npz",
    }  # fmt: skip


@pytest.mark.slow
def test_the_papers_cifar10_goes_through_all_stages_at_full_size(tmp_path: Path, monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    classes = {"cifar/train": (10, 6), "cifar/test": (10, 3), "imagenet/train": (3, 6)}
    for folder, (count, images) in classes.items():
        for place in (tmp_path / folder / f"class{number}" for number in range(count)):
            place.mkdir(parents=True)
            for number in range(images):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    given = [
        f"paths.cache={tmp_path}/cache",
        f"paths.outputs={tmp_path}/outputs",
        f"paths.ledger={tmp_path}/l",
    ]
    given += ["experiment=cifar10", f"data.source={tmp_path}/cifar", "train.max_steps=2", "scale=smoke"]
    given += [f"public_data.source={tmp_path}/imagenet", "tracking.wandb=disabled", "tracking.progress=off"]
    monkeypatch.setattr(sys, "argv", ["dp-lora", *given])
    main()
    GlobalHydra.instance().clear()
    (directory,) = (tmp_path / "outputs" / "cifar10").iterdir()
    result, privacy = read_json(directory / "result.json"), read_json(directory / "privacy.json")
    assert result["trainable_parameters_by_component"] == {"lora": 392_192, "embedder": 5_120}
    assert (privacy["steps"], privacy["noise_multiplicity"]) == (2, 2)
    assert 9.95 < privacy["epsilon"] <= 10
    with np.load(directory / "samples.npz") as samples:
        assert samples["images"].shape == (20, 3, 32, 32)
    assert all(math.isfinite(value) for value in result["metrics"].values())


def test_without_privacy_no_guarantee_is_claimed(dp_lora: Callable[..., Path], capsys: Any) -> None:
    directory = dp_lora("epsilon=inf", "stages=[finetune]", name="inf")
    said = capsys.readouterr().out
    assert "NO privacy guarantee" in said and "delta" not in said
    privacy = read_json(directory / "privacy.json")
    assert float(privacy["epsilon"]) == math.inf and privacy["private"] is False
    assert "NO privacy guarantee" in json.dumps(privacy["covers"])
    card = (directory / "adapter" / "README.md").read_text()
    assert "NO privacy guarantee" in card and "differential privacy**" not in card


def test_a_seed_for_the_noise_is_said_to_be_no_privacy(dp_lora: Callable[..., Path], capsys: Any) -> None:
    directory = dp_lora("privacy.insecure_seed=3", "stages=[finetune]", "train.max_steps=1", name="seeded")
    assert "reproducible noise" in capsys.readouterr().out
    assert read_json(directory / "privacy.json")["reproducible_noise"] is True
    assert "NO privacy guarantee" in (directory / "adapter" / "README.md").read_text()


def test_a_fixed_noise_stops_before_it_passes_epsilon(dp_lora: Callable[..., Path]) -> None:
    from dp_lora.privacy.accounting import epsilon
    from dp_lora.privacy.subsampled_gaussian import Mechanism

    given = ("noise_multiplier=fixed", "train.max_steps=null", "privacy.epsilon=1.8", "stages=[finetune]")
    directory = dp_lora(*given, "noise_multiplicity=k1", name="fixed")
    privacy = read_json(directory / "privacy.json")
    assert privacy["noise_multiplier"] == 1.0 and privacy["epsilon"] <= 1.8
    one_more = Mechanism(1.0, privacy["sample_rate"], privacy["steps"] + 1)
    assert epsilon([one_more], privacy["delta"]).epsilon > 1.8
    assert len(read_lines(directory / "metrics.jsonl")) == privacy["steps"] >= 2


def test_without_a_target_the_spent_epsilon_is_reported(dp_lora: Callable[..., Path], capsys: Any) -> None:
    given = ("epsilon=none", "privacy.noise_multiplier=2", "train.max_steps=2", "stages=[finetune]")
    directory = dp_lora(*given, name="none")
    privacy = read_json(directory / "privacy.json")
    assert privacy["target_epsilon"] is None and 0 < privacy["epsilon"] < 1 and privacy["steps"] == 2
    assert f"epsilon            {privacy['epsilon']:.4g}" in capsys.readouterr().out
