"""Counter-based random numbers: a pure function of names and positions, the same on every device.

Which entries a random method keeps depends only on (random_seed, model reference as written,
occurrence of that reference, output tensor name, flat index). It does not depend on the order of
tensors, the chunking, the thread count, the shard layout or the device, and because an entry is
kept where its fixed u is below the keep probability, masks nest as the density grows.

The hash is version 1 and never changes: exported recipes rely on it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HASH_VERSION = 1
_RANGE = 1 << 31


@dataclass(frozen=True)
class MaskKey:
    """Names one stream of random numbers: one model's part in one output tensor."""

    random_seed: int
    model: str
    occurrence: int
    tensor: str

    def words(self) -> tuple[int, int]:
        """Return two 32-bit words, as signed integers, that key the hash."""
        text = "\x00".join(
            (
                f"v{HASH_VERSION}",
                str(self.random_seed),
                self.model,
                str(self.occurrence),
                self.tensor,
            )
        )
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return (
            int.from_bytes(digest[:4], "little", signed=True),
            int.from_bytes(digest[4:], "little", signed=True),
        )


def _signed(value: int) -> int:
    """Wrap an integer to a signed 32-bit one, as torch's int32 arithmetic does."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def high_word(index: int) -> int:
    """Return what the upper 32 bits of a flat index add to the hash."""
    return _signed((index >> 32) * 0x9E3779B9)


def _shifted(x: Any, bits: int) -> Any:
    """Logical right shift of int32 (torch's is arithmetic)."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def hash_words(k0: Any, k1: Any, low: Any, high: Any) -> Any:
    """Hash indices under a key of two words to uniform 31-bit integers.

    Three multiply-xorshift rounds (the constants of Wellons' `triple32`,
    https://nullprogram.com/blog/2018/07/31/), with the key's first word added before the first
    round and its second word and the index's upper half between rounds, so that the streams of
    two keys are not shifts or permutations of each other.

    Args:
        k0, k1: the key's words.
        low: lower 32 bits of the flat indices, int32, shape (n,); overwritten.
        high: `high_word` of the indices.

    Returns:
        int32, shape (n,), in [0, 2**31); u = value / 2**31.
    """
    x = low
    x ^= k0
    x ^= _shifted(x, 17)
    x *= _signed(0xED5AD4BB)
    x ^= _shifted(x, 11)
    x += k1
    x += high
    x *= _signed(0xAC4C1B51)
    x ^= _shifted(x, 15)
    x *= _signed(0x31848BAB)
    x ^= _shifted(x, 14)
    return x.bitwise_and_(0x7FFFFFFF)


def last_kept(numerator: int, denominator: int) -> int:
    """Return the largest hash that counts as u < numerator / denominator; -1 for none."""
    return min(-(-numerator * _RANGE // denominator), _RANGE) - 1


def above(hashed: Any, last: Any) -> Any:
    """Tell where a hash is above `last`, that is dropped: -1 there, else 0; int32, shape (n,)."""
    # The sign of last - hash, without a comparison; both lie in [-1, 2**31), so nothing wraps.
    return (hashed * -1 + last) >> 31


def uniforms(key: MaskKey, start: int, stop: int) -> Tensor:
    """Return numbers that are uniform in (0, 1): those at the indices start..stop-1 of a stream.

    Returns:
        float64, shape (stop - start,), on the CPU; odd multiples of 2**-32.
    """
    import torch

    index = torch.arange(start, stop, dtype=torch.int64)
    # One value for each index, so that a range may cross a multiple of 2**32.
    high = (index >> 32).to(torch.int32) * high_word(1 << 32)
    hashed = hash_words(*key.words(), index.to(torch.int32), high)
    uniform: Tensor = (hashed.to(torch.float64) + 0.5) / _RANGE
    return uniform


def normals(key: MaskKey, start: int, stop: int) -> Tensor:
    """Return standard normal numbers: those at the indices start..stop-1 of a stream.

    Each is made of two uniform ones, at twice the index and the next (Box and Muller 1958,
    https://doi.org/10.1214/aoms/1177706645); its sine branch is not used.

    Returns:
        float64, shape (stop - start,), on the CPU.
    """
    radius, angle = uniforms(key, 2 * start, 2 * stop).view(-1, 2).unbind(dim=1)
    return (-2.0 * radius.log()).sqrt() * (2.0 * math.pi * angle).cos()
