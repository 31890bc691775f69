"""How the commands end: one line on stderr and the exit status, whichever command it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dp_lora.commands import audit, check, export, import_checkpoint, neighbours
from dp_lora.commands.parser import Parser, ending
from dp_lora.errors import UserError

COMMANDS: dict[str, tuple[Callable[[], None], list[str], str, str]] = {
    "dp-lora-audit": (audit.main, ["RUN"], "dp_lora.auditing.audit.audit", "the same command continues"),
    "dp-lora-check": (
        check.main, ["data=digits"], "dp_lora.data.inspection.inspect", "nothing was written",
    ),
    "dp-lora export": (export.main, ["RUN", "NEW"], "dp_lora.commands.export.export", "nothing was written"),
    "dp-lora-neighbours": (
        neighbours.main, ["RUN"], "dp_lora.commands.neighbours.inspect", "nothing was written",
    ),
    "dp-lora-import": (
        import_checkpoint.main, [__file__, "--layout=cin256", "--out=NEW"],
        "dp_lora.models.compvis.import_checkpoint", "nothing was written",
    ),
}  # fmt: skip
"""The function of each command, words that it takes, the function behind it, and what it says of Ctrl-C."""


def ended(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[name][0]()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_says_what_was_left(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*words: object, **options: object) -> None:
        raise KeyboardInterrupt

    _, words, behind, left = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(behind, interrupted)
    assert ended(name, words, monkeypatch) == 130
    assert capsys.readouterr().err == f"{name}: interrupted; {left}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_flag_that_there_is_not_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(name, [*COMMANDS[name][1], "--nowhere"], monkeypatch) == 2
    said = capsys.readouterr()
    assert said.err == f"{name}: unrecognized arguments: --nowhere; --help lists what there is\n"
    assert not said.out and not list(tmp_path.iterdir())


def test_an_interruption_with_a_reason_is_told_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, ending("dp-lora-audit", interrupted="go on"):
        raise KeyboardInterrupt("stopped after step 3 of 9")
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "dp-lora-audit: stopped after step 3 of 9; go on\n"


def test_what_is_no_mistake_of_the_user_passes() -> None:
    with pytest.raises(ZeroDivisionError), ending("dp-lora-audit", interrupted="go on"):
        _ = 1 / 0
    with pytest.raises(UserError, match=r"^expected; --help lists what there is$"):
        Parser().error("expected")
