"""Routed LoRA on the device: three products over tokens grouped by expert.

`gather_kernel` reads rows of tokens and writes rows of slots (the shrink, and its transpose on
incoming gradients); `scatter_kernel` reads slots and writes every row of a token once (the expand,
and its transpose); `gram_kernel` sums outer products over the slots of an expert (the gradients of
the factors). No atomics: every output has one writer, so two runs give the same bits.

Names: ``p_`` pointer, ``i_`` index, ``o_`` indices along a tile, ``m_`` mask, ``b_`` block size.
T tokens, S slots, E experts, K the summed axis, N the columns of the output, L experts that learn.
The groups are `prw_kernels.routing.Segments`: a tile of ``b_tile`` slots has one expert, and
``b_m`` divides ``b_tile``. Rows are addressed in 64 bits: T * K passes 2**31.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def gather_kernel(
    p_row,  # [T, K]
    p_factor,  # [E, K, N], or [E, N, K] if transposed
    p_out,  # [S, width], its first N columns
    p_token,  # [S] int32, T in an empty slot
    p_expert,  # [S / b_tile] int32, -1 in an unused tile
    p_h,  # [S, width], forward's output, or None in the forward
    p_weighted,  # [S, width], out: weight * h
    p_gate,  # [T] float32, or None
    p_dgate,  # [ceil(N / b_n), T] float32, out: partial sums, or None
    scaling,
    T,
    K: tl.constexpr,
    N: tl.constexpr,
    width: tl.constexpr,
    transposed: tl.constexpr,
    precision: tl.constexpr,
    b_tile: tl.constexpr,
    b_m: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
):
    """``out_s = row_t F_e`` for the token t of slot s. Grid: (S / b_m, ceil(N / b_n)).

    In the backward (``p_h`` given) with ``weight = scaling * gate``: ``out_s = weight row_t F_e``,
    ``weighted_s = weight h_s``, and ``dgate = scaling <row_t F_e, h_s>`` over these columns.
    Rows of empty slots hold anything.
    """
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    i_expert = tl.load(p_expert + i_m * b_m // b_tile).to(tl.int64)
    if i_expert < 0:
        return
    o_slot = i_m.to(tl.int64) * b_m + tl.arange(0, b_m)
    o_token = tl.load(p_token + o_slot)
    m_token = o_token < T
    # An empty slot reads token 0: the loads need no mask, and nobody reads what comes of it.
    o_token = tl.where(m_token, o_token, 0).to(tl.int64)
    o_n = i_n * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    p_row += o_token * K
    p_factor += i_expert * (K * N)
    acc = tl.zeros((b_m, b_n), tl.float32)
    for k in range(0, K, b_k):
        o_k = k + tl.arange(0, b_k)
        row = _load(p_row[:, None] + o_k[None, :], None, o_k < K, K % b_k)
        factor = _factor(p_factor, o_k, o_n, K, N, transposed, b_k, b_n)
        acc = tl.dot(row, factor, acc, input_precision=precision)
    p_at = o_slot[:, None] * width + o_n[None, :]
    m_at = m_n[None, :]
    if p_h is not None:
        weight = tl.zeros((b_m,), tl.float32) + scaling
        if p_gate is not None:
            weight *= tl.load(p_gate + o_token)
        h = tl.load(p_h + p_at, mask=m_at, other=0.0).to(tl.float32)
        if p_dgate is not None:
            dgate = tl.sum(acc * h, axis=1) * scaling
            tl.store(p_dgate + i_n.to(tl.int64) * T + o_token, dgate, mask=m_token)
        weighted = (h * weight[:, None]).to(p_weighted.dtype.element_ty)
        tl.store(p_weighted + p_at, weighted, mask=m_at)
        acc *= weight[:, None]
    tl.store(p_out + p_at, acc.to(p_out.dtype.element_ty), mask=m_at)


@triton.jit(do_not_specialize=["T"])
def scatter_kernel(
    p_slot,  # [S, width], its first K columns
    p_factor,  # [E, K, N], or [E, N, K] if transposed
    p_out,  # [T, N]
    p_token,  # [S] int32, T in an empty slot
    p_expert,  # [S / b_tile] int32, -1 in an unused tile
    p_gate,  # [T] float32, or None
    p_bias,  # [N], or None
    p_base,  # [T, N], or None
    scaling,
    T,
    K: tl.constexpr,
    N: tl.constexpr,
    width: tl.constexpr,
    transposed: tl.constexpr,
    precision: tl.constexpr,
    b_tile: tl.constexpr,
    b_m: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
):
    """``out_t = slot_s F_e * scaling * gate_t + bias + base_t``. Grid: (S / b_m, ceil(N / b_n))."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    i_expert = tl.load(p_expert + i_m * b_m // b_tile).to(tl.int64)
    if i_expert < 0:
        return
    o_slot = i_m.to(tl.int64) * b_m + tl.arange(0, b_m)
    o_token = tl.load(p_token + o_slot)
    m_token = o_token < T
    o_token = tl.where(m_token, o_token, 0).to(tl.int64)
    o_n = i_n * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    p_slot += o_slot * width
    p_factor += i_expert * (K * N)
    acc = tl.zeros((b_m, b_n), tl.float32)
    for k in range(0, K, b_k):
        o_k = k + tl.arange(0, b_k)
        slot = _load(p_slot[:, None] + o_k[None, :], None, o_k < K, K % b_k)
        factor = _factor(p_factor, o_k, o_n, K, N, transposed, b_k, b_n)
        acc = tl.dot(slot, factor, acc, input_precision=precision)
    weight = tl.zeros((b_m,), tl.float32) + scaling
    if p_gate is not None:
        weight *= tl.load(p_gate + o_token)
    acc *= weight[:, None]
    if p_bias is not None:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_at = o_token[:, None] * N + o_n[None, :]
    m_at = m_token[:, None] & m_n[None, :]
    if p_base is not None:
        acc += tl.load(p_base + p_at, mask=m_at, other=0.0).to(tl.float32)
    tl.store(p_out + p_at, acc.to(p_out.dtype.element_ty), mask=m_at)


@triton.jit(do_not_specialize=["T", "first", "parts"])
def gram_kernel(
    p_row,  # [T, W]
    p_slot,  # [S, width], its first N columns
    p_out,  # [parts, L, W, N], or [parts, L, N, W] if transposed
    p_token,  # [S] int32, T in an empty slot
    p_offset,  # [E + 1] int32, the first slot of each expert
    T,
    first,  # the expert of the first output
    parts,  # each expert's slots are summed in so many parts
    stride,  # elements from one part of the output to the next
    W: tl.constexpr,
    N: tl.constexpr,
    width: tl.constexpr,
    transposed: tl.constexpr,
    precision: tl.constexpr,
    b_m: tl.constexpr,
    b_n: tl.constexpr,
    b_w: tl.constexpr,
):
    """``out_e = sum over slots s of expert e of row_t outer slot_s``, zeros without any.

    Grid: (ceil(W / b_w), ceil(N / b_n), experts * parts).
    """
    i_w, i_n = tl.program_id(0), tl.program_id(1)
    i_part, i_out = tl.program_id(2) % parts, tl.program_id(2) // parts
    start = tl.load(p_offset + first + i_out)
    end = tl.load(p_offset + first + i_out + 1)
    share = tl.cdiv(tl.cdiv(end - start, b_m), parts) * b_m
    start += i_part * share
    end = tl.minimum(end, start + share)
    o_w = i_w * b_w + tl.arange(0, b_w)
    o_n = i_n * b_n + tl.arange(0, b_n)
    m_w, m_n = o_w < W, o_n < N
    acc = tl.zeros((b_w, b_n), tl.float32)
    for s in range(start, end, b_m):
        o_slot = s + tl.arange(0, b_m)
        o_token = tl.load(p_token + o_slot)
        m_token = o_token < T
        p_rows = p_row + (o_token.to(tl.int64) * W)[:, None] + o_w[None, :]
        p_slots = p_slot + (o_slot.to(tl.int64) * width)[:, None] + o_n[None, :]
        row = _load(p_rows, m_token, m_w, W % b_w)
        slot = _load(p_slots, m_token, m_n, N % b_n)
        acc = tl.dot(tl.trans(row), slot, acc, input_precision=precision)
    p_out += i_part.to(tl.int64) * stride + i_out.to(tl.int64) * (W * N)
    if transposed:
        p_at = p_out + o_n[None, :].to(tl.int64) * W + o_w[:, None]
    else:
        p_at = p_out + o_w[:, None].to(tl.int64) * N + o_n[None, :]
    tl.store(p_at, acc.to(p_out.dtype.element_ty), mask=m_w[:, None] & m_n[None, :])


@triton.jit
def _factor(
    p_factor,
    o_k,
    o_n,
    K: tl.constexpr,
    N: tl.constexpr,
    transposed: tl.constexpr,
    b_k: tl.constexpr,
    b_n: tl.constexpr,
):
    """A tile ``[b_k, b_n]`` of one expert's factor, which lies ``[N, K]`` if transposed."""
    if transposed:
        p_at = p_factor + o_n[None, :] * K + o_k[:, None]
    else:
        p_at = p_factor + o_k[:, None] * N + o_n[None, :]
    # Masks only where a tile hangs over: without, the loads are wide and asynchronous.
    if K % b_k == 0 and N % b_n == 0:
        tile = tl.load(p_at)
    else:
        tile = tl.load(p_at, mask=(o_k < K)[:, None] & (o_n < N)[None, :], other=0.0)
    return tile


@triton.jit
def _load(p_at, m_row, m_column, ragged: tl.constexpr):
    """A tile, zero outside the masks; columns are masked only where the tile hangs over."""
    if m_row is None:
        if ragged == 0:
            tile = tl.load(p_at)
        else:
            tile = tl.load(p_at, mask=m_column[None, :], other=0.0)
    elif ragged == 0:
        tile = tl.load(p_at, mask=m_row[:, None], other=0.0)
    else:
        tile = tl.load(p_at, mask=m_row[:, None] & m_column[None, :], other=0.0)
    return tile
