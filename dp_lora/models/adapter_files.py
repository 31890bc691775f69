"""The files of an adapter that other tools read, beside PEFT's.

| file | read by |
|---|---|
| `pytorch_lora_weights.safetensors` | `load_lora_weights` of a diffusers pipeline |
| `kohya.safetensors` | ComfyUI, AUTOMATIC1111's webui and others that read files of kohya's scripts |

Both hold the same matrices as `adapter_model.safetensors`, under other names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

PIPELINE = "pytorch_lora_weights.safetensors"
KOHYA = "kohya.safetensors"

_KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}


def for_other_tools(
    state: Mapping[str, Tensor], config: Mapping[str, Any], network: nn.Module, folder: Path
) -> None:
    """Writes the adapter of a text-to-image network for diffusers' pipelines and, of a UNet, for kohya's.

    Args:
        state: PEFT's names without a prefix, such as `mid_block...to_q.lora_A.weight`.
        config: the fields of `adapter_config.json`.
        network: that the adapter belongs to.
        folder: where the files go.
    """
    is_unet = isinstance(network, UNet2DConditionModel)
    prefix = "unet." if is_unet else "transformer."
    named = {prefix + name: value.cpu().contiguous() for name, value in state.items()}
    save_tensors(named, folder / PIPELINE, metadata(config, prefix))
    if is_unet:
        save_tensors(_as_kohya(state, config), folder / KOHYA)


def _as_kohya(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The matrices by kohya's names: `lora_unet_<module>.lora_down.weight`, and `.alpha` of each module.

    Its readers scale by alpha over rank, as PEFT does.
    """
    renamed = {}
    for name, value in state.items():
        module, matrix, end = name.rsplit(".", 2)
        key = f"lora_unet_{module.replace('.', '_')}"
        renamed[f"{key}.{_KOHYA[matrix]}.{end}"] = value.cpu().contiguous()
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        renamed[f"{key}.alpha"] = torch.tensor(float(alpha))
    return renamed


def metadata(config: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The rank, alpha and targets in the header of a file, where diffusers looks for them."""
    return {"lora_adapter_metadata": json.dumps({prefix + name: value for name, value in config.items()})}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file that appears whole and that everybody may read, as the umask allows."""
    partial = path.with_name(path.name + ".partial")
    # One entry at most: safetensors writes several in an order that changes from call to call.
    assert header is None or len(header) == 1
    save_file(dict(tensors), partial, metadata=dict(header or {"format": "pt"}))
    # safetensors writes for its owner only; an adapter is there to be given away, like the card beside it.
    partial.chmod(0o666 & ~_umask())
    partial.replace(path)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
