"""Twelve tiny trainings at a fixed seed, by which two versions of the code are compared.

    python -m tests.builders.same_bits after.json

Run it in two checkouts on one machine and compare the files: what changes no result leaves every digest as it
was. `tests/house/test_same_bits.py` compares what does not depend on the machine with `same_bits.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dp_lora.auditing.canaries import train_with_canaries
from dp_lora.jobs import job as jobs
from dp_lora.jobs import stages
from dp_lora.models import adapters
from dp_lora.models.folders import load
from dp_lora.privacy.randomness import Randomness
from dp_lora.records.tracker import Tracker
from tests.builders.architectures import stable_diffusion
from tests.builders.forked import Nursery
from tests.builders.tiny import TINY, composed, once

SHORT = (
    *TINY, "train.expected_batch_size=20", "train.max_steps=5", "noise_multiplicity=k2", "lora.rank=2",
    "train.checkpoint_minutes=0", "privacy.insecure_seed=7", "stages=[finetune,sample]",
)  # fmt: skip

JOBS: dict[str, tuple[str, ...]] = {
    "lora and embedder": (),
    "lora of every layer, four draws": ("trainable=lora_all", "noise_multiplicity=k4"),
    "norm": ("trainable=norm",),
    "lora and bias, one draw": ("trainable=lora_bias", "noise_multiplicity=k1"),
    "attention": ("trainable=attention",),
    "all weights, automatic clipping": ("trainable=full", "privacy.clipping=automatic"),
    "per_layer clipping and the private loss": ("privacy.clipping=per_layer", "tracking.private_loss=true"),
    "bfloat16 in microbatches of three": ("train.precision=bfloat16", "train.microbatch=3"),
    "interrupted and resumed": ("train.microbatch=5",),
    "two processes": ("train.microbatch=4",),
    "a pipeline": ("trainable=lora_alone", "data.channels=3"),
}
"""The words of each job, after `SHORT`."""

AUDIT = "an audit's canaries"
NAMES = (*JOBS, AUDIT)


def result_of(name: str, folder: Path, cache: Path, nursery: Nursery) -> dict[str, Any]:
    """The digest of all that the training called `name` releases, and some of its numbers.

    Args:
        name: one of `NAMES`.
        folder: an empty folder.
        cache: `paths.cache`.
        nursery: starts the job of two processes.
    """
    if name == AUDIT:
        return _audit(folder, cache)
    given = once(*SHORT, *JOBS[name], *_places(folder, cache))
    if name == "a pipeline":
        given += [f"model.pretrained={stable_diffusion(folder / 'pipeline')}"]
    if name == "two processes":
        ended = nursery.team(given, 2, folder)
        assert [status for status, _ in ended] == [0, 0], ended
    elif name == "interrupted and resumed":
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Tracker, "log", _dies_after(2, Tracker.log))
            with pytest.raises(_Dies):
                stages.run(composed(*given))
        stages.run(composed(*given))
    else:
        stages.run(composed(*given))
    (directory,) = (path.parent for path in folder.rglob("privacy.json"))
    return _released(directory)


def _places(folder: Path, cache: Path) -> list[str]:
    named = {"ledger": "ledger.jsonl", "index": "index", "outputs": "outputs"}
    return [f"paths.cache={cache}", *(f"paths.{key}={folder / name}" for key, name in named.items())]


def _released(directory: Path) -> dict[str, Any]:
    privacy = json.loads((directory / "privacy.json").read_text())
    samples = np.load(directory / "samples.npz")["images"]
    files = (directory / "adapter" / name for name in (adapters.ADAPTER, adapters.TRAINED))
    adapter = [path for path in files if path.exists()]
    hashed = hashlib.sha256(b"".join(path.read_bytes() for path in adapter) + samples.tobytes())
    weights = [value.double().flatten() for path in adapter for value in load_file(path).values()]
    return {
        "digest": hashed.hexdigest(),
        "adapter": float(torch.cat(weights).norm()),
        "epsilon": privacy["epsilon"],
        "noise_multiplier": privacy["noise_multiplier"],
        "samples": float(samples.mean()),
    }


class _Dies(BaseException):
    pass


def _dies_after(steps: int, log: Any) -> Any:
    def call(self: Tracker, step: int, *rest: Any) -> None:
        log(self, step, *rest)
        if step == steps:
            raise _Dies

    return call


def _audit(folder: Path, cache: Path) -> dict[str, Any]:
    config = composed(*once(*SHORT), *_places(folder, cache))
    plan = jobs.plan_of(config, 400)
    model = load(jobs.pretrained_model(config))
    adapters.attach(model, config.trainable.components, config.lora, seed=0)
    key = Randomness.from_seed(1)
    private = folder / "audit"
    found = train_with_canaries(
        config, model, plan, kind="gradient", count=50, randomness=key, folder=private
    )
    return {
        "digest": hashlib.sha256(np.ascontiguousarray(found.scores).tobytes()).hexdigest(),
        "epsilon": plan.epsilon,
        "noise_multiplier": plan.noise_multiplier,
        "scores": float(found.scores[found.included].mean()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    results = {}
    with tempfile.TemporaryDirectory() as place:
        nursery = Nursery(Path(place))
        for number, name in enumerate(NAMES):
            (own := Path(place) / str(number)).mkdir()
            results[name] = result_of(name, own, Path(place) / "cache", nursery)
            print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
        nursery.end()
    Path(sys.argv[1]).write_text(json.dumps(results, indent=2) + "\n")
