"""Tile sizes of the Triton kernels: a table per architecture, and what a search found here.

`tile` reads the table. With ``PRW_AUTOTUNE=1`` it measures the candidates instead, once per kernel,
device, rank and number of tokens, and keeps the fastest in ``tiles.json`` under ``$PRW_CACHE`` (or
the user's cache directory). Other tiles add in another order, so a run with the search has other
bits than one without; that is why it is never on by itself.

``python -m prw_kernels.tiles`` prints both.
"""

from prw_kernels.tiles.search import arch_of, cache_file, known_tiles, tile
from prw_kernels.tiles.table import Tile

__all__ = ["Tile", "arch_of", "cache_file", "known_tiles", "tile"]
