"""A job on captioned images from a tiny pipeline of each family: two private steps, images, export."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_lora.commands.sample import main as draw_more
from dp_lora.config.schema import QUANTISED, Config
from dp_lora.errors import UserError
from dp_lora.jobs.stages import run
from dp_lora.models import pipelines
from dp_lora.training import finetune
from tests.builders import few_bits
from tests.builders.exported import export
from tests.builders.families import length_of, side_of, written
from tests.builders.image_files import write_image, write_parquet
from tests.builders.tiny import composed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


EXPERIMENTS = {"sdxl": "sdxl", "sd35": "sd35", "flux": "flux", "sana": "sana"}
"""The presets, by the tiny pipeline that takes the place of the published one."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet file of captioned images."""
    path = tmp_path_factory.mktemp("captioned") / "captioned.parquet"
    texts = [f"zebra {'very ' * (i % 4)}striped" for i in range(40)]
    write_parquet(path, 40, label=[i % 2 for i in range(40)], text=texts)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with a text beside each image."""
    root = tmp_path_factory.mktemp("captioned")
    for i in range(40):
        path = root / ("cat" if i % 2 else "dog") / f"{i}.png"
        write_image(path, 3 * i)
        path.with_suffix(".txt").write_text(f"zebra {'very ' * (i % 4)}striped")
    return root


@pytest.fixture
def job(tiny: Callable[..., Config], table: Path, folder: Path, tmp_path: Path) -> Callable[..., Config]:
    def build(kind: str, *words: str) -> Config:
        in_folders = kind in ("sdxl", "flux")
        return tiny(
            f"experiment={EXPERIMENTS[kind]}",
            "data=imagefolder",
            f"model.pretrained={written(kind, tmp_path)}",
            f"data.source={folder if in_folders else table}",
            f"data.caption_column={'txt' if in_folders else 'text'}",
            f"data.image_size={side_of(kind)}",
            "data.test_size=0.2",
            "train.expected_batch_size=10",
            "train.max_steps=2",
            "lora.rank=2",
            "sampler.steps=2",
            "sampler.num_samples=4",
            "privacy.noise_multiplicity=2",
            *([] if length_of(kind) is None else [f"model.prompt_length={length_of(kind)}"]),
            *words,
        )

    return build


@pytest.mark.parametrize("kind", EXPERIMENTS)
def test_a_family_goes_through_the_stages(kind: str, job: Callable[..., Config], tmp_path: Path) -> None:
    directory = Path(run(job(kind))["directory"])
    privacy = json.loads((directory / "privacy.json").read_text())
    assert privacy["complete"] is True and privacy["steps"] == 2
    samples = np.load(directory / "samples.npz")
    assert samples["images"].shape == (4, 3, side_of(kind), side_of(kind)) and samples["labels"].tolist() == [
        0,
        1,
        0,
        1,
    ]
    assert samples["images"].std() > 5
    for path in directory.rglob("*"):
        assert not path.is_file() or b"zebra" not in path.read_bytes(), path
    out = export(directory, tmp_path / "out")
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_size > 1000


def test_more_images_are_drawn_from_a_finished_run(
    job: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(run(job("sd35"))["directory"])
    drawn = {}
    for name, words in {"again": [], "guided": ["guidance=4"], "asked": ["prompt=a fox"]}.items():
        monkeypatch.setattr(sys, "argv", ["dp-lora-sample", str(directory), f"name={name}", *words])
        draw_more()
        drawn[name] = np.load(directory / "samples" / name / "samples.npz")["images"]
    assert np.array_equal(drawn["again"], np.load(directory / "samples.npz")["images"])
    assert not np.array_equal(drawn["again"], drawn["guided"])
    assert not np.array_equal(drawn["again"], drawn["asked"])


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_base_in_few_bits_goes_through_the_stages(
    precision: str, job: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_bits.stand_in(monkeypatch)
    directory = Path(run(job("flux", f"model.base_precision={precision}"))["directory"])
    assert np.load(directory / "samples.npz")["images"].std() > 5
    card = (directory / "adapter" / "README.md").read_text()
    assert f"frozen weights were in {precision} while it was trained" in card


def test_a_base_in_few_bits_needs_its_package_before_anything_is_made(
    job: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    config = job("flux", "model.base_precision=nf4")
    with pytest.raises(UserError, match="nf4: needs the package bitsandbytes") as caught:
        run(config)
    assert "\n" not in str(caught.value) and not list(Path(config.paths.outputs).rglob("privacy.json"))


def test_a_base_in_bfloat16_goes_through_the_stages(job: Callable[..., Config]) -> None:
    evaluated = (
        "stages=[finetune,sample,evaluate]",
        "evaluation.classifier_epochs=1",
        "sampler.num_samples=8",
    )
    result = run(job("flux", "model.base_precision=bfloat16", *evaluated))
    directory = Path(result["directory"])
    assert "fd_lite0" in result
    assert json.loads((directory / "privacy.json").read_text())["complete"] is True
    assert np.load(directory / "samples.npz")["images"].std() > 5


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_encoders_have_left_the_memory_when_the_training_begins(
    kind: str, job: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: dict[str, list[weakref.ref[Any]]] = {"encoders": [], "network": []}
    connected, steps, alive = pipelines._connected, finetune.run_steps, []

    def connect(family: Any, folder: Path, index: Any, parts: dict[str, Any], *rest: Any) -> Any:
        pipe = connected(family, folder, index, parts, *rest)
        for name, part in parts.items():
            kind_of = "network" if name in ("unet", "transformer") else "encoders"
            # The memory, which copies of a parameter share.
            loaded[kind_of] += [weakref.ref(p.untyped_storage()) for p in part.parameters()]
        return pipe

    def look(step: Any, *rest: Any) -> None:
        gc.collect()
        alive.append({name: sum(r() is not None for r in refs) for name, refs in loaded.items()})
        steps(step, *rest)

    monkeypatch.setattr(pipelines, "_connected", connect)
    monkeypatch.setattr(finetune, "run_steps", look)
    result = run(job(kind))
    assert np.load(Path(result["directory"]) / "samples.npz")["images"].std() > 5
    assert len(alive) == 1 and len(loaded["encoders"]) > 50
    assert alive[0]["encoders"] == 0 and alive[0]["network"] > 0


@pytest.mark.parametrize("experiment", EXPERIMENTS.values())
def test_a_preset_is_for_its_family(experiment: str) -> None:
    config = composed(f"experiment={experiment}", "data.source=x")
    assert config.experiment == config.model.name == experiment and config.sampler.name == "pipeline"
    assert config.data.channels == 3 and config.data.image_size % 32 == 0 and not config.data.public
    assert config.trainable.components == ["lora"] and config.stages == ["finetune", "sample"]


REFUSED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "a sampler of diffusion": ("flux", ("sampler=ddim",), "sampler.name=ddim: the model is a flow"),
    "weights of another loss": ("sd35", ("train.snr_gamma=5",), "train.snr_gamma=5.0: the model is a flow"),
    "a length that CLIP has": ("sdxl", ("model.prompt_length=12",), "model.prompt_length=12: "),
    "a size between": (
        "flux",
        ("data.image_size=18",),
        "data.image_size=18: expected a multiple of 4 for the FluxPipeline that model.pretrained names",
    ),
    "grey images": ("sd35", ("data.channels=1",), "which the StableDiffusion3Pipeline that model.pretrained"),
    "biases in bfloat16": (
        "flux",
        ("model.base_precision=bfloat16", "trainable=lora_bias"),
        "model.base_precision=bfloat16: expected float32, or a text-to-image pipeline",
    ),
    "a target of no layer": ("sd35", ("lora.target_modules=[to_x]",), "SD3Transformer2DModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_family_cannot_do_is_one_line(case: str, job: Callable[..., Any]) -> None:
    kind, words, said = REFUSED[case]
    with pytest.raises(UserError) as caught:
        run(job(kind, *words))
    assert said in str(caught.value) and "\n" not in str(caught.value) and "expected" in str(caught.value)
