"""The audit with canaries: what they are, and its teeth against an engine with planted defects."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_lora.auditing import audit, bounds, canaries
from dp_lora.auditing.bounds import Outcome
from dp_lora.auditing.canaries import EMPTY, GradientCanaries, Trained, coins, odd_images, train_with_canaries
from dp_lora.auditing.noise_tests import Verdict
from dp_lora.auditing.options import Options
from dp_lora.config.schema import Config
from dp_lora.errors import UserError
from dp_lora.models import adapters
from dp_lora.models.diffusion import per_example_loss
from dp_lora.models.folders import build, load
from dp_lora.models.latent_diffusion import LatentDiffusion
from dp_lora.privacy import step as algorithm
from dp_lora.privacy.gradients import ClippedGradientSum
from dp_lora.privacy.plan import Clip, PrivacyPlan, make_plan
from dp_lora.privacy.randomness import Randomness
from dp_lora.training import finetune
from tests.builders.tiny import TINY, composed

# Canaries


@pytest.fixture(scope="module")
def config() -> Config:
    return composed(*TINY, "lora.rank=2", "train.microbatch=128")


@pytest.fixture
def start(pretrained: Path, config: Config) -> Callable[..., LatentDiffusion]:
    """The model as a run finds it."""

    def make(*components: str) -> LatentDiffusion:
        model = load(pretrained)
        adapters.attach(model, components or config.trainable.components, config.lora, seed=0)
        return model

    return make


def _losses(model: LatentDiffusion, labels: list[int], latents: Tensor, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), k, *model.latent_shape, generator=generator)
    timesteps = torch.randint(0, 1000, (len(labels), k), generator=generator)
    return per_example_loss(model, latents, torch.tensor(labels), timesteps, noise)


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_a_gradient_canary_adds_c_to_its_own_coordinate_and_nothing_else(
    start: Callable[..., LatentDiffusion], clipping: str
) -> None:
    model, bound, k = GradientCanaries(start(), 7, 0.5), 0.5, 3
    torch.nn.init.normal_(model.canaries.weight)
    engine = ClippedGradientSum(model, Clip(k, bound, clipping))
    share = 1 / math.sqrt(engine.num_layers) if clipping == "per_layer" else 1.0
    size = model.canaries.weight.numel()
    for canary in range(7):
        engine.reset()
        labels = [model.first_label + canary, 1]
        latents = torch.cat([torch.zeros(1, *model.latent_shape), torch.randn(1, *model.latent_shape)])
        engine.add(_losses(model, labels, latents, k), torch.tensor([1.0, 0.0]))
        total = engine.total()
        own = total[-size:]
        assert own[canary] == pytest.approx(share * bound, rel=1e-3)
        assert torch.count_nonzero(total) == 1
    engine.reset()
    engine.add(_losses(model, [1], torch.randn(1, *model.latent_shape), k))
    assert torch.count_nonzero(engine.total()[-size:]) == 0 < torch.count_nonzero(engine.total())


def test_beside_canaries_a_model_computes_what_it_did(start: Callable[..., LatentDiffusion]) -> None:
    model = start()
    latents = torch.randn(3, *model.latent_shape)
    expected = _losses(model, [0, 4, 9], latents, 2)
    torch.testing.assert_close(_losses(GradientCanaries(model, 5, 1.0), [0, 4, 9], latents, 2), expected)


def test_an_unconditional_model_takes_gradient_canaries_too() -> None:
    config = composed(*TINY, "model.conditioning=none")
    model = build(config.model, classes=["?"], channels=1, image_size=8)
    adapters.attach(model, ["lora"], config.lora, seed=0)
    odd = GradientCanaries(model, 4, 1.0)
    engine = ClippedGradientSum(odd, Clip(2, 1.0))
    engine.add(_losses(odd, [odd.first_label + 3], torch.zeros(1, *model.latent_shape), 2))
    own = engine.total()[-odd.canaries.weight.numel() :]
    assert float(own[3]) == pytest.approx(1, rel=1e-3) and len(own) >= 4 + EMPTY


def test_coins_are_fair_and_images_are_all_different() -> None:
    """Of 10,000 fair coins the count is within 200 of the half, but for 6 of 100,000 cases."""
    randomness = Randomness.from_seed(0)
    assert abs(int(coins(randomness, 10_000).sum()) - 5000) < 200
    images = odd_images((3, 10, 12), 50, randomness)
    assert images.shape == (50, 3, 10, 12) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 50


@pytest.mark.parametrize(("shape", "block"), [((1, 8, 8), 2), ((3, 10, 12), 2), ((1, 3, 3), 1)])
def test_an_odd_image_is_made_of_blocks_of_a_quarter_of_its_side(
    shape: tuple[int, int, int], block: int
) -> None:
    images = odd_images(shape, 20, Randomness.from_seed(0)).astype(int)
    for axis in (2, 3):
        changes = (np.diff(images, axis=axis) != 0).any(axis=(0, 1, 5 - axis))
        assert (np.flatnonzero(changes) + 1).tolist() == list(range(block, shape[axis - 1], block))


@pytest.mark.parametrize(("kind", "needed"), [("gradient", 40), ("image", 30)])
def test_as_many_canaries_are_asked_for_as_could_show_something(
    kind: str, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient canaries are trials of their own, judged by their rates; images are by their number."""
    monkeypatch.setattr(audit, "refutes", lambda outcomes, *claim: outcomes[0].positives >= 20)
    monkeypatch.setattr(audit, "most", lambda canaries, *claim: 0.1 * (canaries >= 30))
    with pytest.raises(UserError, match=r"--canaries=4: .*; expected \d+ or more") as refused:
        audit._check_power(plan_at(8.0), Options(kind=kind, canaries=4))
    named = int(str(refused.value).split("expected ")[1].split()[0])
    assert needed <= named <= needed * 9 // 8
    audit._check_power(plan_at(8.0), Options(kind=kind, canaries=named))


def test_beside_a_private_loss_a_canary_adds_what_is_left_of_c(
    start: Callable[..., LatentDiffusion], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches: list[canaries.Watch] = []
    made = canaries.Watch

    def watch(*args: Any) -> canaries.Watch:
        watches.append(made(*args))
        return watches[-1]

    monkeypatch.setattr(canaries, "Watch", watch)
    plan = make_plan(
        num_examples=200, expected_batch_size=190, steps=1, noise_multiplier=1e-3, delta=1e-5,
        max_grad_norm=1e-3, loss_share=0.6,
    )  # fmt: skip
    train_with_canaries(
        config, start(), plan, kind="gradient", count=12, randomness=Randomness.from_seed(0), folder=tmp_path
    )
    (seen,) = watches
    assert seen._amplitude == pytest.approx(0.8)
    assert seen._largest == pytest.approx(0.8, rel=0.01)


# Teeth


@functools.cache
def plan_at(epsilon: float, k: int = 1) -> PrivacyPlan:
    return make_plan(
        num_examples=2000,
        expected_batch_size=1000,
        steps=2,
        noise_multiplier=None,
        target_epsilon=epsilon,
        delta=1e-5,
        noise_multiplicity=k,
        max_grad_norm=1e-3,
    )


def no_noise(patched: pytest.MonkeyPatch) -> None:
    """Sigma is 0, whatever the plan says."""
    patched.setattr(PrivacyPlan, "noise_std", property(lambda plan: 0.0))


def no_clip(patched: pytest.MonkeyPatch) -> None:
    """C is infinite for the clip, and what it was for the noise."""

    def engine(module: Any, clip: Clip) -> ClippedGradientSum:
        return ClippedGradientSum(module, dataclasses.replace(clip, max_grad_norm=math.inf))

    patched.setattr(algorithm, "ClippedGradientSum", engine)


class _Apart(ClippedGradientSum):
    """Takes each draw of an example for an example."""

    def __init__(self, module: Any, clip: Clip) -> None:
        super().__init__(module, dataclasses.replace(clip, noise_multiplicity=1))
        self.k = clip.noise_multiplicity

    def add(self, losses: Tensor, weights: Tensor | None = None) -> None:
        super().add(losses, None if weights is None else weights.repeat_interleave(self.k))


def draws_apart(patched: pytest.MonkeyPatch) -> None:
    """The k draws are clipped one by one, as in the code released with the paper."""

    def each(
        model: Any, latents: Tensor, labels: Tensor, timesteps: Tensor, noise: Tensor, *_: Any
    ) -> Tensor:
        k = timesteps.shape[1]
        rows = latents.repeat_interleave(k, 0), labels.repeat_interleave(k)
        return per_example_loss(model, *rows, timesteps.reshape(-1, 1), noise.flatten(0, 1).unsqueeze(1))

    patched.setattr(finetune, "per_example_loss", each)
    patched.setattr(algorithm, "ClippedGradientSum", _Apart)


def half_the_noise(patched: pytest.MonkeyPatch) -> None:
    """The noise is half of what was accounted."""
    noise_std = PrivacyPlan.noise_std
    patched.setattr(PrivacyPlan, "noise_std", property(lambda plan: noise_std.fget(plan) / 2))  # type: ignore[misc]


def whole_batches(patched: pytest.MonkeyPatch) -> None:
    """Every example is in every batch, and a Poisson sample was accounted."""
    patched.setattr(algorithm, "poisson_batch", lambda randomness, step, count, rate: torch.arange(count))


GROSS = (no_noise, no_clip, draws_apart)
DEFECTS = (*GROSS, half_the_noise, whole_batches)


class Audited:
    """The two bounds, which hold together with 95 %, and the tests of the noise."""

    def __init__(self, trained: Trained, plan: PrivacyPlan) -> None:
        self.claimed = plan.epsilon
        at = bounds.thresholds(plan.mechanism, trained.noise_factor)
        outcomes = [Outcome.of(trained.scores, trained.included, threshold) for threshold in at]
        assert trained.noise is not None
        self.accused = Verdict(trained.p_values()).accused
        self.one_run = bounds.one_run(trained.scores, trained.included, plan.delta, 0.975).epsilon
        self.refuted = self.one_run > plan.epsilon or bounds.refutes(
            outcomes, plan.mechanism, plan.delta, 0.975
        )
        self.family = lambda: bounds.gaussian_family(outcomes, plan.mechanism, plan.delta, 0.975)


@pytest.fixture
def audited(start: Callable[..., LatentDiffusion], config: Config, tmp_path: Path) -> Callable[..., Audited]:
    def run(seed: int, epsilon: float, canaries: int, k: int = 1) -> Audited:
        plan = plan_at(epsilon, k)
        trained = train_with_canaries(
            config,
            start(),
            plan,
            kind="gradient",
            count=canaries,
            randomness=Randomness.from_seed(seed),
            folder=tmp_path / str(len(list(tmp_path.iterdir()))),
        )
        return Audited(trained, plan)

    return run


@pytest.mark.parametrize("defect", GROSS, ids=lambda defect: defect.__name__)
def test_a_gross_defect_is_found_whatever_the_mechanism(
    defect: Callable[[pytest.MonkeyPatch], None],
    audited: Callable[..., Audited],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        defect(patched)
        found = audited(1, epsilon=1.0, canaries=400, k=8)
    assert found.one_run > found.claimed
    if defect is no_noise:
        assert "variance" in found.accused
    else:
        assert set(found.accused) <= {"largest_contribution"}, "clip and draws do not change the noise"


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_defect_is_found_at_a_large_epsilon_too(
    defect: Callable[[pytest.MonkeyPatch], None],
    audited: Callable[..., Audited],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        defect(patched)
        found = audited(2, epsilon=8.0, canaries=300, k=4)
    assert found.refuted
    by_noise = set(found.accused) - {"largest_contribution"}
    assert bool(by_noise) == (defect in (no_noise, half_the_noise))
    if defect is no_clip:
        assert "largest_contribution" in found.accused


def test_twenty_correct_runs_are_not_accused(audited: Callable[..., Audited]) -> None:
    """Each may be accused with a probability of 5 %, and by the tests of the noise with one of 1 %.

    More than five are a chance of 0.03 %, and more than three of 4 in 100,000.
    """
    runs = [audited(seed, epsilon=8.0, canaries=300) for seed in range(100, 120)]
    assert sum(run.refuted for run in runs) <= 5 and sum(bool(run.accused) for run in runs) <= 3
    bound = runs[0].family()
    assert 0.1 * runs[0].claimed < bound < runs[0].claimed, "a bound that says nothing cannot be wrong"


def image_canaries(start: Callable[..., LatentDiffusion], config: Config, folder: Path) -> bounds.Membership:
    """Three trainings almost without noise, of every parameter, on some of ten odd images each.

    There are few bystanders and one canary a class, so that the small model can learn them by heart.
    """
    loud = replace(plan_at(8.0), noise_multiplier=1e-3, noise_multiplicity=1, sample_rate=1.0, steps=100)
    inside, outside = [], []
    for seed in range(3):
        trained = train_with_canaries(
            config,
            start("full"),
            loud,
            kind="image",
            count=10,
            randomness=Randomness.from_seed(seed),
            folder=folder / str(seed),
        )
        assert np.isfinite(trained.scores).all() and len(trained.scores) == 10
        inside.append(trained.scores[trained.included])
        outside.append(trained.scores[~trained.included])
    return bounds.membership(np.concatenate(inside), np.concatenate(outside))


@pytest.mark.slow
def test_image_canaries_that_were_learnt_are_told_from_those_that_were_not(
    start: Callable[..., LatentDiffusion], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that say nothing pass this in less than 2.5 of 100 cases; these are nearly always in order."""
    monkeypatch.setattr(canaries, "BYSTANDERS", 8)
    config.train.schedule = "constant"
    found = image_canaries(start, config, tmp_path / "learnt")
    assert found.auc > 0.8 and found.auc_low > 0.5

    # A twin whose training does not see the canaries that are said to be in it.
    step = canaries._Training._step

    def blind(training: Any, model: LatentDiffusion, latents: Tensor, labels: Tensor) -> Any:
        return step(training, model, latents[-8:], labels[-8:])

    monkeypatch.setattr(canaries._Training, "_step", blind)
    found = image_canaries(start, config, tmp_path / "blind")
    assert found.auc < 0.8 and found.auc_low < 0.5


def test_an_interrupted_audit_ends_like_a_quiet_one(
    start: Callable[..., LatentDiffusion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*TINY, "lora.rank=2", "train.checkpoint_minutes=0")

    def train(folder: str) -> Trained:
        randomness = Randomness.from_seed(9)
        return train_with_canaries(
            config,
            start(),
            plan_at(8.0),
            kind="gradient",
            count=20,
            randomness=randomness,
            folder=tmp_path / folder,
        )

    quiet = train("quiet")
    call = finetune.FinetuneStep.__call__

    def dies(step: finetune.FinetuneStep, number: int) -> dict[str, float]:
        if number == 1:
            raise KeyboardInterrupt
        return call(step, number)

    with monkeypatch.context() as patched:
        patched.setattr(finetune.FinetuneStep, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            train("broken")
    again = train("broken")
    for one, other in zip(again.arrays().items(), quiet.arrays().items(), strict=True):
        assert one[0] == other[0] and np.array_equal(one[1], other[1]), one[0]
