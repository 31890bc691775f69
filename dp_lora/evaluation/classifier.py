"""Classifiers trained on labelled images, whose accuracy on real ones says what the images are good for.

Shapes, ranges and dtypes at the boundaries:
    images  uint8 [N, C, S, S] in [0, 255]
    labels  int64 [N] in [0, num_classes)

No choice is made by any image: the number of epochs is fixed, and the last weights are the ones tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_lora.evaluation.features import reproducible_convolutions
from dp_lora.evaluation.residual_classifiers import resnet, resnext, wide_resnet
from dp_lora.privacy.moving_average import MovingAverage

SMALLEST_SIDE = 28
LARGEST_SIDE = 64
"""Images smaller than the one or larger than the other are resized to it (bilinear, antialiased)."""


@dataclass(frozen=True)
class ClassifierRecipe:
    """The architecture and the training of a classifier: everything that result.json says about it."""

    layers: str
    dropout: float
    learning_rate: float
    batch_size: int
    decay: float = 1.0
    """Factor of the learning rate after two fifths and after four fifths of the epochs."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is tested; 0: the last weights are tested."""
    optimizer: str = "Adam"
    smallest_side: int = SMALLEST_SIDE
    largest_side: int = LARGEST_SIDE


def _deep(layers: str, dropout: float) -> ClassifierRecipe:
    return ClassifierRecipe(layers, dropout, 1e-2, batch_size=256, decay=0.2, ema_decay=0.9999)


RECIPES = {
    "cnn": ClassifierRecipe("conv 32, conv 64, conv 128, linear 128, linear", 0.5, 1e-3, batch_size=64),
    "wrn": _deep("WRN-40-4", 0.3),
    "resnet": _deep("ResNet-110", 0.0),
    "resnext": _deep("ResNeXt-29, 8 groups, widening 4", 0.0),
}
"""By the names of `evaluation.classifiers`."""

"""Those whose mean accuracy DPImageBench reports."""

_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "wrn": wide_resnet,
    "resnet": resnet,
    "resnext": resnext,
}


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    epochs: int,
    seed: int,
    device: torch.device,
    name: str = "cnn",
) -> nn.Module:
    """The classifier `name` trained on `images` uint8 [N, C, H, W] and `labels` int64 [N], for evaluation.

    `cnn` is that of DPDM (Dockhorn et al. 2023, arXiv 2210.09929): three convolutions and two linear layers.
    It takes 50 epochs of 60,000 images, in batches of 128 at learning rate 3e-4; a few hundred steps call
    for batches of 64 at Adam's own default of 1e-3. `wrn`, `resnet` and `resnext` are networks and recipe of
    DPImageBench (Gong et al. 2025, arXiv 2503.14681) for all sets but CIFAR-10, with 50 epochs, but without
    its choice of an epoch by images. Cross-entropy; leaves torch's random state as it was.
    """
    recipe = RECIPES[name]
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        reproducible_convolutions(),
    ):
        torch.manual_seed(seed)
        classifier = build(name, images.shape[1], images.shape[-1], num_classes).to(device)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=recipe.learning_rate)
        turns = [max(1, round(share * epochs / 5)) for share in (2, 4)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, turns, gamma=recipe.decay)
        tested = list(classifier.parameters()) if recipe.ema_decay else []
        average = MovingAverage(tested, recipe.ema_decay)
        steps = 0
        for _ in range(epochs):
            for chosen in torch.split(torch.randperm(len(images)), recipe.batch_size):
                logits = classifier(images[chosen].to(device))
                loss = F.cross_entropy(logits, labels[chosen].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
                average.update(steps)
            schedule.step()
        average.copy_to(tested)
    return classifier.eval()


@torch.inference_mode()
def correct(classifier: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int) -> Tensor:
    """bool [N]: to which of `images` uint8 [N, C, H, W] `classifier` gives their label."""
    device = next(classifier.parameters()).device
    with reproducible_convolutions():
        guesses = [
            classifier(batch.to(device)).argmax(dim=1).cpu() for batch in torch.split(images, batch_size)
        ]
    return torch.cat(guesses) == labels


def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int) -> float:
    """The fraction of `images` uint8 [N, C, H, W] to which `classifier` gives their label, in [0, 1]."""
    return int(correct(classifier, images, labels, batch_size=batch_size).sum()) / len(labels)


def build(name: str, channels: int, side: int, num_classes: int) -> nn.Module:
    """The untrained classifier `name`: logits float32 [N, num_classes] of images uint8 [N, C, S, S].

    Images smaller than 28 px go up to 28, for which the CNN was designed; larger than 64 px down to 64,
    which bounds its first linear layer.
    """
    side = min(max(side, SMALLEST_SIDE), LARGEST_SIDE)
    network = _cnn(channels, side, num_classes) if name == "cnn" else _NETWORKS[name](channels, num_classes)
    return _Resized(network, side)


class _Resized(nn.Module):
    def __init__(self, network: nn.Module, side: int) -> None:
        super().__init__()
        self.network, self.side = network, side

    def forward(self, images: Tensor) -> Tensor:
        values = images.float() / 127.5 - 1
        if values.shape[-2:] != (self.side, self.side):
            values = F.interpolate(values, size=(self.side, self.side), mode="bilinear", antialias=True)
        logits: Tensor = self.network(values)
        return logits


def _cnn(channels: int, side: int, num_classes: int) -> nn.Module:
    last_side = ((side - 2) // 2 - 2) // 2 - 2
    dropout = RECIPES["cnn"].dropout
    return nn.Sequential(
        *_block(channels, 32, dropout),
        *_block(32, 64, dropout),
        nn.Conv2d(64, 128, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * last_side**2, 128),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(128, num_classes),
    )


def _block(channels: int, filters: int, dropout: float) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, filters, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(dropout)
