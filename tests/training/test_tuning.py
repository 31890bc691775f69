"""How a step is laid out on its device: by synthetic examples alone, and with the same sums."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_lora.config.schema import LoraConfig, TrainConfig
from dp_lora.errors import UserError
from dp_lora.models import adapters
from dp_lora.models.folders import LatentDiffusion
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip, PrivacyPlan, make_plan
from dp_lora.training import tuning

CPU = torch.device("cpu")


def planned(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "num_examples": 4000, "expected_batch_size": 1000, "steps": 10, "noise_multiplier": 1.0,
        "target_epsilon": None, "delta": 1e-5, "noise_multiplicity": 2, "max_grad_norm": 0.1,
    }  # fmt: skip
    return make_plan(**values | changes)


@pytest.fixture
def trained(model: LatentDiffusion) -> LatentDiffusion:
    adapters.attach(model, ["lora", "embedder"], LoraConfig(rank=2), seed=0)
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.02  # else B is zero and A has no gradient
    return model


def clipped_sum(model: LatentDiffusion, examples: int = 5) -> Tensor:
    engine = ClippedGradientSum(model, Clip(2, 0.1))
    engine.add(tuning.synthetic_losses(model, examples, 2, seed=1)(slice(None)))
    engine.detach()
    return engine.total()


# The microbatch


@pytest.mark.parametrize("most", [1, 2, 100, 1000])
@pytest.mark.parametrize("limit", [1, 2, 3, 9, 64, 100, 777])
def test_the_largest_that_fits_fits_and_is_near_the_limit(limit: int, most: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    found = tuning.largest_that_fits(fits, most)
    assert 1 <= found <= min(limit, most) and max(asked) <= most
    assert found == most if limit >= most else found >= math.floor(0.75 * min(limit, most))
    assert len(asked) <= 16


def test_a_device_without_room_for_one_example_is_one_line() -> None:
    with pytest.raises(UserError, match=r"microbatch=1: not even one example"):
        tuning.largest_that_fits(lambda size: False, 100)


def test_a_cpu_takes_a_fixed_number_of_rows_and_a_quarter_of_the_batch_at_most(
    trained: LatentDiffusion, tmp_path: Path
) -> None:
    def chosen(plan: PrivacyPlan, processes: int = 1, **train: Any) -> int:
        return tuning.choose_microbatch(
            trained, plan, TrainConfig(**train), processes, tmp_path / "run", tmp_path / "cache"
        )

    assert chosen(planned(), microbatch=7) == 7
    assert chosen(planned()) == tuning.ROWS_ON_CPU // 2
    assert chosen(planned(noise_multiplicity=1000)) == 1
    assert chosen(planned(expected_batch_size=40)) == 10 and chosen(planned(expected_batch_size=40), 2) == 5
    assert not (tmp_path / "cache").exists()


def test_a_run_keeps_its_microbatch_on_the_same_kind_of_device(
    trained: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.keep_microbatch(3, CPU, tmp_path)
    assert (tmp_path / "microbatch.json").stat().st_mode & 0o777 == 0o600
    choose = lambda: tuning.choose_microbatch(trained, planned(), TrainConfig(), 1, tmp_path, tmp_path)  # noqa: E731
    assert choose() == 3
    monkeypatch.setattr(tuning, "_name", lambda device: "another device")
    assert choose() == tuning.ROWS_ON_CPU // 2
    monkeypatch.undo()
    (tmp_path / "microbatch.json").write_text("[]")
    assert choose() == tuning.ROWS_ON_CPU // 2


def test_what_fits_is_tried_with_forward_backward_and_clip(
    trained: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    add = ClippedGradientSum.add

    def short_of_memory(self: ClippedGradientSum, losses: Tensor, weights: Tensor | None = None) -> None:
        seen.append(len(losses))
        if len(losses) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(self, losses, weights)

    monkeypatch.setattr(ClippedGradientSum, "add", short_of_memory)
    assert (
        tuning.largest_that_fits(lambda size: tuning.fits(trained, planned(), TrainConfig(), size), 64) == 4
    )
    assert max(seen) == 8
    assert all("forward" not in vars(module) for module in trained.modules()), "the engine is off again"


@pytest.mark.gpu
def test_a_gpu_is_filled_once_and_the_answer_kept(
    trained: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = trained.to("cuda"), planned(num_examples=60_000, expected_batch_size=8_000)
    found = tuning.choose_microbatch(model, plan, TrainConfig(), 1, tmp_path / "run", tmp_path)
    assert 1 <= found <= 2000 and tuning.fits(model, plan, TrainConfig(), found)
    monkeypatch.setattr(tuning, "fits", lambda *args: pytest.fail("asked again"))
    assert tuning.choose_microbatch(model, plan, TrainConfig(), 1, tmp_path / "run", tmp_path) == found


# Layout and compilation


def test_channels_last_has_the_same_sum(trained: LatentDiffusion) -> None:
    before = clipped_sum(trained)
    tuning.arrange(trained, planned(), TrainConfig(channels_last=True), 4)
    assert trained.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert float((clipped_sum(trained) - before).norm() / before.norm()) < 1e-5


def test_frozen_parts_hold_no_trainable_parameter_and_most_of_the_model(trained: LatentDiffusion) -> None:
    parts = list(tuning.frozen_parts(trained.unet))
    inside = [p for part in parts for p in part.parameters()]
    assert not any(p.requires_grad for p in inside) and len({id(p) for p in inside}) == len(inside)
    assert {"ResnetBlock2D", "FeedForward"} <= {type(part).__name__ for part in parts}
    # What is left are the attention layers and the convolutions at both ends.
    whole = sum(p.numel() for p in trained.unet.parameters())
    assert sum(p.numel() for p in inside) > 0.6 * whole


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets torch.compile use a given backend: Inductor takes minutes for what these tests ask."""
    real = nn.Module.compile

    def use(name: Any) -> None:
        monkeypatch.setattr(nn.Module, "compile", lambda self, **options: real(self, backend=name, **options))

    yield use
    torch._dynamo.reset()


COMPILED = dataclasses.replace(TrainConfig(), compile=True)


# torch's own, raised while it traces.
traced = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@traced
def test_compiled_parts_have_the_same_sum(trained: LatentDiffusion, backend: Any) -> None:
    before = clipped_sum(trained)
    backend("aot_eager")
    tuning.arrange(trained, planned(), COMPILED, 4)
    assert any(part._compiled_call_impl is not None for part in tuning.frozen_parts(trained.unet))
    assert float((clipped_sum(trained) - before).norm() / before.norm()) < 1e-5


@traced
def test_a_compiler_that_fails_or_lies_is_one_line(
    trained: LatentDiffusion, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = next(tuning.frozen_parts(trained.unet))
    monkeypatch.setattr(tuning, "frozen_parts", lambda module: [one])

    def failing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    def lying(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(1.5 * out for out in graph(*args))

    backend(failing)
    with pytest.raises(UserError, match=r"train.compile=true: torch cannot compile .*no C\+\+ compiler"):
        tuning.arrange(trained, planned(), COMPILED, 4)
    torch._dynamo.reset()
    backend(lying)
    with pytest.raises(UserError, match=r"train.compile=true: the compiled model's gradients differ"):
        tuning.arrange(trained, planned(), COMPILED, 4)


def test_no_backward_runs_below_the_first_trainable_module(model: LatentDiffusion) -> None:
    adapters.attach(model, ["lora"], LoraConfig(rank=2, target_modules=["attn1.to_q"]), seed=0)
    first = next(i for i, (_, p) in enumerate(model.unet.named_parameters()) if p.requires_grad)
    below = {name for name, _ in list(model.unet.named_parameters())[:first]}
    needs: dict[str, bool] = {}
    for name, module in model.unet.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _module, _inputs, out, name=name: needs.update({name: out.requires_grad})
            )
    tuning.synthetic_losses(model, 2, 1, seed=0)(slice(None))
    assert not needs["conv_in"] and needs["conv_out"]
    assert not any(grad for name, grad in needs.items() if f"{name}.weight" in below)
