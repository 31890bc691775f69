"""A text-to-image model is trained with captions, and forgets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dp_lora.config.schema import Config
from dp_lora.models import adapters
from dp_lora.models.folders import LatentDiffusion, load
from dp_lora.models.latents import Latents
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.training import finetune
from dp_lora.training.inputs import digest
from tests.builders.architectures import stable_diffusion
from tests.builders.finetuning import SEEDED, SHORT
from tests.builders.tiny import TINY, composed

pytestmark = pytest.mark.usefixtures("unchecked")


def _captioned(folder: Path, captions: list[str], pretrained: Path) -> tuple[torch.Tensor, LatentDiffusion]:
    """The released parameters of a text-to-image model trained with `captions` under a fixed key."""
    config = composed(
        *TINY, *SHORT, SEEDED, "trainable=lora_alone", "train.checkpoint_minutes=0", "train.max_steps=3"
    )
    config.lora.target_modules = ["to_k", "to_v"]
    model = load(pretrained, "a {}")
    model.new_classes(["cat", "dog"], torch.Generator())
    adapters.attach(model, config.trainable.components, config.lora, seed=0)
    for name, parameter in adapters.trainable_parameters(model).items():
        parameter.data += 0.05 * ("lora_B" in name)
    generator = torch.Generator().manual_seed(1)
    latents_ = Latents(
        torch.randn(len(captions), 3, 4, 4, generator=generator), torch.zeros(len(captions), 3, 4, 4)
    )
    plan = make_plan(
        num_examples=len(captions),
        expected_batch_size=len(captions) / 2,
        steps=3,
        noise_multiplier=0.8,
        target_epsilon=None,
        delta=1e-4,
        noise_multiplicity=2,
        max_grad_norm=0.1,
    )
    labels = torch.zeros(len(captions), dtype=torch.int64)
    log: dict[int, dict[str, float]] = {}
    finetune.finetune(
        config, model, latents_, labels, plan, folder, log.__setitem__, lambda done: None, captions=captions
    )
    return torch.cat([p.detach().flatten() for p in adapters.trainable_parameters(model).values()]), model


@pytest.mark.parametrize("count", [20, 200])  # embeddings that are kept, and others
def test_a_caption_is_trained_with_and_forgotten(count: int, tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "sd")
    letters = "abcdefghijklmnopqrstuvwxyz"  # the tokenizer knows these
    captions = [letters[i % 26] + letters[i // 26] for i in range(count)]
    released, model = _captioned(tmp_path / "a", captions, folder)
    assert torch.equal(released, _captioned(tmp_path / "b", captions, folder)[0])
    other = _captioned(tmp_path / "c", ["zz", *captions[1:]], folder)[0]
    same = _captioned(tmp_path / "d", ["aa"] * count, folder)[0]
    assert not torch.equal(released, other) and not torch.equal(released, same)
    # What the model knows afterwards are its classes.
    assert model.prompts is not None and len(model.prompts.ids) == 1 + len(model.classes)
    assert torch.equal(model.prompts.ids[1:], _ids(model, ["a cat", "a dog"]))


def _ids(model: LatentDiffusion, prompts: list[str]) -> torch.Tensor:
    assert model.prompts is not None
    words = {"padding": "max_length", "max_length": 8, "truncation": True, "return_tensors": "pt"}
    ids: torch.Tensor = model.prompts.tokenizer(prompts, **words)["input_ids"]
    return ids


def test_the_engine_is_tried_without_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def look(config: Config, model: LatentDiffusion, plan: PrivacyPlan) -> None:
        assert model.prompts is not None
        seen.append(len(model.prompts.ids))

    monkeypatch.setattr(finetune, "check_engine", look)
    captions = [f"secret {i}" for i in range(20)]
    _, model = _captioned(tmp_path / "run", captions, stable_diffusion(tmp_path / "sd"))
    assert seen == [3]  # the empty prompt and two classes
    assert model.prompts is not None
    assert torch.equal(model.prompts.ids[1:], _ids(model, ["a cat", "a dog"])), "the captions are forgotten"


def test_a_caption_that_changed_is_no_replay(tmp_path: Path) -> None:
    model = load(stable_diffusion(tmp_path / "sd"))
    latents_ = Latents(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    key, labels = Randomness.from_seed(0), torch.zeros(2)
    plan = make_plan(
        num_examples=2, expected_batch_size=1, steps=1, noise_multiplier=1.0, target_epsilon=None,
        delta=1e-4, noise_multiplicity=1, max_grad_norm=0.1,
    )  # fmt: skip
    digests = {digest(model, latents_, labels, plan, key, c) for c in (None, ["a", "b"], ["a", "c"])}
    assert len(digests) == 3
