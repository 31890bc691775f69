"""The folder of a sweep: its lock, its frozen configurations and the record of what was submitted.

| file | what |
|---|---|
| `sweep.json` | the command, the code's version and the cells with their run directories |
| `cells/<identity>.json` | the checked configuration of a cell, as it was when the sweep began |
| `cells/<identity>.failed` | the line with which the last start of the cell ended, if it ended with one |
| `jobs.jsonl` | what was submitted, written before and after |
| `logs/` | what jobs print, and submitit's files; readable by the owner only |
| `report.html`, `table.*`, `figure.*`, `runs.*` | the report, when the jobs have ended |
| `lock` | held by the one driver |

A job is never submitted twice, wherever a driver dies: the name of each submission is written before it is
made, and the next driver asks the cluster for jobs of that name before it submits anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shlex
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_lora.config.identity import fingerprint, is_private
from dp_lora.config.load import from_omegaconf
from dp_lora.errors import UserError
from dp_lora.storage.files import (
    append_line,
    file_lock,
    json_ready,
    private_directory,
    read_json,
    read_lines,
    write_atomic,
    write_json,
)
from dp_lora.storage.keyed import keyed_name
from sweeps.cluster.cells import Cell


@dataclass
class Submission:
    """Cells that were handed to the cluster together."""

    name: str
    """Unique; the job's name on the cluster."""
    cells: list[str]
    """Identities, in the order of the array."""
    made: float
    """Seconds since 1970."""
    jobs: list[str] | None = None
    """Their numbers on the cluster, once they are known."""
    given_up: bool = False
    """Whether the driver died before the cluster took it."""


class Ledger:
    """The sweep's folder.

    Args:
        folder: absolute.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self._jobs = folder / "jobs.jsonl"
        self.submissions: dict[str, Submission] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """The sweep, driven by this process alone. Raises UserError when another drives it."""
        holder = self.folder / "driver"

        def refuse() -> None:
            who = holder.read_text().strip() if holder.exists() else "another process"
            raise UserError(
                f"{self.folder}: {who} is driving this sweep already; nothing was done. Wait for it, or stop "
                "it and give the same command again"
            )

        private_directory(self.folder)
        with file_lock(self.folder / "lock", waiting=refuse):
            write_atomic(holder, f"process {os.getpid()} on {socket.gethostname()}\n")
            yield

    def begin(
        self,
        cells: Sequence[Cell],
        command: str,
        code: str,
        job: str = "dp_lora.jobs.stages:run",
        *,
        any_code: bool,
    ) -> None:
        """Opens the folder for these cells, after a check that it belongs to no other sweep.

        Raises UserError when it was begun with another configuration or other code.
        """
        private_directory(self.logs)
        (self.folder / "cells").mkdir(exist_ok=True)
        path = self.folder / "sweep.json"
        if path.exists():
            self._check_same(read_json(path), cells, code, any_code=any_code)
        rows = [
            {
                "number": cell.number,
                "identity": cell.identity,
                "words": list(cell.words),
                "directory": str(cell.directory),
            }
            for cell in cells
        ]
        write_json(path, {"command": command, "code": code, "job": job, "cells": rows})
        self.read()

    def _check_same(
        self, before: Mapping[str, Any], cells: Sequence[Cell], code: str, *, any_code: bool
    ) -> None:
        way_out = (
            "expected the same one; hydra.launcher.name=<another> begins a sweep of its own, and finished "
            "runs are kept"
        )
        then = {row["identity"]: row for row in before["cells"]}
        now = {cell.identity: cell for cell in cells}
        if then.keys() != now.keys():
            odd = next((cell for cell in cells if cell.identity not in then), None)
            what = f"has {len(then)} cells and now {len(now)}"
            twin = odd and next((r for r in then.values() if r["words"] == list(odd.words)), None)
            if odd and twin and self._cell(twin["identity"]).exists():
                frozen = self.frozen(twin["identity"])["config"]
                what = f"cell {odd.number} had {_difference(frozen, dataclasses.asdict(odd.config))}"
            raise UserError(
                f"{self.folder}: this sweep was begun with another configuration ({what}); {way_out}"
            )
        if before["code"] != code and not any_code:
            raise UserError(
                f"{self.folder}: this sweep was begun with other code ({before['code']}, now {code}); "
                f"{way_out}; "
                "hydra.launcher.any_code=true continues it with this code"
            )

    def freeze(self, cell: Cell) -> None:
        """Writes what the cell's job will run, whatever is edited after this."""
        record = {
            "words": list(cell.words),
            "directory": str(cell.directory),
            "config": dataclasses.asdict(cell.config),
        }
        write_json(self._cell(cell.identity), record, mode=0o600)

    def _cell(self, identity: str) -> Path:
        return self.folder / "cells" / f"{identity}.json"

    def frozen(self, identity: str) -> dict[str, Any]:
        """The cell as it was submitted: `words`, `directory`, `config`."""
        record: dict[str, Any] = read_json(self._cell(identity))
        return record

    def failure(self, identity: str) -> Path:
        """The file with the line with which the cell's last start ended; absent unless it ended with one."""
        return self.folder / "cells" / f"{identity}.failed"

    # What was submitted

    def read(self) -> None:
        """Reads anew what was submitted."""
        self.submissions = {}
        for row in read_lines(self._jobs):
            name = row["name"]
            if row["event"] == "submitting":
                self.submissions[name] = Submission(name, row["cells"], row["time"])
            elif row["event"] == "submitted":
                self.submissions[name].jobs = row["jobs"]
            else:
                self.submissions[name].given_up = True

    def submitting(self, cells: Sequence[str]) -> Submission:
        """Records that these cells are about to be submitted, under a name of their own.

        It is random: everybody on the cluster can read it, and the folder's name is made from the command.
        """
        name = f"dp-lora-{secrets.token_hex(6)}"
        submission = Submission(name, list(cells), time.time())
        self._append(
            {"event": "submitting", "name": name, "cells": submission.cells, "time": submission.made}
        )
        self.submissions[name] = submission
        return submission

    def submitted(self, submission: Submission, jobs: Sequence[str]) -> None:
        """Records the cluster's numbers of the submission's jobs."""
        submission.jobs = list(jobs)
        self._append({"event": "submitted", "name": submission.name, "jobs": submission.jobs})

    def give_up(self, submission: Submission) -> None:
        """Records that the cluster never took the submission."""
        submission.given_up = True
        self._append({"event": "given up", "name": submission.name})

    @property
    def report_name(self) -> str:
        """Name of the job that writes the report: that of the first submission with a word behind it."""
        return f"{next(iter(self.submissions), 'dp-lora-none')}-report"

    def open_submissions(self) -> list[Submission]:
        """Those of which it is not known whether the cluster took them."""
        return [s for s in self.submissions.values() if s.jobs is None and not s.given_up]

    def jobs(self) -> dict[str, str]:
        """The last job's number by cell."""
        found: dict[str, str] = {}
        for submission in self.submissions.values():
            if submission.jobs is not None:
                found.update(zip(submission.cells, submission.jobs, strict=True))
        return found

    def _append(self, record: Mapping[str, Any]) -> None:
        append_line(self._jobs, record)
        descriptor = os.open(self._jobs, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep_folder(cells: Sequence[Cell], name: str | None, task_words: Sequence[str]) -> Path:
    """`<paths.outputs>/sweeps/<name>`; without a name, `<sweep>-<experiment>-<digest of the words>`.

    Jobs that a sweeper chose after others of the same command have the number of their first one behind it.
    """
    if name is None:
        words = [word for word in task_words if not word.startswith(("paths.", "resources", "tracking"))]
        content = json.dumps(sorted(words))
        if any(is_private(word) for word in words):
            # The queue shows the name to everybody, and a plain digest would confirm a guess.
            digest = keyed_name(Path(cells[0].config.paths.cache), content)[:8]
        else:
            digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        presets = [word.partition("=")[2] for word in words if re.fullmatch(r"sweep=[\w-]+", word)]
        experiments = sorted({cell.config.experiment for cell in cells})
        name = "-".join([*presets, *(experiments if len(experiments) == 1 else []), digest])
    first = cells[0].number
    return Path(cells[0].config.paths.outputs) / "sweeps" / (f"{name}-{first}" if first else name)


def thaw(record: Mapping[str, Any]) -> Any:
    """The checked `Config` of a frozen cell."""
    from omegaconf import OmegaConf

    config = from_omegaconf(OmegaConf.create(record["config"]))
    assert Path(record["directory"]).name.endswith(fingerprint(config)), (
        "the frozen configuration was changed"
    )
    return config


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first value that differs, by its dotted name."""
    then, present = _flat(json.loads(json.dumps(json_ready(before)))), _flat(json_ready(now))
    for name in sorted(then.keys() | present.keys()):
        if then.get(name) != present.get(name) and not name.startswith(("paths.", "resources.", "tracking.")):
            return f"{name}={then.get(name)}, now {present.get(name)}"
    return "other values"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {prefix[:-1]: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(_flat(value, f"{prefix}{name}."))
    return found


def command_line(words: Sequence[str]) -> str:
    """The `dp-lora` command with these words, for a shell."""
    return "dp-lora " + shlex.join(words)
