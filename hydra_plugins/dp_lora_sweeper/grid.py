"""The sweeper: Hydra's own, which makes products, with cells for what is no product."""

import copy
import itertools
import shlex
import tempfile
from collections.abc import Mapping, Sequence
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
    """Hydra's sweeper for products, and for cells that are no product; see `GridConfig` and `jobs`."""

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
        from hydra_plugins.dp_lora_launcher._cells import refuse_one_run_twice
        from hydra_plugins.dp_lora_launcher.launcher import SweepLauncher

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
            _check_sweep(override)
        if not self.cells:
            return BasicSweeper.split_arguments(overrides, max_batch_size)
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        cells = [_choices(parser.parse_overrides(shlex.split(cell, posix=False))) for cell in self.cells]
        found = jobs(
            [{name: values[0] for name, values in cell.items()} for cell in cells], _choices(overrides)
        )
        size = max_batch_size or len(found)
        return [found[start : start + size] for start in range(0, len(found), size)]


def jobs(cells: Sequence[Mapping[str, str]], choices: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The words of every job: each cell with each combination of the values of `choices`.

    A choice with a value that some cells have keeps those, and the cells that leave it open; any other
    choice is for the cells that leave it open.

    >>> baselines = [{"trainable": "lora"}, {"trainable": "full"}, {"trainable": "lora", "epsilon": "'inf'"}]
    >>> jobs(baselines, {"trainable": ["lora"], "epsilon": ["eps1"]})
    [['trainable=lora', 'epsilon=eps1'], ['trainable=lora', "epsilon='inf'"]]

    Raises UserError for a choice that no cell has and none leaves open.
    """
    kept = list(cells)
    for name, values in choices.items():
        said = list(dict.fromkeys(cell[name] for cell in kept if name in cell))
        if set(said) & set(values):
            kept = [cell for cell in kept if cell.get(name, values[0]) in values]
        elif kept and all(name in cell for cell in kept):
            raise UserError(
                f"{name}={','.join(values)}: no cell of this sweep has it; expected some of {', '.join(said)}"
            )
    found: dict[frozenset[str], list[str]] = {}
    for cell in kept:
        open_names = [name for name in choices if name not in cell]
        for values in itertools.product(*(choices[name] for name in open_names)):
            chosen = {**cell, **dict(zip(open_names, values, strict=True))}
            words = [f"{name}={value}" for name, value in chosen.items()]
            found.setdefault(frozenset(words), words)
    return list(found.values())


def _check_sweep(override: Override) -> None:
    """Raises UserError for what gives no values, one by one."""
    if not override.is_sweep_override():
        return
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: expected values between commas, or a range")
    values = list(override.sweep_string_iterator())
    if not values:
        raise UserError(f"{override.input_line}: stands for no value at all; expected at least one")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"{override.input_line}: {twice[0]} stands there twice; expected every value once")


def _choices(overrides: Sequence[Override]) -> dict[str, list[str]]:
    """The values of each name, the last word of a name being the one that counts."""
    found: dict[str, list[str]] = {}
    for override in overrides:
        name = override.get_key_element()
        if override.is_sweep_override():
            _check_sweep(override)
            found[name] = list(override.sweep_string_iterator())
        else:
            found[name] = [override.get_value_element_as_str()]
    return found


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConfig)
