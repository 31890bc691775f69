"""Losses of an autoencoder beside the error of its pixels: distances of features, and a discriminator.

Public pre-training only. Shapes, ranges and dtypes at the boundaries:
    images   float32 [B, C, H, W] in [-1, 1], C = 1 or 3
    distance float32 [B]
    logits   float32 [B, 1, h, w], one for each patch
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_lora.errors import UserError


class FeatureDistance(nn.Module):
    """Mean squared difference of a frozen network's features, each normalised over its channels.

    LPIPS (Zhang et al. 2018, eq. 1) with every channel of weight 1: no weights fitted to human judgements.
    Zero for equal images.
    """

    def __init__(self, stages: nn.Module) -> None:
        super().__init__()
        self.stages = stages.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FeatureDistance:
        """Stays in evaluation mode: its features are those of the published network."""
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        total = torch.zeros(len(images), device=images.device)
        for own, other in zip(self.stages(images), self.stages(others), strict=True):
            difference = F.normalize(own.float(), dim=1) - F.normalize(other.float(), dim=1)
            total = total + difference.square().sum(1).mean((1, 2))
        return total


class Lite0Stages(nn.Module):
    """Features of EfficientNet-Lite0 (Tan and Le 2019) before each halving, with small images at 64 px."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.shape[-1] < 64:
            images = F.interpolate(images, size=(64, 64), mode="bilinear", align_corners=False)
        # The weights were trained on (x - 127) / 128 of bytes x.
        x = ((images.expand(-1, 3, -1, -1) + 1) * 127.5 - 127.0) / 128.0
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(x)))  # type: ignore[operator]
        found = []
        for block in network._blocks:  # type: ignore[union-attr]
            before, x = x, block(x)
            if x.shape[-1] < before.shape[-1]:
                found.append(before)
        return [*found, x]


_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Vgg16Stages(nn.Module):
    """Features of VGG-16 (Simonyan and Zisserman 2015) before each pooling: relu1_2 to relu5_3.

    Its parameters have the names of torchvision's `vgg16`, whose file of weights is what LPIPS builds on.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for widths in _VGG_WIDTHS:
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.shape[-1] < 32:  # which its five poolings would leave nothing of
            images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
        x = ((images.expand(-1, 3, -1, -1) + 1) / 2 - self.mean) / self.std
        found = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]


def load_distance(network: str) -> FeatureDistance:
    """The distance over `lite0`, which a package brings, or over VGG-16 with the weights of a file.

    Raises UserError for a file that is absent or holds something else; no pickled code is executed.
    """
    if network == "lite0":
        from dp_lora.evaluation.features import load_lite0

        return FeatureDistance(Lite0Stages(load_lite0().network))
    field, path = f"model.pretrain.perceptual_network={network}", Path(network).expanduser()
    stages = Vgg16Stages()
    expected = stages.state_dict()
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stages.load_state_dict({name: tensors[name] for name in expected})
    except (OSError, KeyError, TypeError, RuntimeError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{field}: cannot be read ({reason}); expected lite0 or a file with the state_dict of "
            "torchvision's vgg16"
        ) from error
    except Exception as error:  # a pickle that would have to be executed
        raise UserError(f"{field}: refused, it is no file of weights alone") from error
    return FeatureDistance(stages)


class PatchDiscriminator(nn.Module):
    """Says for each patch whether it is real (Isola et al. 2017), here with group norms.

    Batch norms would make the result depend on how a batch is divided over processes.
    """

    def __init__(self, channels: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        halvings = min(3, max(1, int(math.log2(image_size)) - 2))
        widths = [min(width * 2**i, width * 8) for i in range(halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if i < halvings - 1 else 1
            layers.append(nn.Conv2d(before, after, 4, stride, 1, bias=False))
            layers += [nn.GroupNorm(16, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for layer in self._convolutions():
            nn.init.normal_(layer.weight, 0.0, 0.02)

    def _convolutions(self) -> Iterator[nn.Conv2d]:
        return (layer for layer in self.layers if isinstance(layer, nn.Conv2d))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def hinge_loss(real: Tensor, generated: Tensor) -> Tensor:
    """The discriminator's loss [B] for its logits on real and on generated images (Lim and Ye 2017)."""
    losses = F.relu(1 - real) + F.relu(1 + generated)
    return 0.5 * losses.flatten(1).mean(1)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """The weight at which the opponent's gradient has the length of the reconstruction's.

    Both are gradients at the decoder's last layer, of the whole batch (Esser et al. 2021, eq. 7).
    """
    ratio: Tensor = reconstruction.norm() / (adversarial.norm() + 1e-4)
    return ratio.clamp(0, 1e4)
