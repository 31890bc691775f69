"""Time to the first word: `import dp_lora`, `dp-lora --help`, and composing and checking each experiment.

    python -m benchmarks.startup

The first are whole processes, beside `python -c pass` in the same run; medians. Of each
experiment, composing and checking its configuration, and instantiating its networks on the meta device;
processor seconds, medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from dp_lora.config.load import config_directory, from_omegaconf
from dp_lora.config.schema import Config
from dp_lora.models.folders import build

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


def experiment(name: str, repeats: int = 7) -> tuple[float, float]:
    """Median processor seconds to compose and check an experiment, and to instantiate it on meta."""
    composing, instantiating = [], []
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        for number in range(repeats + 1):
            started = time.process_time()
            config = from_omegaconf(compose("config", overrides=[f"experiment={name}", f"seed={number}"]))
            composed = time.process_time()
            with torch.device("meta"):
                classes = [str(number) for number in range(10)]
                build(
                    config.model,
                    classes=classes,
                    channels=config.data.channels,
                    image_size=config.data.image_size,
                )
            composing.append(composed - started)
            instantiating.append(time.process_time() - composed)
    return statistics.median(composing[1:]), statistics.median(instantiating[1:])


def main() -> None:
    """Prints the table."""
    for name, words in PROCESSES.items():
        print(f"{name:20} {process(words):.3f} s")
    torch.set_num_threads(1)
    ConfigStore.instance().store(name="schema", node=Config)
    names = sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml"))
    for name in names:
        composing, instantiating = experiment(name)
        print(f"{name:20} {composing:.3f} s to compose, {instantiating:.3f} s on meta")


if __name__ == "__main__":
    main()
