"""One folder of private images under several presets: it stays private, and one set."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_lora.config.schema import Config, DataConfig, PathsConfig
from dp_lora.data.sets import load
from dp_lora.errors import PrivateRefusal
from dp_lora.jobs.apart import refuse_shared_images
from dp_lora.privacy.ledger import Ledger, spent
from dp_lora.storage.files import read_json, read_lines
from sweeps.bill import bill
from tests.builders.commands import FOLDER, dp_lora, state_of
from tests.builders.image_sets import pixels, splits_of, write_folder
from tests.builders.tiny import composed, words

pytestmark = pytest.mark.usefixtures("unchecked")

FINETUNE = "stages=[finetune]"
LEDGER = "set.privacy_ledger.jsonl"


class Place:
    """A folder of images, and the words of a job on it with outputs and an index of its user's own."""

    def __init__(self, cache: Path, root: Path) -> None:
        self.cache, self.root, self.images = cache, root, write_folder(root / "set", pixels(5, 24))

    def words(self, user: str, *more: str, ledger: str = "null") -> list[str]:
        return [
            *words(self.cache, self.root / user), *FOLDER, FINETUNE, f"data.source={self.images}",
            f"paths.ledger={ledger}", *more,
        ]  # fmt: skip

    def run_of(self, user: str) -> Path:
        (run,) = (self.root / user / "default").iterdir()
        return run

    def epsilon_of(self, user: str) -> float:
        return float(read_json(self.run_of(user) / "privacy.json")["epsilon"])


@pytest.fixture
def place(cache: Path, tmp_path: Path) -> Place:
    return Place(cache, tmp_path)


AS_CELEBA = ("data=celeba32", "data.attribute=null", "data.image_size=8", "data.channels=1")


def test_a_folder_is_one_set_under_every_preset(place: Place, capsys: Any) -> None:
    """Two users share the folder and its ledger; the index of the second has never seen the images."""
    assert dp_lora(*place.words("one")) == 0
    budget = f"privacy.budget_epsilon={place.epsilon_of('one') * 1.01}"
    for preset in ((), AS_CELEBA, ("data=cifar10",)):
        before = state_of(place.root)
        capsys.readouterr()
        assert dp_lora(*place.words("two", *preset, "seed=1", budget)) == 2, preset
        assert " spent epsilon " in capsys.readouterr().err
        assert state_of(place.root) == before
    assert dp_lora(*place.words("two", *AS_CELEBA, "seed=1")) == 0
    said = capsys.readouterr().out
    assert "of 2 runs on celeba together" in said
    lines = read_lines(place.root / LEDGER)
    assert {line["set"] for line in lines} == {"imagefolder", "celeba"}
    charges = Ledger(place.root / LEDGER).charges()
    (found,) = bill([place.run_of("one"), place.run_of("two")]).sets
    assert (found.runs, found.ledger_runs) == (2, 2)
    assert found.ledger_epsilon == spent(charges, found.delta).epsilon
    shutil.rmtree(place.root / "one.image_index")
    (found,) = bill([place.run_of("two")]).sets
    assert (found.runs, found.ledger_runs) == (1, 2), "the ledger counts what is not among the directories"


def test_images_of_ones_own_in_a_shared_ledger_are_told_apart_by_the_index_alone(
    place: Place, capsys: Any
) -> None:
    shared = str(place.root / "shared.jsonl")
    assert dp_lora(*place.words("one", ledger=shared)) == 0
    budget = f"privacy.budget_epsilon={place.epsilon_of('one') * 1.01}"
    given = [*AS_CELEBA, "seed=1", budget]
    assert dp_lora(*place.words("two", *given, ledger=shared)) == 2, (
        "the images may be those of the other run"
    )
    assert "1 run on celeba spent epsilon" in capsys.readouterr().err
    others = write_folder(place.root / "others", pixels(6, 24))
    assert dp_lora(*place.words("two", *given, f"data.source={others}", ledger=shared)) == 2
    index = f"paths.index={place.root / 'one.image_index'}"
    assert dp_lora(*place.words("two", *given, index, ledger=shared)) == 2, "the index knows that they are"
    given += [f"data.source={others}", index]
    assert dp_lora(*place.words("two", *given, ledger=shared)) == 0, "the index knows that they are not"


def test_a_run_that_the_index_knows_by_a_ledger_alone_is_not_told_apart(place: Place) -> None:
    """A colleague's line was entered for the first images that met it; it may be on the second ones too."""
    shared = str(place.root / "shared.jsonl")
    assert dp_lora(*place.words("colleague", ledger=shared)) == 0
    budget = f"privacy.budget_epsilon={place.epsilon_of('colleague') * 1.01}"
    mine = write_folder(place.root / "mine", pixels(7, 24))
    assert dp_lora(*place.words("me", f"data.source={mine}", ledger=shared)) == 0
    assert dp_lora(*place.words("me", *AS_CELEBA, "seed=1", budget, ledger=shared)) == 2


# Whose images they are


AS_PUBLIC = {
    "imagenet32": ("data=imagenet32",),
    "imagenet64": ("data=imagenet64",),
    "emnist_letters": ("data=emnist_letters",),
    "letters read as a folder": ("data=letters", "data.name=imagefolder", "data.classes=null",
                                 "data.train_size=null", "data.test_size=0"),
}  # fmt: skip


@pytest.mark.parametrize("preset", AS_PUBLIC)
def test_a_public_preset_makes_no_folder_public(preset: str, place: Place, capsys: Any) -> None:
    sizes = ("data.image_size=8", "data.channels=1")
    given = place.words("one", *AS_PUBLIC[preset], *sizes)
    before = state_of(place.root)
    assert dp_lora(*given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected data.public=false" in line and "data.public=true" in line
    assert str(place.images) not in line and state_of(place.root) == before


def test_the_user_says_whether_images_under_a_public_preset_are_public(place: Place) -> None:
    given = [*AS_PUBLIC["imagenet32"], "data.image_size=8", "data.channels=1"]
    assert dp_lora(*place.words("said", *given, "data.public=true")) == 0
    assert not (place.root / LEDGER).exists()
    assert dp_lora(*place.words("not", *given, "data.public=false")) == 0
    assert {line["set"] for line in read_lines(place.root / LEDGER)} == {"imagenet"}


def test_public_presets_stand_for_themselves_where_nothing_is_named() -> None:
    for preset in ("imagenet32", "imagenet64", "emnist_letters", "letters"):
        assert composed(f"data={preset}").data.public is True
        given = [] if preset == "letters" else ["public_data.source=/public"]
        assert composed(f"data@public_data={preset}", *given).public_data.public is True


# The public images of the pre-training


AS_PUBLIC_IMAGES = (
    "data@public_data=imagefolder", "public_data.public=true", "public_data.image_size=8",
    "public_data.channels=1",
)  # fmt: skip


def the_folder(images: Path) -> Path:
    return images


def a_link(images: Path) -> Path:
    (images.parent / "link").symlink_to(images)
    return images.parent / "link"


def around_it(images: Path) -> Path:
    write_folder(images.parent / "around" / "others", pixels(8, 8))
    images.rename(images.parent / "around" / "set")
    images.symlink_to(images.parent / "around" / "set")
    return images.parent / "around"


def a_copy(images: Path) -> Path:
    return Path(shutil.copytree(images, images.parent / "copy"))


def links_of_a_few(images: Path) -> Path:
    folder = write_folder(images.parent / "mixed", pixels(8, 8))
    (folder / "c0" / "x.png").symlink_to(next((images / "c0").iterdir()))
    return folder


ONE_PLACE, COPIES = (the_folder, a_link, around_it), (a_copy, links_of_a_few)


# Pre-training alone reads the public images alone: it sees the place, not the copies.
@pytest.mark.parametrize(
    ("stages", "act"),
    [("[finetune]", act) for act in (*ONE_PLACE, *COPIES)] + [("[pretrain]", act) for act in ONE_PLACE],
)
def test_no_pre_training_on_the_private_images(
    stages: str, act: Callable[[Path], Path], place: Place, capsys: Any
) -> None:
    source = act(place.images)
    cache = place.root / "new_cache"
    more = ["model.pretrain.unet_steps=1", "model.pretrain.autoencoder_steps=1", f"stages={stages}"]
    given = place.words("one", *AS_PUBLIC_IMAGES, *more, f"public_data.source={source}")
    assert dp_lora(*given, f"paths.cache={cache}") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dp-lora")]
    assert len(said) == 1 and said[0].startswith("dp-lora: public_data.source")
    assert "private images" in said[0]
    assert not list(cache.rglob("*.safetensors")) and not list(cache.rglob("metrics.jsonl"))
    assert not list(place.root.glob("*.jsonl")) and not (place.root / "one").exists()


def test_nor_by_a_model_that_is_there_already(place: Place, capsys: Any) -> None:
    """The pre-training by itself sees no private images; the jobs that come to its model do."""
    source, cache = a_copy(place.images), place.root / "new_cache"
    more = ["model.pretrain.unet_steps=1", "model.pretrain.autoencoder_steps=1", f"paths.cache={cache}"]
    given = place.words("one", *AS_PUBLIC_IMAGES, *more, f"public_data.source={source}")
    assert dp_lora(*given, "stages=[pretrain]") == 0
    shutil.rmtree(source)
    (model,) = (path.parent for path in (cache / "models").glob("*/record.json"))
    for named in ([], [f"model.pretrained={model}"]):
        capsys.readouterr()
        assert dp_lora(*given, "stages=[finetune]", *named) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dp-lora")]
        assert len(said) == 1 and "of the private images are among the public ones" in said[0]
    assert not list(place.root.glob("*.jsonl")) and not (place.root / "one").exists()


@pytest.mark.parametrize("by_itself", [True, False])
def test_nor_when_they_are_resized_in_another_way(by_itself: bool, place: Place, capsys: Any) -> None:
    shutil.rmtree(place.images)
    write_folder(place.images, np.random.default_rng(0).integers(0, 256, (20, 1, 16, 16), np.uint8))
    source, cache = a_copy(place.images), place.root / "new_cache"
    more = ["model.pretrain.unet_steps=1", "model.pretrain.autoencoder_steps=1", "public_data.resample=box"]
    given = place.words("one", *AS_PUBLIC_IMAGES, *more, f"public_data.source={source}")
    if by_itself:
        assert dp_lora(*given, f"paths.cache={cache}", "stages=[pretrain]") == 0
    capsys.readouterr()
    assert dp_lora(*given, f"paths.cache={cache}", "stages=[finetune]") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dp-lora")]
    assert len(said) == 1 and "20 of the private images are among the public ones" in said[0]


def test_nor_by_a_model_of_a_copy_of_a_published_set(place: Place, capsys: Any) -> None:
    """The private set has no `source`, and nor have the public images that this job names."""
    folder = place.root / "digits"
    images = load(DataConfig("digits", image_size=8), PathsConfig()).train.images
    write_folder(folder, images[:20])
    cache = place.root / "new_cache"
    more = ["model.pretrain.unet_steps=1", "model.pretrain.autoencoder_steps=1", f"paths.cache={cache}"]
    given = place.words("one", *AS_PUBLIC_IMAGES, *more, f"public_data.source={folder}")
    assert dp_lora(*given, "stages=[pretrain]") == 0
    (model,) = (path.parent for path in (cache / "models").glob("*/record.json"))
    capsys.readouterr()
    job = [word for word in place.words("one") if not word.startswith("data")]
    assert (
        dp_lora(*job, "data=digits", "stages=[finetune]", "privacy.delta=1e-4", f"model.pretrained={model}")
        == 2
    )
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dp-lora")]
    assert len(said) == 1 and "20 of the private images are among the public ones" in said[0]


def test_nor_by_a_model_whose_record_of_its_images_is_lost(place: Place, capsys: Any) -> None:
    cache = place.root / "new_cache"
    more = ["model.pretrain.unet_steps=1", "model.pretrain.autoencoder_steps=1", f"paths.cache={cache}"]
    given = place.words("one", *AS_PUBLIC_IMAGES, *more, f"public_data.source={a_copy(place.images)}")
    assert dp_lora(*given, "stages=[pretrain]") == 0
    (model,) = (path.parent for path in (cache / "models").glob("*/record.json"))
    record = model / "images.npy"
    for content in (None, np.zeros((0, 32), np.uint8), np.zeros((3, 16), np.uint8), np.uint8(0), b"cut"):
        record.unlink(missing_ok=True)
        if isinstance(content, bytes):
            record.write_bytes(content)
        elif content is not None:
            np.save(record, content)
        capsys.readouterr()
        assert dp_lora(*given, "stages=[finetune]", f"model.pretrained={model}") == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dp-lora")]
        assert len(said) == 1 and f"images.npy: is {'missing' if content is None else 'not what'}" in said[0]


def test_other_images_may_pre_train() -> None:
    config = Config(data=DataConfig("imagefolder", source="/a"), public_data=DataConfig("letters"))
    mine, yours = splits_of(pixels(1, 9)), splits_of(pixels(2, 9), public=True)
    plain = splits_of(np.zeros((4, 1, 8, 8), np.uint8))
    refuse_shared_images(config, yours, mine)
    refuse_shared_images(config, plain, plain)
    with pytest.raises(PrivateRefusal):
        refuse_shared_images(config, splits_of(np.concatenate([pixels(2, 9), pixels(1, 1)])), mine)
    config.data.public = True
    refuse_shared_images(config, mine, mine)
