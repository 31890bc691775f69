"""How often scouting finds the matrices that carry the signal, by the gradients that it takes.

    python -m benchmarks.salience

Eight matrices of unequal size; two of them carry all signal (`tests.builders.planted`). The engine is the
real one: Poisson batches, clip, noise and scores.
"""

from __future__ import annotations

import argparse

import torch

from dp_lora.privacy.scouting import best
from tests.builders.planted import PLANTED, SCOUTED, plan, scouted


def main() -> None:
    """Prints, for each signal and epsilon, how many of the trials found both matrices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=40, help="trainings a cell")
    parser.add_argument("--signals", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.trials} trials, {SCOUTED} scouting steps")
    print("| signal | epsilon | candidates | found both | score of the planted ones |")
    print("|---|---|---|---|---|")
    for signal in options.signals:
        for epsilon in (1.0, 10.0):
            given = plan(epsilon)
            for kind in ("lora", "matrices"):
                found, mean = 0, 0.0
                for trial in range(options.trials):
                    scores = scouted(kind, given, signal, trial)
                    found += set(best(scores, 0.25)) == set(PLANTED)
                    mean += sum(scores[name] for name in PLANTED) / len(PLANTED) / options.trials
                print(f"| {signal:g} | {epsilon:g} | {kind} | {found} | {mean:.1f} |", flush=True)


if __name__ == "__main__":
    main()
