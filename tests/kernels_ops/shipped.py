"""Every kernel, as its launch calls it, for every row of the tile table.

An entry of `KERNELS` is a function from an architecture, a rank and a number of tokens to the
arguments and constants of the launch. CI compiles one rank per entry and architecture; the test
marked slow compiles all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kernels_ops.offline import SHARED_MEMORY, Build
from prw_kernels.tiles import Tile, tile

WIDTH = 3072
TOKENS = (1024, 4096, 65536)


@dataclass(frozen=True)
class Entry:
    """A kernel.

    Attributes:
        build: from architecture, rank and tokens.
        ranks: the first is compiled in CI. Where experts are chosen, numbers of experts.
    """

    build: Callable[[str, int, int], Build]
    ranks: tuple[int, ...]


def builds(*, all_of_them: bool) -> Iterator[Build]:
    """What CI compiles, or everything that is shipped."""
    done = set()
    for arch in SHARED_MEMORY:
        for entry in KERNELS:
            for rank in entry.ranks if all_of_them else entry.ranks[:1]:
                for tokens in TOKENS if all_of_them else TOKENS[1:2]:
                    build = entry.build(arch, rank, tokens)
                    if str(build) not in done:
                        done.add(str(build))
                        yield build


def products(arch: str, rows: int) -> str:
    """The instruction that multiplies tiles of so many rows on an architecture."""
    if arch.startswith("gfx"):
        return "v_mfma"
    if arch == "sm_90" and rows >= 64:
        return "wgmma.mma_async"
    if arch == "sm_100" and rows >= 64:
        return "tcgen05.mma"
    return "mma.sync"


def precision(arch: str) -> str:
    return "tf32x3" if arch.startswith("sm_") else "ieee"


def columns(experts: int) -> int:
    """Experts rounded up to a power of two."""
    return max(16, 1 << (experts - 1).bit_length())


def run_as(sizes: Tile) -> dict[str, int]:
    return {"num_warps": sizes.warps, "num_stages": sizes.stages}


ROUTING = "prw_kernels.routing.kernels:"


def route(arch: str, experts: int, tokens: int) -> Build:
    sizes = tile("route", arch, experts, tokens)
    outputs = ["i64", "fp32", "fp32", "fp32", "i32"]
    meta = {
        "b_token": sizes.m,
        "b_width": sizes.k,
        "b_expert": columns(experts),
        "precision": precision(arch),
        **run_as(sizes),
    }
    return Build(
        kernel=ROUTING + "route_kernel",
        arch=arch,
        args=["bf16", "fp32", "fp32", "fp32", *outputs, tokens, WIDTH, experts],
        meta=meta,
        products=products(arch, sizes.m),
    )


def route_backward(arch: str, experts: int, tokens: int) -> Build:
    sizes = tile("route_backward", arch, experts, tokens)
    given = ["i64", "fp32", "fp32", "fp32", "fp32", "fp32", "fp32"]
    meta = {
        "b_token": sizes.m,
        "b_width": sizes.n,
        "b_expert": columns(experts),
        "precision": precision(arch),
        **run_as(sizes),
    }
    return Build(
        kernel=ROUTING + "route_backward_kernel",
        arch=arch,
        args=[*given, "fp32", "bf16", tokens, WIDTH, experts, 2 * experts],
        meta=meta,
        products=products(arch, sizes.m),
    )


def route_weight(arch: str, experts: int, tokens: int) -> Build:
    sizes = tile("route_weight", arch, 2 * experts, tokens)
    meta = {
        "b_token": sizes.m,
        "b_width": sizes.k,
        "b_column": columns(2 * experts),
        "precision": precision(arch),
        **run_as(sizes),
    }
    return Build(
        kernel=ROUTING + "route_weight_kernel",
        arch=arch,
        args=["fp32", "bf16", "fp32", tokens, WIDTH, 2 * experts, 2048],
        meta=meta,
        products=products(arch, columns(2 * experts)),
    )


def count(arch: str, experts: int, tokens: int) -> Build:
    meta = {"b_chunk": 128, "b_expert": columns(experts)}
    args = ["i64", "i32", tokens, experts]
    return Build(kernel=ROUTING + "count_kernel", arch=arch, args=args, meta=meta)


def place(arch: str, experts: int, tokens: int) -> Build:
    sizes = tile("route", arch, experts, tokens)
    meta = {
        "block": 64,
        "b_chunk": 128,
        "b_count": sizes.m,
        "b_expert": columns(experts),
        "b_rows": 2048 // columns(experts),
    }
    args = ["i64", "i32", "i32", "i32", "i32", "i32", tokens, experts, 128, 8192]
    return Build(kernel=ROUTING + "place_kernel", arch=arch, args=args, meta=meta)


KERNELS = [
    Entry(route, (5, 20, 64)),
    Entry(route_backward, (5, 20, 64)),
    Entry(route_weight, (5, 20, 64)),
    Entry(count, (5, 64)),
    Entry(place, (5, 64)),
]
