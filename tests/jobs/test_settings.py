"""Settings of a set that nothing reads: refused, so that nobody trains on other images than they think."""

from __future__ import annotations

from pathlib import Path

import pytest

from dp_lora.errors import UserError
from dp_lora.jobs.settings import check_settings
from tests.builders.image_files import config, refused, write_image, write_parquet
from tests.builders.tiny import composed

pytestmark = pytest.mark.usefixtures("unchecked")

XRAYS = "expected data=imagefolder data.source=/hospital/xrays"
UNREAD = {
    ("data.source=/hospital/xrays",): (
        f"data.source=/hospital/xrays: data=mnist5k comes with its package and reads no folder; {XRAYS}"
    ),
    ("data=digits", "data.source=/hospital/xrays"): (
        f"data.source=/hospital/xrays: data=digits comes with its package and reads no folder; {XRAYS}"
    ),
    ("data=letters_heldout", "data.source=/hospital/xrays"): (
        f"data.source=/hospital/xrays: data=letters is rendered from fonts and reads no folder; {XRAYS}"
    ),
    ("public_data.source=/images",): (
        "public_data.source=/images: data@public_data=letters is rendered from fonts and reads no folder; "
        "expected data@public_data=imagefolder public_data.source=/images"
    ),
    ("data.value_range=[0,1]",): "data.value_range=[0,1]: mnist5k reads no image files; expected null",
    ("data.background=black",): "data.background=black: mnist5k reads no image files; expected white",
    ("data.layout=folders",): "data.layout=folders: mnist5k reads no image files; expected null",
    ("data.attribute=Male",): "data.attribute=Male: mnist5k reads no image files; expected null",
    ("data.label_column=x",): "data.label_column=x: mnist5k reads no image files; expected null",
    ("data.image_column=x",): "data.image_column=x: mnist5k reads no image files; expected null",
    ("data.caption_column=x",): "data.caption_column=x: mnist5k reads no image files; expected null",
    ("data=letters", "data.resample=box"): (
        "data.resample=box: letters has the size asked for already; expected null"
    ),
    ("data=mnist", "data.background=grey"): (
        "data.background=grey: mnist is read from IDX files of 8 bits; expected white"
    ),
    ("data=fashion_mnist", "data.value_range=[0,128]"): (
        "data.value_range=[0,128]: fashion_mnist is read from IDX files of 8 bits; expected null"
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", UNREAD, ids=" ".join)
def test_a_setting_that_nothing_reads_is_refused_before_any_file(words: tuple[str, ...]) -> None:
    """`check_settings` reads no images, and is what a plan and a dry run call."""
    with pytest.raises(UserError) as caught:
        check_settings(composed(*words))
    assert str(caught.value) == UNREAD[words]


@pytest.mark.parametrize(
    "words", [("data=mnist", "data.source=/mnist"), ("data.resample=bicubic",), ("data.classes=['1']",)]
)
def test_one_that_is_read_is_not(words: tuple[str, ...]) -> None:
    check_settings(composed(*words))


@pytest.mark.parametrize("name", ["attribute", "image_column", "label_column"])
def test_class_folders_have_no_columns(tmp_path: Path, name: str) -> None:
    for i in range(4):
        write_image(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    assert refused(config(tmp_path, **{name: "text"})) == (
        f"data.{name}=text: imagefolder was not read from a table (parquet files or a data set of the "
        "hub); expected null"
    )


def test_an_attribute_that_says_no_class_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, 4, label=[0, 1, 0, 1], text=["a", "b", "c", "d"])
    assert refused(config(path, attribute="labl")) == (
        "data.attribute=labl: expected one of image, label, text, or null; did you mean 'label'?"
    )
    assert refused(config(path, attribute="label", label_column="text")) == (
        "data.attribute=label: data.label_column=text says the classes; expected null"
    )
