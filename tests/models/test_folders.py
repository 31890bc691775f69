"""Folders of models: they keep every bit, damage is named, and the shipped weights are those on record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dp_lora.errors import UserError
from dp_lora.models.folders import WEIGHTS, LatentDiffusion, find, load, save, sha256
from tests.builders.architectures import one_tensor_less


def test_save_and_load_keep_every_bit(model: LatentDiffusion, tmp_path: Path) -> None:
    save(model, tmp_path, {"seed": 4})
    again = load(tmp_path)
    assert again.classes == model.classes and not again.training
    assert again.autoencoder.config["scaling_factor"] == model.autoencoder.config["scaling_factor"]
    assert torch.equal(again.scheduler.alphas_cumprod, model.scheduler.alphas_cumprod)
    for (name, value), (other, loaded) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(value, loaded)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["seed"] == 4
    assert record["sha256"] == {name: sha256(tmp_path / name) for name in record["sha256"]}
    assert len(record["sha256"]) == 3


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _other_shape(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: tensors[name].flatten()[:-1].clone()}, path)


def _one_more(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({**load_file(path), "surplus": torch.zeros(2)}, path)


@pytest.mark.parametrize("damage", [Path.unlink, _truncate, _other_shape, one_tensor_less, _one_more])
@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "autoencoder/diffusion_pytorch_model.safetensors",
        "class_embedder/model.safetensors",
    ],
)
def test_damaged_weights_are_named(
    damage: Callable[[Path], None], file: str, pretrained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pretrained, tmp_path / "model")
    damage(folder / file)
    with pytest.raises(UserError, match=r"^model\.pretrained: ") as caught:
        load(folder)
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file", ["unet/config.json", "scheduler/scheduler_config.json", "class_embedder/config.json"]
)
@pytest.mark.parametrize("content", [None, '{"sample', "[]"])
def test_damaged_settings_are_named(file: str, content: str | None, pretrained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pretrained, tmp_path / "model")
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(UserError, match=r"^model\.pretrained: ") as caught:
        load(folder)
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.pretrained='nowhere'"):
        find("nowhere")
    with pytest.raises(UserError, match="expected a folder in diffusers form"):
        find(str(tmp_path))


def test_the_weights_that_ship_are_those_on_record() -> None:
    folder = WEIGHTS / "ldm32"
    record = json.loads((folder / "record.json").read_text())
    files = {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*.safetensors")}
    assert record["sha256"] == files and len(files) == 3
    assert {"made_by", "model", "public_data", "seed", "hardware", "versions"} <= record.keys()
    assert record["public_data"]["public"] is True
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 15e6
    assert find("ldm32") == folder
    assert load(folder).latent_shape[1] == 8


def test_a_hub_name_while_offline_says_what_to_put_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^model\.pretrained='nobody/nothing-here': ") as caught:
        find("nobody/nothing-here")
    message = str(caught.value)
    assert "model_index.json" in message and "model.pretrained=PATH" in message and "\n" not in message
