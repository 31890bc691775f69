"""Whose an image is: by a column of a table, or by a pattern that is found in the paths of files.

A person is a text; two are one person when the texts are equal, without the spaces around them. Persons are
as private as their images, and so is how many images anybody has: what is said of them is for the owner.

A person draws one role for all of their images, by a hash of their name with a public salt against a fixed
fraction. So whoever adds, removes or changes images of one person moves nobody else, and no role shares a
person with another one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dp_lora.config.schema import DataConfig
from dp_lora.data.images import Part, Request
from dp_lora.data.pixels import shown
from dp_lora.errors import PrivateRefusal, UserError

ROLE_SALT = b"dp_lora roles of persons 1"
"""Public and fixed for ever: whoever knows the name of a person can tell their role."""


class Unowned(PrivateRefusal):
    """Images that are nobody's or several persons', all of them."""

    def __init__(self, wrong: Sequence[tuple[str, str]], given: str) -> None:
        self.wrong = wrong
        """Each image, and the reason."""
        lines = [f"{name}: {why}" for name, why in wrong]
        if len(lines) == 1:
            super().__init__(f"{given}: {lines[0]}; expected one person for each image")
        else:
            head = f"{given}: {len(lines)} images without one person; expected one for each:"
            super().__init__("\n".join([head, *(f"  {line}" for line in lines)]))


def asked(data: DataConfig) -> bool:
    """Whether the set is asked whose its images are."""
    return data.person_column is not None or data.person_pattern is not None


def given(data: DataConfig, field: str) -> str:
    """The setting that asks whose an image is, and its value."""
    name = "person_column" if data.person_column is not None else "person_pattern"
    return f"{field}.{name}={getattr(data, name)}"


def by_column(values: Sequence[Any], names: Sequence[str], request: Request) -> np.ndarray:
    """The persons str [N] of the `values` of `data.person_column`.

    Args:
        values: texts or whole numbers, one for each image.
        names: what an error calls each image.

    Raises Unowned with all images without a person.
    """
    return _of_each([[] if value is None else [_text(value, request)] for value in values], names, request)


def by_pattern(paths: Sequence[str], request: Request) -> np.ndarray:
    """The persons str [N] that `data.person_pattern` finds in the `paths` of the images in their set.

    Raises Unowned with all images in whose paths it finds no person, or two.
    """
    pattern = re.compile(request.data.person_pattern or "")
    found = [[match[1] or "" for match in pattern.finditer(path)] for path in paths]
    if paths and not any(found):
        raise PrivateRefusal(
            f"{given(request.data, request.field)}: is found in none of the {len(paths)} paths of the "
            f"images, such as {shown(paths[0])!r}; expected a pattern whose first group is the person"
        )
    return _of_each(found, paths, request)


def _text(value: Any, request: Request) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PrivateRefusal(
            f"{given(request.data, request.field)}: values of {type(value).__name__}, expected texts or "
            "whole numbers"
        )
    return str(value)


def _of_each(found: Iterable[Sequence[str]], names: Sequence[str], request: Request) -> np.ndarray:
    """The one person of each image, of all that were `found` for it."""
    wrong, persons, same = list[tuple[str, str]](), list[str](), dict[str, str]()
    for name, several in zip(names, found, strict=True):
        one = list(dict.fromkeys(person.strip() for person in several))
        if len(one) > 1:
            wrong.append((shown(name), f"several persons ({', '.join(map(shown, one))})"))
        elif not one or not one[0]:
            wrong.append((shown(name), "no person"))
        # One object for all images of a person.
        persons.append(same.setdefault(one[0], one[0]) if one else "")
    if wrong:
        error = Unowned(wrong, given(request.data, request.field))
        if request.refuse is None:
            raise error
        request.refuse(error)
    return np.array(persons, dtype=object)


def shares(persons: np.ndarray, purpose: str) -> np.ndarray:
    """For each image a number float64 [N] in [0, 1), uniform over persons, by its person and `purpose` alone.

    The first 53 bits of SHA-256 of (`ROLE_SALT`, purpose, name of the person).
    """
    salt = ROLE_SALT + b" " + purpose.encode() + b" "
    of_person: dict[str, float] = {}
    for person in dict.fromkeys(persons):
        word = hashlib.sha256(salt + person.encode("utf-8", "surrogatepass")).digest()[:8]
        of_person[person] = (int.from_bytes(word, "big") >> 11) / 2.0**53
    return np.fromiter((of_person[person] for person in persons), np.float64, len(persons))


def number(part: Part) -> int:
    """Of persons in `part`; of images where it has no persons."""
    return len(part.labels) if part.persons is None else len(set(part.persons))


def refuse_unread(parts: Iterable[Part], data: DataConfig, field: str) -> None:
    """Raises UserError where persons were asked for and the set was not read from what could tell them."""
    if asked(data) and any(part.persons is None for part in parts):
        what = (
            "a table or metadata.csv" if data.person_column is not None else "files with names of their own"
        )
        raise UserError(
            f"{given(data, field)}: {data.name} was not read from {what}; expected a set that is, or "
            "privacy.unit=image"
        )


def refuse_shared(parts: Mapping[str, Part], field: str) -> None:
    """Raises PrivateRefusal with all persons who have images in several of the roles `parts`."""
    roles: dict[str, list[str]] = {}
    for role, part in parts.items():
        for person in dict.fromkeys(() if part.persons is None else part.persons):
            roles.setdefault(person, []).append(role)
    shared = [
        f"{shown(person)}: {', '.join(several)}" for person, several in roles.items() if len(several) > 1
    ]
    if shared:
        head = (
            f"{field}.source: {len(shared)} persons have images in several roles; expected one role for each:"
        )
        raise PrivateRefusal("\n".join([head, *(f"  {line}" for line in shared)]))


def tell_shared_pictures(parts: Iterable[Part], pictures: Iterable[np.ndarray], request: Request) -> None:
    """Tells the owner of pictures that several persons have: who leaves then leaves the picture behind.

    pictures: for each part uint64 [N], a number for each image, the same for the same pixels.
    """
    owners: dict[int, str] = {}
    shared: set[int] = set()
    for part, of_part in zip(parts, pictures, strict=True):
        for person, picture in zip(
            () if part.persons is None else part.persons, of_part.tolist(), strict=False
        ):
            if owners.setdefault(picture, person) != person:
                shared.add(picture)
    if shared:
        request.tell(
            f"{request.field}: pictures that several persons have (the same pixels): {len(shared)}; what "
            "protects one of them protects the picture of that one alone"
        )
