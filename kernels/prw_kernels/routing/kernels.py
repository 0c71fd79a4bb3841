"""Routing on the device.

`route_kernel` chooses in one pass over h and counts per chunk; `place_kernel` makes the segments.
Together they are a counting sort without atomics: stable, and the same in every run. Where only the
experts are known, `count_kernel` counts. `route_backward_kernel` and `route_weight_kernel` are the
derivative.

Names: ``p_`` pointer, ``i_`` index, ``m_`` mask, ``b_`` block size. T tokens, D width, E experts,
F = E columns of signal, or 2 E with those of noise behind them, S slots, C chunks of tokens.
Tensors are contiguous; all arithmetic is fp32, whatever the tensors are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    p_h,  # [T, D] any float
    p_signal,  # [E, D] W_r, any float
    p_noise,  # [E, D] W_n, any float; None without noise
    p_eps,  # [T, E] fp32; None without noise
    p_expert,  # [T] int64, out
    p_gate,  # [T] fp32, out
    p_probs,  # [T, E] fp32, out
    p_slope,  # [T, E] fp32, out: eps * sigmoid(h W_n), kept for backward; None without noise
    p_count,  # [C, b_expert] int32, out: tokens of each chunk and expert
    T,
    D,
    E,
    b_token: tl.constexpr,
    b_width: tl.constexpr,
    b_expert: tl.constexpr,  # E rounded up to a power of two, at least 16
    precision: tl.constexpr,  # of tl.dot on fp32
):
    """Logits, softmax, choice, gate and counts of b_token tokens. Grid: (C,)."""
    i_chunk = tl.program_id(0)
    i_token = i_chunk.to(tl.int64) * b_token + tl.arange(0, b_token)
    i_expert = tl.arange(0, b_expert)
    m_token, m_expert = i_token < T, i_expert < E
    signal = tl.zeros([b_token, b_expert], tl.float32)
    width = tl.zeros([b_token, b_expert], tl.float32)
    for first in range(0, D, b_width):
        i_width = first + tl.arange(0, b_width)
        m_width = i_width < D
        p_rows = p_h + i_token[:, None] * D + i_width[None, :]
        h = tl.load(p_rows, mask=m_token[:, None] & m_width[None, :], other=0.0).to(tl.float32)
        o_column = i_expert[None, :].to(tl.int64) * D + i_width[:, None]
        m_column = m_width[:, None] & m_expert[None, :]
        column = tl.load(p_signal + o_column, mask=m_column, other=0.0).to(tl.float32)
        signal = tl.dot(h, column, signal, input_precision=precision)
        if p_noise is not None:
            column = tl.load(p_noise + o_column, mask=m_column, other=0.0).to(tl.float32)
            width = tl.dot(h, column, width, input_precision=precision)

    o_logit = i_token[:, None] * E + i_expert[None, :]
    m_logit = m_token[:, None] & m_expert[None, :]
    if p_noise is not None:
        eps = tl.load(p_eps + o_logit, mask=m_logit, other=0.0).to(tl.float32)
        small = tl.exp(-tl.abs(width))
        signal += eps * (tl.maximum(width, 0.0) + tl.log(1.0 + small))
        sigmoid = tl.where(width >= 0, 1.0, small) / (1.0 + small)
        tl.store(p_slope + o_logit, eps * sigmoid, mask=m_logit)

    logit = tl.where(m_expert[None, :], signal, float("-inf"))
    power = tl.exp(logit - tl.max(logit, axis=1)[:, None])
    probs = power / tl.sum(power, axis=1)[:, None]
    # A row of NaN must not leave the pool.
    expert = tl.minimum(tl.argmax(logit, axis=1, tie_break_left=True), E - 1)
    chosen = (expert[:, None] == i_expert[None, :]) & m_token[:, None]
    tl.store(p_expert + i_token, expert.to(tl.int64), mask=m_token)
    tl.store(p_gate + i_token, tl.sum(tl.where(chosen, probs, 0.0), axis=1), mask=m_token)
    tl.store(p_probs + o_logit, probs, mask=m_logit)
    p_counts = p_count + i_chunk.to(tl.int64) * b_expert + i_expert
    tl.store(p_counts, tl.sum(chosen.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    p_expert,  # [T] int64
    p_probs,  # [T, E] fp32
    p_slope,  # [T, E] fp32; None without noise
    p_d_gate,  # [T] fp32; None where nothing depends on the gate
    p_d_probs,  # [T, E] fp32; None where nothing depends on the probabilities
    p_signal,  # [E, D] any float
    p_noise,  # [E, D] any float; None without noise
    p_d_logit,  # [T, F] fp32, out
    p_d_h,  # [T, D] any float, out; None where h needs no gradient
    T,
    D,
    E,
    F,
    b_token: tl.constexpr,
    b_width: tl.constexpr,
    b_expert: tl.constexpr,
    precision: tl.constexpr,
):
    """The derivatives by both kinds of logits and by h, of b_token tokens. Grid: (T / b_token,)."""
    i_token = tl.program_id(0).to(tl.int64) * b_token + tl.arange(0, b_token)
    i_expert = tl.arange(0, b_expert)
    m_token, m_expert = i_token < T, i_expert < E
    o_logit = i_token[:, None] * E + i_expert[None, :]
    m_logit = m_token[:, None] & m_expert[None, :]
    probs = tl.load(p_probs + o_logit, mask=m_logit, other=0.0)
    d_probs = tl.zeros([b_token, b_expert], tl.float32)
    if p_d_probs is not None:
        d_probs += tl.load(p_d_probs + o_logit, mask=m_logit, other=0.0)
    if p_d_gate is not None:
        expert = tl.load(p_expert + i_token, mask=m_token, other=0)
        d_gate = tl.load(p_d_gate + i_token, mask=m_token, other=0.0)
        d_probs += tl.where(expert[:, None] == i_expert[None, :], d_gate[:, None], 0.0)
    d_signal = probs * (d_probs - tl.sum(probs * d_probs, axis=1)[:, None])
    p_row = p_d_logit + i_token[:, None] * F + i_expert[None, :]
    tl.store(p_row, d_signal, mask=m_logit)
    d_width = d_signal
    if p_noise is not None:
        d_width = d_signal * tl.load(p_slope + o_logit, mask=m_logit, other=0.0)
        tl.store(p_row + E, d_width, mask=m_logit)
    if p_d_h is not None:
        for first in range(0, D, b_width):
            i_width = first + tl.arange(0, b_width)
            m_width = i_width < D
            o_column = i_expert[:, None].to(tl.int64) * D + i_width[None, :]
            m_column = m_expert[:, None] & m_width[None, :]
            column = tl.load(p_signal + o_column, mask=m_column, other=0.0).to(tl.float32)
            d_h = tl.dot(d_signal, column, input_precision=precision)
            if p_noise is not None:
                column = tl.load(p_noise + o_column, mask=m_column, other=0.0).to(tl.float32)
                d_h = tl.dot(d_width, column, d_h, input_precision=precision)
            p_rows = p_d_h + i_token[:, None] * D + i_width[None, :]
            m_rows = m_token[:, None] & m_width[None, :]
            tl.store(p_rows, d_h.to(p_d_h.dtype.element_ty), mask=m_rows)


@triton.jit(do_not_specialize=["T", "split"])
def route_weight_kernel(
    p_d_logit,  # [T, F] fp32
    p_h,  # [T, D] any float
    p_partial,  # [ceil(T / split), F, D] fp32, out
    T,
    D,
    F,
    split,  # tokens that one program sums
    b_token: tl.constexpr,
    b_width: tl.constexpr,
    b_column: tl.constexpr,  # F rounded up to a power of two, at least 16
    precision: tl.constexpr,
):
    """``d_logit^T h`` over `split` tokens. Grid: (D / b_width, T / split).

    Partial sums in fixed ranges instead of atomics: the same bits in every run.
    """
    i_width = tl.program_id(0) * b_width + tl.arange(0, b_width)
    i_part = tl.program_id(1).to(tl.int64)
    i_column = tl.arange(0, b_column)
    m_width, m_column = i_width < D, i_column < F
    total = tl.zeros([b_column, b_width], tl.float32)
    for first in range(0, split, b_token):
        i_token = i_part * split + first + tl.arange(0, b_token)
        m_token = i_token < T
        p_slopes = p_d_logit + i_token[None, :] * F + i_column[:, None]
        d_logit = tl.load(p_slopes, mask=m_column[:, None] & m_token[None, :], other=0.0)
        p_rows = p_h + i_token[:, None] * D + i_width[None, :]
        h = tl.load(p_rows, mask=m_token[:, None] & m_width[None, :], other=0.0).to(tl.float32)
        total = tl.dot(d_logit, h, total, input_precision=precision)
    p_out = p_partial + (i_part * F + i_column[:, None]) * D + i_width[None, :]
    tl.store(p_out, total, mask=m_column[:, None] & m_width[None, :])


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
    p_count,  # [C, b_expert] int32, of chunks of b_count tokens
    p_token,  # [S] int32, out
    p_slot,  # [T] int32, out
    p_tile,  # [S / block] int32, out
    p_offset,  # [E + 1] int32, out
    T,
    E,
    C,
    S,
    block: tl.constexpr,
    b_chunk: tl.constexpr,  # a multiple of b_count
    b_count: tl.constexpr,
    b_expert: tl.constexpr,
    b_rows: tl.constexpr,  # chunks summed at a time
):
    """Place b_chunk tokens, and mark the empty ones among b_chunk slots. Grid: (S / b_chunk,).

    Every program sums the counts again, out of the L2 cache, instead of a third launch: 32 kB at
    65536 tokens and 16 experts, 256 kB with 64.
    """
    i_chunk = tl.program_id(0)
    i_expert = tl.arange(0, b_expert)
    total = tl.zeros([b_expert], tl.int32)
    before = tl.zeros([b_expert], tl.int32)
    for first in range(0, C, b_rows):
        i_row = first + tl.arange(0, b_rows)
        p_rows = p_count + i_row.to(tl.int64)[:, None] * b_expert + i_expert[None, :]
        count = tl.load(p_rows, mask=(i_row < C)[:, None], other=0)
        m_before = i_row < i_chunk * (b_chunk // b_count)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where(m_before[:, None], count, 0), axis=0)
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
