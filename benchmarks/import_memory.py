"""Memory that `dp-lora-import` takes for a checkpoint of full size.

    python -m benchmarks.import_memory [--layout cin256] [--ema] [--json FILE]

Writes a checkpoint of random tensors in the original layout into a temporary folder, imports it in a process
of its own, and prints the peak of that process's resident memory, pages of mapped files among it, beside the
size of the file. What the process takes with everything loaded but the checkpoint is given too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dp_lora.models.compvis import model_config, sources
from dp_lora.models.folders import build
from dp_lora.models.layouts import LAYOUTS

_PEAK = """
import re, sys, time
from pathlib import Path
from dp_lora.models.folders import compvis
def now(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before, started = now("VmRSS"), time.perf_counter()
if len(sys.argv) > 1:
    compvis.import_checkpoint(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
print(before, now("VmHWM"), time.perf_counter() - started)
"""


def write_checkpoint(path: Path, layout: str, *, ema: bool) -> None:
    """A checkpoint of `layout` with random tensors, the UNet twice if it has a moving average."""
    config = model_config(LAYOUTS[layout].preset)
    with torch.device("meta"):
        model = build(config, classes=["?"], channels=3, image_size=LAYOUTS[layout].image_size)
    state = {}
    for prefix, network in (
        ("model.diffusion_model.", model.unet),
        ("first_stage_model.", model.autoencoder),
    ):
        for source in sources(network).values():
            state[prefix + source.name] = torch.randn(source.shape)
            if ema and network is model.unet:
                state[f"model_ema.diffusion_model{source.name.replace('.', '')}"] = torch.randn(source.shape)
    if model.class_embedder is not None:
        state["cond_stage_model.embedding.weight"] = torch.randn(1001, config.unet.cross_attention_dim)
    torch.save({"state_dict": state}, path)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="cin256")
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        write_checkpoint(path, given.layout, ema=given.ema)
        size = path.stat().st_size
        command = [sys.executable, "-c", _PEAK, str(path), given.layout, str(Path(folder) / "out")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        numbers = re.findall(r"[\d.]+", done.stdout.splitlines()[-1])
    before, peak, seconds = int(numbers[0]), int(numbers[1]), float(numbers[2])
    result = {
        "layout": given.layout,
        "ema": given.ema,
        "file_bytes": size,
        "peak_bytes": peak,
        "bytes_before": before,
        "peak_over_file": round(peak / size, 3),
        "seconds": round(seconds, 1),
    }
    for name, value in result.items():
        print(f"{name:<16} {value}")
    if given.json:
        given.json.write_text(json.dumps({**result, "measured": time.strftime("%Y-%m-%d")}, indent=2) + "\n")


if __name__ == "__main__":
    main()
