"""The command: what a user can get wrong is one line, exit status 2 and nothing written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from dp_lora.__main__ import main
from dp_lora.commands.command_line import hydra_words
from dp_lora.storage.files import read_json
from tests.builders.tiny import once, words

pytestmark = pytest.mark.usefixtures("unchecked")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def dp_lora(cache: Path, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Run:
    """Runs the command in an empty folder and gives its exit status, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*given: str, tiny: bool = True) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["dp-lora", *once(*(words(cache, outputs) if tiny else []), *given)])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            GlobalHydra.instance().clear()
        assert list((tmp_path / "here").iterdir()) == [], "nothing is left where the command is given"
        return status, *capfd.readouterr()

    return call


def refused(answer: tuple[int, str, str], outputs: Path, *expected: str) -> None:
    """Asserts that the command said one line with each of `expected`, and wrote nothing."""
    status, said, errors = answer
    assert (status, said, errors.count("\n")) == (2, "", 1), answer
    assert errors.startswith("dp-lora: ")
    for text in expected:
        assert text in errors
    assert not outputs.exists()


BAD = {
    "delta": (["privacy.delta=0.001"], ["privacy.delta=0.001", "1/N", "0.000667"]),
    "epsilon zero": (["privacy.epsilon=0"], ["privacy.epsilon=0", "above 0"]),
    "epsilon negative": (["privacy.epsilon=-3"], ["privacy.epsilon=-3"]),
    "epsilon NaN": (["privacy.epsilon=nan"], ["privacy.epsilon=nan"]),
    "three that disagree": (
        ["privacy.epsilon=3", "privacy.noise_multiplier=0.5"],
        ["privacy.epsilon=3", "privacy.noise_multiplier=0.5", "train.max_steps=4", "leave out one"],
    ),
    "rank zero": (["lora.rank=0"], ["lora.rank=0"]),
    "rank beyond": (["lora.rank=17"], ["lora.rank=17", "expected 1 to 16"]),
    "target": (["lora.target_modules=[to_vv]"], ["'to_vv'", "did you mean 'to_v'?"]),
    "k": (["privacy.noise_multiplicity=0"], ["privacy.noise_multiplicity=0"]),
    "batch": (["train.expected_batch_size=1501"], ["train.expected_batch_size=1501", "1500"]),
    "classes": (
        ["public_data.classes=[0,1]", "trainable.components=[lora]"],
        ["trainable.components", "are new to the model"],
    ),
    "image size": (["public_data=letters"], ["public_data"]),
    "no model": (["model.pretrained=ldm33"], ["model.pretrained='ldm33'"]),
    "no folder": (["data=imagefolder", "data.image_size=8"], ["data.source=null"]),
    "absent folder": (
        ["data=imagefolder", "data.image_size=8", "data.source=/nowhere"],
        ["data.source=/nowhere"],
    ),
    "unknown key": (["lora.rnk=4"], ["lora.rnk: no such option", "did you mean 'lora.rank'?"]),
    "added key": (["+lora.rnk=4"], ["lora.rnk: no such option", "did you mean 'lora.rank'?"]),
    "unknown group": (["epsilo=eps1"], ["epsilo: no such option", "did you mean 'epsilon'?"]),
    "unknown choice": (["epsilon=eps11"], ["epsilon=eps11", "expected one of eps1,", "did you mean 'eps1"]),
    "unknown word": (["sampler.name=ddmi"], ["sampler.name='ddmi'", "did you mean 'ddim'?"]),
    "unknown flag": (["--multirn"], ["--multirn", "did you mean '--multirun'?"]),
    "type": (["privacy.epsilon=abc"], ["privacy.epsilon=abc: expected a number"]),
    "whole number": (["lora.rank=1.5"], ["lora.rank=1.5: expected a whole number"]),
    "no value": (["lora"], ["'lora': expected option=value"]),
    "group as value": (["lora=3"], ["lora=3"]),
    "stage": (["stages=[evaluate]"], ["stages=['evaluate']", "expected sample among the stages"]),
    "device": (["resources.device=tpu"], ["resources.device='tpu'"]),
    "few samples": (["sampler.num_samples=9"], ["sampler.num_samples=9: too few images", "at least 10"]),
    "extractor": (["evaluation.extractors=[lite]"], ["evaluation.extractors='lite'", "'lite0'"]),
    "weights": (
        ["evaluation.extractors=[inception]", f"evaluation.inception_weights={__file__}"],
        [f"evaluation.inception_weights={__file__}", "has sha256", "expected 6726825d0af5"],
    ),
    "no weights": (
        ["evaluation.extractors=[inception]", "evaluation.inception_weights=/nowhere"],
        ["its weights are missing: /nowhere"],
    ),
    "no dinov2": (
        ["evaluation.extractors=[dinov2]", "evaluation.dinov2=/nowhere"],
        ["evaluation.dinov2='/nowhere': cannot be had"],
    ),
    "reference": (["evaluation.reference=validation"], ["the validation split has 0 images"]),
    "release delta": (
        ["evaluation=release", "evaluation.release_delta=0.01"],
        ["evaluation.release_delta=0.01", "1/N"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, dp_lora: Run, outputs: Path) -> None:
    given, expected = BAD[name]
    refused(dp_lora(*given), outputs, *expected)


def test_a_damaged_model_is_one_line(dp_lora: Run, outputs: Path, pretrained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pretrained, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    refused(dp_lora(f"model.pretrained={folder}"), outputs, str(weights), "cannot be read")
    weights.unlink()
    refused(dp_lora(f"model.pretrained={folder}"), outputs, str(weights))
    weights.write_bytes(whole)
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 16', '"cross_attention_dim": 24'))
    refused(dp_lora(f"model.pretrained={folder}"), outputs, str(weights), "expected (")
    shutil.rmtree(folder / "unet")
    refused(dp_lora(f"model.pretrained={folder}"), outputs, f"model.pretrained='{folder}'")


def test_a_damaged_image_folder_is_one_line(dp_lora: Run, outputs: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    given = ["data=imagefolder", f"data.source={root}", "data.image_size=8"]
    refused(dp_lora(*given), outputs, "data.source", "is empty")
    (root / "cat").mkdir()
    refused(dp_lora(*given), outputs, str(root / "cat"), "is empty")
    for i in range(30):
        Image.fromarray(np.arange(i, i + 192, 3, np.uint8).reshape(8, 8)).save(root / "cat" / f"{i}.png")
    (root / "cat" / "notes.txt").write_text("no image")
    refused(dp_lora(*given), outputs, str(root / "cat" / "notes.txt"), "no image")
    (root / "cat" / "notes.txt").unlink()
    refused(dp_lora(*given, "train.expected_batch_size=31"), outputs, "train.expected_batch_size=31")


def test_an_output_folder_that_cannot_be_written_is_one_line(
    dp_lora: Run, outputs: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    refused(dp_lora(f"paths.outputs={file}/below"), outputs, f"paths.outputs={file}/below", "written")
    refused(dp_lora(f"paths.cache={file}"), outputs, f"paths.cache={file}", "written")
    sweep = dp_lora("-m", "lora.rank=2,4", f"paths.outputs={file}/below")
    refused(sweep, outputs, f"{file}/below", "written")
    assert file.read_text() == ""


def test_a_run_directory_of_another_config_is_refused(dp_lora: Run, outputs: Path) -> None:
    status, _, errors = dp_lora("stages=[finetune]")
    assert status == 0, errors
    (directory,) = (outputs / "default").iterdir()
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace("rank: 8", "rank: 7"))
    before = {path: path.stat().st_mtime_ns for path in outputs.rglob("*")}
    status, said, errors = dp_lora("stages=[finetune]")
    assert (status, said, errors.count("\n")) == (2, "", 1)
    assert "belongs to another configuration" in errors and str(directory) in errors
    assert before == {path: path.stat().st_mtime_ns for path in outputs.rglob("*")}


def test_help_and_the_composed_configuration(dp_lora: Run, outputs: Path) -> None:
    status, said, _ = dp_lora("--cfg", "job", "lora.rank=5")
    assert status == 0 and "  rank: 5\n" in said and "privacy:\n" in said
    status, said, _ = dp_lora("--help", tiny=False)
    assert status == 0
    for group in ("epsilon", "lora_rank", "noise_multiplicity", "trainable", "data"):
        assert group in said
    assert "\nlora_rank: r1, r16, r2, r32, r4, r64, r8\n" in said and "\nhydra" not in said
    assert dp_lora("-h", "seed=1", tiny=False)[1] == said and "APP_CONFIG" not in said
    assert not outputs.exists()


def test_nobody_has_to_read_the_help_to_its_end() -> None:
    """`dp-lora --help | head`."""
    command = [sys.executable, "-m", "dp_lora", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_in_a_sweep_the_other_jobs_finish_and_the_failure_is_named(dp_lora: Run, outputs: Path) -> None:
    status, _, errors = dp_lora("data.classes=[0,ten],[0,1]", "stages=[finetune]", "-m", "train.max_steps=2")
    assert status == 2
    lines = [line for line in errors.splitlines() if line.startswith("dp-lora: ")]
    assert len(lines) == 1 and lines[0].startswith("dp-lora: job 0 (") and "ten" in lines[0]
    assert "Traceback" not in errors
    (directory,) = (outputs / "default").iterdir()
    assert "data.classes=_0,1_" in directory.name
    assert read_json(directory / "status.json")["state"] == "done"


def test_hydra_takes_inf_as_the_name_of_a_preset() -> None:
    assert hydra_words(["epsilon=inf"]) == ["epsilon='inf'"]
    assert hydra_words(["--cfg", "job", "a=b"]) == ["a=b", "--cfg", "job"]
    assert hydra_words(["epsilon=eps1,inf", "--multirun", "a=b"]) == [
        "epsilon=eps1,'inf'",
        "a=b",
        "--multirun",
    ]
    assert hydra_words(["privacy.epsilon=inf", "a=info"]) == ["privacy.epsilon=inf", "a=info"]


def test_the_real_command_from_another_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dp_lora", "lora.rank=0", f"paths.outputs={tmp_path / 'outputs'}"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": root, "HOME": str(tmp_path)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dp-lora: lora.rank=0: expected at least 1\n"
    assert list(tmp_path.iterdir()) == []


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; import dp_lora.__main__, dp_lora.jobs.stages;"
        "heavy = {'torch', 'diffusers', 'peft', 'opacus', 'wandb', 'torchmetrics', 'pandas', 'PIL', 'scipy'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
