"""Lower bounds on epsilon from an attack's guesses: knows scores, coins and counts, and no model.

A claim of (epsilon, delta) is an upper bound, proven on paper for an engine that does what the proof says. An
attack on the engine itself gives a lower bound with a stated confidence. Where the two contradict each other,
the engine does something else.

Two bounds, from canaries that were each put into the training by a fair coin:
    one_run          Steinke, Nasr and Jagielski 2023: holds for every algorithm, so the canaries may disturb
                     each other; m canaries cannot show more than about log(m / 3).
    gaussian_family  Nasr et al. 2023: for canaries that do not touch each other, and if the algorithm is a
                     Poisson-subsampled Gaussian mechanism of unknown noise. Close to the truth, and few
                     canaries show a large epsilon.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dp_lora.privacy import accounting
from dp_lora.privacy.subsampled_gaussian import Mechanism

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

GUESSED_SHARES = (1.0, 0.5, 0.2, 0.1, 0.05)
"""Shares of the canaries that `one_run` guesses: each is tried, and the confidence pays for all of them."""

FALSE_POSITIVES = (0.1, 0.02, 0.005)
"""How often canaries that were left out pass the `thresholds` above 0."""

NOISE_FACTORS = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0625)
"""Shares of the claimed noise that canaries are scored for: see `noise_factor`."""

_SPAN = 16.0
"""How many times less or more noise than claimed `gaussian_family` looks for."""


# The evidence of one step


def evidence(
    values: Floats, noise_multiplier: float, sample_rate: float, *, amplitude: float = 1.0
) -> Floats:
    """The log-likelihood ratio "the canary is in the training" to "it is not", from one noisy step.

    The sum over the steps is the best score there is (Neyman and Pearson) for a canary that adds `amplitude`
    to a coordinate of its own whenever it is in the batch. Above 0 it says "in".

    Args:
        values: what the step released at each canary's coordinate, as a sum in units of C.
        noise_multiplier: sigma, above 0.
        sample_rate: q, in (0, 1].
        amplitude: in units of C.
    """
    gain = (amplitude * values - amplitude**2 / 2) / noise_multiplier**2
    if sample_rate == 1:
        return np.asarray(gain, dtype=np.float64)
    return np.logaddexp(math.log1p(-sample_rate), math.log(sample_rate) + gain)


def noise_factor(ratio: float) -> float:
    """The one of `NOISE_FACTORS` to score canaries for, where the noise seems to be `ratio` of the claim.

    The likelihood ratio for the claimed noise is a bad score once there is much less of it and the sample
    rate is below a half: a canary then is in most batches clearly absent, and its score is below 0 whether
    it was in the training or not. The one for the noise that there is tells the two apart.
    That noise is estimated from the first step's release.

    Guarantee: the bounds stay what they are, if `ratio` comes from coordinates of the release that belong to
    no canary. It is a function of the release alone, as `one_run` asks of a score; and in the family of
    `gaussian_family` it is independent of what the canaries' own coordinates hold, so that score and
    thresholds are fixed before those are seen.

    >>> noise_factor(1.3), noise_factor(0.96), noise_factor(0.52), noise_factor(0.0)
    (1.0, 1.0, 0.5, 0.0625)
    """
    return min(NOISE_FACTORS, key=lambda factor: abs(math.log(max(ratio, 1e-9) / factor)))


# One run, any algorithm


@dataclass(frozen=True)
class OneRun:
    """The best of the bounds of one training run."""

    epsilon: float
    """The lower bound; 0 says nothing."""
    guesses: int
    """How many canaries were guessed to reach it; the auditor abstained from the others."""
    correct: int


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """A bound on P(at least `correct` of `guesses` are right) for every (epsilon, delta)-private algorithm.

    Theorem 5.2 of Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846): with W ~ Binomial(guesses, e^epsilon /
    (1 + e^epsilon)),

        P <= P(W >= v) + 2 m delta max over i = 1..v of P(v > W >= v - i) / i.

    Args:
        canaries: m; each was included by a fair coin of its own.
        guesses: at most m; fixed before the coins are looked at.
        correct: v.
        epsilon: 0 or more, of the claim that is tested.
        delta: in [0, 1].

    >>> round(one_run_p_value(10, 10, 10, 0.0, 0.0) * 2**10, 9)  # ten coins
    1.0
    """
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"{correct} correct of {guesses} guesses of {canaries} canaries: expected them to rise"
        )
    accuracy = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, accuracy))
    if not delta or not correct:
        return beta
    steps = np.arange(1, correct + 1)
    below = binom.sf(correct - steps - 1, guesses, accuracy) - beta
    return min(1.0, beta + 2 * canaries * delta * float(np.max(below / steps)))


def one_run_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95
) -> float:
    """The largest epsilon that so many right guesses refute with `confidence`; 0 when they refute none.

    Arguments as in `one_run_p_value`.

    >>> round(one_run_lower_bound(500, 100, 100, 1e-5), 4), one_run_lower_bound(500, 100, 52, 1e-5)
    (3.4792, 0.0)
    """
    _check_confidence(confidence)
    alpha = 1 - confidence

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) < alpha

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def one_run(
    scores: Floats,
    included: Bools,
    delta: float,
    confidence: float = 0.95,
    shares: Sequence[float] = GUESSED_SHARES,
) -> OneRun:
    """The best bound over several numbers of guesses, all of which hold together with `confidence`.

    The canaries with the largest |score| are guessed, the rest is abstained from (their algorithm 1).

    Args:
        scores: [m], a function of what the training released and of nothing else; above 0 says "in".
        included: [m], the coins.
        delta: of the claim.
        confidence: of all bounds together (Bonferroni).
        shares: of the canaries to guess, chosen before the coins are looked at.
    """
    _check_confidence(confidence)
    canaries = len(scores)
    order = np.argsort(-np.abs(scores), kind="stable")
    right = ((scores > 0) == included)[order]
    each = 1 - (1 - confidence) / len(shares)
    found = []
    for share in shares:
        guesses = max(1, round(share * canaries))
        correct = int(right[:guesses].sum())
        bound = one_run_lower_bound(canaries, guesses, correct, delta, each)
        found.append(OneRun(bound, guesses, correct))
    return max(found, key=lambda one: one.epsilon)


def most(canaries: int, delta: float, confidence: float = 0.95) -> float:
    """The bound that `one_run` would find if every guess were right: this many canaries can show no more."""
    return one_run(np.ones(canaries), np.ones(canaries, dtype=np.bool_), delta, confidence).epsilon


# Canaries that do not touch each other, a Gaussian mechanism


@dataclass(frozen=True)
class Outcome:
    """How often "in" was guessed, of the canaries that were in and of those that were not."""

    true_positives: int
    positives: int
    false_positives: int
    negatives: int

    @classmethod
    def of(cls, scores: Floats, included: Bools, threshold: float = 0.0) -> Outcome:
        """The outcome of guessing "in" where the score is above `threshold`."""
        said = scores > threshold
        true, false = int((said & included).sum()), int((said & ~included).sum())
        return cls(true, int(included.sum()), false, int((~included).sum()))


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a rate (Clopper and Pearson 1934); each end alone fails half as often.

    >>> tuple(round(end, 4) for end in clopper_pearson(0, 10))
    (0.0, 0.3085)
    """
    from scipy.stats import binomtest

    _check_confidence(confidence)
    if not trials:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


@functools.lru_cache(maxsize=64)
def thresholds(claimed: Mechanism, factor: float = 1.0) -> tuple[float, ...]:
    """Scores above which to guess "in": 0, and those that a canary left out seldom passes.

    Found by a simulation of `claimed`, so they are fixed before any score is seen. With a small sample rate
    most canaries that are in are in no batch; a high threshold then finds the others among few false ones.

    Args:
        claimed: the mechanism.
        factor: the share of its noise that is simulated, and that the scores are the evidence for.
    """
    random, sigma = np.random.default_rng(0), factor * claimed.noise_multiplier
    count = int(min(20_000, max(2_000, 4e7 / claimed.steps)))
    total = np.zeros(count)
    for _ in range(claimed.steps):
        total += evidence(sigma * random.standard_normal(count), sigma, claimed.sample_rate)
    return (0.0, *np.quantile(total, 1 - np.array(FALSE_POSITIVES)).tolist())


def refutes(
    outcomes: Sequence[Outcome], mechanism: Mechanism, delta: float, confidence: float = 0.95
) -> bool:
    """Whether one of the outcomes contradicts `mechanism`, with `confidence` for all of them together.

    One does when the Clopper-Pearson bounds of its two rates lie above the mechanism's trade-off curve, which
    is TPR <= e^epsilon FPR + delta(epsilon) and TNR <= e^epsilon FNR + delta(epsilon) for every epsilon of
    its privacy profile. Every bound gets an equal share of 1 - `confidence`.

    Args:
        outcomes: each of independent trials, at thresholds that were fixed before.
        mechanism: with noise.
        delta: where the profile is computed finely.
        confidence: of all bounds together.
    """
    each = 1 - (1 - confidence) / len(outcomes)
    rates = []
    for outcome in outcomes:
        low, _ = clopper_pearson(outcome.true_positives, outcome.positives, each)
        _, high = clopper_pearson(outcome.false_positives, outcome.negatives, each)
        if low > high:
            rates.append((low, high))
    if not rates:
        return False
    reach = max(math.log(1 / min(high, 1 - low)) for low, high in rates)
    epsilons, deltas = _profile(mechanism, math.ceil(reach), delta)

    def most_of(rate: float) -> float:
        return float(np.min(np.exp(epsilons) * rate + deltas))

    return any(low > most_of(high) or 1 - high > most_of(1 - low) for low, high in rates)


@functools.lru_cache(maxsize=64)
def _profile(mechanism: Mechanism, reach: int, delta: float) -> tuple[Floats, Floats]:
    """The privacy profile: epsilons from 0 to `reach`, and delta at each."""
    epsilons = np.linspace(0, reach, 257)
    return epsilons, accounting.privacy_profile(mechanism, epsilons, delta)


def gaussian_family(
    outcomes: Sequence[Outcome], claimed: Mechanism, delta: float, confidence: float = 0.95
) -> float:
    """A lower bound on epsilon if the mechanism is `claimed` with another noise multiplier.

    Every noise multiplier above some sigma contradicts the outcomes (`refutes`), so the true one is at most
    that sigma, and epsilon at least that of sigma: by the accountants of the claim, so the claim itself is
    passed exactly when it is refuted. Noise between a 16th and 16 times of the claimed one is looked at.
    """

    def with_noise(factor: float) -> Mechanism:
        return Mechanism(claimed.noise_multiplier * factor, claimed.sample_rate, claimed.steps)

    def refuted(log_factor: float) -> bool:
        return refutes(outcomes, with_noise(math.exp(log_factor)), delta, confidence)

    low, high = -math.log(_SPAN), math.log(_SPAN)
    if not refuted(high):
        return 0.0
    if refuted(0.0):
        high = 0.0
        if refuted(low):
            high = low
    else:
        low = 0.0
    while high - low > 2e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return accounting.epsilon([with_noise(math.exp(high))], delta).epsilon


# Membership


@dataclass(frozen=True)
class Rate:
    """A true positive rate at a false positive rate, with its Clopper-Pearson interval."""

    at: float
    """The largest false positive rate allowed."""
    tpr: float
    low: float
    high: float
    false_positives: int


@dataclass(frozen=True)
class Membership:
    """How well a score tells members from others."""

    auc: float
    auc_low: float
    auc_high: float
    rates: tuple[Rate, ...]
    roc: tuple[tuple[float, float], ...]
    """(false positive rate, true positive rate), from (0, 0) to (1, 1), rising."""


def membership(
    members: Floats, others: Floats, confidence: float = 0.95, at: Sequence[float] = (0.01, 0.001)
) -> Membership:
    """ROC, AUC and true positive rates at the false positive rates `at`, with intervals of `confidence`.

    The interval of the AUC is DeLong's (DeLong, DeLong and Clarke-Pearson 1988), clamped to [0, 1]; it has no
    width where the scores do not overlap. That of a true positive rate is exact for the threshold used, which
    is the one that `others` allow.

    Args:
        members: scores of images that were trained on; higher says "member".
        others: scores of images from the same source that were not.
        confidence: of each interval.
        at: false positive rates.
    """
    from scipy.stats import norm
    from sklearn.metrics import roc_curve

    _check_confidence(confidence)
    if len(members) < 2 or len(others) < 2:
        raise ValueError(f"{len(members)} members and {len(others)} others: expected at least 2 of each")
    labels = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    fpr, tpr, _ = roc_curve(labels, np.concatenate([members, others]), drop_intermediate=False)
    auc, error = _auc(members, others)
    reach = float(norm.ppf(0.5 + confidence / 2)) * error
    return Membership(
        auc=auc,
        auc_low=max(0.0, auc - reach),
        auc_high=min(1.0, auc + reach),
        rates=tuple(_rate(fpr, tpr, target, len(members), len(others), confidence) for target in at),
        roc=tuple(zip(fpr.tolist(), tpr.tolist(), strict=True)),
    )


def _auc(members: Floats, others: Floats) -> tuple[float, float]:
    """The area under the ROC curve and its standard error, by DeLong's method."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([members, others]))
    # The share of the others below each member, and of the members above each other.
    above = (ranks[: len(members)] - rankdata(members)) / len(others)
    below = 1 - (ranks[len(members) :] - rankdata(others)) / len(members)
    variance = above.var(ddof=1) / len(members) + below.var(ddof=1) / len(others)
    return float(above.mean()), math.sqrt(variance)


def _rate(fpr: Floats, tpr: Floats, at: float, members: int, others: int, confidence: float) -> Rate:
    allowed = np.flatnonzero(fpr <= at)[-1]
    found = round(float(tpr[allowed]) * members)
    low, high = clopper_pearson(found, members, confidence)
    return Rate(at, found / members, low, high, round(float(fpr[allowed]) * others))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number in (0, 1)")
