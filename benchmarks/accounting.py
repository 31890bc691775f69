"""How long the Renyi divergences of a plan take, beside Opacus' series, and a calibration beside Opacus'.

    python -m benchmarks.accounting [--rounds 9]

Prints, for each plan, the median processor time of both for the same 139 orders and the largest difference
of log A (relative above 1); then of a calibration to the plan's epsilon at delta 1e-5, by ours (never above
the target, and at most 0.5 % below it) and by Opacus' `get_noise_multiplier` with PRV and its default
tolerance.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
from opacus.accountants.analysis.rdp import compute_rdp
from opacus.accountants.utils import get_noise_multiplier

from dp_lora.privacy import accounting, renyi
from dp_lora.privacy.renyi import ORDERS
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.records.provenance import hardware

PLANS = [
    (0.25, 1.355, 80, 9.98),
    (1 / 30, 0.9778, 1800, 9.98),
    (0.0503, 13.9, 500, 1.0),
    (0.02, 0.7343, 1000, 8.0),
]


def seconds(call: Callable[[], object], rounds: int) -> float:
    """The median processor time."""
    taken = []
    for _ in range(rounds):
        for cached in (renyi._of_one_step, accounting._pld, accounting._prv):
            cached.cache_clear()
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    print(f"{hardware()['cpu']}, one process, {datetime.date.today()}\n")
    print("| q, sigma, steps | divergences | Opacus | difference of log A | calibration | Opacus |")
    print("|---|---|---|---|---|---|")
    for q, sigma, steps, epsilon in PLANS:
        ours = renyi.divergences_of(Mechanism(sigma, q, 1))
        theirs = np.asarray(compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=ORDERS))
        log_a = theirs * (np.asarray(ORDERS) - 1)
        gap = float(np.max(np.abs(ours - theirs) * (np.asarray(ORDERS) - 1) / np.maximum(log_a, 1.0)))
        times = (
            seconds(lambda q=q, sigma=sigma: renyi.divergences_of(Mechanism(sigma, q, 1)), rounds),
            seconds(
                lambda q=q, sigma=sigma: compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=ORDERS),
                rounds,
            ),
            seconds(
                lambda q=q, steps=steps, e=epsilon: accounting.noise_multiplier_for(e, 1e-5, q, steps), rounds
            ),
            seconds(
                lambda q=q, steps=steps, e=epsilon: get_noise_multiplier(
                    target_epsilon=e, target_delta=1e-5, sample_rate=q, steps=steps, accountant="prv"
                ),
                max(1, rounds // 3),
            ),
        )
        shown = [f"{1000 * s:.3g} ms" for s in times]
        cells = [f"{q:.4g}, {sigma:g}, {steps:,}", *shown[:2], f"{gap:.1g}", *shown[2:]]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
