"""How the routed LoRA kernels divide their work; from shapes, dtype and device alone.

The sizes of a launch decide in which order numbers are added, so nothing here looks at values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from prw_kernels.backend import interpreted
from prw_kernels.tiles import arch_of, tile

LEAST = 16
"""The smallest side of a product on tensor cores."""

PROGRAMS = 132
"""Programs that keep a large device busy: the multiprocessors of an H100 or H200."""


DENSE = 80
"""Columns of all experts together up to which computing them all is cheaper than sorting tokens."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Which slot holds which token, and whose it is; grouped by expert, or dense.

    Attributes:
        slots: S; T if dense, where slot s is token s.
        token: int32 ``[S]``, T in an empty slot; None if dense.
        expert: int32 ``[S / block]`` of each tile, -1 in an unused one; if dense ``[T]``.
        offset: int32 ``[E + 1]``, the first slot of each expert; None if dense.
        block: slots of a tile that has one expert.
        dense: E, or 0 if grouped.
    """

    slots: int
    token: Tensor | None
    expert: Tensor
    offset: Tensor | None
    block: int = 0
    dense: int = 0


def is_dense(experts: int, rank: int) -> bool:
    """Whether to compute every expert on every token instead of sorting tokens."""
    return experts == 1 or experts * rank <= DENSE


def arch_for(x: Tensor) -> str:
    """The architecture as the table of tiles names it; fp32 has tiles of its own, small ones."""
    arch = arch_of(x.device)
    return arch if x.itemsize == 2 or interpreted() else f"{arch} {x.dtype}"


def block_for(x_TD: Tensor, rank: int) -> int:
    """Slots per group: every kernel's tokens per program divide it."""
    arch, tokens = arch_for(x_TD), x_TD.shape[0]
    return max(tile(kernel, arch, rank, tokens).m for kernel in ("gather", "scatter", "gram"))


def fit(count: int, most: int, waste: float = 1 / 8) -> int:
    """The largest power of two up to `most` that pads `count` by little more than 16 would."""
    block = most
    while block > LEAST and _padded(count, block) > (1 + waste) * _padded(count, LEAST):
        block //= 2
    return block


def columns(count: int, most: int, rows: int = PROGRAMS) -> int:
    """How many of `count` columns one program takes, next to `rows` other programs.

    Rather some idle than the rows read twice; but twice, from the cache, where too few programs
    would leave multiprocessors without work.
    """
    block = fit(count, most, waste=1 / 3)
    while block > 4 * LEAST and -(-count // block) * rows < PROGRAMS:
        block //= 2
    return block


def parts(programs: int, tokens: int, least: int = 1024) -> int:
    """Into how many sums of at least `least` tokens to split for two programs per processor."""
    return max(1, min(-(-2 * PROGRAMS // max(programs, 1)), -(-tokens // least)))


def runs(learns: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First index and length of every run of experts that learn."""
    first = None
    for e, learning in enumerate([*learns, False]):
        if learning and first is None:
            first = e
        elif not learning and first is not None:
            yield first, e - first
            first = None


def _padded(count: int, block: int) -> int:
    return -(-count // block) * block
