"""The driver of a private search: draws its trials, runs them by the launcher, releases the best one.

`dp_lora.jobs.searching` has the guarantees and the files. Trials run as the cells of a sweep do, through the
same launchers, in the private folder of the search. Nothing is printed of how many there are, which of them
are done and how they ended; the logs are in the private folder.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dp_lora.config.identity import run_directory
from dp_lora.config.schema import Config
from dp_lora.config.search import ACCURACY, PUBLIC_SCORE, SearchConfig
from dp_lora.errors import SweepFailed, UserError
from dp_lora.jobs import searching
from dp_lora.privacy.search_plan import SearchPlan
from dp_lora.storage.files import file_lock, private_directory, read_json, write_json
from sweeps.cluster.cells import Cell, Composer, code_version, compose_cells
from sweeps.cluster.drive import Drive, check_launch, cluster_of
from sweeps.cluster.ledger import Ledger, command_line, sweep_folder
from sweeps.search_cost import lines, plan_of_search

if TYPE_CHECKING:
    from dp_lora.data.sets import ImageSplits

PRIVATE, RELEASED = "private", "released"
"""Folders of a search: what nobody but its owner may see, and the run directory of its winner."""

_SHARED = ("experiment", "stages", "seed", "data", "public_data", "model", "evaluation", "tracking", "paths")
_SHARED_PRIVACY = ("epsilon", "delta", "noise_multiplier", "unit", "adjacency", "insecure_seed",
                   "budget_epsilon", "fixed_beforehand")  # fmt: skip


@dataclass(frozen=True)
class Trial(Cell):
    """A trial of a search; two trials of one cell are two runs."""

    @property
    def identity(self) -> str:
        return f"trial{self.number}"


def launch(
    settings: Mapping[str, Any], config: DictConfig, loader: Composer, job_words: Sequence[Sequence[str]]
) -> None:
    """Runs the search that the one job of a command asks for, or says what it would spend.

    Args:
        settings: the fields of `LauncherConfig` by name.
        config: the composed configuration, with Hydra's own part.
        loader: composes the cells.
        job_words: the command line's overrides for each job.

    Raises UserError for what cannot be searched, before anything is written or charged; SweepFailed when the
    search has ended and releases nothing.
    """
    if len(job_words) != 1:
        raise UserError(
            f"sweep=private_search with {len(job_words)} jobs: a search is one job; expected search.space "
            "for what its trials draw, and no values between commas"
        )
    words = list(job_words[0])
    base = loader.config(config, words)
    if base.search.space is None:
        raise UserError(
            "sweep=private_search: expected search.space too, options with lists of values: "
            "'search.space={lora.rank:[4,8],train.max_steps:[40,80]}'"
        )
    cells = cells_of(loader, config, words, base)
    check_search(base, cells)
    check_launch(settings, config, cells)
    base = replace(base, paths=cells[0].config.paths)
    folder = sweep_folder(cells, settings["name"], list(config.hydra.overrides.task))
    if settings["dry_run"]:
        _say("\n".join([f"search {folder}", *lines(base, cells)]))
        return
    if settings["detach"]:
        raise UserError("hydra.launcher.detach=true: a search releases its winner itself; expected false")
    hydra_words = [word for word in config.hydra.overrides.hydra if not word.startswith("hydra.mode=")]
    command = command_line(["-m", *config.hydra.overrides.task, *hydra_words])
    PrivateSearch(base, cells, folder, settings, command).run()


def cells_of(loader: Composer, master: DictConfig, words: Sequence[str], base: Config) -> list[Cell]:
    """Every combination of the values of `search.space`, composed and checked."""
    rest = [word for word in words if not word.lstrip("+").startswith("search.")]
    names = list(base.search.space)
    taken = [word for word in rest if word.lstrip("+").partition("=")[0] in names]
    if taken:
        raise UserError(f"{taken[0]}: search.space draws it; expected one of the two")
    products = [
        [*rest, *(f"{name}={_written(value)}" for name, value in zip(names, values, strict=True))]
        for values in itertools.product(*base.search.space.values())
    ]
    cells = compose_cells(loader, master, products, 0)
    return [replace(cell, config=replace(cell.config, search=SearchConfig())) for cell in cells]


def _written(value: Any) -> str:
    """A value as Hydra's grammar has it."""
    if isinstance(value, list):
        return f"[{','.join(_written(one) for one in value)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = str(value)
    return text if not isinstance(value, str) or re.fullmatch(r"[\w./-]+", text) else f"'{text}'"


def check_search(base: Config, cells: Sequence[Cell]) -> None:
    """Raises UserError for settings with which no search can be private."""
    privacy, evaluation = base.privacy, base.evaluation
    score = base.search.score
    expected = {
        f"privacy.epsilon={privacy.epsilon}": (
            privacy.epsilon is not None and math.isfinite(privacy.epsilon),
            "a finite number, which the whole search meets",
        ),
        f"privacy.noise_multiplier={privacy.noise_multiplier}": (
            privacy.noise_multiplier is None,
            "null, since the noise of each cell follows from the search's epsilon",
        ),
        f"privacy.insecure_seed={privacy.insecure_seed}": (privacy.insecure_seed is None, "null"),
        "data.public=true": (not base.data.public, "private images; public ones need no private search"),
        f"evaluation.release={evaluation.release}": (
            evaluation.release == "dp",
            "dp, so that no score looks at private images without noise",
        ),
        f"stages={base.stages}": (
            {"finetune", "sample", "evaluate"} == set(base.stages),
            "finetune, sample and evaluate",
        ),
        f"train.continue_from={base.train.continue_from}": (base.train.continue_from is None, "null"),
        f"model.adapter={base.model.adapter}": (base.model.adapter is None, "null"),
        f"optimize={base.optimize}": (base.optimize is None, "null; search.score says what is best"),
        f"evaluation.classifiers={evaluation.classifiers}": (bool(evaluation.classifiers), "at least one"),
    }
    for setting, (is_right, what) in expected.items():
        if not is_right:
            raise UserError(f"{setting} with sweep=private_search: expected {what}")
    known = [f"{ACCURACY}{name}" for name in evaluation.classifiers]
    known += [PUBLIC_SCORE] if "inception" in evaluation.extractors else []
    if score is not None and score not in known:
        raise UserError(f"search.score={score}: expected one of {', '.join(known)} with these settings")
    for cell in cells:
        _check_shared(base, cell)


def _check_shared(base: Config, cell: Cell) -> None:
    """Refuses a cell that differs in what all trials have to share for one statement about them."""
    pairs = [(name, getattr(base, name), getattr(cell.config, name)) for name in _SHARED]
    pairs += [
        (f"privacy.{name}", getattr(base.privacy, name), getattr(cell.config.privacy, name))
        for name in _SHARED_PRIVACY
    ]
    for name, one, other in pairs:
        # compose_cells has made the paths of a cell absolute.
        if one != other and name != "paths":
            raise UserError(
                f"search.space: {name} differs between cells ({' '.join(cell.words)}); expected options "
                "of the training or the sampler"
            )
    train = cell.config.train
    if train.max_steps is None and train.epochs is None:
        raise UserError("train.max_steps=null with sweep=private_search: expected a number, or train.epochs")
    if train.continue_from is not None:
        raise UserError("search.space: train.continue_from; expected options of the training or the sampler")


class PrivateSearch:
    """One call of the driver of a search.

    Args:
        base: the search's configuration.
        cells: what its trials draw from.
        folder: of the search, absolute.
        settings: of the launcher.
        command: the command, which continues the search.
    """

    def __init__(
        self, base: Config, cells: Sequence[Cell], folder: Path, settings: Mapping[str, Any], command: str
    ) -> None:
        self.base, self.cells, self.folder = base, cells, folder
        self.settings, self.command = settings, command
        self.private = folder / PRIVATE
        self.score = searching.score_name(base)

    def run(self) -> None:
        """Runs what is left of the search, and releases its winner."""

        def refuse() -> None:
            raise UserError(f"{self.folder}: another process runs this search; wait for it, or stop it")

        private_directory(self.folder)
        with file_lock(private_directory(self.private) / "lock", waiting=refuse):
            if not (self.private / searching.OUTCOME).exists():
                self._search()
            self._end()

    def _search(self) -> None:
        """Plans, charges, draws and runs the trials, and writes down which one is released."""
        from dp_lora.jobs.spending import Account

        images = self._images()
        plan = self._plan(images)
        account = Account(self.base, self.private, images)
        charge = searching.charge_of_search(self.base, account, plan.search)
        searching.charge_once(account, charge)
        _say(f"search {self.folder}")
        _say("it is charged as a whole; its trials are under way, and how many there are is private")
        draws = searching.draws_of(self.private, plan.search, len(self.cells))
        trials = self._trials(plan, draws)
        failed = self._run_trials(trials)
        if any(trial.identity not in failed and not trial.is_done() for trial in trials):
            raise UserError(
                f"{self.folder}: a trial has neither ended nor failed; give the same command again"
            )
        scores = [
            None
            if trial.identity in failed
            else searching.score_of(trial.directory, plan.trials[cell], plan.search.score, self.score)
            for trial, cell in zip(trials, draws.cells, strict=True)
        ]
        winner = searching.best(scores, draws.ties)
        # Of two copies of a search, the second one ends here.
        account.enter(charge, account.turn(None), admitted=True)
        released = None
        if winner is not None:
            cell = self.cells[draws.cells[winner]]
            noise = plan.trials[draws.cells[winner]].noise_multiplier
            privacy = replace(cell.config.privacy, epsilon=None, noise_multiplier=noise)
            config = replace(cell.config, privacy=privacy)
            place = replace(config.paths, outputs=str(self.folder / RELEASED))
            released = run_directory(replace(config, paths=place), list(cell.words))
            private_directory(self.folder / RELEASED)
            if not released.exists():
                searching.release(trials[winner].directory, released, config, plan, account, self.score)
        write_json(
            self.private / searching.OUTCOME,
            {"released": None if released is None else str(released.relative_to(self.folder))},
            mode=0o600,
        )

    def _end(self) -> None:
        """Says what was released. Raises SweepFailed when that is nothing."""
        released = read_json(self.private / searching.OUTCOME)["released"]
        if released is None:
            raise SweepFailed(
                "the search has ended and releases nothing: it drew no trial, or none of them ended with "
                "a score; it stays charged"
            )
        from dp_lora.jobs.summary import guarantee, metrics_table
        from dp_lora.records.run_directory import result

        directory = self.folder / released
        record = read_json(directory / "privacy.json")
        for line in [*guarantee(record), "", *metrics_table(result(directory))]:
            print(line)
        epsilon = record["search"]["epsilon"]
        print(
            f"\nof the whole search: epsilon {epsilon['training']:.4g} for a training {record['unit']}, "
            f"{epsilon['held_out']:.4g} for a held-out one, {epsilon['both']:.4g} for somebody in both"
        )
        print(f"run directory      {directory}")

    def _images(self) -> ImageSplits:
        """The private images, after all checks of a job; the model has to be there."""
        from dp_lora.jobs.job import has_model, prepare

        config = self.cells[0].config
        if not has_model(config):
            raise UserError(
                f"model.name={config.model.name}: is not pre-trained yet, and the trials of a search "
                "share no cache; expected it: dp-lora stages=[pretrain] with the same words first"
            )
        # On the driver's machine, which may have no GPU.
        here = replace(config.resources, device="cpu", gpus=0)
        budget = replace(config.privacy, budget_epsilon=None)
        return prepare(replace(config, resources=here, privacy=budget), self.private / "check").images

    def _plan(self, images: ImageSplits) -> SearchPlan:
        """The plan, as it was when the search began."""
        from dp_lora.config.identity import fingerprint

        plan = plan_of_search(self.base, self.cells, images.train.examples(self.base.privacy.unit))
        path = self.private / "plan.json"
        record = {
            "cells": [fingerprint(cell.config) for cell in self.cells],
            "trials": [dataclasses.asdict(one) for one in plan.trials],
            "code": code_version(),
            **searching.statement(plan, self.score),
        }
        if path.exists():
            if read_json(path) != record:
                raise UserError(
                    f"{self.folder}: this search was begun with another configuration, other code or other "
                    "images; expected the same ones, or hydra.launcher.name=<another> for another search"
                )
            return plan
        write_json(path, record, mode=0o600)
        return plan

    def _trials(self, plan: SearchPlan, draws: searching.Draws) -> list[Trial]:
        """The trials, each in folders of its own; a public pre-trained model is shared."""
        cache = private_directory(self.private / "cache")
        models, shared = cache / "models", Path(self.base.paths.cache).expanduser() / "models"
        if shared.exists() and not models.is_symlink():
            models.symlink_to(shared.absolute())
        private_directory(self.private / searching.TRIALS)
        found = []
        for number, cell in enumerate(draws.cells):
            place = private_directory(self.private / searching.TRIALS / str(number))
            words = self.cells[cell].words
            config = searching.trial_config(self.cells[cell].config, plan.trials[cell], place, cache)
            found.append(Trial(number, words, config, run_directory(config, list(words))))
        return found

    def _run_trials(self, trials: Sequence[Trial]) -> set[str]:
        """Runs the trials to their end; returns those that failed for good."""
        path = self.private / "failed.json"
        failed = set(read_json(path)) if path.exists() else set[str]()
        left = [trial for trial in trials if trial.identity not in failed]
        ledger = Ledger(self.private / "launch")
        with ledger.held():
            ledger.begin(trials, self.command, code_version(), self.settings["job"], any_code=False)
            drive = _Quiet(left, ledger, cluster_of(self.settings, ledger), self.settings, [])
            drive.keep = lambda more: write_json(path, sorted(failed | more), mode=0o600)
            drive.run()
        return failed | drive.failed.keys()


class _Quiet(Drive):
    """Runs all trials, says nothing, and writes no report."""

    reports = False
    keep: Callable[[set[str]], None]
    """Writes down the trials that have failed."""

    def _say(self, text: str) -> None:
        """Every line of a sweep tells how many jobs there are."""

    def _settle_ended(self, live: Mapping[str, str]) -> None:
        before = len(self.failed)
        super()._settle_ended(live)
        if len(self.failed) > before:
            self.keep(set(self.failed))

    def _drop_if_all_fail_alike(self) -> None:
        """The number of trials is never cut off."""

    def _report(self) -> None:
        """The outcome is the search's to tell."""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
