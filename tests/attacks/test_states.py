"""A checkpoint goes on only with the record of the steps that led to it: no step is released uncounted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_lora.privacy import step as algorithm
from dp_lora.storage.files import read_json, read_lines
from tests.builders.commands import FOLDER, dp_lora, interrupted, state_of
from tests.builders.image_sets import pixels, write_folder
from tests.builders.tiny import words

pytestmark = pytest.mark.usefixtures("unchecked")


class Cut:
    """A run on a folder that was cut off, and its words."""

    def __init__(self, cache: Path, root: Path, *more: str) -> None:
        self.root, images = root, write_folder(root / "set", pixels(9, 24))
        self.words = [
            *words(cache, root / "outputs"), *FOLDER, "stages=[finetune]", f"data.source={images}",
            "train.checkpoint_minutes=0", *more,
        ]  # fmt: skip
        self.run = self.begin("outputs", at=3)

    def begin(self, outputs: str, at: int) -> Path:
        """Begins a run, which is cut off in its `at`-th step."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(algorithm, "noised_mean", interrupted(at))
            assert dp_lora(*self.words, f"paths.outputs={self.root / outputs}") == 130
        (run,) = (self.root / outputs / "default").iterdir()
        return run

    def elsewhere(self) -> list[str]:
        """Words by which neither the ledger nor the index knows the run."""
        return [f"paths.ledger={self.root / 'new.jsonl'}", f"paths.index={self.root / 'new_index'}"]


def refused(cut: Cut, run: Path, said: str, capsys: Any, *more: str) -> None:
    """The run does not go on, and says so in one line; nothing that it released or recorded changes."""

    def kept() -> dict[str, str]:
        names = ("state.pt", "executions.jsonl", "metrics.jsonl", "privacy.json")
        return {path: digest for path, digest in state_of(run).items() if path.endswith(names)}

    before = kept()
    capsys.readouterr()
    assert dp_lora(*cut.words, f"paths.outputs={run.parents[1]}", *more) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("dp-lora")]
    assert said in line
    assert kept() == before and not (run / "adapter").exists()


@pytest.mark.parametrize("more", [(), ("privacy.insecure_seed=3",)], ids=["keyed", "seeded"])
@pytest.mark.parametrize("lost", ["record", "record and charge"])
def test_a_state_without_its_record_does_not_go_on(
    lost: str, more: tuple[str, ...], cache: Path, tmp_path: Path, capsys: Any
) -> None:
    """The two steps behind the state would be released and not counted."""
    cut = Cut(cache, tmp_path, *more)
    (cut.run / "checkpoint" / "executions.jsonl").unlink()
    if lost == "record and charge":
        (cut.run / "checkpoint" / "charge.json").unlink()
    charged = state_of(tmp_path / "outputs.image_index")
    given = cut.elsewhere() if lost == "record" else []
    refused(cut, cut.run, "executions.jsonl: ", capsys, *given)
    assert state_of(tmp_path / "outputs.image_index") == charged and not (tmp_path / "new.jsonl").exists()


def without_state(cut: Cut) -> None:
    """The key and what was released are all that is left."""
    (cut.run / "checkpoint" / "executions.jsonl").unlink()
    (cut.run / "checkpoint" / "state.pt").unlink()


def cut_record(cut: Cut) -> None:
    """The record loses the last step that the state has behind it, and all after it."""
    record = cut.run / "checkpoint" / "executions.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:2]))


@pytest.mark.parametrize("lose", [without_state, cut_record])
def test_a_record_of_fewer_steps_than_were_stated_does_not_go_on(
    lose: Callable[[Cut], None], cache: Path, tmp_path: Path, capsys: Any
) -> None:
    """Where neither the ledger nor the index knows the run, its own privacy.json does."""
    cut = Cut(cache, tmp_path)
    assert read_json(cut.run / "privacy.json")["steps"] == 3
    lose(cut)
    refused(cut, cut.run, "executions.jsonl: ", capsys, *cut.elsewhere())


def test_the_state_of_another_run_does_not_go_on(cache: Path, tmp_path: Path, capsys: Any) -> None:
    """Of two runs of one configuration each has a key and a record of its own."""
    cut = Cut(cache, tmp_path)
    other = cut.begin("others", at=1)
    shutil.copyfile(cut.run / "checkpoint" / "state.pt", other / "checkpoint" / "state.pt")
    refused(cut, other, "state.pt: ", capsys)


def test_a_state_of_another_lineage_does_not_go_on(cache: Path, tmp_path: Path, capsys: Any) -> None:
    """The record has as many steps, but none of them led to this state."""
    cut = Cut(cache, tmp_path)
    other = cut.begin("others", at=3)
    shutil.copyfile(cut.run / "checkpoint" / "state.pt", other / "checkpoint" / "state.pt")
    refused(cut, other, "state.pt: ", capsys)


def test_a_state_of_before_lineages_is_one_line(cache: Path, tmp_path: Path, capsys: Any) -> None:
    cut = Cut(cache, tmp_path)
    path = cut.run / "checkpoint" / "state.pt"
    saved = torch.load(path, weights_only=True)
    del saved["state"]["lineage"]
    torch.save(saved, path)
    refused(cut, cut.run, "state.pt: ", capsys)


def test_what_was_cut_off_goes_on_with_its_record(cache: Path, tmp_path: Path) -> None:
    cut = Cut(cache, tmp_path)
    assert dp_lora(*cut.words) == 0
    rows = [row["step"] for row in read_lines(cut.run / "metrics.jsonl")]
    assert rows == [1, 2, 3] and read_json(cut.run / "privacy.json")["steps"] == 3
