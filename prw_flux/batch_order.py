"""Which samples make up a step: a pure function of (seed, stage, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prw_flux.data.permutation import Permutation

LISTED: Final = 1_000_000
"""Samples from which on the order of an epoch is computed, not listed."""


def stable_hash(*parts: object) -> int:
    """63 bits that depend on the parts alone, on every machine and in every process."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def batch_indices(seed: int, stage: str, step: int, batch_size: int, count: int) -> list[int]:
    """Which of `count` samples make up a step: shuffled epochs, laid end to end.

    From `LISTED` samples on, no list of an epoch is made, and any step costs the same.
    """
    start = step * batch_size
    indices: list[int] = []
    for epoch in range(start // count, (start + batch_size - 1) // count + 1):
        low, high = max(start - epoch * count, 0), start + batch_size - epoch * count
        if count >= LISTED:
            shuffle = Permutation(count, seed, stage, "order", epoch)
            order = shuffle(np.arange(low, min(high, count)))
        else:
            rng = np.random.default_rng(stable_hash(seed, stage, "order", epoch))
            order = rng.permutation(count)[low:high]
        indices += [int(i) for i in order]
    return indices


def bucket_of(seed: int, stage: str, step: int, sizes: Sequence[int]) -> tuple[int, int]:
    """Which bucket feeds a step, and how many steps before it the bucket has fed.

    As many steps in a row as there are samples make an epoch, in which a bucket of n samples feeds
    exactly n steps, in a shuffled order: every sample is seen equally often.

    Args:
        seed, stage, step: Of the run.
        sizes: Samples in each bucket.
    """
    if len(sizes) == 1:
        return 0, step
    epoch, position = divmod(step, sum(sizes))
    order = _bucket_order(seed, stage, epoch, tuple(sizes))
    bucket = int(order[position])
    before = int((order[:position] == bucket).sum())
    return bucket, epoch * sizes[bucket] + before


@lru_cache(maxsize=2)
def _bucket_order(seed: int, stage: str, epoch: int, sizes: tuple[int, ...]) -> NDArray[np.int16]:
    """The bucket of every step of an epoch; kept, because every step asks for it."""
    rng = np.random.default_rng(stable_hash(seed, stage, "buckets", epoch))
    order = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return order.astype(np.int16)
