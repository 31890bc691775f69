"""A tiny random pipeline of each family, as diffusers saves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    UMT5Config,
    UMT5EncoderModel,
)

from dp_lora.config.schema import LoraConfig
from dp_lora.models import adapters
from dp_lora.models.folders import LatentDiffusion, load
from tests.builders import scripts
from tests.builders.architectures import CLASSES, shaken
from tests.builders.pipeline_parts import (
    SIDE,
    SMALL,
    autoencoder,
    clip,
    clip_tokenizer,
    flow,
    gemma,
    t5,
    t5_tokenizer,
)


def side_of(kind: str) -> int:
    """The side of the images of a kind: Sana's pipeline takes multiples of 32."""
    return 32 if kind == "sana" else SIDE


CAPTIONS = ["a", "a red fox", "", "b c d e f g", "fox fox fox"]
"""Of different lengths."""


def length_of(kind: str) -> int | None:
    """The tokens of a prompt, where the pipeline asks."""
    return {"sdxl": None, "sdxl_v": None, "lumina2": scripts.LUMINA_LENGTH, "qwen": scripts.QWEN_LENGTH}.get(
        kind, scripts.LENGTH
    )


def sdxl(folder: Path, prediction_type: str = "epsilon", wide: int = 12) -> Any:
    """`wide` is the width of the second text encoder; that of the first is 12."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=12 + wide,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + wide,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(4),
        text_encoder=clip(),
        text_encoder_2=clip(CLIPTextModelWithProjection, wide),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        unet=shaken(unet),
        scheduler=scheduler,
        add_watermarker=False,
    )


def sd3(folder: Path, *, with_t5: bool = True, **config: Any) -> Any:
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 12,
    }
    return diffusers.StableDiffusion3Pipeline(
        transformer=shaken(diffusers.SD3Transformer2DModel(**{**sizes, **config})),
        scheduler=flow(shift=3.0),
        vae=autoencoder(4, shift_factor=0.06),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(folder),
        text_encoder_3=t5(32) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def sd35(folder: Path) -> Any:
    return sd3(folder, qk_norm="rms_norm", dual_attention_layers=(0,))


def flux(folder: Path, guidance_embeds: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    return diffusers.FluxPipeline(
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(4, shift_factor=0.1),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=shaken(transformer),
    )


def _read_text(blocks: Any) -> None:
    """Otherwise a caption hardly changes what so small a network predicts."""
    for block in blocks:
        for layer in (block.attn.add_v_proj, block.attn.to_out[0]):
            layer.weight.data *= 10


def _flux2(text_encoder: Any, guidance_embeds: bool) -> dict[str, Any]:
    """The parts of a FLUX.2 pipeline, with the given text encoder."""
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    shaken(transformer)
    _read_text(transformer.transformer_blocks)
    vae.bn.running_mean += 0.1 * torch.randn(16)
    vae.bn.running_var += torch.rand(16)
    tokenizer = t5_tokenizer()
    # The words of the user alone.
    tokenizer.chat_template = (
        "{% for message in messages if message['role'] == 'user' %}{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{{ message['content'][0]['text'] }}{% endif %}{% endfor %}"
    )
    return {
        "scheduler": flow(shift=3.0, use_dynamic_shifting=True),
        "vae": shaken(vae),
        "text_encoder": shaken(text_encoder),
        "tokenizer": tokenizer,
        "transformer": transformer,
    }


def flux2_klein(folder: Path) -> Any:
    text = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=28, **SMALL))
    return diffusers.Flux2KleinPipeline(**_flux2(text, guidance_embeds=False))


def flux2(folder: Path) -> Any:
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "num_hidden_layers": 31, **SMALL},
        vision_config={"model_type": "pixtral", "image_size": 8, "patch_size": 4, **sight},
    )
    text = Mistral3ForConditionalGeneration(config)
    return diffusers.Flux2Pipeline(**_flux2(text, guidance_embeds=True))


def chroma(folder: Path) -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        scheduler=flow(),
        vae=autoencoder(4, shift_factor=0.1),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=shaken(transformer),
    )


def pixart(kind: Any, **config: Any) -> Any:
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 2,
        "patch_size": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "in_channels": 4,
        "out_channels": 8,
        "norm_type": "ada_norm_single",
    }
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear", beta_start=0.0001, beta_end=0.02
    )
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=autoencoder(4),
        transformer=shaken(diffusers.PixArtTransformer2DModel(**{**sizes, **config})),
        scheduler=scheduler,
    )


def sana(folder: Path) -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=gemma(),
        vae=shaken(vae),
        transformer=shaken(transformer),
        scheduler=scheduler,
    )


def lumina2(folder: Path) -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(256, 16, 16),
        cap_feat_dim=16,
    )
    return diffusers.Lumina2Pipeline(
        transformer=shaken(transformer),
        scheduler=flow(shift=6.0),
        vae=autoencoder(4, shift_factor=0.1),
        text_encoder=gemma(),
        tokenizer=t5_tokenizer(),
    )


def aura_flow(folder: Path) -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    shaken(transformer)
    _read_text(transformer.joint_transformer_blocks)
    text = UMT5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=shaken(UMT5EncoderModel(text)),
        vae=autoencoder(4),
        transformer=transformer,
        scheduler=flow(shift=1.73),
    )


def qwen(folder: Path) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, 0.0, -0.1, 0.2],
        latents_std=[1.0, 2.0, 1.5, 0.5],
    )
    sight = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 16}
    text = {**SMALL, "num_hidden_layers": 1, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight)
    shaken(transformer)
    _read_text(transformer.transformer_blocks)
    return diffusers.QwenImagePipeline(
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=shaken(vae),
        text_encoder=shaken(Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sdxl": sdxl,
    "sdxl_v": lambda folder: sdxl(folder, "v_prediction"),
    "sd3": sd3,
    "sd3_without_t5": lambda folder: sd3(folder, with_t5=False),
    "sd35": sd35,
    "flux": flux,
    "flux_schnell": lambda folder: flux(folder, guidance_embeds=False),
    "flux2": flux2,
    "flux2_klein": flux2_klein,
    "chroma": chroma,
    "qwen": qwen,
    "pixart_alpha": lambda folder: pixart(diffusers.PixArtAlphaPipeline, sample_size=128),
    "pixart_sigma": lambda folder: pixart(diffusers.PixArtSigmaPipeline),
    "sana": sana,
    "lumina2": lumina2,
    "aura_flow": aura_flow,
}


def written(kind: str, folder: Path) -> Path:
    """The folder of a fresh pipeline below `folder`, written once."""
    place = folder / kind
    if not place.exists():
        torch.manual_seed(0)
        PIPELINES[kind](place).save_pretrained(place)
    return place


def model_of(
    kind: str, folder: Path, prompts: list[str] | None = None, precision: str = "float32"
) -> LatentDiffusion:
    """The model of a fresh pipeline, which knows `prompts`, or some classes."""
    model = load(
        written(kind, folder),
        prompt="{}",
        image_size=side_of(kind),
        prompt_length=length_of(kind),
        precision=precision,
    )
    assert model.prompts is not None
    model.new_classes(CLASSES, torch.Generator())
    if prompts is not None:
        model.prompts.use(prompts)
    return model


Draws = tuple[Tensor, Tensor, Tensor, Tensor]
"""Latents, labels, timesteps and noise."""


def draws(model: LatentDiffusion, examples: int, k: int) -> Draws:
    generator = torch.Generator().manual_seed(3)
    shape = model.latent_shape
    return (
        torch.randn(examples, *shape, generator=generator),
        torch.arange(examples),
        torch.randint(1000, (examples, k), generator=generator),
        torch.randn(examples, k, *shape, generator=generator),
    )


def with_adapter(model: LatentDiffusion, targets: Sequence[str] = ("qkv", "proj")) -> LatentDiffusion:
    """The model with a LoRA that is not zero."""
    adapters.attach(model, ["lora"], LoraConfig(rank=2, target_modules=list(targets)), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def only(given: Draws, i: int) -> Draws:
    latents, labels, timesteps, noise = given
    one = slice(i, i + 1)
    return latents[one], labels[one], timesteps[one], noise[one]
