"""How far numbers that no noise protects are rounded before they are shown."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any


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


def at_most(value: Any, rounding: str = ROUND_CEILING) -> str:
    """Four significant digits rounded up, so that the card never claims more privacy than there is."""
    exact = Decimal(str(value))
    if not exact.is_finite() or exact == 0:
        return str(value)
    place = Decimal(1).scaleb(exact.adjusted() - 3)
    return f"{float(exact.quantize(place, rounding=rounding)):.4g}"


def at_least(value: Any) -> str:
    """Four significant digits rounded down, for a lower bound."""
    return at_most(value, ROUND_FLOOR)
