"""Settings of the launchers, `hydra.launcher.*`; types and defaults are here, conf/hydra/launcher chooses."""

from dataclasses import dataclass
from typing import Optional

from hydra.core.config_store import ConfigStore


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


ConfigStore.instance().store(group="hydra/launcher", name="dp_lora_schema", node=LauncherConfig)
