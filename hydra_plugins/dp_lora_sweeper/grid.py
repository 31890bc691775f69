"""The sweeper: Hydra's own, which makes products, with cells for what is no product."""

import copy
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import open_dict

from dp_lora.config.load import from_omegaconf
from dp_lora.errors import UserError
from sweeps.grid import check_sweep, choices_of, jobs


@dataclass
class GridConfig:
    """`hydra.sweeper.*`."""

    _target_: str = "hydra_plugins.dp_lora_sweeper.grid.GridSweeper"
    max_batch_size: Optional[int] = None  # noqa: UP045 - OmegaConf reads this at run time
    """Jobs that are launched together; null: all."""
    params: Optional[dict[str, str]] = None  # noqa: UP045
    """Values by name, with commas: every combination of them is a job."""
    cells: list[str] = field(default_factory=list)
    """The words of a command line each; every cell with every combination of `params` is a job."""


class GridSweeper(BasicSweeper):
    """Hydra's sweeper for products, and for cells; see `GridConfig` and `sweeps.grid.jobs`."""

    def __init__(
        self, max_batch_size: int | None, params: dict[str, str] | None = None, cells: Sequence[str] = ()
    ) -> None:
        super().__init__(max_batch_size, params)
        self.cells = cells

    def sweep(self, arguments: list[str]) -> Any:
        """Hydra's, without the multirun.yaml that it leaves beside the runs: a sweep has its own folder."""
        assert self.config is not None
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise UserError(
                f"hydra.sweeper.max_batch_size={self.max_batch_size}: expected at least 1, or null"
            )
        given = self.config
        with tempfile.TemporaryDirectory() as folder:
            self.config = copy.deepcopy(given)
            self.config.hydra.sweep.dir = folder
            try:
                return super().sweep(arguments)
            finally:
                self.config = given

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Composes and checks all jobs, unless the launcher does so itself before any of them starts.

        Raises UserError for the first one whose settings cannot work.
        """
        from dp_lora.config.identity import fingerprint
        from dp_lora.jobs.settings import check_settings
        from dp_lora.storage.files import check_writable
        from hydra_plugins.dp_lora_launcher.launcher import SweepLauncher
        from sweeps.cluster.cells import refuse_one_run_twice

        if isinstance(self.launcher, SweepLauncher):
            return
        assert self.hydra_context is not None and self.config is not None
        seen: dict[tuple[str, str], Sequence[str]] = {}
        for words in batch:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(words))
            with open_dict(composed):
                del composed["hydra"]
            config = from_omegaconf(composed)
            key = (config.experiment, fingerprint(config))
            if (before := seen.setdefault(key, words)) is not words:
                refuse_one_run_twice(before, words)
            check_writable(Path(config.paths.outputs).expanduser(), f"paths.outputs={config.paths.outputs}")
            if config.stages != ["pretrain"]:
                check_settings(config)

    def split_arguments(  # type: ignore[override]  # there it is static, and called on the instance
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        for override in overrides:
            check_sweep(override)
        if not self.cells:
            return BasicSweeper.split_arguments(overrides, max_batch_size)
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        cells = [choices_of(parser.parse_overrides(shlex.split(cell, posix=False))) for cell in self.cells]
        found = jobs(
            [{name: values[0] for name, values in cell.items()} for cell in cells], choices_of(overrides)
        )
        size = max_batch_size or len(found)
        return [found[start : start + size] for start in range(0, len(found), size)]


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConfig)
