"""Sweeps on disk as launcher and jobs leave them, without running anything: for tests and measurements."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from dp_lora.config.identity import fingerprint, run_directory
from dp_lora.config.schema import Config, DataConfig, ModelConfig
from dp_lora.storage.files import json_ready

ADJACENCY = "add or remove one image, Poisson sampling"
EXTRACTOR = {"version": "EfficientNet-Lite0, sha256 579344248a93", "preprocessing": "bilinear to 64 px"}
SHA = "e33cf45027fa0d11035640544581e9a4a9abb129"

Choice = Mapping[str, Any]
"""Fields of a configuration by their dotted names."""


def configured(outputs: Path, choice: Choice) -> Config:
    """The defaults with these fields."""
    config = Config(
        data=DataConfig(name="mnist5k"),
        public_data=DataConfig(name="letters", public=True),
        model=ModelConfig(name="ldm32", pretrained="ldm32"),
    )
    config.paths.outputs = str(outputs)
    for name, value in choice.items():
        *groups, field = name.split(".")
        node: Any = config
        for group in groups:
            node = getattr(node, group)
        assert hasattr(node, field), name
        setattr(node, field, value)
    return config


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination; `lora__rank` stands for lora.rank."""
    names = [name.replace("__", ".") for name in values]
    return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values.values())]


def words_of(choice: Choice) -> list[str]:
    """As Hydra writes them."""
    return [
        f"{name}=[{','.join(map(str, value))}]" if isinstance(value, list) else f"{name}={value}"
        for name, value in choice.items()
    ]


def write_run(directory: Path, config: Config, state: str = "done", **changes: Mapping[str, Any]) -> Path:
    """A run directory in a state; `changes` are for the content of its files, by their names."""
    directory.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(config)
    (directory / "config.yaml").write_text(
        yaml.dump(values, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    )
    ended = state == "done"
    steps = config.train.max_steps or 80
    done = steps if ended else steps // 2
    files: dict[str, dict[str, Any]] = {
        "status": {"state": state, "updated": "2026-11-24T12:00:00+00:00", "stage": "finetune"}
        | ({"error": "OutOfMemoryError"} if state == "failed" else {}),
        "privacy": _privacy(config, done, steps),
        "provenance": {"git": {"sha": SHA, "dirty": None}, "versions": {"dp-lora": "0.1.0"}},
    }
    if ended:
        files["result"] = _result(config)
        _picture(directory / "samples.png", config.seed)
    for name, content in {**files, **{n: {} for n in changes if n not in files}}.items():
        content |= changes.get(name, {})
        text = json.dumps(json_ready(content))
        (directory / f"{name}.json").write_text(text)
    lines = (json.dumps(json_ready(_row(config, step, steps))) for step in range(1, done + 1))
    (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return directory


def _privacy(config: Config, done: int, steps: int) -> dict[str, Any]:
    privacy = config.privacy
    private = privacy.epsilon is not None and math.isfinite(privacy.epsilon)
    sigma = privacy.noise_multiplier or (8 / (privacy.epsilon or 8) if private else 0.0)
    spent = privacy.epsilon if privacy.epsilon is not None else 8 / sigma
    return {
        "num_examples": 4000, "sample_rate": config.train.expected_batch_size / 4000,
        "expected_batch_size": config.train.expected_batch_size, "steps": done, "planned_steps": steps,
        "noise_multiplier": sigma, "noise_multiplicity": privacy.noise_multiplicity,
        "max_grad_norm": privacy.max_grad_norm, "delta": privacy.delta, "target_epsilon": privacy.epsilon,
        "epsilon": spent * math.sqrt(done / steps), "accountant": "pld" if sigma else "none",
        "adjacency": ADJACENCY, "private": bool(sigma), "complete": done == steps,
        "reproducible_noise": privacy.insecure_seed is not None,
    }  # fmt: skip


def _result(config: Config) -> dict[str, Any]:
    rank = config.lora.rank if "lora" in config.trainable.components else 32
    wobble = random.Random(f"{fingerprint(config)}").gauss(0, 0.006)
    epsilon = min(config.privacy.epsilon or 8.0, 30.0)
    draws = math.log2(config.privacy.noise_multiplicity)
    accuracy = 0.93 - 0.12 / epsilon - 0.03 / rank + 0.006 * draws + wobble
    distance = 100 + 40 / epsilon + 20 / rank - 3 * draws - 300 * wobble
    metrics = {"accuracy_cnn": accuracy, "fd_lite0": distance, "kid_lite0": distance / 200}
    metrics |= {"accuracy_cnn_before": 0.095, "fd_lite0_before": 165.0, "kid_lite0_before": 0.9}
    metrics |= {"accuracy_cnn_real": 0.957, "fd_lite0_real": 21.0, "kid_lite0_real": 0.001}
    return {
        "metrics": metrics, "n_samples": 2000, "reference": {"split": "test", "n": 1000},
        "extractors": {"lite0": EXTRACTOR}, "private_metrics": list(metrics), "seed": config.seed,
        "trainable_parameters": 3000 * rank, "peak_memory_bytes": 1_100_000_000 + rank, "device": "cpu",
        "seconds": {"finetune": 90.0 * config.privacy.noise_multiplicity, "sample": 12.0, "evaluate": 80.0},
    }  # fmt: skip


def _row(config: Config, step: int, steps: int) -> dict[str, Any]:
    spent = _privacy(config, step, steps)["epsilon"]
    row = {"stage": "finetune", "step": step, "time": 1795530282 + step, "epsilon": spent,
           "learning_rate": 0.02, "update_norm": 0.001, "signal_to_noise": 0.05 + 0.1 / step}  # fmt: skip
    return row | ({"private_loss": 0.3 + 0.5 / step} if config.tracking.private_loss else {})


def _picture(path: Path, seed: int) -> None:
    """Noise, which is as hard to compress as a picture can be."""
    pixels = np.random.default_rng(seed).integers(0, 255, (330, 330), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=1)


def write_sweep(
    outputs: Path, name: str, choices: Sequence[Choice], states: Sequence[str] = (), **fixed: Any
) -> Path:
    """The folder of a sweep with runs in these states, the rest done; `missing` ones have no directory."""
    folder = outputs / "sweeps" / name
    (folder / "cells").mkdir(parents=True)
    cells = []
    for number, choice in enumerate(choices):
        config = configured(outputs, {**fixed, **choice})
        given = [f"sweep={name}", *words_of(fixed), *words_of(choice)]
        directory = run_directory(config, given)
        state = states[number] if number < len(states) else "done"
        if state != "missing":
            write_run(directory, copy.deepcopy(config), state)
        cells.append(
            {"number": number, "identity": fingerprint(config), "words": given, "directory": str(directory)}
        )
    record = {
        "command": f"dp-lora -m sweep={name}",
        "code": "0" * 12,
        "job": "dp_lora.jobs.stages:run",
        "cells": cells,
    }
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder
