"""What names an execution: everything that is known to change its bits, and nothing that does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_lora.models.folders import LatentDiffusion, load
from dp_lora.models.latents import Latents
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.training import numerics
from dp_lora.training.inputs import digest
from dp_lora.training.numerics import code_digest
from tests.builders.architectures import stable_diffusion
from tests.builders.tiny import TINY, composed

CPU = torch.device("cpu")
KEY = Randomness.from_seed(0)
LATENTS = Latents(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(
        num_examples=2, expected_batch_size=1, steps=1, noise_multiplier=1.0, target_epsilon=None,
        delta=1e-4, noise_multiplicity=1, max_grad_norm=0.1,
    )  # fmt: skip


def of(*overrides: str, microbatch: int = 8, inputs: str = "") -> dict[str, Any]:
    return numerics.numerics(composed(*TINY, *overrides), CPU, microbatch, inputs)


def edit_beta_end(model: LatentDiffusion) -> None:
    kind, settings = type(model.scheduler), dict(model.scheduler.config)
    model.scheduler = kind.from_config(settings | {"beta_end": settings["beta_end"] * 1.01})


def edit_betas(model: LatentDiffusion) -> None:
    model.process = replace(model.process, table=model.process.table * 0.99)


def edit_prediction(model: LatentDiffusion) -> None:
    model.predicts_v = not model.predicts_v


def edit_unet(model: LatentDiffusion) -> None:
    model.unet.register_to_config(norm_eps=0.1)


def edit_weights(model: LatentDiffusion) -> None:
    next(model.unet.parameters()).data += 1


@pytest.mark.parametrize(
    "edit",
    [edit_beta_end, edit_betas, edit_prediction, edit_unet, edit_weights],
    ids=lambda edit: edit.__name__,
)
def test_a_training_begins_from_all_that_the_model_is(
    edit: Callable[[LatentDiffusion], None], pretrained: Path, plan: PrivacyPlan
) -> None:
    found = []
    for change in (lambda model: None, lambda model: None, edit):
        model = load(pretrained)
        change(model)
        found.append(digest(model, LATENTS, LABELS, plan, KEY))
    assert found[0] == found[1] != found[2]


def test_a_training_begins_from_how_its_prompts_are_read(tmp_path: Path, plan: PrivacyPlan) -> None:
    model = load(stable_diffusion(tmp_path / "sd"))
    assert model.prompts is not None

    def now(captions: list[str] | None = None) -> str:
        return digest(model, LATENTS, LABELS, plan, KEY, captions)

    found = [now(), now(["a", "b"]), now(["a", "c"])]
    assert now(["a", "b"]) == found[1], "asking changes nothing"
    model.prompts.use_classes(["cat", "dog"])
    found.append(now())
    tokenizer = model.prompts.tokenizer

    def reads_otherwise(*given: Any, **named: Any) -> Any:
        read = tokenizer(*given, **named)
        read["input_ids"] = read["input_ids"].flip(1)
        return read

    reads_otherwise.model_max_length = tokenizer.model_max_length  # type: ignore[attr-defined]
    model.prompts.tokenizer = reads_otherwise
    found.append(now(["a", "b"]))
    model.prompts.encoder.config.update({"hidden_act": "relu"})
    found.append(now(["a", "b"]))
    assert len(set(found)) == 6


def test_what_changes_a_bit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = of()
    others = [of(microbatch=4), of(inputs="x"), of("train.learning_rate=1"), of("train.precision=bfloat16")]
    others += [of("train.channels_last=true"), of("trainable.learning_rate_factor=0.5")]
    for name in ("MKL_CBWR", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY", "KMP_AFFINITY",
                 "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "NCCL_ALGO"):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setenv(name, "other")
            others.append(of())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    others.append(of())
    torch.set_num_threads(threads)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    others.append(of())
    torch.set_float32_matmul_precision(precision)
    for name in ("hardware", "versions", "code_digest"):
        with monkeypatch.context() as patched:
            patched.setattr(numerics, name, lambda *given: dict.fromkeys(("cpu", *numerics._ROUND), "other"))
            others.append(of())
    assert all(other != own for other in others) and of() == own


def test_what_changes_no_bit_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = of()
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "HOSTNAME", "CUDA_VISIBLE_DEVICES", "PWD"):
        monkeypatch.setenv(name, "other")
    assert of("train.checkpoint_minutes=9", "tracking.log_every=3", "paths.outputs=/elsewhere") == own


@pytest.mark.parametrize("name", ["device", "threads", "environment", "versions", "code"])
def test_every_process_of_the_job_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are not the first, which alone decides."""
    found = []
    for second in ({}, {name: "other"}):
        monkeypatch.setattr(numerics, "everyone", lambda own, second=second: [own, own | second])
        found.append(of())
    assert found[0] != found[1] and len(found[0]["processes"]) == 2


def test_a_start_on_cuda_is_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless torch is told to add up in one order."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    config, cuda = composed(*TINY), torch.device("cuda")
    starts = [numerics.numerics(config, cuda, 8, "")["start"] for _ in range(2)]
    assert None not in starts and starts[0] != starts[1]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert numerics.numerics(config, cuda, 8, "")["start"] is None


def test_the_code_is_that_of_all_files_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "privacy").mkdir()
    file = tmp_path / "privacy" / "mechanism.py"
    file.write_text("sigma = 1\n")
    read = code_digest.__wrapped__  # without what this process remembers
    before = read(tmp_path)
    (tmp_path / "notes.txt").write_text("no code")
    assert read(tmp_path) == before
    file.write_text("sigma = 0\n")
    edited = read(tmp_path)
    file.rename(tmp_path / "mechanism.py")
    assert len({before, edited, read(tmp_path)}) == 3
    assert code_digest(Path(numerics.__file__).parent) == read(Path(numerics.__file__).parent)
