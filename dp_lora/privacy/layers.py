"""The layers: how each hands over its per-example gradient, and which layers cannot.

A layer's forward is replaced by one that computes the same, and whose backward gives a `Receiver` the
gradient of each example, already summed over its k draws and its tokens. A LoRA layer is one autograd
function together with its frozen base: x W' + b + s (x A') B'. Any other trainable layer is its own forward
with detached parameters, followed by a tap that shows the gradient of its output to the sampler of its kind.
Autograd itself never computes the gradient of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from dp_lora.errors import UserError

# Merging a LoRA into its base takes out x in x (rank + this), the writing counted as so many products; its
# two thin products take rows x rank x (out + in). Measured at rank 8, flat between 8 and 56.
_MERGE = 24

# Pairs of a parameter and its per-example gradients [M, ...], summed over draws and tokens.
Samples = Iterator[tuple[Tensor, Tensor]]
# (layer, input, gradient of the output, k) -> the per-example gradients of the layer's parameters.
Sampler = Callable[[Any, Tensor, Tensor, int], Samples]


class Receiver(Protocol):
    """Receives per-example gradients while a backward runs; `ClippedGradientSum` is one."""

    noise_multiplicity: int

    def check_rows(self, name: str, rows: int) -> None: ...

    def put(self, parameter: Tensor, sample: Tensor) -> None: ...

    def put_products(self, parameter: Tensor, left: Tensor, right: Tensor) -> None: ...


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
        receiver: Receiver,
        name: str,
        base: nn.Linear | None,
    ) -> Tensor:
        dtype = down.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        weight, a, b = weight.to(dtype), down.to(dtype), up.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        rank = down.shape[0]
        thin, merged = len(flat) * rank * sum(weight.shape), weight.numel() * (rank + _MERGE)
        merge = dtype.itemsize >= 4 and thin > merged and base is None
        if merge:
            # Kept for the backward: it is smaller than half of `flat`, which autograd keeps too.
            weight = torch.addmm(weight, b, a, alpha=scale)
            out = F.linear(flat, weight, bias)
        else:
            out = F.linear(flat, weight, bias)
            out.addmm_(flat @ a.t(), b.t(), alpha=scale)
        # A weight that is made when it is asked for is made again in the backward, in place of being kept.
        ctx.save_for_backward(flat, weight if base is None else None, a, b)
        ctx.base = base
        ctx.down, ctx.up, ctx.scale, ctx.receiver, ctx.name = down, up, scale, receiver, name
        ctx.shape, ctx.merge = x.shape, merge
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        flat, weight, a, b = ctx.saved_tensors
        ctx.receiver.check_rows(ctx.name, ctx.shape[0])
        grad = grad.reshape(-1, grad.shape[-1])
        if grad.dtype != a.dtype:
            grad = grad.to(a.dtype)
        grad_hidden = grad @ b
        if ctx.scale != 1:
            grad_hidden *= ctx.scale
        if ctx.down.requires_grad:
            ctx.receiver.put_products(ctx.down, grad_hidden, flat)
        if ctx.up.requires_grad:
            hidden = flat @ a.t()
            ctx.receiver.put_products(ctx.up, grad, hidden if ctx.scale == 1 else hidden * ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0] and ctx.base is not None:
            weight = ctx.base.weight.to(a.dtype)
        if ctx.needs_input_grad[0] and ctx.merge:
            grad_x = (grad @ weight).view(ctx.shape)
        elif ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_hidden, a).view(ctx.shape)
        return grad_x, None, None, None, None, None, None, None, None


def is_adapter(layer: nn.Module) -> bool:
    """Whether peft put an adapter there."""
    return isinstance(layer, lora.LoraLayer)


def fusable(layer: Any) -> bool:
    """Whether `layer` is a plain LoRA, without dropout, on a frozen nn.Linear of its precision or less.

    The nn.Linear may also be of a kind that makes its weight when it is asked for, of codes in few bits.
    """
    base = layer.get_base_layer()
    if not isinstance(layer.lora_dropout[layer.active_adapters[0]], nn.Identity):
        return False
    if type(layer) is not lora.Linear or not (type(base) is nn.Linear or _makes_its_weight(base)):
        return False
    if any(p.requires_grad for p in base.parameters()):
        return False
    up = layer.lora_B[layer.active_adapters[0]]
    precisions = (up.weight.dtype, torch.bfloat16, torch.float16)
    return up.bias is None and base.weight.dtype in precisions


def _makes_its_weight(base: nn.Module) -> bool:
    """Whether the weight of a linear layer is a property, made anew each time."""
    return isinstance(base, nn.Linear) and isinstance(getattr(type(base), "weight", None), property)


def fused_forward(receiver: Receiver, name: str, layer: Any) -> Callable[..., Tensor]:
    """A forward of a `fusable` layer whose backward hands over the gradients of A and B."""
    adapter = layer.active_adapters[0]
    base = layer.get_base_layer()
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    original = layer.forward
    again = base if _makes_its_weight(base) else None

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.disable_adapters or layer.merged or args or kwargs:
            out: Tensor = original(x, *args, **kwargs)
            return out
        scale = layer.scaling[adapter]
        fused: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, down, up, scale, receiver, name, again
        )
        return fused

    return forward


def refuse_unsupported_adapter(name: str, layer: Any) -> None:
    """UserError unless `layer` is plain LoRA on a Linear or convolution, one adapter active and unmerged."""
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


def tapped_forward(receiver: Receiver, name: str, layer: nn.Module) -> Callable[..., Tensor]:
    """A forward of `layer` whose backward hands over the gradients of its own trainable parameters.

    Raises:
        UserError: the layer has no per-example gradient.
    """
    sampler, original = _sampler(name, layer), layer.forward
    anchor = next(p for p in layer.parameters(recurse=False) if p.requires_grad)
    k = receiver.noise_multiplicity

    def see(x: Tensor, grad: Tensor) -> None:
        receiver.check_rows(name, x.shape[0])
        receiver.check_rows(name, grad.shape[0])
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
            flat = grad.reshape(-1, grad.shape[-1])
            receiver.put_products(layer.weight, flat, x.reshape(-1, x.shape[-1]).to(grad.dtype))
        for parameter, sample in sampler(layer, x, grad, k):
            receiver.put(parameter, sample)

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
    # The weight's are products, which `tapped_forward` hands over as such.
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
    slide_output = geometry.slides_over_output and grad.shape[1] < x.shape[1]
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
        self._reach = tuple(
            d * (s - 1) - p for d, s, p in zip(self.dilation, self.kernel, self.padding, strict=True)
        )

    @property
    def slides_over_output(self) -> bool:
        """Whether `columns_of_output` knows the layer; not with a padding that is wider than its kernel."""
        return self.stride == (1, 1) and min(self._reach) >= 0

    def columns_of_input(self, x: Tensor) -> Tensor:
        """[rows, channels x kernel, positions of the output]."""
        if self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            return x.flatten(2)
        return F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)

    def columns_of_output(self, grad: Tensor) -> Tensor:
        """[rows, channels x kernel (reversed), positions of the input], if it `slides_over_output`."""
        if self.kernel == (1, 1):
            return grad.flatten(2)
        return F.unfold(grad, self.kernel, self.dilation, self._reach, 1)


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


def refuse_mixing(module: nn.Module) -> None:
    """UserError naming the first layer that keeps statistics of a batch."""
    for name, layer in module.named_modules():
        # Frozen or not: running statistics absorb private data outside the clip and the noise.
        if isinstance(layer, _BatchNorm) or (isinstance(layer, _NormBase) and layer.track_running_stats):
            raise UserError(f"{name} ({type(layer).__name__}): {_MIXES}")


def refuse_sharded(module: nn.Module) -> None:
    """UserError naming the first part of which this process has a shard alone (FSDP, tensor parallelism).

    The norm of an example's gradient would be that of a shard, and the whole could pass C.
    """
    for name, part in module.named_modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}
        parameters = {type(parameter).__name__ for parameter in part.parameters(recurse=False)}
        if kinds & {"FullyShardedDataParallel", "FSDPModule"} or parameters & {"DTensor", "FlatParameter"}:
            raise UserError(
                f"{name or 'module'}: is sharded over processes (FSDP), so the norm of an example's whole "
                "gradient is not known here; expected the module before fully_shard() or FSDP, whole in each "
                "process"
            )


def refuse_low_precision(parameters: dict[str, nn.Parameter]) -> None:
    """UserError naming the first parameter that is neither float32 nor float64."""
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{name}: trainable in {parameter.dtype}: expected float32, for the clip and the noise"
            )


class Buffers:
    """The buffers of a module, watched: a forward that writes one keeps a statistic of its batch."""

    def __init__(self, module: nn.Module) -> None:
        # Not named_buffers(): it walks the whole model, which would cost two percent of a step.
        self._owned = {name: layer._buffers for name, layer in module.named_modules()}
        self._before = (self._names(), self._versions())

    def refuse_changed(self) -> None:
        """UserError naming the first buffer that was written, replaced, added or taken away."""
        names, versions = self._before
        now = self._versions()
        if now == versions:
            return
        before, after = dict(zip(names, versions, strict=True)), dict(zip(self._names(), now, strict=True))
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                raise UserError(f"{name}: {_MIXES}")

    def _versions(self) -> list[tuple[int, int] | None]:
        """Identity and write count of each buffer."""
        return [
            None if buffer is None else (id(buffer), buffer._version)
            for buffers in self._owned.values()
            if buffers
            for buffer in buffers.values()
        ]

    def _names(self) -> list[str]:
        return [f"{name}.{key}".lstrip(".") for name, buffers in self._owned.items() for key in buffers]
