"""Whose each record is, where an example of the engine is a person: `privacy.unit=person`.

A person has one record or many. The Poisson batch draws persons; each of a person's k draws picks one of the
person's records, uniformly, from a stream of the step's key; the mean loss over the k draws has one gradient,
which is clipped to C once. So a person with all of their records is to the engine what an image is without
this module: k rows of one example.

Guarantees:
    * A person adds at most C to a step's sum, whatever the number of their records, k, the microbatches and
      the number of processes are, because the rows of an example are clipped together. A person who
      contributes nothing instead leaves the batches and draws of all others as they are.
    * The work and the memory of a step follow the number of persons in the batch and k alone, not the number
      of records that any of them has: nothing is padded to the largest.
    * Draw j of the person at position i of a batch is a function of (key of the execution, step, i, j) and of
      the number of their records: not of the microbatch, nor of the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dp_lora.errors import UserError

if TYPE_CHECKING:
    from dp_lora.privacy.step import Draws


class Persons:
    """The records of each of N persons, by offsets into one order of all records.

    Persons are numbered in the order of their first records. `repr` shows neither names nor numbers.

    Attributes:
        offsets: int64 [N + 1]; the records of person i are `order[offsets[i] : offsets[i + 1]]`.
        order: int64 [R], indices of the records.
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        """Of `owners` [R], one for each record: two that are equal are one person.

        Args:
            owners: texts, whose spaces at both ends do not count, or whole numbers.

        Raises UserError for anything else: two names that only look alike would be two persons.
        """
        number: dict[str | int, int] = {}
        known = owners.tolist() if isinstance(owners, np.ndarray | Tensor) else owners
        names = (_name(owner, record) for record, owner in enumerate(known))
        of_record = np.fromiter((number.setdefault(name, len(number)) for name in names), np.int64)
        self.order = torch.from_numpy(np.argsort(of_record, kind="stable"))
        self.offsets = torch.zeros(len(number) + 1, dtype=torch.int64)
        self.offsets[1:] = torch.from_numpy(np.cumsum(np.bincount(of_record, minlength=len(number))))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        return "Persons(<hidden>)"

    def records(self, person: int) -> Tensor:
        """Indices int64 of the records of `person`, in their order."""
        return self.order[int(self.offsets[person]) : int(self.offsets[person + 1])]

    def draw(self, persons: Tensor, draws: Draws, noise_multiplicity: int) -> Tensor:
        """Indices int64 [M, k]: for each of `persons` [M] k of their records, drawn with replacement.

        Args:
            persons: numbers of persons, the rows of a microbatch.
            draws: of that microbatch.
            noise_multiplicity: k.
        """
        first = self.offsets[persons]
        counts = self.offsets[persons + 1] - first
        return self.order[first[:, None] + draws.choices(counts, noise_multiplicity)]

    def means(self, values: Tensor) -> Tensor:
        """float64 [N, ...]: of `values` [R, ...], one for each record, the mean of each person's."""
        flat = values[self.order].double().reshape(len(values), -1)
        counts = self.offsets.diff()
        owner = torch.repeat_interleave(torch.arange(len(self)), counts)
        sums = torch.zeros(len(self), flat.shape[1], dtype=torch.float64).index_add_(0, owner, flat)
        return (sums / counts[:, None]).reshape(len(self), *values.shape[1:])


def _name(owner: Any, record: int) -> str | int:
    """The name of a person, the same for all of their records. Raises UserError."""
    if isinstance(owner, np.generic | Tensor) and owner.ndim == 0:
        owner = owner.item()
    if isinstance(owner, str) and (name := owner.strip()):
        return name
    if isinstance(owner, int) and not isinstance(owner, bool):
        return owner
    raise UserError(
        f"owners: record {record} has {'an empty text' if isinstance(owner, str) else type(owner).__name__}; "
        "expected a person's name or whole number for each record"
    )
