"""Two private steps of a network of its published size, with random weights: peak memory and time.

    python -m benchmarks.family_steps [sdxl] [--latent 128] [--rank 8]

The base is in bfloat16, with gradient checkpointing, at batch 1 and k 1. Peak memory is that of the whole
process on a CPU, and what torch has allocated on a GPU.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
import warnings

import torch

from benchmarks.families import NETWORKS, FamilyModel
from dp_lora import PrivateTraining, make_plan


def steps(name: str, side: int, rank: int, device: str) -> None:
    """Takes them, and prints what they took."""
    started = time.perf_counter()
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = FamilyModel(network, rank, device, side)
    parameters = sum(p.numel() for p in model.unet.parameters())
    trained = sum(p.numel() for p in model.trained.values())
    print(f"{name}: {parameters:.3e} parameters, {trained:.3e} trained, latents {side} x {side}, {device}")
    print(f"built in {time.perf_counter() - started:.0f} s, {_peak(device)}", flush=True)
    plan = make_plan(
        num_examples=1, expected_batch_size=1, steps=2, noise_multiplier=1.0, target_epsilon=None,
        delta=1e-5, noise_multiplicity=1, max_grad_norm=1e-3,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.trained.items()}
    optimizer = torch.optim.AdamW(model.trained.values(), lr=1e-3)
    shape = (1, network.latent[0], side, side)
    with tempfile.TemporaryDirectory() as folder:
        private = PrivateTraining(model, optimizer, plan, folder, synthetic_losses=None)
        for step in private.steps():
            began = time.perf_counter()
            for rows, weights, draws in step.microbatches(1):
                noise = draws.normal("diffusion", *shape[1:]).to(device)
                latents = torch.zeros(shape, device=device)
                times = draws.timesteps(1, 1000).flatten().to(device)
                error = model(latents + noise, times, rows.to(device)) - noise
                step.add(error.square().flatten(1).mean(1), weights)
            step.apply()
            print(f"step {step.number}: {time.perf_counter() - began:.0f} s, {_peak(device)}", flush=True)
    moved = sum(not torch.equal(p, before[name]) for name, p in model.trained.items())
    print(f"{moved} of {len(before)} adapters' matrices moved")


def _peak(device: str) -> str:
    if device == "cuda":
        return f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated"
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB resident"


def main() -> None:
    """Takes the steps that the command line asks for."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.family_steps")
    published = [name for name, network in NETWORKS.items() if network.published]
    parser.add_argument(
        "name", nargs="?", default="sdxl", choices=sorted(NETWORKS), help=", ".join(published)
    )
    parser.add_argument("--latent", type=int, default=None, help="side of the latents; default: published")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    steps(given.name, given.latent or NETWORKS[given.name].latent[1], given.rank, given.device)


if __name__ == "__main__":
    main()
