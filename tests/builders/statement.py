"""The content of a privacy.json, as cards state it."""

from __future__ import annotations

from typing import Any

from dp_lora.records.coverage import COVERS, DOES_NOT_COVER

RECORD: dict[str, Any] = {
    "epsilon": 9.99961,
    "target_epsilon": 10.0,
    "delta": 1e-5,
    "noise_multiplier": 4.55449,
    "noise_multiplicity": 2,
    "max_grad_norm": 0.01,
    "sample_rate": 0.25,
    "expected_batch_size": 1000,
    "steps": 80,
    "accountant": "prv",
    "adjacency": "add or remove one image",
    "epsilon_by_accountant": {"rdp": 10.5, "pld": 9.98},
    "covers": list(COVERS),
    "does_not_cover": list(DOES_NOT_COVER),
}
