"""An adapter of a text-to-image model, as diffusers' pipelines and kohya's readers take it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from dp_lora.config.schema import LoraConfig, SamplerConfig
from dp_lora.jobs.job import name_of_base
from dp_lora.jobs.stages import run
from dp_lora.models import adapters, sample
from dp_lora.models.adapter_files import KOHYA, PIPELINE
from dp_lora.models.diffusion import initial_noise
from dp_lora.models.folders import LatentDiffusion, load
from dp_lora.records.card import TextToImage, model_card
from tests.builders.architectures import CLASSES, stable_diffusion
from tests.builders.statement import RECORD

EVERYWHERE = ["qkv", "proj", "conv"]


def trained(folder: Path, components: list[str], **lora: Any) -> LatentDiffusion:
    """The model of a pipeline as a training would leave it: every trained parameter moved."""
    model = load(folder, prompt="{}")
    model.new_classes(CLASSES, torch.Generator())
    adapters.attach(model, components, LoraConfig(**lora), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pipeline(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.inference_mode()
def of_product(model: LatentDiffusion) -> torch.Tensor:
    noisy = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    return model(noisy, torch.tensor([3, 400, 900]), torch.arange(3))


@torch.inference_mode()
def of_pipeline(pipe: StableDiffusionPipeline) -> torch.Tensor:
    noisy = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    text, _ = pipe.encode_prompt(list(CLASSES), torch.device("cpu"), 1, False)
    return pipe.unet(noisy, torch.tensor([3, 400, 900]), encoder_hidden_states=text).sample


@pytest.mark.parametrize("file", [None, PIPELINE, KOHYA])
@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 4, "target_modules": ["qkv"]},
        {"rank": 4, "alpha": 12.0, "target_modules": EVERYWHERE},
        # The layers are 8 and 16 wide, the first convolution takes 3 channels: three ranks in one adapter.
        {"rank": 12, "alpha": 6.0, "target_modules": [*EVERYWHERE, "conv_in"], "cap_rank": True},
    ],
    ids=["attention", "alpha", "capped"],
)
def test_load_lora_weights_gives_the_same_predictions(
    lora: dict[str, Any], file: str | None, tmp_path: Path
) -> None:
    base, adapter = stable_diffusion(tmp_path / "sd"), tmp_path / "adapter"
    model = trained(base, ["lora"], **lora)
    adapters.export(model, adapter, base_model="x", card="")
    pipe = pipeline(base)
    before = of_pipeline(pipe)
    expected = of_product(model)
    assert not torch.allclose(before, expected, atol=1e-3)
    pipe.load_lora_weights(adapter, **({} if file is None else {"weight_name": file}))
    torch.testing.assert_close(of_pipeline(pipe), expected, atol=1e-5, rtol=1e-5)
    pipe.fuse_lora()
    torch.testing.assert_close(of_pipeline(pipe), expected, atol=1e-5, rtol=1e-5)


def test_half_the_scale_is_half_the_update(tmp_path: Path) -> None:
    base, adapter = stable_diffusion(tmp_path / "sd"), tmp_path / "adapter"
    model = trained(base, ["lora"], rank=4, alpha=12.0)
    adapters.export(model, adapter, base_model="x", card="")
    pipe = pipeline(base)
    pipe.load_lora_weights(adapter, adapter_name="private")
    pipe.set_adapters("private", 0.5)
    for module in model.unet.modules():
        if isinstance(module, LoraLayer):
            assert module.scaling["default"] == 3.0
            module.scaling["default"] = 1.5
    torch.testing.assert_close(of_pipeline(pipe), of_product(model), atol=1e-5, rtol=1e-5)


def test_a_pipeline_in_the_hub_s_cache_has_its_name(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    base = stable_diffusion(tmp_path / "sd")
    cached = tmp_path / "hub" / "models--some-owner--pets-v1.5" / "snapshots" / "0a1b"
    cached.parent.mkdir(parents=True)
    base.rename(cached)
    (tmp_path / "link").symlink_to(cached)
    for place in (cached, tmp_path / "link"):
        assert name_of_base(tiny(f"model.pretrained={place}"), place) == "some-owner/pets-v1.5"
    cached.rename(base)
    assert re.fullmatch("tiny8-[0-9a-f]{8}", name_of_base(tiny(f"model.pretrained={base}"), base))


def test_a_pipeline_draws_the_images_of_the_product(tmp_path: Path) -> None:
    base, adapter = stable_diffusion(tmp_path / "sd"), tmp_path / "adapter"
    model = trained(base, ["lora"], rank=4)
    adapters.export(model, adapter, base_model="x", card="")
    sampler = SamplerConfig(name="ddim", steps=5, guidance=2.0)
    images = sample.draw(model, torch.arange(3), sampler, seed=7, progress_mode="off").images
    pipe = pipeline(base)
    pipe.load_lora_weights(adapter)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True, steps_offset=0)
    drawn = pipe(
        list(CLASSES),
        num_inference_steps=5,
        guidance_scale=2.0,
        latents=initial_noise(7, 0, 3, (1, 3, 4, 4))[:, 0],
        output_type="np",
    ).images
    expected = torch.from_numpy(images).permute(0, 2, 3, 1)
    found = torch.from_numpy((drawn * 255).round().astype("uint8"))
    assert (found.int() - expected.int()).abs().max() <= 1 and expected.float().std() > 5


def test_kohya_s_names_are_those_of_its_scripts(tmp_path: Path) -> None:
    model = trained(stable_diffusion(tmp_path / "sd"), ["lora"], rank=4, alpha=2.0, target_modules=["to_q"])
    adapters.export(model, tmp_path / "adapter", base_model="x", card="")
    tensors = load_file(tmp_path / "adapter" / KOHYA)
    one = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {name for name in tensors if name.startswith(one)} == {
        f"{one}.lora_down.weight", f"{one}.lora_up.weight", f"{one}.alpha"
    }  # fmt: skip
    assert tensors[f"{one}.lora_down.weight"].shape == (4, 16) and tensors[f"{one}.alpha"] == 2
    assert all(re.fullmatch(r"lora_unet_\w+\.(lora_(down|up)\.weight|alpha)", name) for name in tensors)


def test_only_a_text_to_image_adapter_has_these_files(model: LatentDiffusion, tmp_path: Path) -> None:
    adapters.attach(model, ["lora", "embedder"], LoraConfig(rank=2), seed=0)
    adapters.export(model, tmp_path, base_model="x", card="")
    assert not {PIPELINE, KOHYA, "prompts.json"} & {path.name for path in tmp_path.iterdir()}
    assert adapters.conditions(tmp_path) is None


@pytest.mark.parametrize("components", [["lora"], ["lora", "bias"], ["bias", "norm"]], ids="+".join)
def test_the_code_of_the_card_loads_everything_that_was_trained(
    components: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = stable_diffusion(tmp_path / "sd"), tmp_path / "adapter"
    model = trained(base, components, rank=4, target_modules=EVERYWHERE)
    in_place = components != ["lora"]
    card = model_card(
        RECORD,
        base_model=str(base),
        data_name="pets",
        trainable=components,
        rank=4 if "lora" in components else None,
        target_modules=EVERYWHERE,
        parameters=10,
        text=TextToImage("{}", CLASSES, in_place=in_place),
    )
    adapters.export(model, adapter, base_model="x", card=card)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(adapter)
    loaded: dict[str, Any] = {}
    exec(code[1], loaded)
    torch.testing.assert_close(of_pipeline(loaded["pipe"]), of_product(model), atol=1e-5, rtol=1e-5)
    assert ("leaves them out" in card) == (in_place and "lora" in components)


def test_a_job_s_adapter_says_its_prompt_and_classes_and_loads(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    base = stable_diffusion(tmp_path / "sd")
    words = ("data.channels=3", "lora.rank=2", "trainable.components=[lora]", "model.prompt='a {}'")
    result = run(tiny(f"model.pretrained={base}", *words, "stages=[finetune]"))
    adapter = Path(result["directory"]) / "adapter"
    card = (adapter / "README.md").read_text()
    assert "`a {}`, such as `a 0`" in card and "Classes: `0`, `1`" in card and str(tmp_path) not in card
    assert json.loads((adapter / "prompts.json").read_text()) == {
        "prompt": "a {}",
        "classes": [str(digit) for digit in range(10)],
    }
    pipe = pipeline(base)
    before = of_pipeline(pipe)
    pipe.load_lora_weights(adapter)
    assert not torch.equal(of_pipeline(pipe), before)
