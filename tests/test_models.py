"""Models: the exact shortcut of one-token attention, saving, loading, and the weights that ship."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from dp_lora import latents
from dp_lora.config import ModelConfig
from dp_lora.data import ImageSplits
from dp_lora.errors import UserError
from dp_lora.models import WEIGHTS, LatentDiffusion, build, find, load, save, sha256
from dp_lora.networks import SingleTokenAttention


def _inputs(model: LatentDiffusion, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(rows, *model.latent_shape, generator=generator)
    return noisy, torch.arange(rows) * 190, torch.arange(rows) % len(model.classes)


@torch.inference_mode()
def test_attention_to_one_token_equals_diffusers_own(model: LatentDiffusion) -> None:
    fast = model.predict_noise(*_inputs(model))
    replaced = 0
    for module in model.unet.modules():
        if isinstance(module, Attention) and isinstance(module.processor, SingleTokenAttention):
            module.set_processor(AttnProcessor2_0())
            replaced += 1
    assert replaced > 0
    assert torch.allclose(model.predict_noise(*_inputs(model)), fast, atol=1e-6, rtol=0)


def test_the_condition_reaches_the_output(model: LatentDiffusion) -> None:
    noisy, timesteps, labels = _inputs(model)
    assert not torch.equal(
        model.predict_noise(noisy, timesteps, labels), model.predict_noise(noisy, timesteps, labels + 1)
    )


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


def _one_less(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


def _one_more(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({**load_file(path), "surplus": torch.zeros(2)}, path)


@pytest.mark.parametrize("damage", [Path.unlink, _truncate, _other_shape, _one_less, _one_more])
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


def test_sizes_that_do_not_fit_are_an_error() -> None:
    config = ModelConfig(name="odd")
    with pytest.raises(UserError, match=r"public_data\.image_size=30: expected a multiple of 4"):
        build(config, classes=["a"], channels=1, image_size=30)
    config.unet.norm_num_groups = 7
    with pytest.raises(UserError, match=r"^model\.name=odd: "):
        build(config, classes=["a"], channels=1, image_size=32)


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


@torch.inference_mode()
def test_latents_and_images_keep_their_shapes_and_ranges(model: LatentDiffusion, digits: ImageSplits) -> None:
    images = latents.to_unit_range(digits.train.images[:6])
    assert images.shape == (6, 1, 8, 8) and images.min() == -1 and images.max() == 1
    mean, std = model.encode(images)
    assert mean.shape == std.shape == (6, *model.latent_shape) and (std > 0).all()
    decoded = model.decode(50 * torch.randn(6, *model.latent_shape))
    assert decoded.shape == images.shape and decoded.min() >= -1 and decoded.max() <= 1
    assert (latents.to_bytes(images) == digits.train.images[:6]).all()


def test_latents_of_the_public_set_have_unit_variance(model: LatentDiffusion, digits: ImageSplits) -> None:
    encoded = latents.encode(model, digits.train)
    noise = torch.randn(encoded.mean.shape, generator=torch.Generator().manual_seed(0))
    assert abs(float(encoded.sample(torch.arange(len(encoded)), noise).var()) - 1) < 0.02


def test_the_cache_of_latents_is_private_and_tells_images_apart(
    model: LatentDiffusion, digits: ImageSplits, tmp_path: Path
) -> None:
    first = latents.cached(model, digits.test, tmp_path)
    (file,) = (tmp_path / "latents").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and (tmp_path / "latents").stat().st_mode & 0o777 == 0o700
    again = latents.cached(model, digits.test, tmp_path)
    assert torch.equal(first.mean, again.mean) and torch.equal(first.std, again.std)
    latents.cached(model, digits.test.subset(range(5)), tmp_path)  # type: ignore[arg-type]
    model.autoencoder.register_to_config(scaling_factor=2.0)
    latents.cached(model, digits.test, tmp_path)
    assert len(list((tmp_path / "latents").iterdir())) == 3


def test_new_classes_get_public_embeddings(model: LatentDiffusion) -> None:
    old = model.class_embedder.weight.detach().clone()
    model.new_classes(["a", "b", "c"], torch.Generator().manual_seed(1))
    fresh = model.class_embedder.weight.detach()
    assert model.classes == ("a", "b", "c") and fresh.shape == (3, old.shape[1])
    assert ((fresh - old.mean(0)).abs() < old.std(0)).all()
    assert not torch.equal(fresh[0], fresh[1])
