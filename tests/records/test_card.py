"""The card claims what was spent, never less; says when there is nothing to claim; and its code runs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from dp_lora.records.card import TextToImage, model_card, no_guarantee
from dp_lora.records.coverage import COVERS, DOES_NOT_COVER
from tests.builders.statement import RECORD


def card(record: dict[str, Any] = RECORD, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "base_model": "letters32",
        "data_name": "mnist5k",
        "trainable": ["lora", "embedder"],
        "rank": 8,
        "target_modules": ["to_q", "to_out.0"],
        "parameters": 20480,
        "versions": {"peft": "0.21.2", "absent": None},
    }
    return model_card(record, **(arguments | changes))


def front_matter_and_text(text: str) -> tuple[dict[str, Any], str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body.lstrip("\n")


def test_the_front_matter_is_what_the_hub_reads() -> None:
    front, _ = front_matter_and_text(card(base_model="owner/a.b-1", license_name="apache-2.0"))
    assert front["library_name"] == "peft"
    assert front["base_model"] == "owner/a.b-1"
    assert front["license"] == "apache-2.0"
    assert "differential-privacy" in front["tags"]


@pytest.mark.parametrize("base_model", ["ldm32", "pets-0a1b2c3d", "a: 'b'", "/home/me/sd", "owner/a/b"])
def test_a_base_model_that_is_not_on_the_hub_is_not_in_the_front_matter(base_model: str) -> None:
    """The hub refuses a card whose base_model is none of its names."""
    front, text = front_matter_and_text(card(base_model=base_model))
    assert "base_model" not in front and f"# Adapter of {base_model} " in text


@pytest.mark.parametrize("text", [None, TextToImage("a `red` {}", ("arctic fox", "`"), captions=True)])
def test_the_hub_s_client_reads_the_card(text: TextToImage | None) -> None:
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import validate_repo_id

    data = ModelCard(card(base_model="owner/name", license_name="mit", text=text)).data
    validate_repo_id(data.base_model)
    assert data.license == "mit" and data.library_name == ("peft" if text is None else "diffusers")
    assert data.pipeline_tag == (None if text is None else "text-to-image")
    assert all(isinstance(tag, str) for tag in data.tags) and "differential-privacy" in data.tags


def test_the_card_of_a_text_to_image_adapter_names_prompt_and_classes() -> None:
    text = card(text=TextToImage("a `red` {}", ("arctic fox", "`"), captions=True))
    assert "`` a `red` {} ``, such as `` a `red` arctic fox ``" in text
    assert "Classes: `arctic fox`, `` ` ``." in text and "a caption of each image" in text
    assert "Prompts" not in card()


def test_the_card_says_in_plain_words_which_sets_are_neighbours() -> None:
    zero_out = "zero out one image, the number of images is public, Poisson sampling"
    text = card({**RECORD, "adjacency": zero_out})
    assert zero_out in text and "The number of training images is public." in text
    assert "number of training images is public." not in card() and "which is in one of them only" in card()


def test_the_card_states_the_guarantee_and_its_limits() -> None:
    _, text = front_matter_and_text(card())
    for needed in (
        "(10, 1e-05)-differential privacy",
        "| accountant | prv |",
        "add or remove one image",
        "| noise multiplier (sigma) | 4.554 |",
        "| epsilon by rdp | 10.5 |",
        "LoRA of rank 8 on `to_q`, `to_out.0`",
        "20,480",
        "peft 0.21.2",
        *COVERS,
        *DOES_NOT_COVER,
    ):
        assert needed in text, needed
    assert "NO privacy" not in text
    assert "absent" not in text


@pytest.mark.parametrize("epsilon", [9.99961, 0.123401, 1.00001, 3.0, 7.89999999, 123.45601, 2])
def test_a_stated_epsilon_is_never_below_the_spent_one(epsilon: float) -> None:
    stated = re.search(r"\*\*\(([^,]+),", card(RECORD | {"epsilon": epsilon}))
    assert stated is not None
    assert epsilon <= float(stated[1]) <= epsilon * 1.001


@pytest.mark.parametrize(
    ("record", "reproducible", "reason"),
    [
        (RECORD | {"epsilon": math.inf}, False, "without noise"),
        (RECORD | {"epsilon": "inf"}, False, "without noise"),
        (RECORD | {"epsilon": None}, False, "without noise"),
        (RECORD, True, "reproducible noise"),
    ],
)
def test_without_a_guarantee_the_first_line_says_so_and_none_is_claimed(
    record: dict[str, Any], reproducible: bool, reason: str
) -> None:
    front, text = front_matter_and_text(card(record, reproducible_noise=reproducible))
    first = text.splitlines()[0]
    assert "NO privacy guarantee" in first
    assert reason in first
    assert "differential-privacy" not in front["tags"]
    assert "differential privacy" not in text
    assert "covers" not in text
    assert no_guarantee(record, reproducible_noise=reproducible) == first
    assert no_guarantee(RECORD) is None


def test_the_number_of_private_images_is_not_printed() -> None:
    text = card(RECORD | {"sample_rate": 1000 / 4003, "private_examples": 4003})
    assert "4003" not in text
    assert "4,003" not in text
    assert "| sample rate (Poisson) | 0.2498 |" in text


def test_the_loading_code_of_the_card_loads_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "base" / "unet")
    adapted = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    code = re.search(r"```python\n(.*?)```", card(base_model=str(tmp_path / "base")), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path / "adapter")
    loaded: dict[str, Any] = {}
    exec(code[1], loaded)
    inputs = (torch.randn(1, 2, 4, 4), torch.tensor(3), torch.randn(1, 1, 8))
    with torch.no_grad():
        expected = adapted.eval()(*inputs).sample
        torch.testing.assert_close(loaded["unet"](*inputs).sample, expected)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(*inputs).sample, expected, atol=1e-3)


def test_without_lora_the_card_names_another_way_to_load() -> None:
    text = card(rank=None, trainable=["bias"])
    assert "PeftModel" not in text
    assert "load_state_dict" in text
