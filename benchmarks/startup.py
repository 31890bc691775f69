"""Time to the first word: `import dp_lora`, `dp-lora --help`, and composing and checking a configuration.

    python -m benchmarks.startup

The first two are whole processes, each beside `python -c pass` in the same run; medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from dp_lora.config import Config, config_directory, from_omegaconf

PROCESSES = {
    "python -c pass": ["-c", "pass"],
    "import dp_lora": ["-c", "import dp_lora"],
    "dp-lora --help": ["-m", "dp_lora", "--help"],
    "dp-lora --cfg job": ["-m", "dp_lora", "--cfg", "job"],
}


def process(words: list[str], repeats: int = 5) -> float:
    """Median seconds of a Python process."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def composition(repeats: int = 10) -> float:
    """Median seconds to compose and check the default job, after the first."""
    ConfigStore.instance().store(name="schema", node=Config)
    seconds = []
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        for number in range(repeats + 1):
            started = time.perf_counter()
            from_omegaconf(compose("config", overrides=[f"seed={number}"]))
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    """Prints the table."""
    for name, words in PROCESSES.items():
        print(f"{name:20} {process(words):.3f} s")
    print(f"{'compose and check':20} {composition():.3f} s")


if __name__ == "__main__":
    main()
