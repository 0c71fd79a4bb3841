"""Launches of the routing kernels; imported only where there is Triton.

Shape suffixes: T tokens, D width, E experts, F columns of both kinds, S slots, C chunks of tokens.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from prw_kernels.routing.kernels import (
    count_kernel,
    place_kernel,
    route_backward_kernel,
    route_kernel,
    route_weight_kernel,
)
from prw_kernels.routing.reference import Segments, slots
from prw_kernels.tiles import Tile, arch_of, tile
from prw_kernels.tiles.timing import timed

SPLIT = 2048
"""Tokens that one program of `route_weight_kernel` sums."""


def launch_segments(
    expert_T: Tensor, experts: int, *, block: int, count_CE: Tensor | None = None
) -> Segments:
    """`segments` for checked arguments: two launches, or one where the counts are known."""
    expert_T, tokens = expert_T.contiguous(), expert_T.shape[0]
    b_chunk, columns = chunk(experts)
    if count_CE is None:
        count_CE = expert_T.new_empty((triton.cdiv(tokens, b_chunk), columns), dtype=torch.int32)
        if tokens:
            count_kernel[(count_CE.shape[0],)](
                expert_T, count_CE, tokens, experts, b_chunk=b_chunk, b_expert=columns
            )
    b_count = counted(tokens, count_CE.shape[0], b_chunk)
    if tuple(count_CE.shape) != (triton.cdiv(tokens, b_count), columns):
        raise ValueError(
            f"count of shape {tuple(count_CE.shape)} is not of a routing of {tokens} tokens to "
            f"{experts} experts"
        )
    total = slots(tokens, experts, block)
    sizes = (total, tokens, total // block, experts + 1)
    token_S, slot_T, tile_I, offset_F = (
        expert_T.new_empty(size, dtype=torch.int32) for size in sizes
    )
    place_kernel[(triton.cdiv(total, b_chunk),)](
        expert_T,
        count_CE,
        token_S,
        slot_T,
        tile_I,
        offset_F,
        tokens,
        experts,
        count_CE.shape[0],
        total,
        block=block,
        b_chunk=b_chunk,
        b_count=b_count,
        b_expert=columns,
        b_rows=2048 // columns,
    )
    return Segments(token=token_S, slot=slot_T, expert=tile_I, offset=offset_F, block=block)


def chunk(experts: int) -> tuple[int, int]:
    """Tokens that one program counts or places, and its columns: experts rounded up."""
    columns = max(16, triton.next_power_of_2(experts))
    return min(128, 4096 // columns), columns  # of 8192 comparisons, 4 warps spill


def counted(tokens: int, chunks: int, most: int) -> int:
    """How many tokens each of `chunks` counts is of: a power of two, `most` or less."""
    while most > 1 and triton.cdiv(tokens, most) < chunks:
        most //= 2
    return most


def launch_route(
    h_TD: Tensor, signal_ED: Tensor, noise_ED: Tensor | None, eps_TE: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Expert, gate, probabilities, slope of the noise and counts, in one launch."""
    (tokens, width), experts = h_TD.shape, signal_ED.shape[0]
    arch, columns = arch_of(h_TD.device), chunk(experts)[1]
    expert_T = h_TD.new_empty(tokens, dtype=torch.int64)
    gate_T = h_TD.new_empty(tokens, dtype=torch.float32)
    probs_TE = h_TD.new_empty((tokens, experts), dtype=torch.float32)
    slope_TE = None if eps_TE is None else torch.empty_like(probs_TE)
    chunks = count_shape(tokens, experts, h_TD.device)
    count_CE = h_TD.new_empty(chunks, dtype=torch.int32)

    def run(sizes: Tile) -> None:
        route_kernel[(count_CE.shape[0],)](
            h_TD,
            signal_ED,
            None if eps_TE is None else noise_ED,
            eps_TE,
            expert_T,
            gate_T,
            probs_TE,
            slope_TE,
            count_CE,
            tokens,
            width,
            experts,
            b_token=sizes.m,
            b_width=sizes.k,
            b_expert=columns,
            precision=precision(arch),
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )

    if tokens:
        run(tile("route", arch, experts, tokens, measure=timed(run)))
    return expert_T, gate_T, probs_TE, slope_TE, count_CE


def count_shape(tokens: int, experts: int, device: torch.device) -> tuple[int, int]:
    """Of the counts that `launch_route` writes: chunks and columns."""
    sizes = tile("route", arch_of(device), experts, tokens)
    return triton.cdiv(tokens, sizes.m), chunk(experts)[1]


def launch_route_backward(
    expert_T: Tensor,
    probs_TE: Tensor,
    slope_TE: Tensor | None,
    d_gate_T: Tensor | None,
    d_probs_TE: Tensor | None,
    h_TD: Tensor,
    signal_ED: Tensor,
    noise_ED: Tensor | None,
    needs_h: bool,
) -> tuple[Tensor, Tensor | None]:
    """The derivative by the logits, signal and noise side by side ``[T, F]``, and by h."""
    (tokens, width), experts = h_TD.shape, signal_ED.shape[0]
    arch, columns = arch_of(h_TD.device), experts if slope_TE is None else 2 * experts
    d_logit_TF = probs_TE.new_empty((tokens, columns))
    d_h_TD = torch.empty_like(h_TD) if needs_h else None

    def run(sizes: Tile) -> None:
        route_backward_kernel[(triton.cdiv(tokens, sizes.m),)](
            expert_T,
            probs_TE,
            slope_TE,
            d_gate_T,
            d_probs_TE,
            signal_ED,
            None if slope_TE is None else noise_ED,
            d_logit_TF,
            d_h_TD,
            tokens,
            width,
            experts,
            columns,
            b_token=sizes.m,
            b_width=sizes.n,
            b_expert=chunk(experts)[1],
            precision=precision(arch),
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )

    if tokens:
        run(tile("route_backward", arch, experts, tokens, measure=timed(run)))
    return d_logit_TF, d_h_TD


def launch_route_weight(d_logit_TF: Tensor, h_TD: Tensor) -> Tensor:
    """``d_logit^T h``, ``[F, D]`` in fp32: sums over `SPLIT` tokens, and the sum of these."""
    (tokens, columns), width = d_logit_TF.shape, h_TD.shape[1]
    arch, parts = arch_of(h_TD.device), triton.cdiv(tokens, SPLIT)
    partial_PFD = d_logit_TF.new_empty((parts, columns, width))

    def run(sizes: Tile) -> None:
        route_weight_kernel[(triton.cdiv(width, sizes.k), parts)](
            d_logit_TF,
            h_TD,
            partial_PFD,
            tokens,
            width,
            columns,
            min(SPLIT, tokens),
            b_token=sizes.m,
            b_width=sizes.k,
            b_column=max(16, triton.next_power_of_2(columns)),
            precision=precision(arch),
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )

    if tokens:
        run(tile("route_weight", arch, columns, tokens, measure=timed(run)))
    return partial_PFD[0] if parts == 1 else partial_PFD.sum(0)


def precision(arch: str) -> str:
    """How fp32 is multiplied: in three TF32 products (2**-21) where tensor cores have no fp32."""
    return "tf32x3" if arch.startswith("sm_") else "ieee"
