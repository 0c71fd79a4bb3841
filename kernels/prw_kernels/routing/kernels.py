"""Routing on the device.

`count_kernel` and `place_kernel` are a counting sort without atomics: the order is stable and the
same in every run. Names: ``p_`` pointer, ``i_`` index, ``m_`` mask, ``b_`` block size; T tokens,
E experts, S slots, C chunks of ``b_chunk`` tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "E"])
def count_kernel(
    p_expert,  # [T] any integer type
    p_count,  # [C, b_expert] int32, out: tokens of each chunk and expert
    T,
    E,
    b_chunk: tl.constexpr,
    b_expert: tl.constexpr,  # E rounded up to a power of two
):
    """Count the experts of one chunk. Grid: (C,)."""
    i_chunk = tl.program_id(0)
    i_token = i_chunk * b_chunk + tl.arange(0, b_chunk)
    m_token = i_token < T
    expert = _expert_of(p_expert, i_token, m_token, E)
    i_expert = tl.arange(0, b_expert)
    chosen = ((expert[:, None] == i_expert[None, :]) & m_token[:, None]).to(tl.int32)
    tl.store(p_count + i_chunk.to(tl.int64) * b_expert + i_expert, tl.sum(chosen, axis=0))


@triton.jit(do_not_specialize=["T", "E", "C", "S"])
def place_kernel(
    p_expert,  # [T] any integer type
    p_count,  # [C, b_expert] int32
    p_token,  # [S] int32, out
    p_slot,  # [T] int32, out
    p_tile,  # [S / block] int32, out
    p_offset,  # [E + 1] int32, out
    T,
    E,
    C,
    S,
    block: tl.constexpr,
    b_chunk: tl.constexpr,
    b_expert: tl.constexpr,
    b_rows: tl.constexpr,  # chunks summed at a time
):
    """Place the tokens of one chunk, and fill as many slots that stay empty. Grid: (S / b_chunk,).

    Every program sums the counts again: at most 128 kB out of the L2 cache at 65536 tokens and 64
    experts, instead of a third launch.
    """
    i_chunk = tl.program_id(0)
    i_expert = tl.arange(0, b_expert)
    total = tl.zeros([b_expert], tl.int32)
    before = tl.zeros([b_expert], tl.int32)
    for first in range(0, C, b_rows):
        i_row = first + tl.arange(0, b_rows)
        p_rows = p_count + i_row.to(tl.int64)[:, None] * b_expert + i_expert[None, :]
        count = tl.load(p_rows, mask=(i_row < C)[:, None], other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((i_row < i_chunk)[:, None], count, 0), axis=0)
    padded = (total + block - 1) // block * block
    end = tl.cumsum(padded, axis=0)
    start = end - padded

    i_token = i_chunk * b_chunk + tl.arange(0, b_chunk)
    m_token = i_token < T
    expert = _expert_of(p_expert, i_token, m_token, E)
    chosen = ((expert[:, None] == i_expert[None, :]) & m_token[:, None]).to(tl.int32)
    rank = tl.cumsum(chosen, axis=0) - 1
    slot = tl.sum(chosen * (rank + (start + before)[None, :]), axis=1)
    tl.store(p_slot + i_token, slot, mask=m_token)
    tl.store(p_token + slot, i_token, mask=m_token)

    i_slot = i_chunk * b_chunk + tl.arange(0, b_chunk)
    m_slot = i_slot < S
    ended = (end[None, :] <= i_slot[:, None]) & (i_expert < E)[None, :]
    owner = tl.sum(ended.to(tl.int32), axis=1)
    filled = tl.sum(
        tl.where(owner[:, None] == i_expert[None, :], (start + total)[None, :], 0), axis=1
    )
    tl.store(p_token + i_slot, T, mask=m_slot & ((owner == E) | (i_slot >= filled)))
    tl.store(
        p_tile + i_slot // block,
        tl.where(owner < E, owner, -1),
        mask=m_slot & (i_slot % block == 0),
    )
    if i_chunk == 0:
        tl.store(p_offset + i_expert, start, mask=i_expert < E)
        tl.store(p_offset + i_expert + 1, end, mask=i_expert == E - 1)


@triton.jit
def _expert_of(p_expert, i_token, m_token, E):
    """The expert of each token; an index outside the pool is taken to the nearest inside."""
    expert = tl.load(p_expert + i_token, mask=m_token, other=0)
    tl.device_assert((expert >= 0) & (expert < E), "expert index outside the pool")
    return tl.minimum(tl.maximum(expert, 0), E - 1).to(tl.int32)
