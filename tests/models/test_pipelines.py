"""Pipelines of diffusers: every kind and condition, saving, loading, all stages, and what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from dp_lora.errors import UserError
from dp_lora.jobs.stages import run
from dp_lora.models import sample
from dp_lora.models.folders import find, load, outline, save, sha256
from tests.builders.architectures import (
    ARCHITECTURES,
    BUILT,
    CLASSES,
    PIPELINES,
    built,
    dit,
    ldm,
    model_of,
    one_tensor_less,
    stable_diffusion,
)

# Every kind of model


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pipelines are written, once."""
    return tmp_path_factory.mktemp("pipelines")


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.inference_mode()
def test_a_model_has_the_shapes_and_ranges_it_promises(kind: str, pipelines: Path) -> None:
    model = model_of(kind, pipelines)
    noisy, timesteps, labels = torch.randn(4, *model.latent_shape), torch.arange(4) * 300, torch.arange(4) % 3
    assert model.latent_shape == (3, 4, 4) and model.image_shape == (3, 8, 8)
    conditions = model.condition(labels)
    predicted = model.predict_noise_of(noisy, timesteps, conditions)
    assert predicted.shape == noisy.shape and torch.equal(predicted, model(noisy, timesteps, labels))
    others = model(noisy, timesteps, (labels + 1) % 3)
    assert torch.equal(predicted, others) != model.conditional
    if model.conditional:
        # A row's condition is its own, and so is the neutral one.
        assert model.neutral_condition(4).shape == conditions.shape
        assert not torch.equal(model.neutral_condition(4), conditions)
        assert torch.allclose(predicted[1:2], model(noisy[1:2], timesteps[1:2], labels[1:2]), atol=1e-5)
    else:
        assert torch.equal(predicted, model.predict_noise_of(noisy, timesteps, None))
    mean, std = model.encode(torch.rand(2, 3, 8, 8) * 2 - 1)
    assert mean.shape == std.shape == (2, 3, 4, 4)
    assert isinstance(model.autoencoder, VQModel) == bool((std == 0).all())
    images = model.decode(30 * torch.randn(2, 3, 4, 4))
    assert images.shape == (2, 3, 8, 8) and images.min() >= -1 and images.max() <= 1


@pytest.mark.parametrize("kind", BUILT)
def test_every_kind_is_saved_and_loaded_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = built(BUILT[kind])
    save(model, tmp_path, {})
    again, without_weights = load(tmp_path), outline(tmp_path)
    noisy, timesteps, labels = torch.randn(3, 3, 4, 4), torch.tensor([5, 400, 990]), torch.arange(3)
    with torch.inference_mode():
        assert torch.equal(again(noisy, timesteps, labels), model(noisy, timesteps, labels))
        assert torch.equal(again.decode(noisy), model.decode(noisy))
    assert again.classes == without_weights.classes == model.classes
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in without_weights.state_dict().items()} == shapes
    assert all(value.is_meta for value in without_weights.state_dict().values())
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    before = sha256(file)
    for parameter in again.parameters():
        parameter.data += 1
    assert sha256(file) == before


@pytest.mark.parametrize("kind", ["spatial_transformer", "plain_attention_block"])
def test_plain_diffusers_loads_what_it_has_settings_for(kind: str, tmp_path: Path) -> None:
    model = built(BUILT[kind])
    save(model, tmp_path, {})
    noisy, timesteps = torch.randn(3, 3, 4, 4), torch.tensor([5, 400, 990])
    with torch.inference_mode():
        if model.conditional:
            plain: Any = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
            found = plain(noisy, timesteps, model.condition(torch.arange(3))).sample
        else:
            plain = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
            found = plain(noisy, timesteps).sample
        assert torch.allclose(found, model(noisy, timesteps, torch.arange(3)), atol=1e-5)


# Pipelines, against diffusers' own use of them


@torch.inference_mode()
def test_a_text_to_image_pipeline_is_conditioned_on_prompts(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "sd")
    model = load(folder, prompt="a {} in red")
    model.new_classes(["cat", "arctic_fox"], torch.Generator())
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    noisy, timesteps = torch.randn(2, 3, 4, 4), torch.tensor([3, 700])

    def expected(*prompts: str) -> torch.Tensor:
        tokens = pipe.tokenizer(
            list(prompts), padding="max_length", max_length=8, truncation=True, return_tensors="pt"
        )
        text = pipe.text_encoder(tokens.input_ids)[0]
        return pipe.unet(noisy, timesteps, encoder_hidden_states=text).sample

    reds = expected("a cat in red", "a arctic fox in red")
    assert torch.allclose(model(noisy, timesteps, torch.arange(2)), reds, atol=1e-5)
    empty = model.predict_noise_of(noisy, timesteps, model.neutral_condition(2))
    assert torch.allclose(empty, expected("", ""), atol=1e-5)
    # Captions, more of them than are kept as embeddings.
    model.prompts.use([f"caption {i}" for i in range(200)])
    of_two = model(noisy, timesteps, torch.tensor([7, 150]))
    assert torch.allclose(of_two, expected("caption 7", "caption 150"), atol=1e-5)
    assert not any("caption" in name or "ids" in name for name in model.state_dict())
    assert model.train().prompts.encoder.training is False


@torch.inference_mode()
def test_a_v_prediction_becomes_the_noise_it_stands_for(tmp_path: Path) -> None:
    model = load(stable_diffusion(tmp_path / "sd", "v_prediction"))
    model.new_classes(["cat"], torch.Generator())
    clean, noise = torch.randn(2, 2, 3, 4, 4)
    timesteps, labels = torch.tensor([100, 900]), torch.zeros(2, dtype=torch.int64)
    a = model.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    exact = a.sqrt() * noise - (1 - a).sqrt() * clean
    model._network = lambda *_: exact  # type: ignore[method-assign]
    assert torch.allclose(model(noisy, timesteps, labels), noise, atol=1e-4)
    assert model.scheduler.config["prediction_type"] == "epsilon"


@torch.inference_mode()
def test_a_diffusion_transformer_takes_its_classes_and_the_null_class(tmp_path: Path) -> None:
    model = load(dit(tmp_path / "dit"))
    assert model.classes == CLASSES
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "dit", subfolder="transformer").eval()
    noisy, timesteps = torch.randn(3, 3, 4, 4), torch.tensor([3, 300, 700])

    def expected(labels: list[int]) -> torch.Tensor:
        return transformer(noisy, timesteps, class_labels=torch.tensor(labels)).sample[:, :3]

    assert torch.allclose(model(noisy, timesteps, torch.arange(3)), expected([0, 1, 2]), atol=1e-5)
    neutral = model.predict_noise_of(noisy, timesteps, model.neutral_condition(3))
    assert torch.allclose(neutral, expected([3, 3, 3]), atol=1e-5)
    model.new_classes(["owl", "elk"], torch.Generator())
    assert torch.equal(model.predict_noise_of(noisy, timesteps, model.neutral_condition(3)), neutral)
    # Its dropout of labels would be random: it is gone with the tables.
    labels = torch.tensor([0, 1, 0])
    assert torch.equal(model.train()(noisy, timesteps, labels), model.eval()(noisy, timesteps, labels))


@torch.inference_mode()
def test_an_ldm_pipeline_is_used_as_diffusers_does(tmp_path: Path) -> None:
    noisy, timesteps, labels = torch.randn(3, 3, 4, 4), torch.tensor([3, 300, 700]), torch.arange(3)
    model = load(ldm(tmp_path / "plain"))
    unet = UNet2DModel.from_pretrained(tmp_path / "plain", subfolder="unet")
    assert torch.allclose(model(noisy, timesteps, labels), unet(noisy, timesteps).sample, atol=1e-5)
    vqvae = VQModel.from_pretrained(tmp_path / "plain", subfolder="vqvae")
    assert torch.allclose(model.decode(noisy), vqvae.decode(noisy / 0.5).sample.clamp(-1, 1), atol=1e-5)
    assert model.encode(torch.zeros(1, 3, 8, 8))[0].allclose(
        vqvae.encode(torch.zeros(1, 3, 8, 8)).latents * 0.5
    )
    model = load(ldm(tmp_path / "classes", classes=3))
    unet = UNet2DModel.from_pretrained(tmp_path / "classes", subfolder="unet")
    assert torch.allclose(
        model(noisy, timesteps, labels), unet(noisy, timesteps, class_labels=labels).sample, atol=1e-5
    )


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _differing_tables(folder: Path) -> None:
    transformer = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data += 1
    transformer.save_pretrained(folder / "transformer")


def _no_length(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))


def _not_finite(folder: Path) -> None:
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    unet.conv_in.bias.data[0] = float("nan")
    unet.save_pretrained(folder / "unet")


def _outline_and_load(folder: Path) -> None:
    outline(folder)
    load(folder)


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "another network": (
        "ldm",
        lambda f: _edit(f / "model_index.json", unet=["diffusers", "UNet1DModel"]),
        "UNet1DModel",
    ),
    "no network": ("ldm", lambda f: shutil.rmtree(f / "unet"), "unet/config.json is missing"),
    "no text encoder": ("stable_diffusion", lambda f: shutil.rmtree(f / "text_encoder"), "is missing"),
    "another text encoder": (
        "stable_diffusion",
        lambda f: _edit(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        "T5EncoderModel",
    ),
    "another prediction": (
        "ldm",
        lambda f: _edit(f / "scheduler" / "scheduler_config.json", prediction_type="sample"),
        "prediction_type 'sample'",
    ),
    "truncated index": ("dit", lambda f: (f / "model_index.json").write_text("{"), "model_index.json"),
    "missing tensor": (
        "dit",
        lambda f: one_tensor_less(f / "transformer" / "diffusion_pytorch_model.safetensors"),
        "1 missing tensors",
    ),
    "differing tables": ("dit", _differing_tables, "different class embeddings"),
    "latents that do not fit": (
        "ldm",
        lambda f: _edit(f / "unet" / "config.json", in_channels=4),
        "channels",
    ),
    "a scheduler of scores": (
        "ldm",
        lambda f: _edit(f / "scheduler" / "scheduler_config.json", _class_name="ScoreSdeVeScheduler"),
        "ScoreSdeVeScheduler",
    ),
    "another pipeline": (
        "stable_diffusion",
        lambda f: _edit(f / "model_index.json", _class_name="StableDiffusionControlNetPipeline"),
        "StableDiffusionControlNetPipeline",
    ),
    "classes beside the prompt": (
        "stable_diffusion",
        lambda f: _edit(
            f / "unet" / "config.json",
            class_embed_type="projection",
            projection_class_embeddings_input_dim=8,
        ),
        "class_embed_type='projection'",
    ),
    "guidance as an input (LCM)": (
        "stable_diffusion",
        lambda f: _edit(f / "unet" / "config.json", time_cond_proj_dim=8),
        "time_cond_proj_dim=8",
    ),
    "places (GLIGEN)": (
        "stable_diffusion",
        lambda f: _edit(f / "unet" / "config.json", attention_type="gated"),
        "attention_type='gated'",
    ),
    "a tokenizer without a length": ("stable_diffusion", _no_length, "has no model_max_length"),
    "weights that are not finite": ("ldm", _not_finite, "conv_in.bias holds numbers that are not finite"),
    "no size": ("ldm", lambda f: _edit(f / "unet" / "config.json", sample_size=None), "sample_size"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pipeline_is_one_clear_line(case: str, tmp_path: Path, pipelines: Path) -> None:
    kind, break_it, words = BROKEN[case]
    model_of(kind, pipelines)
    folder = shutil.copytree(pipelines / kind, tmp_path / "broken")
    break_it(folder)
    with pytest.raises(UserError, match=r"^model\.pretrained: ") as caught:
        _outline_and_load(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value) and "expected" in str(caught.value)


def test_a_folder_of_one_variant_is_read(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "sd")
    expected = load(folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    names = {path.name for path in (tmp_path / "half").rglob("*.safetensors")}
    assert names and all(".fp16." in name for name in names)
    found = load(tmp_path / "half")
    assert outline(tmp_path / "half").classes == found.classes
    for (name, value), other in zip(found.unet.named_parameters(), expected.unet.parameters(), strict=True):
        assert value.dtype == torch.float32, name
        assert torch.equal(value, other.half().float()), name
    assert found.prompts is not None and expected.prompts is not None
    for value, other in zip(found.prompts.parameters(), expected.prompts.parameters(), strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, other.half().float())


def test_a_pipeline_s_folder_is_found(pipelines: Path) -> None:
    for kind in PIPELINES:
        model_of(kind, pipelines)
        assert find(str(pipelines / kind)) == pipelines / kind


@pytest.mark.parametrize("kind", ["stable_diffusion", "dit", "ldm"])
def test_a_pipeline_goes_through_all_stages(
    kind: str, tiny: Callable[..., Any], pipelines: Path, tmp_path: Path
) -> None:
    model_of(kind, pipelines)
    config = tiny(
        f"model.pretrained={pipelines / kind}",
        "data.channels=3",
        "lora.rank=2",
        "sampler.guidance=1.5",
        "evaluation.classifier_epochs=1",
    )
    result = run(config)
    record = json.loads((Path(result["directory"]) / "result.json").read_text())
    assert record["trainable_parameters"] > 0 and "fd_lite0" in result
    assert (Path(result["directory"]) / "adapter" / "adapter_model.safetensors").exists()
    images = sample.load(Path(result["directory"])).images
    assert images.shape == (20, 3, 8, 8) and images.dtype == "uint8"


def test_images_that_do_not_fit_a_pipeline_are_one_line(tiny: Callable[..., Any], pipelines: Path) -> None:
    model_of("dit", pipelines)
    with pytest.raises(UserError, match=r"^data\.name=digits: images of 1 x 8 x 8, expected 3 x 8 x 8"):
        run(tiny(f"model.pretrained={pipelines / 'dit'}"))
    with pytest.raises(UserError, match=r"which the DiTPipeline that model\.pretrained names takes$"):
        run(tiny(f"model.pretrained={pipelines / 'dit'}"))
