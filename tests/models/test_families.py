"""Every family on a tiny random pipeline: loss, gradients, conditions and images, against plain diffusers."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dp_lora.config.schema import SamplerConfig
from dp_lora.errors import UserError
from dp_lora.models import adapters, sample, text_to_image
from dp_lora.models.diffusion import initial_noise, per_example_loss
from dp_lora.models.families import packed
from dp_lora.models.folders import load, outline
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.layers import is_adapter
from dp_lora.privacy.plan import Clip
from tests.builders import scripts
from tests.builders.architectures import one_tensor_less
from tests.builders.families import (
    CAPTIONS,
    PIPELINES,
    SIDE,
    draws,
    length_of,
    model_of,
    only,
    side_of,
    with_adapter,
    written,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pipelines are written, once."""
    return tmp_path_factory.mktemp("families")


def plain(kind: str, pipelines: Path) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3_without_t5" else {}
    return diffusers.DiffusionPipeline.from_pretrained(written(kind, pipelines), **absent)


@pytest.mark.parametrize("kind", PIPELINES)
@torch.inference_mode()
def test_the_loss_is_that_of_diffusers_training_script(kind: str, pipelines: Path) -> None:
    model, pipe = model_of(kind, pipelines, CAPTIONS), plain(kind, pipelines)
    latents, labels, timesteps, noise = draws(model, len(CAPTIONS), 2)
    losses = per_example_loss(model, latents, labels, timesteps, noise)
    for i, caption in enumerate(CAPTIONS):
        one = latents[i : i + 1]
        expected = [
            scripts.loss(pipe, one, caption, int(timesteps[i, j]), noise[i : i + 1, j], side_of(kind))
            for j in range(2)
        ]
        assert float(losses[i]) == pytest.approx(float(sum(expected)) / 2, rel=2e-5)
        # The broken twin: another caption.
        other = scripts.loss(pipe, one, "xyz", int(timesteps[i, 0]), noise[i : i + 1, 0], side_of(kind))
        assert float(other) != pytest.approx(float(expected[0]), rel=2e-5)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kind", PIPELINES)
def test_gradients_are_those_of_a_loop_over_single_examples(
    kind: str, k: int, pipelines: Path, one_by_one: Callable[..., Tensor]
) -> None:
    model = with_adapter(model_of(kind, pipelines, CAPTIONS), ("qkv", "proj", *_feed_forward(kind)))
    given = draws(model, len(CAPTIONS), k)
    rows = one_by_one(model, lambda i: per_example_loss(model, *only(given, i)), len(CAPTIONS))
    norms = rows.norm(dim=1)
    assert (norms > 0).all()
    bound = float(norms.median())
    clipped = rows * (bound / norms).clamp(max=1.0)[:, None]
    engine = ClippedGradientSum(model, Clip(k, bound))
    engine.add(per_example_loss(model, *given))
    assert torch.allclose(engine.total().float(), clipped.sum(0), rtol=1e-3, atol=5e-5 * bound)
    engine.detach()
    # One example adds at most C, to the last digit: here every one is clipped.
    bound = float(norms.min()) / 2
    engine = ClippedGradientSum(model, Clip(k, bound))
    for i in range(len(CAPTIONS)):
        before = engine.total()
        engine.add(per_example_loss(model, *only(given, i)))
        assert 0.999 * bound < float((engine.total() - before).norm()) <= bound
    engine.detach()


@pytest.mark.parametrize("computed", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_base_in_bfloat16_has_adapters_in_float32(
    kind: str,
    computed: str,
    pipelines: Path,
    tmp_path: Path,
    one_by_one: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_to_image, "has_bfloat16", lambda device: computed == "bfloat16")
    exact = with_adapter(model_of(kind, pipelines, CAPTIONS))
    model = with_adapter(model_of(kind, pipelines, CAPTIONS, precision="bfloat16"))
    given, examples = draws(model, len(CAPTIONS), 2), len(CAPTIONS)
    for name, parameter in model.unet.named_parameters():
        assert parameter.dtype == torch.float32 if "lora_" in name else not parameter.requires_grad
    sizes = {True: 0, False: 0}
    for parameter in model.unet.parameters():
        sizes[parameter.dtype == torch.bfloat16] += parameter.numel() * (not parameter.requires_grad)
    # Norms of queries and keys, and the like, may stay in float32.
    assert sizes[True] > 20 * sizes[False]
    computed_in: set[torch.dtype] = set()
    for layer in filter(is_adapter, model.unet.modules()):
        layer.register_forward_hook(lambda layer, given, out: computed_in.add(out.dtype))
    with torch.no_grad():
        wanted, losses = per_example_loss(exact, *given), per_example_loss(model, *given)
    assert losses.dtype == torch.float32 and computed_in == {getattr(torch, computed)}
    assert torch.allclose(losses, wanted, rtol=0.02) and not torch.equal(losses, wanted)
    # The engine and a loop over single examples, both in the same precision.
    rows = one_by_one(model, lambda i: per_example_loss(model, *only(given, i)), examples)
    engine = ClippedGradientSum(model, Clip(2, math.inf))
    engine.add(per_example_loss(model, *given))
    error = (engine.total() - rows.sum(0).double()).norm() / rows.sum(0).norm()
    assert float(error) < (0.05 if computed == "bfloat16" else 1e-4)
    engine.detach()
    images = sample.draw(model, torch.arange(2), SamplerConfig(name="pipeline", steps=2), 0, "off").images
    assert images.std() > 5
    adapters.export(model, tmp_path / "adapter", base_model=kind, card="card\n")
    again = model_of(kind, pipelines, precision="bfloat16")
    adapters.restore(again, tmp_path / "adapter", CAPTIONS)
    for name, parameter in adapters.trainable_parameters(model).items():
        assert torch.equal(again.get_parameter(name), parameter)


def _feed_forward(kind: str) -> list[str]:
    """The end of the name of a linear layer outside of the attention."""
    ends = {
        "sana": "linear_2",
        "lumina2": "linear_3",
        "aura_flow": "linear_2",
        "flux2": "linear_out",
        "qwen": "img_mlp.net.2",
        "flux2_klein": "linear_out",
    }
    return [ends.get(kind, "proj_mlp" if kind.startswith(("flux", "chroma")) else "ff.net.2")]


@pytest.mark.parametrize("kind", PIPELINES)
@torch.inference_mode()
def test_an_example_does_not_depend_on_the_others(kind: str, pipelines: Path) -> None:
    model = model_of(kind, pipelines, CAPTIONS)
    latents, labels, timesteps, noise = draws(model, len(CAPTIONS), 2)
    loss = per_example_loss(model, latents, labels, timesteps, noise)[0]
    assert model.prompts is not None
    model.prompts.use([CAPTIONS[0], *("much longer than it was" for _ in CAPTIONS[1:])])
    latents[1:] *= 100.0
    noise[1:] = noise[1:].flip(1)
    assert torch.allclose(per_example_loss(model, latents, labels, timesteps, noise)[0], loss, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
@torch.inference_mode()
def test_a_condition_does_not_depend_on_other_prompts(kind: str, pipelines: Path) -> None:
    alone, together = model_of(kind, pipelines), model_of(kind, pipelines, CAPTIONS)
    assert alone.prompts is not None
    conditions: Any = together.condition(torch.arange(len(CAPTIONS)))
    for i, caption in enumerate(CAPTIONS):
        alone.prompts.use([caption])
        one: Any = alone.condition(torch.zeros(1, dtype=torch.int64))
        for name, value in one.items():
            assert torch.equal(value, conditions[name][i : i + 1]), name
    # More than are kept: they are encoded when they are asked for, with the same bits.
    alone.prompts.kept_bytes = 0  # type: ignore[attr-defined]
    alone.prompts.use(CAPTIONS)
    order = torch.tensor([3, 1, 1, 4])
    again: Any = alone.condition(order)
    for name, value in again.items():
        assert torch.equal(value, conditions[name][order])


def test_no_word_of_a_caption_is_logged(
    pipelines: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    secret = "s e c r e t " * 20
    with caplog.at_level(logging.DEBUG):
        model_of("flux", pipelines, [secret])
    said = capsys.readouterr()
    assert "s e c r e t" not in caplog.text + said.out + said.err
    # The broken twin: diffusers itself warns, with the words.
    plain("flux", pipelines).encode_prompt(secret, None, max_sequence_length=12)
    assert "s e c r e t" in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_are_those_of_the_pipeline_s_own_call(kind: str, guidance: float, pipelines: Path) -> None:
    model, pipe = model_of(kind, pipelines), plain(kind, pipelines)
    sampler = SamplerConfig(name="pipeline", steps=3, guidance=guidance, batch_size=2)
    drawn = sample.draw(model, torch.arange(3), sampler, 5, "off").images
    noise = initial_noise(5, 0, 3, model.latent_shape)
    given: dict[str, Any] = {
        "height": side_of(kind),
        "width": side_of(kind),
        "num_inference_steps": 3,
        "output_type": "pt",
    }
    if kind in ("flux_schnell", "qwen") and guidance > 1:
        given |= {"true_cfg_scale": guidance, "negative_prompt": [""] * 3}
    if length_of(kind) is not None:
        given["max_sequence_length"] = length_of(kind)
    if kind.startswith(("pixart", "sana")):
        given["use_resolution_binning"] = False
    if kind == "sana":
        given["complex_human_instruction"] = None
    latents = packed(noise) if kind in ("flux", "flux_schnell", "chroma", "qwen") else noise
    expected = pipe(prompt=list(model.classes), latents=latents, guidance_scale=guidance, **given).images
    pixels = (expected * 255).round().numpy()
    assert abs(pixels - drawn).max() <= 1
    assert drawn.std() > 5 and abs(drawn[0] - drawn[1].astype(float)).max() > 1


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_family_s_folder_of_one_variant_is_read(pipelines: Path, tmp_path: Path) -> None:
    plain("flux", pipelines).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    expected, found = model_of("flux", pipelines).state_dict(), load(tmp_path / "half").state_dict()
    assert expected.keys() == found.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        wanted = expected[name].half().float() if value.is_floating_point() else expected[name]
        assert torch.equal(value, wanted), name


def _outline_and_load(folder: Path) -> None:
    outline(folder)
    load(folder)


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "another scheduler": (
        "flux",
        lambda f: _edit(f / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler"),
        "EDMEulerScheduler",
    ),
    "code of its own": (
        "sd3",
        lambda f: _edit(f / "model_index.json", text_encoder_3=["my_module", "MyEncoder"]),
        "my_module",
    ),
    "no text encoder": ("flux", lambda f: shutil.rmtree(f / "text_encoder_2"), "text_encoder_2 is missing"),
    "a missing tensor of the text encoder": (
        "flux",
        lambda f: one_tensor_less(f / "text_encoder" / "model.safetensors"),
        "1 missing tensors",
    ),
    "a missing tensor of the network": (
        "sd3",
        lambda f: one_tensor_less(f / "transformer" / "diffusion_pytorch_model.safetensors"),
        "1 missing tensors",
    ),
    "guidance as an input (LCM)": (
        "sdxl",
        lambda f: _edit(f / "unet" / "config.json", time_cond_proj_dim=8),
        "time_cond_proj_dim=8",
    ),
    "weights of four bits": (
        "flux",
        lambda f: _edit(
            f / "transformer" / "config.json",
            quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        ),
        "has weights that bitsandbytes quantised",
    ),
    "a text encoder of eight bits": (
        "flux",
        lambda f: _edit(
            f / "text_encoder_2" / "config.json", quantization_config={"quant_method": "torchao"}
        ),
        "has weights that torchao quantised",
    ),
    "latents that do not fit": (
        "sd3",
        lambda f: _edit(f / "vae" / "config.json", latent_channels=8),
        "channels",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_family_is_one_clear_line(case: str, pipelines: Path, tmp_path: Path) -> None:
    kind, break_it, words = BROKEN[case]
    folder = shutil.copytree(written(kind, pipelines), tmp_path / "broken")
    break_it(folder)
    with pytest.raises(UserError, match=r"^model\.pretrained: ") as caught:
        _outline_and_load(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize("kind", PIPELINES)
def test_plain_diffusers_predicts_the_same_with_the_adapter(
    kind: str, pipelines: Path, tmp_path: Path
) -> None:
    model = with_adapter(model_of(kind, pipelines, CAPTIONS))
    pipe = plain(kind, pipelines)
    adapters.export(model, tmp_path / "adapter", base_model=kind, card="card\n")
    latents, labels, timesteps, noise = draws(model, 1, 1)

    def of_script() -> Tensor:
        with torch.inference_mode():
            return scripts.loss(pipe, latents, CAPTIONS[0], int(timesteps[0, 0]), noise[:, 0], SIDE)

    before = of_script()
    network = pipe.unet if kind.startswith("sdxl") else pipe.transformer
    if hasattr(network, "load_lora_adapter"):
        weights = {"weight_name": "adapter_model.safetensors", "prefix": "base_model.model"}
        network.load_lora_adapter(tmp_path / "adapter", **weights)
    else:  # PixArt: peft puts the adapter into the network
        PeftModel.from_pretrained(network, str(tmp_path / "adapter"))
    with torch.inference_mode():
        ours = per_example_loss(model, latents, labels, timesteps, noise)[0]
    assert torch.allclose(of_script(), ours, rtol=2e-5)
    assert not torch.allclose(before, ours, rtol=1e-4)
    restored = model_of(kind, pipelines)
    adapters.restore(restored, tmp_path / "adapter", CAPTIONS)
    with torch.inference_mode():
        assert torch.allclose(per_example_loss(restored, latents, labels, timesteps, noise)[0], ours)


@pytest.mark.parametrize("kind", PIPELINES)
@torch.inference_mode()
def test_load_lora_weights_of_the_pipeline_gives_the_same_loss(
    kind: str, pipelines: Path, tmp_path: Path
) -> None:
    model, pipe = with_adapter(model_of(kind, pipelines, CAPTIONS)), plain(kind, pipelines)
    adapters.export(model, tmp_path, base_model="x", card="")
    if not hasattr(pipe, "load_lora_weights"):
        assert kind.startswith("pixart"), "diffusers has no such method for these"
        return
    latents, labels, timesteps, noise = draws(model, len(CAPTIONS), 1)
    losses = per_example_loss(model, latents, labels, timesteps, noise)

    def of_pipeline() -> list[float]:
        return [
            float(
                scripts.loss(
                    pipe,
                    latents[i : i + 1],
                    caption,
                    int(timesteps[i, 0]),
                    noise[i : i + 1, 0],
                    side_of(kind),
                )
            )
            for i, caption in enumerate(CAPTIONS)
        ]

    assert of_pipeline() != pytest.approx(losses.tolist(), rel=1e-4)
    pipe.load_lora_weights(tmp_path)
    assert of_pipeline() == pytest.approx(losses.tolist(), rel=2e-5)
