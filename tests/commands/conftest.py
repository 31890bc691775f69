"""The directory of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from safetensors.numpy import save_file

from dp_lora.config.schema import Config
from dp_lora.storage.files import write_json, write_lines
from tests.builders.exported import PLAN, RESULT, save_samples


@pytest.fixture
def run(tmp_path: Path, tiny: Callable[..., Config]) -> Path:
    """The directory of a finished run, made up."""
    directory = tmp_path / "outputs" / "default" / "lora.rank=8-0123abcd"
    (directory / "adapter").mkdir(parents=True)
    (directory / "checkpoint").mkdir()
    (directory / "checkpoint" / "key").write_bytes(b"secret")
    (directory / "wandb").mkdir()
    save_file({"w": np.zeros(2, np.float32)}, directory / "adapter" / "adapter_model.safetensors")
    (directory / "adapter" / "adapter_config.json").write_text('{"r": 8}')
    (directory / "adapter" / "README.md").write_text("## Privacy\n")
    config = tiny("privacy.adjacency=zero_out")
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_json(directory / "status.json", {"state": "done"})
    write_json(directory / "privacy.json", PLAN)
    write_json(directory / "result.json", RESULT)
    write_json(directory / "provenance.json", {"git": {}, "start": "2026-01-01", "hardware": {"cores": 64}})
    rows = [{"stage": "finetune", "step": 1, "time": 1795000000, "update_norm": 0.5, "grad_norm": 0.25}]
    write_lines(directory / "metrics.jsonl", rows)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(directory / "samples.png")
    save_samples(directory, images=np.zeros((2, 1, 8, 8), np.uint8), labels=[0, 1], classes=["a", "b"])
    return directory
