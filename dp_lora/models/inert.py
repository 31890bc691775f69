"""What Lightning checkpoints hold beside tensors, as names that stand for nothing.

CompVis's own environment (Lightning 1.4, OmegaConf 2.1) writes callbacks keyed by their class, NumPy's
scalars in the state of a scheduler, and an OmegaConf object as hyper-parameters. None of it is read: while
`stand_ins` holds, torch's restricted reader makes an empty object wherever the file names one of a fixed
list of classes or functions. Nothing of these packages is imported or executed, and any other name is
refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


class Inert:
    """An object that takes whatever it is made of, and keeps none of it."""

    def __new__(cls, *given: Any, **named: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *given: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty(*given: Any) -> dict[Any, Any]:
    return {}


_CALLBACKS = ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping",
              "lr_monitor.LearningRateMonitor")  # fmt: skip
_NODES = ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "EnumNode", "BytesNode",
          "PathNode")  # fmt: skip

NAMES = (
    *(f"{package}.callbacks.{name}" for package in ("pytorch_lightning", "lightning.pytorch")
      for name in _CALLBACKS),
    # Of CompVis's main.py, which is the main module of a training.
    *(f"{module}.{name}" for module in ("main", "__main__")
      for name in ("SetupCallback", "ImageLogger", "CUDACallback")),
    *(f"ldm.lr_scheduler.{name}" for name in ("LambdaLinearScheduler", "LambdaWarmUpCosineScheduler",
                                              "LambdaWarmUpCosineScheduler2")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig",
                                       "base.ContainerMetadata", "base.Metadata")),
    *(f"omegaconf.nodes.{name}" for name in _NODES),
    *(f"{module}.{name}" for module in ("numpy.core.multiarray", "numpy._core.multiarray")
      for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    "typing.Any",
    *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "list", "dict", "tuple", "object")),
)  # fmt: skip
"""Classes and functions that a checkpoint may name."""

_MAPPINGS: dict[str, Callable[..., Any]] = {
    "collections.defaultdict": _empty,
    "pytorch_lightning.utilities.parsing.AttributeDict": OrderedDict,
    "lightning.pytorch.utilities.parsing.AttributeDict": OrderedDict,
    "lightning.fabric.utilities.data.AttributeDict": OrderedDict,
}
"""Those that the file fills like a dictionary."""


def stand_ins() -> AbstractContextManager[Any]:
    """While this holds, `torch.load(..., weights_only=True)` has a stand-in for every name of the list."""
    # A class each: they are keys of one dictionary.
    inert: list[tuple[Any, str]] = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in NAMES]
    return torch.serialization.safe_globals([*inert, *((made, name) for name, made in _MAPPINGS.items())])
