"""Hydra's launcher for the jobs of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sweeps.cluster.settings import LauncherConfig


class SweepLauncher(Launcher):
    """Runs the jobs by `sweeps.cluster`; its arguments are those of `LauncherConfig`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from sweeps.cluster.cells import Composer

        self.config = config
        self.loader = Composer(hydra_context.config_loader)
        # The sweeper checks all jobs by composing them, with the loader of this context.
        hydra_context.config_loader = self.loader  # type: ignore[assignment]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from sweeps.cluster.cells import compose_cells
        from sweeps.cluster.drive import launch

        setup_globals()
        launch(
            self.settings,
            self.config,
            compose_cells(self.loader, self.config, job_overrides, initial_job_idx),
        )
        return [_completed(words) for words in job_overrides]


def _completed(words: Sequence[str]) -> JobReturn:
    returned = JobReturn(overrides=list(words), status=JobStatus.COMPLETED)
    returned.return_value = None
    return returned


ConfigStore.instance().store(group="hydra/launcher", name="dp_lora_schema", node=LauncherConfig)
