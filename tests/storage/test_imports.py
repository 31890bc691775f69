"""The garbage collector around the imports of large libraries."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from dp_lora.storage.imports import uncollected


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.enable()


def test_the_collector_rests_inside_and_runs_afterwards() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_runs_again_after_an_import_that_failed() -> None:
    with pytest.raises(ModuleNotFoundError), uncollected():
        raise ModuleNotFoundError("no such module")
    assert gc.isenabled()


def test_a_collector_that_somebody_else_has_stopped_stays_so() -> None:
    gc.disable()
    with uncollected(), uncollected():
        pass
    assert not gc.isenabled()


def test_garbage_of_before_is_freed_afterwards() -> None:
    """A job of a multirun must not keep the model of the one before it."""

    class Model:
        pass

    model = Model()
    model.itself = model  # type: ignore[attr-defined]
    alive = weakref.ref(model)
    with uncollected():
        del model
    gc.collect()
    assert alive() is None
