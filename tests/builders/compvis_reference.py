"""Latent diffusion as its publications define it, on tensors with their original names.

Written from the definitions of the blocks (Rombach et al. 2022; Dhariwal and Nichol 2021), as functions over
a dictionary of tensors, which on first use makes random ones under the names and in the shapes of the
original layout. It shares nothing with the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights:
    """Tensors by name; one that is asked for the first time is made."""

    def __init__(self, seed: int = 0) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors:
            value = torch.randn(shape, generator=self._generator)
            if len(shape) == 1:
                # Norms near one, biases near zero.
                value = 0.1 * value + (1.0 if name.endswith("weight") else 0.0)
            elif "embedding" not in name:
                value = value / math.sqrt(math.prod(shape[1:]))
            self.tensors[name] = value
        assert self.tensors[name].shape == shape, (name, shape)
        # Tensors are float32, as in a checkpoint; what is computed with them is float64.
        return self.tensors[name].double()


def conv(
    w: Weights, name: str, x: Tensor, out: int, size: int = 3, stride: int = 1, padding: int = 1
) -> Tensor:
    weight = w(f"{name}.weight", out, x.shape[1], size, size)
    return F.conv2d(x, weight, w(f"{name}.bias", out), stride, padding)


def one_by_one(w: Weights, name: str, x: Tensor, out: int) -> Tensor:
    return conv(w, name, x, out, size=1, padding=0)


def linear(w: Weights, name: str, x: Tensor, out: int, bias: bool = True) -> Tensor:
    return F.linear(x, w(f"{name}.weight", out, x.shape[-1]), w(f"{name}.bias", out) if bias else None)


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    channels = x.shape[1]
    return F.group_norm(x, 32, w(f"{name}.weight", channels), w(f"{name}.bias", channels), eps)


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    width = x.shape[-1]
    return F.layer_norm(x, (width,), w(f"{name}.weight", width), w(f"{name}.bias", width))


# The UNet


@dataclass(frozen=True)
class UNet:
    channels: int
    multipliers: Sequence[int]
    attention: Sequence[bool]
    res_blocks: int
    heads: int = -1
    head_channels: int = -1
    context: int | None = None
    """Width of the condition's tokens: spatial transformers; None: attention blocks."""
    scale_shift: bool = False
    resblock_updown: bool = False
    prefix: str = "model.diffusion_model."

    def heads_of(self, channels: int) -> int:
        return self.heads if self.head_channels == -1 else channels // self.head_channels

    def __call__(self, w: Weights, x: Tensor, timesteps: Tensor, context: Tensor | None) -> Tensor:
        p, out_channels = self.prefix, x.shape[1]
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angles = timesteps[:, None].float() * frequencies
        # In float32 in the original too: at 1,000 radians the angle itself is rounded by 5e-5.
        emb = torch.cat([angles.cos(), angles.sin()], dim=-1).double()
        emb = F.silu(linear(w, f"{p}time_embed.0", emb, 4 * self.channels))
        emb = linear(w, f"{p}time_embed.2", emb, 4 * self.channels)
        h = conv(w, f"{p}input_blocks.0.0", x, self.channels)
        skips, number = [h], 1
        for level, multiplier in enumerate(self.multipliers):
            width = multiplier * self.channels
            for _ in range(self.res_blocks):
                h = self.res_block(w, f"{p}input_blocks.{number}.0", h, emb, width)
                if self.attention[level]:
                    h = self.attend(w, f"{p}input_blocks.{number}.1", h, context)
                skips.append(h)
                number += 1
            if level + 1 < len(self.multipliers):
                if self.resblock_updown:
                    h = self.res_block(w, f"{p}input_blocks.{number}.0", h, emb, width, "down")
                else:
                    h = conv(w, f"{p}input_blocks.{number}.0.op", h, width, stride=2)
                skips.append(h)
                number += 1
        h = self.res_block(w, f"{p}middle_block.0", h, emb, h.shape[1])
        h = self.attend(w, f"{p}middle_block.1", h, context)
        h = self.res_block(w, f"{p}middle_block.2", h, emb, h.shape[1])
        number = 0
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            width = multiplier * self.channels
            for i in range(self.res_blocks + 1):
                h = torch.cat([h, skips.pop()], dim=1)
                h = self.res_block(w, f"{p}output_blocks.{number}.0", h, emb, width)
                place = 1
                if self.attention[level]:
                    h = self.attend(w, f"{p}output_blocks.{number}.1", h, context)
                    place = 2
                if level > 0 and i == self.res_blocks:
                    name = f"{p}output_blocks.{number}.{place}"
                    if self.resblock_updown:
                        h = self.res_block(w, name, h, emb, width, "up")
                    else:
                        h = conv(w, f"{name}.conv", twice(h), width)
                number += 1
        return conv(w, f"{p}out.2", F.silu(norm(w, f"{p}out.0", h, 1e-5)), out_channels)

    def res_block(
        self, w: Weights, name: str, x: Tensor, emb: Tensor, out: int, resample: str | None = None
    ) -> Tensor:
        h = F.silu(norm(w, f"{name}.in_layers.0", x, 1e-5))
        if resample is not None:
            change = twice if resample == "up" else halved
            h, x = change(h), change(x)
        h = conv(w, f"{name}.in_layers.2", h, out)
        e = linear(w, f"{name}.emb_layers.1", F.silu(emb), 2 * out if self.scale_shift else out)[
            :, :, None, None
        ]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(w, f"{name}.out_layers.0", h, 1e-5) * (1 + scale) + shift
        else:
            h = norm(w, f"{name}.out_layers.0", h + e, 1e-5)
        h = conv(w, f"{name}.out_layers.3", F.silu(h), out)
        return h + (x if x.shape[1] == out else one_by_one(w, f"{name}.skip_connection", x, out))

    def attend(self, w: Weights, name: str, x: Tensor, context: Tensor | None) -> Tensor:
        if self.context is None:
            return self.attention_block(w, name, x)
        return self.spatial_transformer(w, name, x, context)

    def attention_block(self, w: Weights, name: str, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        flat = x.reshape(b, c, -1)
        h = norm(w, f"{name}.norm", flat, 1e-5)
        qkv = F.conv1d(h, w(f"{name}.qkv.weight", 3 * c, c, 1), w(f"{name}.qkv.bias", 3 * c))
        # Heads lie one after the other, each with its own q, k and v.
        q, k, v = qkv.reshape(b * self.heads_of(c), -1, flat.shape[2]).chunk(3, dim=1)
        weight = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1])
        h = torch.einsum("bts,bcs->bct", weight.softmax(-1), v).reshape(b, c, -1)
        h = F.conv1d(h, w(f"{name}.proj_out.weight", c, c, 1), w(f"{name}.proj_out.bias", c))
        return (flat + h).reshape(b, c, *size)

    def spatial_transformer(self, w: Weights, name: str, x: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        b, c, height, width = x.shape
        h = one_by_one(w, f"{name}.proj_in", norm(w, f"{name}.norm", x, 1e-6), c)
        h = h.permute(0, 2, 3, 1).reshape(b, height * width, c)
        block = f"{name}.transformer_blocks.0"
        normed = layer_norm(w, f"{block}.norm1", h)
        h = h + self.cross_attention(w, f"{block}.attn1", normed, normed)
        h = h + self.cross_attention(w, f"{block}.attn2", layer_norm(w, f"{block}.norm2", h), context)
        value, gate = linear(w, f"{block}.ff.net.0.proj", layer_norm(w, f"{block}.norm3", h), 8 * c).chunk(
            2, -1
        )
        h = h + linear(w, f"{block}.ff.net.2", value * F.gelu(gate), c)
        h = h.reshape(b, height, width, c).permute(0, 3, 1, 2)
        return x + one_by_one(w, f"{name}.proj_out", h, c)

    def cross_attention(self, w: Weights, name: str, x: Tensor, context: Tensor) -> Tensor:
        b, _, c = x.shape
        heads = self.heads_of(c)

        def apart(t: Tensor) -> Tensor:
            return t.reshape(b, -1, heads, c // heads).transpose(1, 2)

        q = apart(linear(w, f"{name}.to_q", x, c, bias=False))
        k = apart(linear(w, f"{name}.to_k", context, c, bias=False))
        v = apart(linear(w, f"{name}.to_v", context, c, bias=False))
        weight = (q @ k.transpose(2, 3) / math.sqrt(c // heads)).softmax(-1)
        return linear(w, f"{name}.to_out.0", (weight @ v).transpose(1, 2).reshape(b, -1, c), c)


def twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


# The autoencoder


@dataclass(frozen=True)
class Autoencoder:
    channels: int
    multipliers: Sequence[int]
    attention: Sequence[bool]
    """Of each level, from the full resolution down."""
    res_blocks: int
    latent: int
    codes: int | None = None
    """None: a Gaussian posterior."""
    prefix: str = "first_stage_model."

    def encode(self, w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        p = f"{self.prefix}encoder."
        h = conv(w, f"{p}conv_in", x, self.channels)
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.res_blocks):
                h = self.res_block(w, f"{p}down.{level}.block.{i}", h, multiplier * self.channels)
                if self.attention[level]:
                    h = self.attend(w, f"{p}down.{level}.attn.{i}", h)
            if level + 1 < len(self.multipliers):
                # One row and one column of zeros, behind the last.
                h = F.pad(h, (0, 1, 0, 1))
                h = conv(w, f"{p}down.{level}.downsample.conv", h, h.shape[1], stride=2, padding=0)
        h = self.middle(w, f"{p}mid", h)
        doubled = self.latent if self.codes else 2 * self.latent
        h = conv(w, f"{p}conv_out", F.silu(norm(w, f"{p}norm_out", h, 1e-6)), doubled)
        h = one_by_one(w, f"{self.prefix}quant_conv", h, doubled)
        if self.codes:
            return h, torch.zeros_like(h)
        mean, log_variance = h.chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))

    def decode(self, w: Weights, z: Tensor) -> Tensor:
        p, width = f"{self.prefix}decoder.", self.channels * self.multipliers[-1]
        if self.codes:
            table = w(f"{self.prefix}quantize.embedding.weight", self.codes, self.latent)
            distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, self.latent), table)
            nearest = table[distances.argmin(1)]
            z = nearest.reshape(len(z), *z.shape[2:], self.latent).permute(0, 3, 1, 2)
        h = conv(w, f"{p}conv_in", one_by_one(w, f"{self.prefix}post_quant_conv", z, self.latent), width)
        h = self.middle(w, f"{p}mid", h)
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for i in range(self.res_blocks + 1):
                h = self.res_block(w, f"{p}up.{level}.block.{i}", h, multiplier * self.channels)
                if self.attention[level]:
                    h = self.attend(w, f"{p}up.{level}.attn.{i}", h)
            if level > 0:
                h = conv(w, f"{p}up.{level}.upsample.conv", twice(h), h.shape[1])
        return conv(w, f"{p}conv_out", F.silu(norm(w, f"{p}norm_out", h, 1e-6)), 3)

    def middle(self, w: Weights, name: str, h: Tensor) -> Tensor:
        h = self.res_block(w, f"{name}.block_1", h, h.shape[1])
        h = self.attend(w, f"{name}.attn_1", h)
        return self.res_block(w, f"{name}.block_2", h, h.shape[1])

    def res_block(self, w: Weights, name: str, x: Tensor, out: int) -> Tensor:
        h = conv(w, f"{name}.conv1", F.silu(norm(w, f"{name}.norm1", x, 1e-6)), out)
        h = conv(w, f"{name}.conv2", F.silu(norm(w, f"{name}.norm2", h, 1e-6)), out)
        return h + (x if x.shape[1] == out else one_by_one(w, f"{name}.nin_shortcut", x, out))

    def attend(self, w: Weights, name: str, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = norm(w, f"{name}.norm", x, 1e-6)
        q, k, v = (one_by_one(w, f"{name}.{part}", h, c).reshape(b, c, -1) for part in "qkv")
        weight = (q.transpose(1, 2) @ k / math.sqrt(c)).softmax(-1)
        h = (v @ weight.transpose(1, 2)).reshape(b, c, height, width)
        return x + one_by_one(w, f"{name}.proj_out", h, c)
