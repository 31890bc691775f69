"""Sweepers that choose the next job by the results of earlier ones, through each launcher."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from dp_lora.config.objective import metric_names, objective, refuse_without_objective
from dp_lora.config.schema import EvaluationConfig
from dp_lora.errors import UserError
from dp_lora.jobs.stages import run
from tests.builders.commands import dp_lora
from tests.builders.tiny import TINY, composed, words


class Chooser(Sweeper):
    """Two ranks, then the better one at another learning rate, by the first of the returned values."""

    returned: ClassVar[list[Any]] = []

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        jobs = [[*arguments, f"lora.rank={rank}"] for rank in self.ranks]
        values = [job.return_value for job in self.launcher.launch(jobs, initial_job_idx=0)]
        first = [value[0] if isinstance(value, tuple) else value for value in values]
        best = jobs[first.index(min(first))]
        (last,) = self.launcher.launch([[*best, "train.learning_rate=0.05"]], initial_job_idx=len(jobs))
        Chooser.returned = [*values, last.return_value]


@pytest.fixture(autouse=True)
def chooser(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Hydra takes classes of packages below `hydra_plugins` alone.
    monkeypatch.setattr(Plugins, "is_in_toplevel_plugins_module", staticmethod(lambda name: True))
    Plugins.instance().register(Chooser)
    name = f"{Chooser.__module__}.Chooser"
    ConfigStore.instance().store("chooser", {"_target_": name, "ranks": [2, 4]}, group="hydra/sweeper")
    yield
    Chooser.returned = []


def metrics(outputs: Path, rank: int, rate: float = 0.02) -> dict[str, float]:
    """Of the one run with this rank and learning rate."""
    found = []
    for path in outputs.glob("default/*/result.json"):
        config = OmegaConf.load(path.with_name("config.yaml"))
        if (config.lora.rank, config.train.learning_rate) == (rank, rate):
            found.append(json.loads(path.read_text())["metrics"])
    (one,) = found
    return one


@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_a_sweeper_gets_what_optimize_names(
    launcher: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("optimize=[fd_lite0,kid_lite0]", "evaluation.classifiers=[]", "train.max_steps=2")
    where = () if launcher == "basic" else ("hydra/launcher=local", "hydra.launcher.poll_s=0.2")
    outputs = tmp_path / "outputs"
    assert dp_lora(*words(cache, outputs), *asked, *where, "hydra/sweeper=chooser", "-m") == 0
    two, four = metrics(outputs, 2), metrics(outputs, 4)
    last = metrics(outputs, 2 if two["fd_lite0"] < four["fd_lite0"] else 4, rate=0.05)
    assert Chooser.returned == [(found["fd_lite0"], found["kid_lite0"]) for found in (two, four, last)]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ((), "optimize=null: hydra/sweeper chooses jobs by the results of earlier ones; expected optimize=<"),
        (("optimize=accuracy_cn",), "optimize=accuracy_cn: not computed by this job; expected some of accur"),
        (
            ("optimize=fid",),
            "optimize=fid: not computed by this job; expected some of accuracy_cnn, fd_lite0",
        ),
        (
            ("optimize=fd_lite0", "stages=[finetune,sample]"),
            "optimize=fd_lite0: stages=[finetune,sample] com",
        ),
        (("optimize=3",), "optimize=3: expected the name of a metric, a list of them, or null"),
        (("optimize=fd_lite0", "evaluation.release=dp"), "optimize=fd_lite0: not computed by this job"),
    ],
)
def test_an_objective_that_will_not_be_there_is_found_before_anything_is_charged(
    given: tuple[str, ...], line: str, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outputs = tmp_path / "outputs"
    assert dp_lora(*words(cache, outputs), *given, "hydra/sweeper=chooser", "-m") == 2
    assert line in capfd.readouterr().err
    assert not list(tmp_path.rglob("*ledger*")) and not list(outputs.rglob("privacy.json"))


@pytest.mark.parametrize(
    ("optimize", "direction", "expected"),
    [
        ("accuracy_cnn", "minimize", "maximize"),
        ("fd_lite0", "maximize", "minimize"),
        (["accuracy_cnn", "kid_lite0"], "maximize", "[maximize,minimize]"),
        ("accuracy_cnn", ["maximize", "minimize"], "maximize"),
        (["accuracy_cnn", "kid_lite0"], ["maximize", "minimize"], None),
        ("fd_lite0", "minimize", None),
        ("accuracy_cnn", None, None),
    ],
)
def test_the_directions_of_a_sweeper_are_those_of_the_metrics(
    optimize: Any, direction: Any, expected: str | None
) -> None:
    config = composed(*TINY)
    config.optimize = optimize
    sweeper = {"_target_": "a.OptunaSweeper", **({} if direction is None else {"direction": direction})}
    if expected is None:
        refuse_without_objective(sweeper, config)
        return
    with pytest.raises(UserError, match=rf"expected hydra\.sweeper\.direction={re.escape(expected)}$"):
        refuse_without_objective(sweeper, config)


def test_a_sweeper_that_chooses_needs_several_jobs(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert dp_lora(*words(cache, tmp_path / "outputs"), "hydra/sweeper=chooser") == 2
    assert "hydra/sweeper=chooser: chooses the jobs of a sweep; expected -m with it" in capfd.readouterr().err


def test_the_names_are_those_that_an_evaluation_has(tiny: Callable[..., Any]) -> None:
    config = tiny("evaluation.fid_infinity=true", "evaluation.classifier_epochs=1", "train.max_steps=1")
    found = {name for name in run(config) if not name.endswith(("_before", "_real"))}
    assert found - {"directory"} == set(metric_names(config.evaluation))


def test_the_names_of_other_extractors_and_classifiers() -> None:
    full = EvaluationConfig(extractors=["inception"], classifiers=["wrn", "resnet", "resnext"])
    named = (
        "accuracy_wrn accuracy_resnet accuracy_resnext accuracy_mean fid kid_inception precision_inception "
    )
    named += "recall_inception density_inception coverage_inception inception_score"
    assert metric_names(full) == named.split()
    assert metric_names(EvaluationConfig(release="dp")) == ["accuracy_cnn"]


def test_one_objective_is_a_number_and_several_are_a_tuple() -> None:
    values = {"accuracy_cnn": 0.5, "fd_lite0": 3}
    assert objective(["accuracy_cnn"], values) == 0.5
    assert objective(["fd_lite0", "accuracy_cnn"], values) == (3.0, 0.5)
