"""The memory of a private step of a family at its published size, computed: nothing is allocated.

    python -m benchmarks.family_memory [--names sdxl,flux] [--ranks 8] [--multiplicities 1,4]

Forward, backward and clip run on fake tensors, and the bytes that live at the same time are counted. That is
the base in bfloat16, gradient checkpointing, and arithmetic in bfloat16 (`--float32`: as on a CPU that lacks
it), with attention that keeps no matrix of scores. Optimiser, moving average and the noised sum are added: 44
bytes for each trained parameter. What a device's allocator and libraries take comes on top.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
import weakref
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import families
from benchmarks.families import NETWORKS, FamilyModel
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip

_STATE = 44
"""Bytes of a trained parameter beside itself: float64 of the sum, its copy and the noised one (24), its
gradient (4), two moments (8), the moving average (4) and its own copy while it is saved (4)."""


class Living(TorchDispatchMode):
    """Counts the bytes of the storages that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """What attention keeps that never has the matrix of scores: its inputs, its output and their norms."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query[..., :1]).expand(*query.shape[:-1], value.shape[-1]).contiguous()
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return found


def _without_memory(model: nn.Module) -> None:
    """Puts fake tensors of a CPU in the place of those of the meta device, which has no autocast."""
    for part in model.modules():
        for name, value in part.named_parameters(recurse=False):
            fake = torch.empty(value.shape, dtype=value.dtype)
            setattr(part, name, nn.Parameter(fake, requires_grad=value.requires_grad))
        for name, value in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(value.shape, dtype=value.dtype))


def peak_bytes(name: str, rank: int, k: int, microbatch: int, low: bool = True) -> tuple[int, int, int]:
    """Bytes of the model, bytes at the peak, and the number of trained parameters."""

    def clip_and_add(self: Any, samples: Any, losses: Tensor, weights: Any) -> None:
        torch.empty(1, self.num_parameters)  # the clipped sum of one microbatch

    channels, side = NETWORKS[name].latent
    model = FamilyModel(NETWORKS[name], rank, "meta")
    with (
        FakeTensorMode(),
        Living() as living,
        mock.patch.object(F, "scaled_dot_product_attention", _attend),
        mock.patch.object(ClippedGradientSum, "_clip_and_add", clip_and_add),
        mock.patch.object(families, "has_bfloat16", return_value=low),
    ):
        _without_memory(model)
        base = sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
        engine = ClippedGradientSum(model, Clip(k, 1.0))
        living.peak = living.now
        noise = torch.randn(microbatch * k, channels, side, side)
        times, labels = torch.zeros(microbatch * k), torch.zeros(microbatch * k, dtype=torch.int64)
        error = (model(noise, times, labels) - noise).square().flatten(1).mean(1)
        engine.add(error.view(microbatch, k).mean(1))
    return base, living.peak + _STATE * engine.num_parameters, engine.num_parameters


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Prints a line for each combination."""
    warnings.simplefilter("ignore")
    published = [name for name, network in NETWORKS.items() if network.published]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.family_memory")
    parser.add_argument("--names", default=",".join(published))
    parser.add_argument("--ranks", type=_numbers, default=[8])
    parser.add_argument("--multiplicities", type=_numbers, default=[1, 4])
    parser.add_argument("--microbatches", type=_numbers, default=[1])
    parser.add_argument("--float32", action="store_true")
    given = parser.parse_args()
    grid = itertools.product(given.names.split(","), given.ranks, given.multiplicities, given.microbatches)
    for name, rank, k, microbatch in grid:
        base, peak, trained = peak_bytes(name, rank, k, microbatch, low=not given.float32)
        print(
            f"{name:12} r{rank:<3} k{k:<2} M{microbatch:<3} {trained / 1e6:6.1f}e6 trained, model "
            f"{base / 2**30:6.1f} GiB, step {peak / 2**30:6.1f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
