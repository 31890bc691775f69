"""Import of CompVis checkpoints: the original and the imported model agree, and bad files are told."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dp_lora.commands import import_checkpoint as import_command
from dp_lora.config.schema import LoraConfig, ModelConfig
from dp_lora.errors import UserError
from dp_lora.models import adapters, compvis
from dp_lora.models.compvis import convert, model_config, read
from dp_lora.models.diffusion import guided_noise
from dp_lora.models.folders import load, outline, save
from dp_lora.models.latent_diffusion import LatentDiffusion
from dp_lora.models.layouts import LAYOUTS, Layout
from tests.builders.architectures import one_tensor_less
from tests.builders.compvis_reference import Autoencoder, UNet, Weights

CLASSES = 6


def small(layout: str) -> tuple[ModelConfig, Layout]:
    """The layout with its first level 32 channels wide, for images of 16 pixels."""
    config, full = model_config(LAYOUTS[layout].preset), LAYOUTS[layout]
    for part in (config.unet, config.autoencoder):
        first = part.block_out_channels[0]
        part.block_out_channels = [32 * (width // first) for width in part.block_out_channels]
    config.autoencoder.num_codes = 50
    return config, dataclasses.replace(full, image_size=16)


def originals(config: ModelConfig) -> tuple[UNet, Autoencoder]:
    """The same sizes, said in the original's terms."""
    unet, autoencoder = config.unet, config.autoencoder
    attention = autoencoder.attention or [False] * len(autoencoder.block_out_channels)
    return (
        UNet(
            channels=32,
            multipliers=[width // 32 for width in unet.block_out_channels],
            attention=unet.attention,
            res_blocks=unet.layers_per_block,
            heads=unet.num_heads if unet.head_dim is None else -1,
            head_channels=unet.head_dim or -1,
            context=unet.cross_attention_dim if config.conditioning == "class" else None,
            scale_shift=unet.scale_shift_norm,
            resblock_updown=unet.resnet_updown,
        ),
        Autoencoder(
            channels=32,
            multipliers=[width // 32 for width in autoencoder.block_out_channels],
            attention=attention,
            res_blocks=autoencoder.layers_per_block,
            latent=autoencoder.latent_channels,
            codes=autoencoder.num_codes if autoencoder.kind == "vq" else None,
        ),
    )


@dataclasses.dataclass
class Case:
    """Tensors in the original layout, inputs, and what the original computes from them."""

    config: ModelConfig
    layout: Layout
    state: dict[str, torch.Tensor]
    noisy: torch.Tensor
    timesteps: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    predicted: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    decoded: torch.Tensor

    def check(self, model: LatentDiffusion, scale: float = 1.0) -> None:
        """Agreement to 1e-5 of numbers of size 1; in float64, where rounding hides nothing."""
        model = model.double()
        with torch.inference_mode():
            predicted = model(self.noisy, self.timesteps, self.labels)
            mean, std = model.encode(self.images)
            decoded = model.decode(self.mean * scale)
        for found, expected in (
            (predicted, self.predicted),
            (mean, self.mean * scale),
            (std, self.std * scale),
            (decoded, self.decoded.clamp(-1, 1)),
        ):
            assert found.shape == expected.shape
            assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def case_of(layout: str) -> Case:
    config, changed = small(layout)
    unet, autoencoder = originals(config)
    # One pixel on the UNet's last level.
    size = 2 ** (len(unet.multipliers) - 1)
    generator = torch.Generator().manual_seed(4)
    noisy = torch.randn(2, autoencoder.latent, size, size, generator=generator).double()
    images = torch.rand(2, 3, changed.image_size, changed.image_size, generator=generator).double() * 2 - 1
    timesteps, labels = torch.tensor([17, 803]), torch.tensor([1, 4])
    w = Weights()
    context = None
    if unet.context is not None:
        context = w("cond_stage_model.embedding.weight", CLASSES, unet.context)[labels][:, None]
    predicted = unet(w, noisy, timesteps, context)
    mean, std = autoencoder.encode(w, images)
    decoded = autoencoder.decode(w, mean)
    state = {
        **w.tensors,
        "betas": torch.linspace(
            0.0015**0.5, config.scheduler.beta_end**0.5, 1000, dtype=torch.float64
        ).float()
        ** 2,
        "first_stage_model.loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.tensor(0.9999),
    }
    if changed.scaled:
        state["scale_factor"] = torch.tensor(0.25)
    return Case(config, changed, state, noisy, timesteps, labels, images, predicted, mean, std, decoded)


@pytest.fixture(scope="module")
def cin256() -> Case:
    return case_of("cin256")


DIFFERENT = ["cin256", "ffhq256", "lsun_churches256", "mnist", "cifar10", "celeba32", "celeba64"]


@pytest.mark.parametrize("layout", DIFFERENT)
def test_the_original_and_the_imported_model_agree(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(layout)
    torch.save({"state_dict": case.state, "epoch": 3}, tmp_path / "model.ckpt")
    monkeypatch.setitem(LAYOUTS, layout, case.layout)
    monkeypatch.setattr(compvis, "model_config", lambda preset: case.config)
    compvis.import_checkpoint(tmp_path / "model.ckpt", layout, tmp_path / "model")
    model = load(tmp_path / "model")
    case.check(model, scale=0.25 if case.layout.scaled else 1.0)
    assert model.conditional == (case.config.conditioning == "class")
    assert len(model.classes) == (CLASSES if model.conditional else 1)
    assert torch.allclose(model.scheduler.betas, case.state["betas"], atol=1e-7)


@pytest.mark.parametrize("guidance", [1.5, 3.0])
def test_guidance_moves_away_from_the_null_class_as_in_the_original(
    guidance: float, cin256: Case, tmp_path: Path
) -> None:
    # CompVis's script samples with e_u + scale (e_c - e_u), where e_u has the last of the 1,001 rows.
    assert LAYOUTS["cin256"].null_after == 1000
    layout = dataclasses.replace(cin256.layout, null_after=CLASSES - 1)
    save(convert(cin256.state, cin256.config, layout, "cin256"), tmp_path, {})
    model = load(tmp_path)
    assert model.classes == tuple(map(str, range(CLASSES - 1)))
    w, unet = Weights(), originals(cin256.config)[0]
    w.tensors = dict(cin256.state)
    table = w("cond_stage_model.embedding.weight", CLASSES, 512)

    def predicted(labels: torch.Tensor) -> torch.Tensor:
        return unet(w, cin256.noisy, cin256.timesteps, table[labels][:, None])

    with torch.inference_mode():
        null, given = predicted(torch.full((2,), CLASSES - 1)), predicted(cin256.labels)
        expected = null + guidance * (given - null)
        noisy = cin256.noisy
        found = guided_noise(model.double(), noisy, cin256.timesteps, cin256.labels, guidance)
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        # The broken twin: the mean of the rows in its place.
        model.null_embedding = table[:-1].mean(0, keepdim=True)
        found = guided_noise(model, noisy, cin256.timesteps, cin256.labels, guidance)
        assert float((found - expected).abs().max()) > 1e-3 * float(expected.abs().max())


def test_the_null_class_survives_a_fine_tuning(cin256: Case, tmp_path: Path) -> None:
    layout = dataclasses.replace(cin256.layout, null_after=CLASSES - 1)
    save(convert(cin256.state, cin256.config, layout, "cin256"), tmp_path / "base", {})
    null = cin256.state["cond_stage_model.embedding.weight"][-1:].float()
    model = load(tmp_path / "base")
    model.new_classes(["cat", "dog"], torch.Generator().manual_seed(0))
    adapters.attach(model, ["lora", "embedder"], LoraConfig(rank=2), seed=0)
    trained = adapters.trainable_parameters(model)
    assert trained["class_embedder.weight"].shape[0] == 2
    for parameter in trained.values():
        parameter.data += 0.1
    adapters.export(model, tmp_path / "adapter", base_model="x", card="")
    again = load(tmp_path / "base")
    adapters.restore(again, tmp_path / "adapter", ["cat", "dog"])
    for found in (model, again, model.sharing_weights()):
        assert torch.equal(found.neutral_condition(1)[0], null)
    # On the meta device it has its place, so that a folder without it is told.
    with torch.device("meta"):
        assert outline(tmp_path / "base").null_embedding is not None
    one_tensor_less(tmp_path / "base" / "class_embedder" / "model.safetensors")
    with pytest.raises(UserError, match=r"has nothing for null, expected \(1, 512\)"):
        outline(tmp_path / "base")


def test_a_table_of_classes_alone_has_no_null_class(cin256: Case) -> None:
    model = convert(cin256.state, cin256.config, cin256.layout, "cin256")
    assert len(model.classes) == CLASSES and model.null_embedding is None


def test_every_layout_is_tested_or_one_of_those(cin256: Case) -> None:
    tested = {LAYOUTS[name].preset for name in DIFFERENT}
    assert {layout.preset for layout in LAYOUTS.values()} == tested


def test_the_moving_average_is_preferred(cin256: Case) -> None:
    state = dict(cin256.state)
    for name in [name for name in state if name.startswith("model.diffusion_model.")]:
        state[f"model_ema.diffusion_model{name[22:].replace('.', '')}"] = state[name]
        state[name] = torch.zeros_like(state[name])
    cin256.check(convert(state, cin256.config, cin256.layout))
    # The network of the last step need not be there.
    for name in [name for name in state if name.startswith("model.diffusion_model.")]:
        del state[name]
    cin256.check(convert(state, cin256.config, cin256.layout))


def test_half_precision_and_safetensors_are_read(cin256: Case, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: value.half() for name, value in cin256.state.items() if name != "betas"}
    save_file(state, tmp_path / "model.safetensors")
    model = convert(read(tmp_path / "model.safetensors"), cin256.config, cin256.layout)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        found = model(cin256.noisy.float(), cin256.timesteps, cin256.labels)
    assert torch.allclose(found, cin256.predicted.float(), atol=0.02)


def test_diffusers_converter_agrees_where_it_is_right(cin256: Case) -> None:
    """Of spatial transformers with convolutions between levels, and of an autoencoder without attention."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    model = convert(cin256.state, cin256.config, cin256.layout)
    theirs = convert_ldm_unet_checkpoint(dict(cin256.state), dict(model.unet.config))
    ours = model.unet.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    theirs = convert_ldm_vae_checkpoint(dict(cin256.state), dict(model.autoencoder.config))
    ours = model.autoencoder.state_dict()
    assert ours.keys() - theirs.keys() == {"quantize.embedding.weight"}
    assert all(torch.equal(theirs[name].reshape(ours[name].shape), ours[name]) for name in theirs)


# Bad files


def _without(state: dict[str, torch.Tensor], *parts: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not any(part in name for part in parts)}


BAD: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], list[str]]] = {
    "missing": (lambda s: _without(s, "input_blocks.0.0"), ["2 missing tensors", "input_blocks.0.0.bias"]),
    "unexpected": (
        lambda s: {**s, "model.diffusion_model.label_emb.weight": torch.zeros(2)},
        ["1 unexpected tensors (model.diffusion_model.label_emb.weight)"],
    ),
    "another shape": (
        lambda s: {**s, "model.diffusion_model.out.2.bias": torch.zeros(4)},
        ["1 of another shape", "out.2.bias (4,), expected (3,)"],
    ),
    "no classes": (lambda s: _without(s, "cond_stage"), ["cond_stage_model.embedding.weight is nothing"]),
    "classes of another width": (
        lambda s: {**s, "cond_stage_model.embedding.weight": torch.zeros(6, 9)},
        ["(6, 9), expected (classes, 512)", "a class embedder of another size"],
    ),
    "adapters": (
        lambda s: {**s, "model.diffusion_model.x.lora_A.default.weight": torch.zeros(2)},
        ["LoRA matrices"],
    ),
    "other betas": (lambda s: {**s, "betas": torch.linspace(1e-4, 0.02, 1000)}, ["1000 betas", "0.0195"]),
    "something else": (
        lambda s: {"conv.weight": torch.zeros(2), "cond_stage_model.embedding.weight": torch.zeros(6, 512)},
        ["expected names that begin with model.diffusion_model."],
    ),
    "text to image": (
        lambda s: {**_without(s, "embedding"), "cond_stage_model.transformer.text_model.x": torch.zeros(2)},
        ["looks like a text-to-image model"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_that_does_not_fit_is_one_clear_line(case: str, cin256: Case) -> None:
    change, words = BAD[case]
    with pytest.raises(UserError, match=r"^--layout=cin256: ") as caught:
        convert(change(cin256.state), cin256.config, cin256.layout, "cin256")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_scale_is_asked_for(cin256: Case) -> None:
    scaled = dataclasses.replace(cin256.layout, scaled=LAYOUTS["lsun_churches256"].scaled)
    with pytest.raises(UserError, match=r"no scale_factor.*--scale-factor=NUMBER"):
        convert(cin256.state, cin256.config, scaled, "lsun_churches256")
    cin256.check(convert(cin256.state, cin256.config, scaled, scale_factor=2.0), scale=2.0)


def test_another_layout_is_recognised_by_its_unet() -> None:
    with torch.device("meta"):
        other = compvis.build(model_config("celeba64"), classes=["?"], channels=3, image_size=64)
        state = {
            compvis._UNET + source.name: torch.empty(source.shape)
            for source in compvis.sources(other.unet).values()
        }
    with pytest.raises(UserError, match=r"the UNet looks like that of --layout=celeba64"):
        convert(state, model_config("celeba32"), LAYOUTS["celeba32"], "celeba32")


class _Payload:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "callbacks": _Payload()}, tmp_path / "bad.ckpt")
    with pytest.raises(
        UserError, match=r"bad\.ckpt: refused, since to read it pickled code would have to run \("
    ) as caught:
        read(tmp_path / "bad.ckpt")
    assert "posix.system" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_broken_files_and_words_are_one_line_and_status_two(
    cin256: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(cin256.state, "whole.ckpt")
    Path("half.ckpt").write_bytes(Path("whole.ckpt").read_bytes()[:20000])
    Path("there").mkdir()
    for file, layout, out, expected in (
        ("nowhere.ckpt", "cin256", "x", "nowhere.ckpt: no such file"),
        ("half.ckpt", "cin256", "x", "half.ckpt: cannot be read"),
        ("whole.ckpt", "cin257", "x", "invalid choice: 'cin257'"),
        ("whole.ckpt", "cin256", "there", "--out=there: is there already"),
        ("whole.ckpt", "mnist", "x", "--layout=mnist: "),
    ):
        monkeypatch.setattr("sys.argv", ["dp-lora-import", file, "--layout", layout, "--out", out])
        with pytest.raises(SystemExit) as caught:
            import_command.main()
        said = capsys.readouterr().err
        assert caught.value.code == 2 and expected in said and said.count("\n") == 1, said
    assert not list(tmp_path.glob("*.partial")) and not Path("x").exists()


def test_the_command_says_what_it_takes_without_loading_torch() -> None:
    code = "import sys; sys.argv[1:] = ['--help']; from dp_lora.commands.import_checkpoint import main\n" + (
        "try: main()\nexcept SystemExit: assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lsun_churches256" in done.stdout
