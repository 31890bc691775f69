"""Gradient checkpointing in every family: the same clipped sum, from less that is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dp_lora.config.schema import LoraConfig
from dp_lora.models import adapters, text_to_image
from dp_lora.models.diffusion import per_example_loss
from dp_lora.models.folders import LatentDiffusion
from dp_lora.models.networks import keep_less
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.layers import is_adapter
from dp_lora.privacy.plan import Clip
from tests.builders import architectures
from tests.builders.families import CAPTIONS, PIPELINES, Draws, draws, model_of, only, with_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BOUND = 1e-5
"""Relative error of the sum: a block that is run again computes what it did."""


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pipelines are written, once."""
    return tmp_path_factory.mktemp("families")


def summed(model: LatentDiffusion, given: Draws, bound: float = math.inf) -> Tensor:
    engine = ClippedGradientSum(model, Clip(given[2].shape[1], bound))
    try:
        engine.add(per_example_loss(model, *given))
    finally:
        engine.detach()
    return engine.total()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Watched:
    """What one forward and backward of a model keeps, in bytes, and how often its adapters are run."""

    def __init__(self, model: LatentDiffusion) -> None:
        self.model, self.kept, self.runs = model, 0, 0
        for layer in filter(is_adapter, model.modules()):
            layer.register_forward_hook(lambda *_: self.count())

    def count(self) -> None:
        self.runs += 1

    def summed(self, given: Draws) -> Tensor:
        def pack(value: Tensor) -> Tensor:
            self.kept += value.nbytes
            return value

        self.kept = self.runs = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            return summed(self.model, given)


@pytest.mark.parametrize(
    ("precision", "computed"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("kind", PIPELINES)
def test_checkpointing_has_the_same_sum_and_keeps_less(
    kind: str, precision: str, computed: str, pipelines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_to_image, "has_bfloat16", lambda device: computed == "bfloat16")
    model = with_adapter(model_of(kind, pipelines, CAPTIONS, precision=precision))
    given, watched = draws(model, len(CAPTIONS), 2), Watched(model)
    expected, kept, runs = watched.summed(given), watched.kept, watched.runs
    assert runs == sum(map(is_adapter, model.modules()))
    keep_less(model.unet)
    assert off(watched.summed(given), expected) < BOUND
    # Blocks with adapters were run twice, and handed each example's gradient over once.
    assert watched.runs > runs and watched.kept < kept
    assert all(p.dtype == torch.float32 for p in adapters.trainable_parameters(model).values())
    lower = {p.dtype for name, p in model.unet.named_parameters() if "lora_" not in name}
    assert (torch.bfloat16 in lower) == (precision == "bfloat16"), "as it was before"
    # Clipped, one example adds at most C, to the last digit: here every one is clipped.
    norms = [float(summed(model, only(given, i)).norm()) for i in range(len(CAPTIONS))]
    bound = min(norms) / 2
    for i in range(len(CAPTIONS)):
        assert 0.999 * bound < float(summed(model, only(given, i), bound).norm()) <= bound


def test_gradients_that_every_run_of_a_block_hands_over_are_told_apart(
    pipelines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(model_of("flux", pipelines, CAPTIONS))
    given = draws(model, len(CAPTIONS), 2)
    expected, put = summed(model, given), ClippedGradientSum.put_products
    keep_less(model.unet)
    assert off(summed(model, given), expected) < BOUND
    # The broken twin: one gradient for each of the two runs.

    def twice(self: ClippedGradientSum, parameter: Tensor, left: Tensor, right: Tensor) -> None:
        put(self, parameter, left, right)
        put(self, parameter, left, right)

    monkeypatch.setattr(ClippedGradientSum, "put_products", twice)
    assert off(summed(model, given), expected) > 0.5


@pytest.mark.parametrize("kind", ["sdxl", "sd35", "flux"])
def test_gradients_with_checkpointing_are_those_of_a_loop_over_single_examples(
    kind: str, pipelines: Path, one_by_one: Callable[..., Tensor]
) -> None:
    model = with_adapter(model_of(kind, pipelines, CAPTIONS))
    given = draws(model, len(CAPTIONS), 4)
    # The loop keeps everything, the engine does not.
    rows = one_by_one(model, lambda i: per_example_loss(model, *only(given, i)), len(CAPTIONS))
    keep_less(model.unet)
    norms = rows.norm(dim=1)
    bound = float(norms.median())
    clipped = (rows * (bound / norms).clamp(max=1.0)[:, None]).sum(0)
    assert off(summed(model, given, bound), clipped.double()) < 1e-4


def test_losses_are_looked_at_twice_from_one_forward(pipelines: Path) -> None:
    model = with_adapter(model_of("sdxl", pipelines, CAPTIONS))
    given = draws(model, len(CAPTIONS), 1)
    expected = summed(model, given)
    keep_less(model.unet)
    engine = ClippedGradientSum(model, Clip(1, math.inf))
    losses = per_example_loss(model, *given)
    engine.refuse_mixed(losses)
    engine.add(losses)
    engine.detach()
    assert off(engine.total(), expected) < BOUND


def test_diffusers_own_checkpointing_of_chroma_reads_padding_as_text(pipelines: Path) -> None:
    """Why it is not used; once this fails, it may be."""
    model = with_adapter(model_of("chroma", pipelines, CAPTIONS))
    given = draws(model, len(CAPTIONS), 2)
    expected = summed(model, given)
    model.unet.enable_gradient_checkpointing()
    assert off(summed(model, given), expected) > 0.01


@pytest.mark.parametrize("kind", architectures.ARCHITECTURES)
def test_the_models_of_one_condition_have_the_same_sum(kind: str, tmp_path: Path) -> None:
    model = architectures.model_of(kind, tmp_path)
    adapters.attach(model, ["lora"], LoraConfig(rank=2), seed=0)
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.02
    shape = (3, *model.latent_shape)
    labels, noise = torch.arange(3) % len(model.classes), torch.randn(3, 2, *shape[1:])
    given = (torch.randn(shape), labels, torch.randint(1000, (3, 2)), noise)
    watched = Watched(model)
    expected, kept = watched.summed(given), watched.kept
    keep_less(model.unet)
    assert off(watched.summed(given), expected) < BOUND
    assert watched.kept < kept
