"""What a private training refuses of optimisers, losses and schedules: it would learn without noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dp_lora.errors import UserError


def check_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Raises UserError unless `optimizer` is torch's own kind, over the trainable parameters of `module`."""
    if not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "accelerator_state"):
        raise UserError(
            f"optimizer={type(optimizer).__name__}: expected a torch.optim.Optimizer as it was made, before "
            "accelerator.prepare()"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("optimizer=LBFGS: evaluates the loss by itself; expected one that takes a gradient")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError("optimizer=SparseAdam: takes sparse gradients; expected Adam, since noise is dense")
    trained = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError("module: no parameter is trainable; expected LoRA layers, or requires_grad_(True)")
    given = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for key, name in trained.items() if key not in given]:
        raise UserError(
            f"optimizer: lacks {missing[0]} and {len(missing) - 1} more trainable parameters of the module; "
            "expected all of them, or requires_grad_(False) for those that are not trained"
        )
    # A frozen parameter without a gradient is one that no optimiser moves.
    frozen = {id(p) for p in module.parameters() if not p.requires_grad and p.grad is None}
    if others := len(given.keys() - trained.keys() - frozen):
        raise UserError(
            f"optimizer: holds {others} parameters that are not of the module, or frozen ones with a "
            "gradient; expected none, since they would get no private gradient"
        )


def refuse_outside(losses: Tensor, own: set[int]) -> None:
    """Raises UserError when `losses` depend on a tensor with a gradient whose id is not in `own`."""
    left, seen = [losses.grad_fn], set[Any]()
    while left:
        if (node := left.pop()) is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in own:
            raise UserError(
                f"losses: they depend on a tensor of shape {list(leaf.shape)} outside the module that "
                "requires a gradient, which would have neither clip nor noise; expected one module with all "
                "that is trained, such as nn.ModuleList([unet, text_encoder]), and "
                "requires_grad_(False) or detach() for the rest"
            )
        left += [following for following, _ in node.next_functions]


def refuse_steered(also: Mapping[str, Any]) -> None:
    """Raises UserError for a scheduler among `also` whose rates follow from a loss."""
    for name, part in also.items():
        if isinstance(part, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError(
                f"also: {name!r} is a ReduceLROnPlateau, which steers by a loss; expected a schedule that "
                "counts steps: losses of private examples that decide a learning rate have no noise"
            )
