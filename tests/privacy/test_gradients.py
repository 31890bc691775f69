"""Per-example gradients against loops, the bound on a contribution, and what must be refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dp_lora.errors import UserError
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip

PRESETS = ["lora", "lora_everywhere", "lora_embedder", "attention", "embedder", "bias", "norm", "full"]
CLIPPINGS = ["flat", "automatic", "per_layer"]


def single(engine: ClippedGradientSum, losses: Callable[[], Tensor], i: int) -> Tensor:
    """What example i of the microbatch contributes."""
    computed = losses()
    weights = torch.zeros(len(computed))
    weights[i] = 1.0
    engine.reset()
    engine.add(computed, weights)
    return engine.total()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Per-example gradients equal those of a loop


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_equal_a_loop_over_single_examples(
    preset: str, k: int, diffusion: Any, make_batch: Any, one_by_one: Any, example_of: Any
) -> None:
    model, batch = diffusion(preset), make_batch(3, k)
    expected = one_by_one(model, lambda i: model.losses(example_of(batch, i, k), k), 3)
    engine = ClippedGradientSum(model, Clip(k, 1e9))
    for i in range(3):
        assert relative_error(single(engine, lambda: model.losses(batch, k), i), expected[i]) < 1e-5


def adapted(base: nn.Module, **options: Any) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
    return inject_adapter_in_model(config, nn.Sequential(base))


def labels(*shape: int) -> Tensor:
    return torch.randint(0, 5, shape)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear_2d": (lambda: nn.Linear(5, 4), lambda n: torch.randn(n, 5)),
    "linear_3d": (lambda: nn.Linear(5, 4, bias=False), lambda n: torch.randn(n, 7, 5)),
    "linear_4d": (lambda: nn.Linear(5, 4), lambda n: torch.randn(n, 2, 3, 5)),
    "linear_two_tokens": (lambda: nn.Linear(5, 4), lambda n: torch.randn(n, 2, 5)),
    "linear_one_output": (lambda: nn.Linear(5, 1), lambda n: torch.randn(n, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), lambda n: torch.randn(n, 3, 8)),
    "conv1d_1": (lambda: nn.Conv1d(4, 3, 1), lambda n: torch.randn(n, 4, 8)),
    "conv1d_stride": (
        lambda: nn.Conv1d(4, 3, 3, stride=2, dilation=2, padding=1),
        lambda n: torch.randn(n, 4, 9),
    ),
    "conv2d_1": (lambda: nn.Conv2d(3, 4, 1), lambda n: torch.randn(n, 3, 4, 4)),
    "conv2d_2_by_1": (lambda: nn.Conv2d(2, 3, (2, 1)), lambda n: torch.randn(n, 2, 4, 3)),
    "conv2d_1_by_2": (lambda: nn.Conv2d(2, 3, (1, 2)), lambda n: torch.randn(n, 2, 4, 3)),
    "conv2d_1_stride": (lambda: nn.Conv2d(2, 3, 1, stride=(2, 1)), lambda n: torch.randn(n, 2, 4, 3)),
    "conv2d_wider": (lambda: nn.Conv2d(2, 5, 3, padding=1), lambda n: torch.randn(n, 2, 5, 4)),
    "conv2d_1_padded": (lambda: nn.Conv2d(5, 2, 1, padding=1), lambda n: torch.randn(n, 5, 4, 4)),
    "conv2d_3_padded_by_3": (lambda: nn.Conv2d(5, 2, 3, padding=3), lambda n: torch.randn(n, 5, 4, 4)),
    "conv2d_narrower": (lambda: nn.Conv2d(5, 2, 3, padding=1), lambda n: torch.randn(n, 5, 5, 4)),
    "conv2d_unpadded": (lambda: nn.Conv2d(5, 2, (3, 2)), lambda n: torch.randn(n, 5, 5, 4)),
    "conv2d_stride": (lambda: nn.Conv2d(5, 2, 3, stride=2, padding=1), lambda n: torch.randn(n, 5, 6, 6)),
    "conv2d_same": (
        lambda: nn.Conv2d(3, 2, 3, padding="same", dilation=2, bias=False),
        lambda n: torch.randn(n, 3, 6, 6),
    ),
    "embedding": (lambda: nn.Embedding(5, 3), lambda n: labels(n)),
    "embedding_tokens": (lambda: nn.Embedding(5, 3, padding_idx=1), lambda n: labels(n, 6)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), lambda n: torch.randn(n, 4, 3, 3)),
    "layer_norm": (lambda: nn.LayerNorm(4), lambda n: torch.randn(n, 5, 4)),
    "rms_norm": (lambda: nn.RMSNorm(4), lambda n: torch.randn(n, 5, 4)),
    "lora_linear": (lambda: adapted(nn.Linear(5, 4), lora_alpha=3), lambda n: torch.randn(n, 6, 5)),
    "lora_linear_2d": (lambda: adapted(nn.Linear(5, 4, bias=False)), lambda n: torch.randn(n, 5)),
    "lora_bias": (lambda: adapted(nn.Linear(5, 4), lora_bias=True), lambda n: torch.randn(n, 6, 5)),
    "lora_dropout": (
        lambda: adapted(nn.Linear(5, 4), lora_dropout=0.5).eval(),
        lambda n: torch.randn(n, 6, 5),
    ),
    "lora_rs": (lambda: adapted(nn.Linear(5, 4), use_rslora=True), lambda n: torch.randn(n, 6, 5)),
    "lora_conv_1": (lambda: adapted(nn.Conv2d(3, 4, 1), lora_alpha=3), lambda n: torch.randn(n, 3, 4, 4)),
    "lora_conv_3": (lambda: adapted(nn.Conv2d(6, 4, 3, padding=1)), lambda n: torch.randn(n, 6, 4, 4)),
    "lora_conv_stride": (
        lambda: adapted(nn.Conv2d(6, 4, 3, padding=1, stride=2)),
        lambda n: torch.randn(n, 6, 4, 4),
    ),
    "lora_conv1d": (lambda: adapted(nn.Conv1d(6, 4, 3, padding=1)), lambda n: torch.randn(n, 6, 5)),
}


class Twice(nn.Module):
    """Uses one layer twice and shares its weight with another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(torch.tanh(self.first(torch.tanh(self.first(x)))))
        return out


LAYERS["used_twice"] = (Twice, lambda n: torch.randn(n, 3, 4))
LAYERS["used_twice_2d"] = (Twice, lambda n: torch.randn(n, 4))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_each_layer_kind(kind: str, k: int, one_by_one: Any) -> None:
    torch.manual_seed(1)
    build, inputs = LAYERS[kind]
    model, x = build().double(), inputs(3 * k)
    x = x.double() if x.is_floating_point() else x

    def losses(rows: slice = slice(None)) -> Tensor:
        return torch.tanh(model(x[rows])).square().flatten(1).sum(1).view(-1, k).mean(1)

    expected = one_by_one(model, lambda i: losses(slice(i * k, (i + 1) * k)), 3)
    engine = ClippedGradientSum(model, Clip(k, 1e9))
    for i in range(3):
        assert relative_error(single(engine, losses, i), expected[i]) < 1e-12


def test_a_loop_that_takes_the_wrong_rows_is_told_apart(diffusion: Any, make_batch: Any) -> None:
    """The broken twin: draws dealt out to examples in the wrong order."""
    model, k = diffusion(), 3
    batch = make_batch(3, k)
    engine = ClippedGradientSum(model, Clip(k, 1e9))
    right = single(engine, lambda: model.losses(batch, k), 0)
    latents, classes, timesteps, noise = batch
    order = torch.arange(9).view(3, 3).t().flatten()
    dealt = (latents, classes, timesteps[order], noise[order])
    assert relative_error(single(engine, lambda: model.losses(dealt, k), 0), right) > 1e-2


def test_checkpointing_and_modes_change_nothing(diffusion: Any, make_batch: Any) -> None:
    batch, sums = make_batch(3, 2), []
    for checkpointing, training in ((False, True), (False, False), (True, True)):
        model = diffusion(checkpointing=checkpointing).train(training)
        engine = ClippedGradientSum(model, Clip(2, 1e9))
        engine.add(model.losses(batch, 2))
        sums.append(engine.total())
    assert relative_error(sums[1], sums[0]) < 1e-6
    assert relative_error(sums[2], sums[0]) < 1e-6


def test_the_engine_does_not_change_the_forward(diffusion: Any, make_batch: Any) -> None:
    model, batch = diffusion("lora_everywhere"), make_batch(3, 2)
    before = model.losses(batch, 2)
    engine = ClippedGradientSum(model, Clip(2, 1.0))
    during = model.losses(batch, 2)
    engine.detach()
    assert torch.allclose(before, during, rtol=1e-5)
    assert torch.equal(before, model.losses(batch, 2))
    ClippedGradientSum(model, Clip(2, 1.0)).detach()


# One example contributes at most C


def contributions(
    model: Any, batch: tuple[Tensor, ...], k: int, clipping: str, bfloat16: bool, scale: float
) -> list[float]:
    bound = 1e-2
    engine = ClippedGradientSum(model, Clip(k, bound, clipping))

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            computed: Tensor = model.losses(batch, k)
        return scale * computed

    found = [float(single(engine, losses, i).norm()) / bound for i in range(len(batch[0]))]
    engine.detach()
    return found


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_example_contributes_at_most_c(preset: str, k: int, diffusion: Any, make_batch: Any) -> None:
    model, batch = diffusion(preset), make_batch(2, k)
    for clipping in CLIPPINGS:
        found = contributions(model, batch, k, clipping, bfloat16=False, scale=1e4)
        assert max(found) <= 1 + 1e-6
        # The bound is reached: a clip that only shrinks everything would not be the algorithm.
        assert clipping == "per_layer" or min(found) > 0.999


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_example_contributes_at_most_c_in_bfloat16(
    preset: str, k: int, diffusion: Any, make_batch: Any
) -> None:
    model, batch = diffusion(preset), make_batch(2, k)
    found = contributions(model, batch, k, "flat", bfloat16=True, scale=1e4)
    assert max(found) <= 1 + 1e-6 and min(found) > 0.999


@pytest.mark.parametrize("k", [4, 12])
def test_clipping_each_draw_apart_passes_c(k: int, diffusion: Any, make_batch: Any) -> None:
    """The broken twin, as released by others: every draw a row of its own, clipped to C by itself."""
    model = diffusion()
    latents, classes, _, noise = make_batch(1, k)
    aligned = noise[:1].expand(k, -1, -1, -1)
    rows = (latents.expand(k, -1, -1, -1), classes.expand(k), torch.full((k,), 900), aligned)
    engine = ClippedGradientSum(model, Clip(1, 1e-2))
    engine.add(1e4 * model.losses(rows, 1))
    assert float(engine.total().norm()) > 0.99 * k * 1e-2


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_a_batch_split_anywhere_has_the_same_sum(clipping: str, diffusion: Any, make_batch: Any) -> None:
    model, k = diffusion().double(), 4
    batch = make_batch(5, k, dtype=torch.float64)
    engine = ClippedGradientSum(model, Clip(k, 0.05, clipping))
    sums = []
    for edges in ([0, 5], [0, 1, 5], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]):
        engine.reset()
        for a, b in itertools.pairwise(edges):
            latents, classes, timesteps, noise = batch
            part = (latents[a:b], classes[a:b], timesteps[a * k : b * k], noise[a * k : b * k])
            engine.add(model.losses(part, k))
        sums.append(engine.total())
    for other in sums[1:]:
        assert relative_error(other, sums[0]) < 1e-12


def test_removing_an_example_removes_its_contribution_alone(
    diffusion: Any, make_batch: Any, example_of: Any
) -> None:
    model, k, bound = diffusion().double(), 4, 0.05
    batch = make_batch(5, k, dtype=torch.float64)
    engine = ClippedGradientSum(model, Clip(k, bound))
    engine.add(model.losses(batch, k))
    whole = engine.total()
    alone = single(engine, lambda: model.losses(example_of(batch, 2, k), k), 0)
    engine.reset()
    engine.add(model.losses(batch, k), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    without = engine.total()
    assert float((whole - without - alone).norm()) < 1e-12 * bound
    assert float((whole - without).norm()) <= bound * (1 + 1e-6)


def test_bfloat16_stays_close_and_sums_in_float(diffusion: Any, make_batch: Any) -> None:
    batch, sums = make_batch(4, 4), []
    for enabled in (False, True):
        model = diffusion()
        engine = ClippedGradientSum(model, Clip(4, 1e9))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model.losses(batch, 4)
            engine.add(losses)
        sums.append(engine.total())
    assert sums[1].dtype == torch.float64
    assert 1e-6 < relative_error(sums[1], sums[0]) < 0.1


# Padding and gradients that are not finite


def test_padding_contributes_exactly_zero_whatever_it_holds(diffusion: Any, make_batch: Any) -> None:
    model = diffusion()
    latents, classes, timesteps, noise = make_batch(3, 2)
    engine = ClippedGradientSum(model, Clip(2, 0.05))
    weights = torch.tensor([1.0, 1.0, 0.0])
    sums = []
    for content in (latents[2], torch.full_like(latents[2], torch.nan), torch.zeros_like(latents[2])):
        padded = torch.cat([latents[:2], content[None]])
        engine.reset()
        engine.add(model.losses((padded, classes, timesteps, noise), 2), weights)
        sums.append(engine.total())
        assert engine.nonfinite == 0
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
def test_an_example_that_is_not_finite_contributes_zero_and_is_counted(
    poison: float, clipping: str, diffusion: Any, make_batch: Any
) -> None:
    model = diffusion()
    latents, classes, timesteps, noise = make_batch(3, 2)
    engine = ClippedGradientSum(model, Clip(2, 0.05, clipping))
    engine.add(model.losses((latents, classes, timesteps, noise), 2), torch.tensor([1.0, 0.0, 1.0]))
    expected = engine.total()
    poisoned = latents.clone()
    poisoned[1, 0, 0, 0] = poison
    engine.reset()
    engine.add(model.losses((poisoned, classes, timesteps, noise), 2))
    assert torch.equal(engine.total(), expected)
    assert engine.nonfinite == 1
    engine.reset()
    assert engine.nonfinite == 0 and not engine.total().any()


def test_infinite_bound_sums_without_clipping(diffusion: Any, make_batch: Any) -> None:
    model, batch = diffusion(), make_batch(3, 2)
    model.losses(batch, 2).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    for clipping in CLIPPINGS:
        engine = ClippedGradientSum(model, Clip(2, torch.inf, clipping))
        engine.add(model.losses(batch, 2))
        assert relative_error(engine.total(), expected) < 1e-5
        engine.detach()


# What is written


def test_frozen_weights_stay_bit_identical(diffusion: Any, make_batch: Any) -> None:
    model, batch = diffusion(), make_batch(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    engine = ClippedGradientSum(model, Clip(2, 0.05))
    for _ in range(2):
        engine.reset()
        engine.add(model.losses(batch, 2))
        engine.write_gradients(engine.total())
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad
        assert (p.grad is not None) == p.requires_grad


def test_write_gradients_follows_the_order_of_parameters(diffusion: Any) -> None:
    model = diffusion()
    engine = ClippedGradientSum(model, Clip(2, 0.05))
    flat = torch.arange(engine.num_parameters, dtype=torch.float64)
    engine.write_gradients(flat)
    written = torch.cat([p.grad.flatten() for p in engine.parameters.values() if p.grad is not None])
    assert torch.equal(written, flat.float())
    assert list(engine.parameters) == [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="shape"):
        engine.write_gradients(flat[1:])


# What is refused


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_with_batch_statistics_is_refused_even_frozen(layer: nn.Module, training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer.requires_grad_(False)).train(training)
    with pytest.raises(UserError, match=r"^1 \(.*Norm1d\).*mixes the examples"):
        ClippedGradientSum(model, Clip(1, 1.0))
    assert "forward" not in vars(model[0])


class KeepsStatistics(nn.Module):
    def __init__(self, replace: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.replace = replace

    def forward(self, x: Tensor) -> Tensor:
        if self.replace:
            self.mean = x.detach().mean(0)
        else:
            self.mean.mul_(0.9).add_(x.detach().mean(0))
        return x


@pytest.mark.parametrize("replace", [True, False])
def test_a_buffer_that_changes_is_refused(replace: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), KeepsStatistics(replace))
    engine = ClippedGradientSum(model, Clip(1, 1.0))
    with pytest.raises(UserError, match=r"^1\.mean"):
        engine.add(model(torch.randn(3, 4)).sum(1))
    assert not engine.total().any()


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (Raw(), "Raw"),
        (nn.Bilinear(4, 4, 4), "Bilinear"),
        (nn.MultiheadAttention(4, 1), "MultiheadAttention"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (nn.LayerNorm(4, bias=False), "LayerNorm"),
        (nn.Linear(4, 4, dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_a_trainable_layer_without_per_example_gradient_is_refused(layer: nn.Module, named: str) -> None:
    with pytest.raises(UserError, match=rf"^body.*{named}") as refused:
        ClippedGradientSum(nn.ModuleDict({"body": layer}), Clip(1, 1.0))
    assert "\n" not in str(refused.value)


def test_lora_variants_and_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match="DoRA"):
        ClippedGradientSum(adapted(nn.Linear(4, 4), use_dora=True), Clip(1, 1.0))
    with pytest.raises(UserError, match="LoRA on Embedding"):
        ClippedGradientSum(adapted(nn.Embedding(4, 4)), Clip(1, 1.0))
    with pytest.raises(UserError, match="no parameter"):
        ClippedGradientSum(nn.Linear(4, 4).requires_grad_(False), Clip(1, 1.0))
    with pytest.raises(UserError, match="clipping='none'"):
        ClippedGradientSum(nn.Linear(4, 4), Clip(1, 1.0, "none"))


def test_a_trainable_parameter_without_gradient_is_refused() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    engine = ClippedGradientSum(model, Clip(1, 1.0))
    with pytest.raises(UserError, match=r"^idle\.weight: .*no per-example gradient"):
        engine.add(model["used"](torch.randn(3, 4)).sum(1))


def test_a_parameter_used_outside_its_layer_is_refused() -> None:
    model = nn.Linear(4, 4)
    engine = ClippedGradientSum(model, Clip(1, 1.0))
    with pytest.raises(UserError, match=r"^weight: used outside"):
        engine.add(model(torch.randn(3, 4)).sum(1) + (model.weight**2).sum())
    assert not engine.total().any()


def test_losses_and_rows_that_do_not_fit_are_refused() -> None:
    model, x = nn.Linear(4, 4), torch.randn(6, 4)
    engine = ClippedGradientSum(model, Clip(2, 1.0))
    for losses in (model(x).mean(), model(x)):
        with pytest.raises(UserError, match="one value for each example"):
            engine.add(losses)
    with pytest.raises(UserError, match=r"saw 6 rows for 6 losses"):
        engine.add(model(x).sum(1))
    with pytest.raises(UserError, match=r"shape \[3\]: expected \[2\]"):
        engine.add(model(x).sum(1).view(3, 2).mean(1), torch.ones(2))
    with pytest.raises(UserError, match="do not depend"):
        engine.add(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"outside step\.add"):
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match="already replaced"):
        ClippedGradientSum(model, Clip(2, 1.0))
    engine.add(model(x).sum(1).view(3, 2).mean(1))
    assert engine.total().any()


def test_a_copy_of_an_attached_module_computes_with_its_own_weights() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4)
    engine = ClippedGradientSum(model, Clip(1, 1.0))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(x).any() and model(x).all()
    copied(x).sum().backward()
    assert copied[2].bias.grad is not None and copied[2].bias.grad.tolist() == [5.0, 5.0]
    # The copy can have an engine of its own.
    other = ClippedGradientSum(copied, Clip(1, 1.0))
    other.add(copied(x).sum(1))
    other.detach()
    engine.add(model(x).sum(1))
    assert other.total().any() and engine.total().any()


def test_nothing_to_add_for_no_examples() -> None:
    model = nn.Linear(4, 4)
    engine = ClippedGradientSum(model, Clip(2, 1.0))
    engine.add(model(torch.randn(0, 4)).sum(1))
    assert not engine.total().any()
