"""The residual networks that DPImageBench trains on generated images: WRN-40-4, ResNet-110 and ResNeXt-29.

Shapes and dtypes at the boundaries:
    values  float32 [N, C, S, S] in [-1, 1], S at least 8
    logits  float32 [N, num_classes]

All three have a first convolution, three stages of which the second and third halve the image, and a linear
layer on the mean over positions. Zagoruyko and Komodakis 2016, arXiv 1605.07146; He et al. 2016, arXiv
1512.03385, in the form for CIFAR-10; Xie et al. 2017, arXiv 1611.05431, in the form for CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Block = Callable[[int, int, int], nn.Module]
"""Makes a residual block from its channels before and after and its stride."""


def _convolution(channels: int, filters: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, size, stride, size // 2, groups=groups, bias=False)


def _stages(block: Block, channels: int, widths: tuple[int, ...], depth: int) -> nn.Sequential:
    """`depth` blocks of each width; every stage but the first begins by halving the image."""
    blocks = []
    for stage, width in enumerate(widths):
        for number in range(depth):
            blocks.append(block(channels, width, 2 if stage and not number else 1))
            channels = width
    return nn.Sequential(*blocks)


class _Residual(nn.Module):
    """Sum of a path of layers and a shortcut, which is a convolution where shapes differ."""

    def __init__(self, path: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.path, self.shortcut = path, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


def _shortcut(before: int, after: int, stride: int) -> nn.Module:
    if before == after and stride == 1:
        return nn.Identity()
    return nn.Sequential(_convolution(before, after, 1, stride), nn.BatchNorm2d(after))


def _basic(before: int, after: int, stride: int) -> nn.Module:
    path = nn.Sequential(
        _convolution(before, after, 3, stride),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        _convolution(after, after),
        nn.BatchNorm2d(after),
    )
    return _Residual(path, _shortcut(before, after, stride))


def _grouped(before: int, after: int, stride: int, *, cardinality: int, widen: int) -> nn.Module:
    width = cardinality * after // widen
    path = nn.Sequential(
        _convolution(before, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _convolution(width, width, 3, stride, groups=cardinality),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _convolution(width, after, 1),
        nn.BatchNorm2d(after),
    )
    return _Residual(path, _shortcut(before, after, stride))


class _PreActivated(nn.Module):
    """The block of a wide residual network: norm and ReLU come before each convolution."""

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.path = nn.Sequential(
            _convolution(before, after, 3, stride),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Dropout(dropout),
            _convolution(after, after),
        )
        self.project = None if before == after else _convolution(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activate(x)
        total: Tensor = self.path(activated) + (x if self.project is None else self.project(activated))
        return total


class _Network(nn.Module):
    """First layers, stages, last layers, mean over positions, a linear layer."""

    def __init__(self, layers: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.layers = layers
        self.linear = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, values: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.layers(values).mean(dim=(2, 3)))
        return logits


def wide_resnet(channels: int, num_classes: int, *, depth: int = 40, widen: int = 4) -> nn.Module:
    """WRN-depth-widen with dropout 0.3; depth is 6 n + 4."""
    assert depth % 6 == 4, depth
    widths = (16 * widen, 32 * widen, 64 * widen)

    def block(before: int, after: int, stride: int) -> nn.Module:
        return _PreActivated(before, after, stride, dropout=0.3)

    layers = nn.Sequential(
        _convolution(channels, 16),
        _stages(block, 16, widths, (depth - 4) // 6),
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
    )
    return _Network(layers, widths[-1], num_classes)


def resnet(channels: int, num_classes: int, *, depth: int = 110) -> nn.Module:
    """ResNet-depth of basic blocks 16, 32 and 64 wide; depth is 6 n + 2."""
    assert depth % 6 == 2, depth
    layers = nn.Sequential(
        _convolution(channels, 16),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        _stages(_basic, 16, (16, 32, 64), (depth - 2) // 6),
    )
    return _Network(layers, 64, num_classes)


def resnext(
    channels: int, num_classes: int, *, depth: int = 29, cardinality: int = 8, widen: int = 4
) -> nn.Module:
    """ResNeXt-depth of bottlenecks in `cardinality` groups, 256, 512 and 1024 wide; depth is 9 n + 2."""
    assert depth % 9 == 2, depth
    widths = (64 * widen, 128 * widen, 256 * widen)

    def block(before: int, after: int, stride: int) -> nn.Module:
        return _grouped(before, after, stride, cardinality=cardinality, widen=widen)

    layers = nn.Sequential(
        _convolution(channels, 64),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        _stages(block, 64, widths, (depth - 2) // 9),
    )
    return _Network(layers, widths[-1], num_classes)
