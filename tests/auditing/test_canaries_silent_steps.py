"""Steps on no example: the run's own step, on the run's own model, of which all that is released is noise."""

from __future__ import annotations

import pytest
import torch

from benchmarks.linear_audit import noise_of
from dp_lora.auditing.canaries import silent_noise
from dp_lora.auditing.noise_tests import Verdict
from dp_lora.models import adapters
from dp_lora.models.folders import build
from dp_lora.models.latent_diffusion import LatentDiffusion
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.plan import make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.training import finetune
from tests.builders.tiny import TINY, composed

CONFIG = composed(*TINY, "lora.rank=2")


def _model() -> LatentDiffusion:
    model = build(CONFIG.model, classes=["0", "1"], channels=1, image_size=8)
    adapters.attach(model, ["lora", "embedder"], CONFIG.lora, seed=0)
    return model


def _accused(model: LatentDiffusion, loss_share: float = 0.0) -> tuple[int, tuple[str, ...]]:
    """The number of coordinates that were looked at, and the tests that accuse. Seeded."""
    plan = make_plan(
        num_examples=2000,
        expected_batch_size=1000,
        steps=2,
        noise_multiplier=0.7,
        target_epsilon=None,
        delta=1e-5,
        noise_multiplicity=2,
        max_grad_norm=1e-3,
        loss_share=loss_share,
    )
    noise = silent_noise(CONFIG, model, plan, Randomness.from_seed(1))
    return noise.coordinates, Verdict(noise.p_values()).accused


@pytest.mark.parametrize("loss_share", [0.0, 0.5])
def test_every_trained_coordinate_is_looked_at_and_the_model_left_as_it_was(loss_share: float) -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    coordinates, accused = _accused(model, loss_share)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert coordinates == trained + (loss_share > 0) and accused == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # What the canaries come to is trained on the same model afterwards.
    assert _accused(model, loss_share) == (coordinates, ())


def test_a_loss_without_noise_is_found() -> None:
    """It is one coordinate of all, and the optimiser never sees it."""
    with noise_of(lambda step, noise, before: torch.cat([noise[:-1], torch.zeros(1)]))():
        _, accused = _accused(_model(), 0.5)
    assert accused == ("weakest_tensor", "weakest_trained_coordinate")


def test_a_forgotten_class_embedding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step gives the optimiser a gradient of the embedding to which no noise was added."""
    descend = algorithm.PrivateStep._descend

    def forgets(step: algorithm.PrivateStep, update: torch.Tensor) -> None:
        names = step.sgd.gradients.parameters
        parts = update.split([p.numel() for p in names.values()])
        kept = [part * ("class_embedder" not in name) for name, part in zip(names, parts, strict=True)]
        descend(step, torch.cat(kept))

    monkeypatch.setattr(algorithm.PrivateStep, "_descend", forgets)
    _, accused = _accused(_model())
    assert "weakest_tensor" in accused and "repeated_noise" not in accused


def test_steps_that_are_skipped_are_found_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """They log nothing either, not even the loss."""
    monkeypatch.setattr(finetune.FinetuneStep, "__call__", lambda step, number: {})
    assert _accused(_model(), 0.5)[1] == ("missing_release",)


def test_a_step_of_which_only_some_are_skipped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    call = finetune.FinetuneStep.__call__
    monkeypatch.setattr(
        finetune.FinetuneStep, "__call__", lambda step, number: call(step, number) if number else {}
    )
    assert _accused(_model())[1] == ("missing_release",)


def test_a_frozen_weight_that_moves_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step gives it a gradient, so nothing of it is released."""
    descend = algorithm.PrivateStep._descend

    def moves(step: algorithm.PrivateStep, update: torch.Tensor) -> None:
        descend(step, update)
        frozen = next(p for p in step.sgd.module.parameters() if not p.requires_grad)
        frozen.data += 1e-6

    monkeypatch.setattr(algorithm.PrivateStep, "_descend", moves)
    model = _model()
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    assert _accused(model)[1] == ("unreleased_update",)
    # What is trained is put back.
    assert all(map(torch.equal, before, [p for p in model.parameters() if p.requires_grad]))
