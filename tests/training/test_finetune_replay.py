"""A training under a secret key that dies, changes and goes on: what it draws and what it releases."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.jobs.begun import begun
from dp_lora.privacy import executions
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.executions import Executions
from dp_lora.privacy.mechanism import all_reduced
from dp_lora.privacy.randomness import Randomness
from dp_lora.storage.files import read_lines, write_lines
from dp_lora.training import finetune
from tests.builders.finetuning import SHORT, Crash, Given, crashing, given, short_of_memory
from tests.builders.tiny import TINY, composed

pytestmark = pytest.mark.usefixtures("unchecked")


KEY = bytes(range(32))


@pytest.fixture(scope="module")
def job(pretrained: Path, digits: ImageSplits) -> Given:
    """Three steps."""
    return given(pretrained, digits, "train.max_steps=3", seeded=False)


def keyed(folder: Path) -> Path:
    """A folder of a run whose key is known here."""
    folder.mkdir()
    (folder / "key").write_bytes(KEY)
    return folder


def sum_of_another_code(patched: pytest.MonkeyPatch) -> None:
    """Changes a sum in its last bits, by what the run cannot know of."""
    patched.setattr(algorithm, "all_reduced", lambda *given: all_reduced(*given) * (1 + 2**-50))


class Draws:
    """The keys of batches and the released values of a run, in their order."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.batches: list[bytes] = []
        self.released: list[torch.Tensor] = []
        batch, noised = algorithm.poisson_batch, algorithm.noised_mean

        def drawn(randomness: Randomness, *rest: Any) -> torch.Tensor:
            self.batches.append(randomness.key)
            return batch(randomness, *rest)

        def kept(*rest: Any) -> torch.Tensor:
            self.released.append(noised(*rest))
            return self.released[-1]

        patched.setattr(algorithm, "poisson_batch", drawn)
        patched.setattr(algorithm, "noised_mean", kept)


@pytest.mark.parametrize("write", range(1, 7))
def test_a_run_that_dies_after_any_write_of_its_record_ends_bit_identical(
    write: int, job: Given, uninterrupted: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dies before a write is as what dies after the one before."""
    folder = keyed(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(executions, "append_line", crashing(executions.append_line, write, late=True))
        with pytest.raises(Crash):
            job.run(folder)
    told, released = job.run(folder)
    assert told["executed"] == 3 and torch.equal(released, uninterrupted)


@pytest.fixture(scope="module")
def uninterrupted(job: Given, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "check_engine", lambda *args: None)
        return job.run(keyed(tmp_path_factory.mktemp("whole") / "run"))[1]


def test_a_step_with_another_sum_is_thrown_away_and_has_a_fresh_batch(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keyed(tmp_path / "run")
    draws = Draws(monkeypatch)
    with monkeypatch.context() as patched:
        descend = algorithm.PrivateStep._descend
        patched.setattr(algorithm.PrivateStep, "_descend", crashing(descend, 2, late=False))
        with pytest.raises(Crash):
            job.run(folder)
    sum_of_another_code(monkeypatch)
    told, _ = job.run(folder)
    assert told["started"] == [1] and told["executed"] == begun(folder) == 3 and list(told["rows"]) == [2]
    # Steps 0 and 1; step 1 again, whose sum is another one and is thrown away; step 1 with a fresh batch.
    first, second, thrown_away, anew = draws.batches
    assert second == thrown_away and len({first, second, anew}) == 3
    assert len(draws.released) == 3
    sums = {row["execution"]: row["sum"] for row in read_lines(folder / "executions.jsonl") if "sum" in row}
    assert len(sums) == len(set(sums.values())) == 3


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_whose_last_step_has_another_sum_ends_before_it(
    saved: bool, job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All executions of the plan were begun: no noise may be drawn any more, and none is."""
    folder = keyed(tmp_path / "run")
    minutes = 0 if saved else 60
    train = dataclasses.replace(job.config.train, checkpoint_minutes=minutes)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, train=train))
    with monkeypatch.context() as patched:
        descend = algorithm.PrivateStep._descend
        patched.setattr(algorithm.PrivateStep, "_descend", crashing(descend, 3, late=False))
        with pytest.raises(Crash):
            job.run(folder)
    assert begun(folder) == 3
    before = (folder / "executions.jsonl").read_bytes()
    draws = Draws(monkeypatch)
    sum_of_another_code(monkeypatch)
    if saved:
        told, _ = job.run(folder)
        assert told["executed"] == 3 and not told["rows"] and not (folder / "key").exists()
        # Asked again, it gives the same without any key.
        assert job.run(folder)[0]["executed"] == 3
    else:
        with pytest.raises(UserError, match="the privacy of this run is spent"):
            job.run(folder)
    assert not draws.released and (folder / "executions.jsonl").read_bytes() == before


def test_a_step_that_runs_out_of_memory_is_one_execution(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*TINY, *SHORT, "train.microbatch=12", "train.max_steps=3")
    short_of_memory(monkeypatch, most=6)
    draws = Draws(monkeypatch)
    told, _ = dataclasses.replace(job, config=config).run(tmp_path)
    assert told["executed"] == 3 == len(draws.released) and list(told["rows"]) == [1, 2, 3]
    assert len(set(draws.batches)) == 4, "what was given up has drawn a batch of its own"


def test_what_an_earlier_version_began_is_counted_and_begun_anew(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record has no sums, and its noise was that of the step's number."""
    folder = keyed(tmp_path / "run")
    with monkeypatch.context() as patched:
        descend = algorithm.PrivateStep._descend
        patched.setattr(algorithm.PrivateStep, "_descend", crashing(descend, 2, late=False))
        with pytest.raises(Crash):
            job.run(folder)
    rows = [{"step": step, "execution": f"{step:016x}"} for step in range(2)]
    write_lines(folder / "executions.jsonl", rows)
    saved = torch.load(folder / "state.pt", weights_only=True)
    saved["state"]["lineage"] = rows[0]["execution"]
    torch.save(saved, folder / "state.pt")
    draws = Draws(monkeypatch)
    told, _ = job.run(folder)
    assert told["started"] == [1] and told["executed"] == begun(folder) == 3 and list(told["rows"]) == [2]
    assert KEY not in draws.batches and len(draws.released) == 1


def test_what_was_begun_is_told_before_the_batch_is_drawn(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nothing that happens later can make it untrue. A replay tells nothing new."""
    told: list[int | str] = []
    step = a_step(job, tmp_path / "executions.jsonl")
    step.sgd.begun = lambda executions, epsilon: told.append(executions)
    batch = algorithm.poisson_batch
    monkeypatch.setattr(algorithm, "poisson_batch", lambda *given: (told.append("batch"), batch(*given))[1])
    rows = [step(0), step(1)]
    assert told == [1, "batch", 2, "batch"]
    assert rows[0]["epsilon"] == step.sgd.curve(1) < rows[1]["epsilon"] == step.sgd.curve(2)
    step.sgd.gradients.detach()
    told.clear()
    again = a_step(job, tmp_path / "executions.jsonl")
    again.sgd.begun = lambda executions, epsilon: told.append(executions)
    again(0)
    assert told == [2, "batch"]
    sum_of_another_code(monkeypatch)
    again(1)
    assert told == [2, "batch", "batch", 3, "batch"]


# One step


def a_step(job: Given, record: Path, **numerics: Any) -> finetune.FinetuneStep:
    config, key = composed(*TINY, *SHORT), Randomness(KEY, secure=True)
    return finetune.FinetuneStep.on(
        job.model(), job.latents, job.labels, job.plan, key, config.train, 8, Executions(record, numerics)
    )


def test_other_parameters_have_another_batch(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when all that is known is the same, as in two copies of a run: one bit of one number is enough."""
    draws = Draws(monkeypatch)
    for number in range(3):
        step = a_step(job, tmp_path / f"{number}.jsonl")
        if number == 2:
            flat = step.sgd.parameters[-1].data.view(-1)
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(2.0))
        step(0)
        step.sgd.gradients.detach()
    assert draws.batches[0] == draws.batches[1] != draws.batches[2]
    assert torch.equal(draws.released[0], draws.released[1])


def test_an_empty_batch_of_other_parameters_is_no_replay(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sum is the same, zero, but its noise is not: a second release, which is counted."""
    empty = torch.empty(0, dtype=torch.int64)
    monkeypatch.setattr(algorithm, "poisson_batch", lambda *args: empty)
    draws = Draws(monkeypatch)
    for number in range(3):
        step = a_step(job, tmp_path / "executions.jsonl")
        step.sgd.parameters[-1].data += float(number == 2)
        step(0)
        step.sgd.gradients.detach()
    assert torch.equal(draws.released[0], draws.released[1]) and step.sgd.executions.count == 2
    assert not torch.equal(draws.released[0], draws.released[2])


def test_processes_that_hold_different_sums_release_nothing(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = a_step(job, tmp_path / "executions.jsonl")
    before = [p.detach().clone() for p in step.sgd.parameters]
    draws = Draws(monkeypatch)
    monkeypatch.setattr(algorithm, "everyone", lambda own: [own, "another"])
    with pytest.raises(RuntimeError, match="different sums of one batch: nothing was released"):
        step(0)
    assert not draws.released and all(map(torch.equal, before, step.sgd.parameters))
    (row,) = read_lines(tmp_path / "executions.jsonl")
    assert "sum" not in row


def test_the_record_does_not_tell_the_sum(
    job: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who guesses the sum cannot check it against the record without the key, nor find a key there."""
    guesses: list[bytes] = []
    digest = algorithm.sum_digest
    monkeypatch.setattr(
        algorithm, "sum_digest", lambda *given: (guesses.append(digest(*given)), guesses[-1])[1]
    )
    a_step(job, tmp_path / "executions.jsonl")(0)
    text = (tmp_path / "executions.jsonl").read_text()
    assert guesses[0].hex() not in text and KEY.hex() not in text
    assert len(json.loads(text.splitlines()[1])["sum"]) == 64


# Several processes


def _process(rank: int, store: str, job: Given, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(minutes=5)
    )
    os.environ["RANK"] = str(rank)
    finetune.check_engine = lambda *args: None  # type: ignore[assignment]
    whole = job.run(Path(folder) / "whole")[1]
    # Both die after the sum of the second step is on record, and go on.
    noised = algorithm.noised_mean
    algorithm.noised_mean = crashing(noised, 2, late=False)  # type: ignore[assignment]
    try:
        job.run(Path(folder) / "broken")
    except Crash:
        algorithm.noised_mean = noised
    dist.barrier()
    again, broken = job.run(Path(folder) / "broken")
    # The second process computes with another library setting from here on.
    os.environ["MKL_CBWR"] = "AUTO" if rank == 0 else "COMPATIBLE"
    names = finetune.numerics(job.config, torch.device("cpu"), 8, "")["processes"]
    torch.save(
        {"whole": whole, "broken": broken, "names": names, "executed": again["executed"]}, f"{out}{rank}"
    )
    dist.destroy_process_group()


def test_two_processes_agree_and_replay_to_the_bit(
    job: Given, processes: ForkServerContext, tmp_path: Path
) -> None:
    folder, out = tmp_path / "runs", str(tmp_path / "out")
    for name in ("whole", "broken"):
        folder.mkdir(exist_ok=True)
        keyed(folder / name)
    both = [
        processes.Process(target=_process, args=(rank, str(tmp_path / "s"), job, str(folder), out))
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        assert process.exitcode == 0
    first, second = (torch.load(f"{out}{rank}", weights_only=True) for rank in range(2))
    assert torch.equal(first["whole"], second["whole"]) and torch.equal(first["broken"], second["broken"])
    assert torch.equal(first["whole"], first["broken"]) and first["executed"] == second["executed"] == 3
    assert begun(folder / "whole") == begun(folder / "broken") == 3
    assert first["names"] == second["names"] and first["names"][0] != first["names"][1]
