"""Products of float32 matrices in full precision, whatever a program has set for speed.

TF32 (CUDA) and bfloat16 (oneDNN) round the factors of a product to 10 or 7 bits. A clipped gradient that is
rounded so can be longer than C by as much: 1.0005 C, or 1.004 C.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_PRODUCTS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_ROUNDED = ("tf32", "bf16")


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products are exact to float32 inside; the settings are then what they were."""
    changed = [(one, one.fp32_precision) for one in _PRODUCTS if one.fp32_precision in _ROUNDED]
    for one, _ in changed:
        one.fp32_precision = "ieee"
    try:
        yield
    finally:
        for one, before in changed:
            one.fp32_precision = before


def setting() -> str:
    """How float32 products are computed, as one word; two settings that round in two ways differ in it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer names of torch, for each library by itself
        return ", ".join(one.fp32_precision for one in _PRODUCTS)
