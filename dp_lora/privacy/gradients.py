"""Per-example gradients, clipped and summed, as fast as a gradient without privacy.

The module's forward runs on M k rows, example-major: row i k + j is draw j of example i. While the
backward runs, every trainable layer hands over g_i, the gradient of example i, already summed over its
k draws and its tokens. The clip therefore comes after the mean over the draws, and one example
contributes one gradient of norm at most C, whatever k is.

A LoRA layer is one autograd function together with its frozen base: x W' + b + s (x A') B'. Any other
trainable layer is its own forward with detached parameters, followed by a tap that sees the gradient of
its output. Autograd itself never computes the gradient of a parameter: one that appears betrays a use
of the parameter outside its layer, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from dp_lora.errors import UserError
from dp_lora.privacy.plan import CLIPPINGS

AUTOMATIC_GAMMA = 0.01
"""The stability constant of automatic clipping (Bu et al. 2022)."""

# Norms are taken in float32: this much of C is given up so that no rounding lets a contribution pass C.
_ROUNDING = 1 + 1e-5

# A LoRA is merged into its base for inputs of so many times out x in / (out + in) rows: measured, flat
# between 2 and 8.
_MERGE = 4

# Pairs of a parameter and its per-example gradients [M, ...], summed over draws and tokens.
Samples = Iterator[tuple[Tensor, Tensor]]
# (layer, input, gradient of the output, k) -> the per-example gradients of the layer's parameters.
Sampler = Callable[[Any, Tensor, Tensor, int], Samples]


class ClippedGradientSum:
    """The sum of clipped per-example gradients of the trainable parameters of `module`.

    Guarantees, for the neighbouring relation "add or remove one image":
        * One example changes `total()` by at most `max_grad_norm` in Euclidean norm over all parameters
          together, for every noise multiplicity, microbatch and precision, with each `clipping`:
            flat       g min(1, C / |g|): sensitivity C.
            automatic  g C / (|g| + 0.01), Bu et al. 2022: sensitivity C; every example has a say near C.
            per_layer  each of the L layers clipped to C / sqrt(L): sensitivity sqrt(L (C / sqrt(L))^2) = C.
        * An example of weight 0 (padding), or whose gradient is not finite, contributes exactly 0.
        * Nothing that is computed decides a branch; `nonfinite` is private and must not be logged.

    Args:
        module: its LoRA layers are peft's; each trainable parameter belongs to a LoRA layer or to a
            Linear, Conv1d, Conv2d, Embedding, GroupNorm, LayerNorm or RMSNorm, once or several times in
            a forward. Train or eval mode does not matter here. Anything else is refused.
        noise_multiplicity: k, the number of consecutive rows that belong to one example.
        max_grad_norm: C; inf sums without clipping.
        clipping: one of the three above.

    Raises:
        UserError: a layer mixes the examples of a batch, or has no per-example gradient.
    """

    def __init__(
        self, module: nn.Module, noise_multiplicity: int, max_grad_norm: float, clipping: str = "flat"
    ) -> None:
        if clipping not in CLIPPINGS:
            raise UserError(f"privacy.clipping={clipping!r}: expected one of {', '.join(CLIPPINGS)}")
        self.noise_multiplicity = noise_multiplicity
        self.max_grad_norm = max_grad_norm
        self.clipping = clipping
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UserError("trainable.components: no parameter of the model is trainable")
        _refuse_low_precision(self.parameters)
        _refuse_mixing(module)
        sizes = [p.numel() for p in self.parameters.values()]
        self.num_parameters = sum(sizes)
        self._ends = torch.tensor(sizes).cumsum(0).tolist()
        self._index = {id(p): i for i, p in enumerate(self.parameters.values())}
        self._module = module
        self._buffers = _versions(module)
        # Per-example gradients of each parameter and their norms [M], while a backward runs.
        self._samples: list[_Dense | _RankOne | None] | None = None
        self._norms: list[Tensor] = []
        self._examples = 0
        first = next(iter(self.parameters.values()))
        self._total = torch.zeros(self.num_parameters, dtype=torch.float64, device=first.device)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=first.device)
        self._patched: list[nn.Module] = []
        # The layer that each parameter is clipped with when `clipping` is per_layer.
        self._layer_of: list[int] = [-1] * len(self.parameters)
        try:
            self._attach(module)
        except UserError:
            self.detach()
            raise

    # The sum

    def add(self, losses: Tensor, weights: Tensor | None = None) -> None:
        """Runs the backward of one microbatch and adds its clipped per-example gradients.

        Args:
            losses: [M], one value for each example: the mean over its k draws.
            weights: [M], 0 for padding and 1 for an example; default all 1.

        Raises:
            UserError: losses are not [M]; a layer saw another number of rows than M k; a parameter got
                no per-example gradient or was used outside its layer; a buffer of the module changed.
        """
        if losses.ndim != 1 or (weights is not None and weights.shape != losses.shape):
            wanted = "[M], one value for each example" if weights is None else f"{list(weights.shape)}"
            raise UserError(f"losses of shape {list(losses.shape)}: expected {wanted}")
        if not losses.requires_grad:
            raise UserError("losses: they do not depend on any trainable parameter")
        if self._buffers != _versions(self._module):
            raise UserError(f"{_changed_buffer(self._module, self._buffers)}: {_MIXES}")
        if not len(losses):
            return
        self._clip_and_add(self._backward(losses, weights), weights)

    def total(self) -> Tensor:
        """The sum since the last `reset`, float64 [P], in the order of `parameters`."""
        return self._total.clone()

    def reset(self) -> None:
        """Empties the sum: what every batch begins with."""
        self._total.zero_()
        self._nonfinite.zero_()

    @property
    def nonfinite(self) -> int:
        """How many examples since the last `reset` had a gradient that is not finite. Private."""
        return int(self._nonfinite)

    def write_gradients(self, flat: Tensor) -> None:
        """Puts `flat` [P] into the `.grad` of each parameter, in the order of `parameters`."""
        if flat.shape != (self.num_parameters,):
            raise ValueError(f"a gradient of shape {list(flat.shape)}: expected [{self.num_parameters}]")
        for parameter, part in zip(self.parameters.values(), self._split(flat), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def detach(self) -> None:
        """Gives every layer its own forward back."""
        for layer in self._patched:
            del layer.forward
        self._patched.clear()

    # Layers

    def _attach(self, module: nn.Module) -> None:
        inside_fused: set[int] = set()
        for number, (name, layer) in enumerate(module.named_modules()):
            own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
            if _is_adapter(layer):
                _refuse_unsupported_adapter(name, layer)
                if _fusable(layer):
                    self._patch(layer, name, _fused_forward(self, name, layer))
                    inside_fused |= {id(part) for part in layer.modules()}
                self._set_layer(list(layer.parameters()), number)
            elif own and id(layer) not in inside_fused:
                self._patch(layer, name, _tapped_forward(self, name, layer, _sampler(name, layer)))
                self._set_layer(own, number)

    def _patch(self, layer: nn.Module, name: str, forward: Callable[..., Tensor]) -> None:
        if "forward" in vars(layer):
            raise RuntimeError(f"{name}: its forward is already replaced; detach the other engine first")
        layer.forward = forward
        self._patched.append(layer)

    def _set_layer(self, parameters: list[nn.Parameter], number: int) -> None:
        for parameter in parameters:
            index = self._index.get(id(parameter))
            if index is not None and self._layer_of[index] < 0:
                self._layer_of[index] = number

    def check_rows(self, name: str, rows: int) -> None:
        """UserError unless a layer that saw `rows` rows saw M k."""
        if self._samples is None:
            raise RuntimeError("a backward outside ClippedGradientSum.add: detach() the engine first")
        if rows != self._examples * self.noise_multiplicity:
            raise UserError(
                f"{name}: it saw {rows} rows for {self._examples} losses: expected {self._examples} examples "
                f"x {self.noise_multiplicity} draws, so that no row is shared between examples"
            )

    def put(self, parameter: Tensor, sample: Tensor) -> None:
        """Adds per-example gradients [M, ...] of `parameter` from one use of its layer."""
        self._put(parameter, _Dense(sample.reshape(self._examples, -1).to(parameter.dtype)))

    def put_products(self, parameter: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds the gradients sum_t left_t (x) right_t of each example, over its draws and tokens.

        Args:
            parameter: a matrix [a, b].
            left: [M t, a].
            right: [M t, b].
        """
        left, right = (
            left.view(self._examples, -1, left.shape[-1]),
            right.view(self._examples, -1, right.shape[-1]),
        )
        if left.shape[1] == 1:
            self._put(parameter, _RankOne(left[:, 0].to(parameter.dtype), right[:, 0].to(parameter.dtype)))
        else:
            self.put(parameter, torch.bmm(left.transpose(1, 2), right))

    def _put(self, parameter: Tensor, sample: _Dense | _RankOne) -> None:
        assert self._samples is not None
        index = self._index[id(parameter)]
        before = self._samples[index]
        if before is not None:
            sample = _Dense(before.dense() + sample.dense())
        self._samples[index] = sample
        # Here, while the gradients are still in the processor's cache.
        self._norms[index] = sample.norms()

    # One microbatch

    def _backward(self, losses: Tensor, weights: Tensor | None) -> list[_Dense | _RankOne]:
        for parameter in self.parameters.values():
            parameter.grad = None
        self._examples = len(losses)
        self._samples = [None] * len(self.parameters)
        self._norms = [losses.new_empty(0)] * len(self.parameters)
        if weights is not None:
            losses = torch.where(weights > 0, losses, torch.zeros_like(losses))
        try:
            # Per-example gradients keep the precision of what they are made of.
            with torch.autocast(losses.device.type, enabled=False):
                losses.sum().backward()
            samples = self._samples
        finally:
            self._samples = None
        for (name, parameter), sample in zip(self.parameters.items(), samples, strict=True):
            if parameter.grad is not None:
                parameter.grad = None
                raise UserError(f"{name}: used outside the forward of its layer, where it cannot be clipped")
            if sample is None:
                raise UserError(f"{name}: trainable, but it got no per-example gradient from the loss")
        return [sample for sample in samples if sample is not None]

    @torch.no_grad()
    def _clip_and_add(self, samples: list[_Dense | _RankOne], weights: Tensor | None) -> None:
        norms = torch.stack(self._norms).double()
        finite = norms.sum(0).isfinite()
        asked = torch.ones_like(finite) if weights is None else weights > 0
        self._nonfinite += (asked & ~finite).sum()
        factors = self._factors(norms.masked_fill(~finite, 0.0)) * (asked & finite)
        factors = factors.to(self._norms[0].dtype)
        # 0 * nan is nan: the rows themselves have to go.
        spoilt = (~finite).nonzero().squeeze(1)
        partial = factors.new_empty(self.num_parameters)
        for sample, factor, part in zip(samples, factors, self._split(partial), strict=True):
            sample.weighted_sum(factor, spoilt, out=part)
        self._total += partial

    def _factors(self, norms: Tensor) -> Tensor:
        """What each parameter's gradients [parameters, M] are multiplied with, from their norms."""
        bound: float = self.max_grad_norm
        norms = norms * _ROUNDING
        if self.clipping == "per_layer":
            numbers = sorted(set(self._layer_of))
            layers = torch.tensor([numbers.index(n) for n in self._layer_of], device=norms.device)
            squares = norms.new_zeros(len(numbers), norms.shape[1]).index_add_(0, layers, norms.square())
            bound = bound / math.sqrt(len(numbers))
            return torch.clamp(bound / squares.sqrt(), max=1.0)[layers]
        whole: Tensor = torch.linalg.vector_norm(norms, dim=0)
        if self.clipping == "automatic" and math.isfinite(bound):
            return (bound / (whole + AUTOMATIC_GAMMA)).expand_as(norms)
        return torch.clamp(bound / whole, max=1.0).expand_as(norms)

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [flat[a:b] for a, b in zip([0, *self._ends[:-1]], self._ends, strict=True)]


# The gradients of one parameter, for each example


class _Dense:
    """[M, size]."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def dense(self) -> Tensor:
        return self._value

    def norms(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self._value, dim=1)
        return norms

    def weighted_sum(self, factors: Tensor, spoilt: Tensor, out: Tensor) -> None:
        """Writes the sum over examples of factor x gradient, without the rows `spoilt`."""
        torch.mv(self._value.index_fill_(0, spoilt, 0.0).t(), factors, out=out)


class _RankOne:
    """left (x) right of [M, a] and [M, b]: the gradients of a matrix that saw one token of one draw."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right

    def dense(self) -> Tensor:
        return torch.einsum("ma,mb->mab", self._left, self._right).flatten(1)

    def norms(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self._left, dim=1)
        return norms.mul(torch.linalg.vector_norm(self._right, dim=1))

    def weighted_sum(self, factors: Tensor, spoilt: Tensor, out: Tensor) -> None:
        """Writes the sum over examples of factor x gradient, without the rows `spoilt`."""
        left = (self._left * factors[:, None]).index_fill_(0, spoilt, 0.0)
        right = self._right.index_fill(0, spoilt, 0.0)
        torch.mm(left.t(), right, out=out.view(left.shape[1], -1))


# LoRA


class _LoraLinear(torch.autograd.Function):
    """x W' + b + s (x A') B' of a frozen W and b, whose backward hands over per-example A and B.

    With many rows and full precision the adapter is first merged, x (W + s B A)' + b: two thin products
    fewer, and x A' is left to the backward. In bfloat16 a merged weight would round the adapter away.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: nn.Parameter,
        up: nn.Parameter,
        scale: float,
        engine: ClippedGradientSum,
        name: str,
    ) -> Tensor:
        dtype = down.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        weight, a, b = weight.to(dtype), down.to(dtype), up.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        merge = dtype.itemsize >= 4 and len(flat) * sum(weight.shape) > _MERGE * weight.numel()
        if merge:
            out = F.linear(flat, torch.addmm(weight, b, a, alpha=scale), bias)
        else:
            out = F.linear(flat, weight, bias)
            out.addmm_(flat @ a.t(), b.t(), alpha=scale)
        ctx.save_for_backward(flat, weight, a, b)
        ctx.down, ctx.up, ctx.scale, ctx.engine, ctx.name = down, up, scale, engine, name
        ctx.shape, ctx.merge = x.shape, merge
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        flat, weight, a, b = ctx.saved_tensors
        ctx.engine.check_rows(ctx.name, ctx.shape[0])
        grad = grad.to(a.dtype).reshape(-1, grad.shape[-1])
        grad_hidden = grad @ b
        if ctx.scale != 1:
            grad_hidden *= ctx.scale
        if ctx.down.requires_grad:
            ctx.engine.put_products(ctx.down, grad_hidden, flat)
        if ctx.up.requires_grad:
            hidden = flat @ a.t()
            ctx.engine.put_products(ctx.up, grad, hidden if ctx.scale == 1 else hidden * ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0] and ctx.merge:
            grad_x = (grad @ torch.addmm(weight, b, a, alpha=ctx.scale)).view(ctx.shape)
        elif ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_hidden, a).view(ctx.shape)
        return grad_x, None, None, None, None, None, None, None


def _is_adapter(layer: nn.Module) -> bool:
    return isinstance(layer, lora.LoraLayer)


def _fusable(layer: Any) -> bool:
    """Whether `layer` is a plain LoRA on a frozen nn.Linear of the same precision."""
    base = layer.get_base_layer()
    if type(layer) is not lora.Linear or type(base) is not nn.Linear or base.weight.requires_grad:
        return False
    if base.bias is not None and base.bias.requires_grad:
        return False
    up = layer.lora_B[layer.active_adapters[0]]
    return up.bias is None and up.weight.dtype == base.weight.dtype


def _fused_forward(engine: ClippedGradientSum, name: str, layer: Any) -> Callable[..., Tensor]:
    adapter = layer.active_adapters[0]
    base = layer.get_base_layer()
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dropout, original = layer.lora_dropout[adapter], layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = isinstance(dropout, nn.Identity) or not dropout.training
        if layer.disable_adapters or layer.merged or args or kwargs or not plain:
            out: Tensor = original(x, *args, **kwargs)
            return out
        scale = layer.scaling[adapter]
        fused: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, down, up, scale, engine, name
        )
        return fused

    return forward


def _refuse_unsupported_adapter(name: str, layer: Any) -> None:
    if getattr(layer, "lora_variant", None) or any(layer.use_dora.values()):
        raise UserError(
            f"{name}: DoRA and other LoRA variants have no per-example gradient here: expected LoRA"
        )
    if type(layer) not in (lora.Linear, lora.Conv2d, lora.Conv1d):
        raise UserError(
            f"{name}: LoRA on {type(layer.get_base_layer()).__name__} is not supported: "
            "expected Linear, Conv1d or Conv2d"
        )
    if len(layer.active_adapters) != 1 or layer.merged:
        raise UserError(f"{name}: expected one active, unmerged adapter, found {layer.active_adapters}")


# Other layers


class _Tap(torch.autograd.Function):
    """`out` itself; its backward shows the gradient of `out` to `layer`'s sampler."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, anchor: nn.Parameter, see: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        # `anchor` is trainable, so that `out` takes part in the backward even where x does not.
        ctx.save_for_backward(x)
        ctx.see = see
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.see(x, grad)
        return grad, None, None, None


def _tapped_forward(
    engine: ClippedGradientSum, name: str, layer: nn.Module, sampler: Sampler
) -> Callable[..., Tensor]:
    original = layer.forward
    anchor = next(p for p in layer.parameters(recurse=False) if p.requires_grad)
    k = engine.noise_multiplicity

    def see(x: Tensor, grad: Tensor) -> None:
        engine.check_rows(name, x.shape[0])
        engine.check_rows(name, grad.shape[0])
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
            flat = grad.reshape(-1, grad.shape[-1])
            engine.put_products(layer.weight, flat, x.reshape(-1, x.shape[-1]).to(grad.dtype))
        for parameter, sample in sampler(layer, x, grad, k):
            engine.put(parameter, sample)

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            plain: Tensor = original(x)
            return plain
        parameters = vars(layer)["_parameters"]
        vars(layer)["_parameters"] = {n: None if p is None else p.detach() for n, p in parameters.items()}
        try:
            out = original(x)
        finally:
            vars(layer)["_parameters"] = parameters
        tapped: Tensor = _Tap.apply(out, x.detach(), anchor, see)  # type: ignore[no-untyped-call]
        return tapped

    return forward


def _trains(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _linear_samples(layer: nn.Linear, x: Tensor, grad: Tensor, k: int) -> Samples:
    # The weight's are products, see `ClippedGradientSum.put_products`.
    if _trains(layer.bias):
        yield layer.bias, grad.reshape(x.shape[0] // k, -1, grad.shape[-1]).sum(1)


def _conv_samples(layer: nn.Conv1d | nn.Conv2d, x: Tensor, grad: Tensor, k: int) -> Samples:
    if _trains(layer.bias):
        assert layer.bias is not None
        yield layer.bias, grad.flatten(2).sum(2).view(-1, k, grad.shape[1]).sum(1)
    if not _trains(layer.weight):
        return
    geometry = _Geometry(layer)
    if x.ndim == 3:
        x, grad = x.unsqueeze(2), grad.unsqueeze(2)
    x = x.to(grad.dtype)
    # The window is slid over whichever of input and output has fewer channels.
    slide_output = geometry.stride == (1, 1) and grad.shape[1] < x.shape[1]
    if slide_output:
        left, right = geometry.columns_of_output(grad), x.flatten(2)
    else:
        left, right = grad.flatten(2), geometry.columns_of_input(x)
    sample = _sum_over_draws(left, right, k)
    size = (sample.shape[0], grad.shape[1], -1, x.shape[1])
    if slide_output:
        sample = sample.view(size).flip(2).transpose(2, 3)
    yield layer.weight, sample.reshape(sample.shape[0], *layer.weight.shape)


def _sum_over_draws(left: Tensor, right: Tensor, k: int) -> Tensor:
    """[M, a, b]: the sum over an example's k rows of left right', left [M k, a, L], right [M k, b, L]."""
    left = left.reshape(-1, k, *left.shape[1:])
    right = right.reshape(-1, k, *right.shape[1:]).transpose(2, 3)
    total = torch.bmm(left[:, 0], right[:, 0])
    for draw in range(1, k):
        total.baddbmm_(left[:, draw], right[:, draw])
    return total


class _Geometry:
    """Kernel, stride, padding and dilation of a convolution, a Conv1d being one row high."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d) -> None:
        wide = isinstance(layer, nn.Conv1d)
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        padding = layer.padding
        if padding == "valid":
            padding = (0,) * len(kernel)
        elif padding == "same":
            padding = tuple(d * (s - 1) // 2 for d, s in zip(dilation, kernel, strict=True))
        assert not isinstance(padding, str)
        self.kernel: tuple[int, ...] = (1, *kernel) if wide else kernel
        self.stride: tuple[int, ...] = (1, *stride) if wide else stride
        self.dilation: tuple[int, ...] = (1, *dilation) if wide else dilation
        self.padding: tuple[int, ...] = (0, *padding) if wide else padding

    def columns_of_input(self, x: Tensor) -> Tensor:
        """[rows, channels x kernel, positions of the output]."""
        if self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            return x.flatten(2)
        return F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)

    def columns_of_output(self, grad: Tensor) -> Tensor:
        """[rows, channels x kernel (reversed), positions of the input], for stride 1."""
        if self.kernel == (1, 1) and self.padding == (0, 0):
            return grad.flatten(2)
        reach = tuple(
            d * (s - 1) - p for d, s, p in zip(self.dilation, self.kernel, self.padding, strict=True)
        )
        return F.unfold(grad, self.kernel, self.dilation, reach, 1)


def _embedding_samples(layer: nn.Embedding, x: Tensor, grad: Tensor, k: int) -> Samples:
    labels = x.reshape(x.shape[0] // k, -1)
    sample = GradSampleModule.GRAD_SAMPLERS[nn.Embedding](layer, [labels], grad)[layer.weight]
    if layer.padding_idx is not None:
        sample[:, layer.padding_idx] = 0.0
    yield layer.weight, sample


def _norm_samples(layer: nn.Module, x: Tensor, grad: Tensor, k: int) -> Samples:
    # Normalised in float32, as the layer itself does under autocast.
    sampler = GradSampleModule.GRAD_SAMPLERS[type(layer)]
    for parameter, sample in sampler(layer, [x.to(grad.dtype)], grad).items():
        if parameter.requires_grad:
            yield parameter, sample.reshape(-1, k, *sample.shape[1:]).sum(1)


_SAMPLERS: dict[type[nn.Module], Sampler] = {
    nn.Linear: _linear_samples,
    nn.Conv1d: _conv_samples,
    nn.Conv2d: _conv_samples,
    nn.Embedding: _embedding_samples,
    nn.GroupNorm: _norm_samples,
    nn.LayerNorm: _norm_samples,
    nn.RMSNorm: _norm_samples,
}


def _sampler(name: str, layer: nn.Module) -> Sampler:
    """The sampler of `layer`; UserError naming the layer when it has none."""
    kind = type(layer).__name__
    sampler = _SAMPLERS.get(type(layer))
    if sampler is None:
        expected = ", ".join(sorted(known.__name__ for known in _SAMPLERS))
        raise UserError(f"{name}: {kind} has no per-example gradient: expected LoRA, {expected} or frozen")
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        even = layer.padding == "same" and any(
            d * (s - 1) % 2 for d, s in zip(layer.dilation, layer.kernel_size, strict=True)
        )
        if layer.groups != 1 or layer.padding_mode != "zeros" or even:
            raise UserError(
                f"{name}: {kind} with groups, uneven or non-zero padding has no per-example gradient"
            )
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        raise UserError(f"{name}: Embedding with max_norm or scale_grad_by_freq depends on the whole batch")
    if isinstance(layer, nn.LayerNorm) and layer.bias is None:
        raise UserError(f"{name}: LayerNorm without bias has no per-example gradient: expected it frozen")
    return sampler


# What cannot be private

_MIXES = (
    "the layer mixes the examples of a batch, so no example's contribution can be bounded: "
    "expected GroupNorm, LayerNorm or RMSNorm in its place"
)


def _refuse_mixing(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        # Frozen or not: running statistics absorb private data outside the clip and the noise.
        if isinstance(layer, _BatchNorm) or (isinstance(layer, _NormBase) and layer.track_running_stats):
            raise UserError(f"{name} ({type(layer).__name__}): {_MIXES}")


def _refuse_low_precision(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{name}: trainable in {parameter.dtype}: expected float32, for the clip and the noise"
            )


def _versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Identity and write count of each buffer: what a forward that keeps statistics changes."""
    return {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}


def _changed_buffer(module: nn.Module, before: dict[str, tuple[int, int]]) -> str:
    now = _versions(module)
    return next(name for name in {**before, **now} if before.get(name) != now.get(name))
