"""What is known of the published sets without looking at their files."""

from __future__ import annotations

COUNTS = {
    "mnist5k": {"train": 4_000, "test": 1_000},
    "digits": {"train": 1_500, "test": 297},
    "mnist": {"train": 60_000, "test": 10_000},
    "fashion_mnist": {"train": 60_000, "test": 10_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "emnist_letters": {"train": 124_800, "test": 20_800},
    "imagenet": {"train": 1_281_167, "test": 50_000},
    "celeba": {"train": 162_770, "validation": 19_867, "test": 19_962},
    "celebahq": {"all": 30_000},
}
"""Numbers of images by their role; CelebA-HQ is published with several splits."""
