"""Tile sizes that were compiled for their chip and spill no register (`tests/kernels_ops`).

Which of them is fastest was not measured: the sizes follow from what a chip can hold.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """The block one program computes, and how it is run.

    Attributes:
        m: tokens; where tokens are summed, how many at a time.
        n: most columns of the output; 0 where a kernel takes them all.
        k: most of the summed axis at a time; where tokens are summed, of the width of a row.
        warps: per program.
        stages: loads in flight.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


KERNELS = ("route", "route_backward", "route_weight", "gather", "scatter", "gram")
"""The first three choose experts, and their rank is the number of experts; the others multiply."""

ANY = 2**62
"""The last bucket of ranks or tokens."""

Rows = list[tuple[int, int, Tile]]
"""``(ranks up to, tokens up to, Tile(m, n, k, warps, stages))``: the first row that fits counts."""

SAFE: dict[str, Rows] = {
    "route": [(ANY, ANY, Tile(32, 0, 32, 4, 2))],
    "route_backward": [(ANY, ANY, Tile(32, 32, 0, 8, 1))],
    "route_weight": [(ANY, ANY, Tile(32, 0, 32, 8, 2))],
    "gather": [(ANY, ANY, Tile(32, 64, 32, 4, 2))],
    "scatter": [(ANY, ANY, Tile(32, 64, 32, 4, 2))],
    "gram": [(ANY, ANY, Tile(32, 64, 64, 4, 2))],
}
"""For an architecture or a size that has no row below; less than 64 kB of shared memory."""

_CHOOSE: dict[str, Rows] = {
    "route": [(16, 8192, Tile(32, 0, 64, 4, 5)), (16, ANY, Tile(64, 0, 64, 4, 4))],
    "route_backward": [(16, ANY, Tile(32, 64, 0, 4, 1))],
    "route_weight": [(32, ANY, Tile(32, 0, 64, 4, 3))],
}

INTERPRETER = "interpreter"
"""The architecture of Triton's interpreter, whose time is per program and not per element."""

_LITTLE, _MUCH = 2048, 16384

_WIDE: dict[str, Rows] = {
    **_CHOOSE,
    "gather": [
        (ANY, _LITTLE, Tile(32, 256, 64, 4, 4)),
        (ANY, _MUCH, Tile(64, 256, 64, 8, 4)),
        (ANY, ANY, Tile(128, 256, 64, 8, 3)),
    ],
    "scatter": [
        (ANY, _LITTLE, Tile(32, 128, 64, 4, 2)),
        (ANY, _MUCH, Tile(64, 256, 64, 8, 2)),
        (ANY, ANY, Tile(128, 128, 64, 8, 2)),
    ],
    "gram": [
        (ANY, _LITTLE, Tile(32, 256, 128, 8, 4)),
        (ANY, ANY, Tile(64, 256, 128, 8, 3)),
    ],
}
"""For chips whose tensor cores read factors from shared memory."""

TABLE: dict[str, dict[str, Rows]] = {
    "sm_80": {
        **_CHOOSE,
        "gather": [
            (ANY, _LITTLE, Tile(32, 128, 64, 4, 4)),
            (ANY, _MUCH, Tile(64, 128, 64, 4, 4)),
            (ANY, ANY, Tile(128, 128, 64, 8, 4)),
        ],
        "scatter": [
            (ANY, _LITTLE, Tile(32, 128, 64, 4, 2)),
            (ANY, _MUCH, Tile(64, 128, 64, 4, 2)),
            (ANY, ANY, Tile(128, 128, 64, 8, 2)),
        ],
        "gram": [
            (ANY, _LITTLE, Tile(32, 128, 128, 8, 4)),
            (ANY, ANY, Tile(64, 128, 128, 8, 3)),
        ],
    },
    "sm_90": _WIDE,
    "sm_100": _WIDE,
    "gfx942": {
        "gather": [
            (ANY, _LITTLE, Tile(32, 128, 64, 4, 2)),
            (ANY, _MUCH, Tile(64, 128, 64, 4, 2)),
            (ANY, ANY, Tile(128, 128, 64, 8, 2)),
        ],
        "scatter": [
            (ANY, _LITTLE, Tile(32, 128, 64, 4, 2)),
            (ANY, _MUCH, Tile(64, 128, 64, 4, 2)),
            (ANY, ANY, Tile(128, 128, 64, 8, 2)),
        ],
        "gram": [
            (ANY, _LITTLE, Tile(32, 128, 128, 8, 2)),
            (ANY, ANY, Tile(64, 128, 128, 8, 2)),
        ],
    },
    INTERPRETER: {kernel: [(ANY, ANY, Tile(16, 32, 32, 4, 1))] for kernel in KERNELS},
}
"""In the kernels on segments ``m`` depends on the tokens alone: the blocks of one routing serve
matrices of several ranks, and every ``m`` must divide the block."""

CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "route": tuple(Tile(0, 0, k, w, s) for k in (32, 64, 128) for w in (2, 4) for s in (2, 3, 5)),
    "route_backward": tuple(Tile(0, n, 0, w, 1) for n in (32, 64, 128) for w in (2, 4, 8)),
    "route_weight": tuple(Tile(0, 0, k, w, s) for k in (32, 64) for w in (4, 8) for s in (2, 3, 4)),
    "gather": tuple(
        Tile(0, n, k, w, s) for n in (128, 256) for k in (32, 64) for w in (4, 8) for s in (2, 3, 4)
    ),
    "scatter": tuple(
        Tile(0, n, k, w, s) for n in (128, 256) for k in (32, 64) for w in (4, 8) for s in (2, 3)
    ),
    "gram": tuple(
        Tile(0, n, k, w, s) for n in (64, 128) for k in (64, 128) for w in (4, 8) for s in (2, 3, 4)
    ),
}
"""What a search tries, with the shipped ``m``."""
