"""Tile sizes of the Triton kernels: a table per architecture, and what a search found here.

`tile` reads the table. With ``PRW_AUTOTUNE=1`` it measures the candidates instead, once per kernel,
device, rank and number of tokens, and keeps the fastest in ``tiles.json`` under ``$PRW_CACHE`` (or
the user's cache directory). Other tiles add in another order, so a run with the search has other
bits than one without; that is why it is never on by itself.

``python -m prw_kernels.tiles`` prints both.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from prw_kernels.backend import interpreted

_LOG = logging.getLogger(__name__)


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
    "route": [(16, 8192, Tile(32, 0, 64, 4, 3)), (16, ANY, Tile(64, 0, 64, 4, 3))],
    "route_backward": [(16, ANY, Tile(32, 64, 0, 4, 1))],
    "route_weight": [(32, ANY, Tile(32, 0, 64, 4, 3))],
}

INTERPRETER = "interpreter"
"""The architecture of Triton's interpreter, whose time is per program and not per element."""

TABLE: dict[str, dict[str, Rows]] = {
    "sm_80": {**_CHOOSE},
    "sm_90": {**_CHOOSE},
    "sm_100": {**_CHOOSE},
    "gfx942": {},
    INTERPRETER: {kernel: [(ANY, ANY, Tile(16, 32, 32, 4, 1))] for kernel in KERNELS},
}

CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "route": tuple(Tile(0, 0, k, w, s) for k in (32, 64, 128) for w in (2, 4) for s in (2, 3, 4)),
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


def tile(
    kernel: str,
    arch: str,
    rank: int,
    tokens: int,
    *,
    measure: Callable[[Tile], float] | None = None,
) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: one of `KERNELS`.
        arch: from `arch_of`; one that the table lacks has small tiles, which fit everywhere.
        rank: of the experts; for the kernels that choose, how many columns there are.
        tokens: T.
        measure: milliseconds of the launch with a given tile. With it and ``PRW_AUTOTUNE=1``, the
            fastest candidate is searched for, unless it is known or a CUDA graph is captured. A
            search never changes ``m``: what one kernel writes per tile, another reads.
    """
    shipped = _shipped(kernel, arch, rank, tokens)
    if os.environ.get("PRW_AUTOTUNE", "0") != "1" or arch == INTERPRETER:
        return shipped
    key = f"{arch} {kernel} rank<={_bucket(rank)} tokens<={_bucket(tokens)}"
    known = _known().get(key)
    if known is not None or measure is None or torch.cuda.is_current_stream_capturing():
        return known or shipped
    found = _search(kernel, shipped, measure)
    _LOG.info("%s: %s", key, found)
    _remember(key, found)
    return found


@cache
def _arch(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def arch_of(device: torch.device) -> str:
    """The architecture of a device as the table names it: ``"sm_90"``, ``"gfx942"``."""
    return INTERPRETER if interpreted() else _arch(device)


def shipped_rows() -> Iterator[tuple[str, str, int, int, Tile]]:
    """Every row of the table: architecture, kernel, ranks up to, tokens up to, tile."""
    for arch, kernels in TABLE.items():
        for kernel, rows in kernels.items():
            for ranks, tokens, found in rows:
                yield arch, kernel, ranks, tokens, found


def _shipped(kernel: str, arch: str, rank: int, tokens: int) -> Tile:
    for ranks, up_to, found in (*TABLE.get(arch, {}).get(kernel, []), *SAFE[kernel]):
        if rank <= ranks and tokens <= up_to:
            return found
    raise AssertionError("the safe row takes everything")


def _bucket(value: int) -> int:
    """The power of two from `value` on: one search serves all sizes of a bucket."""
    return 1 << max(value - 1, 0).bit_length()


def _search(kernel: str, shipped: Tile, measure: Callable[[Tile], float]) -> Tile:
    """The fastest of the shipped tile and the candidates; those that cannot run are passed over."""
    tried = {shipped: measure(shipped)}
    for candidate in CANDIDATES[kernel]:
        candidate = replace(candidate, m=shipped.m)
        if candidate in tried:
            continue
        try:
            tried[candidate] = measure(candidate)
        except Exception as error:  # whatever a compiler or a launch may raise for a large tile
            _LOG.info("%s %s: %s", kernel, candidate, error)
    return min(tried, key=lambda found: tried[found])


def cache_file() -> Path:
    """Where searched tiles are kept: ``tiles.json`` in ``$PRW_CACHE`` or the user's cache."""
    given = os.environ.get("PRW_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(given) if given else Path(base) / "prw") / "tiles.json"


def _known() -> dict[str, Tile]:
    """What earlier searches found; nothing where the file is absent or unreadable."""
    file = cache_file()
    try:
        stamp = file.stat().st_mtime_ns
    except OSError:
        return {}
    return _read(file, stamp)


@cache
def _read(file: Path, stamp: int) -> dict[str, Tile]:
    try:
        return {key: Tile(**value) for key, value in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _LOG.warning("%s is no list of tiles and is ignored (%s); delete it", file, error)
        return {}


def _remember(key: str, found: Tile) -> None:
    """Add a result to the file in one step: a reader sees the old file or the new one."""
    file = cache_file()
    entries = {name: asdict(value) for name, value in {**_known(), key: found}.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        json.dump(entries, temporary, indent=1, sort_keys=True)
    os.replace(temporary.name, file)


def main() -> None:
    """Write the table and the searched tiles to standard output."""
    out = sys.stdout.write
    out("shipped; for other architectures and sizes, the rows of `safe`\n")
    safe = (("safe", kernel, *row) for kernel, rows in SAFE.items() for row in rows)
    for arch, kernel, ranks, tokens, found in (*shipped_rows(), *safe):
        where = f"rank {_limit(ranks)} tokens {_limit(tokens)}"
        out(f"  {arch:12}{kernel:15}{where:28}{found}\n")
    out(f"searched with PRW_AUTOTUNE=1, in {cache_file()}\n")
    for key, found in sorted(_known().items()):
        out(f"  {key:53}  {found}\n")


def _limit(value: int) -> str:
    return "any" if value == ANY else f"<={value}"


if __name__ == "__main__":
    main()
