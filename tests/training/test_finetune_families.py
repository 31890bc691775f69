"""The private fine-tuning of a tiny pipeline of each family changes the adapter and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dp_lora.models import adapters
from dp_lora.models.latents import Latents
from dp_lora.privacy.plan import make_plan
from dp_lora.training import finetune
from tests.builders import few_bits
from tests.builders.families import CAPTIONS, PIPELINES, model_of
from tests.builders.finetuning import SEEDED, SHORT
from tests.builders.tiny import TINY, composed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize(
    ("precision", "checkpointing"), [("float32", False), ("bfloat16", True), ("nf4", True)]
)
@pytest.mark.parametrize("kind", PIPELINES)
def test_frozen_weights_keep_their_bits(
    kind: str, precision: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_bits.stand_in(monkeypatch)
    words = ("trainable=lora_alone", "train.max_steps=2", f"train.gradient_checkpointing={checkpointing}")
    config = composed(*TINY, *SHORT, SEEDED, *words)
    before = {
        name: value.clone()
        for name, value in model_of(kind, tmp_path, precision=precision).state_dict().items()
    }
    model = model_of(kind, tmp_path, precision=precision)
    adapters.attach(model, config.trainable.components, config.lora, seed=0)
    trained = {name: value.detach().clone() for name, value in adapters.trainable_parameters(model).items()}
    captions, shape = CAPTIONS * 4, (len(CAPTIONS) * 4, *model.latent_shape)
    generator = torch.Generator().manual_seed(1)
    latents = Latents(torch.randn(shape, generator=generator), torch.zeros(shape))
    plan = make_plan(
        num_examples=len(captions), expected_batch_size=10, steps=2, noise_multiplier=0.8,
        target_epsilon=None, delta=1e-4, noise_multiplicity=2, max_grad_norm=0.1,
    )  # fmt: skip
    labels = torch.zeros(len(captions), dtype=torch.int64)
    rows: dict[int, dict[str, float]] = {}
    executed = finetune.finetune(
        config, model, latents, labels, plan, tmp_path / "run", rows.__setitem__, lambda done: None,
        captions=captions,
    )  # fmt: skip
    assert executed == 2 and len(rows) == 2
    again = model.unet.is_gradient_checkpointing or "_LeanBlock" in {
        type(part).__name__ for part in model.unet.modules()
    }
    assert again == checkpointing
    after = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    for name, value in before.items():
        if name.startswith("unet."):
            assert torch.equal(after[name], value), name
        else:
            assert after[name].is_meta, "encoders have left the memory"
    changed = [
        name for name, p in adapters.trainable_parameters(model).items() if not torch.equal(p, trained[name])
    ]
    assert len(changed) == len(trained) > 0
    # What it knows afterwards are the names of its classes.
    assert model.prompts is not None and model.prompts.texts == list(model.classes)  # type: ignore[attr-defined]
