"""What twelve trainings at a fixed seed come to stays what it was, as far as machines round alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.builders.forked import Nursery
from tests.builders.same_bits import NAMES, result_of

KNOWN = json.loads(Path(__file__).with_name("same_bits.json").read_text())
TOLERANCES = {"epsilon": 1e-9, "noise_multiplier": 1e-9, "adapter": 1e-3, "samples": 1e-2, "scores": 1e-3}
"""Relative. The first two do not depend on any tensor."""


@pytest.mark.parametrize("name", NAMES)
def test_a_training_comes_to_what_it_did(name: str, cache: Path, nursery: Nursery, tmp_path: Path) -> None:
    """If a change of the results is meant, CHANGELOG says it, and same_bits.json is written anew."""
    found, known = result_of(name, tmp_path, cache, nursery), KNOWN[name]
    assert found.keys() == known.keys()
    for field, tolerance in TOLERANCES.items():
        if field in known:
            assert found[field] == pytest.approx(known[field], rel=tolerance), field


def test_interruption_changes_no_bit(cache: Path, nursery: Nursery, tmp_path: Path) -> None:
    digests = []
    for number, name in enumerate(("lora and embedder", "interrupted and resumed")):
        (folder := tmp_path / str(number)).mkdir()
        digests.append(result_of(name, folder, cache, nursery)["digest"])
    assert digests[0] == digests[1]
