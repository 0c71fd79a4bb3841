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
from collections.abc import Sequence
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


@final
class BlockPermutation:
    """A shuffle that stays in a few blocks at a time: of shards that are costly to open.

    The blocks are permuted and cut into windows of `window` of them; the samples of a window are
    permuted together. It is a bijection of [0, N) as both steps are.

    Args:
        blocks: B sizes with sum N; the samples of a block have consecutive numbers.
        window: how many blocks are open at a time.
        key: as of `Permutation`.

    Raises:
        ValueError: no blocks, an empty one, or a window of none.
    """

    def __init__(self, blocks: Sequence[int], window: int, *key: object) -> None:
        if not blocks or min(blocks) < 1 or window < 1:
            raise ValueError(f"cannot shuffle {len(blocks)} blocks in windows of {window}")
        self._key, self._window = key, window
        self._first_B = np.cumsum([0, *blocks[:-1]])
        self._order_B = Permutation(len(blocks), *key, "blocks")(np.arange(len(blocks)))
        self._size_B = np.array(blocks)[self._order_B]
        self._end_B = np.cumsum(self._size_B)
        self.size = int(self._end_B[-1])

    def __call__(self, places: ArrayLike) -> NDArray[np.int64]:
        """As of `Permutation`."""
        x = np.array(places, dtype=np.int64)
        if x.size and not (0 <= x.min() and x.max() < self.size):
            raise IndexError(f"places must lie in [0, {self.size}), got {x.min()} to {x.max()}")
        flat = x.reshape(-1)
        window_N = np.searchsorted(self._end_B, flat, side="right") // self._window
        for window in np.unique(window_N):
            here = window_N == window
            flat[here] = self._inside(int(window), flat[here])
        return flat.reshape(x.shape)

    def _inside(self, window: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        low = window * self._window
        high = min(low + self._window, len(self._end_B))
        start = int(self._end_B[low] - self._size_B[low])
        size = int(self._end_B[high - 1]) - start
        place = start + Permutation(size, *self._key, "window", window)(places - start)
        block = np.searchsorted(self._end_B, place, side="right")
        offset = place - (self._end_B[block] - self._size_B[block])
        return np.asarray(self._first_B[self._order_B[block]] + offset, np.int64)


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
