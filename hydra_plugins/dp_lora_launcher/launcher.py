"""Hydra's launcher for the jobs of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from dp_lora.config.objective import objective, objectives, refuse_without_objective
from sweeps.cluster.settings import LauncherConfig

if TYPE_CHECKING:
    from sweeps.cluster.cells import Cell


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
        if _is_search(self.config):
            from sweeps.search import launch as search

            search(self.settings, self.config, self.loader, job_overrides)
            return [JobReturn(overrides=list(words), status=JobStatus.COMPLETED) for words in job_overrides]
        cells = compose_cells(self.loader, self.config, job_overrides, initial_job_idx)
        for cell in cells:
            refuse_without_objective(self.config.hydra.sweeper, cell.config)
        launch(self.settings, self.config, cells)
        return [_completed(words, cell) for words, cell in zip(job_overrides, cells, strict=True)]


def _is_search(config: DictConfig) -> bool:
    """Whether the command asks for a private search, which draws its jobs itself."""
    return config.search.space is not None or config.hydra.runtime.choices.get("sweep") == "private_search"


def _completed(words: Sequence[str], cell: Cell) -> JobReturn:
    """What Hydra gets for a job that has ended, or that was only planned: what `optimize` names of it."""
    from dp_lora.records.run_directory import result

    returned = JobReturn(overrides=list(words), status=JobStatus.COMPLETED)
    names = objectives(cell.config)
    returned.return_value = (
        objective(names, result(cell.directory)["metrics"]) if names and cell.is_done() else None
    )
    return returned


ConfigStore.instance().store(group="hydra/launcher", name="dp_lora_schema", node=LauncherConfig)
