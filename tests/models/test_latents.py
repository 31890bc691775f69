"""The store of latents: the same numbers, made once, verified whenever it is opened, private."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.models import latents
from dp_lora.models.folders import LatentDiffusion
from dp_lora.storage import arrays

SHAPES: arrays.Shapes = {
    "a": ("F32", (5, 2, 3)),
    "b": ("U8", (7,)),
    "c": ("I64", (5,)),
    "none": ("F32", (0, 4)),
}


def fill(into: dict[str, np.ndarray]) -> None:
    for array in into.values():
        array[:] = np.arange(array.size).reshape(array.shape)


def never(into: dict[str, np.ndarray]) -> None:
    raise AssertionError("made although it was there")


def small(digits: ImageSplits) -> ImageSet:
    return digits.test.subset(np.arange(20))


def store(folder: Path) -> Path:
    (path,) = (folder / "latents").iterdir()
    return path


def test_a_store_is_made_once_and_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    made = arrays.shared(tmp_path / "s", "key", SHAPES, fill)
    again = arrays.shared(tmp_path / "s", "key", SHAPES, never)
    elsewhere = load_file(tmp_path / "s" / "key.safetensors")
    for name, (_, shape) in SHAPES.items():
        assert made[name].shape == again[name].shape == elsewhere[name].shape == shape
        assert np.array_equal(made[name], again[name]) and np.array_equal(made[name], elsewhere[name])
    assert isinstance(again["a"], np.memmap)


def test_what_is_written_to_the_arrays_never_reaches_the_file(tmp_path: Path) -> None:
    arrays.shared(tmp_path / "s", "key", SHAPES, fill)["a"][:] = -1
    assert (arrays.shared(tmp_path / "s", "key", SHAPES, never)["a"] >= 0).all()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_key(path: Path) -> None:
    arrays.shared(path.parent, "other", SHAPES, fill)
    (path.parent / "other.safetensors").replace(path)


def other_shapes(path: Path) -> None:
    path.unlink()
    arrays.shared(path.parent, "key", {**SHAPES, "b": ("U8", (8,))}, fill)


@pytest.mark.parametrize(
    "damage",
    [
        cut, longer, flip, other_key, other_shapes,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"foreign " * 40),
        lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"),
        lambda path: path.write_bytes((90).to_bytes(8, "little") + b"{" * 90),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_store_is_said_so_and_made_again(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = arrays.shared(tmp_path / "s", "key", SHAPES, fill)["a"].copy()  # no map of what is truncated
    path = tmp_path / "s" / "key.safetensors"
    damage(path)
    with pytest.raises(arrays.Damaged):
        arrays.open_store(path, "key", SHAPES)
    again = arrays.shared(tmp_path / "s", "key", SHAPES, fill)
    assert np.array_equal(again["a"], whole)
    assert "it is made again" in capsys.readouterr().err
    arrays.shared(tmp_path / "s", "key", SHAPES, never)


def test_a_failure_leaves_nothing_and_a_killed_job_is_cleaned_up_after(tmp_path: Path) -> None:
    def fail(into: dict[str, np.ndarray]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arrays.shared(tmp_path / "s", "key", SHAPES, fail)
    assert list((tmp_path / "s").iterdir()) == []
    (tmp_path / "s" / ".key.safetensors.1-abcd.tmp").write_bytes(b"left by a kill")
    arrays.shared(tmp_path / "s", "key", SHAPES, fill)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["key.safetensors"]


def test_jobs_that_start_together_make_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[int] = []
    found: list[np.ndarray] = []

    def slowly(into: dict[str, np.ndarray]) -> None:
        made.append(1)
        time.sleep(0.2)
        fill(into)

    def job() -> None:
        found.append(arrays.shared(tmp_path / "s", "key", SHAPES, slowly)["a"])

    jobs = [threading.Thread(target=job) for _ in range(6)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    assert len(made) == 1 and len(found) == 6
    assert all(np.array_equal(array, found[0]) for array in found)
    assert capsys.readouterr().err.count("waiting for another job") == 5


KILLED = """
import os, sys
from pathlib import Path
from dp_lora.storage import arrays
def die(into): into["a"][:] = 3; os.kill(os.getpid(), 9)
arrays.shared(Path(sys.argv[1]), "key", {"a": ("F32", (5, 2, 3))}, die)
"""


def test_a_job_killed_in_the_middle_leaves_no_store_and_no_lock(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "s")], check=False)
    assert done.returncode == -9 and not (tmp_path / "s" / "key.safetensors").exists()
    made = arrays.shared(tmp_path / "s", "key", {"a": ("F32", (5, 2, 3))}, fill)
    assert made["a"][0, 0, 1] == 1


def test_cached_latents_are_those_of_encoding(
    model: LatentDiffusion, digits: ImageSplits, tmp_path: Path
) -> None:
    images = small(digits)
    direct, stored = latents.encode(model, images), latents.cached(model, images, tmp_path)
    assert torch.equal(stored.mean, direct.mean) and torch.equal(stored.std, direct.std)
    again = latents.cached(model, images, tmp_path)
    chosen, noise = torch.tensor([3, 1, 19]), torch.randn(3, *model.latent_shape)
    assert torch.equal(again.sample(chosen, noise), direct.sample(chosen, noise))
    assert (again.sample(chosen, noise) != again.sample(chosen, -noise)).any()


def test_encoding_shows_how_far_it_is_and_not_whether_it_was_done_before(
    model: LatentDiffusion, digits: ImageSplits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second time from the cache
        latents.cached(model, small(digits), tmp_path, "lines")
        start, end = capsys.readouterr().err.splitlines()
        assert start == "encode 0/20"
        assert end.startswith("encode 20/20, ") and " images/s, took " in end


def test_latents_are_encoded_once(
    model: LatentDiffusion, digits: ImageSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents.cached(model, small(digits), tmp_path)
    monkeypatch.setattr(LatentDiffusion, "encode", lambda *given: never({}))
    latents.cached(model, small(digits), tmp_path)


def test_nobody_else_may_read_the_latents(
    model: LatentDiffusion, digits: ImageSplits, tmp_path: Path
) -> None:
    latents.cached(model, small(digits), tmp_path)
    assert store(tmp_path).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "latents").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "locks").stat().st_mode & 0o777 == 0o700


def test_other_images_and_other_weights_have_other_latents(
    model: LatentDiffusion, digits: ImageSplits, tmp_path: Path
) -> None:
    def number() -> int:
        return len(list((tmp_path / "latents").iterdir()))

    images = small(digits)
    latents.cached(model, images, tmp_path)
    changed = images.images.copy()
    changed[7, 0, 3, 3] ^= 1
    other = ImageSet(changed, images.labels, images.classes, images.name, images.role, images.public)
    latents.cached(model, other, tmp_path)
    assert number() == 2
    with torch.no_grad():
        next(model.autoencoder.encoder.parameters()).view(-1)[0].add_(1e-3)
    latents.cached(model, images, tmp_path)
    assert number() == 3
    model.unet.requires_grad_(False)
    latents.cached(model, images, tmp_path)
    assert number() == 3


@torch.inference_mode()
def test_latents_and_images_keep_their_shapes_and_ranges(model: LatentDiffusion, digits: ImageSplits) -> None:
    images = latents.to_unit_range(digits.train.images[:6])
    assert images.shape == (6, 1, 8, 8) and images.min() == -1 and images.max() == 1
    mean, std = model.encode(images)
    assert mean.shape == std.shape == (6, *model.latent_shape) and (std > 0).all()
    decoded = model.decode(50 * torch.randn(6, *model.latent_shape))
    assert decoded.shape == images.shape and decoded.min() >= -1 and decoded.max() <= 1
    assert (latents.to_bytes(images) == digits.train.images[:6]).all()


def test_latents_of_the_public_set_have_unit_variance(model: LatentDiffusion, digits: ImageSplits) -> None:
    encoded = latents.encode(model, digits.train)
    noise = torch.randn(encoded.mean.shape, generator=torch.Generator().manual_seed(0))
    assert abs(float(encoded.sample(torch.arange(len(encoded)), noise).var()) - 1) < 0.02


def test_the_cache_of_latents_is_private_and_tells_images_apart(
    model: LatentDiffusion, digits: ImageSplits, tmp_path: Path
) -> None:
    first = latents.cached(model, digits.test, tmp_path)
    (file,) = (tmp_path / "latents").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and (tmp_path / "latents").stat().st_mode & 0o777 == 0o700
    again = latents.cached(model, digits.test, tmp_path)
    assert torch.equal(first.mean, again.mean) and torch.equal(first.std, again.std)
    latents.cached(model, digits.test.subset(range(5)), tmp_path)  # type: ignore[arg-type]
    model.autoencoder.register_to_config(scaling_factor=2.0)
    latents.cached(model, digits.test, tmp_path)
    assert len(list((tmp_path / "latents").iterdir())) == 3
