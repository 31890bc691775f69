"""How many steps a training has left, whose plan counts every step that was begun."""

from __future__ import annotations

from dp_lora.errors import UserError
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.plan import PrivacyPlan


def steps_to_finish(plan: PrivacyPlan, executions: Executions, finished: int, lineage: str) -> int:
    """Number of steps after which the run ends: its executions, begun and to come, are the plan's steps.

    It ends earlier when a step begun before turns out to have another sum: see `Executions`.

    Args:
        plan: of the run.
        executions: all that were begun.
        finished: number of steps behind the checkpoint.
        lineage: of the checkpoint's state.

    Raises UserError when all were begun and there is no checkpoint to go on from.
    """
    total = finished + executions.replayable(finished, lineage) + plan.steps - executions.count
    if total < max(1, finished):
        raise spent(executions, finished, plan)
    return total


def spent(executions: Executions, finished: int, plan: PrivacyPlan) -> UserError:
    """The error of a training whose steps were all begun, with nothing to go on from."""
    return UserError(
        f"checkpoint: {executions.count} steps of {plan.steps} were begun and none can be replayed from "
        f"the {finished} that were kept; the privacy of this run is spent. Remove the run directory to "
        "start again, and count what was spent"
    )
