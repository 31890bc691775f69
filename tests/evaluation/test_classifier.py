"""Classifiers trained on generated images, against a broken twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dp_lora.config.schema import DEEP_CLASSIFIERS
from dp_lora.evaluation.classifier import RECIPES, accuracy, build, train_classifier
from tests.builders.digit_images import Images, part

CPU = torch.device("cpu")


def test_the_cnn_learns_digits_and_with_shuffled_labels_does_not(digits: Images) -> None:
    # The twin's labels have no relation to the images. In the worst case it gives every image of a class
    # the same random answer: the classes it gets right are then Poisson(1) of 10, and 5 or more have
    # probability 0.4 %. The seeds are fixed.
    train, test = part(digits, 0, 1100), part(digits, 1100, 1797)
    shuffled = train.labels[torch.randperm(1100, generator=torch.Generator().manual_seed(0))]
    results = [
        accuracy(
            train_classifier(train.images, labels, num_classes=10, epochs=5, seed=0, device=CPU),
            test.images,
            test.labels,
            batch_size=250,
        )
        for labels in (train.labels, shuffled)
    ]
    assert results[0] > 0.85
    assert results[1] < 0.5


def test_the_cnn_is_that_of_its_seed_and_leaves_the_random_state(samples: Images) -> None:
    def weights(seed: int) -> Tensor:
        classifier = train_classifier(
            samples.images, samples.labels, num_classes=10, epochs=1, seed=seed, device=CPU
        )
        return torch.cat([parameter.detach().flatten() for parameter in classifier.parameters()])

    state = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 28), (1, 33), (3, 96)])
def test_the_cnn_takes_any_size_and_number_of_channels(channels: int, side: int) -> None:
    images = torch.zeros(4, channels, side, side, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0])
    classifier = train_classifier(images, labels, num_classes=3, epochs=1, seed=0, device=CPU)
    assert classifier(images).shape == (4, 3)
    assert accuracy(classifier, images, labels, batch_size=3) in (0.25, 0.5)


@pytest.mark.parametrize("name", DEEP_CLASSIFIERS)
def test_the_residual_networks_train_on_any_image_and_forget_their_start(name: str) -> None:
    images = torch.randint(0, 256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    before = build(name, 1, 28, 3)
    settings = {"num_classes": 3, "seed": 0, "device": CPU, "name": name}
    after = train_classifier(images, labels, epochs=1, **settings)
    assert after(images).shape == (4, 3) and not after.training
    moved = [not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)


def test_the_residual_networks_are_those_of_the_papers() -> None:
    # Parameters in millions, of three channels and ten classes: WRN-40-4 has 8.9 and ResNet-110 1.7 by their
    # papers; ResNeXt-29 of DPImageBench is 8 groups of 8 channels in its first stage.
    def millions(name: str) -> float:
        return sum(p.numel() for p in build(name, 3, 32, 10).parameters()) / 1e6

    assert round(millions("wrn"), 1) == 8.9
    assert round(millions("resnet"), 1) == 1.7
    grouped = [m for m in build("resnext", 3, 32, 10).modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(grouped) == 9 and {m.groups for m in grouped} == {8}
    assert [m.in_channels for m in grouped[::3]] == [512, 1024, 2048]


def test_the_weights_that_are_tested_are_the_average_where_the_recipe_says_so(
    samples: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(decay: float) -> Tensor:
        monkeypatch.setitem(RECIPES, "cnn", replace(RECIPES["cnn"], ema_decay=decay))
        trained = train_classifier(
            samples.images, samples.labels, num_classes=10, epochs=3, seed=0, device=CPU
        )
        return torch.cat([p.detach().flatten() for p in trained.parameters()])

    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in build("cnn", 1, 28, 10).parameters()])
    last, averaged = weights(0.0), weights(0.9999)
    assert 0 < (averaged - start).norm() < (last - start).norm()
