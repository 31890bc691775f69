"""Images with their labels, as evaluation takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dp_lora.config.schema import EvaluationConfig

QUICK = EvaluationConfig(classifier_epochs=1, batch_size=50)


class Images(NamedTuple):
    """Generated images."""

    images: Tensor
    labels: Tensor


def part(digits: Images, start: int, stop: int) -> Images:
    return Images(digits.images[start:stop], digits.labels[start:stop])
