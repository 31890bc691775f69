"""A job with a private data set, and the tracker of its run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dp_lora.config.schema import Config, DataConfig, ModelConfig
from dp_lora.records.tracker import Tracker

PUBLIC = DataConfig(name="letters", public=True)


RUN_ID = "0123abcd"


def job(wandb: str = "disabled", **changes: Any) -> Config:
    config = Config(
        data=DataConfig(name="imagefolder", source="/home/dr_who/patients"),
        public_data=DataConfig(name="letters", public=True),
        model=ModelConfig(name="small", pretrained="/home/dr_who/weights"),
    )
    config.tracking.wandb = wandb
    config.tracking.tags = ["rank8", "eps10"]
    return dataclasses.replace(config, **changes)


def open_tracker(directory: Path, config: Config, resume_step: int = 0) -> Tracker:
    return Tracker(directory, config, run_id=RUN_ID, name="lora.rank=8", resume_step=resume_step)


def row(step: int) -> dict[str, float]:
    return {"epsilon": step / 10, "update_norm": 0.5 + step, "signal_to_noise": 0.25, "learning_rate": 1e-2}
