"""Real digits, split and as samples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from dp_lora.data.sets import ImageSet, ImageSplits
from tests.builders.digit_images import Images, part


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Images:
    """The 1,797 real 8x8 digits of scikit-learn at 28 px."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 * 255
    images = F.interpolate(small, size=(28, 28), mode="bilinear").round().to(torch.uint8)
    return Images(images, torch.tensor(data.target, dtype=torch.int64))


@pytest.fixture(scope="module")
def splits(digits: Images) -> ImageSplits:
    def real(start: int, stop: int, role: str) -> ImageSet:
        images, labels = (values.numpy() for values in part(digits, start, stop))
        return ImageSet(images, labels, tuple("0123456789"), "digits", role, public=False)

    return ImageSplits(real(0, 60, "train"), real(60, 90, "validation"), real(90, 130, "test"))


@pytest.fixture(scope="module")
def samples(digits: Images) -> Images:
    return part(digits, 200, 240)
