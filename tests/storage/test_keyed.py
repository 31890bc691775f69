"""Names of private content tell nothing without the key, and are shared by all who hold it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.models import latents
from dp_lora.models.folders import LatentDiffusion
from dp_lora.storage import tensors
from dp_lora.storage.keyed import KEY, keyed_name


def test_a_name_is_that_of_its_content_in_one_cache_and_another_in_every_other(tmp_path: Path) -> None:
    names = {cache: keyed_name(tmp_path / cache, "the same images") for cache in ("a", "b", "c")}
    assert len(set(names.values())) == 3
    assert keyed_name(tmp_path / "a", "the same images") == names["a"]
    assert keyed_name(tmp_path / "a", "other images") != names["a"]
    assert all(len(name) == 40 and set(name) <= set("0123456789abcdef") for name in names.values())


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_nobody_else_can_read_the_key(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o755)
        keyed_name(tmp_path / "cache", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache" / KEY).stat().st_mode) & 0o077 == 0


def test_a_key_that_others_could_read_is_closed(tmp_path: Path) -> None:
    name = keyed_name(tmp_path, "x")
    (tmp_path / KEY).chmod(0o644)
    assert keyed_name(tmp_path, "x") == name
    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o600


ASK = "import sys; from pathlib import Path; from dp_lora.storage.keyed import keyed_name\n"
ASK += "print(keyed_name(Path(sys.argv[1]), 'x'))"


def test_whoever_asks_first_all_get_the_same_key(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(keyed_name(tmp_path / "c", "x"))) for _ in range(16)
    ]
    jobs = [
        subprocess.Popen([sys.executable, "-c", ASK, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found += [job.communicate()[0].strip() for job in jobs]
    assert len(found) == 19 and len(set(found)) == 1


def test_what_is_no_key_is_one_line(tmp_path: Path) -> None:
    (tmp_path / KEY).write_bytes(b"short")
    with pytest.raises(UserError, match=r"paths\.cache: .* has 5 bytes, expected the 32 of a key"):
        keyed_name(tmp_path, "x")


def test_files_that_were_named_by_plain_digests_go_away_and_nothing_else_does(tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 2
    former = [
        f"latents/{digest}.safetensors", f"images/{digest}.safetensors", f"evaluation/{digest}.safetensors",
        f"locks/latents-{digest}.lock",
    ]  # fmt: skip
    others = [f"models/{digest}.safetensors", "latents/mine.safetensors", "locks/ledger.lock"]
    for name in [*former, *others]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    keyed_name(tmp_path, "x")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*others, KEY, f"locks/{KEY}.lock"}
    # Only once: later files of such names are not ours.
    (tmp_path / former[0]).touch()
    keyed_name(tmp_path, "x")
    assert (tmp_path / former[0]).exists()


def names_in(cache: Path) -> set[str]:
    """File names of the folders that hold functions of images."""
    return {
        path.name
        for folder in ("latents", "evaluation", "images", "locks")
        for path in (cache / folder).glob("*")
        if path.name != f"{KEY}.lock"
    }


def test_no_file_of_two_caches_of_the_same_images_has_the_same_name(
    model: LatentDiffusion, digits: ImageSplits, tmp_path: Path
) -> None:
    """A name that is a function of the images alone would be in both: that is how a guess is confirmed."""
    images = digits.test.subset(np.arange(12))
    for cache in (tmp_path / "a", tmp_path / "b"):
        latents.cached(model, images, cache)
        key = {"images": tensors.digest(torch.from_numpy(images.images))}
        tensors.cached(cache, key, lambda: {"x": torch.zeros(1)})
    found = [names_in(tmp_path / cache) for cache in ("a", "b")]
    assert len(found[0]) == len(found[1]) == 3
    assert not found[0] & found[1]


def test_no_file_in_the_cache_holds_a_plain_digest_of_the_images(digits: ImageSplits, tmp_path: Path) -> None:
    plain = tensors.digest(torch.from_numpy(digits.test.images))
    tensors.cached(tmp_path, {"images": plain}, lambda: {"x": torch.zeros(1)})
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert everything and plain.encode() not in everything
