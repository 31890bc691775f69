"""The text of `dp-lora --help`.

Hydra makes the same from the same template, but composes the configuration once for every group: three
seconds.
"""

from __future__ import annotations

from pathlib import Path
from string import Template

import yaml

from dp_lora.config.load import config_directory


def help_text() -> str:
    """The template of `hydra.help` in conf/config.yaml, with the presets of every group."""
    folder = Path(config_directory())
    given = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return Template(given["hydra"]["help"]["template"]).substitute(APP_CONFIG_GROUPS=_presets(folder))


def _presets(folder: Path) -> str:
    """A line for each group of presets, but for Hydra's own."""
    lines = []
    for group in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "hydra"):
        names = sorted(path.stem for path in group.glob("*.yaml"))
        lines.append(f"{group.name}: {', '.join(names)}\n")
    return "".join(lines)
