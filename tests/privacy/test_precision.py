"""Float32 products are full ones where a contribution is added, whatever the caller has set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dp_lora.privacy import gradients
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip
from dp_lora.privacy.precision import full_precision, setting


def by_one_word() -> None:
    torch.set_float32_matmul_precision("medium")


def by_library() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


PRODUCTS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    for one in PRODUCTS:
        one.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def settings() -> list[str]:
    return [one.fp32_precision for one in PRODUCTS]


@pytest.mark.parametrize("fast", [by_one_word, by_library])
def test_what_is_added_is_a_full_product_and_the_setting_stays(
    fast: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, seen = nn.Linear(3, 2), []
    multiply = torch.mm

    def watched(*args: object, **named: object) -> torch.Tensor:
        seen.append(settings())
        return multiply(*args, **named)  # type: ignore[call-overload,no-any-return]

    engine = ClippedGradientSum(layer, Clip(1, 1.0, "flat"))
    fast()
    before = settings()
    assert set(before) <= {"tf32", "bf16"}
    monkeypatch.setattr(gradients.torch, "mm", watched)
    engine.add(layer(torch.ones(4, 3)).sum(1))
    assert seen and all(one == ["ieee", "ieee"] for one in seen)
    assert settings() == before
    engine.detach()


def test_an_error_inside_leaves_the_setting_as_it_was() -> None:
    by_one_word()
    before = settings()
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert settings() == before


def test_a_default_process_keeps_its_setting() -> None:
    with full_precision():
        assert settings() == ["none", "none"] or set(settings()) == {"ieee"}


@pytest.mark.parametrize("fast", [by_one_word, by_library])
def test_the_record_of_a_run_tells_settings_apart(fast: Callable[[], None]) -> None:
    """A process whose products round in another way is another one for the replay of a step."""
    before = setting()
    fast()
    assert before == "highest" != setting()


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [by_one_word, by_library])
def test_no_contribution_passes_c_on_a_gpu(fast: Callable[[], None]) -> None:
    fast()
    layer = nn.Linear(4096, 1024, bias=False).cuda()
    engine = ClippedGradientSum(layer, Clip(2, 1.0, "flat"))
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.rand(2, 3, 4096, generator=generator, device="cuda") + 1
    engine.add(layer(rows).flatten(1).sum(1).view(-1, 2).mean(1))
    assert 1 - 1e-4 <= float(engine.total().norm()) <= 1
    engine.detach()
