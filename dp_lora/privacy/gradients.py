"""Per-example gradients, clipped and summed, as fast as a gradient without privacy.

The module's forward runs on M k rows, example-major: row i k + j is draw j of example i. While the
backward runs, every trainable layer hands over g_i, the gradient of example i, already summed over its
k draws and its tokens (`dp_lora.privacy.layers` says how). The clip therefore comes after the mean over
the draws, and one example contributes one gradient of norm at most C, whatever k is. Autograd itself never
computes the gradient of a parameter: one that appears betrays a use of the parameter outside its layer, and
is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dp_lora.errors import UserError
from dp_lora.privacy.layers import (
    Buffers,
    fusable,
    fused_forward,
    is_adapter,
    refuse_low_precision,
    refuse_mixing,
    refuse_sharded,
    refuse_unsupported_adapter,
    tapped_forward,
)
from dp_lora.privacy.plan import Clip
from dp_lora.privacy.precision import full_precision

AUTOMATIC_GAMMA = 0.01
"""The stability constant of automatic clipping (Bu et al. 2022)."""

# Norms are taken in the gradients' own precision over blocks of so many entries, then over as many blocks,
# and from there in float64. The squares of n float32 numbers, added up in any order, are off by n 2^-24 of
# themselves at most (Higham 2002, section 3.1), their root by half of it: 65 x 2^-24 for each of the two.
_BLOCK = 128
# So much of C is given up that no rounding lets a contribution pass C: 130 x 2^-24 for the norm, and 2^-24
# each for the factor and for its product with the gradient.
_ROUNDING = 1 + 1e-5
# A larger norm counts as not finite: C over it would not be a normal float32 any more.
_LARGEST = 1e27

# Sums of so many examples are float32. What one example changes in them has to round to C at most, too.
_ROWS = 128

_PART = 1 << 16


class _Replaced:
    """A forward that stands in place of a layer's own. A deep copy of the layer has its own forward again."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._layer, self._forward = layer, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A function is not copied: that of the copy would compute with the weights of the layer itself.
        return MethodType(type(self._layer).forward, memo[id(self._layer)])


class ClippedGradientSum:
    """The sum of clipped per-example gradients of the trainable parameters of `module`.

    Guarantees, for the neighbouring relation "add or remove one image":
        * One example adds at most `max_grad_norm` to `total()` in Euclidean norm over all parameters
          together, for every noise multiplicity, microbatch, precision and size of a layer, its own rounding
          included (sums of up to 128 examples are float32), with each `clipping`:
            flat       g min(1, C / |g|): sensitivity C.
            automatic  g C / (|g| + 0.01), Bu et al. 2022: sensitivity C; every example has a say near C.
            per_layer  each of the L layers clipped to C / sqrt(L): sensitivity sqrt(L (C / sqrt(L))^2) = C.
        * With a `loss_share` rho the sum has one more coordinate, to which an example adds rho C times its
          loss, clamped to [0, 1], and its gradient is clipped to C sqrt(1 - rho^2): together at most C.
        * An example of weight 0 (padding), or whose gradient or loss is not finite, contributes exactly 0;
          so does one whose gradient is longer than 1e27.
        * Nothing that is computed decides a branch; `nonfinite` is private and must not be logged.

    Args:
        module: its LoRA layers are peft's; each trainable parameter belongs to a LoRA layer or to a
            Linear, Conv1d, Conv2d, Embedding, GroupNorm, LayerNorm or RMSNorm, once or several times in
            a forward. Train or eval mode does not matter here. Anything else is refused.
        clip: k, C, the kind of clipping and rho; `PrivacyPlan.clip` of the run's plan.

    Raises:
        UserError: a layer mixes the examples of a batch, is sharded over processes, or has no per-example
            gradient.
    """

    def __init__(self, module: nn.Module, clip: Clip) -> None:
        self.clip, self.noise_multiplicity = clip, clip.noise_multiplicity
        refuse_sharded(module)
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UserError("module: no parameter is trainable; expected at least one with requires_grad")
        refuse_low_precision(self.parameters)
        refuse_mixing(module)
        sizes = [p.numel() for p in self.parameters.values()]
        self.num_parameters = sum(sizes)
        self._sizes = sizes
        self._index = {id(p): i for i, p in enumerate(self.parameters.values())}
        self._buffers = Buffers(module)
        # Per-example gradients of each parameter and the norms of their blocks, while a backward runs.
        self._samples: list[_Dense | _RankOne | None] | None = None
        self._norms: list[Tensor] = []
        self._examples = 0
        first = next(iter(self.parameters.values()))
        size = self.num_parameters + (clip.loss_share > 0)
        self._total = torch.zeros(size, dtype=torch.float64, device=first.device)
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
        self._buffers.refuse_changed()
        if not len(losses):
            return
        self._clip_and_add(self._backward(losses, weights), losses.detach(), weights)

    def refuse_mixed(self, losses: Tensor) -> bool:
        """Raises UserError when the gradient of one of `losses` [M] also flows to other examples.

        Returns whether that could be told: not where a gradient is not finite.

        The numbers of any two examples differ in a bit. So for each bit, the losses of the examples with a
        1 there must not reach those with a 0, nor the other way round: 2 log2(M) backward passes. The graph
        is kept for `add`, and the sum stays as it is. What enters a loss without a gradient, such as a
        detached mean over the batch, is not found.
        """
        numbers = torch.arange(len(losses), device=losses.device)
        # With weights of their own, so that what reaches an example from two others does not cancel.
        weighted, finite = losses * (1 + numbers / len(losses)), True
        for bit in range((len(losses) - 1).bit_length()):
            for side in (0, 1):
                chosen = (numbers >> bit) & 1 == side
                self._backward(weighted, chosen, retain_graph=True)
                if any(bool((norms[~chosen] > 0).any()) for norms in self._norms):
                    raise UserError(
                        "losses: that of one example depends on other examples of the microbatch, so no "
                        "example's contribution can be bounded; expected one loss per example, from its own "
                        'rows alone, such as reduction="none" and repeat_interleave(k)'
                    )
                finite &= all(bool(norms.isfinite().all()) for norms in self._norms)
        return finite

    def total(self) -> Tensor:
        """The sum since the last `reset`, float64 [P], in the order of `parameters`.

        [P + 1] with a `loss_share`: the loss comes last.
        """
        return self._total.clone()

    def reset(self) -> None:
        """Empties the sum: what every batch begins with."""
        self._total.zero_()
        self._nonfinite.zero_()

    @property
    def nonfinite(self) -> int:
        """The number of examples since the last `reset` whose gradient was not finite. Private."""
        return int(self._nonfinite)

    @property
    def num_layers(self) -> int:
        """L, the number of layers that `per_layer` clips each by itself."""
        return len(set(self._layer_of))

    def write_gradients(self, flat: Tensor) -> None:
        """Puts `flat` [P] into the `.grad` of each parameter, in the order of `parameters`."""
        if flat.shape != (self.num_parameters,):
            raise ValueError(f"a gradient of shape {list(flat.shape)}: expected [{self.num_parameters}]")
        for parameter, part in zip(self.parameters.values(), flat.split(self._sizes), strict=True):
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
            if is_adapter(layer):
                refuse_unsupported_adapter(name, layer)
                if fusable(layer):
                    self._patch(layer, name, fused_forward(self, name, layer))
                    inside_fused |= {id(part) for part in layer.modules()}
                self._set_layer(list(layer.parameters()), number)
            elif own and id(layer) not in inside_fused:
                self._patch(layer, name, tapped_forward(self, name, layer))
                self._set_layer(own, number)

    def _patch(self, layer: nn.Module, name: str, forward: Callable[..., Tensor]) -> None:
        found = vars(layer).get("forward")
        if found is not None and getattr(found, "__func__", None) is not type(layer).forward:
            raise RuntimeError(f"{name}: its forward is already replaced; detach the other engine first")
        layer.forward = _Replaced(layer, forward)
        self._patched.append(layer)

    def _set_layer(self, parameters: list[nn.Parameter], number: int) -> None:
        for parameter in parameters:
            index = self._index.get(id(parameter))
            if index is not None and self._layer_of[index] < 0:
                self._layer_of[index] = number

    def check_rows(self, name: str, rows: int) -> None:
        """UserError unless a layer that saw `rows` rows saw M k."""
        if self._samples is None:
            raise RuntimeError(
                "a backward outside step.add(losses), which runs its own; expected add() alone, without "
                "loss.backward(), accelerator.backward() or torch.autograd.grad()"
            )
        if rows != self._examples * self.noise_multiplicity:
            raise UserError(
                f"layer {name!r}: it saw {rows} rows for {self._examples} losses; expected "
                f"{self._examples * self.noise_multiplicity}, because each example has "
                f"noise_multiplicity={self.noise_multiplicity} rows of its own"
            )

    def put(self, parameter: Tensor, sample: Tensor) -> None:
        """Adds per-example gradients [M, ...] of `parameter` from one use of its layer."""
        sample = sample.reshape(self._examples, -1)
        self._put(
            parameter, _Dense(sample if sample.dtype == parameter.dtype else sample.to(parameter.dtype))
        )

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
        self._norms[index] = sample.block_norms()

    # One microbatch

    def _backward(
        self, losses: Tensor, weights: Tensor | None, retain_graph: bool = False
    ) -> list[_Dense | _RankOne]:
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
                losses.sum().backward(retain_graph=retain_graph)
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
    def _clip_and_add(self, samples: list[_Dense | _RankOne], losses: Tensor, weights: Tensor | None) -> None:
        norms = _norms_of_blocks(self._norms)
        finite = (norms.sum(0) <= _LARGEST) & losses.isfinite()
        asked = torch.ones_like(finite) if weights is None else weights > 0
        self._nonfinite += (asked & ~finite).sum()
        factors = self._factors(norms.masked_fill(~finite, 0.0)) * (asked & finite)
        factors = factors.to(next(iter(self.parameters.values())).dtype).unsqueeze(1)
        # 0 * nan is nan: the rows themselves have to go.
        spoilt = (~finite).nonzero().squeeze(1)
        for sample in samples:
            sample.leave_out(spoilt)
        partial = factors.new_empty(1, self.num_parameters)
        own = partial.split(self._sizes, dim=1)
        for first in range(0, factors.shape[2], _ROWS):
            rows = slice(first, first + _ROWS)
            with full_precision():
                for sample, factor, part in zip(samples, factors, own, strict=True):
                    sample.weighted_sum(factor, rows, out=part)
            # In parts, whose copy in float64 stays in the processor's cache.
            parts = zip(self._total[: self.num_parameters].split(_PART), partial[0].split(_PART), strict=True)
            for total, part in parts:
                total += part
        if self.clip.loss_share:
            counted = torch.where(asked & finite, losses.double().clamp(0, 1), 0.0)
            self._total[-1] += self.clip.loss_unit * counted.sum()

    def _factors(self, norms: Tensor) -> Tensor:
        """The factors [parameters, M] by which gradients are clipped, from their norms [parameters, M]."""
        bound: float = self.clip.max_grad_norm * math.sqrt(1 - self.clip.loss_share**2)
        norms = norms * _ROUNDING
        if self.clip.clipping == "per_layer":
            numbers = sorted(set(self._layer_of))
            layers = torch.tensor([numbers.index(n) for n in self._layer_of], device=norms.device)
            squares = norms.new_zeros(len(numbers), norms.shape[1]).index_add_(0, layers, norms.square())
            bound = bound / math.sqrt(len(numbers))
            return torch.clamp(bound / squares.sqrt(), max=1.0)[layers]
        whole: Tensor = torch.linalg.vector_norm(norms, dim=0)
        if self.clip.clipping == "automatic" and math.isfinite(bound):
            return (bound / (whole + AUTOMATIC_GAMMA)).expand_as(norms)
        return torch.clamp(bound / whole, max=1.0).expand_as(norms)


# The gradients of one parameter, for each example


def _norms_of_blocks(blocks: list[Tensor]) -> Tensor:
    """Norms [parameters, M] in float64 from those of each parameter's blocks, [M, blocks] each."""
    counts = torch.tensor([part.shape[1] for part in blocks])
    parameter = torch.repeat_interleave(torch.arange(len(blocks)), counts).to(blocks[0].device)
    squares = torch.cat([part.double() for part in blocks], dim=1).square_()
    norms = squares.new_zeros(squares.shape[0], len(blocks))
    return norms.scatter_add_(1, parameter.expand_as(squares), squares).sqrt_().t()


def _over_blocks(value: Tensor) -> Tensor:
    """Norms [M, blocks] of `value` [M, size] over blocks of `_BLOCK`, and of the rest."""
    rest = value.shape[1] % _BLOCK
    if not rest:
        even: Tensor = torch.linalg.vector_norm(value.reshape(value.shape[0], -1, _BLOCK), dim=2)
        return even
    last = value[:, value.shape[1] - rest :]
    if rest == value.shape[1]:
        alone: Tensor = torch.linalg.vector_norm(last, dim=1, keepdim=True)
        return alone
    whole = value[:, : value.shape[1] - rest].unflatten(1, (-1, _BLOCK))
    norms: Tensor = torch.linalg.vector_norm(whole, dim=2)
    return torch.cat([norms, torch.linalg.vector_norm(last, dim=1, keepdim=True)], dim=1)


class _Dense:
    """[M, size]."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def dense(self) -> Tensor:
        return self._value

    def block_norms(self) -> Tensor:
        """[M, blocks], whose squares add up to the squared norms."""
        norms = _over_blocks(self._value)
        return norms if norms.shape[1] <= _BLOCK else _over_blocks(norms)

    def leave_out(self, spoilt: Tensor) -> None:
        """Makes the gradients of the examples `spoilt` zero."""
        self._value.index_fill_(0, spoilt, 0.0)

    def weighted_sum(self, factors: Tensor, rows: slice, out: Tensor) -> None:
        """Writes the sum of factors [1, M] x gradients over the examples `rows`, as [1, size]."""
        torch.mm(factors[:, rows], self._value[rows], out=out)


class _RankOne:
    """left (x) right of [M, a] and [M, b]: the gradients of a matrix that saw one token of one draw."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right

    def dense(self) -> Tensor:
        return torch.einsum("ma,mb->mab", self._left, self._right).flatten(1)

    def block_norms(self) -> Tensor:
        """[M, 1], to the precision of a double: the two factors are small."""
        left: Tensor = torch.linalg.vector_norm(self._left, dim=1, keepdim=True, dtype=torch.float64)
        right: Tensor = torch.linalg.vector_norm(self._right, dim=1, keepdim=True, dtype=torch.float64)
        return left * right

    def leave_out(self, spoilt: Tensor) -> None:
        """Makes the gradients of the examples `spoilt` zero."""
        self._left = self._left.index_fill(0, spoilt, 0.0)
        self._right = self._right.index_fill(0, spoilt, 0.0)

    def weighted_sum(self, factors: Tensor, rows: slice, out: Tensor) -> None:
        """Writes the sum of factors [1, M] x gradients over the examples `rows`, as [1, size]."""
        left = self._left[rows] * factors[:, rows].t()
        torch.mm(left.t(), self._right[rows], out=out.view(left.shape[1], -1))
