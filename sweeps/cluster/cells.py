"""The jobs of a sweep, composed and checked before anything is submitted."""

from __future__ import annotations

import copy
import hashlib
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dp_lora.config.checks import check
from dp_lora.config.identity import run_directory
from dp_lora.config.load import from_omegaconf
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.records.run_directory import OUTPUTS, state


@dataclass(frozen=True)
class Cell:
    """One job of a sweep."""

    number: int
    """The number of Hydra's job, from 0."""
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
        outputs = [OUTPUTS[stage] for stage in self.config.stages if stage in OUTPUTS]
        done = state(self.directory) == "done"
        return done and all((self.directory / output).exists() for output in outputs)


class _ReadOnce(CachingConfigRepository):
    """Reads each preset's file once for all jobs; what it gives is a copy, because composing changes it."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        return copy.deepcopy(super().load_config(config_path))

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        self.cache = {}
        super().initialize_sources(config_search_path)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadOnce:
        """For each job Hydra copies the repository, which goes on with the same files."""
        other = copy.copy(self)
        other.delegate = copy.deepcopy(self.delegate, memo)
        return other


class Composer:
    """A Hydra config loader that composes each choice of presets once and only then sets single values.

    Composing takes Hydra a tenth of a second, and its sweeper composes every job to check it before the
    launcher does it once more. It takes the place of the loader for both.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = copy.copy(loader)
        if isinstance(self._loader, ConfigLoaderImpl):
            self._loader.repository = _ReadOnce(self._loader.repository)  # type: ignore[assignment]
        self._parser = OverridesParser.create(config_loader=loader)
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._converted: dict[tuple[str, ...], bytes | None] = {}
        self._references: dict[tuple[str, ...], set[str]] = {}
        self._typed: dict[tuple[str, str], Any] = {}
        self._parsed: dict[str, Override] = {}
        self._groups: dict[str, bool] = {}
        self._scratch: DictConfig | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The configuration that Hydra's own loader gives, without its node `hydra`."""
        presets, values = self._split(sweep_overrides)
        config = copy.deepcopy(self._of_presets(master_config, tuple(presets)))
        try:
            for name, value in values:
                OmegaConf.update(config, name, value, merge=True)
        except OmegaConfBaseException:
            # Hydra's own loader refuses it too, and says which word it was.
            self._loader.load_sweep_config(master_config, sweep_overrides)
            raise
        return config

    def config(self, master_config: DictConfig, words: Sequence[str]) -> Config:
        """`from_omegaconf` of what `load_sweep_config` gives, and as checked.

        Each choice of presets is converted once, and single values are set on copies of that.
        """
        presets, values = self._split(words)
        key = tuple(presets)
        base = self._base(master_config, key)
        if base is None or not all(self._stands_alone(key, name, value) for name, value in values):
            return from_omegaconf(self.load_sweep_config(master_config, list(words)))
        config: Config = pickle.loads(base)
        for name, value in values:
            *path, field = name.split(".")
            owner: Any = config
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, field, copy.copy(self._typed[name, repr(value)]))
        check(config)
        return config

    def _of_presets(self, master: DictConfig, presets: tuple[str, ...]) -> DictConfig:
        if presets not in self._composed:
            composed = self._loader.load_sweep_config(master, list(presets))
            with open_dict(composed):
                del composed["hydra"]
            self._composed[presets] = composed
        return self._composed[presets]

    def _base(self, master: DictConfig, presets: tuple[str, ...]) -> bytes | None:
        """The converted configuration, pickled; None where it is none without further values."""
        if presets not in self._converted:
            composed = self._of_presets(master, presets)
            try:
                self._converted[presets] = pickle.dumps(from_omegaconf(composed))
            except UserError:
                self._converted[presets] = None
            written = repr(OmegaConf.to_container(composed))
            self._references[presets] = set(re.findall(r"\$\{([\w.]+)", written))
        return self._converted[presets]

    def _stands_alone(self, presets: tuple[str, ...], name: str, value: Any) -> bool:
        """Whether the value is of its field's type and no other field is made from it."""
        near = (ref for ref in self._references[presets] if f"{ref}.".startswith(f"{name}."))
        if any(near) or isinstance(value, dict) or "${" in repr(value):
            return False
        if (name, repr(value)) not in self._typed:
            # One for all values: a field is read right after it is set.
            self._scratch = self._scratch or OmegaConf.structured(Config)
            try:
                OmegaConf.update(self._scratch, name, value, merge=True)
                typed = OmegaConf.select(self._scratch, name)
            except OmegaConfBaseException:
                return False
            self._typed[name, repr(value)] = (
                OmegaConf.to_container(typed) if isinstance(typed, ListConfig) else typed
            )
        return not isinstance(self._typed[name, repr(value)], DictConfig)

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
    """Every job of the sweep, checked.

    Raises UserError, as for a single job, with the job's words; and for two jobs that ask for the same run.
    """
    cells: dict[tuple[Path, str], Cell] = {}
    for number, words in enumerate(job_words, start=first):
        config = loader.config(master, words)
        if config.stages == ["pretrain"]:
            raise UserError("stages=['pretrain']: a sweep makes its models by itself; expected other stages")
        for name in ("outputs", "cache", "data"):
            folder = Path(getattr(config.paths, name)).expanduser().absolute()
            setattr(config.paths, name, str(folder))
        for name in ("ledger", "index"):
            if (place := getattr(config.paths, name)) is not None:
                setattr(config.paths, name, str(Path(place).expanduser().absolute()))
        directory = run_directory(config, list(words))
        cell = Cell(number, tuple(words), config, directory)
        # The readable part of a directory's name depends on the words, the run does not.
        if (before := cells.setdefault((directory.parent, cell.identity), cell)) is not cell:
            refuse_one_run_twice(before.words, words)
    _check_settings(list(cells.values()))
    return list(cells.values())


def refuse_one_run_twice(one: Sequence[str], other: Sequence[str]) -> NoReturn:
    """Raises UserError that names the words in which two jobs of a sweep differ that ask for the same run."""
    left, right = [word for word in one if word not in other], [word for word in other if word not in one]
    names = [[word.partition("=")[0] for word in words] for words in (left, right)]
    if len(left) == len(right) == 1 and names[0] == names[1]:
        raise UserError(
            f"{left[0]},{right[0].partition('=')[2]}: both ask for the same run, since this cannot change "
            "its result; expected one value"
        )
    if not left or not right:
        raise UserError(
            f"{' '.join(left or right)}: asks for the same run as the words beside it do alone; expected "
            "one of the two"
        )
    raise UserError(
        f"{' '.join(left)} and {' '.join(right)}: both ask for the same run, since together these cannot "
        "change its result; expected one of the two"
    )


def _check_settings(cells: Sequence[Cell]) -> None:
    """Raises UserError for the first cell that cannot work, so that none of the sweep begins."""
    from dp_lora.jobs.settings import check_settings

    for cell in cells:
        if not cell.is_done():
            try:
                check_settings(cell.config)
            except UserError as error:
                raise UserError(
                    f"{error} (cell {cell.number}: {' '.join(cell.words) or 'defaults'})"
                ) from error


def code_version() -> str:
    """Twelve hexadecimal digits of the package's source: equal for equal code, wherever it lies."""
    import dp_lora

    package = Path(str(dp_lora.__file__)).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
