"""The record of a run: metrics.jsonl, privacy.json, result.json and status.json, which W&B mirrors.

Privacy rests on an allowlist. A stage that sees private data may log only what `RELEASED` names: the
privacy spent, what is computed from released values, and the configuration. Its training loss, gradient
norms, clip fraction, batch sizes and times are functions of private images that no noise protects, so logging
one raises `PrivateValueError` in place of writing it.

The files are written first and an error there stops the run. W&B comes second: when it fails, the run
says so once and goes on. The W&B run of a private job begins when its private training has ended: W&B stamps
every row with the nanosecond since the run began and shows when each arrived, and both would tell how large
the private batches were.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from dp_lora.config.schema import Config
from dp_lora.config.wandb_settings import PROJECT, Mode, folder_of, wandb_mode
from dp_lora.records import manifest
from dp_lora.records.field_kinds import NON_FINITE
from dp_lora.records.manifest import ADAPTER_SUFFIXES
from dp_lora.storage.files import (
    append_line,
    private_directory,
    read_json,
    read_lines,
    write_atomic,
    write_json,
    write_lines,
)
from dp_lora.storage.imports import uncollected

RELEASED = frozenset(manifest.ROWS)
"""The values that a stage that sees private data may log; `manifest.ROWS` says why."""

STATUS_FIELDS = RELEASED | {"stage", "steps", "restarts"}
PUBLIC_STAGES = frozenset({"pretrain"})
STATES = ("running", "done", "failed")
GENERATED_IMAGES = "samples"

_log = logging.getLogger(__name__)


class PrivateValueError(RuntimeError):
    """A value that may not leave a run was about to; nothing of it was written."""


def check_released(stage: str, names: Iterable[str], *, public: bool = False) -> None:
    """Raises PrivateValueError when one of `names` may not be shown or logged in `stage`.

    Args:
        stage: every stage is private but those of `PUBLIC_STAGES`.
        names: of the values.
        public: the stage sees public data only, whatever its name.
    """
    if public or stage in PUBLIC_STAGES:
        return
    for name in names:
        if name not in RELEASED:
            raise PrivateValueError(
                f"{name} may not leave stage {stage}: expected only {', '.join(sorted(RELEASED))}"
            )


class Tracker:
    """Writes the record of one run and mirrors it to W&B; use it as a context manager, on one process.

    A resumed run appends to the record of the earlier start: rows that it will log again are dropped
    first, so that metrics.jsonl holds one row per logged step, without gaps. W&B gets the row's line
    number in that file as its step, under one run id, so the starts join into one W&B run.

    Guarantee: on private data the W&B run begins with `stage_ended`, `images`, `result` or `adapter`, none of
    which is called before the private training has ended, so that no clock of W&B and no time of arrival
    depends on the duration of a step. On public data, and with `tracking.live`, it begins at once and gets
    each row as it is logged.

    Args:
        directory: the run directory; W&B keeps its files in `wandb/` below it.
        config: the job; W&B gets what `manifest.settings` leaves of it.
        run_id: its W&B id, which must tell nothing; see `wandb_id`.
        name: what W&B shows as the run's name; see `manifest.run_name`.
        resume_step: the first step of stage `finetune` that this start will log; 0 in a new run.

    Raises UserError when `tracking.wandb=online` and there is no API key.
    """

    def __init__(
        self, directory: Path, config: Config, *, run_id: str, name: str, resume_step: int = 0
    ) -> None:
        self._mode = wandb_mode(config.tracking.wandb)
        self._config, self._run_id, self._name = config, run_id, name
        self._directory = directory
        self._metrics = directory / "metrics.jsonl"
        self._public = config.data.public
        self._live = config.data.public or config.tracking.live
        self._rows = self._mirrored = 0
        self._last_step: dict[str, int] = {}
        self.rewind("finetune", resume_step)
        self._begun: _Mirror | None = None
        if self._live:
            self._mirror()

    def _mirror(self) -> _Mirror:
        """The W&B run, begun if it has not."""
        if self._begun is None:
            self._begun = _Mirror(self._directory, self._config, self._run_id, self._name, self._mode)
            # `wandb sync` keeps the summary of a run's last start only.
            path = self._directory / "privacy.json"
            if path.exists() and (record := read_json(path)).get("complete"):
                self._summarise_privacy(record)
        return self._begun

    def _summarise_privacy(self, record: Mapping[str, Any]) -> None:
        self._mirror().summarise({"privacy": _plain(manifest.privacy(record))})

    def rewind(self, stage: str, step: int) -> None:
        """Drops the rows of `stage` at or after `step` from metrics.jsonl, and a torn last line."""
        rows = read_lines(self._metrics)
        kept = [row for row in rows if row["stage"] != stage or row["step"] < step]
        write_lines(self._metrics, kept)
        self._rows = len(kept)
        self._mirrored = max(self._mirrored, len(rows))
        self._last_step = {row["stage"]: row["step"] for row in kept}

    def log(self, step: int, values: Mapping[str, float], stage: str) -> None:
        """Appends one row to metrics.jsonl: stage, step, then `values`; on public data the time, too.

        The time is in whole seconds since 1970. The row of a private stage has none, since the time of a step
        follows the size of its batch; W&B gets such rows from `stage_ended`.

        Args:
            step: above the stage's last one.
            values: numbers; infinity is written as the string "inf".
            stage: of the job; see `check_released` for what it may log.

        Raises PrivateValueError when a value may not leave the stage.
        """
        check_released(stage, values, public=self._public)
        assert step > self._last_step.get(stage, -1), f"{stage}: step {step} is no new one"
        row: dict[str, Any] = {"stage": stage, "step": step}
        if self._public or stage in PUBLIC_STAGES:
            row["time"] = round(time.time())
        for name, value in values.items():
            assert name not in ("stage", "time"), name
            row[name] = _number(name, value)
        append_line(self._metrics, row)
        # W&B can take nothing back: a step done again after a kill is there already, from the first time.
        if self._live and self._rows >= self._mirrored:
            self._mirror().log(row, self._rows, round(time.time()))
        self._rows += 1
        self._last_step[stage] = step

    def stage_ended(self, stage: str) -> None:
        """Begins the W&B run of a private job and sends the rows of `stage`, all of one time.

        To be called once in the life of a run, when no step of the stage is left. On public data, and with
        `tracking.live`, the rows are there already.
        """
        mirror = self._mirror()
        if self._live:
            return
        now, loss = round(time.time()), self._config.tracking.private_loss
        for line, row in enumerate(read_lines(self._metrics)):
            if row["stage"] == stage:
                numbers = {
                    name: float(v) if v in NON_FINITE else v
                    for name, v in manifest.row(row, private_loss=loss).items()
                }
                mirror.log(numbers, line, now)

    def privacy(self, record: Mapping[str, Any]) -> None:
        """Writes `record` to privacy.json, and to W&B's summary as `privacy`.

        W&B does not get the record of a private training that is not `complete`.
        """
        write_json(self._directory / "privacy.json", record)
        if self._begun is not None or record.get("complete"):
            self._summarise_privacy(record)

    def result(self, record: Mapping[str, Any]) -> None:
        """Writes `record` to result.json; W&B's summary gets its metrics by name and a table of baselines.

        Which metrics are not known to be covered by an epsilon is said in W&B's, which `manifest` decides.
        """
        write_json(self._directory / "result.json", record)
        path = self._directory / "privacy.json"
        released = manifest.result(
            record,
            public=self._public,
            released=path.exists() and manifest.is_released(read_json(path)),
            with_uncovered=True,
        )
        metrics: dict[str, Any] = dict(released.pop("metrics", {}))
        private = released["private_metrics"]
        shown = {**_plain(released), "private_metrics": ", ".join(private)}
        self._mirror().summarise({**_plain(metrics), "result": shown})
        if metrics:
            columns, rows = baseline_table(metrics)
            if private:
                columns = [*columns, "note"]
                note = released["private_metrics_note"]
                rows = [[*row, note if row[0] in private else ""] for row in rows]
            self._mirror().table("baselines", columns, rows, line=self._rows)

    def images(self, name: str, path_to_png: Path) -> None:
        """Shows an image file of generated images in W&B.

        Raises PrivateValueError unless the file is `samples*.png` of the run directory: what else lies
        there may come from private images.
        """
        inside = path_to_png.resolve().parent == self._directory.resolve()
        generated = path_to_png.name.startswith(GENERATED_IMAGES) and path_to_png.suffix == ".png"
        if not (inside and generated):
            raise PrivateValueError(
                f"{path_to_png.name} may not leave the run: expected {GENERATED_IMAGES}*.png of its directory"
            )
        self._mirror().image(name, path_to_png, line=self._rows)

    def status(self, state: str, error: str | None = None, **progress: Any) -> None:
        """Writes status.json: state (running, done or failed), time, error if any, and `progress`.

        Raises PrivateValueError when a field of `progress` is not one of `STATUS_FIELDS`.
        """
        assert state in STATES, state
        for field in progress:
            if field not in STATUS_FIELDS:
                raise PrivateValueError(
                    f"{field} may not be in status.json: expected only {', '.join(sorted(STATUS_FIELDS))}"
                )
        record: dict[str, Any] = {"state": state, "updated": datetime.now(UTC).isoformat(timespec="seconds")}
        if error is not None:
            record["error"] = error
        write_json(self._directory / "status.json", record | progress)

    def adapter(self, folder: Path, *, also_offline: bool = False) -> None:
        """Keeps the adapter as a W&B artifact, when W&B is online or `also_offline` asks for it.

        Raises PrivateValueError when the folder holds anything but weights, JSON and the model card.
        """
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            if path.suffix not in ADAPTER_SUFFIXES or path.is_symlink():
                raise PrivateValueError(
                    f"{path.name} may not leave the run: expected only {', '.join(sorted(ADAPTER_SUFFIXES))} "
                    "files in the adapter"
                )
        if self._mirror().mode == "online" or also_offline:
            self._mirror().artifact(folder, files)

    def preempting(self) -> None:
        """Tells W&B that the job is being preempted and will be back; call before `close`."""
        if self._begun is not None:
            self._begun.preempting()

    def close(self, exit_code: int = 0) -> None:
        """Ends the W&B run, if it has begun; the files need no end. A second call does nothing."""
        if self._begun is not None:
            self._begun.close(exit_code)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(0 if kind is None else 1)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, found {type(value).__name__}")
    return value


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that W&B's summary can show: scalars, and mappings of them."""
    plain: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            plain[str(key)] = _plain(value)
        elif value is None or isinstance(value, str | bool | int):
            plain[str(key)] = value
        elif isinstance(value, float):
            plain[str(key)] = value if math.isfinite(value) else str(value)
    return plain


def baseline_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Column names and rows of a table with one metric a row and its baselines beside it.

    A metric whose name is another's with `_word` behind it is that one's baseline `word`.

    >>> baseline_table({"accuracy_cnn": 0.8, "accuracy_cnn_before": 0.1, "kid": 0.2})
    (['metric', 'value', 'before'], [['accuracy_cnn', 0.8, 0.1], ['kid', 0.2, None]])
    """
    owner = {
        name: min((other for other in metrics if name.startswith(f"{other}_")), key=len, default=name)
        for name in metrics
    }
    words = list(dict.fromkeys(name[len(own) + 1 :] for name, own in owner.items() if own != name))
    rows = [
        [name, metrics[name], *(metrics.get(f"{name}_{word}") for word in words)]
        for name in metrics
        if owner[name] == name
    ]
    return ["metric", "value", *words], rows


def wandb_id(folder: Path) -> str:
    """The run's id in W&B: eight random hexadecimal digits, made once and kept in its private `folder`.

    A fingerprint would confirm a guess of the settings that W&B does not get.
    """
    path = private_directory(folder) / "wandb_id"
    if not path.exists():
        write_atomic(path, secrets.token_hex(4), mode=0o600)
    return path.read_text(encoding="ascii").strip()


class _Mirror:
    """One W&B run whose failures end the mirroring and nothing else."""

    def __init__(self, directory: Path, config: Config, run_id: str, name: str, mode: Mode) -> None:
        self.mode: Mode = mode
        self._run: Any = None
        if mode != "disabled":
            self._start(directory, config, run_id, name)
        self._do(lambda run: self._define_axes(run, config))

    def _start(self, directory: Path, config: Config, run_id: str, name: str) -> None:
        # Its error reports and timings hold tracebacks, which name folders, and follow the size of batches.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        # The service of a parent process would not end with this run, and would keep its id in use.
        os.environ.pop("WANDB_SERVICE", None)
        # Local import: it takes longer than a whole short job's own set-up.
        try:
            with uncollected():
                import wandb

                self._run = wandb.init(
                    entity=config.tracking.entity,
                    project=config.tracking.project or PROJECT,
                    group=config.tracking.group or config.experiment,
                    job_type="+".join(config.stages),
                    tags=config.tracking.tags,
                    name=config.tracking.name or name,
                    id=run_id,
                    resume="allow",
                    dir=str(folder_of(config.tracking) or directory),
                    mode=self.mode,
                    config=manifest.settings(config),
                    settings=_settings(),
                )
        except Exception as error:
            if self.mode == "offline":
                self._lose(error)
                return
            _log.warning("W&B cannot be reached (%s); its record stays in this run's wandb/", _brief(error))
            self.mode = "offline"
            # Its service still holds the run that could not begin, and would refuse the same one offline.
            _end_service()
            self._start(directory, config, run_id, name)

    @staticmethod
    def _define_axes(run: Any, config: Config) -> None:
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        # A summary of "min" alone would lose the last value.
        run.define_metric("loss", step_metric="step", summary="min,last")
        run.define_metric("epsilon", step_metric="step", summary="last")
        spends = config.privacy.epsilon != math.inf and not config.data.public
        for name in ("update_norm", "signal_to_noise"):
            run.define_metric(name, step_metric="epsilon" if spends else "step")

    def log(self, row: Mapping[str, Any], line: int, now: int) -> None:
        shown = {key: value for key, value in row.items() if key != "time"}
        self._do(lambda run: run.log({**shown, "_timestamp": now}, step=line, commit=True))

    def summarise(self, values: Mapping[str, Any]) -> None:
        self._do(lambda run: run.summary.update(values))

    def image(self, name: str, path: Path, line: int) -> None:
        def show(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))}, step=line, commit=False)

        self._do(show)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], line: int) -> None:
        def show(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=[*columns], data=rows)}, step=line, commit=False)

        self._do(show)

    def artifact(self, folder: Path, files: list[Path]) -> None:
        def keep(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"adapter-{run.id}", type="model")
            for path in files:
                # "immutable": no second copy in the home directory; nothing changes the adapter after this.
                artifact.add_file(str(path), name=str(path.relative_to(folder)), policy="immutable")
            run.log_artifact(artifact)

        self._do(keep)

    def preempting(self) -> None:
        self._do(lambda run: run.mark_preempting())

    def close(self, exit_code: int) -> None:
        def end(run: Any) -> None:
            import wandb

            run.finish(exit_code=exit_code)
            # An offline run's file is whole only when W&B's process has ended.
            wandb.teardown()

        self._do(end)
        self._run = None

    def _do(self, action: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._run = None
        _log.warning("W&B stopped (%s); the run goes on and its files hold the whole record", _brief(error))
        _end_service()


def _end_service() -> None:
    """Takes W&B's clean-up off the interpreter's exit, where it would fail once more, with a traceback."""
    wandb = sys.modules.get("wandb")
    # Its failure has been reported; it exits the interpreter when its process ended badly.
    with contextlib.suppress(Exception, SystemExit):
        if wandb is not None:
            wandb.teardown(exit_code=1)


def _brief(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _settings() -> Any:
    """Settings under which W&B keeps what we log and nothing else.

    Console text, code, git diffs, command lines and the machine's names can hold private file names, and
    memory or processor use follows the size of a private batch.
    """
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        host="",
        username="",
        email="",
        program="",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        # The default of 15 s is how much a kill would lose.
        x_transaction_log_flush_interval=1.0,
        init_timeout=30,
        # Without a limit a broken network would hold a finished job, and its GPU, for days.
        finish_timeout=120,
    )
