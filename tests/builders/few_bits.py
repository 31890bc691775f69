"""The functions of bitsandbytes that the package uses, for machines where it is not installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_lora.models import pipelines, quantised

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The sixteen numbers of NormalFloat (Dettmers et al. 2023, appendix E)."""


@dataclass
class QuantState:
    absmax: Tensor
    shape: Any = None
    dtype: Any = None
    blocksize: int = 64
    quant_type: str = "nf4"


def int8_vectorwise_quant(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    scales = weight.abs().amax(1)
    return (weight * 127 / scales[:, None]).round().to(torch.int8), scales, None


def int8_vectorwise_dequant(codes: Tensor, scales: Tensor) -> Tensor:
    return codes * scales[:, None] * 7.874015718698502e-3


def quantize_4bit(weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, QuantState]:
    assert quant_type == "nf4"
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    table = torch.tensor(NF4)
    codes = torch.bucketize(blocks / absmax[:, None], (table[1:] + table[:-1]) / 2).flatten()[: len(flat)]
    codes = torch.nn.functional.pad(codes, (0, len(flat) % 2)).to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2])[:, None], QuantState(absmax)


def dequantize_4bit(codes: Tensor, state: QuantState) -> Tensor:
    count = state.shape.numel()
    table = torch.tensor(NF4, device=codes.device)
    pairs = torch.stack([codes[:, 0] >> 4, codes[:, 0] & 15], 1).flatten()[:count]
    scales = state.absmax.repeat_interleave(state.blocksize)[:count]
    return (table[pairs.long()] * scales).view(state.shape).to(state.dtype)


def installed() -> bool:
    """Whether bitsandbytes itself is there."""
    return importlib.util.find_spec("bitsandbytes") is not None


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts these functions in the place of a bitsandbytes that is not installed."""
    if not installed():
        import sys

        for module in (quantised, pipelines):
            monkeypatch.setattr(module, "functions", lambda precision: sys.modules[__name__])
