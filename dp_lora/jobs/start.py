"""The released adapter that a training starts from, and what was spent on the same images before it.

`train.continue_from=RUN` goes on from a finished run on the same images. `model.adapter=RUN_OR_FOLDER` starts
from an adapter of other images. Both give the trained parameters their first values; optimiser, noise and
batches begin anew, and ledger and budget see an ordinary run.

Guarantee: the statement of the new adapter composes its training with every earlier one on the same images
that it descends from. However the start was named, those are the trainings in the statement of the run, any
ancestor whose number the ledger or the index has for these images or for images that share some with them,
and any whose run directory is still there with a record of just these images. Whoever goes on has seen what
came before, so the composition is that of a Renyi filter (Feldman and Zrnic 2021),
`privacy.ledger.spent_adaptively`. With `privacy.fixed_beforehand` the plans compose as ones that were fixed
before the first of them.

What an adapter without its run was trained on is not known. Then every run counts that the ledger or the
index has on these images when the training begins.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs import ancestry, content
from dp_lora.jobs.ancestry import Training, is_on, kept, name_of, record_of
from dp_lora.jobs.drawing import check_base, digest_of, is_protected, source_of
from dp_lora.jobs.reuse import START
from dp_lora.jobs.spending import Books, admit, charge_of
from dp_lora.privacy.accounting import Spent
from dp_lora.privacy.ledger import FILTER, Charge, spent, spent_adaptively
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.records.run_directory import OUTPUTS, check_records, is_whole, state
from dp_lora.storage.files import private_directory, read_json, write_json
from dp_lora.training.receipts import read_receipt

if TYPE_CHECKING:
    from dp_lora.data.sets import ImageSplits
    from dp_lora.models.latent_diffusion import LatentDiffusion
    from dp_lora.privacy.plan import PrivacyPlan

OTHER_IMAGES = (
    "The adapter that the training started from: its own card states what was spent on the images that it "
    "was trained on."
)
"""A further limit of the statement of a run that started from an adapter of other images."""

UNPROTECTED = (
    "The images behind the adapter that the training started from: that adapter has no privacy guarantee, so "
    "they have none here either."
)
"""The same where that adapter has no guarantee."""


@dataclass(frozen=True)
class Start:
    """The adapter that a training starts from."""

    adapter: Path
    digest: str
    """SHA-256 of its weights."""
    trainings: tuple[Training, ...]
    """That it descends from, the last one last; if that is not known, all on these images."""
    is_known: bool
    """Whether it is known on which images it and all that it descends from were trained."""
    word: str
    """The setting that names it."""
    is_protected: bool = True
    """False where the adapter, by its records or its card, has no privacy guarantee for private images."""

    def described(self) -> str:
        """The start and what the statement counts, for the owner."""
        releases = sum(ancestry.is_release(one) for one in self.before)
        trainings = len(self.before) - releases
        if not self.before:
            return f"{self.adapter}; no earlier training on these images is known"
        counted = f"{trainings} earlier training{'s' * (trainings != 1)}"
        counted += f" and {releases} release{'s' * (releases != 1)}" if releases else ""
        return f"{self.adapter}; {counted} on these images count with this one"

    @property
    def before(self) -> list[Training]:
        """The trainings on the images of the new run, and the releases on images that it trains on."""
        return [one for one in self.trainings if one.counts]


def start_of(
    config: Config, directory: Path, images: ImageSplits, plan: PrivacyPlan, pretrained: Path
) -> Start | None:
    """The adapter that the run in `directory` starts from; None if it starts from the pre-trained model.

    Raises UserError for one that is not there, not finished, of another model, of other images than
    `continue_from` says, or that has changed since the run began.
    """
    given = config.train.continue_from or config.model.adapter
    if given is None:
        return None
    goes_on = config.train.continue_from is not None
    word = f"{'train.continue_from' if goes_on else 'model.adapter'}={given}"
    place = _run_around(Path(given).expanduser())
    if not place.exists() and (directory / OUTPUTS["finetune"]).exists() and _has_begun(directory):
        # What is left to do may not need it; `first_values` does.
        found = read_json(directory / "checkpoint" / START)
        trainings = tuple(kept(directory / "checkpoint"))
        folder, whole, covered = Path(found["folder"]), _knows_all(directory), found.get("protected", True)
        return Start(folder, found["adapter"], trainings, whole, word, covered)
    if place.resolve() == directory.resolve():
        raise UserError(f"{word}: is the directory of this run itself; expected another run")
    try:
        source = source_of(place)
        check_base(source, pretrained)
        if source.run is not None:
            _check_finished(source.run)
            _refuse_winner(source.run)
        elif goes_on:
            raise UserError("the folder of an adapter; expected a run directory, or model.adapter")
    except UserError as error:
        raise UserError(f"{word}: {error}") from error
    _check_settings(config, source.adapter)
    books = _on_these(config, directory, images, plan)
    # An exported folder has its run's settings and statement, and no record of its images.
    run = source.run if source.run is not None and (source.run / "checkpoint").is_dir() else None
    has_record = run is not None and (run / "checkpoint" / content.NAME).exists()
    behind = [] if run is None else ancestry.behind(run, images, books)
    on_these = has_record and is_on(str(run), images)
    if goes_on and not (on_these and behind[-1].same_images):
        raise UserError(
            f"{word}: was trained on other images than these, or has no record of them; expected a run on "
            "the same images, or model.adapter for an adapter of other images"
        )
    is_known = run is not None and has_record and _knows_all(run)
    if not is_known and not _has_begun(directory):
        behind = [*(one for one in books if one.run not in {other.run for other in behind}), *behind]
    if any(one.private and not one.noise_multiplier for one in behind):
        raise UserError(
            f"{word}: what it was trained on is not known, and a private search was made on these images, "
            "which cannot be counted with a training that goes on from it; expected one whose run is there"
        )
    start = Start(source.adapter, digest_of(source.adapter), (), is_known, word, is_protected(source))
    _check_same(start, directory)
    # What was known when the run began stays known.
    known = kept(directory / "checkpoint")
    same = {name_of(one) for one in (*known, *behind) if one.same_images}
    every = {name_of(one): one for one in (*behind, *known)}
    start = replace(
        start, trainings=tuple(replace(one, same_images=name in same) for name, one in every.items())
    )
    _check_relation(start, config)
    if not (directory / OUTPUTS["finetune"]).exists():
        _check_budget(start, config, plan, books)
    return start


def keep(start: Start, folder: Path) -> None:
    """Notes in the private `checkpoint/` of a run that begins what it starts from."""
    path = private_directory(folder) / START
    # Releases that its ancestors made since the run began count as well.
    if not path.exists() or len(kept(folder)) < len(start.trainings):
        trainings = [asdict(one) for one in start.trainings]
        record = {
            "adapter": start.digest,
            "folder": str(start.adapter.absolute()),
            "trainings": trainings,
            "known": start.is_known,
            "protected": start.is_protected,
        }
        write_json(path, record, mode=0o600)


def first_values(
    model: LatentDiffusion, config: Config, classes: Sequence[str], adapter: Path | None
) -> LatentDiffusion:
    """`model`, changed in place, with what is trained chosen and at its first values.

    Args:
        model: pre-trained.
        config: of the run.
        classes: of its private images.
        adapter: the folder of the adapter that it starts from.
    """
    from dp_lora.models import adapter_start, adapters

    with_classes(model, config, classes, adapter)
    adapters.attach(model, config.trainable.components, config.lora, seed=config.seed)
    if adapter is not None:
        adapter_start.start(model, adapter)
    return model


def with_classes(
    model: LatentDiffusion, config: Config, classes: Sequence[str], adapter: Path | None
) -> LatentDiffusion:
    """`model`, changed in place, conditioned on `classes`; see `first_values`."""
    import torch

    from dp_lora.models import adapter_start

    if adapter is not None and not adapter.is_dir():
        raise UserError(f"{adapter}: the adapter that the training started from is missing; put it back")
    if adapter is not None:
        adapter_start.start_classes(model, adapter)
    if model.classes != tuple(classes):
        model.new_classes(classes, torch.Generator().manual_seed(config.seed))
    return model


def adapter_before(run: Path) -> Path | None:
    """The folder of the adapter that a run started from; None if it started from the pre-trained model.

    Raises UserError when it is not there any more, or has changed.
    """
    found = record_of(run)
    if found is None:
        return None
    folder = Path(found["folder"])
    if not folder.is_dir() or digest_of(folder) != found["adapter"]:
        raise UserError(
            f"{folder}: the adapter that this run started from is not there, or has changed; expected it as "
            "it was"
        )
    return folder


def total(start: Start, mechanism: Mechanism, delta: float, *, fixed: bool) -> Spent:
    """Epsilon of `mechanism` and of all earlier trainings on the same images, at `delta`; inf without noise.

    Args:
        start: of the run.
        mechanism: the steps that the run has begun.
        delta: of the run.
        fixed: whether all plans were fixed before the first training began.
    """
    mechanisms = [*(one.mechanism for one in start.before), mechanism]
    # Of one unit, all of them: `_check_relation`.
    charges = [Charge("", "", one, delta, private=one.noise_multiplier > 0) for one in mechanisms]
    if fixed or not all(charge.private for charge in charges):
        return spent(charges, delta)
    return Spent(spent_adaptively(charges, delta), FILTER)


def with_earlier(record: Mapping[str, Any], start: Start, *, fixed: bool) -> dict[str, Any]:
    """The content of privacy.json, in which `epsilon` counts the earlier trainings on the same images too.

    `epsilon_of_this_training` is what the record said before.
    """
    stated = dict(record)
    if not start.is_protected:
        stated["unprotected_start"] = True
        stated["does_not_cover"] = [*record["does_not_cover"], UNPROTECTED]
    elif not start.is_known or any(not one.same_images for one in start.trainings):
        stated["does_not_cover"] = [*record["does_not_cover"], OTHER_IMAGES]
    if not start.before:
        return stated
    mechanism = Mechanism(record["noise_multiplier"], record["sample_rate"], record["steps"])
    found = total(start, mechanism, record["delta"], fixed=fixed)
    # By accountant there is only what this training alone spent.
    del stated["epsilon_by_accountant"]
    return stated | {
        "epsilon": found.epsilon,
        "accountant": found.accountant,
        "private": found.epsilon != float("inf"),
        "reproducible_noise": record["reproducible_noise"]
        or any(not one.private and one.noise_multiplier > 0 for one in start.before),
        "epsilon_of_this_training": record["epsilon"],
        "earlier_trainings": [
            {"noise_multiplier": one.noise_multiplier, "sample_rate": one.sample_rate, "steps": one.steps}
            for one in start.before
        ],
    }


def _check_settings(config: Config, adapter: Path) -> None:
    """Raises UserError where what the run trains is not what the adapter holds."""
    import torch

    from dp_lora.jobs.settings import outline_of
    from dp_lora.models import adapter_start, adapters

    model = copy.deepcopy(outline_of(config))
    with torch.device("meta"):
        adapters.attach(model, config.trainable.components, config.lora, seed=config.seed)
    adapter_start.check_start(adapter, model)


def _check_finished(run: Path) -> None:
    check_records(run)
    privacy = run / "privacy.json"
    complete = privacy.exists() and read_json(privacy).get("complete") is True
    if not complete or not is_whole(run, "finetune"):
        raise UserError(f"the run is {state(run) or 'not finished'}; expected one whose training has ended")


def _refuse_winner(run: Path) -> None:
    if "search" in read_json(run / "privacy.json"):
        raise UserError(
            "the winner of a private search, whose epsilon cannot be counted with a training that goes on "
            "from it; expected an ordinary run"
        )


def _run_around(place: Path) -> Path:
    """The run directory of which `place` is the `adapter/`; itself if it is no such folder."""
    around = place.resolve().parent
    is_inside = place.resolve().name == OUTPUTS["finetune"] and (around / "config.yaml").exists()
    return around if is_inside else place


def _knows_all(run: Path) -> bool:
    """Whether it is known on which images everything that the adapter of `run` descends from was trained.

    An earlier version did not note it.
    """
    found = record_of(run)
    return found is None or found.get("known") is True


def _has_begun(directory: Path) -> bool:
    return (directory / "checkpoint" / START).exists()


def _check_relation(start: Start, config: Config) -> None:
    """Raises UserError where an earlier training protects another unit, or leaves no guarantee here."""
    unit = config.privacy.unit
    if other := next((one.unit for one in start.before if one.unit != unit), None):
        raise UserError(
            f"{start.word}: an earlier training on these images was under privacy.unit={other}; expected "
            f"privacy.unit={other} here, since one epsilon speaks of one unit"
        )
    if config.privacy.adjacency == "add_or_remove" and any(
        one.adjacency == "zero_out" for one in start.before
    ):
        raise UserError(
            f"{start.word}: an earlier training on these images was, or may have been, under "
            "privacy.adjacency=zero_out, whose sample rate and noise follow from the number of images; "
            "expected privacy.adjacency=zero_out here"
        )


def _check_budget(start: Start, config: Config, plan: PrivacyPlan, books: Sequence[Training]) -> None:
    """Raises UserError where earlier trainings that ledger and index do not know leave the budget no room."""
    known = {one.run for one in books}
    missing = [one for one in start.before if not one.run or one.run not in known]
    if config.data.public or not missing:
        return
    mine = charge_of(config, plan, "")
    charges = [
        Charge(f"{number}", mine.private_set, one.mechanism, mine.delta, one.private, one.unit)
        for number, one in enumerate([*books, *missing])
    ]
    admit(config, mine, charges)


def _on_these(config: Config, directory: Path, images: ImageSplits, plan: PrivacyPlan) -> list[Training]:
    """All other runs that ledger or index have on `images`, or on images shared with them."""
    if config.data.public:
        return []
    receipt = read_receipt(directory / "checkpoint")
    mine = charge_of(config, plan, "" if receipt is None else receipt.run)
    return [
        Training(
            run=charge.run,
            noise_multiplier=charge.mechanism.noise_multiplier,
            sample_rate=charge.mechanism.sample_rate,
            steps=charge.mechanism.steps,
            private=charge.private,
            adjacency="zero_out",  # of the two the one that promises less
            unit=charge.unit,
            directory="",
            same_images=True,
        )
        for charge in Books(config, images).others(mine)
        if charge.mechanism.steps
    ]


def _check_same(start: Start, directory: Path) -> None:
    """Raises UserError when the run in `directory` began from other weights."""
    path = directory / "checkpoint" / START
    if not path.exists():
        return
    found = read_json(path)
    if not isinstance(found, dict) or found.get("adapter") != start.digest:
        raise UserError(
            f"{start.word}: the adapter is not the one that this run ({directory}) began with; expected it "
            "as it was, or another paths.outputs for a new run"
        )
