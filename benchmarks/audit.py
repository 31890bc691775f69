"""How often the audit finds a defect of the engine, and how often it accuses a correct one.

    python -m benchmarks.audit [--audits 200] [--defect-audits 50] [--plans NAME ...] [--results FILE]

Audits of the engine's own step on a linear model (`linear_audit`), on plans from a sample rate of 0.02 to 1
and from 2 to 1,000 steps. Prints a table in Markdown: audits that accuse, of audits made, and in brackets by
the tests of the noise and by the lower bounds on epsilon. What is done is kept in `--results`: the same
command goes on from there, and prints at once when all of it is done.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.linear_audit import (
    ALONE,
    DEFECTS,
    FACTORS,
    MICROBATCH,
    correct,
    judge,
    noise_times,
    plan_of,
    silent,
    train,
)
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.records.provenance import hardware
from dp_lora.storage.files import append_line, read_lines


@dataclass(frozen=True)
class Setting:
    """A plan, and how large its audits are."""

    sample_rate: float
    steps: int
    noise_multiplier: float | None = None
    canaries: int = 400
    empty: int = 512
    together: int = 20
    """Audits that share a training."""

    def plan(self, k: int = 1) -> PrivacyPlan:
        return plan_of(self.sample_rate, self.steps, self.noise_multiplier, k)


PLANS = {
    "half": Setting(0.5, 2),
    "full": Setting(1.0, 10),
    "default": Setting(0.25, 80, 1.355),
    "long": Setting(0.02, 1000, canaries=200, empty=200, together=50),
}
Engine = Callable[[], AbstractContextManager[object]]
ENGINES: dict[str, Engine] = {
    "correct": correct,
    **{f"noise x {factor:g}": noise_times(factor) for factor in FACTORS},
    **{name: defect for name, defect in DEFECTS.items() if name not in ("no noise", "half of the noise")},
}


def defective(engine: str, setting: Setting) -> bool:
    """Whether `engine` breaks the claim on this plan: at a sample rate of 1 full batches are claimed."""
    return not (engine == "every image in every batch" and setting.sample_rate == 1)


def measure(name: str, engine: str, index: int, together: int) -> dict[str, object]:
    """So many audits that share a training, with the key that belongs to `index`."""
    setting, started = PLANS[name], time.process_time()
    plan = setting.plan(4 if "draws" in engine else 1)
    key = Randomness.from_seed(index).derive(f"{name} {engine}")
    with ENGINES[engine]():
        trained = train(plan, together, setting.canaries, key, setting.empty, MICROBATCH.get(engine))
        steps = [silent(plan, setting.canaries, key.derive(str(i)), setting.empty) for i in range(together)]
    found = [judge(one, plan, own) for one, own in zip(trained, steps, strict=True)]
    return {
        "plan": name,
        "engine": engine,
        "index": index,
        "audits": len(found),
        "noise": sum(one.noise for one in found),
        "bounds": sum(one.bounds for one in found),
        "accused": sum(one.accused for one in found),
        "by": dict(Counter(test for one in found for test in one.by)),
        "seconds": round(time.process_time() - started, 1),
    }


def run(names: Sequence[str], engines: Sequence[str], audits: int, defect_audits: int, results: Path) -> None:
    done = Counter[tuple[str, str]]()
    for row in read_lines(results):
        done[row["plan"], row["engine"]] += row["audits"]
    for engine in engines:
        whole = engine == "every image in every batch"
        wanted = audits if engine == "correct" or "noise x" in engine else defect_audits
        for name in names:
            while defective(engine, PLANS[name]) and done[name, engine] < wanted:
                # The audits done so far name the key, so that no audit is made twice.
                # Whole batches of all audits together would take much longer.
                together = 1 if engine in ALONE else 5 if whole else PLANS[name].together
                append_line(results, measure(name, engine, done[name, engine], together))
                done[name, engine] += together


def tables(names: Sequence[str], results: Path) -> str:
    rows = read_lines(results)
    head = ["engine", *(f"q {PLANS[n].sample_rate:g}, {PLANS[n].steps:,} steps" for n in names)]
    sizes = ["sigma; canaries"]
    sizes += [f"{PLANS[n].plan().noise_multiplier:.4g}; {PLANS[n].canaries}" for n in names]
    lines = [head, ["---"] * len(head), sizes]
    for engine in ENGINES:
        cells = []
        for name in names:
            part = [row for row in rows if (row["plan"], row["engine"]) == (name, engine)]
            total = sum(row["audits"] for row in part)
            counts = [sum(row[key] for row in part) for key in ("accused", "noise", "bounds")]
            cells.append(f"{counts[0]} of {total} ({counts[1]}, {counts[2]})" if total else "-")
        lines.append([engine, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--audits", type=int, default=200, help="for each factor of the noise, and correct")
    parser.add_argument("--defect-audits", type=int, default=50, help="for each other defect")
    parser.add_argument("--plans", nargs="*", choices=PLANS, default=list(PLANS))
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--results", type=Path, default=Path("outputs/audit_power.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    run(options.plans, options.engines, options.audits, options.defect_audits, options.results)
    print(
        f"{hardware()['cpu']}, one thread, {datetime.date.today()}: accused of audits made (by the tests of"
    )
    print("the noise, by the lower bounds)\n")
    print(tables(options.plans, options.results))


if __name__ == "__main__":
    main()
