"""The number of private images, from what a run releases: public where the relation says so, else nowhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from dp_lora.__main__ import main
from dp_lora.commands import export as export_command
from dp_lora.errors import UserError
from dp_lora.jobs.job import plan_of
from dp_lora.storage.files import read_json
from tests.builders.tiny import composed, once, words

pytestmark = pytest.mark.usefixtures("unchecked")

HIDDEN = ("privacy.adjacency=add_or_remove", "train.sample_rate=0.3", "privacy.delta=1e-4")
FEWER, MORE = 137, 138
"""Numbers of training images that nothing else in a run is equal to."""


SAID = (".json", ".jsonl", ".yaml", ".md", ".txt")
"""Endings of files that are text."""


def images(folder: Path, train: int, test: int) -> Path:
    """A folder with images of two classes, `train` to train and `test` to test."""
    rng = np.random.default_rng(0)
    for role, count in (("train", train), ("test", test)):
        for number in range(count):
            path = folder / role / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    return folder


def ran(command: list[str]) -> None:
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["dp-lora", *once(*command)])
        main()
    GlobalHydra.instance().clear()


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run directory of a job on `number` images, by the public command."""
    base = tmp_path_factory.mktemp("relation")

    def call(number: int, name: str, *given: str) -> Path:
        source = images(base / f"images_{name}", number, 29)
        command = [*words(cache, base / name), "data=imagefolder", f"data.source={source}"]
        command += ["data.image_size=8", "train.expected_batch_size=40", "train.max_steps=3"]
        command += ["privacy.epsilon=null", "privacy.noise_multiplier=2", "privacy.insecure_seed=0"]
        command += ["evaluation.classifier_epochs=1", *given]
        ran(command)
        (directory,) = (base / name / "default").iterdir()
        return directory

    return call


def released(directory: Path) -> dict[str, str]:
    """All that may leave a run, as text: its records and the adapter's, without what is private."""
    names = ("privacy.json", "result.json", "status.json", "metrics.jsonl", "provenance.json", "config.yaml")
    found = {name: (directory / name).read_text() for name in names}
    for path in (directory / "adapter").iterdir():
        found[f"adapter/{path.name}"] = path.read_bytes().decode("latin-1")
    return found


def numbers(record: Any) -> list[float]:
    """All numbers in a record of JSON."""
    if isinstance(record, dict):
        return [number for value in record.values() for number in numbers(value)]
    if isinstance(record, list):
        return [number for value in record for number in numbers(value)]
    return [float(record)] if isinstance(record, int | float) else []


@pytest.fixture(scope="module")
def two(run: Callable[..., Path]) -> tuple[Path, Path]:
    """Runs on neighbouring sets, whose sizes differ."""
    return run(FEWER, "fewer", *HIDDEN), run(MORE, "more", *HIDDEN)


def test_privacy_json_is_the_same_for_neighbours_of_different_size(two: tuple[Path, Path]) -> None:
    """Guarantee: under add_or_remove no field of it is a function of the number of images."""
    fewer, more = (read_json(directory / "privacy.json") for directory in two)
    assert fewer == more
    assert fewer["num_examples"] is None
    assert (fewer["sample_rate"], fewer["expected_batch_size"]) == (0.3, 40)
    assert fewer["adjacency"] == "add or remove one image, Poisson sampling"
    cards = [(directory / "adapter" / "README.md").read_text() for directory in two]
    assert cards[0] == cards[1]


def test_the_number_of_images_is_nowhere_in_what_is_released(two: tuple[Path, Path]) -> None:
    for directory, number in zip(two, (FEWER, MORE), strict=True):
        for name, text in released(directory).items():
            if name.endswith((".json", ".yaml", ".jsonl", ".md")):
                assert not re.search(rf"(?<![\d.]){number}(?![\d.])", text), name
        result = read_json(directory / "result.json")
        assert 29.0 not in numbers({key: result[key] for key in ("reference", "tested_on", "real_baseline")})
        spent = numbers(read_json(directory / "privacy.json"))
        # q N, N / B and 1 / N, which would tell it as well.
        for derived in (0.3 * number, number / 40, 40 / number, 1 / number):
            assert not any(abs(value - derived) < 1e-9 for value in spent)


def test_what_is_exported_does_not_tell_the_number(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Guarantee: `dp-lora export`, even with all that no epsilon covers, says the same of both neighbours."""
    texts = []
    for directory, number in zip(two, (FEWER, MORE), strict=True):
        folder = tmp_path / directory.parent.parent.name
        export_command.main([str(directory), str(folder), "--with-uncovered"])
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        text = {name: path.read_text() for name, path in found.items() if path.suffix in SAID}
        for name, content in text.items():
            assert not re.search(rf"(?<![\d.]){number}(?![\d.])", content), name
        texts.append(text)
    assert texts[0].keys() == texts[1].keys()
    for name in ("privacy.json", "config.yaml", "adapter/README.md"):
        assert texts[0][name] == texts[1][name], name


def test_the_owner_alone_is_told_the_mean_batch(
    run: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run(139, "told", *HIDDEN, "stages=[finetune]")
    said = capfd.readouterr()
    assert "139 training images, 41.7 in the mean batch" in said.err
    assert "139" not in re.sub(r"\S*/\S*", "", said.out)


def test_by_default_the_number_is_public_and_said_to_be(run: Callable[..., Path]) -> None:
    directory = run(140, "public", "stages=[finetune]", "privacy.delta=1e-4")
    record = read_json(directory / "privacy.json")
    assert record["num_examples"] == 140 and record["sample_rate"] == pytest.approx(40 / 140)
    assert record["adjacency"] == "zero out one image, the number of images is public, Poisson sampling"
    assert any("number of training images" in line for line in record["does_not_cover"])


def test_a_job_is_not_refused_by_the_private_number() -> None:
    """Guarantee: a delta above 1/N, or a divisor above N, ends no job under add_or_remove."""
    fixed = ("privacy.epsilon=null", "privacy.noise_multiplier=2", "privacy.delta=0.02", "train.max_steps=3")
    sizes = ("train.expected_batch_size=40",)
    hidden = composed(*fixed, *sizes, "privacy.adjacency=add_or_remove", "train.sample_rate=1.0")
    assert plan_of(hidden, 60) == plan_of(hidden, 30) == plan_of(hidden, 1)
    for number in (60, 30):  # the broken twin: N is public, so 1/N and N are bounds
        with pytest.raises(UserError):
            plan_of(composed(*fixed, *sizes), number)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("privacy.adjacency=add_or_remove",), "train.sample_rate=null with privacy.adjacency=add_or_remove"),
        ((*HIDDEN, "train.epochs=2"), "train.epochs=2.0 with privacy.adjacency=add_or_remove"),
        (("train.sample_rate=0.3",), "train.sample_rate=0.3 with privacy.adjacency=zero_out"),
    ],
)
def test_what_would_follow_from_a_private_number_is_refused(
    given: tuple[str, ...], said: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        ran([*words(cache, tmp_path / "out"), *given])
    assert caught.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.jsonl"))
