"""The runs that a bill counts: what each of them began on which private set, by its own records."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dp_lora.errors import UserError
from dp_lora.jobs.begun import begun
from dp_lora.jobs.reuse import START, taken
from dp_lora.jobs.spending import is_beside, ledger_beside, private_set
from dp_lora.privacy.ledger import SEARCHED, Charge
from dp_lora.privacy.selection import Search
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.storage.files import read_json
from dp_lora.training.receipts import read_receipt
from sweeps.folders import read_settings


@dataclass(frozen=True)
class Run:
    """A run that began at least one step on private data."""

    owner: str
    """Tells the private sets apart: the name, or for a folder of one's own its ledger."""
    charge: Charge
    releases: tuple[Mechanism, ...] = ()
    """On held-out images, each of which may be of somebody who is in the training too."""
    ledger: Path | None = None
    digest: str | None = None
    checkpoint: Path | None = None
    """The private folder, where it can be read: it tells which steps and releases copies have in common."""
    index: Path | None = None
    """The user's index of images, which knows whether its images are in other sets too."""
    place: Path | None = None
    """The ledger that it was charged to, or would be by its settings."""
    own: bool = False
    """Whether its images are from a place that `data.source` names."""
    beside: bool = False
    """Whether its ledger lies beside them, so that all that is charged there is on one set."""
    copies: tuple[Run, ...] = ()
    """The other copies of its directory, which may be charged to another ledger."""
    earlier: tuple[Charge, ...] = ()
    """The trainings on the same images from whose adapter it started."""

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """All that the run released."""
        return (self.charge.mechanism, *self.releases)

    @property
    def charges(self) -> list[Charge]:
        """One for each of `mechanisms`, with the unit that the run protects."""
        if self.charge.search is not None:
            return [self.charge, *(replace(self.charge, mechanism=m, search=None) for m in self.releases)]
        return [replace(self.charge, mechanism=mechanism) for mechanism in self.mechanisms]


def read(directory: Path) -> Run | None:
    """The run in this directory; None when it has begun no step, or its data is public."""
    try:
        return _read_files(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory}: what this run spent cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); expected the privacy.json and config.yaml of a run"
        ) from error


def _read_files(directory: Path) -> Run | None:
    checkpoint, privacy = directory / "checkpoint", _optional(directory / "privacy.json")
    visible = os.access(checkpoint, os.R_OK | os.X_OK)
    plan = privacy or (_optional(checkpoint / "plan.json") if visible else {})
    steps = _steps(checkpoint, privacy, visible=visible)
    if not plan or not steps:
        if (directory / "adapter").exists():
            raise UserError(
                f"{directory}: holds an adapter and no privacy.json; expected the record of what was spent"
            )
        return None
    receipt = read_receipt(checkpoint) if visible else None
    trained = taken(directory) if visible else None
    if trained is not None:
        # The same run to ledger and bill: its training counts once, and its releases are kept with it.
        receipt = trained.receipt
        if trained.directory.is_dir():
            checkpoint = trained.directory / "checkpoint"
    config = _settings(directory)
    if receipt is None and config["data"]["public"]:
        return None
    name = private_set(config["data"]["name"]) if receipt is None else receipt.private_set
    ledger = Path(receipt.ledger) if receipt is not None and receipt.ledger is not None else None
    source = config.get("data", {}).get("source")
    place = ledger
    if place is None and source is not None and Path(source).expanduser().exists():
        place = ledger_beside(source)
    seeded = privacy["reproducible_noise"] if privacy else config["privacy"]["insecure_seed"] is not None
    mechanism = Mechanism(float(plan["noise_multiplier"]), float(plan["sample_rate"]), steps)
    search = Search.from_dict(privacy["search"]) if "search" in privacy else None
    return Run(
        owner=name if name != "imagefolder" else str(ledger or ledger_beside(config["data"]["source"])),
        charge=Charge(
            receipt.run if receipt is not None else str(directory.resolve()),
            name,
            mechanism if search is None else SEARCHED,
            float(plan["delta"]),
            private=mechanism.noise_multiplier > 0 and not seeded,
            unit=str(plan.get("unit", "image")),
            search=search,
        ),
        # Those of a search are in its charge.
        releases=() if search is not None else _releases(privacy),
        ledger=ledger,
        place=place,
        own=source is not None,
        beside=place is not None and is_beside(place, source),
        digest=receipt.digest if receipt is not None else None,
        checkpoint=checkpoint if visible else None,
        index=Path(receipt.index) if receipt is not None and receipt.index is not None else None,
        earlier=_earlier(directory, name, privacy, visible=visible),
    )


def _earlier(directory: Path, name: str, privacy: Mapping[str, Any], *, visible: bool) -> tuple[Charge, ...]:
    """The trainings on the same images that the adapter of a run descends from, by its own records."""
    path = directory / "checkpoint" / START
    found = read_json(path)["trainings"] if visible and path.exists() else ()
    listed = [one for one in found if one["same_images"]] or privacy.get("earlier_trainings", ())
    return tuple(
        Charge(
            one.get("run") or f"{directory.resolve()} {number}",
            name,
            Mechanism(float(one["noise_multiplier"]), float(one["sample_rate"]), int(one["steps"])),
            float(privacy["delta"]),
            one.get("private", float(one["noise_multiplier"]) > 0),
            str(privacy.get("unit", "image")),
        )
        for number, one in enumerate(listed)
    )


def _settings(directory: Path) -> dict[str, Any]:
    try:
        return read_settings(directory)
    except UserError as error:
        raise ValueError(str(error)) from error


def _steps(checkpoint: Path, privacy: Mapping[str, Any], *, visible: bool) -> int:
    """Number of steps that a run began.

    Without its write-ahead record, which is its owner's, a run that was cut off may have begun one step
    more than privacy.json says.
    """
    if privacy.get("complete", False):
        return int(privacy["steps"])
    if visible and (checkpoint / "executions.jsonl").exists():
        return begun(checkpoint)
    return min(privacy["steps"] + 1, privacy["planned_steps"]) if privacy else 0


def _releases(privacy: Mapping[str, Any]) -> tuple[Mechanism, ...]:
    """Metrics on held-out images within a budget of their own (`evaluation.release=dp`)."""
    release = privacy.get("release")
    if release is None:
        return ()
    # Earlier versions name the last one, in whose run all were alike.
    noise = release.get("noise_multipliers", [release["noise_multiplier"]] * int(release["releases"]))
    return tuple(Mechanism(float(one), 1.0, 1) for one in noise)


def _optional(path: Path) -> dict[str, Any]:
    record = read_json(path) if path.exists() else {}
    if not isinstance(record, dict):
        raise TypeError(f"{path.name}: expected an object, found {type(record).__name__}")
    return record
