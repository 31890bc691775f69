"""A job for the launcher that counts: it saves, stops and resumes as a training does, and starts in no time.

`tracking.tags` says what is to happen to which seed, as in `1-raise`. A job that is to `hold` waits after its
third step for `go`, or for the word to leave: so a test acts on a job that has begun and not ended, however
slow the machine is.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dp_lora.config.identity import run_directory
from dp_lora.config.schema import Config
from dp_lora.storage.files import append_line, read_json, write_atomic, write_json
from dp_lora.training.signals import listening

STEP_S = 0.2
GO = "go"


def counted(seed: int, steps: int) -> str:
    """What a job of this seed ends with, whatever happened on the way."""
    state = str(seed)
    for step in range(steps):
        state = hashlib.sha256(f"{state}/{step}".encode()).hexdigest()
    return state


def counting(config: Config, words: Sequence[str]) -> None:
    """Takes `train.max_steps` steps, with a checkpoint after every second one."""
    directory = run_directory(config, words)
    directory.mkdir(parents=True, exist_ok=True)
    saved = directory / "saved.json"
    step, state = read_json(saved) if saved.exists() else (0, str(config.seed))
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    row: dict[str, Any] = {
        "job": f"{array}_{task}",
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "pid": os.getpid(),
        "from": step,
        "rank": os.environ.get("RANK"),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "max_steps": config.train.max_steps,
        "time": time.time(),
    }
    append_line(directory / "starts.jsonl", row)
    fate = dict(tag.split("-") for tag in config.tracking.tags).get(str(config.seed))
    assert config.train.max_steps is not None
    with listening() as requests:
        while step < config.train.max_steps:
            while fate == "hold" and step >= 3 and not ((directory / GO).exists() or requests.leave):
                time.sleep(0.05)
            time.sleep(STEP_S)
            state = hashlib.sha256(f"{state}/{step}".encode()).hexdigest()
            step += 1
            write_atomic(directory / "now", str(step))
            if requests.leave or requests.save or step % 2 == 0:
                write_atomic(saved, json.dumps([step, state]))
            if requests.leave:
                raise requests.leave.error(f"stopped after step {step}")
            if step == 3 and fate not in (None, "hold"):
                _meet(fate)
    (directory / "adapter").mkdir(exist_ok=True)
    privacy = {
        "epsilon": 1.0, "target_epsilon": config.privacy.epsilon, "delta": config.privacy.delta,
        "steps": step, "planned_steps": step, "complete": True, "noise_multiplier": 1.0, "sample_rate": 0.04,
        "expected_batch_size": 60, "noise_multiplicity": config.privacy.noise_multiplicity,
        "reproducible_noise": False,
    }  # fmt: skip
    write_json(directory / "privacy.json", privacy)
    write_atomic(directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_json(directory / "result.json", {"metrics": {"steps": step}, "seed": config.seed, "state": state})
    write_json(directory / "status.json", {"state": "done"})


def _meet(fate: str | None) -> None:
    if fate == "raise":
        raise RuntimeError("no such luck")
    if fate == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "memory":
        taken = bytearray(900 * 2**20)
        taken[::4096] = b"x" * len(taken[::4096])
        time.sleep(20)


def go(directory: Path) -> None:
    """Lets the job of this run directory go on after its third step."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / GO).touch()


def starts(directory: Path) -> list[dict[str, Any]]:
    """One row for each start of the job."""
    path = directory / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
