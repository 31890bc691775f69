"""The scripts of examples/, as a user runs them and against the job."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from dp_lora import make_plan
from dp_lora.models import adapters
from dp_lora.models.folders import load
from dp_lora.models.latents import Latents
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.training import finetune
from tests.builders.architectures import stable_diffusion
from tests.builders.tiny import TINY, composed

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COUNT = 12


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def captioned_images(folder: Path) -> list[str]:
    """A folder of small images with captions that the tiny tokenizer knows; the captions, in order."""
    folder.mkdir()
    captions = ["abcdefghijklmnop"[i] for i in range(COUNT)]
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    for i, caption in enumerate(captions):
        Image.fromarray(pixels[i]).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"{caption}\n")
    return captions


def plan() -> PrivacyPlan:
    return make_plan(
        num_examples=COUNT, expected_batch_size=4, steps=3, noise_multiplier=0.8, delta=1e-3,
        noise_multiplicity=2, max_grad_norm=0.1,
    )  # fmt: skip


def test_the_diffusers_script_trains_what_the_job_trains(tmp_path: Path) -> None:
    """At one seed the two adapters are the same, but for how the two programs round."""
    pipeline, captions = stable_diffusion(tmp_path / "sd"), captioned_images(tmp_path / "images")
    example = script("text_to_image_lora")
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    means, stds, _ = images = example.encode(pipe, tmp_path / "images")
    example.add_lora(pipe, rank=2)

    config = composed(
        *TINY, "trainable=lora_alone", "lora.rank=2", "noise_multiplicity=k2", "train.max_steps=3",
        "train.expected_batch_size=4", "train.learning_rate=0.01", "train.schedule=constant",
        "train.weight_decay=0.01", "train.ema_decay=0", "train.warmup_steps=0", "privacy.insecure_seed=7",
    )  # fmt: skip
    config.lora.target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    model = load(pipeline)
    model.new_classes(["cat"], torch.Generator())  # what the engine is tried on
    adapters.attach(model, config.trainable.components, config.lora, seed=0)
    # Both start from the same adapter.
    ours = adapters.trainable_parameters(model)
    theirs = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    assert [name.removeprefix("unet.") for name in ours] == list(theirs)
    for own, other in zip(ours.values(), theirs.values(), strict=True):
        other.data.copy_(own)
    before = torch.cat([p.detach().flatten() for p in ours.values()])

    out = tmp_path / "out"
    example.train(pipe, images, plan(), out, learning_rate=0.01, seed=7)
    labels = torch.zeros(COUNT, dtype=torch.int64)
    finetune.finetune(
        config, model, Latents(means, stds), labels, plan(), tmp_path / "job", lambda *_: None,
        lambda finished: None, captions=captions,
    )  # fmt: skip
    job, loop = (torch.cat([p.detach().flatten() for p in part.values()]) for part in (ours, theirs))
    assert float((job - before).abs().max()) > 0.01
    assert torch.allclose(loop, job, atol=1e-5)
    saved = load_file(out / "pytorch_lora_weights.safetensors")
    assert sum(value.numel() for value in saved.values()) == len(job)
    record = json.loads((out / "privacy.json").read_text())
    assert record["steps"] == 3 and record["complete"] and record["reproducible_noise"]


def run(*words: Any) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_diffusers_script_runs_and_has_nothing_to_do_again(tmp_path: Path) -> None:
    words = (
        EXAMPLES / "text_to_image_lora.py",
        stable_diffusion(tmp_path / "sd"),
        tmp_path / "images",
        tmp_path / "out",
    )
    captioned_images(tmp_path / "images")
    assert "step 20 of 20: epsilon 7.9" in run(*words)
    adapter = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    record = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert record["epsilon"] <= 8 and record["complete"] and record["private"]
    assert not (tmp_path / "out" / "private" / "key").exists()
    assert "step" not in run(*words)
    again = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert again.keys() == adapter.keys() and all(torch.equal(again[name], adapter[name]) for name in again)


def test_the_torch_script_learns_the_digits(tmp_path: Path) -> None:
    told = run(EXAMPLES / "torch_module.py", tmp_path)
    accuracy = float(told.split()[4].rstrip(","))
    # 0.10 by chance; 0.88 measured.
    assert accuracy > 0.7 and "epsilon 4.99" in told
    assert json.loads((tmp_path / "privacy.json").read_text())["epsilon"] == pytest.approx(4.99, abs=0.01)
