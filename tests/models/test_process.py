"""The forward process and the training target, against diffusers' schedulers and training scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from dp_lora.errors import UserError
from dp_lora.models.diffusion import per_example_loss
from dp_lora.models.folders import load
from dp_lora.models.process import Process, scheduler_of
from tests.builders.architectures import CLASSES, model_of, stable_diffusion

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 1, 250, 500, 998, 999])
SHAPE = (-1, 1, 1, 1)


def process_of(**config: Any) -> Process:
    return Process.of(*scheduler_of(config, "scheduler"))


def _draws() -> tuple[torch.Tensor, torch.Tensor]:
    latents, noise = torch.randn(2, len(T), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return latents, noise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_diffusion_is_that_of_diffusers_ddpm(name: str, prediction: str) -> None:
    process, scheduler = (
        process_of(_class_name=name, prediction_type=prediction, **BETAS),
        DDPMScheduler(**BETAS),
    )
    latents, noise = _draws()
    signal, level = process.levels(T.view(SHAPE), latents)
    noisy = signal * latents + level * noise
    assert torch.allclose(noisy, scheduler.add_noise(latents, noise, T), atol=1e-6)
    wanted = scheduler.get_velocity(latents, noise, T) if prediction == "v_prediction" else noise
    assert torch.allclose(process.target(latents, noise, signal, level), wanted, atol=1e-6)
    assert torch.allclose(process.noise_of(wanted, noisy, signal, level), noise, atol=1e-4)
    assert torch.equal(process.times(T), T)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_that_of_diffusers_flow_matching(shift: float) -> None:
    process = process_of(_class_name="FlowMatchEulerDiscreteScheduler", shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    latents, noise = _draws()
    signal, level = process.levels(T.view(SHAPE), latents)
    times = process.times(T)
    # diffusers counts from the noisiest timestep.
    assert torch.equal(times, scheduler.timesteps[len(scheduler.timesteps) - 1 - T])
    noisy = signal * latents + level * noise
    assert torch.allclose(noisy, scheduler.scale_noise(latents, times, noise), atol=1e-6)
    assert torch.equal(process.target(latents, noise, signal, level), noise - latents)
    assert torch.allclose(process.noise_of(noise - latents, noisy, signal, level), noise, atol=1e-5)


def test_a_flow_may_be_called_by_a_sampler_of_diffusion() -> None:
    """The published Sana."""
    process = process_of(
        _class_name="DPMSolverMultistepScheduler",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )
    assert process.flows
    assert torch.equal(process.table, FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0))


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "ScoreSdeVeScheduler"},
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "EDMDPMSolverMultistepScheduler"},
        {"_class_name": "LCMScheduler"},
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        {"_class_name": None},
        {},
        {"_class_name": "DDPMScheduler", "prediction_type": "sample"},
        {"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": "epsilon"},
        {"_class_name": "DDPMScheduler", "beta_schedule": "other"},
    ],
)
def test_another_process_is_refused_in_one_line(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^model\.pretrained: scheduler") as caught:
        scheduler_of(config, "scheduler")
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize("name", ["ScoreSdeVeScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_pipeline_with_another_process_is_not_loaded(name: str, tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "sd")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UserError, match=rf"^model\.pretrained: .*{name}"):
        load(folder)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_are_those_of_diffusers_scripts(prediction: str) -> None:
    process = process_of(_class_name="DDPMScheduler", prediction_type=prediction, **BETAS)
    gamma, timesteps = 5.0, torch.arange(1000)
    # examples/text_to_image/train_text_to_image_lora.py
    snr = compute_snr(DDPMScheduler(**BETAS), timesteps)
    expected = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    expected = expected / (snr if prediction == "epsilon" else snr + 1)
    assert torch.allclose(process.min_snr_weights(gamma), expected, rtol=1e-4)
    # With zero terminal SNR too, where the script divides by zero.
    ended = process_of(
        _class_name="DDPMScheduler", prediction_type=prediction, rescale_betas_zero_snr=True, **BETAS
    )
    assert ended.min_snr_weights(gamma).isfinite().all()


@pytest.mark.parametrize("shift", [None, 3.0])
def test_timesteps_have_the_distribution_of_diffusers_scripts(shift: float | None) -> None:
    process = process_of(_class_name="FlowMatchEulerDiscreteScheduler")
    assert process.spread("uniform", None) is None
    table = process.spread("logit_normal", shift)
    assert table is not None and torch.equal(table, table.sort().values)
    drawn = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, 0.0, 1.0, generator=torch.Generator().manual_seed(0)
    )
    if shift is not None:
        drawn = shift * drawn / (1 + (shift - 1) * drawn)
    # Kolmogorov's distance of 200,000 draws is above 0.006 with probability 2e-6; the quantiles add 0.001.
    grid = torch.arange(1, 1000) / 1000
    ours = (table[:, None] < (grid * 1000).round()).double().mean(0)
    assert float((ours - (drawn[:, None] < grid).double().mean(0)).abs().max()) < 0.007
    # The broken twin: uniform draws.
    assert float((ours - grid).abs().max()) > 0.05


@torch.inference_mode()
def test_a_model_that_predicts_v_is_trained_on_v(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "sd", "v_prediction")
    model = load(folder, prompt="{}")
    model.new_classes(CLASSES, torch.Generator())
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    generator = torch.Generator().manual_seed(1)
    latents, noise = (
        torch.randn(3, 3, 4, 4, generator=generator),
        torch.randn(3, 2, 3, 4, 4, generator=generator),
    )
    timesteps, labels = torch.tensor([[5, 400], [900, 30], [999, 700]]), torch.arange(3)
    losses = per_example_loss(model, latents, labels, timesteps, noise)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    for i in range(3):
        text = pipe.encode_prompt(CLASSES[i], "cpu", 1, False)[0].expand(2, -1, -1)
        repeated = latents[i : i + 1].expand(2, -1, -1, -1)
        noisy = scheduler.add_noise(repeated, noise[i], timesteps[i])
        predicted = pipe.unet(noisy, timesteps[i], text).sample
        target = scheduler.get_velocity(repeated, noise[i], timesteps[i])
        assert float(losses[i]) == pytest.approx(float((predicted - target).square().mean()), rel=1e-5)
        eps = model.predict_noise(noisy, timesteps[i], labels[i].expand(2))
        # What it was trained on before.
        assert float(losses[i]) != pytest.approx(float((eps - noise[i]).square().mean()), rel=0.05)


@torch.inference_mode()
def test_weights_weigh_each_draw(tmp_path: Path) -> None:
    model = model_of("ldm", tmp_path)
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)
    timesteps, labels = torch.tensor([[5, 400], [900, 30]]), torch.zeros(2, dtype=torch.int64)
    weights = model.process.min_snr_weights(5.0)

    def alone(i: int, j: int) -> torch.Tensor:
        return per_example_loss(
            model, latents[i : i + 1], labels[i : i + 1], timesteps[i : i + 1, j : j + 1],
            noise[i : i + 1, j : j + 1],
        )[0]  # fmt: skip

    weighed = per_example_loss(model, latents, labels, timesteps, noise, weights)
    for i in range(2):
        expected = sum(weights[timesteps[i, j]] * alone(i, j) for j in range(2)) / 2
        assert torch.allclose(weighed[i], torch.as_tensor(expected), rtol=1e-5)
