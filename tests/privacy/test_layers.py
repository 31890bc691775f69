"""A layer computes under the engine what it computed before, also in the rare ways to call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dp_lora.errors import UserError
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip
from dp_lora.training.private_training import _refuse_wrapped


def adapted_layer(dropout: float = 0.0) -> Any:
    """A LoRA layer, which the engine fuses if it has no dropout."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=dropout)
    return inject_adapter_in_model(config, nn.Sequential(nn.Linear(5, 4)))[0]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_is_one_layer_also_where_it_is_the_whole_module(dropout: float) -> None:
    engine = ClippedGradientSum(adapted_layer(dropout), Clip(1, 1.0, "per_layer"))
    assert engine.num_layers == 1 and len(engine.parameters) == 2


def test_an_adapter_that_is_switched_off_or_merged_is_added_once_or_not_at_all() -> None:
    layer, x = adapted_layer(), torch.randn(3, 5)
    adapted, base = layer(x).detach(), layer.get_base_layer()(x).detach()
    assert not torch.allclose(adapted, base, atol=1e-2)
    engine = ClippedGradientSum(layer, Clip(1, 1.0))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    assert torch.allclose(layer(x), adapted, atol=1e-6)
    layer.merge()
    assert torch.allclose(layer(x), adapted, atol=1e-6)
    engine.detach()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _tensor_parallel(layer: nn.Module) -> nn.Module:
    return parallelize_module(layer, init_device_mesh("cpu", (1,)), ColwiseParallel())


SHARDED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fully_shard": lambda layer: fully_shard(layer, mesh=init_device_mesh("cpu", (1,))),
    "FSDP": lambda layer: FullyShardedDataParallel(
        layer, use_orig_params=True, device_id=torch.device("cpu")
    ),
    "tensor parallelism": _tensor_parallel,
}


@pytest.mark.filterwarnings("ignore")  # of torch, about a group of one
@pytest.mark.parametrize("how", SHARDED)
def test_a_part_that_is_sharded_over_processes_is_refused(how: str, alone: None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    ClippedGradientSum(model, Clip(1, 1.0)).detach()
    model[1][0] = SHARDED[how](model[1][0])  # type: ignore[index]
    with pytest.raises(UserError, match=r"^1\.0.*: is sharded over processes \(FSDP\)") as caught:
        ClippedGradientSum(model, Clip(1, 1.0))
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)
    # Also before a training computes anything.
    with pytest.raises(UserError, match=r"is sharded over processes"):
        _refuse_wrapped(model)
