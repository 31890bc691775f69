"""The parts that tiny pipelines share: autoencoders, text encoders, tokenizers, schedulers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.builders.architectures import shaken

SIDE = 16
"""Of the images, in pixels; the latents' is 8."""


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def autoencoder(channels: int, **config: Any) -> Any:
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "sample_size": SIDE,
        "scaling_factor": 0.3,
    }
    return shaken(diffusers.AutoencoderKL(latent_channels=channels, **{**sizes, **config}))


def clip(kind: Any = CLIPTextModel, width: int = 12) -> Any:
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return shaken(kind(config))


def t5(width: int = 16) -> Any:
    config = T5Config(vocab_size=40, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return shaken(T5EncoderModel(config))


def clip_tokenizer(folder: Path, **config: Any) -> CLIPTokenizer:
    """A tokenizer of single letters, as CLIP's files say them."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    files = folder.with_name(f"{folder.name}-tokens")
    files.mkdir(exist_ok=True)
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    special = ("<|startoftext|>", *("<|endoftext|>",) * 3)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return CLIPTokenizer.from_pretrained(
        files, **{"model_max_length": 8, **dict(zip(names, special, strict=True)), **config}
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words, letter by letter, that pads and ends as T5's does."""
    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "<bos>", *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<bos>",
        model_max_length=32,
    )


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 3,
}


def gemma() -> Any:
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
    )
    return shaken(Gemma2Model(config))
