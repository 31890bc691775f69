"""All private randomness of a run: one key, one stream for every (purpose, step), from a stream cipher.

A stream is AES-256 in counter mode under a key that HMAC-SHA256 derives from (run key, purpose, step), after
what the key was `derive`d for: the execution of a step, and for the noise the sum that it protects.
Its words can be read from any row on, so that a slice of a tensor is the same whoever draws it: a
resumed run replays a step exactly, every process of a job draws the same batch and the same noise
without talking, and the size of the microbatches changes no draw.

Guarantees:
    * Without the key, the words cannot be told from uniform ones by anybody who cannot break AES-256.
    * Two different (purpose, step) never share a word; nor do two different labels of `derive` or `bound_to`.
    * A `keyed_digest` tells nothing about its content to whoever does not have the key.
    * The key appears in no repr and cannot be pickled; `checkpoint/` stores `key` by name or not at all.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
_AES_BLOCK = 16
_ZEROS = memoryview(bytes(1 << 20))
# Four draws for each number of the secure noise: see `Randomness.secure_normal`.
_SECURE_DRAWS = 4

Words = npt.NDArray[np.uint64]


class Randomness:
    """One 256-bit key and the streams that come from it.

    Args:
        key: 32 bytes that nobody else knows.
        secure: whether the key came from the operating system; False when it was made from a seed, and
            then the run has no privacy against whoever knows the seed.
    """

    def __init__(self, key: bytes, *, secure: bool) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes: expected {KEY_BYTES}")
        self.key = key
        self.secure = secure

    @classmethod
    def from_system(cls) -> Randomness:
        """A key from the operating system's generator."""
        return cls(secrets.token_bytes(KEY_BYTES), secure=True)

    @classmethod
    def from_seed(cls, seed: int) -> Randomness:
        """The key of a seed, for tests: reproducible, hence no privacy against whoever knows the seed."""
        return cls(hashlib.sha256(f"dp_lora insecure seed {seed}".encode()).digest(), secure=False)

    def derive(self, label: str) -> Randomness:
        """An independent `Randomness` for `label`: what a step that must not replay draws from."""
        return Randomness(self._subkey("derive", label, 0), secure=self.secure)

    def bound_to(self, label: str) -> Randomness:
        """`derive`d for `label`, so that nothing with another label meets the same words.

        The streams of a seed stay those of (purpose, step): they protect nothing, and they are the same
        whatever rounds differently.
        """
        return self.derive(label) if self.secure else self

    def keyed_digest(self, purpose: str, content: bytes) -> str:
        """Hexadecimal HMAC-SHA256 of `content`: nobody without the key can tell by it what the content is."""
        return hmac.new(self._subkey("digest", purpose, 0), content, hashlib.sha256).hexdigest()

    def __repr__(self) -> str:
        return f"Randomness(key=<hidden>, secure={self.secure})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the key of a run is never pickled or copied; store `key` in checkpoint/ by name")

    def _subkey(self, domain: str, purpose: str, step: int) -> bytes:
        if not 0 <= step < 1 << 64:
            raise ValueError(f"step={step}: expected 0 or more")
        # The length in front of the purpose keeps two names from running into each other.
        name = f"dp_lora/{domain}/{len(purpose)}/{purpose}/".encode() + step.to_bytes(8, "big")
        return hmac.new(self.key, name, hashlib.sha256).digest()

    def _stream(self, purpose: str, step: int, first_byte: int, size: int) -> npt.NDArray[np.uint8]:
        """Bytes [first_byte, first_byte + size) of the stream of (purpose, step)."""
        block, skip = divmod(first_byte, _AES_BLOCK)
        counter = modes.CTR(block.to_bytes(_AES_BLOCK, "big"))
        encryptor = Cipher(algorithms.AES(self._subkey("stream", purpose, step)), counter).encryptor()
        out = np.empty(skip + size, dtype=np.uint8)
        view = memoryview(out.data)
        for start in range(0, len(out), len(_ZEROS)):
            part = view[start : start + len(_ZEROS)]
            encryptor.update_into(_ZEROS[: len(part)], part)
        return out[skip:]

    def bits64(self, purpose: str, step: int, rows: range | slice, width: int = 1) -> Words:
        """Uniform 64-bit words uint64 [rows, width]; row i is the same whatever rows are asked for."""
        first, stop = rows.start or 0, rows.stop
        size = 8 * width * (stop - first)
        return self._stream(purpose, step, 8 * width * first, size).view("<u8").reshape(stop - first, width)

    def normal(self, purpose: str, step: int, shape: tuple[int, ...], first_row: int = 0) -> torch.Tensor:
        """Standard normal float32 of `shape` (Box-Muller on 32-bit words, |z| < 6.7).

        Row i of the tensor drawn with `first_row=r` is, bit for bit, row r + i of the whole tensor.
        """
        rows, width = shape[0], math.prod(shape[1:])
        # Rows of a multiple of 16 numbers begin at a block of the cipher and at a vector of the CPU, so
        # that numpy's vector loops round every number of a row alike wherever the row lies.
        pairs = -(-width // 32) * 16
        words = self._stream(purpose, step, 8 * pairs * first_row, 8 * pairs * rows)
        bits = words.view("<u4").reshape(rows, 2, pairs)
        radius = (bits[:, 0] >> 1).astype(np.float32)
        radius += np.float32(0.5)
        radius *= np.float32(2**-31)
        np.log(radius, out=radius)
        radius *= np.float32(-2)
        np.sqrt(radius, out=radius)
        angle = bits[:, 1].astype(np.float32)
        angle *= np.float32(2 * math.pi * 2**-32)
        out = np.empty((rows, 2, pairs), dtype=np.float32)
        np.multiply(radius, np.cos(angle), out=out[:, 0])
        np.multiply(radius, np.sin(angle), out=out[:, 1])
        return torch.from_numpy(out.reshape(rows, 2 * pairs)[:, :width].reshape(shape))

    def secure_normal(self, purpose: str, step: int, size: int) -> torch.Tensor:
        """Standard normal float64 [size] for the DP noise: half the sum of four independent draws.

        The floating-point numbers that a single draw can take have gaps, from which a released value
        may betray its noise-free part (Mironov 2012). A sum of four draws of 53 bits from different
        Box-Muller pairs has no such gaps at the precision of a float32 and makes the search that
        inverts the generator infeasible (Holohan and Braghin 2021, n = 2). Round to float32 only
        after the noise has been added.
        """
        total = np.zeros(size, dtype=np.float64)
        # Pieces that stay in the processor's cache.
        for start in range(0, size, 16384):
            stop = min(start + 16384, size)
            words = self.bits64(purpose, step, range(start, stop), 2 * _SECURE_DRAWS)
            uniform = (words >> np.uint64(11)).T.astype(np.float64)
            uniform += 0.5
            uniform *= 2.0**-53
            radius = np.sqrt(-2.0 * np.log(uniform[:_SECURE_DRAWS]))
            # Only the cosine of each pair: the four draws of a number share nothing.
            total[start:stop] = (radius * np.cos(2.0 * math.pi * uniform[_SECURE_DRAWS:])).sum(0)
        return torch.from_numpy(total / math.sqrt(_SECURE_DRAWS))

    def choices(
        self, purpose: str, step: int, counts: torch.Tensor, width: int, first_row: int = 0
    ) -> torch.Tensor:
        """Choices int64 [M, width], one row for an example: uniform in [0, counts[i]) up to counts[i] / 2^64.

        Row i is the same whatever rows are asked for: M rows from `first_row` on.

        Args:
            purpose, step: name the stream.
            counts: int64 [M], at least 1 and below 2^31.
            width: number of choices for each example.
            first_row: position of the first example.
        """
        words = self.bits64(purpose, step, range(first_row, first_row + len(counts)), width)
        of = counts.numpy().astype(np.uint64)[:, None]
        # The upper half of the product of 64 and 31 bits.
        high, low = words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)
        drawn = (high * of + (low * of >> np.uint64(32))) >> np.uint64(32)
        return torch.from_numpy(drawn.astype(np.int64))

    def timesteps(
        self,
        step: int,
        rows: int,
        noise_multiplicity: int,
        num_train_timesteps: int,
        stratified: bool,
        first_row: int = 0,
    ) -> torch.Tensor:
        """Timesteps int64 [rows, k] in [0, T), one row for an example.

        Independent uniform draws, or stratified: draw j of an example is uniform in
        [j T / k, (j + 1) T / k), so that the k draws of an example cover the range and their mean loss
        varies less. Both have the same expectation of the loss; neither depends on the data.
        """
        k, total = noise_multiplicity, num_train_timesteps
        assert k * total < 1 << 31, "timesteps are computed in 64-bit integers"
        words = self.bits64("timesteps", step, range(first_row, first_row + rows), k) >> np.uint64(32)
        if stratified:
            position = words + (np.arange(k, dtype=np.uint64) << np.uint64(32))
            drawn = position * np.uint64(total) // np.uint64(k << 32)
        else:
            drawn = words * np.uint64(total) >> np.uint64(32)
        return torch.from_numpy(drawn.astype(np.int64))
