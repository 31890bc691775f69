"""The time that a sweep will take and the privacy it will spend, before anything runs."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config.identity import pretrained_fingerprint, training_fingerprint
from dp_lora.config.schema import Config, ResourcesConfig
from dp_lora.data.sets import expected_train_size
from dp_lora.errors import UserError
from dp_lora.jobs.job import public_number, steps_of
from sweeps.collect import configuration
from sweeps.folders import read_record, runs

if TYPE_CHECKING:
    from dp_lora.privacy.subsampled_gaussian import Mechanism
    from sweeps.cluster.cells import Cell

RATED = 100
"""Finished runs of an experiment by which hours are estimated, the newest."""


def lines(cells: Sequence[Cell], describe: Callable[[ResourcesConfig], str]) -> list[str]:
    """Every cell with what it asks for and how long it will take, then the privacy of all, and the sum.

    Args:
        cells: of the sweep.
        describe: a request for resources in the words of the cluster.
    """
    outputs = Path(cells[0].config.paths.outputs)
    experiments = sorted({cell.config.experiment for cell in cells})
    measured = [rate for name in experiments for rate in rates(outputs / name)]
    common = set.intersection(*(set(cell.words) for cell in cells)) if len(cells) > 1 else set()
    said, total, unknown = [], 0.0, 0
    trained = set[str]()
    for cell in cells:
        resources = cell.config.resources
        processors = max(1, resources.gpus * resources.nodes)
        training = training_fingerprint(cell.config)
        expected = hours(cell.config, measured, trains=training not in trained)
        trained.add(training)
        if cell.is_done():
            state = "done"
        elif expected is None:
            state, unknown = "to run", unknown + 1
        else:
            state, total = f"to run, {expected * processors:.2f} h", total + expected * processors
        words = " ".join(word for word in cell.words if word not in common) or "defaults"
        said.append(f"{cell.number:>4}  {state:<16} {words}  [{describe(resources)}]")
    kind = "GPU-hours" if any(cell.config.resources.gpus for cell in cells) else "hours"
    known = f"{total:.2f} {kind} by {len(measured)} finished runs" if measured else "no finished run to go by"
    left = f"; {unknown} cells without an estimate" if measured and unknown else ""
    waiting = sum(not cell.is_done() for cell in cells)
    configs = [cell.config for cell in cells]
    taken = len(cells) - len(trained)
    shared = f"; {taken} of them take the training of another cell" if taken else ""
    return [
        *said, *pretrainings(configs), *spending(configs),
        f"{len(cells)} cells, {waiting} to run; {known}{left}{shared}; nothing was submitted",
    ]  # fmt: skip


def pretrainings(configs: Sequence[Config]) -> list[str]:
    """A line on the public models that the sweep makes first; none when all are there."""
    needed = {
        Path(config.paths.cache).expanduser()
        / "models"
        / f"{config.model.name}-{pretrained_fingerprint(config)}"
        for config in configs
        if config.model.pretrained is None
    }
    missing = [folder for folder in needed if not folder.exists()]
    if not missing:
        return []
    return [
        f"pre-trains {len(missing)} public models first, one a seed and public set; model.pretrained=FOLDER "
        "takes one for all"
    ]


def spending(configs: Sequence[Config]) -> list[str]:
    """Lines on what the runs spend, each and all together, one for each private set.

    Runs that differ in sampling or evaluation only are one training.
    Where the settings tell the number of images, the noise is calibrated as the runs will do it and their
    mechanisms are composed. Else, and where a mechanism cannot be, together is by basic composition: epsilons
    and deltas add up at most.

    >>> from dp_lora.config.schema import Config, DataConfig
    >>> spending([Config(data=DataConfig(name="imagefolder"), seed=seed) for seed in (0, 1, 2)])
    ['privacy on imagefolder: 3 runs at epsilon 10; if all are released, at most epsilon 30 at delta 3e-05']
    """
    from dp_lora.jobs.spending import ledger_beside, private_set

    sets: dict[str, list[Config]] = {}
    names: dict[Path, str] = {}
    for config in _trainings(configs):
        if not config.data.public:
            name, source = private_set(config.data.name), config.data.source
            if source is not None:
                # One place is one set, whatever preset reads it.
                name = names.setdefault(ledger_beside(source), name)
            sets.setdefault(name, []).append(config)
    lines = [f"privacy on {name}: {_spent(mine)}" for name, mine in sets.items()]
    if any(config.train.continue_from or config.model.adapter for config in configs):
        lines.append(
            "earlier trainings on the same images, from whose adapters these start, count beside this"
        )
    return [*lines, *_releases(configs)]


def _releases(configs: Sequence[Config]) -> list[str]:
    """A line on the releases on held-out images, which have budgets of their own; none without any."""
    epsilons = [
        config.evaluation.release_epsilon
        for config in configs
        if config.evaluation.release == "dp" and "evaluate" in config.stages and not config.data.public
    ]
    if not epsilons:
        return []
    each = ", ".join(f"{epsilon:g}" for epsilon in sorted(set(epsilons)))
    count = f"{len(epsilons)} release{'s' * (len(epsilons) != 1)}"
    return [
        f"{count} of metrics on held-out images, epsilon {each} each, at most {sum(epsilons):g} together: "
        "for these images, and beside the training for whoever has images in both"
    ]


def _trainings(configs: Sequence[Config]) -> list[Config]:
    """The first configuration of each training, in their order."""
    found: dict[str, Config] = {}
    for config in configs:
        found.setdefault(training_fingerprint(config), config)
    return list(found.values())


def _spent(configs: Sequence[Config]) -> str:
    counts = Counter(config.privacy.epsilon for config in configs)
    parts = [f"{n} run{'s' * (n != 1)} {_target(epsilon)}" for epsilon, n in counts.items()]
    bounded = [
        c
        for c in configs
        if c.privacy.insecure_seed is None and (c.privacy.epsilon is None or math.isfinite(c.privacy.epsilon))
    ]
    others = len(configs) - len(bounded)
    rest = f", and what the other {others} spend" if others and bounded else ""
    return f"{', '.join(parts)}; if all are released, {_together(bounded) or 'what these spend'}{rest}"


def _together(configs: Sequence[Config]) -> str | None:
    """A bound on what these spend together, in words; None where a given noise stands on unknown images.

    None, too, where some protect an image and others a person: the bill says what that comes to.
    """
    from dp_lora.privacy.accounting import composed

    if len({config.privacy.unit for config in configs}) > 1:
        return None

    mechanisms = [_mechanism_of(config) for config in configs]
    if mechanisms and None not in mechanisms:
        delta = min(config.privacy.delta for config in configs)
        spent = composed([m for m in mechanisms if m is not None], delta, _cache(configs[0]))
        return f"epsilon {spent.epsilon:.4g} at delta {delta:g} ({spent.accountant})"
    known = [c.privacy for c in configs if c.privacy.epsilon is not None]
    if not known or len(known) < len(configs):
        return None
    epsilon, delta = sum(p.epsilon or 0.0 for p in known), sum(p.delta for p in known)
    return f"at most epsilon {epsilon:g} at delta {delta:.3g}"


def _mechanism_of(config: Config) -> Mechanism | None:
    """The mechanism of a run; None if only the data would tell, or if the run will be refused."""
    from dp_lora.privacy.plan import mechanism_of

    images = expected_train_size(config.data) if config.privacy.unit == "image" else None
    size = public_number(config, images)
    rate = config.train.sample_rate
    if size is None and rate is None:
        return None
    privacy = config.privacy
    try:
        return mechanism_of(
            num_examples=size,
            sample_rate=rate,
            expected_batch_size=config.train.expected_batch_size,
            steps=steps_of(config, size),
            noise_multiplier=privacy.noise_multiplier,
            target_epsilon=privacy.epsilon,
            delta=privacy.delta,
            cache=_cache(config),
        )
    except UserError:
        return None


def _cache(config: Config) -> Path | None:
    """Where results are kept, if there is one: a plan leaves nothing behind on a machine without."""
    cache = Path(config.paths.cache).expanduser()
    return cache if cache.is_dir() else None


def _target(epsilon: float | None) -> str:
    if epsilon is None:
        return "with a given noise, whose epsilon their privacy.json will say"
    return "without any privacy" if math.isinf(epsilon) else f"at epsilon {epsilon:g}"


def hours(config: Config, measured: Sequence[dict[str, Any]], *, trains: bool = True) -> float | None:
    """Hours that a run of `config` is expected to take; None when nothing comparable was measured.

    Args:
        config: of the run.
        measured: what `rates` returned.
        trains: False if the run takes the training of another one.
    """
    size = draws(config)
    alike = [rate for rate in measured if rate["kind"] == _kind(config)]
    if not alike or size is None:
        return None
    a_draw = float(statistics.median(rate["seconds_per_draw"] for rate in alike))
    rest = float(statistics.median(rate["rest_s"] for rate in alike))
    return (a_draw * size * trains + rest) / 3600


def draws(config: Config) -> float | None:
    """Expected number of (timestep, noise) draws of the training; None when it depends on the data."""
    if config.train.max_steps is None or config.train.epochs is not None:
        return None
    return config.train.max_steps * config.train.expected_batch_size * config.privacy.noise_multiplicity


def rates(experiment: Path) -> list[dict[str, Any]]:
    """The times that the newest `RATED` finished runs of an experiment took.

    `kind` is what makes runs comparable, `seconds_per_draw` is of the training, `rest_s` of all other stages.
    """
    finished = [directory / "result.json" for directory in runs([experiment])]
    newest = sorted((path for path in finished if path.exists()), key=lambda path: path.stat().st_mtime)
    found = []
    for result in newest[-RATED:]:
        directory = result.parent
        privacy, values = directory / "privacy.json", configuration(directory)
        if not (privacy.exists() and values):
            continue
        seconds, spent = read_record(result).get("seconds", {}), read_record(privacy)
        size = spent["steps"] * spent["expected_batch_size"] * spent["noise_multiplicity"]
        if not size or "finetune" not in seconds:
            continue
        resources = values["resources"]
        found.append(
            {
                "kind": (values["model"]["name"], resources["device"], resources["gpus"], resources["nodes"]),
                "seconds_per_draw": seconds["finetune"] / size,
                "rest_s": sum(seconds.values()) - seconds["finetune"],
            }
        )
    return found


def _kind(config: Config) -> tuple[Any, ...]:
    resources = config.resources
    return (config.model.name, resources.device, resources.gpus, resources.nodes)
