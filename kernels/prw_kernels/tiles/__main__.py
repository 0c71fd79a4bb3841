"""Prints the shipped tiles and the searched ones: ``python -m prw_kernels.tiles``."""

from __future__ import annotations

import sys

from prw_kernels.tiles.search import cache_file, known_tiles
from prw_kernels.tiles.table import ANY, SAFE, TABLE


def main() -> None:
    """Write the table and the searched tiles to standard output."""
    out = sys.stdout.write
    out("shipped; for other architectures and sizes, the rows of `safe`\n")
    for arch, kernels in {**TABLE, "safe": SAFE}.items():
        for kernel, rows in kernels.items():
            for ranks, tokens, found in rows:
                where = f"rank {_limit(ranks)} tokens {_limit(tokens)}"
                out(f"  {arch:12}{kernel:15}{where:28}{found}\n")
    out(f"searched with PRW_AUTOTUNE=1, in {cache_file()}\n")
    for key, found in sorted(known_tiles().items()):
        out(f"  {key:53}  {found}\n")


def _limit(value: int) -> str:
    return "any" if value == ANY else f"<={value}"


if __name__ == "__main__":
    main()
