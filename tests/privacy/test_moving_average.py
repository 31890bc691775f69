"""The moving average: its values, bit for bit, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dp_lora.evaluation import classifier
from dp_lora.privacy.moving_average import MovingAverage, average_decay


def trained(steps: int) -> list[list[Tensor]]:
    """The parameters of a network after each of `steps` steps, the start first."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (5,))
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps + 1)]


def parameters(values: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(value.clone()) for value in values]


def follow(own: list[nn.Parameter], average: MovingAverage, path: list[list[Tensor]], first: int) -> None:
    for step, values in enumerate(path, first):
        for parameter, value in zip(own, values, strict=True):
            parameter.data.copy_(value)
        average.update(step)


def test_the_decay_rises_to_the_largest_one() -> None:
    assert [average_decay(0.5, step) for step in (0, 1, 7, 8, 9)] == [1 / 10, 2 / 11, 8 / 17, 0.5, 0.5]


@pytest.mark.parametrize("largest", [0.0, 0.3, 0.9999])
def test_the_average_is_the_recursion_bit_for_bit(largest: float) -> None:
    start, *path = trained(6)
    own = parameters(start)
    average = MovingAverage(own, largest)
    follow(own, average, path, 0)
    expected = [value.clone() for value in start]
    for step, values in enumerate(path):
        decay = min(largest, (1 + step) / (10 + step))
        for averaged, value in zip(expected, values, strict=True):
            averaged.lerp_(value, 1 - decay)
    assert all(map(torch.equal, average.values, expected))
    assert all(map(torch.equal, own, path[-1])), "the parameters are read, not written"
    assert all(map(torch.equal, average.values, path[-1])) is (largest == 0)
    assert not any(value.requires_grad for value in average.values)


def test_it_is_copied_into_the_parameters_of_another_network() -> None:
    start, *path = trained(3)
    own, other = parameters(start), parameters(start)
    average = MovingAverage(own, 0.9)
    follow(own, average, path, 0)
    average.copy_to(iter(other))
    assert all(map(torch.equal, other, average.values)) and all(map(torch.equal, own, path[-1]))
    with pytest.raises(ValueError, match="longer"):
        average.copy_to(other[:1])


def test_one_that_goes_on_from_its_state_is_the_uninterrupted_one() -> None:
    start, *path = trained(6)
    own, again = parameters(start), parameters(path[2])
    average = MovingAverage(own, 0.9)
    follow(own, average, path[:3], 0)
    state = copy.deepcopy(average.state)
    follow(own, average, path[3:], 3)
    resumed = MovingAverage(again, 0.9)
    resumed.load(state)
    follow(again, resumed, path[3:], 3)
    assert all(map(torch.equal, resumed.values, average.values))


def test_a_classifier_is_tested_with_the_average_after_its_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, list[Tensor]]] = []

    class Watched(MovingAverage):
        def update(self, step: int) -> None:
            super().update(step)
            kept.append((step, [value.clone() for value in self.values]))

    monkeypatch.setattr(classifier, "MovingAverage", Watched)
    images = torch.randint(256, (20, 1, 32, 32), dtype=torch.uint8)
    labels = torch.arange(20) % 2
    network = classifier.train_classifier(
        images, labels, num_classes=2, epochs=2, seed=0, device=torch.device("cpu"), name="wrn"
    )
    assert [step for step, _ in kept] == [1, 2], "one batch of 20 an epoch, counted from 1"
    assert all(map(torch.equal, network.parameters(), kept[-1][1]))
