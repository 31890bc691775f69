"""The release of one step: microbatches in, clipped sum, noise once, divided by the expected batch size."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness


def slice_of_batch(indices: Tensor, rank: int, world_size: int) -> Tensor:
    """The part of the batch that process `rank` of `world_size` sums: consecutive, sizes equal to within one.

    The parts are disjoint and make up the batch, whose draw every process repeats, so inclusion stays
    independent between examples. A consecutive part keeps draws that belong to a position in the batch
    the same for any number of processes.
    """
    return indices.tensor_split(world_size)[rank]


def microbatches(indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices int64 [size], weights float32 [size]) that cover `indices` in order.

    The last one is filled up with its first index at weight 0, so that every forward has the same shape
    and no memory or compile cache depends on the size of the batch. Nothing for an empty batch: its
    noisy step needs no forward.
    """
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        weights = torch.zeros(size)
        weights[: len(part)] = 1.0
        yield torch.cat([part, part[:1].expand(size - len(part))]), weights


def all_reduced(total: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The clipped sums of all processes of `group` added up, float64, the same on every process.

    Args:
        total: the clipped sum of this process, from `ClippedGradientSum.total`.
        group: the processes that share the batch; None for one process.
    """
    total = total.double()
    if group is not None:
        total = total.clone()
        dist.all_reduce(total, group=group)
    return total


def sum_digest(total: Tensor, plan: PrivacyPlan) -> bytes:
    """SHA-256 of the sum float64 [P], bit for bit, and of the scale of the noise that it gets.

    The scale belongs to it: one sum that is released under two scales of one noise can be solved for.
    """
    scale = struct.pack("<3d", plan.noise_std, plan.expected_batch_size, total.numel())
    hashed = hashlib.sha256(scale)
    hashed.update(total.double().cpu().contiguous().numpy().data)
    return hashed.digest()


def noised_mean(total: Tensor, plan: PrivacyPlan, randomness: Randomness, step: int) -> Tensor:
    """(sum + sigma C N(0, I)) / expected_batch_size, float32: what one step releases.

    [P], or [P + 1] when the plan has a `loss_share`: `private_loss` reads the last coordinate.

    Guarantees:
        * Every coordinate gets noise, of std exactly `plan.noise_std` before the division, from the
          stream ("noise", step) of this sum, which nothing else reads.
        * No two different sums meet the same noise, nor one sum at two scales, whatever `randomness` and
          `step` they come with: the stream is derived from the sum's digest. So the difference of two
          releases never is the difference of their sums. The same sum is released once more as it was.
          (Not under a seed, whose run has no privacy.)
        * An empty batch (a zero sum) is released like any other.
        * Sum and noise meet in float64 and are rounded together, once.
        * Each process that holds the sum draws the same noise and holds the same result.

    Args:
        total: the clipped sum of the whole batch, from `all_reduced`.
        plan: the numbers of the run.
        randomness: of this execution of the step.
        step: its number, the same on every process.
    """
    total = total.double()
    if plan.noise_std:
        randomness = randomness.bound_to(f"sum {sum_digest(total, plan).hex()}")
        noise = randomness.secure_normal("noise", step, total.numel()).to(total.device)
        total = total + plan.noise_std * noise
    return (total / plan.expected_batch_size).float()


def private_loss(released: Tensor, plan: PrivacyPlan) -> float:
    """The mean loss of the batch, each clamped to [0, 1], as the last coordinate of `released` tells it.

    Post-processing of a released value: it may be logged. Its noise has a standard deviation of
    sigma / (rho expected_batch_size), and as the divisor is the expected size of the batch, the reading of a
    larger batch is larger by as much.
    """
    return float(released[-1]) / plan.clip.loss_unit


def signal_to_noise(released: Tensor, plan: PrivacyPlan) -> float:
    """An estimate of |mean clipped gradient|^2 over the expected |noise|^2, from the released gradient [P].

    E |released|^2 is the sum of the two, and the second is known, so this is post-processing: it may be
    logged. Unbiased, hence at times below 0. inf without noise.
    """
    if not plan.noise_std:
        return float("inf")
    # In units of the noise: neither number alone need have a square.
    in_noise = released.double() / (plan.noise_std / plan.expected_batch_size)
    return float(in_noise.square().mean()) - 1.0
