"""Which private sets share images: an index of keyed digests, one for each user of a machine.

A ledger is found by where the images lie. The index is found by who runs the job, so it knows a set again
that was moved, copied, wrapped in another folder or mixed with others, and it keeps a ledger of its own in
which every charge stands under the set whose images it was for. What a run may still spend is computed from
all sets that share an image with its own, and with those, and so on.

It knows images by their decoded pixels (`dp_lora.data.digests`), and by those that are trained on, under a
key that never leaves it. For a run that protects persons it knows them by their names too: sets with other
images of one person share that person. It cannot know what another user or machine spent, images that were
cropped, resized or compressed anew, or what was spent before it was deleted. An image of one colour
identifies nobody and is left out.

Guarantees:
    * Like the ledger of a set, the index knows where each run has come to: a copy of a run that brings its
      ledger along is behind the index, whatever that ledger says.
    * A file of the index that is missing, cut or changed is noticed, and is never taken for less spent: the
      digests of a set by its name, which is a keyed digest of them; the ledger by the file `head`, which
      names its last line; the list of sets by the ledger.

The folder has mode 0700, key and digests 0600: whoever has both can confirm a guess of an image.
"""

from __future__ import annotations

import hmac
import os
import pwd
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from dp_lora.data.digests import SIZE, array_digests
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.jobs.content import digests
from dp_lora.privacy.ledger import Charge, CutShort, Ledger, Settled, Turn
from dp_lora.privacy.marks import Mark
from dp_lora.storage.files import (
    append_line,
    expanded,
    file_lock,
    private_directory,
    read_lines,
    write_atomic,
)

_DTYPE = np.dtype("<u8")
"""Eight bytes an image: of two sets of a million images each, one pair in 2e7 seems to share one."""

_KEY_BYTES = 32

_computed: WeakKeyDictionary[ImageSet, tuple[bytes, np.ndarray]] = WeakKeyDictionary()
"""The key and the keyed digests of sets in memory: a job asks several times."""


def default_folder() -> Path:
    """`$XDG_DATA_HOME/dp_lora/image_index`: it does not depend on where data, outputs or caches lie."""
    given = os.environ.get("XDG_DATA_HOME", "")
    home = expanded(given, f"XDG_DATA_HOME={given}")
    if not home.is_absolute():
        # As the specification of these folders says: another working directory would be another index.
        home = _home() / ".local" / "share"
    return home / "dp_lora" / "image_index"


def _home() -> Path:
    """`$HOME`, or what the system has as the user's home if that is no absolute path."""
    given = os.environ.get("HOME", "")
    if given.startswith("/"):
        return Path(given)
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError as error:
        raise UserError(f"HOME={given}: expected an absolute path, or paths.index=FOLDER") from error


class ImageIndex:
    """The index in `folder`, which is made by the first charge.

    by_person: sets that have a person in common share something too: for a run that protects persons.

    All methods raise UserError when it cannot be used.
    """

    def __init__(self, folder: Path, *, by_person: bool = False) -> None:
        self.folder, self._by_person = folder, by_person
        self._ledger = Ledger(folder / "privacy_ledger.jsonl", head=folder / "head")

    def find(self, images: ImageSplits) -> KnownSet | None:
        """`images` as the index knows them, without a change to it; None while it knows nothing at all."""
        return None if self._is_new() else self._find(images, self._key())

    def register(self, images: ImageSplits) -> KnownSet:
        """The set of `images`, which the index knows from now on."""
        try:
            private_directory(self.folder)
            with file_lock(self.folder / "lock"):
                if self._is_new():
                    write_atomic(self.folder / "sets.jsonl", "", mode=0o600)
                    write_atomic(self.folder / "head", "", mode=0o600)
                    write_atomic(self.folder / "key", os.urandom(_KEY_BYTES), mode=0o600)
                found = self._find(images, self._key())
                path = self._path(found.name)
                if found.name not in self._neighbours():
                    private_directory(path.parent)
                    write_atomic(path, found.images.tobytes(), mode=0o600)
                    append_line(
                        self.folder / "sets.jsonl", {"set": found.name, "shares": sorted(found.shares)}
                    )
        except OSError as error:
            raise UserError(
                f"paths.index={self.folder}: cannot be written ({error.strerror}); expected a folder of "
                "your own, or another paths.index"
            ) from error
        return found

    def together(self, found: KnownSet) -> set[str]:
        """The names of all sets that share images with `found`, or with one that does, itself among them."""
        return _reached(found.name, {**self._neighbours(), found.name: set(found.shares)})

    def charges(self) -> list[Charge]:
        """All charges, each with the run's own number and the set's name in the index."""
        with self._whole():
            return [_by_run(charge) for charge in self._ledger.charges()]

    def apart(self, found: KnownSet) -> set[str]:
        """The runs that the index has seen begin, on images that neither are nor meet those of `found`."""
        together = self.together(found)
        return {run for run, names in self._sets_seen().items() if not names & together}

    def _sets_seen(self) -> dict[str, set[str]]:
        """For each run that the index has seen begin all sets under which it has a charge of it.

        A run that only stood in a ledger when another one was charged was entered for the other one's images,
        and its own are not known.
        """
        found: dict[str, set[str]] = {}
        with self._whole():
            seen = {name.rpartition("@")[0] for name in self._ledger.self_charged()}
            for charge in map(_by_run, self._ledger.charges()):
                if charge.run in seen:
                    found.setdefault(charge.run, set()).add(charge.private_set)
        return found

    def check(self, turn: Turn) -> str | None:
        """As `Ledger.check`; a run that the index does not know may go on."""
        with self._whole():
            return self._ledger.check(turn)

    def settled(self, owner: str) -> Settled:
        """As `Ledger.settled`."""
        with self._whole():
            return self._ledger.settled(owner)

    def mark(self, owner: str) -> Mark:
        """As `Ledger.mark`."""
        return self._ledger.mark(owner)

    def set_of_runs(self, *, seen: bool = False) -> dict[str, str]:
        """For each run that was charged a name that it shares with all runs on images that meet its own.

        seen: of those runs alone that the index has seen begin, so that it knows their images.
        """
        if self._is_new():
            return {}
        neighbours, names = self._neighbours(), dict[str, str]()
        for name in sorted(neighbours):
            for reached in _reached(name, neighbours):
                names.setdefault(reached, name)
        if seen:
            return {run: names[min(own)] for run, own in self._sets_seen().items()}
        return {charge.run: names[charge.private_set] for charge in self.charges()}

    def enter(
        self,
        found: KnownSet,
        mine: Charge,
        others: Sequence[Charge],
        admit: Callable[[Sequence[Charge]], None],
        turn: Turn | None = None,
    ) -> None:
        """Enters `mine` for the set `found`; `admit` is asked, with `charges`, while nobody else can write.

        Of `others`, charges of the same set in its ledger, those are entered too that the index does not
        know: they were made before there was an index, or by another user. `turn` is as in `Ledger.enter`.
        """
        known = {charge.run for charge in self.charges()}
        new = [*(charge for charge in others if charge.run not in known), mine]
        # The set is part of the number: one run may stand under several sets.
        rows = [replace(c, run=f"{c.run}@{found.name}", private_set=found.name) for c in new]
        with self._whole():
            self._ledger.enter_all(rows, lambda indexed: admit([_by_run(c) for c in indexed]), turn)

    def _find(self, images: ImageSplits, key: bytes) -> KnownSet:
        known = [_keyed(part, key) for part in images]
        if self._by_person:
            known += [_keyed_persons(part, key) for part in images]
        own = np.unique(np.concatenate(known))
        name = _name(own, key)
        neighbours = self._neighbours()
        if name in neighbours:
            return KnownSet(name, own, neighbours[name])
        return KnownSet(name, own, {other for other in neighbours if self._shares(other, own, key)})

    def _neighbours(self) -> dict[str, set[str]]:
        """For each set those that share an image with it."""
        path = self.folder / "sets.jsonl"
        if not path.exists():
            raise self._damaged(path.name)
        try:
            rows = read_lines(path)
            found: dict[str, set[str]] = {row["set"]: set(row["shares"]) for row in rows}
            for name, shares in list(found.items()):
                for other in shares:
                    found[other].add(name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged("sets.jsonl") from error
        return found

    def _shares(self, other: str, own: np.ndarray, key: bytes) -> bool:
        path = self._path(other)
        try:
            known = np.fromfile(path, _DTYPE)
        except OSError as error:
            raise self._damaged(f"sets/{path.name}") from error
        if _name(known, key) != other:
            raise self._damaged(f"sets/{path.name}")
        few, many = sorted((own, known), key=len)
        at = np.searchsorted(many, few)
        return bool((many[np.minimum(at, len(many) - 1)] == few).any()) if len(few) else False

    def _path(self, name: str) -> Path:
        return self.folder / "sets" / f"{name}.u64"

    def _is_new(self) -> bool:
        """Without a key, and with nothing that needed one: a crash may have left the first files of it."""
        ledger = self._ledger.path
        charged = ledger.exists() and ledger.stat().st_size > 0
        return not charged and not (self.folder / "key").exists() and not (self.folder / "sets").exists()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Makes sure that what is said about the ledger inside the block is said about a whole one."""
        try:
            if not self._is_new():
                # The charges first: somebody may add a set, and then a charge.
                charged = {charge.private_set for charge in self._ledger.charges()}
                names = self._neighbours()
                if not charged <= names.keys():
                    raise self._damaged("sets.jsonl")
                # Only an index of before has no head, and none has sets without a charge.
                if names and not charged and not (self.folder / "head").exists():
                    raise self._damaged("privacy_ledger.jsonl")
            yield
        except CutShort as error:
            raise self._damaged("privacy_ledger.jsonl") from error

    def _key(self) -> bytes:
        path = self.folder / "key"
        try:
            key = path.read_bytes()
        except OSError as error:
            raise self._damaged("key") from error
        if len(key) != _KEY_BYTES:
            raise self._damaged("key")
        return key

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"paths.index={self.folder}: {what} is not there or damaged, and without it earlier charges of "
            "the same images cannot be found; expected the folder as it was written. Removed as a whole it "
            "begins anew and knows nothing of what was spent"
        )


class KnownSet:
    """A private set as the index knows it. Private; `repr` shows no digest.

    name: of the set. images: its keyed digests, sorted. shares: names of the sets that have some of them.
    """

    def __init__(self, name: str, images: np.ndarray, shares: Iterable[str]) -> None:
        self.name, self.images, self.shares = name, images, frozenset(shares)


def _reached(name: str, neighbours: Mapping[str, Iterable[str]]) -> set[str]:
    """`name`, and all names that can be reached from it."""
    reached, left = {name}, [*neighbours[name]]
    while left:
        other = left.pop()
        if other not in reached:
            reached.add(other)
            left += neighbours[other]
    return reached


def _name(images: np.ndarray, key: bytes) -> str:
    """The name of the set of these keyed digests, sorted."""
    return hmac.digest(key, images.tobytes(), "sha256").hex()[:16]


def _by_run(charge: Charge) -> Charge:
    return replace(charge, run=charge.run.rpartition("@")[0])


def _keyed(part: ImageSet, key: bytes) -> np.ndarray:
    """The keyed digests of the images that show something, uint64 [M]: eight bytes of HMAC-SHA256 each."""
    if part in _computed and _computed[part][0] == key:
        return _computed[part][1]
    # As decoded and as prepared: a file that holds the same picture in another way, inverted or on a
    # background, has the second in common with the first one's.
    both = (digests(part), *(() if part.digests is None else (array_digests(part.images),)))
    rows = np.concatenate(both)[np.tile(~plain(part.images), len(both))].tobytes()
    keyed = b"".join(
        hmac.digest(key, rows[at : at + SIZE], "sha256")[: _DTYPE.itemsize]
        for at in range(0, len(rows), SIZE)
    )
    found = np.frombuffer(keyed, _DTYPE)
    _computed[part] = (key, found)
    return found


def _keyed_persons(part: ImageSet, key: bytes) -> np.ndarray:
    """The keyed digests of the names of the persons, uint64 [M]; longer inputs than those of images."""
    names = () if part.persons is None else sorted(set(part.persons))
    return np.frombuffer(
        b"".join(
            hmac.digest(key, b"person".ljust(SIZE, b"\0") + name.encode(), "sha256")[: _DTYPE.itemsize]
            for name in names
        ),
        _DTYPE,
    )


def plain(images: np.ndarray) -> np.ndarray:
    """bool [N]: whether an image [C, H, W] has one colour."""
    plain = np.empty(len(images), bool)
    for first in range(0, len(images), 4096):
        block = images[first : first + 4096].reshape(*images[first : first + 4096].shape[:2], -1)
        plain[first : first + 4096] = (block.min(axis=2) == block.max(axis=2)).all(axis=1)
    return plain
