"""Run directories with what a bill and a dashboard read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dp_lora.storage.files import append_line, write_json

SIGMA, RATE, DELTA = 1.5, 0.1, 1e-5


def make(
    directory: Path,
    steps: int | None = 80,
    *,
    name: str = "mnist5k",
    begun: int | None = None,
    sigma: float = SIGMA,
    seeded: bool = False,
    source: Path | None = None,
    public: bool = False,
) -> Path:
    """A run directory: `steps` of 80 in privacy.json, `begun` in the write-ahead record; None: no file."""
    (directory / "checkpoint").mkdir(parents=True)
    data = {"name": name, "source": None if source is None else str(source), "public": public}
    # JSON is YAML.
    config = {"data": data, "privacy": {"insecure_seed": 3 if seeded else None}}
    (directory / "config.yaml").write_text(json.dumps(config))
    plan = {"noise_multiplier": sigma, "sample_rate": RATE, "delta": DELTA}
    if begun is not None:
        write_json(directory / "checkpoint" / "plan.json", plan)
        for step in range(begun):
            append_line(directory / "checkpoint" / "executions.jsonl", {"step": step, "execution": str(step)})
    if steps is not None:
        told = {"steps": steps, "planned_steps": 80, "complete": steps == 80, "reproducible_noise": seeded}
        write_json(directory / "privacy.json", plan | told)
    return directory


def logged_run(directory: Path, group: str | None = "rank", project: str = "dp-lora", **result: Any) -> Path:
    make(directory)
    config = json.loads((directory / "config.yaml").read_text())
    config["tracking"] = {"project": project, "group": group, "private_loss": False}
    (directory / "config.yaml").write_text(json.dumps(config))
    if result:
        write_json(directory / "result.json", result)
    return directory
