"""The time of a launch, for a search; imported only where there is Triton."""

from __future__ import annotations

from collections.abc import Callable

import triton.testing

from prw_kernels.tiles.table import Tile


def timed(run: Callable[[Tile], None]) -> Callable[[Tile], float]:
    """Milliseconds of a launch with a tile, for `prw_kernels.tiles.tile`."""
    return lambda tile: float(triton.testing.do_bench(lambda: run(tile)))
