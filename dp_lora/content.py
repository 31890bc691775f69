"""What a run was made from: a record in its private `checkpoint/`, by which its stages know its images again.

A command names its images by a folder, and what lies in the folder can change. A run that went on with other
images would mix two sets in one adapter, draw one set's classes under the other's names, or compare what one
set gave with the other.

Guarantee: a stage of a run that has this record either sees the images, labels, captions, classes and roles
that the run began with, or ends with one line that says what is different, and has written nothing.

The record holds keyed digests (HMAC-SHA256 under a key of its own) and the names of the classes, which the
adapter shows too. It is as private as the images, since it confirms a guess of the whole set.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dp_lora.data import ImageSet, ImageSplits
from dp_lora.digests import array_digests
from dp_lora.errors import UserError
from dp_lora.files import private_directory, read_json, write_json
from dp_lora.processes import agreed, largest, size

NAME = "content.json"
"""The record's name in the private `checkpoint/`."""

_SAID = {
    "classes": "the names of the classes",
    "numbers": "the number of images",
    "pixels": "the pixels",
    "roles": "the roles or the order of the images",
    "labels": "the labels",
    "captions": "the captions",
}
"""What can be different, in words, the coarsest first."""


def digests(images: ImageSet) -> np.ndarray:
    """uint8 [N, 32]: of the images as they were decoded; of the prepared ones where no others are known."""
    return array_digests(images.images) if images.digests is None else images.digests


def content_of(images: ImageSplits, key: str) -> dict[str, Any]:
    """The record of `images` under the hexadecimal `key`: equal for equal content, and for no other."""
    roles = [digests(part) for part in images]
    everything = np.concatenate(roles)

    def keyed(*parts: bytes) -> str:
        mac = hmac.new(bytes.fromhex(key), digestmod=hashlib.sha256)
        for part in parts:
            # Each behind its length, so that no two lists of parts are one text.
            mac.update(len(part).to_bytes(8, "big"))
            mac.update(part)
        return mac.hexdigest()

    return {
        "key": key,
        "classes": list(images.train.classes),
        "numbers": keyed(json.dumps([len(part) for part in images]).encode()),
        "pixels": keyed(_sorted(everything).tobytes()),
        "roles": keyed(*(part.tobytes() for part in roles)),
        "labels": keyed(*(np.ascontiguousarray(part.labels).tobytes() for part in images)),
        "captions": keyed(*_captions(images)),
    }


def _sorted(found: np.ndarray) -> np.ndarray:
    """The rows of `found` uint8 [N, 32] in an order that their own does not decide."""
    # By their first eight bytes: different digests that begin alike do not occur.
    return found[np.argsort(np.ascontiguousarray(found[:, :8]).view(">u8")[:, 0], kind="stable")]


def _captions(images: ImageSplits) -> Iterator[bytes]:
    for part in images:
        yield json.dumps(None if part.captions is None else part.captions.tolist()).encode()


def changes(images: ImageSplits, record: dict[str, Any]) -> list[str]:
    """What of `images` is not as in `record`, in words; an empty list where all of it is."""
    now = content_of(images, record["key"])
    different = [name for name in _SAID if now[name] != record[name]]
    if "numbers" in different:
        # What follows from it says nothing more.
        different = [name for name in different if name in ("classes", "numbers")]
    elif "pixels" in different:
        different = [name for name in different if name != "roles"]
    return [_SAID[name] for name in different]


def keep(images: ImageSplits, folder: Path) -> None:
    """Writes the record of a run that begins into `folder`, its `checkpoint/`.

    Raises UserError when there is one already and `images` are others.
    """
    reason = refusal(images, folder)
    if reason is not None:
        raise UserError(reason)
    path = private_directory(folder) / NAME
    if not path.exists():
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

    A run without a record, as earlier versions left them, has nothing to say.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        found = changes(images, read_json(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}: cannot be read ({type(error).__name__}); expected it as it was written"
    if not found:
        return None
    return (
        f"data: {_listed(found)} changed since this run began ({folder.parent}): expected the images that it "
        "was made from. Bring them back; or, to train on the new ones, move the run directory away or choose "
        "another paths.outputs: that is a new run, charged by itself"
    )


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
