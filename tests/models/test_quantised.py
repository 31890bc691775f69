"""Frozen weights in 8 or 4 bits: what is kept, and gradients of single examples around it."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_lora.config.schema import QUANTISED
from dp_lora.errors import UserError
from dp_lora.models import adapters, quantised
from dp_lora.models.diffusion import per_example_loss
from dp_lora.models.quantised import QuantisedLinear
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip
from tests.builders import few_bits
from tests.builders.families import CAPTIONS, draws, model_of, only, with_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> None:
    few_bits.stand_in(monkeypatch)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pipelines are written, once."""
    return tmp_path_factory.mktemp("families")


def _layer(precision: str) -> tuple[nn.Linear, QuantisedLinear]:
    torch.manual_seed(0)
    layer = nn.Linear(70, 9).requires_grad_(False)
    layer.weight[:2] = 0.0  # as networks begin with
    return layer, QuantisedLinear(layer, precision)


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(("precision", "share", "bytes_each"), [("int8", 0.5 / 127, 1), ("nf4", 0.1520, 0.5)])
def test_a_weight_is_rounded_to_the_nearest_of_its_codes(
    precision: str, share: float, bytes_each: float
) -> None:
    layer, few = _layer(precision)
    blocks = layer.weight if precision == "int8" else nn.functional.pad(layer.weight.flatten(), (0, 10))
    largest = blocks.view(9 if precision == "int8" else -1, 70 if precision == "int8" else 64).abs().amax(1)
    bound = largest[:, None].expand(9, 70) if precision == "int8" else largest.repeat_interleave(64)[:630]
    error = (few.weight - layer.weight).abs()
    assert bool((error <= share * bound.reshape(9, 70) + 1e-7).all()) and float(error.max()) > 0
    assert few.codes.nbytes == bytes_each * layer.weight.numel()
    assert torch.equal(few.weight, few.weight) and few.weight.dtype == torch.float32
    x = torch.randn(3, 70)
    assert torch.equal(few(x), nn.functional.linear(x, few.weight, layer.bias))


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("precision", QUANTISED)
def test_an_example_with_outliers_changes_no_other(precision: str) -> None:
    _, few = _layer(precision)
    x, loud = torch.randn(2, 4, 70), torch.full((1, 4, 70), 1e4)
    alone, beside = x.requires_grad_(), torch.cat([x.detach(), loud]).requires_grad_()
    out, more = few(alone), few(beside)
    assert torch.allclose(more[:2], out, rtol=1e-6, atol=1e-6)
    out.square().sum().backward()
    more.square().sum().backward()
    assert alone.grad is not None and beside.grad is not None
    assert torch.allclose(beside.grad[:2], alone.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("sdxl", "int8"), ("flux", "int8"), ("sdxl", "nf4"), ("flux", "nf4"), ("sd35", "nf4"), ("sana", "nf4")],
)
def test_gradients_around_few_bits_equal_a_loop_over_single_examples(
    kind: str, precision: str, pipelines: Path, one_by_one: Callable[..., Tensor]
) -> None:
    model = with_adapter(model_of(kind, pipelines, CAPTIONS, precision=precision))
    given, examples = draws(model, len(CAPTIONS), 2), len(CAPTIONS)
    few = [layer for layer in model.unet.modules() if isinstance(layer, QuantisedLinear)]
    assert few and not any(type(layer) is nn.Linear for layer in _frozen_linear(model.unet))
    before = {name: value.clone() for name, value in model.unet.state_dict().items() if "lora_" not in name}
    rows = one_by_one(model, lambda i: per_example_loss(model, *only(given, i)), examples)
    exact = model_of(kind, pipelines, CAPTIONS)
    with torch.no_grad():
        rounded, wanted = per_example_loss(model, *given), per_example_loss(with_adapter(exact), *given)
    assert torch.allclose(rounded, wanted, rtol=0.5) and not torch.allclose(rounded, wanted, rtol=1e-6)
    engine = ClippedGradientSum(model, Clip(2, math.inf))
    engine.add(per_example_loss(model, *given))
    error = (engine.total() - rows.sum(0).double()).norm() / rows.sum(0).norm()
    assert float(error) < 2e-5
    engine.detach()
    bound = 0.3 * float(rows.norm(dim=1).min())
    engine = ClippedGradientSum(model, Clip(2, bound))
    for i in range(examples):
        engine.reset()
        engine.add(per_example_loss(model, *only(given, i)))
        assert 0.999 * bound < float(engine.total().norm()) <= bound
    for name, value in before.items():
        assert torch.equal(model.unet.state_dict()[name], value), name
    assert all(p.dtype == torch.float32 for p in adapters.trainable_parameters(model).values())


def _frozen_linear(network: nn.Module) -> list[nn.Module]:
    """Its linear layers without those of the adapters."""
    return [
        layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    ]


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("fused", [True, False])
def test_no_weight_is_kept_for_the_backward(
    fused: bool, pipelines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(model_of("flux", pipelines, CAPTIONS, precision="nf4"))
    shapes = {tuple(layer.weight.shape) for layer in _frozen_linear(model.unet)}  # type: ignore[arg-type]
    kept: list[tuple[int, ...]] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(tuple(value.shape))
        return value

    given = draws(model, len(CAPTIONS), 2)
    engine = ClippedGradientSum(model, Clip(2, math.inf)) if fused else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        losses = per_example_loss(model, *given)
    assert losses.requires_grad and len(kept) > 20
    # An adapter's own matrices have rank 2.
    assert not {shape for shape in kept if len(shape) == 2 and 2 not in shape} & shapes
    assert engine is None or engine.num_layers > 0


@pytest.mark.usefixtures("functions")
def test_an_adapter_trained_in_few_bits_goes_to_the_base_in_full_precision(
    pipelines: Path, tmp_path: Path
) -> None:
    model = with_adapter(model_of("flux", pipelines, CAPTIONS, precision="nf4"))
    adapters.export(model, tmp_path / "adapter", base_model="flux", card="card\n")
    again = model_of("flux", pipelines, CAPTIONS)
    adapters.restore(again, tmp_path / "adapter", CAPTIONS)
    wanted = with_adapter(model_of("flux", pipelines, CAPTIONS))
    given = draws(model, 2, 1)
    with torch.no_grad():
        assert torch.equal(per_example_loss(again, *given), per_example_loss(wanted, *given))


@pytest.mark.usefixtures("functions")
def test_copies_share_the_codes(pipelines: Path) -> None:
    model = model_of("flux", pipelines, CAPTIONS, precision="int8")
    copied = model.sharing_weights()
    found = dict(copied.unet.named_parameters())
    for name, parameter in model.unet.named_parameters():
        assert found[name].data_ptr() == parameter.data_ptr(), name


def test_without_the_package_one_line_says_so(pipelines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ModuleNotFoundError("No module named 'bitsandbytes'")
        return known(name, *rest)

    monkeypatch.setattr(quantised.importlib, "import_module", absent)
    with pytest.raises(
        UserError, match=r"^model.base_precision=nf4: needs the package bitsandbytes"
    ) as caught:
        model_of("flux", pipelines, precision="nf4")
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.usefixtures("functions")
def test_the_stand_in_is_what_the_package_computes() -> None:
    """Where bitsandbytes is not installed this compares the functions with themselves."""
    known, weight = quantised.functions("nf4"), torch.randn(6, 70)
    codes, scales = known.int8_vectorwise_quant(weight)[:2]
    wanted = few_bits.int8_vectorwise_quant(weight)
    assert torch.equal(codes, wanted[0]) and torch.equal(scales, wanted[1])
    packed, state = known.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, theirs = few_bits.quantize_4bit(weight, 64, "nf4"), packed.view(-1, 1)
    assert torch.equal(ours[0], theirs) and torch.allclose(ours[1].absmax, state.absmax)
