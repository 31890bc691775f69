"""The mechanism that all accountants are about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mechanism:
    """`steps` releases of a Poisson batch's clipped sum with noise of std noise_multiplier times C."""

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        # As Python's numbers: accountants compute in double precision whatever kind of number is given.
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", float(self.sample_rate))
        if self.steps != int(self.steps):
            raise ValueError(f"steps={self.steps}: expected a whole number")
        object.__setattr__(self, "steps", int(self.steps))
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier={self.noise_multiplier}: expected 0 or more")
        if not 0 <= self.sample_rate <= 1:
            raise ValueError(f"sample_rate={self.sample_rate}: expected a number in [0, 1]")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: expected 0 or more")
