"""Adapters: what trains and what stays frozen, and that an exported adapter is the trained model."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel

from dp_lora.config.schema import LoraConfig
from dp_lora.config.trainable import COMPONENTS
from dp_lora.errors import UserError
from dp_lora.models import adapters
from dp_lora.models.folders import LatentDiffusion, digest, load
from dp_lora.privacy.plan import PrivacyPlan, make_plan
from dp_lora.training.finetune import check_engine
from tests.builders.architectures import ARCHITECTURES, model_of
from tests.builders.tiny import TINY, composed

LORA = LoraConfig(rank=3, alpha=6.0)
COMBINATIONS = [
    ["lora"],
    ["lora", "embedder"],
    ["attention", "embedder"],
    ["bias", "embedder"],
    ["norm", "embedder"],
    ["embedder"],
    ["full"],
    ["lora", "norm"],
    ["lora", "bias", "embedder"],
    ["lora", "attention"],
    ["lora", "full"],
]


@torch.inference_mode()
def output(model: LatentDiffusion) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(4, *model.latent_shape, generator=generator)
    return model.eval().predict_noise(noisy, torch.tensor([0, 300, 600, 999]), torch.arange(4) % 3)


def trained(model: LatentDiffusion, components: list[str]) -> LatentDiffusion:
    """The model as a training would leave it: every trained parameter moved."""
    adapters.attach(model, components, LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)
def test_a_copy_that_shares_weights_is_trained_and_restored_alone(
    components: list[str], model: LatentDiffusion, tmp_path: Path
) -> None:
    """And it becomes what a model that was read from its files becomes, bit for bit."""
    start, alone = digest(model), copy.deepcopy(model)
    copied = model.sharing_weights()
    assert copied.unet.conv_in.weight.data_ptr() == model.unet.conv_in.weight.data_ptr()
    trained(copied, components)
    assert digest(model) == start != digest(copied) == digest(trained(alone, components))
    adapters.export(copied, tmp_path, base_model="tiny8", card="")
    again, own = model.sharing_weights(), copy.deepcopy(model)
    for restored in (again, own):
        adapters.restore(restored, tmp_path, model.classes)
    assert digest(model) == start != digest(again) == digest(own)
    assert not any(parameter.requires_grad for parameter in copied.autoencoder.parameters())
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


def test_a_fresh_adapter_changes_no_output(model: LatentDiffusion) -> None:
    before = output(model)
    adapters.attach(model, ["lora", "embedder"], LORA, seed=0)
    assert torch.equal(output(model), before)


def test_the_start_of_an_adapter_depends_on_its_seed_alone(pretrained: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        torch.rand(7)
        model = load(pretrained)
        adapters.attach(model, ["lora"], LORA, seed=seed)
        return torch.cat([p.detach().flatten() for p in adapters.trainable_parameters(model).values()])

    state = torch.get_rng_state()
    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))
    torch.set_rng_state(state)


def test_lora_trains_its_matrices_alone(model: LatentDiffusion) -> None:
    adapters.attach(model, ["lora"], LORA, seed=0)
    names = list(adapters.trainable_parameters(model))
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    # Rank times the sum of both sides, for each adapted layer.
    expected = 0
    for name, module in model.unet.named_modules():
        if hasattr(module, "lora_A"):
            assert name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
            expected += 3 * (module.in_features + module.out_features)
    assert adapters.count(model) == expected > 0


def test_queries_and_keys_without_effect_are_never_trained(model: LatentDiffusion) -> None:
    chosen = adapters.target_names(model.unet, ["to_q", "to_k", "to_v"], 3)
    assert any("attn1.to_q" in name for name in chosen) and any("attn2.to_v" in name for name in chosen)
    adapters.attach(model, ["lora", "full"], LORA, seed=0)
    for name in [*chosen, *adapters.trainable_parameters(model)]:
        assert "attn2.to_q" not in name and "attn2.to_k" not in name, name
        assert "transformer_blocks.0.norm2" not in name, name


@pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)
def test_every_trained_parameter_has_an_effect_and_nothing_else_a_gradient(
    model: LatentDiffusion, components: list[str]
) -> None:
    trained(model, components)
    noisy = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    # A sum of squares: the gradient of a plain sum through a normalisation is zero.
    model(noisy, torch.tensor([0, 300, 600, 999]), torch.arange(4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name
    assert not any(p.requires_grad for p in model.autoencoder.parameters())


def test_the_components_are_what_their_names_say(pretrained: Path) -> None:
    chosen: dict[str, set[str]] = {}
    for component in COMPONENTS:
        model = load(pretrained)
        adapters.attach(model, [component], LORA, seed=0)
        chosen[component] = set(adapters.trainable_parameters(model))
    assert chosen["embedder"] == {"class_embedder.weight"}
    assert all(name.endswith(".bias") for name in chosen["bias"])
    assert all(".attn" in name for name in chosen["attention"])
    assert all("norm" in name for name in chosen["norm"])
    for component in ("attention", "bias", "norm", "embedder"):
        assert chosen[component] < chosen["full"]


@pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)
def test_the_counts_of_the_components_are_the_whole(pretrained: Path, components: list[str]) -> None:
    model = load(pretrained)
    adapters.attach(model, components, LORA, seed=0)
    counts = adapters.count_by_component(model, components)
    assert list(counts) == components and sum(counts.values()) == adapters.count(model)
    alone = load(pretrained)
    adapters.attach(alone, components[:1], LORA, seed=0)
    assert counts[components[0]] == adapters.count(alone) > 0, "the first has all that it would have alone"


def test_a_target_that_matches_nothing_lists_what_could_be_meant(model: LatentDiffusion) -> None:
    with pytest.raises(UserError) as caught:
        adapters.attach(model, ["lora"], LoraConfig(target_modules=["to_q", "to_vv"]), seed=0)
    message = str(caught.value)
    assert message.startswith("lora.target_modules: 'to_vv' matches no") and "did you mean 'to_v'?" in message
    assert "to_out.0" in message and "\n" not in message
    with pytest.raises(UserError, match="matches no linear or convolution layer"):
        adapters.target_names(model.unet, ["o_q"], 1)  # an end of a letter, not of a word


def test_targets_without_any_effect_are_refused(model: LatentDiffusion) -> None:
    with pytest.raises(UserError, match="has no effect"):
        adapters.target_names(model.unet, ["attn2.to_q"], 1)


def test_convolutions_can_be_adapted(model: LatentDiffusion) -> None:
    adapters.attach(model, ["lora"], LoraConfig(rank=2, target_modules=["conv1", "proj_in"]), seed=0)
    assert any("conv1.lora_A" in name for name in adapters.trainable_parameters(model))


def test_a_rank_beyond_the_width_is_refused(model: LatentDiffusion) -> None:
    width = 16  # the class token's, which attn2.to_v takes
    adapters.target_names(model.unet, ["to_v"], width)
    with pytest.raises(
        UserError, match=r"^lora\.rank=17: beyond the width of .*attn2\.to_v, expected 1 to 16"
    ):
        adapters.target_names(model.unet, ["to_v"], width + 1)


@pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)
def test_restoring_an_export_gives_the_trained_model(
    model: LatentDiffusion, pretrained: Path, tmp_path: Path, components: list[str]
) -> None:
    before = output(model)
    expected = output(trained(model, components))
    adapters.export(model, tmp_path / "adapter", base_model="tiny8", card="card\n")
    restored = load(pretrained)
    adapters.restore(restored, tmp_path / "adapter", model.classes)
    assert torch.equal(output(restored), expected) and not torch.equal(expected, before)


def test_new_classes_are_restored(model: LatentDiffusion, pretrained: Path, tmp_path: Path) -> None:
    model.new_classes(["a", "b", "c", "d"], torch.Generator().manual_seed(1))
    expected = output(trained(model, ["lora", "embedder"]))
    adapters.export(model, tmp_path, base_model="tiny8", card="")
    restored = load(pretrained)
    adapters.restore(restored, tmp_path, ["a", "b", "c", "d"])
    assert restored.classes == ("a", "b", "c", "d") and torch.equal(output(restored), expected)
    with pytest.raises(UserError, match=r"class_embedder\.weight \(4, 16\) does not fit"):
        adapters.restore(load(pretrained), tmp_path, ["a", "b", "c"])


def test_plain_peft_and_plain_diffusers_load_the_adapter(
    model: LatentDiffusion, pretrained: Path, tmp_path: Path
) -> None:
    trained(model, ["lora"])
    adapters.export(model, tmp_path, base_model=str(pretrained), card="")
    noisy = torch.randn(2, *model.latent_shape)
    timesteps, condition = torch.tensor([10, 700]), model.class_embedder(torch.tensor([1, 2])).unsqueeze(1)

    @torch.inference_mode()
    def predict(unet: torch.nn.Module) -> torch.Tensor:
        return unet.eval()(noisy, timesteps, encoder_hidden_states=condition, return_dict=False)[0]

    expected = predict(model.unet)
    base = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet")
    assert not torch.allclose(predict(base), expected, atol=1e-4)
    assert torch.allclose(predict(PeftModel.from_pretrained(base, tmp_path)), expected, atol=1e-5)
    unet = UNet2DConditionModel.from_pretrained(pretrained, subfolder="unet")
    unet.load_lora_adapter(tmp_path, weight_name="adapter_model.safetensors", prefix="base_model.model")
    assert torch.allclose(predict(unet), expected, atol=1e-5)


def test_an_export_holds_what_was_trained_and_nothing_else(model: LatentDiffusion, tmp_path: Path) -> None:
    from safetensors import safe_open

    trained(model, ["lora", "embedder"])
    adapters.export(model, tmp_path / "a", base_model="tiny8", card="card\n")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "trained.safetensors", "README.md"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 6 and config["base_model_name_or_path"] == "tiny8"
    assert config["target_modules"] == sorted(config["target_modules"])
    with safe_open(tmp_path / "a" / "trained.safetensors", "pt") as file:
        assert list(file.keys()) == ["class_embedder.weight"]
        assert file.metadata()["classes"].split("\n") == list(model.classes)
    adapters.export(model, tmp_path / "b", base_model="tiny8", card="card\n")
    digests = [
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / folder).iterdir()}
        for folder in ("a", "b")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "trained.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_one_clear_line(
    model: LatentDiffusion, pretrained: Path, tmp_path: Path, file: str
) -> None:
    adapters.export(trained(model, ["lora", "embedder"]), tmp_path, base_model="tiny8", card="")
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError) as caught:
        adapters.restore(load(pretrained), tmp_path, model.classes)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused(
    model: LatentDiffusion, pretrained: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    adapters.export(trained(model, ["lora"]), tmp_path, base_model="tiny8", card="")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: torch.zeros(3, 999)}, path)
    with pytest.raises(UserError, match="do not fit the modules"):
        adapters.restore(load(pretrained), tmp_path, model.classes)
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(UserError, match="do not fit the modules"):
        adapters.restore(load(pretrained), tmp_path, model.classes)


# Every kind of model, every component

COMPONENTS_OF_ALL = [
    (["lora", "embedder"], ["qkv", "proj"]),
    (["lora"], ["self", "conv"]),
    (["attention", "embedder"], []),
    (["bias", "norm"], []),
    (["full"], []),
]


# The rest have the layers of these.
PRIVATE = ("spatial_transformer", "resnet_updown", "attention_block", "stable_diffusion", "dit")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(
        num_examples=400,
        expected_batch_size=20,
        steps=3,
        noise_multiplier=0.8,
        target_epsilon=None,
        delta=1e-4,
        noise_multiplicity=2,
        max_grad_norm=0.1,
    )


def targets_of(kind: str, targets: list[str]) -> list[str]:
    """The diffusion transformer has no convolutions of residual blocks."""
    return [target for target in targets if target != "conv" or kind != "dit"]


@pytest.mark.parametrize(("components", "targets"), COMPONENTS_OF_ALL, ids=lambda words: "+".join(words))
@pytest.mark.parametrize("kind", PRIVATE)
def test_every_kind_of_model_is_private_in_every_component(
    kind: str, components: list[str], targets: list[str], pipelines: Path, plan: PrivacyPlan
) -> None:
    """What a run checks before its first step, two draws an example: gradients, sensitivity and padding."""
    model = model_of(kind, pipelines)
    lora = LoraConfig(rank=2, target_modules=targets_of(kind, targets))
    adapters.attach(model, components, lora, seed=0)
    assert adapters.count(model) > 0
    check_engine(composed(*TINY), model, plan)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_kind_of_model_is_what_its_export_restores(kind: str, pipelines: Path, tmp_path: Path) -> None:
    model = model_of(kind, pipelines)
    before = output(model)
    adapters.attach(model, ["lora", "bias", "embedder"], LoraConfig(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    expected = output(model)
    adapters.export(model, tmp_path, base_model=kind, card="")
    restored = model_of(kind, pipelines)
    adapters.restore(restored, tmp_path, model.classes)
    # Three products in place of a fused one round differently.
    assert torch.allclose(output(restored), expected, atol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all("to_qkv" not in name for name in config["target_modules"])


def test_the_fused_attention_is_that_of_three_matrices(pipelines: Path) -> None:
    plain, fused = (model_of("attention_block", pipelines) for _ in range(2))
    adapters.attach(fused, ["lora"], LoraConfig(rank=2, target_modules=["qkv"]), seed=0)
    assert torch.allclose(output(fused), output(plain), atol=1e-6)
    names = adapters.trainable_parameters(fused)
    assert names and all(".to_qkv.lora_" in name for name in names)
    widths = [m.out_features for n, m in plain.unet.named_modules() if n.endswith("to_q")]
    assert adapters.count(fused) == sum(2 * 4 * width for width in widths)
    # By their own names there are three adapters.
    apart = model_of("attention_block", pipelines)
    adapters.attach(apart, ["lora"], LoraConfig(rank=2, target_modules=["to_q", "to_k", "to_v"]), seed=0)
    assert adapters.count(apart) == sum(2 * 6 * width for width in widths)
    with pytest.raises(UserError, match="both to_qkv and a part of it"):
        adapters.target_names(plain.unet, ["qkv", "to_v"], 1)


def test_plain_diffusers_loads_an_adapter_of_fused_attention(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    from dp_lora.models.folders import save
    from tests.builders.architectures import PLAIN_ATTENTION_BLOCK, built

    model = built(PLAIN_ATTENTION_BLOCK)
    save(model, tmp_path / "model", {})
    adapters.attach(model, ["lora"], LoraConfig(rank=2), seed=0)
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.1
    adapters.export(model, tmp_path / "adapter", base_model="x", card="")
    noisy, timesteps = torch.randn(2, 3, 4, 4), torch.tensor([3, 700])
    unet = UNet2DModel.from_pretrained(tmp_path / "model", subfolder="unet")
    with torch.inference_mode():
        plain = unet(noisy, timesteps).sample
        adapted = PeftModel.from_pretrained(unet, tmp_path / "adapter").eval()(noisy, timesteps).sample
        expected = model.predict_noise_of(noisy, timesteps, None)
    assert torch.allclose(adapted, expected, atol=1e-5) and not torch.allclose(adapted, plain, atol=1e-3)


@pytest.mark.parametrize("kind", ["spatial_transformer", "stable_diffusion"])
def test_groups_of_targets_are_the_layers_their_names_say(kind: str, pipelines: Path) -> None:
    unet = model_of(kind, pipelines).unet
    ends = {
        "qkv": ("to_q", "to_k", "to_v"),
        "proj": ("to_out.0",),
        "conv": ("conv1", "conv2", "conv_shortcut", "conv"),
    }
    for group, expected in ends.items():
        names = adapters.target_names(unet, [group], 1)
        assert {name.endswith(expected) for name in names} == {True}, group
    both = {group: set(adapters.target_names(unet, [group], 1)) for group in ("self", "cross", "qkv", "proj")}
    assert both["self"] | both["cross"] == both["qkv"] | both["proj"] and not both["self"] & both["cross"]
    assert all(".attn1." in name for name in both["self"]) and all(
        ".attn2." in name for name in both["cross"]
    )
    # With several tokens the queries and keys of the cross-attention have an effect.
    assert any(".attn2.to_q" in name for name in both["cross"]) == (kind == "stable_diffusion")


def test_a_group_that_a_model_lacks_is_named(pipelines: Path) -> None:
    with pytest.raises(UserError, match=r"'cross' matches no linear or convolution layer of the UNet2DModel"):
        adapters.target_names(model_of("attention_block", pipelines).unet, ["cross"], 1)


def test_a_capped_rank_is_the_width_of_a_narrow_layer(pipelines: Path, tmp_path: Path) -> None:
    model = model_of("spatial_transformer", pipelines)
    width = model.class_embedder.embedding_dim
    with pytest.raises(UserError, match=f"expected 1 to {width}; .*cap_rank"):
        adapters.target_names(model.unet, ["to_v"], width + 2)
    lora = LoraConfig(rank=width + 2, alpha=2.0 * (width + 2), target_modules=["to_v"], cap_rank=True)
    adapters.attach(model, ["lora"], lora, seed=0)
    for name, module in model.unet.named_modules():
        if hasattr(module, "lora_A"):
            capped = "attn2" in name
            assert (
                module.r["default"] == (width if capped else width + 2) and module.scaling["default"] == 2.0
            )
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += 0.1
    adapters.export(model, tmp_path, base_model="x", card="")
    restored = model_of("spatial_transformer", pipelines)
    adapters.restore(restored, tmp_path, model.classes)
    assert torch.equal(output(restored), output(model))


def test_an_embedder_of_another_size_is_refused(pipelines: Path, tmp_path: Path) -> None:
    model = model_of("spatial_transformer", pipelines)
    adapters.attach(model, ["embedder"], LORA, seed=0)
    adapters.export(model, tmp_path, base_model="x", card="")
    with pytest.raises(UserError, match=r"expected \(3, 8\): a class embedder of another size"):
        adapters.restore(model_of("dit", pipelines), tmp_path, model.classes)
