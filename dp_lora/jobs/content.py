"""The record of a run's images in its private `checkpoint/`, by which its stages know them again.

A command names its images by a folder, and what lies in the folder can change. A run that went on with other
images would mix two sets in one adapter, draw one set's classes under the other's names, or compare what one
set gave with the other.

Guarantee: a stage of a run that has this record either sees the images, labels, captions, classes and roles
that the run began with, or ends with one line that says what is different, and has written nothing.

Two digests tell an image: that of its file's pixels, which decides its role, and that of the pixels that are
trained on. The first alone is not enough: a file that is written again with the same numbers in other bits,
with black and white exchanged, or with another transparent value, is another image to train on.

The record holds keyed digests (HMAC-SHA256 under a key of its own) and the names of the classes, which the
adapter shows too. It is as private as the images, since it confirms a guess of the whole set.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from dp_lora.data.digests import array_digests
from dp_lora.data.sets import ImageSet, ImageSplits
from dp_lora.errors import UserError
from dp_lora.privacy.collectives import agreed, largest, size
from dp_lora.records.run_directory import OUTPUTS, WAY_OUT
from dp_lora.storage.files import private_directory, read_json, write_json

NAME = "content.json"
"""The record's name in the private `checkpoint/`."""

_SAID = {
    "classes": "the names of the classes",
    "numbers": "the number of images",
    "pixels": "the pixels",
    "roles": "the roles of the images",
    "labels": "the labels",
    "captions": "the captions",
    "persons": "whose the images are",
    "order": "the order of the images",
    "prepared": "the pixels as they are trained on (as this Pillow reads and resizes the files)",
}
"""The possible differences, in words; the first one that applies causes most of those below it."""

FIELDS = frozenset({"key", *_SAID}) - {"prepared", "persons"}
"""The fields that every record has, those of earlier versions too."""


def digests(images: ImageSet) -> np.ndarray:
    """uint8 [N, 32]: of the images as they were decoded; of the prepared ones where no others are known."""
    known = None if images.public else images.digests
    return array_digests(images.images) if known is None else known


def content_of(images: ImageSplits, key: str) -> dict[str, Any]:
    """The record of `images` under the hexadecimal `key`: equal for equal content, and for no other."""
    roles = [digests(part) for part in images]
    labels = [part.labels[:, None].astype("<i8").view(np.uint8) for part in images]
    captions = [_texts(part.captions, len(part)) for part in images]
    whose = [_texts(part.persons, len(part)) for part in images]
    known = all(part.persons is not None for part in images)

    def keyed(*parts: bytes) -> str:
        mac = hmac.new(bytes.fromhex(key), digestmod=hashlib.sha256)
        for part in parts:
            # Each behind its length, so that no two lists of parts are one text.
            mac.update(len(part).to_bytes(8, "big"))
            mac.update(part)
        return mac.hexdigest()

    persons = {"persons": keyed(*(_sorted(np.hstack(both)) for both in zip(roles, whose, strict=True)))}
    return {
        "key": key,
        "classes": list(images.train.classes),
        "numbers": keyed(json.dumps([len(part) for part in images]).encode()),
        "pixels": keyed(_sorted(np.concatenate(roles))),
        "roles": keyed(*(_sorted(part) for part in roles)),
        "labels": keyed(*(_sorted(np.hstack(both)) for both in zip(roles, labels, strict=True))),
        "captions": keyed(*(_sorted(np.hstack(both)) for both in zip(roles, captions, strict=True))),
        "order": keyed(*(part.tobytes() for part in roles)),
        "prepared": keyed(*(_prepared(part) for part in images)),
        **(persons if known else {}),
    }


def _prepared(images: ImageSet) -> bytes:
    """A digest of the images as they are trained on, in their order."""
    hashed = hashlib.sha256(f"{images.images.shape}".encode())
    for first in range(0, len(images), 4096):  # which may be mapped from the disk
        hashed.update(np.ascontiguousarray(images.images[first : first + 4096]).data)
    return hashed.digest()


def _sorted(rows: np.ndarray) -> bytes:
    """The rows of uint8 [N, W] in one order, whatever theirs was."""
    # By their first and last eight bytes: different digests that begin alike do not occur.
    first, last = (np.ascontiguousarray(rows[:, part]).view(">u8")[:, 0] for part in np.s_[:8, -8:])
    return rows[np.lexsort((last, first))].tobytes()


def _texts(texts: np.ndarray | None, count: int) -> np.ndarray:
    """uint8 [N, 32]: a digest of each of the captions or persons; [N, 0] without any."""
    if texts is None:
        return np.empty((count, 0), np.uint8)
    found = b"".join(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts)
    return np.frombuffer(found, np.uint8).reshape(count, 32)


def changes(images: ImageSplits, record: dict[str, Any]) -> list[str]:
    """Lists in words what of `images` is not as in `record`; empty if nothing differs.

    Records of earlier versions say nothing of the prepared pixels, and none of persons where nobody asked
    whose the images are: all else is compared.
    """
    now = content_of(images, record["key"])
    now, record = {**record, **now}, {**now, **record}
    different = [name for name in _SAID if now.get(name) != record.get(name)]
    # The first of the rest has the others in its wake, and other names of classes have all but two.
    first = next((name for name in different if name != "classes"), None)
    if "classes" not in different:
        return [] if first is None else [_SAID[first]]
    return [_SAID["classes"], *([_SAID[first]] if first in ("numbers", "pixels") else [])]


def keep(images: ImageSplits, folder: Path) -> None:
    """Writes the record of a run that begins into `folder`, its `checkpoint/`.

    A run that goes on without one gets none: nobody knows what it began with. Raises UserError when there is
    one already and `images` are others.
    """
    reason = refusal(images, folder)
    if reason is not None:
        raise UserError(reason)
    path = private_directory(folder) / NAME
    if not path.exists() and not (folder / "plan.json").exists():
        write_json(path, content_of(images, secrets.token_hex(32)), mode=0o600)


def agree(images: ImageSplits) -> None:
    """Raises UserError, in all processes of a job, unless every one of them has read the same images."""
    if size() == 1:
        return
    own = content_of(images, agreed(secrets.token_hex(32)))
    if largest(own != agreed(own)):
        raise UserError(
            "data: the processes of this job have read different images; expected the same ones on every node"
        )


def refusal(images: ImageSplits, folder: Path) -> str | None:
    """Why the run of the private `folder` must not see `images`; None where they are what it began with.

    A run without a record, as earlier versions left them, is not refused: `unknown` says so.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        found = changes(images, read_json(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}: cannot be read ({type(error).__name__}); expected it as it was written: {WAY_OUT}"
    if not found:
        return None
    return (
        f"data: {_listed(found)} changed since this run began ({folder.parent}): expected the images that it "
        "was made from. Bring them back; or, to train on the new ones, move the run directory away or choose "
        "another paths.outputs: that is a new run, charged by itself"
    )


def unknown(directory: Path) -> str | None:
    """The message for the owner of a run that was begun and has no record; None for all other runs."""
    path = directory / "checkpoint" / NAME
    begun = (directory / OUTPUTS["finetune"], path.with_name("plan.json"))
    if path.exists() or not any(one.exists() for one in begun):
        return None
    return (
        f"data: {path} is not there, so these images cannot be compared with those that the run was made "
        "from; put it back, or make sure yourself that they are the same"
    )


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
