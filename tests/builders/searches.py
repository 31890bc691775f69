"""Private searches whose trials run in this process, one after another."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dp_lora.config.identity import run_directory
from dp_lora.config.schema import Config
from dp_lora.config.search import SearchConfig
from dp_lora.storage.files import append_line, read_json
from sweeps.cluster.cells import Cell
from sweeps.cluster.ledger import Ledger, Submission, thaw
from sweeps.search import PrivateSearch

RANKS = (2, 4)
SETTINGS = {"poll_s": 0.001, "detach": False, "job": "none:none", "name": None}
Job = Callable[[Config, Sequence[str]], Any]


class Inline:
    """A cluster on which a job has ended as soon as it was submitted."""

    def __init__(self, ledger: Ledger, job: Job) -> None:
        self.ledger, self.job = ledger, job

    def settle(self) -> None: ...

    def adopt(self, jobs: Mapping[str, Cell]) -> None: ...

    def finally_report(self) -> None:
        raise AssertionError("a search writes no report")

    def submit(self, cells: Sequence[Cell]) -> Iterator[tuple[Submission, str]]:
        for cell in cells:
            self.ledger.freeze(cell)
            submission = self.ledger.submitting([cell.identity])
            record = self.ledger.frozen(cell.identity)
            try:
                self.job(thaw(record), record["words"])
            except RuntimeError:
                self.ledger.failure(cell.identity).write_text("failed\n")
            self.ledger.submitted(submission, [f"job-{submission.name}"])
            yield submission, "here"

    def fill(self) -> Iterator[tuple[Submission, str]]:
        return iter(())

    def live(self) -> dict[str, str]:
        return {}

    def release(self, live: Mapping[str, str]) -> list[str]:
        return []

    def ended(self, jobs: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(jobs, "ended")

    def drop(self) -> set[str]:
        raise AssertionError("the number of trials is never cut off")

    def stop(self) -> str:
        return "stopped"


def search_in(config: Config) -> PrivateSearch:
    """A search over `RANKS` in the outputs of `config`, which says what all trials share."""
    base = replace(config, search=SearchConfig({"lora.rank": list(RANKS)}, 3.0))
    outputs = Path(config.paths.outputs)
    cells = []
    for number, rank in enumerate(RANKS):
        cell = replace(config, lora=replace(config.lora, rank=rank))
        words = (f"lora.rank={rank}",)
        cells.append(Cell(number, words, cell, run_directory(cell, words)))
    return PrivateSearch(base, cells, outputs / "sweeps" / "searched", SETTINGS, "dp-lora -m")


def copying(made: Mapping[int, Path], score: Callable[[str], float]) -> Job:
    """A job that takes the run directory of a trial of the same rank that was made before.

    Args:
        made: run directories by rank.
        score: of the trial in the folder of this name.
    """

    def job(config: Config, words: Sequence[str]) -> None:
        directory = run_directory(config, list(words))
        place = Path(config.paths.outputs)
        append_line(place / "starts.jsonl", {"rank": config.lora.rank})
        if (value := score(place.name)) < 0:
            raise RuntimeError("this trial fails")
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(made[config.lora.rank], directory)
        result = read_json(directory / "result.json")
        result["metrics"]["dp_accuracy_cnn"] = value
        from dp_lora.storage.files import write_json

        write_json(directory / "result.json", result)

    return job
