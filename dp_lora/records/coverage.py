"""What a guarantee covers and what it does not, in the words of privacy.json and of an adapter's card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

COVERS = (
    "The training of the adapter: the released weights, and everything computed from them alone, such as "
    "generated images, are (epsilon, delta)-differentially private with respect to one private training "
    "image with its label.",
    "The values logged during the private training: the epsilon spent, the learning rate, the norm of the "
    "noised update, the signal-to-noise estimated from it and, where asked for, the loss that the noised sum "
    "tells.",
)
"""The guarantee's coverage, for privacy.json and the card, where one image is protected."""

DOES_NOT_COVER = (
    "Metrics computed on private or held-out images, such as distances and accuracies in result.json.",
    "Hyper-parameters chosen by looking at such metrics: every further training run on the same images "
    "spends its own epsilon.",
    "What the pre-trained model was made from, which has no protection: its public data, adapters that were "
    "merged into it, and images that an adapter had drawn.",
    "A person with several images in the private set: the unit of privacy is one image; for n images of "
    "one person epsilon grows n times and delta by more than that.",
    'The names of the classes, and, where the adjacency is "zero out one image", the number of training '
    "images.",
    "How long steps take and how much memory they use, as seen by whoever watches the machine.",
    "What `dp-lora export` leaves behind of a run, above all its checkpoint/ folder, which holds the noise "
    "key and must stay private.",
)
"""The limits of the guarantee, for privacy.json and the card."""

COVERS_PERSONS = (
    "The training of the adapter: the released weights, and everything computed from them alone, such as "
    "generated images, are (epsilon, delta)-differentially private with respect to one person with all of "
    "their training images, captions and labels, however many these are.",
    COVERS[1],
)
"""The same where a person is protected."""

DOES_NOT_COVER_PERSONS = (
    *DOES_NOT_COVER[:3],
    "Whoever is to be seen in images of somebody else, and persons who belong together, such as a family: "
    "the unit of privacy is one person, as the owner of the set told persons apart.",
    'The names of the classes, and, where the adjacency is "zero out one person", the number of persons. How '
    "many images there are, in all or of anybody, stays private.",
    "How long steps and evaluations take and how much memory they use, as seen by whoever watches the "
    "machine.",
    DOES_NOT_COVER[-1],
)
"""The limits where a person is protected."""

LIVE = (
    "When each step ended, which follows the size of its batch: W&B got the rows while the job trained "
    "(tracking.live)."
)
"""A further limit if W&B shows a private job live."""


SEARCH = (
    "How many trials the search made and how long they took, as seen by whoever watches the machine, or the "
    "queue, the accounting and the reports of a cluster; and whoever reads the private folder of the search."
)
"""A further limit of the best trial of a private search."""


def coverage(unit: str) -> tuple[Sequence[str], Sequence[str]]:
    """The guarantee's coverage and its limits, for one of `schema.UNITS`."""
    return (COVERS_PERSONS, DOES_NOT_COVER_PERSONS) if unit == "person" else (COVERS, DOES_NOT_COVER)


def lines_of_search(record: Mapping[str, Any], at_most: Callable[[float], str]) -> list[str]:
    """What the search of which an adapter is the best trial spent, for its card; empty where there was none.

    Args:
        record: the content of privacy.json.
        at_most: a number in words, rounded up.
    """
    if not (search := record.get("search")):
        return []
    spent, unit = search["epsilon"], str(record.get("unit", "image"))
    return [
        "This adapter is the best of a private search: a random number of trials, each with settings drawn "
        f"from {search['number_of_cells']} choices, of which only this one was released. How many trials "
        "there were, and what became of the others, is private. All of them together spent",
        f"- epsilon {at_most(spent['training'])} for one training {unit},\n"
        f"- epsilon {at_most(spent['held_out'])} for one held-out {unit}, on which trials were scored,\n"
        f"- epsilon {at_most(spent['both'])} for somebody in both,",
        f"each at delta {at_most(record['delta'])} (Papernot and Steinke 2022; the number of trials: "
        f"{search['distribution']}, mean {search['expected_trials']:g}). The noise, sample rate and steps "
        "below are of one trial.",
    ]
