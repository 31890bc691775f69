"""`dp-lora-sample`: images from a finished run or a given adapter, with nothing private at hand."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dp_lora.commands.export import export
from dp_lora.commands.sample import main
from dp_lora.config.identity import fingerprint, pretrained_fingerprint
from dp_lora.config.load import read_config
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs.stages import run as run_job
from dp_lora.models.sample import load as samples_of
from dp_lora.records.card import no_guarantee
from dp_lora.storage.files import read_json
from tests.builders.architectures import stable_diffusion
from tests.builders.commands import FOLDER, dp_lora, state_of
from tests.builders.image_sets import pixels, write_folder
from tests.builders.tiny import words

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def place(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in outputs/, without the images that it was made from."""
    folder = tmp_path_factory.mktemp("place")
    source = write_folder(folder / "set", pixels(5, 24))
    given = (*words(cache, folder / "outputs"), *FOLDER, f"data.source={source}", "stages=[finetune,sample]")
    assert dp_lora(*given) == 0
    shutil.rmtree(source)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    (directory,) = (place / "outputs" / "default").iterdir()
    return directory


@pytest.fixture(scope="module")
def base(run: Path) -> Path:
    """The pre-trained model of the run."""
    config = read_config(run / "config.yaml")
    return Path(config.paths.cache) / "models" / f"tiny8-{pretrained_fingerprint(config)}"


def sample(*given: object) -> int:
    """The exit status of the command."""
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["dp-lora-sample", *map(str, given)])
            main()
        return 0
    except SystemExit as stopped:
        return int(stopped.code or 0)


def drawn(run: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(run / "samples" / name / "samples.npz") as saved:
        return dict(saved)


def test_the_run_s_own_settings_give_its_own_images(run: Path) -> None:
    assert sample(run, "name=same") == 0
    with np.load(run / "samples.npz") as saved:
        own = dict(saved)
    assert all(np.array_equal(own[name], value) for name, value in drawn(run, "same").items())


def test_more_images_other_guidance_and_seed_cost_nothing(place: Path, run: Path) -> None:
    records = [path for path in place.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in records}
    for path in place.glob("*ledger*"):
        path.chmod(0o400)
    assert sample(run, "guidance=3", "num_samples=6", "seed=4", "name=more") == 0
    assert {path: path.read_bytes() for path in records} == before
    found = drawn(run, "more")
    assert found["images"].shape == (6, 1, 8, 8) and found["labels"].tolist() == [0, 1, 0, 1, 0, 1]
    settings = read_json(run / "samples" / "more" / "sampling.json")["settings"]
    assert (settings["seed"], settings["sampler"]["guidance"]) == (4, 3.0)
    assert settings["classes"] == {"c0": 3, "c1": 3}


def test_images_of_each_class_as_asked_for_and_as_files(run: Path) -> None:
    assert sample(run, "classes={c1:3,c0:1}", "format=png", "name=files") == 0
    found, folder = drawn(run, "files"), run / "samples" / "files" / "images"
    assert found["labels"].tolist() == [0, 1, 1, 1]
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [
        "c0/000000.png", "c1/000001.png", "c1/000002.png", "c1/000003.png",
    ]  # fmt: skip
    assert [row["label"] for row in rows] == ["c0", "c1", "c1", "c1"]
    for row, image in zip(rows, found["images"], strict=True):
        assert np.array_equal(np.asarray(Image.open(folder / row["file_name"])), image[0])


def test_the_files_are_a_data_set_to_datasets(run: Path) -> None:
    datasets = pytest.importorskip("datasets")
    assert sample(run, "classes={c1:2,c0:2}", "format=png", "name=set") == 0
    folder = run / "samples" / "set" / "images"
    found = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(run / "hf"))["train"]
    assert found["label"] == ["c0", "c0", "c1", "c1"]
    assert np.array_equal(np.asarray(found[3]["image"]), drawn(run, "set")["images"][3, 0])


def test_the_same_images_are_not_drawn_twice(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(run, "steps=3") == 0 and sample(run, "steps=3") == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("folder"))
    assert first == second
    folder = Path(first.removeprefix("folder").strip())
    before = state_of(folder)
    assert sample(run, "steps=3") == 0 and state_of(folder) == before
    # A draw that was cut off is made again.
    (folder / "samples.npz").write_bytes(b"half")
    assert sample(run, "steps=3") == 0 and state_of(folder).keys() == before.keys()
    assert drawn(run, folder.name)["images"].shape == (4, 1, 8, 8)


def test_a_folder_with_anything_else_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state_of(run)
    another, file = "expected a new or an empty folder", "expected the name of a new folder"
    for place, said in ((run, another), (run / "adapter", another), (run / "samples.npz", file)):
        assert sample(run, "steps=3", f"out={place}") == 2
        assert said in capsys.readouterr().err
    assert sample(run, "steps=3", "name=one") == 0 and sample(run, "steps=2", "name=one") == 2
    assert "holds something else than these images" in capsys.readouterr().err
    shutil.rmtree(run / "samples" / "one")
    assert state_of(run) == before


def test_damaged_images_are_drawn_again_and_no_old_ones_stay(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("classes=c0:3", "format=png", "name=whole")
    with monkeypatch.context() as patched:
        patched.setattr("dp_lora.jobs.drawing.write_json", interruption)
        assert sample(run, *given) == 130
    assert not (run / "samples" / "whole").exists()
    assert sample(run, "classes=c1:2", *given[1:]) == 0
    images = run / "samples" / "whole" / "images"
    assert sorted(path.name for path in images.iterdir()) == ["c1", "metadata.jsonl"]
    before = state_of(images.parent)
    (images.parent / "samples.npz").write_bytes(b"half")
    next(images.rglob("*.png")).unlink()
    assert sample(run, "classes=c1:2", *given[1:]) == 0
    assert state_of(images.parent).keys() == before.keys()
    assert not list(images.parents[1].glob("*.partial"))


def test_nothing_of_others_is_emptied(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    for folder in (mine / "images.partial", mine / ".images.partial"):
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("mine")
    assert sample(run, f"out={mine / 'images'}") == 2
    assert "holds something else than images half drawn" in capsys.readouterr().err
    shutil.rmtree(mine / ".images.partial")
    assert sample(run, f"out={mine / 'images'}") == 0
    assert (mine / "images.partial" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (mine / "link").symlink_to(tmp_path / "empty")
    assert sample(run, f"out={mine / 'link'}") == 2
    assert "is a link" in capsys.readouterr().err and not list(mine.glob("*link?*"))
    assert sample(run, "steps=2", "name=foo.partial") == 0
    before = state_of(run / "samples" / "foo.partial")
    assert sample(run, "steps=3", "name=foo") == 0 and state_of(run / "samples" / "foo.partial") == before
    for name in ("foo", "foo.partial"):
        shutil.rmtree(run / "samples" / name)


def test_an_adapter_alone_has_the_note_of_its_card(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    card = (adapter / "README.md").read_text()
    line = no_guarantee({"epsilon": math.inf})
    assert line is not None
    for number, (text, note) in enumerate((
        (card, "covered by the adapter's own epsilon, which its card states"),
        (f"{line}\n\n{card}", "This adapter has NO privacy guarantee: it was trained without noise"),
        (None, "The adapter has no card that states an epsilon, so it is not known what it spent."),
    )):  # fmt: skip
        (adapter / "README.md").unlink() if text is None else (adapter / "README.md").write_text(text)
        out = tmp_path / str(number)
        assert sample(adapter, "num_samples=2", f"out={out}", f"pretrained={base}") == 0
        assert note in capsys.readouterr().out and note in read_json(out / "sampling.json")["note"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["~nobody-here/x"], "~nobody-here is the home of nobody here"),
        (["x" * 300], "File name too long"),
        (["{run}", "out=~nobody-here/x"], "out=~nobody-here/x: ~nobody-here is the home of nobody here"),
        (["{run}", "pretrained=~nobody-here/x"], "~nobody-here is the home of nobody here"),
        (["{run}", f"name={'中' * 83}"], "at most 100 characters and 200 bytes"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(
    words: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state_of(run)
    assert sample(*(word.format(run=run) for word in words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and state_of(run) == before


def interruption(*_: object) -> None:
    raise KeyboardInterrupt


def test_classes_as_a_shell_expands_them_and_a_preset_of_the_sampler(run: Path) -> None:
    assert sample(run, "classes=c0:1", "classes=c1:2", "name=expanded") == 0
    assert drawn(run, "expanded")["labels"].tolist() == [0, 1, 1]
    assert sample(run, "sampler=ddim", "steps=2", "name=preset") == 0
    settings = read_json(run / "samples" / "preset" / "sampling.json")["settings"]
    assert settings["sampler"] == {"name": "ddim", "steps": 2, "eta": 1.0, "guidance": 1.0}
    assert len(drawn(run, "preset")["images"]) == 4


def test_what_covers_the_images_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(run, "steps=1", "name=said") == 0
    assert "covered by the adapter's own epsilon" in capsys.readouterr().out
    path = run / "privacy.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "epsilon": "inf"}))
    try:
        assert sample(run, "steps=1", "name=without") == 0
    finally:
        path.write_text(before)
    said = capsys.readouterr().out
    assert "trained without noise" in said and "covered" not in said
    record = read_json(run / "samples" / "without" / "sampling.json")
    assert "trained without noise" in record["note"]
    path.unlink()
    try:
        assert sample(run, "steps=1", "name=unknown") == 0
    finally:
        path.write_text(before)
    # The folder of the images may leave, so it names no place of this machine.
    for written in (run / "samples").rglob("*.json"):
        assert str(run) not in written.read_text() and "/" not in read_json(written)["note"]
    assert "not known what the adapter spent" in capsys.readouterr().out


def test_an_adapter_without_its_run(run: Path, base: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(run / "adapter", given)
    assert sample(given, f"pretrained={base}", f"out={tmp_path / 'images'}", "steps=2", "num_samples=4") == 0
    with np.load(tmp_path / "images" / "samples.npz") as saved:
        assert saved["classes"].tolist() == ["c0", "c1"] and len(saved["images"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"given", "images"}


def test_prompts_of_a_text_to_image_adapter(tmp_path: Path, cache: Path) -> None:
    source = write_folder(tmp_path / "set", pixels(5, 24))
    model = stable_diffusion(tmp_path / "sd")
    given = (*words(cache, tmp_path / "outputs"), *FOLDER, f"data.source={source}",
             f"model.pretrained={model}", "data.channels=3",
             "trainable=lora_alone", "lora.rank=2", "stages=[finetune]")  # fmt: skip
    assert dp_lora(*given) == 0
    (run,) = (tmp_path / "outputs" / "default").iterdir()
    shutil.rmtree(source)
    assert sample(run, "num_samples=2", "name=own") == 0
    assert drawn(run, "own")["classes"].tolist() == ["c0", "c1"]
    assert sample(run, "num_samples=2", "prompt=a drawing of a {}", "name=other") == 0
    assert not np.array_equal(drawn(run, "own")["images"], drawn(run, "other")["images"])
    assert sample(run, "num_samples=2", "prompt=a red house", "name=one") == 0
    found = drawn(run, "one")
    assert found["classes"].tolist() == ["a red house"] and found["labels"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["guidance=x"], "guidance=x: expected a number"),
        (["guidance=-1"], "sampler.guidance=-1.0: expected a number from 0"),
        (["num_samples=0"], "sampler.num_samples=0: expected at least 1"),
        (["num_samples=4.5"], "num_samples=4.5: expected a whole number"),
        (["steps=2", "steps=3"], "steps: is given twice"),
        (["gidance=2"], "gidance: no such field; did you mean 'guidance'?"),
        (["guidance"], "guidance: expected field=value"),
        (["sampler=ddpm"], "sampler=ddpm: expected one of ddim, dpmsolver"),
        (["classes={c7:3}"], "classes: 'c7' is none of the adapter's; expected some of c0, c1"),
        (["classes={c0:0,c1:3}"], "classes: c0: 0: expected a whole number of images"),
        (["classes=c0"], "expected classes=name:number,name:number"),
        (["classes=c0:1,c0:2"], "each class once"),
        (["classes=c0:999999999999"], "sampler.num_samples=999999999999: expected at most"),
        (["sampler.seed=3"], "sampler.seed: no such field"),
        (["name=" + "a" * 101], "expected the name of one folder"),
        (["classes={c0:1}", "num_samples=2"], "expected one of the two"),
        (["prompt=a {}"], "prompt=a {}: the model takes no prompts"),
        (["format=gif"], "format=gif: expected one of npz, png"),
        (["seed=-1"], "seed=-1: expected 0 or more"),
        (["name=../x"], "name=../x: expected the name of one folder"),
        (["pretrained=/nowhere"], "model.pretrained='/nowhere': expected a folder"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    before = state_of(run)
    assert sample(run, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dp-lora-sample: ") and said in line
    assert state_of(run) == before


def test_places_without_an_adapter_that_fits(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*given: object) -> str:
        assert sample(*given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "expected a run directory, or the folder of an adapter" in refused(tmp_path)
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    assert "which is not here; expected pretrained=FOLDER" in refused(adapter, f"out={tmp_path / 'images'}")
    assert "expected out=FOLDER" in refused(adapter, f"pretrained={base}")
    bare = tmp_path / "run"
    bare.mkdir()
    shutil.copy(run / "config.yaml", bare)
    assert "has no adapter yet" in refused(bare)
    shutil.copytree(run / "adapter", bare / "adapter")
    weights = bare / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert "adapter_model.safetensors is damaged" in refused(bare)
    other = shutil.copytree(base, tmp_path / "other")
    part = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(part)
    save_file({name: value + 1 for name, value in tensors.items()}, part)
    assert "was trained on the model tiny8-" in refused(run, f"pretrained={other}")


# In a job


def test_a_job_draws_as_many_images_of_each_class_as_it_is_told(tiny: Callable[..., Config]) -> None:
    words = ("sampler.classes={3:5,0:2}", "stages=[finetune,sample]", "train.max_steps=1")
    directory = Path(run_job(tiny(*words))["directory"])
    assert samples_of(directory).labels.tolist() == [0, 0, 3, 3, 3, 3, 3]
    with pytest.raises(
        UserError, match=r"^sampler\.classes: 'cat' is none of the adapter's; expected some of 0"
    ):
        run_job(tiny("sampler.classes={cat:5}", *words[1:]))
    mixed = tiny("sampler.classes={3:5,cat:2}")
    before = fingerprint(mixed)
    mixed.sampler.classes = {"cat": 2, "3": 5}
    assert fingerprint(mixed) == before
    for given, line in (
        ("{3:0}", "3: 0: expected a whole number"),
        ("{}", "expected numbers of images by class"),
    ):
        with pytest.raises(UserError, match=line):
            tiny(f"sampler.classes={given}")


def test_a_job_exports_its_images_for_other_tools(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Also those of a finished run, whose directory and samples stay what they are."""
    from datasets import load_dataset

    words = ("sampler.num_samples=12", "stages=[finetune,sample]", "train.max_steps=1")
    directory = Path(run_job(tiny(*words))["directory"])
    before = (directory / "samples.npz").read_bytes()
    assert not (directory / "images").exists()
    assert Path(run_job(tiny(*words, "sampler.export=png"))["directory"]) == directory
    assert (directory / "samples.npz").read_bytes() == before
    samples = samples_of(directory)
    found = load_dataset(
        "imagefolder", data_dir=str(directory / "images"), split="train", cache_dir=str(tmp_path)
    )
    for label in range(10):
        mine = [np.asarray(row["image"]).tobytes() for row in found if row["label"] == str(label)]
        assert mine == [image.tobytes() for image in samples.images[samples.labels == label]]
    # An image that is lost is written again; an export has them, and only them.
    next((directory / "images" / "3").iterdir()).unlink()
    run_job(tiny(*words, "sampler.export=png"))
    (directory / "images" / "3" / "private.png").write_bytes(b"x")
    folder = export(directory, tmp_path / "out", with_uncovered=True)
    names = sorted(str(path.relative_to(folder)) for path in (folder / "images").rglob("*.png"))
    assert names == sorted(
        f"images/{label}/{number:06}.png" for number in range(12) for label in [number % 10]
    )
