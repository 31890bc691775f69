"""Tuning to the device at hand: microbatch, memory layout, compilation.

None of it changes a result but by rounding, and all of it is found out with synthetic tensors: neither the
size of a microbatch nor the time or memory that finding it takes depends on a private image.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dp_lora.config.schema import TrainConfig
from dp_lora.errors import UserError
from dp_lora.models.diffusion import per_example_loss
from dp_lora.models.folders import LatentDiffusion
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.storage.files import write_json

ROWS_ON_CPU = 128
"""Rows of one forward on a CPU: twice as many are 2 % faster a row and cost more than that in padding."""

HEADROOM = 0.9
"""Share of the largest microbatch that fits which is used: the optimiser's state comes on top."""

_KEPT = "microbatch.json"
_LEAVES = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding, nn.GroupNorm, nn.LayerNorm)


def synthetic_losses(
    model: LatentDiffusion, examples: int, k: int, seed: int, *, apart: bool = False
) -> Callable[[slice], Tensor]:
    """Losses [n] of the synthetic examples of a slice, from draws that do not depend on the slice.

    apart: each draw of an example has an image of its own, as those of a person do.
    """
    device = next(model.unet.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    each = (examples, k) if apart else (examples,)
    latents = torch.randn((*each, *model.latent_shape), generator=generator).to(device)
    labels = (torch.arange(math.prod(each)) % len(model.classes)).view(each).to(device)
    steps = model.process.num_timesteps
    timesteps = torch.randint(steps, (examples, k), generator=generator).to(device)
    noise = torch.randn((examples, k, *model.latent_shape), generator=generator).to(device)

    def losses(chosen: slice) -> Tensor:
        return per_example_loss(model, latents[chosen], labels[chosen], timesteps[chosen], noise[chosen])

    return losses


# The microbatch


def choose_microbatch(
    model: LatentDiffusion, plan: PrivacyPlan, train: TrainConfig, processes: int, folder: Path, cache: Path
) -> int:
    """Examples per forward and backward: what `train.microbatch` says, or the largest that is worth it.

    At most a quarter of a process's expected part of the batch, so that the padding of its last microbatch
    costs an eighth on average or less. On a CPU, `ROWS_ON_CPU` rows; on a GPU, the most that fit, found by
    trying synthetic examples.

    Args:
        model: with its trainable parameters, on the device to train on.
        plan: the numbers of the run.
        train: `microbatch` and what changes how much fits.
        processes: number of processes that share the batch.
        folder: the run's private folder: a run that is resumed keeps its microbatch.
        cache: keeps what was found, for the other jobs of a sweep.
    """
    if isinstance(train.microbatch, int):
        return train.microbatch
    device = next(model.unet.parameters()).device
    kept = _read(folder / _KEPT, {"device": _name(device)})
    if kept is not None:
        return kept
    most = max(1, round(plan.expected_batch_size / (4 * processes)))
    if device.type == "cpu":
        return min(most, max(1, ROWS_ON_CPU // plan.noise_multiplicity))
    question = _question(model, plan, train, most)
    path = cache / "microbatches" / f"{_digest(question)}.json"
    found = _read(path, question)
    if found is None:
        found = largest_that_fits(lambda size: fits(model, plan, train, size), most)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**question, "microbatch": found})
    return found


def keep_microbatch(microbatch: int, device: torch.device, folder: Path) -> None:
    """Notes the microbatch of a run in its private folder, so that a resumed one rounds alike."""
    write_json(folder / _KEPT, {"device": _name(device), "microbatch": microbatch}, mode=0o600)


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest size up to `most` that fits, to within an eighth, less `HEADROOM` where a limit was met.

    Raises UserError when not even 1 fits.

    >>> largest_that_fits(lambda size: size <= 100, 1000), largest_that_fits(lambda size: True, 1000)
    (86, 1000)
    """
    good, bad = 0, most + 1
    size = 1
    while size < bad and fits(size):
        good, size = size, min(2 * size, most) if size < most else bad
    if good == most:
        return good
    bad = size
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    if good == 0:
        raise too_large()
    return max(1, int(HEADROOM * good))


def too_large() -> UserError:
    """The error of a device that cannot hold one example."""
    return UserError(
        "train.microbatch=1: not even one example with its draws fits into the memory of this device; "
        "expected fewer draws (privacy.noise_multiplicity), or fewer trainable parameters"
    )


def fits(model: LatentDiffusion, plan: PrivacyPlan, train: TrainConfig, size: int) -> bool:
    """Whether forward, backward and clip of `size` synthetic examples fit into the device's memory."""
    engine = ClippedGradientSum(model, plan.clip)
    device = next(model.unet.parameters()).device
    try:
        apart = plan.unit == "person"
        losses = synthetic_losses(model, size, plan.noise_multiplicity, seed=0, apart=apart)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
            computed = losses(slice(None))
        engine.add(computed)
    except torch.OutOfMemoryError:
        return False
    finally:
        engine.detach()
        free_memory()
    return True


def free_memory() -> None:
    """Gives what a failed attempt has left behind back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _question(model: LatentDiffusion, plan: PrivacyPlan, train: TrainConfig, most: int) -> dict[str, Any]:
    """All that decides how much fits."""
    device = next(model.unet.parameters()).device
    shapes = [(name, list(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    return {
        "device": _name(device),
        "memory": torch.cuda.get_device_properties(device).total_memory,
        "model": _digest({"parameters": shapes, "latents": model.latent_shape}),
        "draws": plan.noise_multiplicity,
        "precision": train.precision,
        "channels_last": train.channels_last,
        "compile": train.compile,
        "gradient_checkpointing": train.gradient_checkpointing,
        "most": most,
    }


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _read(path: Path, question: Mapping[str, Any]) -> int | None:
    """The microbatch kept in `path` for `question`; a file that answers another one counts as none."""
    try:
        kept = json.loads(path.read_text())
        return int(kept["microbatch"]) if question.items() <= kept.items() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


# Layout and compilation


def arrange(model: LatentDiffusion, plan: PrivacyPlan, train: TrainConfig, microbatch: int) -> None:
    """Lays the UNet out and compiles its frozen parts as `train` asks, in place.

    A compiled part computes what it did, up to rounding: that is checked on one synthetic microbatch.

    Raises UserError when a part cannot be compiled here or computes something else.
    """
    if train.channels_last:
        model.unet.to(memory_format=torch.channels_last)
    if train.compile:
        _compile(model, plan, train, microbatch)


def _compile(model: LatentDiffusion, plan: PrivacyPlan, train: TrainConfig, microbatch: int) -> None:
    device = next(model.unet.parameters()).device
    apart = plan.unit == "person"
    losses = synthetic_losses(model, microbatch, plan.noise_multiplicity, seed=0, apart=apart)
    low = train.precision == "bfloat16"

    def clipped_sum() -> Tensor:
        engine = ClippedGradientSum(model, replace(plan.clip, max_grad_norm=1.0, loss_share=0.0))
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                computed = losses(slice(None))
            engine.add(computed)
        finally:
            engine.detach()
        return engine.total()

    expected, parts = clipped_sum(), list(frozen_parts(model.unet))
    for part in parts:
        part.compile(dynamic=False)
    # Every frozen part is compiled for its own sizes.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    try:
        found = clipped_sum()
    except Exception as error:
        for part in parts:
            part._compiled_call_impl = None
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"train.compile=true: torch cannot compile this model here ({reason}); expected false"
        ) from error
    difference = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if not difference <= (0.05 if low else 1e-3):
        raise UserError(
            f"train.compile=true: the compiled model's gradients differ by {difference:.1e}; expected false"
        )


def frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of `module` without a trainable parameter, single layers and mere lists left out.

    Autograd traces of compiled code would lose the per-example gradients that a trainable layer hands over
    while its backward runs; a part without one has nothing to hand over.
    """
    for part in module.children():
        trains = any(p.requires_grad for p in part.parameters())
        if trains or isinstance(part, nn.ModuleList):
            yield from frozen_parts(part)
        elif not isinstance(part, _LEAVES) and next(part.parameters(), None) is not None:
            yield part
