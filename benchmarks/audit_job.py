"""Whether `dp-lora-audit` accuses the default job when its engine adds too little noise.

    python -m benchmarks.audit_job [--factors 1 0.8 ...] [--results FILE] [WORD ...]

For each factor: the stage finetune of a job (the default one, or what the words say), and the audit of its
run with 1,000 canaries, both with so many times the noise that was accounted. Prints a table in Markdown:
which tests accuse, their p-value, the bounds on epsilon, and whether they contradict the claim. What is done
is kept in `--results`: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

import dp_lora.__main__  # noqa: F401  (registers the schema)
from benchmarks.linear_audit import noise_times
from dp_lora.auditing.audit import audit
from dp_lora.auditing.options import Options
from dp_lora.config.load import config_directory, from_omegaconf
from dp_lora.jobs.stages import run
from dp_lora.records.provenance import hardware
from dp_lora.storage.files import append_line, read_lines

FACTORS = (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)


def audited(factor: float, words: list[str]) -> dict[str, Any]:
    """The record of one audit, and the seconds that training and audit took."""
    with tempfile.TemporaryDirectory() as folder:
        places = [f"paths.{name}={folder}/{name}" for name in ("outputs", "ledger", "index")]
        given = ["stages=[finetune]", "tracking.wandb=disabled", *places, *words]
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            config = from_omegaconf(compose("config", given))
        started = time.perf_counter()
        with noise_times(factor)():
            directory = Path(run(config, given)["directory"])
            record = audit(directory, Options(images=0))
        return {**record, "seconds": round(time.perf_counter() - started)}


def line(factor: float, record: dict[str, Any]) -> str:
    tests, given = record["noise_test"], record.get("epsilon_lower_bound_if_gaussian")
    by = ", ".join(tests["accused_by"]) or "none"
    bounds = f"{record['epsilon_lower_bound']:.3g}" + ("" if given is None else f"; {given:.3g}")
    contradicted = "yes" if record["contradicted"] else "no"
    return (
        f"| {factor:g} | {by} | {tests['p_value']:.2g} | {bounds} | {contradicted} | {record['seconds']} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--factors", type=float, nargs="*", default=FACTORS)
    parser.add_argument("--results", type=Path, default=Path("outputs/audit_job.jsonl"))
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    print(
        "| noise | accused by | p-value | epsilon at least | contradicted | took |\n|---|---|---|---|---|---|"
    )
    done = (
        {row["factor"]: row["record"] for row in read_lines(options.results)}
        if options.results.exists()
        else {}
    )
    for factor in options.factors:
        if factor not in done:
            done[factor] = audited(factor, options.words)
            append_line(options.results, {"factor": factor, "record": done[factor]})
        print(line(factor, done[factor]), flush=True)
    print(f"\nMeasured on {datetime.date.today()}: {hardware()}")


if __name__ == "__main__":
    main()
