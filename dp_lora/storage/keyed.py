"""Names of what is kept of private content, which tell nothing to whoever does not hold a key.

A plain digest of an image set confirms a guess: whoever knows all images but one can compute it with and
without the last and see which of the two is there. So a file whose content depends on private images is named
by an HMAC under a key that lies in the cache beside it, readable by its owner only. All jobs that share the
cache share the key, and with it the files.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from dp_lora.errors import UserError
from dp_lora.storage.files import file_lock, private_directory, write_atomic

KEY = "names.key"
"""The key's file in the cache."""

_KEY_BYTES = 32
_FORMER = {
    "latents": r"[0-9a-f]{32}\.safetensors",
    "images": r"[0-9a-f]{32}\.safetensors",
    "evaluation": r"[0-9a-f]{32}\.safetensors",
    "locks": r"(latents|images)-[0-9a-f]{32}\.lock",
}
"""Names that earlier versions gave by plain digests of the content, by their folder in the cache."""


def keyed_name(cache: Path, content: str) -> str:
    """40 hexadecimal digits for `content`: equal for equal content, and random without the cache's key.

    Guarantee: HMAC-SHA-256 under 256 random bits, so that a name neither confirms nor refutes a guess of the
    content, whatever names of other contents are known.

    Args:
        cache: `paths.cache`; its key is made when there is none.
        content: everything that determines what is kept, or a digest of it.

    Raises UserError as `secret_key`.
    """
    path = cache.expanduser() / KEY
    if not path.exists():
        _make_key(path)
    return hmac.new(secret_key(path), content.encode(), hashlib.sha256).hexdigest()[:40]


def secret_key(path: Path) -> bytes:
    """The 32 random bytes of the key in `path`, whose file nobody but its owner can read afterwards.

    Raises UserError when it is no key, or another user's.
    """
    try:
        key = path.read_bytes()
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except PermissionError as error:
        raise UserError(
            f"paths.cache: {path} belongs to another user; expected a cache of your own (paths.cache)"
        ) from error
    if len(key) != _KEY_BYTES:
        raise UserError(
            f"paths.cache: {path} has {len(key)} bytes, expected the {_KEY_BYTES} of a key; remove it, and "
            "what is cached is made again"
        )
    return key


def _make_key(path: Path) -> None:
    """Makes the key once, whichever jobs ask at the same time, and takes away what had plain names."""
    with file_lock(private_directory(path.parent / "locks") / f"{path.name}.lock"):
        if not path.exists():
            _remove_former(path.parent)
            write_atomic(path, secrets.token_bytes(_KEY_BYTES), mode=0o600)


def _remove_former(cache: Path) -> None:
    """Removes the files that earlier versions named by digests of private images; they are made again."""
    for folder, pattern in _FORMER.items():
        if (cache / folder).is_dir():
            for name in os.listdir(cache / folder):
                if re.fullmatch(pattern, name):
                    (cache / folder / name).unlink(missing_ok=True)
