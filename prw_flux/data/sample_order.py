"""Which sample comes when: mixing and shuffling as a pure function of (seed, position).

Position g of a run (step * batch + place in the batch) gives a part of the mixture, the number n
of samples taken from this part before, and from n the epoch and the place in its shuffle. Nothing
is drawn and nothing is remembered: a resumed run asks for the positions that it has not had, and
any number of processes split the positions of a step between them.

Mixing. The weights are whole numbers w_i after scaling, with sum W; the order repeats every W
positions. Sample j of part i must lie in the window floor(j W / w_i) <= g < ceil((j + 1) W / w_i).
Giving every position to the open window that closes first meets all windows (one machine, unit
jobs, earliest deadline first; the shares w_i / W are a fractional solution), so after g positions
every part has had g w_i / W samples, rounded down or up. Source of the windows: Baruah, Cohen,
Plaxton and Varvel, "Proportionate progress", 1996.

Shapes: N positions, P parts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prw import ConfigError
from prw_flux.data.permutation import BlockPermutation, Permutation

MAX_PERIOD: Final = 100_000
"""Largest W: weights with five decimals."""

Indices = NDArray[np.int64]


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a mixture.

    Args:
        name: with the seed, decides its shuffles; unique in the mixture.
        size: number of its samples.
        weight: its share, relative to those of the other parts. A float is read as the decimal
            number that it prints as.
        blocks: sizes of the stretches (shards) that its samples lie in, which are then shuffled
            before the samples inside every `window` of them; none shuffles all samples at once.
        window: blocks whose samples are shuffled together.

    Raises:
        ConfigError: it is empty, its weight is not a positive number, or the blocks are not its
            samples.
    """

    name: str
    size: int
    weight: int | float | Fraction = 1
    blocks: tuple[int, ...] = ()
    window: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"part {self.name!r} has {self.size} samples; leave it out")
        if not (0 < self.weight < math.inf):
            raise ConfigError(f"part {self.name!r}: weight {self.weight} must be above 0")
        if self.blocks and (sum(self.blocks) != self.size or min(self.blocks) < 1):
            raise ConfigError(
                f"part {self.name!r}: blocks of {sum(self.blocks)} samples are not its {self.size}"
            )


@final
@dataclass(frozen=True, eq=False)
class Picks:
    """Samples by position: the part (its number), the sample in it, the epoch of the part."""

    part_N: Indices
    sample_N: Indices
    epoch_N: Indices


@final
class SampleOrder:
    """The order of a mixture.

    Args:
        parts: the parts; their order in the list matters only where two windows close together.
        seed: of the shuffles.

    Raises:
        ConfigError: no parts, two of one name, or weights without a common measure below
            `MAX_PERIOD`.
    """

    def __init__(self, parts: Sequence[Part], *, seed: int) -> None:
        names = [part.name for part in parts]
        if not parts or len(set(names)) < len(names):
            raise ConfigError(f"a mixture needs parts of different names, got {names}")
        self.parts, self.seed = tuple(parts), seed
        self._share_P = _whole(self.parts)
        self._part_W = _one_period(self._share_P)
        self._before_W = _ranks(self._part_W, len(parts))

    @property
    def fingerprint(self) -> str:
        """Changes when the parts, their sizes or weights, or the seed do; to be kept by a run."""
        facts = [
            (p.name, p.size, share, *([p.blocks, p.window] if p.blocks else []))
            for p, share in zip(self.parts, self._share_P, strict=True)
        ]
        return hashlib.blake2b(repr((self.seed, facts)).encode(), digest_size=16).hexdigest()

    def counts(self, position: int) -> list[int]:
        """How many samples of each part come before a position."""
        turns, rest = divmod(_checked(position), len(self._part_W))
        extra = np.bincount(self._part_W[:rest], minlength=len(self.parts))
        return [turns * share + int(n) for share, n in zip(self._share_P, extra, strict=True)]

    def at(self, positions: ArrayLike) -> Picks:
        """The samples at some positions, int64 [N].

        Raises:
            IndexError: a position is negative.
        """
        position_N = np.asarray(positions, dtype=np.int64).reshape(-1)
        if position_N.size:
            _checked(int(position_N.min()))
        turn_N, place_N = np.divmod(position_N, len(self._part_W))
        part_N = self._part_W[place_N].astype(np.int64)
        rank_N = turn_N * np.array(self._share_P)[part_N] + self._before_W[place_N]
        epoch_N, sample_N = np.divmod(rank_N, np.array([part.size for part in self.parts])[part_N])
        for part in np.unique(part_N):
            for epoch in np.unique(epoch_N[part_N == part]):
                here = (part_N == part) & (epoch_N == epoch)
                sample_N[here] = self._shuffle(int(part), int(epoch))(sample_N[here])
        return Picks(part_N, sample_N, epoch_N)

    def step(self, step: int, batch_size: int, *, rank: int = 0, ranks: int = 1) -> Picks:
        """What one of `ranks` processes trains on in a step: its stretch of the step's positions.

        The stretches of all ranks, laid end to end, are the step of a single process; they differ
        in length by one where `ranks` does not divide `batch_size`.

        Raises:
            ValueError: the rank is not one of `ranks`, or there are more ranks than samples.
        """
        if not 0 <= rank < ranks <= batch_size:
            raise ValueError(f"rank {rank} of {ranks} cannot share a batch of {batch_size}")
        low, high = (batch_size * r // ranks for r in (rank, rank + 1))
        return self.at(step * batch_size + np.arange(low, high))

    def _shuffle(self, number: int, epoch: int) -> Permutation | BlockPermutation:
        part = self.parts[number]
        if part.blocks:
            return BlockPermutation(part.blocks, part.window, self.seed, part.name, epoch)
        return Permutation(part.size, self.seed, part.name, epoch)


def _checked(position: int) -> int:
    if position < 0:
        raise IndexError(f"position {position} is negative")
    return position


def _whole(parts: Sequence[Part]) -> list[int]:
    """The weights as whole numbers without a common divisor."""
    exact = [Fraction(str(part.weight)) for part in parts]
    common = math.lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * common) for weight in exact]
    divisor = math.gcd(*shares)
    shares = [share // divisor for share in shares]
    if sum(shares) > MAX_PERIOD:
        told = ", ".join(f"{part.name} {part.weight}" for part in parts)
        raise ConfigError(
            f"the mixing weights {told} repeat only after {sum(shares):,} samples, the limit is "
            f"{MAX_PERIOD:,}; round them to fewer digits"
        )
    return shares


def _one_period(share_P: Sequence[int]) -> NDArray[np.int32]:
    """The part of each of W positions, earliest deadline first."""
    period = sum(share_P)
    given = [0] * len(share_P)
    order = np.empty(period, np.int32)
    for position in range(period):
        chosen, first = -1, period + 1
        for part, share in enumerate(share_P):
            open_now = given[part] * period <= position * share
            closes = -(-(given[part] + 1) * period // share)
            if open_now and given[part] < share and closes < first:
                chosen, first = part, closes
        order[position] = chosen
        given[chosen] += 1
    return order


def _ranks(part_W: NDArray[np.int32], parts: int) -> Indices:
    """How many samples of its own part come before each position of the period."""
    before_W = np.empty(len(part_W), np.int64)
    for part in range(parts):
        here = np.flatnonzero(part_W == part)
        before_W[here] = np.arange(len(here))
    return before_W
