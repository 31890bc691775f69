"""The launchers without a cluster: what they compose, plan, refuse, and the pool of this machine."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from dp_lora.__main__ import main
from dp_lora.config.identity import fingerprint, run_directory
from dp_lora.config.load import config_directory, from_omegaconf
from dp_lora.config.schema import ResourcesConfig
from dp_lora.errors import Busy, UserError
from dp_lora.storage.files import read_json, write_json
from sweeps.cluster import node, slurm
from sweeps.cluster.cells import Cell, Composer, code_version
from sweeps.cluster.ledger import Ledger, sweep_folder
from tests.builders.counting import counted, go, starts
from tests.builders.forked import Forked, Nursery
from tests.builders.tiny import TINY, composed, once, words

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dp_lora(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command and gives its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*given: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["dp-lora", *once(*words(cache, tmp_path / "outputs"), *given)])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            GlobalHydra.instance().clear()
        return status, *capfd.readouterr()

    return call


# Composing


@pytest.fixture
def loaders() -> Iterator[tuple[Any, Any]]:
    """Hydra's loader and the composed configuration of a command line with -m."""
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        master = hydra.config_loader.load_configuration(
            "config", ["hydra/launcher=slurm"], run_mode=RunMode.MULTIRUN
        )
        yield hydra.config_loader, master


def test_the_name_of_a_sweep_confirms_no_guess_of_a_private_setting(tmp_path: Path) -> None:
    """The queue of a cluster shows it to everybody."""

    def name(cache: str, *given: str) -> str:
        config = composed(*TINY, f"paths.cache={tmp_path / cache}")
        return sweep_folder([Cell(0, given, config, tmp_path)], None, given).name

    private = ("lora.rank=2,4", "privacy.insecure_seed=1", "data.source=/home/ann")
    assert name("mine", *private) == name("mine", *private) != name("yours", *private)
    assert name("mine", *private) != name("mine", *private[:2])
    assert name("mine", private[0]) == name("yours", private[0])


@pytest.mark.parametrize(
    "given",
    [
        ["epsilon=eps1", "lora_rank=r4", "seed=3"],
        ["seed=4", "lora.rank=12", "epsilon=eps1", "privacy.epsilon=3"],
        ["privacy.epsilon=3", "epsilon=eps1"],
        ["train=long", "train.max_steps=null", "train.epochs=2.5"],
        ["data=digits", "data@public_data=digits", "public_data.public=true", "model=tiny8"],
        ["+resources.sbatch.reservation=night", "resources=gpu4", "lora.target_modules=[to_q,to_v]"],
        ["epsilon='inf'", "tracking.tags=[a,b]", "++seed=5"],
        [],
    ],
)
def test_composing_in_parts_is_composing(given: list[str], loaders: tuple[Any, Any]) -> None:
    loader, master = loaders
    composer = Composer(loader)
    for _ in range(2):  # the second time from what is kept
        part, whole = composer.load_sweep_config(master, given), loader.load_sweep_config(master, given)
        with open_dict(whole):
            del whole["hydra"]
        assert OmegaConf.to_container(part, resolve=True) == OmegaConf.to_container(whole, resolve=True)


@pytest.mark.parametrize(
    "given",
    [
        ["epsilon=eps1", "lora_rank=r4", "seed=3"],
        ["lora.rank=12", "privacy.epsilon=3", "train.learning_rate=1", "train.microbatch=16"],
        ["train=long", "train.max_steps=null", "train.epochs=2.5", "trainable.components=[lora]"],
        ["sweep=rank", "tracking.group=mine", "paths.outputs=here", "tracking.tags=[a,b]"],
        ["data=imagefolder", "data.source=images"],
        ['model.prompt="a {} in ${experiment}"', "experiment=mnist"],
        [],
    ],
)
def test_converting_in_parts_is_converting(given: list[str], loaders: tuple[Any, Any]) -> None:
    loader, master = loaders
    composer = Composer(loader)
    for _ in range(2):
        whole = loader.load_sweep_config(master, given)
        with open_dict(whole):
            del whole["hydra"]
        assert composer.config(master, given) == from_omegaconf(whole)


def test_what_is_converted_in_parts_is_checked_and_its_own(loaders: tuple[Any, Any]) -> None:
    loader, master = loaders
    composer = Composer(loader)
    composer.config(master, ["trainable.components=[lora]"]).trainable.components.append("bias")
    assert composer.config(master, ["trainable.components=[lora]"]).trainable.components == ["lora"]
    with pytest.raises(UserError, match=r"lora\.rank=0"):
        composer.config(master, ["lora.rank=0"])
    with pytest.raises(UserError, match="did you mean 'lora'"):
        composer.config(master, ["trainable.components=[lorra]"])


def test_each_preset_is_read_once(loaders: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loader, master = loaders
    read: list[str] = []
    load = ConfigRepository.load_config

    def noting(repository: ConfigRepository, config_path: str) -> ConfigResult | None:
        read.append(config_path)
        return load(repository, config_path)

    monkeypatch.setattr(ConfigRepository, "load_config", noting)
    composer = Composer(loader)
    for rank in ("r4", "r8", "r4"):
        composer.load_sweep_config(master, [f"lora_rank={rank}"])
    assert {"lora_rank/r4", "lora_rank/r8", "config"} <= set(read)
    assert len(read) == len(set(read))
    loader.load_sweep_config(master, ["lora_rank=r8"])  # Hydra's own loader is as it was
    assert read.count("lora_rank/r8") == 2


@pytest.mark.parametrize("given", [["seed=x"], ["lora.rnk=3"], ["epsilon=eps11"], ["lora.rank=[1]"]])
def test_composing_in_parts_refuses_what_hydra_refuses(given: list[str], loaders: tuple[Any, Any]) -> None:
    loader, master = loaders
    with pytest.raises(Exception) as whole:  # noqa: PT011 - whichever Hydra raises
        loader.load_sweep_config(master, given)
    composer = Composer(loader)
    for call in (composer.load_sweep_config, composer.config):
        with pytest.raises(type(whole.value)) as part:
            call(master, given)
        assert str(part.value) == str(whole.value)


# Requests


def cell(number: int, **resources: Any) -> Cell:
    config = composed(*TINY, f"seed={number}")
    config.resources = dataclasses.replace(config.resources, **resources)
    return Cell(number, (f"seed={number}",), config, Path(f"/runs/x-{number:08}"))


def test_one_array_for_each_kind_of_resources_within_the_limit() -> None:
    cells = [
        cell(0),
        cell(1, gpus=1),
        cell(2),
        cell(3, gpus=1, device="cuda"),
        cell(4),
        cell(5, partition="b"),
    ]
    arrays = slurm._arrays(cells, largest=2)
    assert [[c.number for c in array] for array in arrays] == [[0, 2], [4], [1, 3], [5]]


def test_a_request_in_the_words_of_sbatch() -> None:
    resources = ResourcesConfig(
        nodes=2, gpus=8, cpus=4, memory_gb=1.5, time_limit_min=30, partition="p", account="a", qos="q",
        constraint="c", sbatch={"exclusive": "", "reservation": "night"},
    )  # fmt: skip
    assert slurm._options(resources) == {
        "time": 30, "nodes": 2, "ntasks-per-node": 8, "cpus-per-task": 4, "mem": "1536M", "partition": "p",
        "account": "a", "qos": "q", "constraint": "c", "gpus-per-node": 8, "exclusive": True,
        "reservation": "night",
    }  # fmt: skip
    assert slurm._options(ResourcesConfig(gpus=4, processes=2))["ntasks-per-node"] == 2


@pytest.mark.parametrize(
    ("preset", "nodes", "processes"),
    [("cpu", 1, 1), ("gpu1", 1, 1), ("gpu4", 1, 4), ("gpu8", 1, 8), ("node2x8", 2, 8)],
)
def test_presets_ask_for_one_process_a_gpu(preset: str, nodes: int, processes: int) -> None:
    resources = composed(f"resources={preset}").resources
    assert (resources.nodes, resources.processes_per_node) == (nodes, processes)


@pytest.mark.parametrize("example", ["example", "example_preemptible", "example_container"])
def test_the_command_line_wins_over_a_cluster_file(example: str) -> None:
    config = composed(f"cluster={example}", "resources=gpu4", "resources.partition=mine")
    assert config.resources.partition == "mine" and config.resources.gpus == 4
    assert composed(f"cluster={example}").resources.gpus == 1
    assert "cluster" not in run_directory(config, [f"cluster={example}", "seed=1"]).name


# Plan and refusals


def test_a_launcher_without_a_sweep_is_refused(dp_lora: Callable[..., tuple[int, str, str]]) -> None:
    status, _, said = dp_lora("hydra/launcher=slurm")
    assert status == 2 and said.count("\n") == 1 and "expected -m" in said


def test_a_dry_run_shows_cells_resources_and_hours_and_does_nothing(
    dp_lora: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    given = ("--dry-run", "seed=0,1,2", "resources=gpu4", "train.max_steps=50")
    status, _, said = dp_lora(*given)
    assert status == 0 and "3 cells, 3 to run; no finished run to go by; nothing was submitted" in said
    assert "gpus-per-node=4" in said
    # A run of 60 x 50 draws that took an hour, and six minutes for the rest.
    finished = composed(*TINY, "seed=0", "resources=gpu4", "train.max_steps=50",
                        f"paths.outputs={tmp_path / 'outputs'}")  # fmt: skip
    directory = run_directory(finished, ["seed=0"])
    (directory / "adapter").mkdir(parents=True)
    for name in ("samples.npz", "metrics.jsonl"):
        (directory / name).write_text("")
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(finished)))
    write_json(directory / "status.json", {"state": "done"})
    write_json(directory / "result.json", {"seconds": {"finetune": 3600.0, "sample": 360.0}})
    write_json(directory / "privacy.json", {"steps": 50, "expected_batch_size": 60, "noise_multiplicity": 1})
    status, _, said = dp_lora(*given)
    assert "3 cells, 2 to run; 8.80 GPU-hours by 1 finished runs; nothing was submitted" in said
    status, _, said = dp_lora(*given[:-1], "train.max_steps=100")
    assert "3 cells, 3 to run; 25.20 GPU-hours" in said
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"default"}  # the run made above
    assert not (tmp_path / "outputs" / "sweeps").exists()


def test_without_slurm_the_launcher_says_so_in_one_line(
    dp_lora: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, said = dp_lora("-m", "seed=0,1", "hydra/launcher=slurm")
    assert status == 2 and said.count("\n") == 1
    assert "this machine has no sbatch" in said and "hydra/launcher=local" in said
    assert not (tmp_path / "outputs" / "sweeps").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["resources.gpus=2"], "resources.gpus=2: expected at most 0"),
        (["resources.nodes=2"], "resources.nodes=2"),
        (["hydra.launcher.detach=true"], "hydra.launcher.detach=true"),
        (["stages=[pretrain]"], "stages=['pretrain']"),
        (["resources.memory_gb=0"], "resources.memory_gb=0"),
        (["resources.gpus=-1"], "resources.gpus=-1"),
        (["resources.cpus=0"], "resources.cpus=0"),
        (["resources.sbatch={hold: ''}"], "expected a plus sign before it: +resources.sbatch.hold=<value>"),
        (["hydra.launcher.polls=3"], "polls"),
        (["hydra/launcher=slrum"], "expected one of basic, local, slurm; did you mean 'slurm'?"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_starts(
    given: list[str],
    expected: str,
    dp_lora: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launcher = [] if given[0].startswith("hydra/") else ["hydra/launcher=local"]
    status, _, said = dp_lora("-m", "seed=0,1", *launcher, *given)
    assert status == 2 and said.count("\n") == 1 and expected in said, said
    assert not (tmp_path / "outputs" / "sweeps").exists()


def test_a_sweep_has_one_driver(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    says = pytest.raises(UserError, match=f"process {os.getpid()} on .* is driving this sweep already")
    with first.held(), says, second.held():
        pass
    with second.held():
        pass


def test_a_submission_is_known_by_name_before_it_is_made(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "sweep")
    with ledger.held():
        ledger.begin([cell(0), cell(1)], "dp-lora", "0" * 12, any_code=False)
        known, lost, refused = (ledger.submitting([f"{n:08}"]) for n in range(3))
        ledger.submitted(known, ["17_0"])
        ledger.give_up(refused)
        again = Ledger(tmp_path / "sweep")
        again.begin([cell(0), cell(1)], "dp-lora", "0" * 12, any_code=False)
    assert again.jobs() == {"00000000": "17_0"}
    assert [submission.name for submission in again.open_submissions()] == [lost.name]
    assert (tmp_path / "sweep" / "logs").stat().st_mode & 0o777 == 0o700


def test_a_job_waits_for_another_sweeps_job_of_the_same_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = composed(*TINY)
    one, tried = Cell(0, ("seed=0",), config, tmp_path / f"run-{fingerprint(config)}"), []
    ledger = Ledger(tmp_path / "sweep")

    def busy_at_first(config: Any, given: list[str]) -> None:
        tried.append(given)
        if len(tried) < 3:
            raise Busy("run: another process is running this job")

    monkeypatch.setattr("tests.builders.counting.counting", busy_at_first)
    monkeypatch.setattr(node, "BUSY_S", 0.0)
    with ledger.held():
        ledger.begin([one], "dp-lora", code_version(), "tests.builders.counting:counting", any_code=False)
        ledger.freeze(one)
    node._run(ledger.folder, one.identity, alone=True)
    assert len(tried) == 3 and capsys.readouterr().err.count("waiting for it") == 1
    tried.clear()
    with pytest.raises(Busy):  # its other processes could not wait with it
        node._run(ledger.folder, one.identity, alone=False)


# The pool of this machine

STEPS = 15


class Driver:
    """`hydra/launcher=local` with jobs that count to `STEPS`."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self.nursery, self.folder, self.outputs = nursery, folder, folder / "outputs"
        self._said: dict[int, Path] = {}
        folder.mkdir()

    def start(self, *given: str, **environment: str) -> Forked:
        chosen = once(
            *TINY, f"paths.outputs={self.outputs}", "stages=[finetune]", f"train.max_steps={STEPS}",
            "hydra/launcher=local", "hydra.launcher.poll_s=0.1", "hydra.launcher.name=mine",
            "hydra.launcher.job=tests.builders.counting:counting", *given,
        )  # fmt: skip
        said = self.folder / f"driver{len(self._said)}.txt"
        surroundings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        process = self.nursery.start(["-m", *chosen], said, self.folder, surroundings)
        self._said[process.pid] = said
        return process

    def ended(self, process: Forked) -> str:
        """What the driver has said, once it has ended."""
        process.wait(900)
        return self._said[process.pid].read_text()

    def cells(self) -> list[Path]:
        path = self.outputs / "sweeps" / "mine" / "sweep.json"
        return [Path(row["directory"]) for row in read_json(path)["cells"]] if path.exists() else []

    def starts(self) -> list[list[dict[str, Any]]]:
        return [starts(directory) for directory in self.cells()]

    def right(self) -> list[bool]:
        """Which cells ended as one that nothing happened to."""
        results = [directory / "result.json" for directory in self.cells()]
        return [
            path.exists() and read_json(path)["state"] == counted(read_json(path)["seed"], STEPS)
            for path in results
        ]


@pytest.fixture
def pool(nursery: Nursery, tmp_path: Path) -> Driver:
    return Driver(nursery, tmp_path / "pool")


def until(condition: Callable[[], Any], timeout: float = 600) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_the_pool_keeps_to_its_size_and_hands_out_gpus(pool: Driver) -> None:
    process = pool.start(
        "seed=0,1,2,3", "resources.gpus=1", "tracking.tags=[3-raise]", "hydra.launcher.max_parallel=3",
        CUDA_VISIBLE_DEVICES="4,7",
    )  # fmt: skip
    said = pool.ended(process)
    assert process.returncode == 1, said
    assert pool.right() == [True, True, True, False]
    assert "failed: cell 3" in said and "no such luck" in said and "1 of 4 cells failed" in said
    rows = [rows[0] for rows in pool.starts()]
    assert {row["gpus"] for row in rows} == {"4", "7"}
    # There is room for three, and GPUs for two: the third waits until one of the first has ended.
    ended = [(directory / "status.json").stat().st_mtime for directory in pool.cells()[:2]]
    assert sorted(row["time"] for row in rows)[2] >= min(ended)


def test_a_killed_driver_of_the_pool_is_replaced_and_a_killed_job_is_started_again(pool: Driver) -> None:
    words = ("seed=0,1,2", "hydra.launcher.max_parallel=2", "tracking.tags=[0-hold,1-hold,2-hold]")
    first = pool.start(*words)
    until(lambda: sum(map(len, pool.starts())) == 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = pool.start(*words)
    go(pool.cells()[0])
    until(lambda: sum(map(len, pool.starts())) == 3)
    os.kill(pool.starts()[2][0]["pid"], signal.SIGKILL)
    for directory in pool.cells():
        go(directory)
    said = pool.ended(second)
    assert second.returncode == 0, said
    assert pool.right() == [True, True, True]
    assert [len(rows) for rows in pool.starts()] == [1, 1, 2]


def test_ctrl_c_lets_the_jobs_of_the_pool_save(pool: Driver) -> None:
    first = pool.start("seed=0", "tracking.tags=[0-hold]")
    until(lambda: any((directory / "now").exists() for directory in pool.cells()))
    first.send_signal(signal.SIGINT)
    said = pool.ended(first)
    assert first.returncode == 130, said
    assert said.splitlines()[-1].endswith("its jobs have saved and stopped; the same command continues")
    go(pool.cells()[0])
    again = pool.start("seed=0", "tracking.tags=[0-hold]")
    said = pool.ended(again)
    assert again.returncode == 0, said
    assert pool.right() == [True] and pool.starts()[0][1]["from"] > 0
