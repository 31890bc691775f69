"""Places that cannot be used: one line that names the field, and what lies there is left as it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from dp_lora.__main__ import main
from dp_lora.commands import audit, export, fetch, import_checkpoint
from dp_lora.config.wandb_settings import wandb_mode
from dp_lora.errors import UserError
from dp_lora.jobs.image_index import default_folder
from tests.builders.tiny import once, words

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Refused:
    """Gives the one line with which a job that has no model yet refuses its words; it may not write."""
    (tmp_path / "diary").write_text("my diary")
    (tmp_path / "begun").write_text('{"my": "diary"')
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "read-only.jsonl").touch()
    before = contents(tmp_path)

    def call(*given: str, command: Callable[[], Any] = main) -> str:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["dp-lora", *once(*given)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            sys.exit(command())
        GlobalHydra.instance().clear()
        said, errors = capfd.readouterr()
        assert (stop.value.code, said, errors.count("\n")) == (2, "", 1), (stop.value.code, said, errors)
        assert contents(tmp_path) == before
        return str(errors)

    return call


def contents(folder: Path) -> dict[str, str | None]:
    return {path.name: path.read_text() if path.is_file() else None for path in folder.rglob("*")}


NOWHERE = "is a link that leads nowhere; expected another place"
NOBODY = "is the home of nobody here; expected a path that is there"
LONG = "n" * 300
PLACES = {
    "paths.outputs={}/dangling": f"paths.outputs={{0}}/dangling: {{0}}/dangling {NOWHERE}",
    "paths.outputs={}/loop": (
        "paths.outputs={0}/loop: {0}/loop: Too many levels of symbolic links; expected another place"
    ),
    f"paths.outputs={{}}/{LONG}": (
        f"paths.outputs={{0}}/{LONG}: {LONG[:20]}...: File name too long; expected another place"
    ),
    "paths.outputs=/proc/x": (
        "paths.outputs=/proc/x: /proc is not a directory that can be written (No such file or directory)"
    ),
    "paths.outputs={}/diary": "paths.outputs={0}/diary: {0}/diary is not a directory that can be written",
    "paths.cache={}/loop": (
        "paths.cache={0}/loop: {0}/loop: Too many levels of symbolic links; expected another place"
    ),
    "paths.outputs=~nouserx/o": f"paths.outputs=~nouserx/o: ~nouserx {NOBODY}",
    "data.source=~nouserx/images": f"data.source=~nouserx/images: ~nouserx {NOBODY}",
    "model.pretrained=~nouserx": f"model.pretrained=~nouserx: ~nouserx {NOBODY}",
    "paths.ledger=/dev/full": (
        "paths.ledger=/dev/full: no regular file; expected what this program wrote, or a new name for it"
    ),
    "paths.ledger={}/pipe": (
        "paths.ledger={0}/pipe: no regular file; expected what this program wrote, or a new name for it"
    ),
    "paths.ledger={}": (
        "paths.ledger={0}: no regular file; expected what this program wrote, or a new name for it"
    ),
    "paths.ledger={}/dangling": f"paths.ledger={{0}}/dangling: {{0}}/dangling {NOWHERE}",
    f"paths.ledger={{}}/{LONG}": (
        f"paths.ledger={{0}}/{LONG}: {LONG[:20]}...: File name too long; expected another place"
    ),
    "paths.ledger={}/diary": "{0}/diary: the ledger cannot be read ({0}/diary, line 1: no JSON",
    "paths.index={}/pipe": "paths.index={0}/pipe: {0}/pipe is not a directory that can be written",
    "paths.index={}/loop": (
        "paths.index={0}/loop: {0}/loop: Too many levels of symbolic links; expected another place"
    ),
}


@pytest.mark.parametrize("word", PLACES, ids=lambda word: word[:40])
def test_a_place_that_cannot_be_used_is_one_line(word: str, tmp_path: Path, refused: Refused) -> None:
    # Without noise there is none to calibrate.
    given = [*words(tmp_path / "cache", tmp_path / "outputs"), "privacy.epsilon=inf", word.format(tmp_path)]
    line = refused(*given)
    assert line.startswith(f"dp-lora: {PLACES[word].format(tmp_path)}"), line


COMMANDS = {
    "export": (lambda: export.main(["~nouserx/run", "out"]), f"~nouserx/run: ~nouserx {NOBODY}"),
    "audit": (audit.main, f"~nouserx/run: ~nouserx {NOBODY}"),
    "fetch": (lambda: fetch.main(["mnist", "--data", "~nouserx"]), f"--data=~nouserx: ~nouserx {NOBODY}"),
    "import": (import_checkpoint.main, f"--out=~nouserx: ~nouserx {NOBODY}"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_know_no_such_home_either(name: str, refused: Refused) -> None:
    command, expected = COMMANDS[name]
    given = ["x.ckpt", "--layout", "cin256", "--out", "~nouserx"] if name == "import" else ["~nouserx/run"]
    assert expected in refused(*given, command=command)


@pytest.mark.parametrize("variable", ["WANDB_CONFIG_DIR", "WANDB_DIR", "NETRC", "XDG_DATA_HOME"])
def test_nor_do_the_variables_of_the_shell(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY", "WANDB_CONFIG_DIR", "WANDB_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "~nouserx")
    with pytest.raises(UserError, match=f"^{variable}=~nouserx: ~nouserx {NOBODY}$"):
        default_folder() if variable == "XDG_DATA_HOME" else wandb_mode("auto")


def test_a_netrc_that_is_no_utf_8_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_bytes(b"machine api.wandb.ai login m\xfcller password x\n")
    assert wandb_mode("auto") == "offline"


def test_a_ledger_that_may_not_be_written_is_one_line(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before a run directory is made. Root may write everything, so the answer is given here."""
    ledger, allowed = tmp_path / "read-only.jsonl", os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != ledger and allowed(path, mode))
    line = refused(
        *words(tmp_path / "cache", tmp_path / "outputs"), "privacy.epsilon=inf", f"paths.ledger={ledger}"
    )
    assert line.startswith(f"dp-lora: paths.ledger={ledger}: cannot be read and written; expected a file")
    assert not (tmp_path / "outputs").exists()
