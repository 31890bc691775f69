"""Public pre-training: its terms, that it resumes, divides over processes, and leaves a usable model."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dp_lora.__main__ import main
from dp_lora.config.identity import fingerprint, pretrained_fingerprint
from dp_lora.config.schema import Config, PretrainConfig
from dp_lora.data import sets
from dp_lora.data.sets import ImageSplits
from dp_lora.errors import UserError
from dp_lora.jobs import job
from dp_lora.models import latents
from dp_lora.models.folders import LatentDiffusion, build, load
from dp_lora.models.latents import Latents
from dp_lora.storage.files import read_lines
from dp_lora.training import perceptual, pretrain
from dp_lora.training.pretrain import AutoencoderStep, DecoderStep, DiffusionStep
from dp_lora.training.signals import Interrupted
from tests.builders.forked import Nursery
from tests.builders.tiny import TINY, composed, once

SMALL = PretrainConfig(
    autoencoder_steps=8, autoencoder_batch_size=10, unet_steps=8, unet_batch_size=10, decoder_steps=8
)
TERMS = ("model.pretrain.reconstruction=l1", "model.pretrain.adversarial_weight=0.5")


@pytest.fixture(scope="module")
def public() -> ImageSplits:
    config = composed(*TINY)
    return sets.load(config.public_data, config.paths, "public_data")


def fresh(public: ImageSplits, *, quantised: bool = False) -> LatentDiffusion:
    torch.manual_seed(3)
    model = build(composed(*TINY).model, classes=public.train.classes, channels=1, image_size=8)
    if quantised:
        model.autoencoder = VQModel(
            in_channels=1, out_channels=1, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(16, 16), latent_channels=4,
            norm_num_groups=8, num_vq_embeddings=16, sample_size=8, mid_block_add_attention=False,
        )  # fmt: skip
    return model


def settings(**values: object) -> PretrainConfig:
    return PretrainConfig(**{**vars(SMALL), **values})  # type: ignore[arg-type]


def encoded(model: LatentDiffusion, public: ImageSplits) -> tuple[Latents, torch.Tensor]:
    train = public.train.subset(np.arange(200))
    return latents.encode(model, train), torch.from_numpy(train.labels)


# --- the terms


def test_the_autoencoders_loss_is_the_published_one(public: ImageSplits) -> None:
    model = fresh(public)
    step = AutoencoderStep(model, public.train, settings(kl_weight=0.1, reconstruction="l1"), 0)
    parts = step.loss(pretrain._generator(0, "x", 0), 0)
    generator = pretrain._generator(0, "x", 0)
    chosen = torch.randint(len(public.train), (10,), generator=generator)
    images = latents.to_unit_range(public.train.images[chosen.numpy()])
    posterior = model.autoencoder.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = model.autoencoder.decode(posterior.mean + posterior.std * noise).sample
    mean, variance = posterior.mean, posterior.var
    divergence = 0.5 * (mean**2 + variance - 1 - variance.log()).sum() / images.numel()
    assert parts["reconstruction"].item() == pytest.approx((decoded - images).abs().mean().item(), rel=1e-5)
    assert parts["divergence"].item() == pytest.approx(0.1 * divergence.item(), rel=1e-5)
    assert parts["loss"].item() == pytest.approx((parts["reconstruction"] + parts["divergence"]).item())


@pytest.mark.parametrize("quantised", [False, True])
def test_an_autoencoder_learns(public: ImageSplits, quantised: bool) -> None:
    model = fresh(public, quantised=quantised)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = settings(autoencoder_steps=40, warmup_steps=2, autoencoder_learning_rate=3e-3)
    step = AutoencoderStep(model, public.train, config, 0)
    values = [step(number) for number in range(40)]
    early, late = (np.mean([row["reconstruction"] for row in part]) for part in (values[:5], values[-5:]))
    assert late < 0.6 * early
    assert ("codebook" in values[0]) is quantised and ("divergence" in values[0]) is not quantised
    if quantised:
        assert not torch.equal(model.state_dict()["autoencoder.quantize.embedding.weight"],
                               before["autoencoder.quantize.embedding.weight"])  # fmt: skip
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if n.startswith("unet"))


def test_a_discriminator_begins_at_its_step(public: ImageSplits) -> None:
    step = AutoencoderStep(
        fresh(public), public.train, settings(adversarial_weight=0.5, adversarial_start=2), 0
    )
    assert step.discriminator is not None
    start = [p.clone() for p in step.discriminator.parameters()]
    for number in range(2):
        assert not {"adversarial", "discriminator"} & step(number).keys()
    assert all(torch.equal(p, q) for p, q in zip(step.discriminator.parameters(), start, strict=True))
    values = step(2)
    assert values["discriminator"] == pytest.approx(1.0, abs=0.2)  # hinge of logits around zero
    assert not all(torch.equal(p, q) for p, q in zip(step.discriminator.parameters(), start, strict=True))


def test_a_discriminator_learns_to_tell_apart() -> None:
    torch.manual_seed(0)
    judge = perceptual.PatchDiscriminator(1, 16, width=16)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for _ in range(40):
        real, other = torch.rand(16, 1, 16, 16) * 0.2 + 0.5, torch.rand(16, 1, 16, 16) * 2 - 1
        loss = perceptual.hinge_loss(judge(real), judge(other)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    assert perceptual.PatchDiscriminator(3, 64)(torch.zeros(2, 3, 64, 64)).shape[:2] == (2, 1)


def test_the_adaptive_weight_makes_both_gradients_as_long() -> None:
    ours, theirs = torch.randn(30), torch.randn(30) * 7
    weight = perceptual.adaptive_weight(ours, theirs)
    assert (weight * theirs).norm().item() == pytest.approx(ours.norm().item(), rel=1e-3)
    assert perceptual.adaptive_weight(ours, torch.zeros(30)) == 1e4


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**perceptual.Vgg16Stages().state_dict(), "classifier.0.weight": torch.zeros(2)}, path)
    return path


@pytest.mark.parametrize("network", ["lite0", "vgg"])
def test_feature_distances_grow_with_the_difference(network: str, vgg_file: Path) -> None:
    distance = perceptual.load_distance(str(vgg_file) if network == "vgg" else network)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(images.shape, generator=generator)
    found = [distance(images, (images + scale * noise).clamp(-1, 1)) for scale in (0.0, 0.05, 0.5)]
    assert found[0].tolist() == [0, 0, 0] and (found[1] > 0).all() and (found[2] > found[1]).all()
    assert not any(p.requires_grad for p in distance.parameters())
    assert not distance.train().stages.training
    assert distance(images[:, :1], -images[:, :1]).shape == (3,)
    stages = distance.stages(images)
    assert [s.shape[-1] for s in stages] == [32, 16, 8, 4, 2]


def test_vgg_is_that_of_torchvision(vgg_file: Path) -> None:
    stages = perceptual.Vgg16Stages()
    names = [f"features.{i}.{part}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
             for part in ("weight", "bias")]  # fmt: skip
    assert list(stages.state_dict()) == names
    assert sum(p.numel() for p in stages.parameters()) == 14_714_688
    kinds = [type(layer) for layer in stages.features]
    assert [i for i, kind in enumerate(kinds) if kind is nn.MaxPool2d] == [4, 9, 16, 23]


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("was-run",)


def test_feature_networks_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": torch.zeros(3)}, "other.pth")
    Path("pickle.pth").write_bytes(pickle.dumps(Harmful()))
    torch.save(Harmful(), "harmful.pth")
    for file in ("absent.pth", "other.pth", "pickle.pth", "harmful.pth"):
        with pytest.raises(UserError, match=rf"^model\.pretrain\.perceptual_network={file}: ") as caught:
            perceptual.load_distance(file)
        assert "\n" not in str(caught.value)
    assert not Path("was-run").exists()


# --- precision, compilation


def test_bfloat16_changes_little_and_leaves_the_weights_float32(public: ImageSplits) -> None:
    found = []
    for precision in ("float32", "bfloat16"):
        model = fresh(public)
        config = settings(precision=precision)
        images, step = encoded(model, public), AutoencoderStep(model, public.train, config, 0)
        losses = [step(number)["loss"] for number in range(2)]
        diffusion = DiffusionStep(model, *images, config, 0)
        losses += [diffusion(number)["loss"] for number in range(2)]
        assert all(p.dtype == torch.float32 for p in model.parameters())
        found.append(losses)
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.03)


def test_compiled_networks_take_the_same_steps(public: ImageSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chosen in (False, True):
        model = fresh(public)
        calls: list[object] = []

        def eager(function: Callable[..., object], **given: object) -> Callable[..., object]:
            calls.append(function)  # noqa: B023
            return function

        monkeypatch.setattr(torch, "compile", eager)
        config = settings(compile=chosen)
        first = AutoencoderStep(model, public.train, config, 0)(0)["loss"]
        diffusion = DiffusionStep(model, *encoded(model, public), config, 0)
        found.append([first, diffusion(0)["loss"]])
        assert len(calls) == (3 if chosen else 0)
        assert list(diffusion.averaged().state_dict()) == list(model.state_dict())
    assert found[0] == found[1]


# --- several processes


def steps(public: ImageSplits, quantised: bool) -> dict[str, pretrain._PublicStep]:
    config = settings(kl_weight=0.1, perceptual_weight=0.3)
    made: dict[str, pretrain._PublicStep] = {
        "autoencoder": AutoencoderStep(fresh(public, quantised=quantised), public.train, config, 0),
        "decoder": DecoderStep(fresh(public, quantised=quantised), public.train, config, 0),
    }
    if not quantised:
        model = fresh(public)
        made["diffusion"] = DiffusionStep(model, *encoded(model, public), config, 0)
    return made


@pytest.mark.parametrize("quantised", [False, True])
def test_shares_of_a_batch_add_up_to_it(
    public: ImageSplits, quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, step in steps(public, quantised).items():

        def gradient(count: int, number: int, step: pretrain._PublicStep = step) -> torch.Tensor:
            monkeypatch.setattr(pretrain, "own_slice", lambda batch: batch.tensor_split(count)[number])
            loss = step.loss(pretrain._generator(0, "x", 0), 0)["loss"]
            found = torch.autograd.grad(loss, step.parameters, allow_unused=True)
            return torch.cat([g.flatten() for g in found if g is not None])

        whole, parts = gradient(1, 0), [gradient(3, number) for number in range(3)]
        assert float((sum(parts) - whole).norm() / whole.norm()) < 1e-5, name
        # The broken twin: a mean over each slice alone.
        assert float((3 * parts[0] - whole).norm() / whole.norm()) > 1e-2, name


COMMAND = (
    *TINY, "stages=[pretrain]", "public_data.train_size=60", "model.pretrain.autoencoder_steps=4",
    "model.pretrain.unet_steps=4", "model.pretrain.unet_batch_size=9", "train.checkpoint_minutes=60",
    "model.pretrain.autoencoder_batch_size=9", "model.pretrain.decoder_steps=2", *TERMS,
    "model.pretrain.samples_every=3", "sampler.steps=2",
)  # fmt: skip


def model_of(cache: Path) -> Path:
    (folder,) = (path for path in (cache / "models").iterdir() if path.is_dir())
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{name}": tensor
        for path in folder.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


# --- the whole


@pytest.fixture
def tiny_pretraining(tmp_path: Path) -> Callable[..., Config]:
    return lambda *words: composed(*COMMAND, f"paths.cache={tmp_path / 'cache'}", *words)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job.pretrained_model(composed(*COMMAND, f"paths.cache={tmp_path_factory.mktemp('one')}"))


def test_pretraining_leaves_a_model_its_log_and_its_pictures(uninterrupted: Path) -> None:
    folder = uninterrupted
    assert load(folder).latent_shape == (4, 4, 4)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "autoencoder-0000003.png", "autoencoder-0000004.png",
        "diffusion-0000003.png", "diffusion-0000004.png",
    ]  # fmt: skip
    with Image.open(folder / "samples/autoencoder-0000004.png") as picture:
        assert picture.size == (2 * 8 * 8, 2 * 16 * 8)  # 64 test images over their reconstructions
    with Image.open(folder / "samples/diffusion-0000004.png") as picture:
        assert picture.size == (2 * 10 * 8, 2 * 8 * 8)
    rows = read_lines(folder / "metrics.jsonl")
    assert rows[0].keys() == {
        "stage",
        "step",
        "loss",
        "reconstruction",
        "divergence",
        "adversarial",
        "discriminator",
    }
    assert rows[5].keys() == {"stage", "step", "loss"}
    record = json.loads((folder / "record.json").read_text())
    assert record["model"]["pretrain"]["adversarial_weight"] == 0.5
    assert sorted(path.suffix for path in folder.parent.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("after", [2, 6, 9])
def test_an_interrupted_pretraining_makes_the_same_model(
    tiny_pretraining: Callable[..., Config], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    append, done = job.append_line, []

    def stop(path: Path, record: dict[str, object]) -> None:
        append(path, record)
        done.append(record["step"])
        if record["step"] == after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(job, "append_line", stop)
    with pytest.raises(Interrupted):
        job.pretrained_model(tiny_pretraining())
    again = weights(job.pretrained_model(tiny_pretraining()))
    assert done == list(range(1, 11))
    assert all(torch.equal(again[name], value) for name, value in weights(uninterrupted).items())


def test_two_processes_make_the_model_of_one(uninterrupted: Path, nursery: Nursery, tmp_path: Path) -> None:
    ended = nursery.team([*once(*COMMAND), f"paths.cache={tmp_path}"], 2, tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended
    one, two = weights(uninterrupted), weights(model_of(tmp_path))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert float((two[name] - value).norm() / value.norm().clamp(min=1e-3)) < 1e-5, name
    difference = torch.cat([(two[n] - v).flatten() for n, v in one.items()]).norm()
    assert float(difference / torch.cat([v.flatten() for v in one.values()]).norm()) < 1e-6
    lines = [read_lines(folder / "metrics.jsonl") for folder in (uninterrupted, model_of(tmp_path))]
    assert [row["step"] for row in lines[1]] == list(range(1, 11))
    for ours, theirs in zip(*lines, strict=True):
        assert theirs.pop("stage") == ours.pop("stage") == "pretrain"
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-6)


def test_latents_are_cached_and_scaled_to_unit_variance(uninterrupted: Path, tmp_path: Path) -> None:
    config = composed(*COMMAND)
    public = sets.load(config.public_data, config.paths, "public_data")
    stored = list((uninterrupted.parent.parent / "latents").iterdir())
    assert len(stored) == 1
    found = latents.cached(load(uninterrupted), public.train, tmp_path)
    drawn = found.mean.var(correction=0) + found.std.square().mean()
    # The decoder's last stage changes weights, so the key, and not the latents.
    assert drawn.sqrt().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(load_file(stored[0])["mean"], found.mean)


def test_pictures_change_neither_the_model_nor_its_name(tiny_pretraining: Callable[..., Config]) -> None:
    one, other = tiny_pretraining(), tiny_pretraining("model.pretrain.samples_every=0")
    assert pretrained_fingerprint(one) == pretrained_fingerprint(other)
    assert fingerprint(one) == fingerprint(other)
    assert pretrained_fingerprint(one) != pretrained_fingerprint(
        tiny_pretraining("model.pretrain.warmup_steps=7")
    )


def test_private_images_are_never_pictured(public: ImageSplits, model: LatentDiffusion) -> None:
    private = sets.load(composed(*TINY).data, composed(*TINY).paths).test
    assert not private.public
    with pytest.raises(AssertionError):
        pretrain.reconstructions(model, private)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "model.pretrain.precision=half",
            "model.pretrain.precision='half': expected one of float32, bfloat16",
        ),
        ("model.pretrain.reconstruction=l2", "model.pretrain.reconstruction='l2': expected one of mse, l1"),
        ("model.pretrain.perceptual_weight=-1", "model.pretrain.perceptual_weight=-1.0: expected a finite"),
        ("model.pretrain.unet_batch_size=0", "model.pretrain.unet_batch_size=0: expected at least 1"),
        ("model.pretrain.ema_decay=1", "model.pretrain.ema_decay=1.0: expected a number in [0, 1)"),
    ],
)
def test_impossible_settings_are_named(words: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        composed(*TINY, words)
    assert said in str(caught.value)


def test_the_first_loss_of_the_diffusion_model_is_near_one(public: ImageSplits) -> None:
    model = fresh(public)
    step = DiffusionStep(model, *encoded(model, public), settings(unet_batch_size=64), 0)
    assert step(0)["loss"] == pytest.approx(1.0, abs=0.3)


def test_a_set_of_ones_own_runs_through_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`experiment=cifar10 data.source=...` with small networks: class folders and a parquet file."""
    from tests.builders.image_files import write_parquet

    generator = np.random.default_rng(0)
    for role, count in (("train", 12), ("test", 6)):
        for name in ("ship", "truck"):
            (tmp_path / "own" / role / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "own" / role / name / f"{i}.png")
    write_parquet(tmp_path / "public/train-0.parquet", 20)
    words = [
        *TINY, "data=cifar10", f"data.source={tmp_path / 'own'}", "data.image_size=8",
        "data@public_data=imagenet32", "public_data.image_size=8",
        f"public_data.source={tmp_path / 'public'}",
        "train.max_steps=2", "train.expected_batch_size=6", "privacy.delta=0.01", "sampler.num_samples=8",
        "evaluation.classifier_epochs=1", "model.pretrain.autoencoder_steps=2", "model.pretrain.unet_steps=2",
        f"paths.cache={tmp_path / 'cache'}", f"paths.outputs={tmp_path / 'outputs'}",
    ]  # fmt: skip
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["dp-lora", *once(*words)])
    main()
    GlobalHydra.instance().clear()
    (directory,) = (tmp_path / "outputs/default").iterdir()
    assert json.loads((directory / "result.json").read_text())["n_samples"] == 8
    assert json.loads((directory / "status.json").read_text())["state"] == "done"


def test_parameters_without_effect_stay_as_they_are(public: ImageSplits) -> None:
    model = fresh(public)
    before = {name: value.clone() for name, value in model.named_parameters()}
    DiffusionStep(model, *encoded(model, public), settings(warmup_steps=0), 0)(0)
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    # Cross-attention to one token needs neither queries nor keys.
    assert all(
        ".attn2.to_q" in n or ".attn2.to_k" in n or ".norm2" in n for n in still if n.startswith("unet")
    )
    assert any(".attn2.to_q" in name for name in still)
