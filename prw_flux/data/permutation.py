"""A shuffled epoch without a list of it: any place of the shuffle in constant time and memory.

A Feistel network over pairs: x = (l, r) with l in [0, a), r in [0, b), a = ceil(sqrt(N)) and
b = ceil(N / a). A round replaces (l, r) by (l + F_i(r) mod a, r), the next one by
(l, r + F_i(l) mod b); each can be undone, so the whole is a bijection of [0, a b). Results at or
above N are sent through again ("cycle walking") until they fall below it, which makes it one of
[0, N); as a b < N + a, that is rarely needed. F_i is the finaliser of splitmix64 of its argument
and the key of the round. Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.

It is a shuffle, not a cipher: nobody tries to guess the order of training samples.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS: Final = 8


@final
class Permutation:
    """The shuffle of [0, size) that belongs to a key; the same on every machine.

    Args:
        size: N, at least 1 and below 2^62.
        key: whatever decides the shuffle, compared by its text: ``(seed, "edit", epoch)``.

    Raises:
        ValueError: the size is out of range.
    """

    def __init__(self, size: int, *key: object) -> None:
        if not 1 <= size < 2**62:
            raise ValueError(f"cannot shuffle {size} samples; there must be at least 1")
        self.size = size
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        self._keys = _round_keys(key)

    def __call__(self, places: ArrayLike) -> NDArray[np.int64]:
        """Which sample is at each place: int64 [...] in [0, N) -> int64 [...] in [0, N).

        Raises:
            IndexError: a place is outside [0, N).
        """
        x = np.array(places, dtype=np.int64)
        if x.size and not (0 <= x.min() and x.max() < self.size):
            raise IndexError(f"places must lie in [0, {self.size}), got {x.min()} to {x.max()}")
        flat = self._once(x.reshape(-1))
        outside = np.flatnonzero(flat >= self.size)
        while outside.size:
            flat[outside] = self._once(flat[outside])
            outside = outside[flat[outside] >= self.size]
        return flat.reshape(x.shape)

    def _once(self, x: NDArray[np.int64]) -> NDArray[np.int64]:
        left, right = x % self._a, x // self._a
        for i, key in enumerate(self._keys):
            if i % 2:
                right = (right + _mix(left, key) % self._b) % self._b
            else:
                left = (left + _mix(right, key) % self._a) % self._a
        return right * self._a + left


def _round_keys(key: tuple[object, ...]) -> NDArray[np.uint64]:
    text = "\0".join(map(str, key))
    digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(x: NDArray[np.int64], key: np.uint64) -> NDArray[np.int64]:
    """63 well mixed bits of each value, as int64."""
    z = (x.astype(np.uint64) ^ key) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
