"""The files of a user's own set: in a folder, or in a zip archive, of which nothing is written to a disk.

Hidden files, and what Windows, macOS and network drives leave behind, are passed over. The latter is counted.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

_LITTER = frozenset(
    (
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r"),
        *("__macosx", "__pycache__", "@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found"),
        *("system volume information", ".ds_store", ".appledouble", ".spotlight-v100", ".trashes"),
        *(".fseventsd", ".temporaryitems", ".directory", ".picasa.ini"),
    )
)
"""Left behind by operating systems; in lower case."""


def is_seen(name: str) -> bool:
    """Whether a file or folder of this name may belong to a set.

    >>> [is_seen(name) for name in ("cat", ".hidden", "Thumbs.db", "._0.png")]
    [True, False, False, False]
    """
    return not name.startswith(".") and name.lower() not in _LITTER


def _litter(name: str) -> str | None:
    """What a file or folder of this name is counted as where an operating system left it; else None."""
    if name.startswith("._"):
        return "._*"
    return name.strip() if name.lower() in _LITTER else None


class Member:
    """A file or folder in a zip archive, with those methods of `Path` that reading a set needs."""

    __slots__ = ("archive", "inside")

    def __init__(self, archive: Archive, inside: str) -> None:
        self.archive, self.inside = archive, inside

    @property
    def name(self) -> str:
        return PurePosixPath(self.inside).name if self.inside else self.archive.path.name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def is_dir(self) -> bool:
        return self.inside in self.archive.folders

    def iterdir(self) -> Iterator[Member]:
        return (self / name for name in self.archive.folders[self.inside])

    def read_bytes(self) -> bytes:
        """The content. Raises OSError where it is damaged."""
        return self.archive.read(self.inside)

    def __truediv__(self, name: str) -> Member:
        return Member(self.archive, f"{self.inside}/{name}" if self.inside else name)

    def __str__(self) -> str:
        return self.archive.place(self.inside)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Member) and (self.archive, self.inside) == (other.archive, other.inside)

    def __hash__(self) -> int:
        return hash(self.inside)

    def __lt__(self, other: Member) -> bool:
        return self.inside.split("/") < other.inside.split("/")


Place = Path | Member


class Archive:
    """A zip archive, or several that lie in one folder, each of which stands for a folder of its name.

    Args:
        path: the archive, or the folder of several.
        several: the archives in it by the names of the folders that they stand for. If an archive holds one
            folder of the same name, this is that folder.

    Raises OSError or BadZipFile for what is no archive, or needs a password.
    """

    def __init__(self, path: Path, several: Mapping[str, Path] | None = None) -> None:
        self.path = path
        self.folders: dict[str, dict[str, None]] = {"": {}}
        """The names in each folder."""
        self.paths: dict[str, Path] = {"": path} if several is None else dict(several)
        """Each archive by the name of the folder that it stands for; empty for the only one."""
        self._members: dict[str, tuple[zipfile.ZipFile, zipfile.ZipInfo]] = {}
        for name, one in self.paths.items():
            self._add(name, zipfile.ZipFile(one))

    def _add(self, name: str, opened: zipfile.ZipFile) -> None:
        members = [(_parts(member.filename), member) for member in opened.infolist()]
        members = [(parts, member) for parts, member in members if parts]
        first = {parts[0] for parts, _ in members if is_seen(parts[0])}
        same = len(first) == 1 and first.pop().lower() == name.lower()
        for parts, member in members:
            if member.flag_bits & 1:
                raise OSError("it needs a password")
            if ".." in parts:
                raise OSError(f"it holds {member.filename!r}, which leads out of it")
            if same and is_seen(parts[0]):
                parts[0] = name
            elif name:
                parts.insert(0, name)
            for depth, part in enumerate(parts):
                self.folders.setdefault("/".join(parts[:depth]), {})[part] = None
            if member.filename.endswith(("/", "\\")):
                self.folders.setdefault("/".join(parts), {})
            else:
                inside = "/".join(parts)
                if inside in self._members:
                    raise OSError(f"it holds {member.filename!r} twice")
                self._members[inside] = (opened, member)

    def place(self, inside: str) -> str:
        """The path of a member as an error shows it: that of its archive, and that in it."""
        if "" in self.paths:
            return f"{self.path}/{inside}" if inside else str(self.path)
        name, _, rest = inside.partition("/")
        return f"{self.paths.get(name, self.path)}/{rest}" if rest else str(self.paths.get(name, self.path))

    def read(self, inside: str) -> bytes:
        """The content of a member. Raises OSError where it is damaged, or packed in an unknown way."""
        opened, member = self._members[inside]
        try:
            return opened.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise OSError(f"damaged in the archive ({error})") from error


def _parts(name: str) -> list[str]:
    """The parts of a member's path. Windows' own tools write backslashes."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


class Visible:
    """What lies in the folders of one set and is neither hidden nor left behind by an operating system."""

    def __init__(self) -> None:
        self._inside: dict[Place, list[Place]] = {}
        self._folders: set[Place] = set()
        self._skipped: Counter[str] = Counter()

    def __call__(self, folder: Place) -> list[Place]:
        """The sorted files and folders in `folder`. Raises OSError where it cannot be read."""
        if folder not in self._inside:
            self._inside[folder] = self._look(folder)
        return self._inside[folder]

    def _look(self, folder: Place) -> list[Place]:
        found: list[tuple[str, bool]]
        if isinstance(folder, Path):
            with os.scandir(folder) as entries:
                found = [(entry.name, _is_folder(entry)) for entry in entries]
        else:
            found = [(member.name, member.is_dir()) for member in folder.iterdir()]
        inside: list[Place] = []
        for name, is_dir in found:
            if is_seen(name):
                inside.append(folder / name)
                if is_dir:
                    self._folders.add(folder / name)
            elif (kind := _litter(name)) is not None:
                self._skipped[kind] += 1
        return sorted(inside, key=lambda place: place.name)

    def is_dir(self, place: Place) -> bool:
        """Whether `place`, which lay in a folder that was looked into, is a folder."""
        return place in self._folders

    def files(self, folder: Place) -> Iterator[tuple[str, Place]]:
        """All files in `folder` and below, each with its path from there. No folder is entered twice."""
        entered: set[str] = set()

        def below(place: Place, prefix: str) -> Iterator[tuple[str, Place]]:
            real = os.path.realpath(place) if isinstance(place, Path) else str(place)
            if real in entered:  # a link that leads back
                return
            entered.add(real)
            for inside in self(place):
                if self.is_dir(inside):
                    yield from below(inside, f"{prefix}{inside.name}/")
                else:
                    yield prefix + inside.name, inside

        return below(folder, "")

    def tell_skipped(self, tell: Callable[[str], None], field: str) -> None:
        """Tells the owner how much of what operating systems left behind was skipped so far, if anything."""
        if self._skipped:
            listed = ", ".join(f"{name} {count}" for name, count in sorted(self._skipped.items()))
            number = self._skipped.total()
            tell(f"{field}: skipped {number} left behind by operating systems or tools: {listed}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False
