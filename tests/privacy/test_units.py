"""What runs spend on a unit that they do not protect, against divergences of densities on a grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from dp_lora.errors import UserError
from dp_lora.privacy.accounting import composed
from dp_lora.privacy.ledger import Charge, fits, spent, spent_adaptively
from dp_lora.privacy.renyi import ORDERS, epsilon_of_divergences, renyi_divergences
from dp_lora.privacy.subsampled_gaussian import Mechanism
from dp_lora.privacy.units import MOST_IMAGES, divergences_of_image, epsilon_of_image, epsilon_of_person

WIDTH = 2e-3
GRID = np.arange(-60, 80, WIDTH)
DELTA = 1e-3
SMALL = [(1.0, 0.3), (2.0, 0.1), (0.8, 1.0)]
"""(noise multiplier, sample rate)"""


def _step(sigma: float, rate: float, shift: float) -> np.ndarray:
    """The density of a step's release where one record moves the sum by `shift` times C."""
    return (1 - rate) * norm.pdf(GRID, 0, sigma) + rate * norm.pdf(GRID, shift, sigma)


def _at_once(sigma: float, rate: float, images: int) -> np.ndarray:
    """The density where each of so many images moves the sum by C, in the same direction."""
    return sum(binom.pmf(j, images, rate) * norm.pdf(GRID, j, sigma) for j in range(images + 1))  # type: ignore[return-value]


def _epsilon(one: np.ndarray, other: np.ndarray, steps: int = 1) -> float:
    """Epsilon of so many steps with these densities, both directions, for `DELTA`: by brute force."""
    losses = np.log(np.maximum(one, 1e-300)) - np.log(np.maximum(other, 1e-300))

    def delta(epsilon: float) -> float:
        if steps == 1:
            return float(np.maximum(one - math.exp(epsilon) * other, 0).sum() * WIDTH)
        # Two steps: the second one's part for each outcome of the first, from its sorted losses.
        order = np.argsort(losses)
        above = np.cumsum((one * WIDTH)[order][::-1])[::-1], np.cumsum((other * WIDTH)[order][::-1])[::-1]
        at = np.minimum(np.searchsorted(losses[order], epsilon - losses), len(order) - 1)
        seen = np.searchsorted(losses[order], epsilon - losses) < len(order)
        parts = one * above[0][at] - np.exp(min(epsilon, 700.0)) * other * above[1][at]
        return float(np.maximum(parts * seen, 0).sum() * WIDTH)

    low, high = 0.0, 200.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > DELTA else (low, middle)
    return high


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("sigma", "rate"), SMALL)
def test_a_replaced_record_costs_at_most_two_persons(sigma: float, rate: float, steps: int) -> None:
    """The gradient of a person turns round when one of their images is taken away."""
    run = Mechanism(sigma, rate, steps)
    truth = _epsilon(_step(sigma, rate, 1.0), _step(sigma, rate, -1.0), steps)
    bound = epsilon_of_image([], [run], DELTA).epsilon
    assert truth <= bound
    if rate == 1:
        assert bound == pytest.approx(truth, rel=1e-3), "two shifts along a line are the group's worst case"
    # The broken twin: an image covered as if it were a person.
    assert composed([run], DELTA).epsilon < 0.9 * truth


@pytest.mark.parametrize(("sigma", "rate", "images"), [(1.0, 0.3, 3), (2.0, 0.1, 12)])
def test_many_images_at_once_cost_what_their_mixture_does(sigma: float, rate: float, images: int) -> None:
    run, one = Mechanism(sigma, rate, 1), norm.pdf(GRID, 0, sigma)
    both = _at_once(sigma, rate, images)
    truth = max(_epsilon(both, one), _epsilon(one, both))
    bound = epsilon_of_person([run], [], DELTA, images).epsilon
    assert truth * (1 - 1e-6) <= bound <= truth * 1.001
    # The broken twin: one image, times the number of images, at the same delta.
    assert epsilon_of_person([run], [], DELTA, 1).epsilon == pytest.approx(composed([run], DELTA).epsilon)
    assert epsilon_of_person([run], [], DELTA, images - 1).epsilon < truth


def test_runs_of_both_kinds_compose_for_either_unit() -> None:
    images, persons = [Mechanism(1.5, 0.1, 10)], [Mechanism(2.0, 0.2, 20)]
    of_image = epsilon_of_image(images, persons, 1e-5)
    assert of_image.accountant == "group of two persons"
    assert composed([*images, *persons], 1e-5).epsilon < of_image.epsilon
    assert epsilon_of_image([], persons, 1e-5).epsilon < of_image.epsilon
    assert epsilon_of_image(images, [], 1e-5) == composed(images, 1e-5)
    assert epsilon_of_person([], persons, 1e-5, None) == composed(persons, 1e-5)
    assert epsilon_of_person(images, persons, 1e-5, None).epsilon == math.inf
    several = [epsilon_of_person(images, persons, 1e-5, m).epsilon for m in (1, 2)]
    assert several == sorted(several) and several[0] == composed([*images, *persons], 1e-5).epsilon
    assert epsilon_of_person(images, persons, 1e-11, 2).epsilon == math.inf, (
        "no bound is better than a wrong one"
    )
    with pytest.raises(UserError, match="images per person: 0; expected 1 to"):
        epsilon_of_person(images, persons, 1e-5, 0)
    assert MOST_IMAGES >= 1000
    noiseless = [Mechanism(0.0, 0.2, 1)]
    assert epsilon_of_image(images, noiseless, 1e-5).epsilon == math.inf
    assert epsilon_of_person(noiseless, persons, 1e-5, 2).epsilon == math.inf


def test_renyi_divergences_of_an_image_under_runs_for_persons() -> None:
    """Above those of one person, above the profile's bound, and finite."""
    persons = [Mechanism(2.0, 0.2, 20)]
    found = divergences_of_image([], persons)
    assert (found > renyi_divergences(persons)).all() and np.isfinite(found[:-8]).all()
    bound = epsilon_of_divergences(found, 1e-5)
    assert epsilon_of_image([], persons, 1e-5).epsilon < bound < math.inf
    # Of order 2, of a Gaussian with sigma 2 that moves by 2 C: 2 x 2^2 / (2 x 2^2) = 1.
    whole = divergences_of_image([], [Mechanism(2.0, 1.0, 1)])[ORDERS.index(2.0)]
    assert 1 <= whole < 1.2


def _charge(run: str, mechanism: Mechanism, unit: str) -> Charge:
    return Charge(run, "set", mechanism, 1e-5, unit=unit)


def test_charges_are_counted_for_the_unit_that_is_asked_for() -> None:
    run = Mechanism(4.0, 0.05, 40)
    image, person = _charge("a", run, "image"), _charge("b", run, "person")
    alone = composed([run], 1e-5).epsilon
    assert spent([image], 1e-5).epsilon == spent([person], 1e-5, "person").epsilon == alone
    assert spent([person], 1e-5).epsilon > 1.5 * alone
    assert spent([image, person], 1e-5, "person").epsilon == math.inf
    assert math.isfinite(spent([image, person], 1e-5, "person", images_per_person=3).epsilon)
    assert spent_adaptively([image, person], 1e-5) > spent_adaptively([image, image], 1e-5)
    assert spent_adaptively([image, person], 1e-5, unit="person") == math.inf
    # A budget is for whom the new run protects.
    assert fits(person, [person], 1e3) and fits(image, [person], 1e3)
    assert not fits(person, [image], 1e3)
