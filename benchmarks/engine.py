"""Time and peak memory of one microbatch in this engine, without privacy, and in other private engines.

    python -m benchmarks.engine [--quick] [--json FILE]

A step is one microbatch: forward, backward, clip, add to the sum; no noise, no optimiser. On a CPU its
time is the CPU time of one thread, with all engines interleaved in one process, and a ratio is the median
over rounds of an engine's time over that of `nonprivate` in the same round, with the upper end of the
median's interval (order statistics, at least 95 %) where there are six rounds or more. On a GPU it is wall
time between synchronisations. Peak memory is measured in a process of its own for each engine, above what the
process holds once the model is built.

Engines: dp_lora (this project), nonprivate (stock peft, plain backward), opacus_hooks (Opacus' hooks as
they are, the k draws folded when it clips), opacus_ghost (ghost clipping, draws folded), vmap
(torch.func), released (as DP-LoRA was released: k rows of an example clipped apart; not private as it
claims, here for its cost). These share one model. dp_lora_one_token is this project's step as it runs in
a job: the exact shortcut for the cross-attention to one token comes on top. When asked for by name:
dp_lora_channels_last and dp_lora_compiled are dp_lora with `train.channels_last` and `train.compile`.

    python -m benchmarks.engine --sizes flux_small,sdxl_small --engines nonprivate,dp_lora

The families' networks of `benchmarks.families` have the engines nonprivate and dp_lora: at small width for a
CPU, and at their published size (`--sizes sdxl,flux`), with a base in bfloat16 and gradient checkpointing in
both engines, for a GPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from peft import LoraConfig
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.families import NETWORKS, FamilyModel, Network
from dp_lora.models.adapters import target_names
from dp_lora.models.folders import shorten_cross_attention
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip
from dp_lora.training.tuning import frozen_parts

ENGINES = (
    *("nonprivate", "dp_lora", "dp_lora_one_token"),
    *("opacus_hooks", "opacus_ghost", "vmap", "released"),
)
ON_REQUEST = ("dp_lora_channels_last", "dp_lora_compiled")
RANKS, MULTIPLICITIES, MICROBATCHES = (4, 8, 16, 64), (1, 4, 8), (16, 64, 256)
MAX_GRAD_NORM = 1e-3
# vmap holds all k draws of all examples at once, twice: beyond this many rows it is left out.
_VMAP_ROWS = 1024
# Rounds of a cell: as many as take about so many seconds, within these limits.
_SECONDS, _FEWEST, _MOST = 60.0, 3, 21


@dataclass(frozen=True)
class Size:
    """A UNet with cross-attention to one class token."""

    latent: tuple[int, int]
    channels: tuple[int, ...]
    layers: int
    head_dim: int


SIZES: dict[str, Size | Network] = {
    **NETWORKS,
    "small": Size((4, 8), (64, 128), 1, 8),
    "celeba64": Size((3, 32), (128, 256, 512), 2, 64),
    "celebahq": Size((3, 64), (192, 384, 576, 960), 2, 64),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; ratios are to `nonprivate`."""

    device: str
    size: str
    engine: str
    rank: int
    k: int
    microbatch: int
    seconds: float
    peak_bytes: int | None
    ratio_time: float
    ratio_memory: float | None
    rounds: int = 0
    ratio_time_upper: float | None = None
    """Of the interval of the median."""


class Model(nn.Module):
    """LoRA on all attention projections of a UNet and a trainable class embedder; B is not zero."""

    def __init__(self, size: Size, rank: int, one_token: bool = False) -> None:
        super().__init__()
        channels, side = size.latent
        blocks = len(size.channels)
        self.unet = UNet2DConditionModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=size.layers,
            block_out_channels=size.channels,
            down_block_types=("CrossAttnDownBlock2D",) * blocks,
            up_block_types=("CrossAttnUpBlock2D",) * blocks,
            cross_attention_dim=64,
            attention_head_dim=size.head_dim,
        )
        self.unet.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        if one_token:
            shorten_cross_attention(self.unet)
            targets = target_names(self.unet, targets, rank)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")
        self.unet.add_adapter(config)
        self.embedder = nn.Embedding(10, 64)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        self.train()

    def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        condition = self.embedder(labels).unsqueeze(1)
        out: Tensor = self.unet(noisy, timesteps, encoder_hidden_states=condition, return_dict=False)[0]
        return out

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def make_batch(size: Size | Network, rows: int, k: int, device: str) -> Batch:
    """Noisy latents, timesteps, labels and noise of rows x k rows."""
    shape = (rows * k, size.latent[0], size.latent[1], size.latent[1])
    noise, timesteps = torch.randn(shape), torch.randint(0, 1000, (rows * k,))
    labels = torch.randint(0, 10, (rows,)).repeat_interleave(k)
    noisy = torch.randn(rows, *shape[1:]).repeat_interleave(k, 0) + noise
    return noisy.to(device), timesteps.to(device), labels.to(device), noise.to(device)


def losses(model: Callable[..., Tensor], batch: Batch, k: int) -> Tensor:
    """[M]: mean over an example's k draws; k = 1 gives one loss for each row."""
    noisy, timesteps, labels, noise = batch
    return (model(noisy, timesteps, labels) - noise).square().flatten(1).mean(1).view(-1, k).mean(1)


# The engines: each a function from a model and k to a step


Step = Callable[[Batch], None]


def _nonprivate(model: Any, k: int) -> Step:
    def step(batch: Batch) -> None:
        losses(model, batch, k).sum().backward()  # type: ignore[no-untyped-call]

    return step


def _dp_lora(model: Any, k: int) -> Step:
    engine = ClippedGradientSum(model, Clip(k, MAX_GRAD_NORM))
    return lambda batch: engine.add(losses(model, batch, k))


class _Folding(DPOptimizer):  # type: ignore[misc]
    """Sums the k rows of an example when their gradients are about to be clipped."""

    k = 1

    def _get_flat_grad_sample(self, p: Tensor) -> Tensor:
        found: Tensor = super()._get_flat_grad_sample(p)
        return found.view(-1, self.k, *found.shape[1:]).sum(1) if self.k > 1 else found


def _accumulate(optimizer: Any) -> None:
    optimizer.signal_skip_step(True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _sgd(model: Model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.trained.values(), lr=0.0)


_DP = {
    "noise_multiplier": 1.0,
    "max_grad_norm": MAX_GRAD_NORM,
    "expected_batch_size": 1,
    "loss_reduction": "sum",
}


def _opacus_hooks(model: Model, k: int, apart: bool = False) -> Step:
    hooked, optimizer = GradSampleModule(model, loss_reduction="sum"), _Folding(_sgd(model), **_DP)
    optimizer.k = 1 if apart else k

    def step(batch: Batch) -> None:
        losses(hooked, batch, optimizer.k).sum().backward()  # type: ignore[no-untyped-call]
        _accumulate(optimizer)

    return step


def _released(model: Model, k: int) -> Step:
    return _opacus_hooks(model, k, apart=True)


class _FoldingGhost(GradSampleModuleFastGradientClipping):  # type: ignore[misc]
    """Shows the k rows of an example to the norm samplers as tokens of one."""

    k = 1

    def rearrange_grad_samples(self, *, module: nn.Module, **kwargs: Any) -> Any:
        inputs, grads = super().rearrange_grad_samples(module=module, **kwargs)
        if self.k > 1:
            vectors = isinstance(module, nn.Linear)
            inputs = [self._fold(x, vectors) for x in inputs]
            grads = self._fold(grads, True)
            module.max_batch_len = grads.shape[0]
        return inputs, grads

    def _fold(self, x: Tensor, vectors: bool) -> Tensor:
        examples = x.shape[0] // self.k
        return x.reshape(examples, -1, x.shape[-1]) if vectors else x.reshape(examples, -1)


def _opacus_ghost(model: Model, k: int) -> Step:
    ghost = _FoldingGhost(model, loss_reduction="sum", max_grad_norm=MAX_GRAD_NORM)
    ghost.k = k
    optimizer = DPOptimizerFastGradientClipping(_sgd(model), **_DP)

    def step(batch: Batch) -> None:
        computed = losses(ghost, batch, k)
        computed.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        optimizer.original_optimizer.zero_grad()
        factors = ghost.get_clipping_coef()
        ghost.disable_hooks()
        (factors * computed).sum().backward()
        ghost.enable_hooks()
        _accumulate(optimizer)

    return step


def _vmap(model: Model, k: int) -> Step:
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p.detach() for name, p in model.trained.items()}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}

    def loss_of_one(parameters: dict[str, Tensor], *batch: Tensor) -> Tensor:
        noisy, timesteps, labels, noise = batch
        out = functional_call(model, {**frozen, **parameters}, (noisy, timesteps, labels))
        return (out - noise).square().mean()

    gradients = vmap(grad(loss_of_one), in_dims=(None, 0, 0, 0, 0), randomness="different")

    def step(batch: Batch) -> None:
        found = gradients(trained, *(x.view(-1, k, *x.shape[1:]) for x in batch))
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
        factors = (MAX_GRAD_NORM / norms).clamp(max=1.0)
        for name, g in found.items():
            total[name] += torch.einsum("i,i...->...", factors, g)

    return step


_BUILD: dict[str, Callable[[Any, int], Step]] = {
    "nonprivate": _nonprivate,
    "dp_lora": _dp_lora,
    "dp_lora_one_token": _dp_lora,
    "dp_lora_channels_last": _dp_lora,
    "dp_lora_compiled": _dp_lora,
    "opacus_hooks": _opacus_hooks,
    "opacus_ghost": _opacus_ghost,
    "vmap": _vmap,
    "released": _released,
}


def build(engine: str, size: Size | Network, rank: int, k: int, device: str) -> Step:
    """A step of `engine` on a freshly made model."""
    torch.manual_seed(0)
    if isinstance(size, Network):
        return _BUILD[engine](FamilyModel(size, rank, device), k)
    model = Model(size, rank, one_token=engine == "dp_lora_one_token").to(device)
    if engine == "dp_lora_channels_last":
        model.unet.to(memory_format=torch.channels_last)
    if engine == "dp_lora_compiled":
        for part in frozen_parts(model.unet):
            part.compile(dynamic=False)
    return _BUILD[engine](model, k)


# Measuring


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds_by_engine(
    engines: list[str],
    size: Size | Network,
    rank: int,
    k: int,
    microbatch: int,
    device: str,
    rounds: int | None,
) -> dict[str, list[float]]:
    """The time of each engine's step in each of the interleaved rounds, after one to warm up."""
    steps = {engine: build(engine, size, rank, k, device) for engine in engines}
    batch = make_batch(size, microbatch, k, device)

    def one_round() -> dict[str, float]:
        taken = {}
        for engine, step in steps.items():
            start = _clock(device)
            step(batch)
            taken[engine] = _clock(device) - start
        return taken

    warm_up = sum(one_round().values())
    if rounds is None:
        rounds = min(max(round(_SECONDS / warm_up), _FEWEST), _MOST)
    measured = [one_round() for _ in range(rounds)]
    return {engine: [taken[engine] for taken in measured] for engine in engines}


def peak_bytes(engine: str, size: Size | Network, rank: int, k: int, microbatch: int, device: str) -> int:
    """The most memory that two steps take above the built model; call it in a fresh process."""
    step, batch = build(engine, size, rank, k, device), make_batch(size, microbatch, k, device)
    warm = make_batch(size, 1, k, device)
    step(warm)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch)
        step(batch)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step(batch)
    step(batch)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _peak_in_a_process(engine: str, size: str, rank: int, k: int, microbatch: int, device: str) -> int:
    numbers = [str(number) for number in (rank, k, microbatch)]
    command = [sys.executable, "-m", "benchmarks.engine", "--peak", engine, size, *numbers, device]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(printed.split()[-1])


def measure(
    engines: list[str],
    size: str,
    rank: int,
    k: int,
    microbatch: int,
    device: str,
    rounds: int | None,
    memory: bool,
) -> list[Row]:
    """One row for each engine."""
    engines = [e for e in engines if e != "vmap" or microbatch * k <= _VMAP_ROWS]
    seconds = seconds_by_engine(engines, SIZES[size], rank, k, microbatch, device, rounds)
    peaks: dict[str, int | None] = dict.fromkeys(engines)
    if memory:
        peaks = {e: _peak_in_a_process(e, size, rank, k, microbatch, device) for e in engines}
    base, rows = peaks["nonprivate"], []
    for engine in engines:
        pairs = zip(seconds[engine], seconds["nonprivate"], strict=True)
        ratios = sorted(own / other for own, other in pairs)
        peak = peaks[engine]
        rows.append(
            Row(
                device=torch.cuda.get_device_name() if device == "cuda" else "cpu, 1 thread",
                size=size,
                engine=engine,
                rank=rank,
                k=k,
                microbatch=microbatch,
                seconds=statistics.median(seconds[engine]),
                peak_bytes=peak,
                ratio_time=statistics.median(ratios),
                ratio_memory=peak / base if peak is not None and base else None,
                rounds=len(ratios),
                ratio_time_upper=_upper(ratios),
            )
        )
    return rows


def _upper(ratios: list[float]) -> float | None:
    """The upper end of an interval of at least 95 % for the median of sorted numbers; None below six."""
    n = len(ratios)
    # The median lies above the r-th largest with the probability of fewer than r heads among n coins.
    below = list(itertools.accumulate(math.comb(n, heads) / 2**n for heads in range(n + 1)))
    left_out = sum(probability <= 0.025 for probability in below)
    return ratios[n - left_out] if left_out else None


def _print(row: Row) -> None:
    mib = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:8.0f} MiB"
    memory = "" if row.ratio_memory is None else f"{row.ratio_memory:6.2f}"
    upper = "" if row.ratio_time_upper is None else f" (<= {row.ratio_time_upper:.3f}, {row.rounds} rounds)"
    print(
        f"{row.device:14} {row.size:9} {row.engine:17} r{row.rank:<3} k{row.k:<2} {row.microbatch:4} "
        f"{row.seconds:9.4f} s {row.ratio_time:6.3f}{upper} {mib} {memory}",
        flush=True,
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small grid, few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"more: {', '.join(ON_REQUEST)}")
    parser.add_argument("--ranks", type=_numbers, default=None)
    parser.add_argument("--multiplicities", type=_numbers, default=None)
    parser.add_argument("--microbatches", type=_numbers, default=None)
    parser.add_argument("--rounds", type=int, default=None, help="default: about a minute a cell")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--sizes", default=None, help=f"of {', '.join(SIZES)}; default by device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Prints the table, a row as soon as it is measured."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments = _arguments()
    if arguments.peak:
        engine, size, rank, k, microbatch, device = arguments.peak
        print(peak_bytes(engine, SIZES[size], int(rank), int(k), int(microbatch), device))
        return
    quick, device = arguments.quick, arguments.device
    sizes = (arguments.sizes or ("small" if device == "cpu" else "celeba64,celebahq")).split(",")
    engines = arguments.engines.split(",")
    if "nonprivate" not in engines:
        engines.insert(0, "nonprivate")
    grid = itertools.product(
        sizes,
        arguments.ranks or ((8,) if quick else RANKS),
        arguments.multiplicities or ((1, 4) if quick else MULTIPLICITIES),
        arguments.microbatches or ((16,) if quick else MICROBATCHES),
    )
    rounds = arguments.rounds or (5 if quick else None)
    rows: list[Row] = []
    for size, rank, k, microbatch in grid:
        memory = not arguments.no_memory
        found = measure(engines, size, rank, k, microbatch, device, rounds, memory)
        for row in found:
            _print(row)
        rows += found
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
