"""Short trainings that start from one another."""

from __future__ import annotations

from pathlib import Path

from dp_lora.config.schema import Config
from dp_lora.jobs.spending import ledger_beside
from dp_lora.jobs.stages import run
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import read_json

DELTA = 1e-4
SHORT = ("stages=[finetune]", "train.max_steps=3", "privacy.epsilon=4", f"privacy.delta={DELTA}")


def trained(config: Config) -> Path:
    """The directory of the run."""
    return Path(run(config)["directory"])


def mechanism(directory: Path) -> Mechanism:
    """The noisy steps of this training alone, as its plan says them."""
    plan = read_json(directory / "checkpoint" / "plan.json")
    return Mechanism(plan["noise_multiplier"], plan["sample_rate"], plan["steps"])


def counted(directory: Path) -> list[Mechanism]:
    """What the statement of a run counts besides its own training."""
    return [Mechanism(**one) for one in read_json(directory / "privacy.json").get("earlier_trainings", ())]


def on(folder: Path, *words: str) -> list[str]:
    """The words of a job on images of one's own."""
    own = ["data=imagefolder", f"data.source={folder}", "data.image_size=8", "data.channels=1"]
    # A ledger of its own: in one that sets share, runs of one name always count.
    own.append(f"paths.ledger={ledger_beside(str(folder))}")
    return [*SHORT, *own, "train.expected_batch_size=8", "privacy.delta=1e-3", *words]
