"""Frozen weights in 8 or 4 bits, by the functions of bitsandbytes.

The weight of a linear layer is kept as codes. It is made of them whenever the layer computes, and once more
in the backward. Activations are not quantised: LLM.int8() looks for outliers in the whole batch, and so one
example would change what is computed for another.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_lora.config.schema import QUANTISED
from dp_lora.errors import UserError

_BLOCK = 64
"""Weights that share a scale in nf4, as in QLoRA (Dettmers et al. 2023)."""


def functions(precision: str) -> Any:
    """The functions of bitsandbytes. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise UserError(
            f"model.base_precision={precision}: needs the package bitsandbytes ({error}); expected it "
            "installed (pip install -e '.[quantised]'), or bfloat16"
        ) from error


class QuantisedLinear(nn.Linear):
    """A frozen linear layer that keeps codes in place of its weight.

    Args:
        layer: whose weight [out, in] is quantised on the device where it is. The bias stays as it is.
        precision: int8 (a scale for each row) or nf4 (a scale for each 64 weights).
    """

    def __init__(self, layer: nn.Linear, precision: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.precision = layer.in_features, layer.out_features, precision
        known, weight = functions(precision), layer.weight.detach().float()
        if precision == "int8":
            codes, scales = known.int8_vectorwise_quant(weight)[:2]
        else:
            codes, state = known.quantize_4bit(weight, blocksize=_BLOCK, quant_type=precision)
            scales = state.absmax
        # Parameters, so that copies of a model share them.
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in] in float32, made anew of the codes each time."""
        known = functions(self.precision)
        if self.precision == "int8":
            dense: Tensor = known.int8_vectorwise_dequant(self.codes, self.scales)
            return dense
        state = known.QuantState(
            absmax=self.scales,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=torch.float32,
            blocksize=_BLOCK,
            quant_type=self.precision,
        )
        made: Tensor = known.dequantize_4bit(self.codes, state)
        return made

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class _Frozen(torch.autograd.Function):
    """x W' + b of a `QuantisedLinear`; the backward makes W again, so that it is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        ctx.layer = layer
        bias: Tensor | None = layer.bias
        return F.linear(x.to(dtype), layer.weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


def quantise(network: nn.Module, precision: str) -> None:
    """Puts a `QuantisedLinear` in the place of each linear layer of `network`, one after the other.

    Args:
        network: without adapters, changed in place. Convolutions, norms and embeddings stay as they are.
        precision: of `QUANTISED`.
    """
    assert precision in QUANTISED, precision
    functions(precision)
    for part in list(network.modules()):
        for name, layer in list(part.named_children()):
            if type(layer) is nn.Linear:
                setattr(part, name, QuantisedLinear(layer, precision))
