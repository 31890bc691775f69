"""The matrices among which a run chooses: what scouting opens, and what is left of those not chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dp_lora.config.schema import LoraConfig
from dp_lora.models import adapters, candidates
from dp_lora.models.folders import LatentDiffusion
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.training.finetune import check_engine
from tests.builders.architectures import model_of
from tests.builders.tiny import TINY, composed

KINDS = ("spatial_transformer", "attention_block", "stable_diffusion", "dit")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(
        num_examples=400, expected_batch_size=20, steps=3, noise_multiplier=0.8, delta=1e-4,
        noise_multiplicity=2, max_grad_norm=0.1,
    )  # fmt: skip


def attached(kind: str, pipelines: Path, rank: int = 2, **lora: object) -> LatentDiffusion:
    model = model_of(kind, pipelines)
    adapters.attach(model, ["lora", "embedder"], LoraConfig(rank=rank, **lora), seed=0)  # type: ignore[arg-type]
    return model


def output(model: LatentDiffusion) -> torch.Tensor:
    noisy = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval().predict_noise(noisy, torch.tensor([0, 300, 600, 999]), torch.arange(4) % 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["lora", "matrices"])
def test_scouting_opens_one_matrix_of_each_candidate_which_the_engine_clips(
    what: str, kind: str, pipelines: Path, plan: PrivacyPlan
) -> None:
    """Gradients, sensitivity and padding of what a scouting step releases, on every kind of model."""
    model = attached(kind, pipelines)
    names = candidates.open_for_scouting(model, what)
    opened = adapters.trainable_parameters(model)
    end = ".lora_B.default.weight" if what == "lora" else ".base_layer.weight"
    assert list(opened) == [f"unet.{name}{end}" for name in names] and len(names) > 3
    check_engine(composed(*TINY), model, plan)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_some_matrices_is_what_its_export_restores(
    kind: str, pipelines: Path, tmp_path: Path
) -> None:
    model, plain = attached(kind, pipelines), output(model_of(kind, pipelines))
    chosen = list(candidates.candidates(model))[1::3]
    candidates.keep(model, chosen)
    assert list(candidates.candidates(model)) == chosen
    assert torch.allclose(output(model), plain, atol=1e-6), "B is zero at the start"
    for name, parameter in adapters.trainable_parameters(model).items():
        if ".lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    adapters.export(model, tmp_path, base_model=kind, card="")
    restored = model_of(kind, pipelines)
    adapters.restore(restored, tmp_path, model.classes)
    assert torch.allclose(output(restored), output(model), atol=1e-5)
    listed = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert sorted(listed) == sorted(one for name in chosen for one in adapters.names_in_three(name))


def test_what_is_kept_begins_as_it_would_among_all(pipelines: Path) -> None:
    model, whole = (attached("spatial_transformer", pipelines) for _ in range(2))
    chosen = list(candidates.candidates(model))[::2]
    candidates.keep(model, chosen)
    start = dict(whole.named_parameters())
    kept = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert kept and all(torch.equal(parameter, start[name]) for name, parameter in kept.items())


def test_capped_ranks_of_others_are_forgotten(pipelines: Path) -> None:
    model = attached("spatial_transformer", pipelines, rank=8, cap_rank=True)
    config = model.unet.peft_config["default"]
    capped = list(config.rank_pattern)
    assert capped
    candidates.keep(model, capped[:1])
    assert list(config.rank_pattern) == list(config.alpha_pattern) == capped[:1]
