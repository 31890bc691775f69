"""The command `dp-lora-audit`: holds the claim of a finished run against what can be measured.

Three parts. Canaries in a training of their own, with the run's model and plan and without its private
images: a lower bound on epsilon that costs no privacy. Tests of the noise in that training and in the update
norms that the run has logged, which cost none either. And membership inference on the run's adapter, which is
a function of the private images and stays with the auditor.

What it finds goes into result.json and, but for the private part, into the adapter's card. Scores of single
images stay in checkpoint/. An audit that is interrupted changes neither, and the same command continues it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_lora.auditing.options import KINDS, Options, check
from dp_lora.commands.parser import Parser, ending
from dp_lora.config.schema import DEVICES
from dp_lora.storage.files import expanded

CONTRADICTED = 1
"""The exit status when more was measured than is claimed, or the noise failed a test."""


def main() -> None:
    """Audits one run. A user's mistake is one line and exit status 2; a contradiction is exit status 1."""
    with ending("dp-lora-audit", interrupted="the same command continues"):
        directory, options = _parse(sys.argv[1:])
        check(options)
        from dp_lora.auditing.audit import audit

        record = audit(directory, options)
    print(summary(record, directory))
    if record["contradicted"] or record["noise_test"]["accused"]:
        sys.exit(CONTRADICTED)


def _parse(words: Sequence[str]) -> tuple[Path, Options]:
    default = Options()
    parser = Parser(
        prog="dp-lora-audit",
        description="Measures a lower bound on epsilon of a finished run, and how well its adapter tells "
        "members from others; tests the noise. Exit status 1: more was measured than is claimed, or the "
        "noise failed a test.",
    )
    parser.add_argument("directory", type=Path, metavar="RUN_DIRECTORY", help="of a finished job")
    parser.add_argument(
        "--canaries", type=int, default=default.canaries, metavar="N", help="how many (%(default)s)"
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default=default.kind,
        help="worst-case gradients, or odd images (%(default)s)",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=default.confidence,
        metavar="P",
        help="of each bound (%(default)s)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=default.images,
        metavar="N",
        help="members, and as many others, for the membership inference; 0: none (%(default)s)",
    )
    parser.add_argument(
        "--draws", type=int, default=default.draws, metavar="K", help="for the loss of an image (%(default)s)"
    )
    parser.add_argument("--device", choices=DEVICES, default=default.device, help="(%(default)s)")
    given = vars(parser.parse_args(words))
    directory = given.pop("directory")
    return expanded(directory, str(directory)), Options(**given)


def summary(record: dict[str, Any], directory: Path) -> str:
    """The lines that the command ends with."""
    from dp_lora.records.audit_section import bounds, noise_line, warnings

    lines = [warning.strip("*") for warning in warnings(record)]
    lines += [*bounds(record), noise_line(record)]
    lines.append(
        f"Canaries taken for trained on: {record['true_positives']} of {record['positives']} that were, "
        f"{record['false_positives']} of {record['negatives']} that were not. The first bound is from "
        f"{record['correct']} right of {record['guesses']} guesses; it could have been "
        f"{record['most_that_could_be_shown']:.3g} at most."
    )
    lines += _membership(record.get("membership_inference", {}))
    if not (directory / "result.json").exists():
        lines.append("result.json is not there yet: give this command again after the stage evaluate.")
    return "\n".join(lines)


def _membership(found: dict[str, Any]) -> list[str]:
    lines = []
    for attack in ("loss", "calibrated"):
        if attack in found:
            low, high = found[attack]["auc_interval"]
            rates = ", ".join(
                f"TPR {rate['tpr']:.2%} at FPR {float(at):.1%}"
                for at, rate in found[attack]["tpr_at_fpr"].items()
            )
            auc = f"AUC {found[attack]['auc']:.3f} ({low:.3f} to {high:.3f})"
            lines.append(f"Membership by {attack}, not covered by epsilon: {auc}, {rates}.")
    return lines


if __name__ == "__main__":
    main()
