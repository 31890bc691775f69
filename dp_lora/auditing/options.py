"""The options of an audit, in a module that is fast to load."""

from __future__ import annotations

from dataclasses import dataclass

from dp_lora.errors import UserError

KINDS = ("gradient", "image")
"""Of canaries."""


@dataclass(frozen=True)
class Options:
    """The options of an audit."""

    kind: str = "gradient"
    """The kind of canaries."""
    canaries: int = 1000
    confidence: float = 0.95
    images: int = 1000
    """Members, and as many others, for the membership inference; 0 leaves it out."""
    draws: int = 16
    """Draws of (timestep, noise) for the loss of an image."""
    device: str = "auto"


def check(options: Options) -> None:
    """Raises UserError naming the option, its value and its range for the first that cannot be right."""
    if not 0.5 <= options.confidence < 1:
        raise UserError(f"--confidence={options.confidence:g}: expected a number in [0.5, 1)")
    if options.canaries < 2:
        raise UserError(f"--canaries={options.canaries}: expected at least 2")
    if options.images < 0 or options.images == 1:
        raise UserError(f"--images={options.images}: expected at least 2, or 0 for no membership inference")
    if options.draws < 1:
        raise UserError(f"--draws={options.draws}: expected at least 1")
