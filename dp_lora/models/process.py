"""The forward process of a model, and what its network is trained to predict of it.

A timestep is an index t in [0, T): the noisy latents are z_t = signal_t z_0 + noise_t eps.

| process | signal_t | noise_t | the network predicts |
|---|---|---|---|
| diffusion (Ho et al. 2020) | sqrt(a_t) | sqrt(1 - a_t) | eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) z_0 |
| flow matching (Lipman et al. 2023) | 1 - sigma_t | sigma_t | the velocity eps - z_0 |

a_t is the cumulative product of 1 - beta; sigma rises with t, whatever order the scheduler keeps it in. These
are the targets and weights of diffusers' own training scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dp_lora.errors import UserError

DIFFUSION = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDPM", "DDIM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
        "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep",
        "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "SASolver",
    )
)  # fmt: skip
"""The samplers of diffusers whose forward process is that of DDPM with the same betas."""

FLOW = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})

Scheduler: TypeAlias = DDPMScheduler | FlowMatchEulerDiscreteScheduler


def scheduler_of(config: Mapping[str, Any], where: object) -> tuple[Scheduler, bool]:
    """The scheduler of the process that the file `where` describes, and whether the network predicts v.

    Raises UserError for a class with another process, an unknown one, and another prediction.
    """
    name = config.get("_class_name")
    flows = name in FLOW or (name in DIFFUSION and config.get("use_flow_sigmas") is True)
    if name not in DIFFUSION | FLOW or config.get("timestep_type") == "continuous":
        raise UserError(
            f"model.pretrained: {where} is a {name}, with another or an unknown process; expected one of "
            f"{', '.join(sorted(DIFFUSION | FLOW))}"
        )
    wanted = ("flow_prediction",) if flows else ("epsilon", "v_prediction")
    prediction = config.get("prediction_type", wanted[0])
    if prediction not in wanted:
        raise UserError(
            f"model.pretrained: {where} has prediction_type {prediction!r}, expected {' or '.join(wanted)}"
        )
    try:
        with torch.device("cpu"):
            return (_flow(config), False) if flows else (_ddpm(config), prediction == "v_prediction")
    except (NotImplementedError, TypeError, ValueError) as error:
        wanted_fields = "the fields of a flow" if flows else "betas"
        raise UserError(f"model.pretrained: {where}: {error}; expected {wanted_fields}") from error


def _ddpm(config: Mapping[str, Any]) -> DDPMScheduler:
    betas = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    known = ("num_train_timesteps", *betas)
    values = {key: config[key] for key in known if config.get(key) is not None}
    return DDPMScheduler(**values, clip_sample=False)


def _flow(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    # A shift that depends on the resolution belongs to the sampling, as in diffusers' training scripts.
    known = ("num_train_timesteps", "use_dynamic_shifting")
    values = {key: config[key] for key in known if config.get(key) is not None}
    shift = config.get("shift", config.get("flow_shift"))
    return FlowMatchEulerDiscreteScheduler(**values, **({} if shift is None else {"shift": shift}))


@dataclass(frozen=True, eq=False)
class Process:
    """The forward process of a scheduler.

    Args:
        table: float32 [T]: a_t of a diffusion, sigma_t of a flow.
        prediction: epsilon, v_prediction or velocity.
        scale: of the times that the network of a flow takes: sigma_t times it.
    """

    table: Tensor
    prediction: str
    scale: int = 1

    @classmethod
    def of(cls, scheduler: Scheduler, predicts_v: bool) -> Process:
        """The process of a scheduler as `scheduler_of` makes it."""
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return cls(scheduler.sigmas.flip(0), "velocity", int(scheduler.config["num_train_timesteps"]))
        return cls(scheduler.alphas_cumprod, "v_prediction" if predicts_v else "epsilon")

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.table)

    @property
    def flows(self) -> bool:
        """Whether the network predicts a velocity."""
        return self.prediction == "velocity"

    def levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """signal_t and noise_t of `timesteps` [...], on the device and in the dtype of `like`."""
        value = self.table.to(like)[timesteps]
        return (1 - value, value) if self.flows else (value.sqrt(), (1 - value).sqrt())

    def times(self, timesteps: Tensor) -> Tensor:
        """What the network takes for `timesteps` [B]: themselves, or the times of a flow in float32."""
        return self.table.to(timesteps.device)[timesteps] * self.scale if self.flows else timesteps

    def target(self, latents: Tensor, noise: Tensor, signal: Tensor, level: Tensor) -> Tensor:
        """What the network is trained to predict; `signal` and `level` as of `levels`, all of one shape."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "velocity":
            return noise - latents
        return signal * noise - level * latents

    def noise_of(self, predicted: Tensor, noisy: Tensor, signal: Tensor, level: Tensor) -> Tensor:
        """eps, of what the network predicted for the noisy latents."""
        if self.prediction == "epsilon":
            return predicted
        if self.prediction == "velocity":
            return noisy + signal * predicted
        return signal * predicted + level * noisy

    def min_snr_weights(self, gamma: float) -> Tensor:
        """float32 [T]: the weight of the loss at each timestep (Hang et al. 2023), min(snr, gamma) / snr.

        Over snr + 1 in place of snr where the network predicts v. A function of the timestep alone.
        """
        assert not self.flows
        snr = self.table / (1 - self.table)
        if self.prediction == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        return torch.where(snr <= gamma, torch.ones_like(snr), gamma / snr)

    def spread(self, distribution: str, shift: float | None) -> Tensor | None:
        """int64 [T]: the timestep for each of T equally likely draws, in rising order; None: the draws.

        Stratified draws therefore stay stratified. The distribution is that of T quantiles.

        Args:
            distribution: uniform, or logit_normal (Esser et al. 2024; mean 0, std 1).
            shift: s of u -> s u / (1 + (s - 1) u), which moves draws towards more noise; None: 1. A shift
                that the scheduler has is in the process already.
        """
        if distribution == "uniform" and shift is None:
            return None
        count = self.num_timesteps
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        if distribution == "logit_normal":
            u = torch.special.ndtri(u).sigmoid()
        if shift is not None:
            u = shift * u / (1 + (shift - 1) * u)
        return (u * count).long().clamp(max=count - 1)
