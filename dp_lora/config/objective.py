"""The metrics that a job returns to a sweeper that optimises them, such as Optuna's.

A job is trained, and charged, before a sweeper sees what it returned. So a name that the job will not compute
is refused before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from dp_lora.config.schema import DEEP_CLASSIFIERS, Config, EvaluationConfig
from dp_lora.errors import UserError, did_you_mean

INCEPTION = "inception"
"""The extractor over which a Frechet distance is called FID, and the only one with an Inception score."""


def frechet_name(extractor: str, *, infinity: bool = False) -> str:
    """The name of the Frechet distance over `extractor`.

    >>> frechet_name("lite0"), frechet_name("inception"), frechet_name("lite0", infinity=True)
    ('fd_lite0', 'fid', 'fdinf_lite0')
    """
    end = "inf" if infinity else ""
    return f"fid{end}" if extractor == INCEPTION else f"fd{end}_{extractor}"


def metric_names(evaluation: EvaluationConfig) -> list[str]:
    """The metrics of generated images that a job computes, without their baselines."""
    names = [f"accuracy_{name}" for name in evaluation.classifiers]
    if evaluation.release == "dp":
        return names
    if set(DEEP_CLASSIFIERS) <= set(evaluation.classifiers):
        names.append("accuracy_mean")
    for extractor in evaluation.extractors:
        names.append(frechet_name(extractor))
        names += [f"{kind}_{extractor}" for kind in ("kid", "precision", "recall", "density", "coverage")]
        if evaluation.fid_infinity:
            names.append(frechet_name(extractor, infinity=True))
        if extractor == INCEPTION:
            names.append("inception_score")
    return names


def objectives(config: Config) -> list[str]:
    """The metrics that the job returns. Raises UserError for one that it will not compute."""
    given = config.optimize
    names = [given] if isinstance(given, str) else given or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"optimize={given}: expected the name of a metric, a list of them, or null")
    if names and "evaluate" not in config.stages:
        raise UserError(
            f"optimize={given}: stages=[{','.join(config.stages)}] compute no metrics; expected evaluate "
            "among them"
        )
    known = metric_names(config.evaluation)
    for name in names:
        if name not in known:
            raise UserError(
                f"optimize={name}: not computed by this job; expected some of {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    return names


def refuse_without_objective(sweeper: Mapping[str, Any], config: Config) -> None:
    """Refuses a job whose sweeper chooses the next one by a result, if nothing says by which.

    Args:
        sweeper: `hydra.sweeper` of the composed configuration.
        config: of the job.
    """
    if str(sweeper["_target_"]).endswith(".GridSweeper"):
        return
    names = objectives(config)
    if not names:
        raise UserError(
            "optimize=null: hydra/sweeper chooses jobs by the results of earlier ones; expected "
            "optimize=<metric>, such as optimize=accuracy_cnn"
        )
    given = sweeper.get("direction")  # Optuna's
    if given is None:
        return
    directions = [
        str(getattr(one, "name", one)) for one in ([given] if isinstance(given, str | Enum) else given)
    ]
    best = [_direction(name) for name in names]
    if directions != best:
        raise UserError(
            f"hydra.sweeper.direction={_list(directions)} with optimize={_list(names)}: expected "
            f"hydra.sweeper.direction={_list(best)}"
        )


def _direction(name: str) -> str:
    """Whether a larger or a smaller value of a metric is the better one."""
    return "minimize" if name.startswith(("fd", "fid", "kid")) else "maximize"


def _list(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"[{','.join(values)}]"


def objective(names: Sequence[str], metrics: Mapping[str, float]) -> float | tuple[float, ...]:
    """The value of one metric, or the values of several in the order of `names`."""
    values = tuple(float(metrics[name]) for name in names)
    return values[0] if len(values) == 1 else values
