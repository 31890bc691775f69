"""W&B stays as silent as the user told it to be, and what it would refuse is found before a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from dp_lora.config.checks import check
from dp_lora.config.wandb_settings import folder_of, named, wandb_mode
from dp_lora.errors import UserError
from tests.builders.tiny import TINY, composed


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An account with a key, so that a run would be online, whose owner has not said anything yet."""
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    for folder in ("config", "here/wandb"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def settings(*lines: str) -> str:
    """A file of settings as `wandb offline` and `wandb disabled` leave it."""
    return "\n".join(["[default]", *lines, ""])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "online"),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_MODE": "shared"}, "online"),
        ({"WANDB_MODE": ""}, "online"),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "Offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        *(({"WANDB_MODE": word}, "disabled") for word in ("none", "off", "false", "False", "no", "0")),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "True"}, "disabled"),
        ({"WANDB_DISABLED": "1"}, "disabled"),
        ({"WANDB_DISABLED": "yes"}, "disabled"),
        ({"WANDB_DISABLED": "false"}, "online"),
        ({"WANDB_DISABLED": ""}, "online"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_the_environment_is_heard(
    variables: dict[str, str], expected: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode("auto") == expected


@pytest.mark.parametrize(
    ("in_home", "in_here", "expected"),
    [
        ("mode = offline", None, "offline"),
        (None, "mode = offline", "offline"),
        (None, "mode = disabled", "disabled"),
        (None, "mode = dryrun", "offline"),
        ("mode = offline", "mode = online", "online"),
        ("mode = online", "mode = disabled", "disabled"),
        (None, "disabled = true", "disabled"),
        (None, "project = mine", "online"),
    ],
)
def test_wandb_offline_and_wandb_disabled_are_heard(
    in_home: str | None, in_here: str | None, expected: str, home: Path
) -> None:
    for folder, line in (("config", in_home), ("here/wandb", in_here)):
        if line is not None:
            (home / folder / "settings").write_text(settings(line))
    assert wandb_mode("auto") == expected


def test_what_wandbs_own_command_writes_is_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk.lib.settings_file import SettingsFiles

    file = SettingsFiles(
        global_settings=home / "config/settings", local_settings=home / "here/wandb/settings"
    )
    file.set("mode", "offline")  # the whole of `wandb offline`
    file.save()
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode("auto") == "online", "the environment is newer than the file, as W&B has it"
    monkeypatch.delenv("WANDB_MODE")
    assert wandb_mode("online") == "online", "and tracking.wandb=online says so in so many words"


def test_a_login_elsewhere_is_no_key_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    (home / "netrc").write_text("machine wandb.example.org login user password x\n")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    assert wandb_mode("auto") == "offline"
    (home / "config/settings").write_text(settings("base_url = https://wandb.example.org"))
    assert wandb_mode("auto") == "online"


def test_what_cannot_be_read_is_no_leave_to_send(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError) as refusal:
        wandb_mode("auto")
    assert str(refusal.value) == (
        "WANDB_MODE='ofline': expected online, offline, disabled, shared, dryrun or run; did you mean "
        "'offline'?"
    )
    monkeypatch.delenv("WANDB_MODE")
    (home / "here/wandb/settings").write_text("mode = offline")
    with pytest.raises(UserError, match=r"wandb/settings: W&B's settings cannot be read"):
        wandb_mode("auto")
    assert wandb_mode("offline") == "offline"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            f"tracking.tags=[a,{'t' * 65}]",
            f"tracking.tags='{'t' * 65}': 65 characters, expected 1 to 64 a tag",
        ),
        ("tracking.tags=['']", "tracking.tags='': 0 characters, expected 1 to 64 a tag"),
        (
            "tracking.project=a/b",
            "tracking.project='a/b': expected 1 to 128 characters, none of them in /\\#?%:",
        ),
        (
            f"tracking.project={'p' * 129}",
            f"tracking.project='{'p' * 129}': expected 1 to 128 characters, none of them in /\\#?%:",
        ),
    ],
)
def test_what_wandb_refuses_is_refused_before_the_run(given: str, expected: str) -> None:
    with pytest.raises(UserError) as refusal:
        composed(*TINY, given)
    assert str(refusal.value) == expected


def test_the_longest_that_wandb_takes_is_taken() -> None:
    from wandb import Settings

    config = composed(*TINY)
    config.tracking.tags, config.tracking.project = ["t" * 64], "p" * 128
    check(config)
    Settings(run_tags=tuple(config.tracking.tags), project=config.tracking.project)
    for wrong in ({"run_tags": ("t" * 65,)}, {"project": "p" * 129}, {"project": "a#b"}):
        with pytest.raises(Exception, match="characters"):
            Settings(**wrong)


def test_auto_is_online_where_a_key_is_and_offline_elsewhere(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = home / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("WANDB_API_KEY")
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("disabled") == "disabled"
    with pytest.raises(UserError, match=r"tracking\.wandb='online': no API key"):
        wandb_mode("online")
    netrc.write_text("machine example.org login user password x\n")
    assert wandb_mode("auto") == "offline"
    netrc.write_text("machine api.wandb.ai login user password x\n")
    assert wandb_mode("auto") == wandb_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"
    monkeypatch.delenv("WANDB_MODE")
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode("auto") == "online"


# Names


NAMES = ("entity", "project", "group", "name", "folder")


def names(*words: str) -> tuple[str | None, ...]:
    config = composed(*TINY, "tracking.wandb=auto", *words)
    found = named(config.tracking, config.experiment)
    return tuple(getattr(found, field) for field in NAMES)


def test_names_come_from_fields_then_variables_then_settings(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("ENTITY", "PROJECT", "RUN_GROUP", "NAME", "TAGS"):
        monkeypatch.delenv(f"WANDB_{variable}", raising=False)
    assert names() == (None, "dp-lora", "default", None, None)
    (home / "config" / "settings").write_text(settings("entity = team-a", "project = scans"))
    assert names() == ("team-a", "scans", "default", None, None)
    (home / "here" / "wandb" / "settings").write_text(settings("project = local"))
    assert names()[:2] == ("team-a", "local"), "the folder of the command is nearer than the home"
    for variable, value in {
        "ENTITY": "team-b", "PROJECT": "xrays", "RUN_GROUP": "night", "NAME": "first", "DIR": str(home / "w"),
    }.items():  # fmt: skip
        monkeypatch.setenv(f"WANDB_{variable}", value)
    assert names() == ("team-b", "xrays", "night", "first", str(home / "w"))
    words = [f"tracking.{field}=own" for field in NAMES]
    assert names(*words) == ("own",) * 5
    assert names("tracking.project=own")[:3] == ("team-b", "own", "night")
    monkeypatch.setenv("WANDB_TAGS", "a,b,")
    assert named(composed(*TINY).tracking, "x").tags == ["a", "b"]
    assert named(composed(*TINY, "tracking.tags=[c]").tracking, "x").tags == ["c"]


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("WANDB_PROJECT", "a/b", "tracking.project='a/b': expected 1 to 128 characters, none of them in "),
        ("WANDB_ENTITY", "e" * 129, f"tracking.entity='{'e' * 129}': expected 1 to 128 characters in one"),
        ("WANDB_NAME", "a\nb", "tracking.name='a\\nb': expected 1 to 128 characters in one line"),
        ("WANDB_TAGS", "t" * 65, f"tracking.tags='{'t' * 65}': 65 characters, expected 1 to 64 a tag"),
        ("WANDB_DIR", "~nobody-here/w", "WANDB_DIR=~nobody-here/w: ~nobody-here is the home of nobody"),
    ],
)
def test_a_variable_that_w_and_b_would_refuse_is_one_line(
    variable: str, value: str, line: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as caught:
        names()
    assert str(caught.value).startswith(line)


def test_a_new_folder_is_its_owner_s_and_one_that_is_there_stays_as_it_is(home: Path) -> None:
    new, shared = home / "a" / "new", home / "shared"
    shared.mkdir(mode=0o755)
    for place, mode in ((new, 0o700), (shared, 0o755)):
        tracking = composed(*TINY, f"tracking.folder={place}").tracking
        assert folder_of(tracking) == place and place.stat().st_mode & 0o777 == mode
    assert folder_of(composed(*TINY).tracking) is None


def test_settings_that_cannot_be_read_matter_only_where_something_would_be_sent(home: Path) -> None:
    (home / "here" / "wandb" / "settings").write_text("no section\n")
    with pytest.raises(UserError, match="W&B's settings cannot be read"):
        names()
    assert names("tracking.wandb=offline")[1] == "dp-lora"
