"""The picture of generated images."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dp_lora.models import sample


def test_the_grid_of_a_model_without_classes_is_square() -> None:
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    picture = Image.open(
        io.BytesIO(sample.grid(sample.Samples(images, np.zeros(7, np.int64), ("image",)), rows=3, scale=1))
    )
    assert np.asarray(picture)[::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
