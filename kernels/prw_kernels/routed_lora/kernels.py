"""Routed LoRA on the device: three products whose factor depends on the row's expert.

`gather_kernel` reads rows of tokens and writes rows of slots (the shrink, and its transpose on
incoming gradients); `scatter_kernel` reads slots and writes every row of a token once (the expand,
and its transpose); `gram_kernel` sums outer products over the slots of an expert (the gradients of
the factors). No atomics: every output has one writer, so two runs give the same bits.

Two orders of rows. Grouped (``experts`` is 0): slots are those of `prw_kernels.routing.Segments`,
a tile of ``b_tile`` slots has one expert, and ``b_m`` divides ``b_tile``. Dense (``experts`` is E):
slot s is token s, every expert is computed, and each row keeps its own; nothing is sorted.

Names: ``p_`` pointer, ``i_`` index, ``o_`` indices along a tile, ``m_`` mask, ``b_`` block size.
T tokens, S slots (T if dense), E experts, K the summed axis, N the columns of one expert, L experts
that learn. Rows are addressed in 64 bits: T * K passes 2**31.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def gather_kernel(
    p_row,  # [T, K]
    p_factor,  # [E, K, N], or [E, N, K] if transposed
    p_out,  # [S, width], its first N columns
    p_token,  # [S] int32, T in an empty slot; None if dense
    p_expert,  # [S / b_tile] int32, -1 in an unused tile; if dense [T], any integer type
    p_h,  # [S, width], the forward's output, or None in the forward
    p_weighted,  # [S, width], out: weight * h
    p_gate,  # [T] float32, or None
    p_dgate,  # [column tiles, T] float32, out: partial sums, or None
    scaling,
    T,
    K: tl.constexpr,
    N: tl.constexpr,
    width: tl.constexpr,
    transposed: tl.constexpr,
    experts: tl.constexpr,
    precision: tl.constexpr,
    b_tile: tl.constexpr,
    b_m: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
):
    """``out_s = row_t F_e`` for the token t of slot s.

    In the backward (``p_h`` given) with ``weight = scaling * gate``: ``out_s = weight row_t F_e``,
    ``weighted_s = weight h_s``, and ``dgate = scaling <row_t F_e, h_s>`` over these columns.
    Rows of empty slots hold anything. Grid: (S / b_m, columns / b_n), the columns N, dense E * N.
    """
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_slot = i_m.to(tl.int64) * b_m + tl.arange(0, b_m)
    o_n = i_n * b_n + tl.arange(0, b_n)
    if experts == 0:
        i_expert = tl.load(p_expert + i_m * b_m // b_tile).to(tl.int64)
        if i_expert < 0:
            return
        o_token = tl.load(p_token + o_slot)
        m_token = o_token < T
        m_n = o_n < N
        o_column = o_n
        m_at = m_n[None, :]
        p_factor += i_expert * (K * N)
    else:
        o_token = o_slot
        m_token = o_slot < T
        m_n = o_n < experts * N
        o_column = o_n % N
        own = _own(p_expert, o_slot, m_token, experts)
        m_at = (own[:, None] == (o_n // N)[None, :]) & m_n[None, :]
    # An empty slot reads token 0: the loads need no mask, and nobody reads what comes of it.
    o_token = tl.where(m_token, o_token, 0).to(tl.int64)
    p_row += o_token * K
    if transposed:
        p_column = p_factor + o_n * K
    else:
        p_column = p_factor + (o_n // N) * (K * N) + o_column
    acc = tl.zeros((b_m, b_n), tl.float32)
    for k in range(0, K, b_k):
        o_k = k + tl.arange(0, b_k)
        row = _load(p_row[:, None] + o_k[None, :], None, o_k < K, K % b_k)
        p_at = p_column[None, :] + (o_k if transposed else o_k * N)[:, None]
        ragged: tl.constexpr = K % b_k + (experts * N if experts else N) % b_n
        factor = _load(p_at, o_k < K if ragged else None, m_n, ragged)
        acc = tl.dot(row, factor, acc, input_precision=precision)
    p_at = o_slot[:, None] * width + o_column[None, :]
    if p_h is not None:
        weight = tl.zeros((b_m,), tl.float32) + scaling
        if p_gate is not None:
            weight *= tl.load(p_gate + o_token)
        h = tl.load(p_h + p_at, mask=m_at, other=0.0).to(tl.float32)
        if p_dgate is not None:
            dgate = tl.sum(tl.where(m_at, acc * h, 0.0), axis=1) * scaling
            tl.store(p_dgate + i_n.to(tl.int64) * T + o_token, dgate, mask=m_token)
        weighted = (h * weight[:, None]).to(p_weighted.dtype.element_ty)
        tl.store(p_weighted + p_at, weighted, mask=m_at)
        acc *= weight[:, None]
    tl.store(p_out + p_at, acc.to(p_out.dtype.element_ty), mask=m_at)


@triton.jit(do_not_specialize=["T", "E"])
def scatter_kernel(
    p_slot,  # [S, width], its first K columns
    p_factor,  # [E, K, N], or [E, N, K] if transposed
    p_out,  # [T, N]
    p_token,  # [S] int32, T in an empty slot; None if dense
    p_expert,  # [S / b_tile] int32, -1 in an unused tile; if dense [T], any integer type
    p_gate,  # [T] float32, or None
    p_bias,  # [N], or None
    p_base,  # [T, N], or None
    p_choice,  # [T] any integer type, the expert of each token; None in the backward
    scaling,
    T,
    E,
    K: tl.constexpr,
    N: tl.constexpr,
    width: tl.constexpr,
    transposed: tl.constexpr,
    experts: tl.constexpr,
    precision: tl.constexpr,
    b_tile: tl.constexpr,
    b_m: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
):
    """``out_t = slot_s F_e * scaling * gate_t + bias + base_t``. Grid: (S / b_m, N / b_n).

    A row whose choice is outside the pool is NaN: nobody waits for a check, and nobody trains on
    the numbers of another expert.
    """
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_slot = i_m.to(tl.int64) * b_m + tl.arange(0, b_m)
    o_n = i_n * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    if transposed:
        p_column = p_factor + o_n * K
    else:
        p_column = p_factor + o_n
    if experts == 0:
        i_expert = tl.load(p_expert + i_m * b_m // b_tile).to(tl.int64)
        if i_expert < 0:
            return
        o_token = tl.load(p_token + o_slot)
        m_token = o_token < T
        o_token = tl.where(m_token, o_token, 0).to(tl.int64)
        p_slot += o_slot * width
        p_column += i_expert * (K * N)
        acc = _expand(p_slot, p_column, m_n, K, N, transposed, precision, b_m, b_n, b_k)
    else:
        o_token = o_slot
        m_token = o_slot < T
        own = _own(p_expert, o_slot, m_token, experts)
        p_slot += tl.where(m_token, o_slot, 0) * width
        acc = tl.zeros((b_m, b_n), tl.float32)
        for i_expert in range(experts):
            p_own = p_column + i_expert * (K * N)
            found = _expand(p_slot, p_own, m_n, K, N, transposed, precision, b_m, b_n, b_k)
            acc = tl.where((own == i_expert)[:, None], found, acc)
    weight = tl.zeros((b_m,), tl.float32) + scaling
    if p_gate is not None:
        weight *= tl.load(p_gate + o_token, mask=m_token, other=0.0)
    acc *= weight[:, None]
    if p_choice is not None:
        choice = tl.load(p_choice + o_token, mask=m_token, other=0)
        acc = tl.where(((choice >= 0) & (choice < E))[:, None], acc, float("nan"))
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
    p_token,  # [S] int32, T in an empty slot; if dense [T], the expert of each token
    p_offset,  # [E + 1] int32, the first slot of each expert; None if dense
    T,
    first,  # the expert of the first output
    parts,  # each expert's slots are summed in so many parts
    stride,  # elements from one part of the output to the next
    W: tl.constexpr,
    N: tl.constexpr,
    width: tl.constexpr,
    transposed: tl.constexpr,
    experts: tl.constexpr,
    precision: tl.constexpr,
    b_m: tl.constexpr,
    b_n: tl.constexpr,
    b_w: tl.constexpr,
):
    """``out_e = sum over slots s of expert e of row_t outer slot_s``, zeros without any.

    Grid: (W / b_w, N / b_n, experts that learn * parts).
    """
    i_w, i_n = tl.program_id(0), tl.program_id(1)
    i_part, i_out = tl.program_id(2) % parts, tl.program_id(2) // parts
    if experts == 0:
        start = tl.load(p_offset + first + i_out)
        end = tl.load(p_offset + first + i_out + 1)
    else:
        start, end = 0, T
    share = tl.cdiv(tl.cdiv(end - start, b_m), parts) * b_m
    start += i_part * share
    end = tl.minimum(end, start + share)
    o_w = i_w * b_w + tl.arange(0, b_w)
    o_n = i_n * b_n + tl.arange(0, b_n)
    m_w, m_n = o_w < W, o_n < N
    acc = tl.zeros((b_w, b_n), tl.float32)
    for s in range(start, end, b_m):
        o_slot = s + tl.arange(0, b_m)
        if experts == 0:
            o_token = tl.load(p_token + o_slot)
            m_token = o_token < T
        else:
            o_token = o_slot
            m_token = _own(p_token, o_slot, o_slot < T, experts) == first + i_out
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
def _own(p_expert, o_token, m_token, experts: tl.constexpr):
    """The expert of each token, -1 outside the mask; an index outside the pool becomes the nearest
    inside, as in `prw_kernels.routing`.
    """
    own = tl.load(p_expert + o_token, mask=m_token, other=0)
    return tl.where(m_token, tl.minimum(tl.maximum(own, 0), experts - 1), -1)


@triton.jit
def _expand(
    p_slot,
    p_column,
    m_n,
    K: tl.constexpr,
    N: tl.constexpr,
    transposed: tl.constexpr,
    precision: tl.constexpr,
    b_m: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
):
    """Rows of slots times the factor of one expert: ``[b_m, b_n]``."""
    acc = tl.zeros((b_m, b_n), tl.float32)
    for k in range(0, K, b_k):
        o_k = k + tl.arange(0, b_k)
        slot = _load(p_slot[:, None] + o_k[None, :], None, o_k < K, K % b_k)
        p_at = p_column[None, :] + (o_k if transposed else o_k * N)[:, None]
        ragged: tl.constexpr = K % b_k + N % b_n
        factor = _load(p_at, o_k < K if ragged else None, m_n, ragged)
        acc = tl.dot(slot, factor, acc, input_precision=precision)
    return acc


@triton.jit
def _load(p_at, m_row, m_column, ragged: tl.constexpr):
    """A tile, zero outside the masks. Masks only where it may hang over: loads are wider without.

    ``m_row`` None masks no row; ``ragged`` 0 masks no column.
    """
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
