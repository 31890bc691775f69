"""The privacy statement of a job: the content of privacy.json."""

from __future__ import annotations

from typing import Any

from dp_lora.jobs import choosing
from dp_lora.jobs.begun import releases_of, stated_release
from dp_lora.jobs.job import Job
from dp_lora.jobs.start import total, with_earlier
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.records.card import no_guarantee
from dp_lora.records.coverage import LIVE, coverage


def epsilon_so_far(job: Job, executions: int, epsilon: float) -> float:
    """Epsilon after so many executions, with the earlier trainings on the same images.

    epsilon: of the executions of this training alone.
    """
    if job.start is None or not job.start.before:
        return epsilon
    mechanism = Mechanism(job.plan.noise_multiplier, job.plan.sample_rate, executions)
    return total(job.start, mechanism, job.plan.delta, fixed=job.config.privacy.fixed_beforehand).epsilon


def privacy_record(job: Job, *, epsilon: float, steps: int, complete: bool) -> dict[str, Any]:
    """The content of privacy.json when `steps` noisy steps were begun, finished or not."""
    secret = job.config.privacy.insecure_seed is None
    record = {
        **job.plan.to_dict(),
        "epsilon": epsilon,
        "steps": steps,
        "planned_steps": job.plan.steps,
        "complete": complete,
        "reproducible_noise": not secret,
    }
    nothing = no_guarantee(record, reproducible_noise=not secret)
    covered, limits = coverage(job.plan.unit)
    if job.choice is not None and job.choice.get("by") == "salient":
        covered = (*covered, choosing.COVERED)
    covers = covered if nothing is None else nothing
    live = (LIVE,) if job.config.tracking.live else ()
    record |= {"covers": covers, "does_not_cover": (*limits, *live)}
    if job.choice is not None:
        record["choice"] = job.choice
    if job.start is not None:
        record = with_earlier(record, job.start, fixed=job.config.privacy.fixed_beforehand)
        record["covers"] = no_guarantee(record, reproducible_noise=record["reproducible_noise"]) or covered
    if stated_release(job.directory) is not None or releases_of(job.directory / "checkpoint"):
        from dp_lora.jobs.release import restated

        record["release"] = restated(record, job.config, job.directory)
    return record
