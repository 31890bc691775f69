"""What an audit found, in the words of a card: what is proven, what was measured, what speaks against it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dp_lora.records.card import bullets
from dp_lora.records.rounding import at_least, at_most


def bounds(audit: Mapping[str, Any]) -> list[str]:
    """One line for what is proven and one for what was measured, from the key `audit` of result.json.

    >>> lines = bounds({"epsilon": 10.0, "delta": 1e-5, "confidence": 0.95, "epsilon_lower_bound": 2.875,
    ...     "canaries": 1000, "kind": "gradient", "epsilon_lower_bound_if_gaussian": 8.6})
    >>> lines[0]
    'Proven: epsilon <= 10 at delta 1e-05.'
    >>> lines[1].split(" with ")[0]
    'Measured: epsilon >= 2.875'
    """
    lines = [
        f"Proven: epsilon <= {at_most(audit['epsilon'])} at delta {at_most(audit['delta'])}.",
        f"Measured: epsilon >= {at_least(audit['epsilon_lower_bound'])} with "
        f"{100 * audit['confidence']:g} % confidence, from {audit['canaries']:,} {audit['kind']} canaries in "
        "one training (Steinke et al. 2023).",
    ]
    gaussian = audit.get("epsilon_lower_bound_if_gaussian")
    if gaussian is not None:
        lines.append(
            f"Measured: epsilon >= {at_least(gaussian)} from the same canaries, if the mechanism is a "
            "Poisson-subsampled Gaussian one of unknown noise (Nasr et al. 2023)."
        )
    return lines


def noise_line(audit: Mapping[str, Any]) -> str:
    """The findings of the noise tests in one line, from the key `audit` of result.json.

    >>> noise_line({"noise_test": {"accused": False, "accused_by": [], "p_value": 0.4, "false_alarm": 0.01,
    ...     "noise_multiplier": 1.355, "estimated_noise_multiplier": 1.352, "interval": [1.34, 1.364],
    ...     "update_norms": 80}}).partition(": ")[2]
    'sigma 1.352 (1.34 to 1.364) in the canary training, 1.355 claimed; update norms of the run: 80; p = 0.4.'
    """
    found = audit["noise_test"]
    parts = []
    if "estimated_noise_multiplier" in found:
        low, high = found["interval"]
        parts.append(
            f"sigma {found['estimated_noise_multiplier']:.4g} ({low:.4g} to {high:.4g}) in the canary "
            f"training, {found['noise_multiplier']:.4g} claimed"
        )
    parts.append(f"update norms of the run: {found['update_norms']}")
    parts.append(f"p = {found['p_value']:.2g}")
    verdict = _verdict(found)
    return (
        f"Noise, by tests with {100 * found['false_alarm']:g} % false alarms, {verdict}: {'; '.join(parts)}."
    )


_REASONS = {
    "variance_above": "more noise than claimed: the scale of the release depends on the batch",
    "loudest_tensor": "more noise than claimed: the scale of the release depends on the batch",
    "largest_contribution": "one example adds more than the clip allows",
    "missing_release": "a step without examples released nothing",
    "unreleased_update": "parameters changed by something else than what was released",
}
"""The findings of tests that look for something other than too little or repeated noise."""


def _verdict(found: Mapping[str, Any]) -> str:
    """The verdict of the noise tests in a few words, from the key `noise_test` of an audit."""
    by = found["accused_by"]
    if found["accused"]:
        weak = ["too little or repeated"] if any(name not in _REASONS for name in by) else []
        return f"{'; '.join([*weak, *_reasons(by)])} ({', '.join(by)})"
    low, high = found.get("interval", [found["noise_multiplier"]] * 2)
    if low <= found["noise_multiplier"] <= high:
        return "as claimed"
    return "not refuted, though the interval leaves the claim out"


def _reasons(accused_by: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(_REASONS[name] for name in accused_by if name in _REASONS))


ACCUSED = (
    "**The audit accuses the noise: there is less of it, or it is less independent, than is claimed. Do not "
    "rely on the guarantee.**"
)

CONTRADICTED = (
    "**The audit contradicts the guarantee: more was measured than is claimed. Do not rely on it.**"
)


def warnings(audit: Mapping[str, Any]) -> list[str]:
    """Lists what speaks against the guarantee, from the key `audit` of result.json; empty if nothing does.

    `contradicted` says whether a lower bound lies above epsilon, `noise_test.accused` whether a
    release failed a test. The two are verdicts of their own.
    """
    return [
        *([CONTRADICTED] if audit["contradicted"] else []),
        *([ACCUSED] if any(name not in _REASONS for name in audit["noise_test"]["accused_by"]) else []),
        *(
            f"**The audit accuses the engine: {reason}. Do not rely on the guarantee.**"
            for reason in _reasons(audit["noise_test"]["accused_by"])
        ),
    ]


_AUDIT = re.compile(r"## Audit\n.*?(?=^## )", re.DOTALL | re.MULTILINE)


def with_audit(card: str, audit: Mapping[str, Any]) -> str:
    """The card with a section on the audit, in place of an earlier one.

    Args:
        card: from `model_card`.
        audit: as in `bounds` and `noise_line`.
    """
    lines = [
        *warnings(audit),
        bullets([*bounds(audit), noise_line(audit)]),
        "The canaries were trained with this model and these settings, without the private images. A "
        "measured bound below the proven one does not say that less was spent: it is what this attack could "
        "show. The tests of the noise bound no epsilon.",
    ]
    section = "\n\n".join(["## Audit", *lines]) + "\n\n"
    before, loading, after = _AUDIT.sub("", card).partition("## Loading")
    assert loading, "every card has a section on loading"
    return before + section + loading + after
