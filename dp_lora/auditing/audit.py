"""The audit of a finished run: canaries, membership inference, and where what they find is written.

Canaries are trained by themselves, with the run's model and plan and without its private images, so the
lower bound costs no privacy and may be shown. The membership inference is a function of the private images:
it stays with the auditor, and result.json says so. Scores of single images stay in checkpoint/.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dp_lora.auditing.bounds import (
    FALSE_POSITIVES,
    Membership,
    Outcome,
    gaussian_family,
    membership,
    most,
    one_run,
    refutes,
    thresholds,
)
from dp_lora.auditing.canaries import SILENT_STEPS, Trained, silent_noise, train_with_canaries
from dp_lora.auditing.membership import ATTACKS, draw, examples, losses_of
from dp_lora.auditing.noise_tests import (
    FALSE_ALARM,
    SilentNoise,
    Verdict,
    together,
    update_norm_p_values,
)
from dp_lora.auditing.options import Options
from dp_lora.config.load import read_config
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.evaluation.evaluate import PRIVATE_METRICS_NOTE
from dp_lora.jobs.job import Job, prepare
from dp_lora.jobs.stages import finetuned_model, model_before, model_to_train
from dp_lora.models import adapters
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.records.audit_section import with_audit
from dp_lora.records.card import no_guarantee
from dp_lora.records.progress import Progress
from dp_lora.storage.files import (
    file_lock,
    json_ready,
    private_directory,
    read_json,
    read_lines,
    write_atomic,
    write_json,
)

_VERSION = 3
"""The version of what is kept of a training with canaries; under another version it is trained again."""


def audit(directory: Path, options: Options) -> dict[str, Any]:
    """Audits the finished run in `directory` and returns the key `audit` of its result.json.

    Raises:
        UserError: the directory holds no finished run, the run claims nothing, or too little is asked for to
            contradict anything; nothing was written.
    """
    config, claim = _finished_run(directory)
    config.resources.device = options.device
    # None of them runs: what a stage would be refused for is nothing to the audit.
    config.stages = []

    def refuse() -> None:
        raise UserError(f"{directory}: another process is at work on this run; wait for it or stop it")

    private_directory(directory / "checkpoint")
    with file_lock(directory / "checkpoint" / "lock", waiting=refuse):
        job = prepare(config, directory)
        _check_claim(job.plan, claim, directory)
        _check_power(job.plan, options)
        _check_images(job, options)
        norms = _update_norms(directory)
        folder = _folder(job, options)
        silent = _silent(job, folder)
        trained = _trained(job, options, folder)
        noise_test = _noise_test(job, trained, norms, silent)
        record = {**_bounds(job.plan, trained, options), "noise_test": noise_test}
        private = _membership(job, options) if options.images else {}
        return _write(job, {**record, **private})


# What can be audited


def _finished_run(directory: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration and the claim of a finished run that claims something."""
    for name in ("config.yaml", "status.json", "privacy.json", "adapter"):
        if not (directory / name).exists():
            raise UserError(
                f"{directory}: no {name} in it; expected the run directory of a finished dp-lora job"
            )
    try:
        state = read_json(directory / "status.json")["state"]
        claim = dict(read_json(directory / "privacy.json"))
        config = read_config(directory / "config.yaml")
        reproducible = bool(claim["reproducible_noise"])
        nothing = no_guarantee(claim, reproducible_noise=reproducible)
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{directory}: its records cannot be read ({reason}); expected those of dp-lora"
        ) from error
    if state != "done" or not claim.get("complete"):
        raise UserError(
            f"{directory}: the run is {state}; expected a finished one: give its command again first"
        )
    if nothing is not None:
        raise UserError(f"{directory}: {nothing.strip('*.')}; expected a run with a guarantee to audit")
    return config, claim


def _check_claim(plan: PrivacyPlan, claim: dict[str, Any], directory: Path) -> None:
    """Refuses to audit another mechanism than the one that was run."""
    claim = {**claim, "epsilon": claim.get("epsilon_of_this_training", claim["epsilon"])}
    for name in ("noise_multiplier", "sample_rate", "epsilon", "delta"):
        now, then = float(getattr(plan, name)), float(claim[name])
        if not math.isclose(now, then, rel_tol=1e-6):
            raise UserError(
                f"{directory}: privacy.json has {name}={then:g}, its configuration now gives {now:g}: the "
                "private images or the code have changed since; expected the same ones"
            )


def _check_power(plan: PrivacyPlan, options: Options) -> None:
    """Refuses an audit that could show nothing even if every guess were right."""

    def shows_something(canaries: int) -> bool:
        half = canaries // 2
        best = Outcome(half, half, 0, canaries - half)
        if _apart(options):
            return refutes([best] * (1 + len(FALSE_POSITIVES)), plan.mechanism, plan.delta, _each(options))
        return most(canaries, plan.delta, _each(options)) > 0

    if shows_something(options.canaries):
        return
    needed = options.canaries
    while not shows_something(needed) and needed < 1 << 20:
        needed += max(1, needed // 8)
    aim = f"contradict epsilon {plan.epsilon:.4g}" if _apart(options) else "show any epsilon"
    raise UserError(
        f"--canaries={options.canaries}: even if all were guessed right they could not {aim} with a "
        f"confidence of {options.confidence:g}; expected {needed} or more"
    )


def _update_norms(directory: Path) -> dict[int, float]:
    """The norms of the noised updates that the run has logged, by step: released values."""
    try:
        rows = [row for row in read_lines(directory / "metrics.jsonl") if row["stage"] == "finetune"]
        norms = {row["step"]: float(row["update_norm"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory}: metrics.jsonl cannot be read ({error}); expected the one that dp-lora wrote"
        ) from error
    for step, norm in norms.items():
        if not 0 <= norm < math.inf:
            raise UserError(
                f"{directory}: metrics.jsonl: step {step} has update_norm={norm}; expected a finite number, "
                "0 or more"
            )
    return norms


def _check_images(job: Job, options: Options) -> None:
    if options.images and min(examples(job.images.train), examples(job.images.test)) < 2:
        what = "images" if job.images.test.persons is None else "persons"
        raise UserError(
            f"--images={options.images}: the test split of {job.config.data.name} has "
            f"{examples(job.images.test)} {what} to compare with; expected at least 2 (data.test_size), or "
            "--images 0"
        )


def _apart(options: Options) -> bool:
    """Whether the canaries cannot disturb each other, so that each is a trial of its own."""
    return options.kind == "gradient"


def _each(options: Options) -> float:
    """The confidence of each of the two bounds, of which both hold with `options.confidence`."""
    return 1 - (1 - options.confidence) / 2 if _apart(options) else options.confidence


# Canaries


def _bounds(plan: PrivacyPlan, trained: Trained, options: Options) -> dict[str, Any]:
    """The claim and the lower bounds; nothing in it depends on a private image."""
    each = _each(options)
    best = one_run(trained.scores, trained.included, plan.delta, each)
    outcome = Outcome.of(trained.scores, trained.included)
    record = {
        "epsilon": plan.epsilon,
        "delta": plan.delta,
        "epsilon_lower_bound": best.epsilon,
        "contradicted": best.epsilon > plan.epsilon,
        "confidence": options.confidence,
        "kind": options.kind,
        "canaries": options.canaries,
        "most_that_could_be_shown": most(options.canaries, plan.delta, each),
        "guesses": best.guesses,
        "correct": best.correct,
        **asdict(outcome),
    }
    if _apart(options):
        at = thresholds(plan.mechanism, trained.noise_factor)
        outcomes = [Outcome.of(trained.scores, trained.included, threshold) for threshold in at]
        bound = gaussian_family(outcomes, plan.mechanism, plan.delta, each)
        record["epsilon_lower_bound_if_gaussian"] = bound
        record["contradicted"] |= refutes(outcomes, plan.mechanism, plan.delta, each)
        record["scored_for_noise_multiplier"] = trained.noise_factor * plan.noise_multiplier
    return record


def _noise_test(
    job: Job, trained: Trained, norms: Mapping[int, float], silent: Mapping[str, float]
) -> dict[str, Any]:
    """The verdict on all noise; a function of released values and of the canaries' coins."""
    plan = job.plan
    parameters = adapters.count(model_to_train(job))
    released = _dimensions(job, norms, parameters)
    logged = update_norm_p_values(list(norms.values()), released, plan.noise_std / plan.expected_batch_size)
    p_values = together(trained.p_values(), silent, logged)
    record: dict[str, Any] = {
        "noise_multiplier": plan.noise_multiplier,
        "update_norms": len(norms),
        "parameters": parameters,
        "silent_steps": SILENT_STEPS,
    }
    if trained.noise is not None:
        record |= _estimated(plan.noise_multiplier, trained.noise)
    verdict = Verdict(p_values)
    said = {"accused": bool(verdict.accused), "accused_by": list(verdict.accused), "p_value": verdict.p_value}
    return {**said, "false_alarm": FALSE_ALARM, **record, "p_values": p_values}


def _dimensions(job: Job, steps: Iterable[int], parameters: int) -> list[int]:
    """The number of coordinates that each of the `steps` released, from 1: scouting steps have their own."""
    choice = job.choice or {}
    scouted = choice["scout_steps"] if choice.get("by") == "salient" else 0
    return [choice["dimension"] if step <= scouted else parameters for step in steps]


def _estimated(noise_multiplier: float, noise: SilentNoise, confidence: float = 0.95) -> dict[str, Any]:
    interval = [noise_multiplier * end for end in noise.interval(confidence)]
    return {
        "estimated_noise_multiplier": noise_multiplier * noise.ratio(),
        "interval": interval,
        "interval_confidence": confidence,
        "observations": noise.observations,
    }


def _folder(job: Job, options: Options) -> Path:
    """Where the audit is kept; what was kept of another one is gone."""
    folder = job.directory / "checkpoint" / f"audit_{options.kind}"
    settings = json_ready({"version": _VERSION, "canaries": options.canaries, **job.plan.to_dict()})
    if folder.exists() and _settings(folder) != settings:
        shutil.rmtree(folder)
    write_json(private_directory(folder) / "settings.json", settings, mode=0o600)
    return folder


def _silent(job: Job, folder: Path) -> dict[str, float]:
    """The p-values of steps on no example, from `folder` if they have been taken."""
    done = folder / "silent.json"
    if not done.exists():
        # Neither batches nor noise of the training with canaries, whatever its key is.
        randomness = Randomness.from_system().derive("silent steps")
        noise = silent_noise(job.config, model_to_train(job), job.plan, randomness)
        write_json(done, noise.p_values(), mode=0o600)
    return dict(read_json(done))


def _trained(job: Job, options: Options, folder: Path) -> Trained:
    """The outcome of a training with canaries, from `folder` if it has been done."""
    done = folder / "scores.npz"
    if not done.exists():
        _save(done, **_train(job, options, folder).arrays())
        for name in ("key", "executions.jsonl", "state.pt"):
            (folder / name).unlink(missing_ok=True)
    with np.load(done, allow_pickle=False) as saved:
        return Trained.from_arrays(saved)


def _settings(folder: Path) -> Any:
    """The settings of the audit that `folder` was made for; None if a crash came before they were written."""
    path = folder / "settings.json"
    return read_json(path) if path.exists() else None


def _train(job: Job, options: Options, folder: Path) -> Trained:
    config, key = job.config, folder / "key"
    if not key.exists():
        write_atomic(key, Randomness.from_system().key, mode=0o600)
    return train_with_canaries(
        config,
        model_to_train(job),
        job.plan,
        kind=options.kind,
        count=options.canaries,
        randomness=Randomness(key.read_bytes(), secure=True),
        folder=folder,
    )


def _save(path: Path, **arrays: Any) -> None:
    """Writes a private npz file as a whole."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue(), mode=0o600)


# Membership inference


def _membership(job: Job, options: Options) -> dict[str, Any]:
    """How well the adapter tells private training images from others. Private."""
    config = job.config
    parts = [draw(images, options.images, config.seed) for images in (job.images.train, job.images.test)]
    models = model_before(job), finetuned_model(job)
    total = 2 * sum(len(images) for images in parts)
    with Progress(total, "membership", mode=config.tracking.progress, unit="image") as progress:
        members, others = (
            losses_of(images, *models, draws=options.draws, seed=config.seed, progress=progress)
            for images in parts
        )
    _save(
        job.directory / "checkpoint" / "membership.npz",
        members_before=members.before,
        members_after=members.after,
        others_before=others.before,
        others_after=others.after,
    )
    attacks = {
        attack: _shown(membership(members.scores(attack), others.scores(attack), options.confidence))
        for attack in ATTACKS
    }
    sizes: dict[str, int | None] = dict(zip(("members", "others"), map(examples, parts), strict=True))
    if config.privacy.adjacency == "add_or_remove" and not config.data.public:
        # Where the set has fewer images than are asked for, they tell how many.
        sizes = dict.fromkeys(sizes)
    return {
        "membership_inference": {**sizes, "draws": options.draws, "confidence": options.confidence, **attacks}
    }


def _shown(found: Membership) -> dict[str, Any]:
    rates = {
        f"{rate.at:g}": {
            "tpr": rate.tpr,
            "interval": [rate.low, rate.high],
            "false_positives": rate.false_positives,
        }
        for rate in found.rates
    }
    return {
        "auc": found.auc,
        "auc_interval": [found.auc_low, found.auc_high],
        "tpr_at_fpr": rates,
        "roc": _thinned(found.roc),
    }


def _thinned(roc: Sequence[tuple[float, float]], points: int = 101) -> dict[str, list[float]]:
    """The true positive rate at evenly spaced false positive rates: the largest that each allows."""
    fpr, tpr = np.array(roc).T
    at = np.linspace(0, 1, points)
    allowed = np.searchsorted(fpr, at + 1e-12, side="right") - 1
    return {"fpr": np.round(at, 6).tolist(), "tpr": tpr[allowed].tolist()}


# What is written and shown


def _write(job: Job, record: dict[str, Any]) -> dict[str, Any]:
    """Puts the audit into result.json and into the adapter's card, each as a whole."""
    path = job.directory / "result.json"
    if path.exists():
        result = read_json(path)
        before = result.get("audit", {}).get("membership_inference")
        if before is not None:
            record = {**record, "membership_inference": record.get("membership_inference", before)}
        if "membership_inference" in record and not job.config.data.public:
            names = result.get("private_metrics", [])
            result["private_metrics"] = [*names, *({"audit.membership_inference"} - set(names))]
            result["private_metrics_note"] = PRIVATE_METRICS_NOTE
        write_json(path, {**result, "audit": record})
    card = job.directory / "adapter" / "README.md"
    write_atomic(card, with_audit(card.read_text(encoding="utf-8"), record))
    return record
