"""Launches of the routing kernels; imported only where there is Triton.

Shape suffixes: T tokens, E experts, S slots, C chunks of tokens.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from prw_kernels.routing.kernels import count_kernel, place_kernel
from prw_kernels.routing.reference import Segments, slots


def chunk(experts: int) -> tuple[int, int]:
    """Tokens per chunk, and experts rounded up: their product is what a program holds at once."""
    columns = max(16, triton.next_power_of_2(experts))
    return min(128, 8192 // columns), columns


def launch_segments(expert_T: Tensor, experts: int, *, block: int) -> Segments:
    """`segments` in two launches, for checked arguments."""
    expert_T = expert_T.contiguous()
    b_chunk, columns = chunk(experts)
    chunks = triton.cdiv(expert_T.shape[0], b_chunk)
    count_CE = expert_T.new_empty((chunks, columns), dtype=torch.int32)
    if chunks:
        count_kernel[(chunks,)](
            expert_T, count_CE, expert_T.shape[0], experts, b_chunk=b_chunk, b_expert=columns
        )
    return place(expert_T, count_CE, experts, block=block)


def place(expert_T: Tensor, count_CE: Tensor, experts: int, *, block: int) -> Segments:
    """The second launch, from counts per chunk of `chunk` tokens, ``[C, E rounded up]``."""
    tokens, total = expert_T.shape[0], slots(expert_T.shape[0], experts, block)
    b_chunk, columns = chunk(experts)
    sizes = (total, tokens, total // block, experts + 1)
    outputs = [expert_T.new_empty(size, dtype=torch.int32) for size in sizes]
    place_kernel[(triton.cdiv(total, b_chunk),)](
        expert_T,
        count_CE,
        *outputs,
        tokens,
        experts,
        count_CE.shape[0],
        total,
        block=block,
        b_chunk=b_chunk,
        b_expert=columns,
        b_rows=max(1, 4096 // columns),
    )
    token_S, slot_T, tile_I, offset_F = outputs
    return Segments(token=token_S, slot=slot_T, expert=tile_I, offset=offset_F, block=block)
