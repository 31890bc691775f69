"""The W&B dashboard of a sweep as code: what its runs spent, what came of it, on what it depends.

It needs the package wandb-workspaces (`pip install 'dp-lora[dashboard]'`). With an API key the workspace is
saved in the runs' project; without one it becomes `dashboard.json` in the sweep's folder, the same
specification as W&B keeps it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config.wandb_settings import PROJECT, wandb_mode
from dp_lora.errors import UserError
from dp_lora.records.tracker import GENERATED_IMAGES, baseline_table
from dp_lora.storage.files import read_json, write_json
from sweeps.bill import Bill, bill
from sweeps.folders import read_settings

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

SETTINGS = {
    "LoRA rank": "config:lora.rank",
    "noise multiplicity k": "config:privacy.noise_multiplicity",
    "noise multiplier sigma": "summary:privacy.noise_multiplier",
    "clipping norm C": "config:privacy.max_grad_norm",
    "expected batch size": "config:train.expected_batch_size",
}
"""The settings against which a metric is shown, and where W&B keeps them."""


@dataclass(frozen=True)
class Shown:
    """The metrics and settings that the runs of a sweep have to show."""

    project: str
    groups: tuple[str, ...]
    metrics: tuple[str, ...]
    """Without those that are another one's baseline, in the order of the runs' own."""
    private_metrics: tuple[str, ...] = ()
    """Those of `metrics` that were computed on private or held-out images."""
    private_loss: bool = False
    entity: str | None = None


def dashboard(folder: Path, directories: Sequence[Path], entity: str | None = None) -> str:
    """Builds the dashboard of these runs, saves it and says where.

    Args:
        folder: of the sweep; offline the dashboard is written there.
        directories: of its runs.
        entity: user or team in W&B; None takes that of the runs, or the default one of the API key.

    Raises UserError when wandb-workspaces is not installed, or no run has begun.
    """
    shown, online = look(directories), wandb_mode("auto") == "online"
    entity = entity or shown.entity
    if online and entity is None:
        import wandb

        entity = wandb.Api().default_entity
    workspace = build(shown, folder.name, bill(directories), entity or "")
    if online:
        workspace.save()
        return str(workspace.url)
    path = folder / "dashboard.json"
    write_json(path, specification(workspace))
    return str(path)


def look(directories: Sequence[Path]) -> Shown:
    """Collects what these runs have to show.

    Raises UserError if none has begun, or if they are in several projects or of several entities.
    """
    projects, groups, metrics, private = dict[str, None](), dict[str, None](), dict[str, None](), set[str]()
    entities = set[str | None]()
    private_loss = False
    for directory in directories:
        tracking = read_settings(directory).get("tracking")
        if tracking is None:
            continue
        projects[tracking["project"] or PROJECT] = None
        entities.add(tracking.get("entity"))
        groups[tracking["group"] or directory.parent.name] = None
        private_loss |= bool(tracking["private_loss"])
        result = directory / "result.json"
        if result.exists():
            record = read_json(result)
            metrics.update((row[0], None) for row in baseline_table(record["metrics"])[1])
            private.update(record.get("private_metrics", ()))
    if not projects:
        raise UserError("no run of this sweep has begun: expected at least one with its config.yaml")
    if len(projects) > 1:
        raise UserError(f"tracking.project: the runs are in {', '.join(projects)}; expected one project")
    if len(entities) > 1:
        found = ", ".join(sorted(str(entity) for entity in entities))
        raise UserError(f"tracking.entity: the runs belong to {found}; expected one entity")
    (project,), (entity,) = projects, entities
    names = tuple(metrics)
    compared = tuple(name for name in names if name in private)
    return Shown(project, tuple(groups), names, compared, private_loss, entity)


def build(shown: Shown, name: str, spent: Bill, entity: str = "") -> Workspace:
    """The workspace, not yet saved. Raises UserError when wandb-workspaces is not installed."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(
            "dashboard: the package wandb-workspaces is not installed; expected: pip install "
            "'dp-lora[dashboard]'"
        )
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    columns = ["summary:privacy.epsilon", *(f"summary:{metric}" for metric in shown.metrics)]
    group = expr.Metric("Group")
    return ws.Workspace(
        entity=entity,
        project=shown.project,
        name=f"{name}: privacy and utility",
        sections=[
            _privacy_section(shown, spent),
            *_setting_sections(shown),
            _step_section(shown),
            _samples(),
        ],
        runset_settings=ws.RunsetSettings(
            filters=[group.isin(list(shown.groups))], pinned_columns=["run:displayName", *columns]
        ),
    )


def specification(workspace: Workspace) -> dict[str, Any]:
    """The workspace as JSON, in the form in which W&B keeps it."""
    # The library has no public way to it; `save` does the same and sends it off.
    view = workspace._to_model()
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"project": view.project, "displayName": view.display_name, "type": "project-view", "spec": spec}


def _privacy_section(shown: Shown, spent: Bill) -> Section:
    """Each metric against the epsilon of its run, and what all runs cost together."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    epsilon = wr.SummaryMetric("privacy.epsilon")
    panels: list[Any] = [
        wr.ScatterPlot(title=f"{_title(shown, metric)} against epsilon", x=epsilon, y=metric, log_x=True)
        for metric in shown.metrics
    ]
    bill_panel = wr.MarkdownPanel(
        markdown="\n".join(["### The privacy bill", *(f"- {x}" for x in spent.lines())])
    )
    return ws.Section(name="Privacy and utility", panels=[*panels, bill_panel], is_open=True)


def _setting_sections(shown: Shown) -> list[Section]:
    """A section for each metric: how it follows rank, k, sigma and the rest."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def axis(place: str) -> Any:
        where, _, name = place.partition(":")
        return wr.Config(name) if where == "config" else wr.SummaryMetric(name)

    return [
        ws.Section(
            name=_title(shown, metric),
            panels=[
                wr.ScatterPlot(title=f"{metric} by {setting}", x=axis(place), y=metric)
                for setting, place in SETTINGS.items()
            ],
        )
        for metric in shown.metrics
    ]


def _step_section(shown: Shown) -> Section:
    """The panels of values that a run releases while it trains."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    panels = [
        wr.LinePlot(title="epsilon spent", x="step", y=["epsilon"], title_y="epsilon"),
        wr.LinePlot(title="signal-to-noise of the update", x="epsilon", y=["signal_to_noise"]),
        wr.LinePlot(title="norm of the noised update", x="epsilon", y=["update_norm"]),
    ]
    if shown.private_loss:
        panels.append(wr.LinePlot(title="loss, from the noised sum", x="step", y=["private_loss"]))
    return ws.Section(name="Training", panels=panels, is_open=True)


def _samples() -> Section:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    browser = wr.MediaBrowser(title="generated images", media_keys=[GENERATED_IMAGES], num_columns=3)
    return ws.Section(name="Samples", panels=[browser], is_open=True)


def _title(shown: Shown, metric: str) -> str:
    """The metric's name, with a word where epsilon does not cover it."""
    return f"{metric} (on private images)" if metric in shown.private_metrics else metric
