"""Pipelines in one file: what comes out is the pipeline that was written, and what cannot be is one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from dp_lora.commands import import_checkpoint as import_command
from dp_lora.errors import UserError
from dp_lora.models.folders import LatentDiffusion, find, load
from dp_lora.models.single_file import import_single_file, single_file_pipelines
from tests.builders import architectures
from tests.builders.families import sdxl, written
from tests.builders.single_files import ORIGINALS, flux_converter, flux_transformer, in_one_file

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _saved(kind: str, root: Path) -> Path:
    """The folder of a tiny pipeline of the kind."""
    if kind == "sd1":
        return architectures.stable_diffusion(root / kind)
    if kind == "sd2":
        return architectures.stable_diffusion(root / kind, "v_prediction", second=True)
    if kind == "sdxl_whole":
        # Diffusers tells the two text encoders of a file apart by their width.
        torch.manual_seed(0)
        sdxl(root / kind, wide=24).save_pretrained(root / kind)
        return root / kind
    return written(kind, root)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX.1's converter for the tiny transformer's width; see the test at the published width."""
    known = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(known, "checkpoint_mapping_fn", flux_converter(16))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """By kind: the pipeline's folder, its one file, and the settings."""
    root, found = tmp_path_factory.mktemp("single"), {}
    for kind in ORIGINALS:
        saved = _saved(kind, root)
        pipe = diffusers.DiffusionPipeline.from_pretrained(saved)
        found[kind] = (saved, *in_one_file(kind, pipe, saved, root / "files"))
    return found


Published = dict[str, tuple[Path, Path, Path]]


@pytest.mark.parametrize("kind", ORIGINALS)
def test_the_imported_pipeline_is_the_one_that_was_published(
    kind: str, published: Published, tmp_path: Path
) -> None:
    saved, path, settings = published[kind]
    import_single_file(path, settings, tmp_path / "out")
    models = load(saved, "{}"), load(tmp_path / "out", "{}")
    expected, found = (model.state_dict() for model in models)
    assert expected.keys() == found.keys() and len(found) > 100
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(*(_predicted(model) for model in models))
    # The settings that diffusers alone reads are there too.
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe).__name__ == diffusers.DiffusionPipeline.load_config(saved)["_class_name"]


@torch.no_grad()
def _predicted(model: LatentDiffusion) -> torch.Tensor:
    """What the model predicts for two captions of different length."""
    model.new_classes(["a fox", "b"], torch.Generator())
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.predict_of(latents, torch.tensor([10, 700]), model.condition(torch.tensor([0, 1])))


def test_a_part_in_the_file_comes_from_the_file_also_where_the_folder_has_one(
    published: Published, tmp_path: Path
) -> None:
    """A fine-tuned file has a text encoder and an autoencoder of its own; the folder is that of its base."""
    saved, path, _ = published["sdxl_whole"]
    base = shutil.copytree(saved, tmp_path / "base")
    for weights in base.rglob("*.safetensors"):
        save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    import_single_file(path, base, tmp_path / "out")
    expected, found = load(saved).state_dict(), load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_flux_of_the_published_width_has_the_names_and_shapes_that_the_transformer_asks_for() -> None:
    """On the meta device: diffusers' own converter knows this width alone."""
    with torch.device("meta"):
        expected = diffusers.FluxTransformer2DModel(guidance_embeds=True).state_dict()
        found = convert_flux_transformer_checkpoint_to_diffusers(flux_transformer(expected))
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in expected.items()
    }


def test_a_lightning_checkpoint_of_stable_diffusion_is_read(published: Published, tmp_path: Path) -> None:
    saved, path, settings = published["sd1"]
    import numpy as np

    state = {"state_dict": load_file(path), "lr_schedulers": [{"_last_lr": [np.float64(0.1)]}]}
    torch.save(state, tmp_path / "model.ckpt")
    import_single_file(tmp_path / "model.ckpt", settings, tmp_path / "out")
    expected, found = load(saved).state_dict(), load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class _Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_what_does_not_make_a_pipeline_is_one_line(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, path, settings = published["sdxl"]
    tensors = load_file(path)
    save_file({n: v for n, v in tensors.items() if "input_blocks.0.0" not in n}, "less.safetensors")
    save_file({n: v for n, v in tensors.items() if "first_stage" not in n}, "no_vae.safetensors")
    torch.save({"state_dict": tensors, "callbacks": _Payload()}, "bad.ckpt")
    Path("half.safetensors").write_bytes(path.read_bytes()[:3000])
    without_text = shutil.copytree(settings, tmp_path / "without_text")
    (without_text / "text_encoder_2" / "model.safetensors").unlink()
    code = shutil.copytree(settings, tmp_path / "code")
    text = (code / "model_index.json").read_text()
    (code / "model_index.json").write_text(text.replace('"transformers"', '"my_module"', 1))
    sana = written("sana", tmp_path)
    for file, config, words in (
        ("less.safetensors", settings, "tensors of one part are missing"),
        ("no_vae.safetensors", settings, "no_vae.safetensors: "),
        ("bad.ckpt", settings, "posix.system"),
        ("half.safetensors", settings, "half.safetensors: cannot be read"),
        (path, without_text, "Failed to load CLIPTextModelWithProjection"),
        (path, code, "my_module"),
        (path, sana, "is a SanaPipeline; expected one of StableDiffusionPipeline, StableDiffusionXLPipeline"),
        (path, tmp_path, "expected a folder of the same pipeline in diffusers form"),
    ):
        with pytest.raises(UserError) as caught:
            import_single_file(Path(file), Path(config), tmp_path / "out")
        said = str(caught.value)
        assert words in said and "\n" not in said and "expected" in said, said
        assert not (tmp_path / "out").exists() and not Path("executed").exists()


def test_the_command_takes_a_file_and_settings_or_a_layout(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path, settings = published["sd1"]
    words = ["dp-lora-import", str(path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*words, "--config", str(settings)])
    import_command.main()
    assert find(str(tmp_path / "out")) == tmp_path / "out"
    assert f"model.pretrained={tmp_path / 'out'}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    for more in ("", "--config x --layout cin256", "--config x --scale-factor 2"):
        monkeypatch.setattr("sys.argv", [*words, *more.split()])
        with pytest.raises(SystemExit) as caught:
            import_command.main()
        said = capsys.readouterr().err
        assert caught.value.code == 2 and said.count("\n") == 1 and "expected" in said
    with pytest.raises(UserError, match=r"is a file; expected the folder that `dp-lora-import .* --out=DIR"):
        find(str(path))


def test_those_that_diffusers_reads_from_one_file_are_known() -> None:
    assert {
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
    } <= set(single_file_pipelines())
