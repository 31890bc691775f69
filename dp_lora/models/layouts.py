"""The layouts of CompVis checkpoints that can be imported, without what is slow to load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The contents of one kind of checkpoint."""

    preset: str
    """The preset of the group `model` with the sizes."""
    image_size: int
    scaled: bool = False
    """Whether its latents were scaled to unit variance, so that the checkpoint has to say by what."""
    classes: Sequence[str] = ()
    """Their names, where they are known."""
    null_after: int | None = None
    """Number of classes, where one more row of the class embedding was trained for none of them."""


LAYOUTS = {
    "cin256": Layout("cin256", 256, null_after=1000),
    "celeba256": Layout("ldm4", 256),
    "ffhq256": Layout("ldm4", 256),
    "lsun_beds256": Layout("ldm4", 256),
    "lsun_churches256": Layout("lsun_churches256", 256, scaled=True),
    "mnist": Layout("mnist", 32, classes="ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "cifar10": Layout("cifar10", 32),
    "celeba32": Layout("celeba32", 32),
    "celeba64": Layout("celeba64", 64),
    "celebahq256": Layout("cin256", 256),
}
"""The published models of latent diffusion, and the paper's."""
