"""Lightning checkpoints as CompVis's own environment writes them: read, and nothing of them executed."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dp_lora.errors import UserError
from dp_lora.models.compvis import read
from dp_lora.models.inert import NAMES, Inert, stand_ins

STATE = {"model.diffusion_model.out.2.bias": torch.arange(3.0), "betas": torch.ones(2)}


def _refuse(*given: Any, **named: Any) -> Any:
    raise AssertionError("something of the checkpoint was executed")


def classes(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[type]:
    """Classes of packages that are not here, which can be pickled while they are."""
    found = []
    for name in names:
        module, _, last = name.rpartition(".")
        made = type(last, (dict,) if last == "AttributeDict" else (), {"__module__": module})
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            package = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package) or types.ModuleType(package))
        monkeypatch.setattr(sys.modules[module], last, made, raising=False)
        found.append(made)
    return found


class _Scalar:
    """A NumPy scalar as NumPy 1 pickles it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, np.float64(0.5).__reduce__()[1]


def lightning(folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Path:
    """A checkpoint of Lightning 1.4, from an environment with NumPy 1."""
    names = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "main.SetupCallback")
    with monkeypatch.context() as patch:
        checkpoint, setup = classes(patch, *names)
        (attributes,) = classes(patch, "pytorch_lightning.utilities.parsing.AttributeDict")
        old = importlib.import_module("numpy.core.multiarray")

        def scalar(*given: Any) -> None: ...

        scalar.__module__, scalar.__qualname__ = old.__name__, "scalar"
        patch.setattr(old, "scalar", scalar)
        config = OmegaConf.create({"target": "ldm.LatentDiffusion", "params": {"a": [1, 2.5, None, True]}})
        saved = {
            "epoch": 3,
            "global_step": 17,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": STATE,
            "callbacks": {checkpoint: {"best_model_score": torch.tensor(0.1), "dirpath": "x"}, setup: {}},
            "optimizer_states": [{"state": {0: {"step": 5}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
            "lr_schedulers": [{"_last_lr": [_Scalar(scalar), np.float64(0.25)], "lr_lambdas": [{}]}],
            "hyper_parameters": attributes(config=config, epochs=4),
            **more,
        }
        torch.save(saved, folder / "model.ckpt")
    return folder / "model.ckpt"


def test_a_checkpoint_of_compvis_s_own_environment_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lightning(tmp_path, monkeypatch)
    # What the test writes is what torch's reader refuses by itself.
    needed = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    assert {
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "main.SetupCallback",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "omegaconf.dictconfig.DictConfig",
    } <= needed
    found = read(path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], value) for name, value in STATE.items())
    assert "pytorch_lightning" not in sys.modules and "main" not in sys.modules


def test_nothing_of_the_packages_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lightning(tmp_path, monkeypatch)
    for name in (
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
    ):
        module, _, last = name.rpartition(".")
        kind = getattr(importlib.import_module(module), last)
        for method in ("__init__", "__setstate__"):
            monkeypatch.setattr(kind, method, _refuse, raising=False)
    with stand_ins():
        saved = torch.load(path, weights_only=True)
    assert isinstance(saved["hyper_parameters"]["config"], Inert)
    assert not vars(saved["hyper_parameters"]["config"]), "it keeps nothing"
    assert len(saved["callbacks"]) == 2 and all(issubclass(key, Inert) for key in saved["callbacks"])
    # The broken twin: without stand-ins, nothing is read at all.
    with pytest.raises(Exception, match="Unsupported global"):
        torch.load(path, weights_only=True)


class _Call:
    def __init__(self, function: Any, *given: Any) -> None:
        self.called = (function, given)

    def __reduce__(self) -> Any:
        return self.called


MALICIOUS = {
    "a shell": (_Call(os.system, "touch executed"), "posix.system"),
    "evaluation": (_Call(eval, "open('executed', 'w')"), "eval"),
    "an attribute": (_Call(getattr, _Call(np.float64, 1.0), "tofile"), "getattr"),
    "an import": (_Call(importlib.import_module, "antigravity"), "importlib.import_module"),
    "a file": (_Call(np.fromfile, "/etc/passwd"), "fromfile"),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_what_would_be_executed_is_refused_in_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    payload, named = MALICIOUS[case]
    # Inside of what is passed over, too.
    for place in ("callbacks", "hyper_parameters"):
        path = lightning(tmp_path, monkeypatch, **{place: {"x": payload}})
        with pytest.raises(
            UserError, match=r"refused, since to read it pickled code would have to run"
        ) as caught:
            read(path)
        assert named in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_the_list_names_nothing_that_does_anything_else() -> None:
    with stand_ins():
        for made in torch.serialization.get_safe_globals():
            kind = made[0] if isinstance(made, tuple) else made
            if isinstance(made, tuple) and made[1] in NAMES:
                assert issubclass(kind, Inert)
                assert vars(kind("whatever", 1)) == {}
    names = {made[1] for made in torch.serialization.get_safe_globals() if isinstance(made, tuple)}
    assert not names & set(NAMES), "the list holds while a checkpoint is read"
