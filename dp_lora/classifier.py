"""A small CNN trained on labelled images, whose accuracy on real ones says what the images are good for.

Shapes, ranges and dtypes at the boundaries:
    images  uint8 [N, C, S, S] in [0, 255]
    labels  int64 [N] in [0, num_classes)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_lora.features import reproducible_convolutions


@dataclass(frozen=True)
class ClassifierRecipe:
    """The constants of the CNN and of its training."""

    layers: str = "conv 32, conv 64, conv 128, linear 128, linear"
    dropout: float = 0.5
    smallest_side: int = 28
    largest_side: int = 64
    optimizer: str = "Adam"
    learning_rate: float = 1e-3
    batch_size: int = 64


CLASSIFIER = ClassifierRecipe()


def train_classifier(
    images: Tensor, labels: Tensor, *, num_classes: int, epochs: int, seed: int, device: torch.device
) -> nn.Module:
    """The CNN of DPDM trained on `images` uint8 [N, C, H, W] and `labels` int64 [N], in evaluation mode.

    Three convolutions and two linear layers with dropout 0.5, cross-entropy, Adam; a fixed number of
    epochs and the last weights. DPDM takes 50 epochs of 60,000 images, in batches of 128 at learning rate
    3e-4; a few hundred steps call for batches of 64 at Adam's own default of 1e-3. Leaves torch's random
    state as it was.

    Dockhorn et al. 2023, arXiv 2210.09929.
    """
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        reproducible_convolutions(),
    ):
        torch.manual_seed(seed)
        classifier = _Classifier(images.shape[1], images.shape[-1], num_classes).to(device)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=CLASSIFIER.learning_rate)
        for _ in range(epochs):
            for chosen in torch.split(torch.randperm(len(images)), CLASSIFIER.batch_size):
                logits = classifier(images[chosen].to(device))
                loss = F.cross_entropy(logits, labels[chosen].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return classifier.eval()


@torch.inference_mode()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int) -> float:
    """The fraction of `images` uint8 [N, C, H, W] to which `classifier` gives their label, in [0, 1]."""
    device = next(classifier.parameters()).device
    with reproducible_convolutions():
        guesses = [
            classifier(batch.to(device)).argmax(dim=1).cpu() for batch in torch.split(images, batch_size)
        ]
    return int((torch.cat(guesses) == labels).sum()) / len(labels)


class _Classifier(nn.Module):
    """Logits float32 [N, num_classes] of images uint8 [N, C, S, S].

    Images smaller than 28 px go up to 28, for which the network was designed; larger than 64 px down to
    64, which bounds its first linear layer.
    """

    def __init__(self, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        self.side = min(max(side, CLASSIFIER.smallest_side), CLASSIFIER.largest_side)
        last_side = ((self.side - 2) // 2 - 2) // 2 - 2
        dropout = CLASSIFIER.dropout
        self.layers = nn.Sequential(
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

    def forward(self, images: Tensor) -> Tensor:
        values = images.float() / 127.5 - 1
        if values.shape[-2:] != (self.side, self.side):
            values = F.interpolate(values, size=(self.side, self.side), mode="bilinear", antialias=True)
        logits: Tensor = self.layers(values)
        return logits


def _block(channels: int, filters: int, dropout: float) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, filters, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(dropout)
