"""Every kernel, as its launch calls it, for every row of the tile table.

An entry of `KERNELS` is a function from an architecture, a rank and a number of tokens to the
arguments and constants of the launch. CI compiles one rank per entry and architecture; the test
marked slow compiles all, and the safe tiles on chips without rows of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kernels_ops.offline import SHARED_MEMORY, Build
from prw_kernels.routed_lora.blocks import columns as columns_of
from prw_kernels.routed_lora.blocks import fit, is_dense
from prw_kernels.routing.launch import chunk
from prw_kernels.tiles import Tile, tile

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Architectures with rows of their own in the table; the others have the safe tiles."""

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
    for arch in SHARED_MEMORY if all_of_them else CHIPS:
        for entry in KERNELS + SLOW if all_of_them else KERNELS:
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
    meta = {"b_chunk": chunk(experts)[0], "b_expert": columns(experts)}
    args = ["i64", "i32", tokens, experts]
    return Build(kernel=ROUTING + "count_kernel", arch=arch, args=args, meta=meta)


def place(arch: str, experts: int, tokens: int) -> Build:
    sizes = tile("route", arch, experts, tokens)
    meta = {
        "block": 64,
        "b_chunk": chunk(experts)[0],
        "b_count": sizes.m,
        "b_expert": columns(experts),
        "b_rows": 2048 // columns(experts),
    }
    args = ["i64", "i32", "i32", "i32", "i32", "i32", tokens, experts, 128, 8192]
    return Build(kernel=ROUTING + "place_kernel", arch=arch, args=args, meta=meta)


EXPERTS = 5
ROUTED_LORA = "prw_kernels.routed_lora.kernels:"


def block(arch: str, tokens: int) -> int:
    """Slots per tile of the segments."""
    return max(tile(kernel, arch, 1, tokens).m for kernel in ("gather", "scatter", "gram"))


def shrink(arch: str, rank: int, tokens: int) -> Build:
    """``h = A_e x`` for K and V together."""
    return gather(arch, 2 * rank, 2 * rank, tokens, [None, None, None, None], transposed=True)


def shrink_transposed(arch: str, rank: int, tokens: int) -> Build:
    """``s = B_e^T dy``, with the derivative of the gate."""
    given = ["bf16", "bf16", "fp32", "fp32"]
    return gather(arch, rank, 2 * rank, tokens, given, transposed=False)


def gather(
    arch: str, rank: int, width: int, tokens: int, given: list[str | None], *, transposed: bool
) -> Build:
    sizes, dense = tile("gather", arch, rank, tokens), dense_of(width // 2)
    meta = {
        "K": WIDTH,
        "N": rank,
        "width": width,
        "transposed": transposed,
        "experts": dense,
        "precision": "ieee",
        "b_tile": 0 if dense else block(arch, tokens),
        "b_m": sizes.m,
        "b_n": columns_of(rank * max(dense, 1), sizes.n, tokens // sizes.m + EXPERTS),
        "b_k": fit(WIDTH, sizes.k),
        **run_as(sizes),
    }
    return Build(
        kernel=ROUTED_LORA + "gather_kernel",
        arch=arch,
        args=["bf16", "bf16", "bf16", *order(dense), *given, 2.0, tokens],
        meta=meta,
        products=products(arch, sizes.m),
    )


def dense_of(rank: int) -> int:
    """Whether all experts are computed: their number, or 0."""
    return EXPERTS if is_dense(EXPERTS, rank) else 0


def order(dense: int) -> list[str | None]:
    """The routing: of slots and tiles, or of tokens."""
    return [None, "i64"] if dense else ["i32", "i32"]


def expand(arch: str, rank: int, tokens: int) -> Build:
    """``y = B_e h * scaling * gate + bias + base``."""
    given = ["fp32", "bf16", "bf16", "i64"]
    return scatter(arch, rank, 2 * rank, tokens, given, transposed=True)


def expand_transposed(arch: str, rank: int, tokens: int) -> Build:
    """``dx = A_e^T s`` for K and V together."""
    return scatter(arch, 2 * rank, 2 * rank, tokens, [None] * 4, transposed=False)


def scatter(
    arch: str, rank: int, width: int, tokens: int, given: list[str | None], *, transposed: bool
) -> Build:
    sizes, dense = tile("scatter", arch, rank, tokens), dense_of(width // 2)
    meta = {
        "K": rank,
        "N": WIDTH,
        "width": width,
        "transposed": transposed,
        "experts": dense,
        "precision": "ieee",
        "b_tile": 0 if dense else block(arch, tokens),
        "b_m": sizes.m,
        "b_n": columns_of(WIDTH, sizes.n),
        "b_k": fit(rank, sizes.k),
        **run_as(sizes),
    }
    return Build(
        kernel=ROUTED_LORA + "scatter_kernel",
        arch=arch,
        args=["bf16", "bf16", "bf16", *order(dense), *given, 2.0, tokens, EXPERTS],
        meta=meta,
        products=products(arch, sizes.m),
    )


def gram_a(arch: str, rank: int, tokens: int) -> Build:
    """``dA_e = s^T x`` for K and V together."""
    return gram(arch, 2 * rank, 2 * rank, tokens, "bf16", transposed=True)


def gram_b(arch: str, rank: int, tokens: int) -> Build:
    """``dB_e = dy^T h``, in parts."""
    return gram(arch, rank, 2 * rank, tokens, "fp32", transposed=False)


def gram(arch: str, rank: int, width: int, tokens: int, out: str, *, transposed: bool) -> Build:
    sizes, dense = tile("gram", arch, rank, tokens), dense_of(width // 2)
    meta = {
        "W": WIDTH,
        "N": rank,
        "width": width,
        "transposed": transposed,
        "experts": dense,
        "precision": "ieee",
        "b_m": sizes.m,
        "b_n": columns_of(rank, sizes.n),
        "b_w": fit(WIDTH, sizes.k),
        **run_as(sizes),
    }
    return Build(
        kernel=ROUTED_LORA + "gram_kernel",
        arch=arch,
        args=[
            "bf16",
            "bf16",
            out,
            *(["i64", None] if dense else ["i32", "i32"]),
            tokens,
            0,
            4,
            4096,
        ],
        meta=meta,
        products=products(arch, meta["b_w"]),
    )


def in_fp32(build: Callable[[str, int, int], Build]) -> Callable[[str, int, int], Build]:
    """The same on fp32 tensors, which have tiles of their own and on NVIDIA's chips no products."""

    def built(arch: str, rank: int, tokens: int) -> Build:
        found = build(f"{arch} torch.float32", rank, tokens)
        args = ["fp32" if arg == "bf16" else arg for arg in found.args]
        products = found.products if arch.startswith("gfx") else ""
        return replace(found, arch=arch, args=args, products=products, note="fp32")

    return built


MULTIPLY = (shrink, shrink_transposed, expand, expand_transposed, gram_a, gram_b)

KERNELS = [
    Entry(route, (5, 20, 64)),
    Entry(route_backward, (5, 20, 64)),
    Entry(route_weight, (5, 20, 64)),
    Entry(count, (5, 64)),
    Entry(place, (5, 64)),
    *(Entry(build, (128, 16, 64)) for build in MULTIPLY),
]

SLOW = [Entry(in_fp32(build), (128, 16)) for build in MULTIPLY]
"""Only in the test marked slow."""
