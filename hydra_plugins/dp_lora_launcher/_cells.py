"""The jobs of a sweep, composed and checked before anything is submitted."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dp_lora.config import Config, from_omegaconf, run_directory
from dp_lora.errors import UserError
from dp_lora.files import read_json
from dp_lora.job import OUTPUTS


@dataclass(frozen=True)
class Cell:
    """One job of a sweep."""

    number: int
    """Of Hydra, from 0."""
    words: tuple[str, ...]
    """The command line's overrides for this job."""
    config: Config
    directory: Path
    """The run directory, absolute."""

    @property
    def identity(self) -> str:
        """Eight hexadecimal digits of what can change the result."""
        return self.directory.name.rpartition("-")[2]

    def is_done(self) -> bool:
        """Whether the run directory holds the outputs of all stages asked for, and says that it is done."""
        status = self.directory / "status.json"
        outputs = [OUTPUTS[stage] for stage in self.config.stages if stage in OUTPUTS]
        return (
            status.exists()
            and read_json(status)["state"] == "done"
            and all((self.directory / output).exists() for output in outputs)
        )


class Composer:
    """A Hydra config loader that composes each choice of presets once and only then sets single values.

    Composing takes Hydra a fifth of a second, and its sweeper composes every job to check it before the
    launcher does it once more. It takes the place of the loader for both.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._parser = OverridesParser.create(config_loader=loader)
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._parsed: dict[str, Override] = {}
        self._groups: dict[str, bool] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """What Hydra's own loader gives, without its node `hydra`."""
        presets, values = self._split(sweep_overrides)
        key = tuple(presets)
        if key not in self._composed:
            self._composed[key] = self._loader.load_sweep_config(master_config, presets)
            with open_dict(self._composed[key]):
                del self._composed[key]["hydra"]
        config = copy.deepcopy(self._composed[key])
        try:
            for name, value in values:
                OmegaConf.update(config, name, value, merge=True)
        except OmegaConfBaseException:
            # Hydra's own loader refuses it too, and says which word it was.
            self._loader.load_sweep_config(master_config, sweep_overrides)
            raise
        return config

    def _split(self, words: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
        """The words that choose presets or only Hydra can apply, and the names and values of the rest."""
        presets: list[str] = []
        values: list[tuple[str, Any]] = []
        for word in words:
            if word not in self._parsed:
                (self._parsed[word],) = self._parser.parse_overrides([word])
            override = self._parsed[word]
            name = override.key_or_group
            plain = override.package is None and not (
                override.is_add() or override.is_delete() or override.is_force_add()
            )
            if plain and not self._is_group(name):
                values.append((name, override.value()))
            else:
                presets.append(str(override.input_line))
        return presets, values

    def _is_group(self, name: str) -> bool:
        if name not in self._groups:
            self._groups[name] = bool(self._loader.get_group_options(name, ObjectType.CONFIG))
        return self._groups[name]


def compose_cells(
    loader: Composer, master: DictConfig, job_words: Sequence[Sequence[str]], first: int
) -> list[Cell]:
    """Every job of the sweep, checked; one that asks for the same run as an earlier one is left out.

    Raises UserError, as for a single job, with the job's words.
    """
    cells: dict[Path, Cell] = {}
    for number, words in enumerate(job_words, start=first):
        config = from_omegaconf(loader.load_sweep_config(master, list(words)))
        if config.stages == ["pretrain"]:
            raise UserError("stages=['pretrain']: a sweep makes its models by itself; expected other stages")
        for name in ("outputs", "cache", "data"):
            folder = Path(getattr(config.paths, name)).expanduser().absolute()
            setattr(config.paths, name, str(folder))
        if config.paths.ledger is not None:
            config.paths.ledger = str(Path(config.paths.ledger).expanduser().absolute())
        directory = run_directory(config, list(words))
        cells.setdefault(directory, Cell(number, tuple(words), config, directory))
    return list(cells.values())


def code_version() -> str:
    """Twelve hexadecimal digits of the package's source: equal for equal code, wherever it lies."""
    import dp_lora

    package = Path(str(dp_lora.__file__)).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
