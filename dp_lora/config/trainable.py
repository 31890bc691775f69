"""The settings that say which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass, field

COMPONENTS = ("lora", "attention", "embedder", "bias", "norm", "full")
MEASURED = ("salient", "salient_public")
CHOICES = ("all", *MEASURED, "random")
CANDIDATES = ("lora", "matrices")


@dataclass
class TrainableConfig:
    """Which parameters the private fine-tuning trains; everything else stays frozen."""

    components: list[str] = field(default_factory=lambda: ["lora", "embedder"])
    """Any of lora, attention, embedder, bias, norm, full."""
    learning_rate_factor: float = 1.0
    """The learning rate of these over `train.learning_rate`; the class embedding has a factor of its own.
    Whole weights take smaller steps than adapters."""
    choice: str = "all"
    """Which matrices of `lora.target_modules` get an adapter: all, or a `share`, chosen by the run's first
    noisy steps (salient), by the public set (salient_public) or by the seed (random)."""
    share: float = 1.0
    scout_steps: int = 0
    """S, the steps that measure and do not train: the first of the run's noisy steps, which epsilon counts;
    with salient_public, batches of the public set."""
    candidates: str = "lora"
    """What a measuring step takes gradients of: lora: each adapter's B; matrices: each whole matrix."""
