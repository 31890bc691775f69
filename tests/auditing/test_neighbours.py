"""The auditor's view: nearest training images, where they are written, and where not."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from dp_lora.auditing.neighbours import nearest, share_nearer
from dp_lora.commands.neighbours import main
from dp_lora.config.schema import Config
from dp_lora.data import sets
from dp_lora.models import sample
from dp_lora.storage.files import read_json


def points(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def run(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    """A run directory whose last generated images are training images."""
    directory = tmp_path / "run"
    directory.mkdir()
    config = tiny("data.train_size=80")
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    digits = sets.load(config.data, config.paths)
    copied = digits.train.images[[7, 30]]
    other = np.random.default_rng(0).integers(0, 256, (18, 1, 8, 8), dtype=np.uint8)
    images = np.concatenate([other, copied])
    sample.save(sample.Samples(images, np.arange(20) % 10, digits.train.classes), directory)
    return directory


def test_the_nearest_are_those_of_a_loop() -> None:
    some, training = points(6, 0), points(30, 1)
    found = nearest(some, training, 3)
    for i in range(6):
        distances = (training.double() - some[i].double()).norm(dim=1)
        assert found.indices[i].tolist() == distances.argsort()[:3].tolist()
        assert torch.allclose(found.distances[i], distances.sort().values[:3])


def test_memorised_images_are_nearer_to_the_training_set_and_others_are_not() -> None:
    # Of 400 images that know neither set half are nearer to either: five deviations are 0.125, so a false
    # failure has probability below 1e-6. The twin repeats training images.
    training, held_out = points(500, 0), points(700, 1)
    assert share_nearer(points(400, 2), training, held_out) == pytest.approx(0.5, abs=0.125)
    assert share_nearer(training[:400] + 0.01, training, held_out) > 0.95
    assert share_nearer(training[:5], training, training) == 0.5


def test_copies_come_first_and_only_the_owner_can_read_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), "--images", "4", "--neighbours", "2"])
    folder = run / "checkpoint"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {"neighbours.json", "neighbours.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in names} == {0o600}
    record = read_json(folder / "neighbours.json")
    assert {row["generated"] for row in record["rows"][:2]} == {18, 19}
    assert {row["training"][0] for row in record["rows"][:2]} == {7, 30}
    assert record["rows"][0]["distances"][0] == pytest.approx(0, abs=1e-2)
    assert record["rows"][2]["distances"][0] > 1
    with Image.open(folder / "neighbours.png") as picture:
        pixels = np.asarray(picture)[::2, ::2]
    assert pixels.shape == (4 * 8, 3 * 8)
    assert np.array_equal(pixels[:8, :8], pixels[:8, 8:16])
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "samples.npz",
        "samples.png",
        "checkpoint",
    }
    said = capsys.readouterr()
    assert "never to be released" in said.out and str(record["rows"][0]["distances"][1]) not in said.out


def test_another_place_may_be_named_but_not_among_the_released_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), "--out", str(tmp_path / "elsewhere")])
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"neighbours.json", "neighbours.png"}
    assert not (run / "checkpoint").exists()
    for place, message in (
        (run / "shown", "lies among the files of the run that may be shared"),
        (run, "lies among the files of the run that may be shared"),
        (tmp_path / "elsewhere", "is not empty"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(run), "--out", str(place)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert {path.name for path in run.iterdir()} == {"config.yaml", "samples.npz", "samples.png"}


def test_damaged_settings_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(SystemExit) as stopped:
        main([str(run)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "config.yaml: says no longer what this run is" in said and "expected what dp-lora wrote" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: expected a run directory with config.yaml and samples.npz"),
        (["RUN", "--images", "0"], "0: expected a whole number, at least 1"),
        (["RUN", "--extractor", "lite"], "evaluation.extractors='lite': expected one of lite0"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(run) if word == "RUN" else word for word in words])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    assert not (run / "checkpoint").exists()
