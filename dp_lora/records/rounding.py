"""How far numbers that no noise protects are rounded before they are shown."""

from __future__ import annotations


def coarse(seconds: float) -> float:
    """One significant digit.

    How long a training takes follows the sum of the sizes of its T batches, whose spread is
    sqrt((1 - q) / (q N T)) of its mean: 0.3 % in the default job, 2 % in one of 40 batches of 50. One digit
    is a step of 10 to 100 %.

    >>> coarse(149.2), coarse(0.0347)
    (100.0, 0.03)
    """
    return float(f"{seconds:.1g}")


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`: memory follows the largest of the batches.

    >>> power_of_two(1_000_000_000), power_of_two(1 << 20)
    (1073741824, 1048576)
    """
    return 1 << max(0, int(size) - 1).bit_length()
