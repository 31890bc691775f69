"""Prompts of a text-to-image model: a class or an image's caption, through a frozen text encoder.

Every prompt has the tokenizer's full length, so no size tells anything about a caption.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dp_lora.config.schema import PROMPT
from dp_lora.models.families import Conditions

_KEPT = 128
"""Prompts up to which their embeddings are computed once and kept: 30 MB at 77 tokens of 768 channels."""


class Prompts(nn.Module):
    """A frozen text encoder and the prompts that labels and captions stand for.

    Args:
        encoder: a CLIPTextModel, or what is called like one.
        tokenizer: of the encoder.
        template: the prompt of a class, with {} for its name.
    """

    ids: Tensor
    embeddings: Tensor | None

    def __init__(self, encoder: nn.Module, tokenizer: Any, template: str = PROMPT) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.template = template
        self.register_buffer("ids", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("embeddings", None, persistent=False)
        self.use([])

    def use_classes(self, classes: Sequence[str]) -> None:
        """Label i stands for the template with the name of class i; '_' in a name is read as a space."""
        self.use([self.template.replace("{}", name.replace("_", " ")) for name in classes])

    def use(self, prompts: Sequence[str]) -> None:
        """Index i stands for prompt i. Captions are as private as their images: they stay in memory."""
        # The first is the empty prompt, which guidance moves away from.
        self.ids = self.tokens(["", *prompts]).to(self.ids.device)
        self.embeddings = None
        if len(prompts) <= _KEPT:
            self.embeddings = self._encode(self.ids)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Computes ahead what `use` of the same prompts needs; until then indices stand for what they did."""

    def release(self) -> None:
        """Gives up the text encoders' weights, where the conditions of all prompts are kept."""

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """The tokenizer's ids int64 [P, tokens] of `prompts`, cut or padded to its full length."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens["input_ids"]
        return ids

    def forward(self, indices: Tensor) -> Tensor | Conditions:
        """The embeddings [B, tokens, d] of the prompts `indices` [B]; -1 is the empty prompt."""
        if self.embeddings is not None:
            return self.embeddings[indices + 1]
        return self._encode(self.ids[indices + 1])

    def neutral(self, count: int, device: torch.device) -> Tensor | Conditions:
        """The embeddings [count, tokens, d] of the empty prompt, which guidance moves away from."""
        return self.forward(torch.full((count,), -1, device=device))

    def constants(self, captions: Sequence[str] | None) -> Iterable[Tensor]:
        """The tokens of the prompts, and of `captions`."""
        yield self.ids
        if captions:
            yield self.tokens(captions)

    def settings(self) -> Mapping[str, Any] | None:
        """The settings of the text encoder."""
        config = getattr(self.encoder, "config", None)
        return None if config is None else config.to_dict()

    @torch.no_grad()
    def _encode(self, ids: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(ids)[0]
        return encoded

    def train(self, mode: bool = True) -> Prompts:
        """The encoder stays in evaluation mode: its dropout would make a caption's embedding random."""
        return super().train(False)
