"""A pipeline of `families` as part of a model: its conditions, its network's call, its drawing."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_lora.config.schema import PROMPT, SamplerConfig
from dp_lora.models.families import Conditions, Family, Inputs, packed
from dp_lora.models.networks import has_bfloat16
from dp_lora.models.prompts import Prompts


@dataclass(frozen=True)
class TextToImage:
    """A pipeline of a family.

    Args:
        family: its record.
        side: of the images, in pixels.
        factor: by which the autoencoder divides it.
        pipe: the pipeline of diffusers with the model's own network and autoencoder; None without weights.
        low: whether the frozen weights of network and text encoders are in bfloat16.
    """

    family: Family
    side: int
    factor: int
    pipe: Any
    low: bool = False

    def computes_low(self, device: torch.device) -> bool:
        """Whether the network computes in bfloat16 too: where its weights are, on a device that has it."""
        return self.low and has_bfloat16(device)

    def _autocast(self, device: torch.device, low: bool) -> AbstractContextManager[Any]:
        """Autocast to bfloat16 where that is `low`; one that is on stays on."""
        return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()

    def latent_shape(self, network: Any) -> tuple[int, int, int]:
        """(c, h, w) of the latents of one image."""
        size = self.side // self.factor
        return int(network.config["in_channels"]) // self.family.packing**2, size, size

    def predict(
        self, network: Any, noisy: Tensor, times: Tensor, conditions: Conditions, scale: int
    ) -> Tensor:
        """What the network predicts, see `families.Inputs`."""
        with self._autocast(noisy.device, self.computes_low(noisy.device)):
            predicted = self.family.predict(network, Inputs(noisy, times, conditions, scale, self.side))
        return predicted.float() if self.low else predicted

    @torch.inference_mode()
    def draw(
        self,
        noise: Tensor,
        conditions: Conditions,
        neutral: Conditions,
        sampler: SamplerConfig,
        seeds: Sequence[int],
    ) -> Tensor:
        """Images [B, C, H, W] in [-1, 1], by the pipeline's own call with its own scheduler.

        Args:
            noise: standard normal [B, c, h, w].
            conditions, neutral: of the images, and those that guidance moves away from.
            sampler: the number of steps and the guidance.
            seeds: [B], of the noise of a scheduler that adds some.
        """
        self.pipe.set_progress_bar_config(disable=True)
        network = getattr(self.pipe, self.family.component)
        given = {
            **self.family.drawing(network, conditions, neutral, sampler.guidance),
            "num_inference_steps": sampler.steps,
            "height": self.side,
            "width": self.side,
            "latents": packed(noise) if self.family.packing == 2 else noise,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "pt",
        }
        known = inspect.signature(self.pipe.__call__).parameters
        if "negative_prompt" in known:
            given["negative_prompt"] = None
        # The pipeline's own code gives network and autoencoder numbers of one precision.
        with silent(), self._autocast(noise.device, self.low):
            images: Tensor = self.pipe(**given).images
        return images.float().clamp(0, 1) * 2 - 1


def seeds(seed: int, first: int, count: int) -> list[int]:
    """A seed for each image, so that batches do not change images."""
    return [int(np.random.Philox(key=[seed, first + i]).random_raw()) & ((1 << 63) - 1) for i in range(count)]


@contextmanager
def silent() -> Iterator[None]:
    """While this holds, diffusers and transformers log errors alone.

    Their warnings of a prompt that is cut show its words, and captions are private.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = of_diffusers.get_verbosity(), of_transformers.get_verbosity()
    of_diffusers.set_verbosity_error()
    of_transformers.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        of_diffusers.set_verbosity(before[0])
        of_transformers.set_verbosity(before[1])


class PipelinePrompts(Prompts):
    """The conditions of prompts, as `encode_prompt` of a pipeline makes them.

    Each prompt is encoded by itself and padded to one length, so no prompt tells anything about another.

    Args:
        family: of the pipeline.
        pipe: None on the meta device, where nothing is encoded.
        template: the prompt of a class, with {} for its name.
        length: tokens of a prompt; None: the family's.

    Attributes:
        kept_bytes: up to which the conditions of all prompts are computed once and kept. Beyond it they are
            computed whenever they are asked for.
    """

    kept_bytes = 8 << 30

    def __init__(self, family: Family, pipe: Any, template: str = PROMPT, length: int | None = None) -> None:
        self.family, self.pipe, self.length = family, pipe, length or family.length
        self.texts: list[str] = []
        self._prepared: tuple[list[str], Conditions | None] | None = None
        self._released: tuple[list[str], Conditions] | None = None
        """Once the encoders are gone: the prompts known before, which a training comes back to."""
        self._conditions: Conditions | None = None
        self._neutral: Conditions | None = None
        found = {} if pipe is None else pipe.components
        encoders = {name: part for name, part in found.items() if name.startswith("text_encoder")}
        parts = nn.ModuleDict({name: part for name, part in encoders.items() if part is not None})
        super().__init__(parts, None, template)

    def use(self, prompts: Sequence[str]) -> None:
        ready, self._prepared = (self._prepared, self._released), None
        self.texts, self._neutral = list(prompts), None
        found = [known[1] for known in ready if known is not None and known[0] == self.texts]
        self._conditions = found[0] if found else self._kept(prompts)

    def prepare(self, prompts: Sequence[str]) -> None:
        self._prepared = (list(prompts), self._kept(prompts))

    def release(self) -> None:
        if self._conditions is None or (self._prepared is not None and self._prepared[1] is None):
            return
        self.encoder.to("meta")
        self._released = (self.texts, self._conditions)

    def _kept(self, prompts: Sequence[str]) -> Conditions | None:
        """The conditions of all `prompts`; None where there are none, too many, or no encoders any more."""
        if self.pipe is None or self._released is not None or not prompts:
            return None
        first = self._encoded(prompts[0])
        if len(prompts) * sum(value.nbytes for value in first.values()) > self.kept_bytes:
            return None
        return _joined([first, *(self._encoded(text) for text in prompts[1:])])

    def forward(self, indices: Tensor) -> Conditions:
        """The conditions of the prompts `indices` [B]."""
        if self._conditions is not None:
            chosen = indices.cpu()
            return {name: value[chosen].to(indices.device) for name, value in self._conditions.items()}
        found = _joined([self._encoded(self.texts[i]) for i in indices.tolist()])
        return {name: value.to(indices.device) for name, value in found.items()}

    def neutral(self, count: int, device: torch.device) -> Conditions:
        """The conditions [count, ...] that guidance moves away from."""
        if self._neutral is None:
            self._neutral = self._encoded("", neutral=True)
        return {
            name: value.to(device).expand(count, *value.shape[1:]) for name, value in self._neutral.items()
        }

    @torch.no_grad()
    def _encoded(self, text: str, neutral: bool = False) -> Conditions:
        """The conditions [1, ...] of a prompt, or those that the pipeline has for none."""
        assert self._released is None, "a prompt after the text encoders were released"
        negative = neutral and self.family.neutral == "negative"
        known = inspect.signature(self.pipe.encode_prompt).parameters
        options = {
            "prompt": [text],
            "prompt_2": None,
            "prompt_3": None,
            "device": next(self.encoder.parameters()).device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": negative,
            "max_sequence_length": self.length,
        }
        with silent():
            found = self.pipe.encode_prompt(**{name: v for name, v in options.items() if name in known})
        named = dict(zip(self.family.returns, found, strict=True))
        if self.family.pads:
            named = _padded(named, self.length or 0)
        kept = {name: named[f"negative_{name}" if negative else name] for name in self.family.conditions}
        # Kept in the machine's memory: those of many captions would fill a GPU's.
        return {
            name: (value.float() if value.is_floating_point() else value).cpu()
            for name, value in kept.items()
        }

    def constants(self, captions: Sequence[str] | None) -> Iterable[Tensor]:
        """What decides the conditions beside the captions and the encoders' weights."""
        texts = [*self.texts, *(captions or ())]
        names = [name for name in self.pipe.components if name.startswith("tokenizer")]
        for tokenizer in (getattr(self.pipe, name) for name in names):
            if tokenizer is not None:
                # A processor has its tokenizer inside.
                tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
                with silent():
                    ids = tokenizer(texts)["input_ids"] if texts else []
                yield torch.tensor([len(row) for row in ids])
                yield torch.tensor([word for row in ids for word in row])
        yield torch.tensor(self.length or 0)

    def _encoders(self) -> dict[str, Any]:
        return dict(self.encoder.named_children())

    def settings(self) -> Mapping[str, Any]:
        return {
            name: json.dumps(part.config.to_dict(), default=str) for name, part in self._encoders().items()
        }


def _padded(named: Mapping[str, Any], length: int) -> dict[str, Tensor]:
    """The text [1, length, d] and its mask [1, length] of one prompt, whose mask may be None for all ones."""
    (text_name, text), (mask_name, mask) = named.items()
    mask = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device) if mask is None else mask
    rest = length - text.shape[1]
    return {text_name: F.pad(text, (0, 0, 0, rest)), mask_name: F.pad(mask, (0, rest))}


def _joined(parts: Sequence[Conditions]) -> Conditions:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def sides(network: Any, autoencoder: Any, family: Family, asked: int | None) -> tuple[int, int]:
    """The side of the images in pixels, as asked for or as published, and the autoencoder's factor.

    Raises ValueError with the number that the side has to be a multiple of.
    """
    config = autoencoder.config
    names = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
    blocks = next(config[name] for name in names if config.get(name))
    factor = 2 ** (len(blocks) - 1) * (config.get("patch_size") or (1, 1))[0]
    published = network.config.get("sample_size") or family.sample_size
    side = int(published or 0) * factor if asked is None else asked
    multiple = factor * math.lcm(family.patch, family.packing)
    if side % multiple:
        raise ValueError(multiple)
    return side, factor
