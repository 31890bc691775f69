"""Settings of the launchers, `hydra.launcher.*`; types and defaults are here, conf/hydra/launcher chooses."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from dp_lora.errors import UserError, did_you_mean


@dataclass
class LauncherConfig:
    """How the jobs of a sweep are run. What one job asks for is in `resources`."""

    _target_: str = "hydra_plugins.dp_lora_launcher.launcher.SweepLauncher"
    where: str = "slurm"
    """slurm or local."""
    name: Optional[str] = None  # noqa: UP045 - OmegaConf reads this at run time
    """Folder of the sweep under `<paths.outputs>/sweeps`; null derives one from the command's words."""
    max_parallel: Optional[int] = None  # noqa: UP045
    """Jobs at the same time; null is what the cluster gives, or here as many as its cores and GPUs take."""
    poll_s: float = 10.0
    """Seconds between two looks at the jobs."""
    detach: bool = False
    """Return once everything is submitted; the same command without it watches again."""
    dry_run: bool = False
    """Print what would be submitted and stop."""
    preemption_notice_s: int = 90
    """Seconds before its time limit at which a job is told to save and to be queued again."""
    max_kills: int = 3
    """How often a job whose process was killed from outside is queued again; then it has failed."""
    any_code: bool = False
    """Continue a sweep that was begun with other code."""
    python: Optional[str] = None  # noqa: UP045
    """Shell words that start Python on a node; null takes this one's path."""
    job: str = "dp_lora.jobs.stages:run"
    """module:function that runs a checked configuration; tests put others here."""


PLACES = ("slurm", "local")


def check_launcher(settings: Mapping[str, Any], time_limit_min: int) -> None:
    """Raises UserError for the first setting that cannot be right.

    Args:
        settings: the fields of `LauncherConfig` by name, without `_target_`.
        time_limit_min: the shortest one of the jobs.
    """
    known = [field.name for field in dataclasses.fields(LauncherConfig)]
    for name in settings:
        if name not in known:
            raise UserError(f"hydra.launcher.{name}: no such option{did_you_mean(name, known)}")
    limit_s = 60 * time_limit_min
    notice = settings["preemption_notice_s"]
    expected = {
        "where": (settings["where"] in PLACES, f"one of {', '.join(PLACES)}"),
        "name": (_is(r"(?!\.\.?$)[^/\0]+", settings["name"]), "the name of one folder, or null"),
        "max_parallel": (settings["max_parallel"] is None or settings["max_parallel"] >= 1,
                         "at least 1, or null"),
        "poll_s": (0 < settings["poll_s"] < math.inf, "a number above 0"),
        "preemption_notice_s": (
            notice >= 0 and (settings["where"] != "slurm" or notice < limit_s),
            f"at least 0 and less than the {limit_s} s of resources.time_limit_min={time_limit_min}, or "
            "every job would be told to save when it starts",
        ),
        "max_kills": (settings["max_kills"] >= 0, "at least 0"),
        "python": (_is(r"(?s).*\S.*", settings["python"]), "shell words that start Python, or null"),
        "job": (_is(r"[\w.]+:\w+", settings["job"]), "<module>:<function>"),
    }  # fmt: skip
    for name, (is_right, what) in expected.items():
        if not is_right:
            raise UserError(f"hydra.launcher.{name}={settings[name]}: expected {what}")


def _is(pattern: str, text: str | None) -> bool:
    """Whether the pattern matches the whole text; true where there is none."""
    return text is None or re.fullmatch(pattern, text) is not None
