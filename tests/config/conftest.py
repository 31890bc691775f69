"""The configuration that presets choose."""

from __future__ import annotations

import pytest

from dp_lora.config.schema import Config
from tests.builders.tiny import composed


@pytest.fixture(scope="module")
def default() -> Config:
    return composed()
