"""A user's own set: whether an image trains or tests is decided by its own pixels and by nothing else.

Each attack changes one thing about a set (an image more or less, a name, a label, an order, a format) and
looks for an image, other than the one that was changed, whose role is another one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from dp_lora.config.schema import DataConfig, PathsConfig
from dp_lora.data.sets import ImageSplits, load, shares
from tests.builders.image_files import config, encoded, refused, write_rows

pytestmark = pytest.mark.usefixtures("unchecked")

N = 200
SIZES = {"test_size": 0.2, "validation_size": 0.1, "channels": 1}
Pictures = dict[str, np.ndarray]


def pictures(number: int = N, seed: int = 0) -> Pictures:
    """Grey images of 8 x 8 by the path of their file, half of them in each of two classes."""
    rng = np.random.default_rng(seed)
    return {
        f"{('cat', 'dog')[i % 2]}/{i:04}.png": rng.integers(0, 256, (8, 8), np.uint8) for i in range(number)
    }


def written(folder: Path, images: Pictures) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, pixels in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def roles(splits: ImageSplits) -> dict[bytes, str]:
    """The role of each image, by its pixels."""
    return {image.tobytes(): part.role for part in splits for image in part.images}


def of_folder(folder: Path, images: Pictures, **sizes: object) -> dict[bytes, str]:
    return roles(load(config(written(folder, images), **SIZES | sizes), PathsConfig()))


def of_table(path: Path, images: Pictures, **sizes: object) -> dict[bytes, str]:
    write_rows(path, [encoded(Image.fromarray(pixels)) for pixels in images.values()])
    return roles(load(config(path, **SIZES | sizes), PathsConfig()))


@pytest.fixture(params=[of_folder, of_table], ids=["folder", "table"])
def roles_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., dict[bytes, str]]:
    place = tmp_path / ("set" if request.param is of_folder else "x.parquet")
    return lambda images, **sizes: request.param(place, images, **sizes)


def test_removing_one_image_moves_no_other(roles_of: Callable[..., dict[bytes, str]]) -> None:
    images = pictures()
    before = roles_of(images)
    assert {"train", "validation", "test"} == set(before.values())
    for name in ("cat/0000.png", "dog/0101.png", "dog/0199.png"):
        left = {key: value for key, value in images.items() if key != name}
        after = roles_of(left)
        assert after == {key: role for key, role in before.items() if key != images[name].tobytes()}


def by_rank(images: Pictures) -> dict[bytes, str]:
    """The broken twin: the first fifth of the sorted list tests, as roles were given before."""
    ordered = sorted(images)
    return {
        images[name].tobytes(): "test" if rank < len(ordered) // 5 else "train"
        for rank, name in enumerate(ordered)
    }


def test_the_attack_finds_roles_that_depend_on_other_images() -> None:
    images = pictures()
    before = by_rank(images)
    after = by_rank({name: pixels for name, pixels in images.items() if name != "dog/0199.png"})
    assert any(after[key] != before[key] for key in after)


def test_a_set_that_grows_moves_no_trained_image_into_the_test_set(
    roles_of: Callable[..., dict[bytes, str]],
) -> None:
    images = pictures()
    before = roles_of(images)
    after = roles_of({**images, **{f"cat/new{name[4:]}": p for name, p in pictures(100, seed=1).items()}})
    assert {key: after[key] for key in before} == before and len(after) == N + 100


def test_names_classes_and_order_do_not_matter(roles_of: Callable[..., dict[bytes, str]]) -> None:
    images = pictures()
    before = roles_of(images)
    renamed = {f"cat/{i}.png": pixels for i, pixels in enumerate(reversed(images.values()))}
    assert roles_of({**renamed, "dog/only.png": next(iter(images.values()))}) == before


@pytest.mark.parametrize("kind", ["copy", "compressed", "format", "rotated"])
def test_copies_share_a_role(tmp_path: Path, kind: str) -> None:
    """Guarantee: a picture and its copy, in another format or stored on its side, have the same role."""
    folder = written(tmp_path / "set", pictures(60))
    for path in sorted((folder / "cat").iterdir()):
        with Image.open(path) as image:
            if kind == "copy":
                shutil.copy(path, folder / "dog" / f"copy{path.name}")
            elif kind == "compressed":
                image.save(folder / "dog" / f"copy{path.name}", compress_level=0)
            elif kind == "format":
                image.convert("RGB").save(folder / "dog" / f"copy{path.stem}.bmp")
            else:
                exif = Image.Exif()
                exif[0x0112] = 6
                turned = image.transpose(Image.Transpose.ROTATE_90)
                turned.save(folder / "dog" / f"copy{path.name}", exif=exif)
    splits = load(config(folder, **SIZES), PathsConfig())
    contents = [{image.tobytes() for image in part.images} for part in splits]
    assert sum(map(len, splits)) == 90 and sum(map(len, contents)) == 60
    assert not contents[0] & contents[2] and not contents[0] & contents[1] and not contents[1] & contents[2]


def test_size_and_filter_of_the_model_do_not_matter(tmp_path: Path) -> None:
    """Guarantee: the role is of the picture in the file, whatever the images are made into."""
    folder = written(tmp_path / "set", pictures(80))

    def tested(**settings: object) -> list[int]:
        part = load(config(folder, **SIZES | settings), PathsConfig()).test
        return [round(float(image.mean())) for image in part.images]

    def count(**settings: object) -> list[int]:
        return [len(part) for part in load(config(folder, **SIZES | settings), PathsConfig())]

    assert count() == count(channels=3) == count(resample="box") == count(background="black")
    assert tested() == tested(channels=3)


def test_a_larger_test_set_holds_the_smaller_one(tmp_path: Path) -> None:
    images = pictures()
    small = of_folder(tmp_path / "set", images, test_size=0.1)
    large = of_folder(tmp_path / "set", images, test_size=0.3)
    assert {k for k, r in small.items() if r == "test"} < {k for k, r in large.items() if r == "test"}
    # And the validation images are the same.
    assert [r == "validation" for r in small.values()].count(True) == [
        r == "validation" for r in large.values()
    ].count(True)


def test_taking_a_part_of_the_training_images_moves_no_other(tmp_path: Path) -> None:
    """Guarantee: `train_size` is drawn for each image by itself; balance over classes is not enforced."""
    images = pictures()
    before = of_folder(tmp_path / "set", images, train_size=0.5)
    fewer = {name: pixels for name, pixels in images.items() if name != "cat/0042.png"}
    after = of_folder(tmp_path / "set", fewer, train_size=0.5)
    assert after == {k: r for k, r in before.items() if k != images["cat/0042.png"].tobytes()}
    assert 40 < sum(role == "train" for role in before.values()) < 100


def test_an_image_that_is_zeroed_out_leaves_the_others_where_they_are(tmp_path: Path) -> None:
    """Guarantee: under zero_out every other slot keeps its image and its role."""
    images = pictures()
    before = of_folder(tmp_path / "set", images)
    nothing = {**images, "dog/0007.png": np.zeros((8, 8), np.uint8)}
    after = of_folder(tmp_path / "set", nothing)
    key = images["dog/0007.png"].tobytes()
    assert {k: r for k, r in after.items() if k != bytes(64)} == {k: r for k, r in before.items() if k != key}


def test_published_sets_keep_their_positions() -> None:
    """1,000 of mnist5k by position; the labels of the first test images as they have always been."""
    splits = load(DataConfig("mnist5k"), PathsConfig())
    assert [len(part) for part in splits] == [4000, 0, 1000]
    assert [len(part) for part in load(DataConfig("mnist5k", validation_size=0.1), PathsConfig())] == [
        3600, 400, 1000,
    ]  # fmt: skip


@hypothesis.given(
    st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=20, unique=True), st.data()
)
@hypothesis.settings(max_examples=50)
def test_a_share_is_a_function_of_one_digest(digests: list[bytes], data: st.DataObject) -> None:
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    whole = shares(rows, "role")
    chosen = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(0, len(rows)))]
    assert shares(rows[chosen], "role").tolist() == whole[chosen].tolist()
    assert ((whole >= 0) & (whole < 1)).all()


def test_shares_are_pinned() -> None:
    """By hand: SHA-256 of b'dp_lora roles 1 role ' and 32 zero bytes begins with these 53 bits."""
    assert shares(np.zeros((1, 32), np.uint8), "role").tolist() == [(0xD6586AAC73D50F >> 3) / 2**53]


def test_shares_are_uniform_and_independent_between_purposes() -> None:
    """False failures: none; the hash is fixed. Bounds at 5 standard deviations of 20,000 uniform draws."""
    digests = np.random.default_rng(1).integers(0, 256, (20_000, 32), np.uint8)
    role, train = shares(digests, "role"), shares(digests, "train")
    for fraction in (0.05, 0.2, 0.5, 0.9):
        bound = 5 * math.sqrt(fraction * (1 - fraction) / 20_000)
        assert abs((role < fraction).mean() - fraction) < bound
        assert abs((train[role < 0.5] < fraction).mean() - fraction) < 2 * bound


# --- sizes


@pytest.mark.parametrize("role", ["test", "validation", "train"])
def test_a_number_of_images_is_refused_with_the_fraction_to_write(tmp_path: Path, role: str) -> None:
    folder = written(tmp_path / "set", pictures(40))
    said = refused(config(folder, **{f"{role}_size": 8}))
    assert said.startswith(f"data.{role}_size=8: in a set of one's own each image draws its role by itself")
    assert said.endswith("expected a fraction between 0 and 1, such as 0.2 for 8 of 40")


def test_expected_and_actual_sizes_are_told_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = load(config(written(tmp_path / "set", pictures(50)), test_size=0.2), PathsConfig())
    train, test = len(splits.train), len(splits.test)
    said = capsys.readouterr()
    assert train + test == 50 and said.out == ""
    assert said.err == (
        f"data: of 50 images {train} train (expected 40), {test} test (expected 10); each image draws its "
        "role by its own pixels\n"
    )


def test_a_part_that_turns_out_empty_is_one_line(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", pictures(10))
    said = refused(config(folder, test_size=0.001))
    assert said == (
        "data.test_size=0.001: none of the 10 images fell to test, where 0.01 were expected; expected "
        "another fraction"
    )
    assert "sum is below 1" in refused(config(folder, test_size=0.6, validation_size=0.4))


def test_without_sizes_all_images_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = load(config(written(tmp_path / "set", pictures(10))), PathsConfig())
    assert [len(part) for part in splits] == [10, 0, 0] and capsys.readouterr().err == ""


def test_the_pixels_before_the_range_decide(tmp_path: Path) -> None:
    """Guarantee: another `data.value_range` shows other values and moves no image."""
    rng = np.random.default_rng(3)
    (tmp_path / "set/a").mkdir(parents=True)
    for i in range(60):
        Image.fromarray(rng.integers(0, 4096, (8, 8), np.uint16)).save(tmp_path / f"set/a/{i}.png")

    def sizes(**settings: object) -> tuple[list[int], bytes]:
        splits = load(config(tmp_path / "set", **SIZES | settings), PathsConfig())
        return [len(part) for part in splits], splits.test.images.tobytes()

    dark, bright = sizes(), sizes(value_range=[0.0, 4095.0])
    assert dark[0] == bright[0] and dark[1] != bright[1]
