"""Provenance: no person, folder or private seed in it, restarts counted, the code known by its hash."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from dp_lora.records.provenance import finished, git_state, provenance
from tests.builders.tracked import job


def test_provenance_names_no_person_folder_or_private_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_USER", "dr_who")
    config = job()
    config.privacy.insecure_seed = 987654321
    record = provenance(config)
    text = json.dumps(record)
    assert not any(secret in text for secret in ("dr_who", "987654321", str(Path.home()) + "/"))
    assert record["slurm"] == {"SLURM_JOB_ID": "4711"}
    assert record["seeds"] == {"public": 0}
    assert record["reproducible_noise"] is True
    assert record["versions"]["wandb"]
    assert record["hardware"]["cores"] >= 1
    assert record["restarts"] == 0
    assert record["end"] is None


def test_a_restart_keeps_the_start_and_is_counted() -> None:
    first = {**provenance(job()), "start": "2026-01-01T00:00:00+00:00"}
    second = finished(provenance(job(), previous=first))
    assert (second["start"], second["restarts"]) == ("2026-01-01T00:00:00+00:00", 1)
    assert second["end"] > second["start"]


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_the_dirty_hash_follows_the_code_and_nothing_else(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"sha": None, "dirty": None}
    code = tmp_path / "dp_lora"
    code.mkdir()
    (code / "a.py").write_text("1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a", "--no-verify")
    clean = git_state(tmp_path)
    assert clean["sha"] is not None
    assert len(clean["sha"]) == 40
    (tmp_path / "notes.txt").write_text("mine")
    assert git_state(tmp_path) == clean
    assert clean["dirty"] is None
    seen = set()
    for change in (code / "a.py", code / "b.py"):
        for text in ("2\n", "3\n"):
            change.write_text(text)
            seen.add(git_state(tmp_path)["dirty"])
    assert len(seen) == 4
    assert None not in seen
