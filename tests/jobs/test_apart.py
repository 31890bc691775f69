"""No model is pre-trained on what a private run has drawn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.jobs.apart import refuse_drawn
from dp_lora.jobs.job import pretrained_model
from tests.builders.image_sets import pixels, write_folder
from tests.builders.starts import SHORT, trained
from tests.builders.tiny import composed

pytestmark = pytest.mark.usefixtures("unchecked")


def on(images: Path) -> list[str]:
    return ["data@public_data=imagefolder", "public_data.public=true", f"public_data.source={images}"]


@pytest.mark.parametrize("kind", ["in the run", "the run", "drawn", "drawn in a folder"])
def test_images_that_a_private_run_has_drawn_are_no_public_images(
    kind: str, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    run = trained(tiny(*SHORT))
    (run / "images").mkdir()
    place = run / "images" if kind == "in the run" else run
    if kind.startswith("drawn"):
        place = write_folder(tmp_path / "drawn", pixels(1, 8))
        (place / "sampling.json").write_text("{}")
    if kind.endswith("folder"):
        place = next(path for path in place.iterdir() if path.is_dir())
    config = tiny(*SHORT, *on(place), f"paths.cache={tmp_path / 'cache'}")
    with pytest.raises(UserError, match=r"^public_data.source=.*a run with private images has drawn"):
        pretrained_model(config)
    assert not (tmp_path / "cache" / "models").exists()


def test_images_of_a_public_run_and_any_others_are_public_images(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    run = trained(tiny(*SHORT, "data.public=true"))
    for place in (run / "images", write_folder(tmp_path / "set", pixels(1, 8))):
        refuse_drawn(tiny(*SHORT, *on(place)))
    copy = shutil.copytree(run, tmp_path / "copy")
    refuse_drawn(composed(*SHORT, *on(copy)))
