"""The device that a job runs on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.storage.imports import uncollected

if TYPE_CHECKING:
    import torch


def device_of(config: Config) -> torch.device:
    """The device of this process: of several GPUs the one with the process's number on its node.

    Raises UserError when the machine has none.
    """
    with uncollected():
        import torch

    if config.resources.threads is not None:
        torch.set_num_threads(config.resources.threads)
    wanted = config.resources.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "resources.device=cuda: this machine has no GPU that torch can use; expected auto or cpu"
        )
    name = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if name == "cuda" and config.train.precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise UserError("train.precision=bfloat16: this GPU has no bfloat16; expected float32")
    if name == "cuda" and torch.cuda.device_count() > 1:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"resources.processes: process {local + 1} of this node finds {torch.cuda.device_count()} "
                "GPUs; expected one a process"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device(name)
