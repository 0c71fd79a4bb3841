"""Launches of the routed LoRA kernels; imported only where there is Triton.

Shape suffixes: T tokens, S slots, D input width, O output width, E experts, R rank, Q the ranks of
all projections side by side, K and N the summed axis and the columns of a product, W the width of a
row, L experts that learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from prw_kernels.routed_lora.kernels import gather_kernel, gram_kernel, scatter_kernel
from prw_kernels.routed_lora.tiles import Tiles, fit, parts
from prw_kernels.routing import Segments


def shrink(row_TK: Tensor, factor_ENK: Tensor, groups: Segments, tiles: Tiles) -> Tensor:
    """``out_s = F_e row_t`` for every slot: ``[S, N]``; rows of empty slots hold anything."""
    out_SN = row_TK.new_empty((groups.token.shape[0], factor_ENK.shape[1]))
    _gather(row_TK, factor_ENK, out_SN, groups, tiles, (None, None, None, None, 1.0), True)
    return out_SN


def shrink_gradient(
    dy: Sequence[Tensor],
    B_EOR: Sequence[Tensor],
    h_SQ: Tensor,
    gate_T: Tensor | None,
    scaling: float,
    groups: Segments,
    tiles: Tiles,
    *,
    needs_gate: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """With ``s = B_e^T dy_t`` and ``w = scaling * gate_t``, per projection.

    Returns:
        ``w s`` and ``w h``, both ``[S, Q]``, and if needed ``dgate_T = scaling <s, h>`` in fp32.
    """
    ws_SQ, wh_SQ, count = torch.empty_like(h_SQ), torch.empty_like(h_SQ), len(dy)
    rank, tokens = h_SQ.shape[1] // count, dy[0].shape[0]
    columns = triton.cdiv(rank, tiles.gather.columns(rank))
    d_gate = None
    if needs_gate:
        d_gate = h_SQ.new_empty((count, columns, tokens), dtype=torch.float32)
    parts_SR = (value.chunk(count, dim=1) for value in (h_SQ, ws_SQ, wh_SQ))
    for p, (h_SR, ws_SR, wh_SR) in enumerate(zip(*parts_SR, strict=True)):
        extra = (h_SR, wh_SR, gate_T, None if d_gate is None else d_gate[p], scaling)
        _gather(dy[p], B_EOR[p], ws_SR, groups, tiles, extra, False)
    return ws_SQ, wh_SQ, None if d_gate is None else d_gate.sum((0, 1))


def _gather(
    row_TK: Tensor,
    factor: Tensor,
    out_SN: Tensor,
    groups: Segments,
    tiles: Tiles,
    extra: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float],
    transposed: bool,
) -> None:
    columns = factor.shape[1] if transposed else factor.shape[2]
    tile = tiles.gather
    b_n = tile.columns(columns)
    grid = (groups.token.shape[0] // tile.m, triton.cdiv(columns, b_n))
    gather_kernel[grid](
        row_TK,
        factor,
        out_SN,
        groups.token,
        groups.expert,
        *extra,
        row_TK.shape[0],
        K=row_TK.shape[1],
        N=columns,
        width=out_SN.stride(0),
        transposed=transposed,
        precision=precision(),
        b_tile=groups.block,
        b_m=tile.m,
        b_n=b_n,
        b_k=fit(row_TK.shape[1], tile.k),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def expand(
    h_SR: Tensor,
    factor: Tensor,
    groups: Segments,
    tiles: Tiles,
    out_TN: Tensor,
    *,
    transposed: bool,
    scaling: float = 1.0,
    gate_T: Tensor | None = None,
    bias: Tensor | None = None,
    base_TN: Tensor | None = None,
) -> Tensor:
    """``out_t = F_e^T h_s * scaling * gate_t + bias + base_t``: every row written once.

    Args:
        h_SR: ``[S, K]``, or columns of a wider one.
        factor: ``[E, N, K]`` if transposed, else ``[E, K, N]``.
        out_TN: returned, written.
    """
    tile, columns = tiles.scatter, out_TN.shape[1]
    b_n = tile.columns(columns)
    grid = (groups.token.shape[0] // tile.m, triton.cdiv(columns, b_n))
    scatter_kernel[grid](
        h_SR,
        factor,
        out_TN,
        groups.token,
        groups.expert,
        gate_T,
        bias,
        base_TN,
        scaling,
        out_TN.shape[0],
        K=h_SR.shape[1],
        N=columns,
        width=h_SR.stride(0),
        transposed=transposed,
        precision=precision(),
        b_tile=groups.block,
        b_m=tile.m,
        b_n=b_n,
        b_k=fit(h_SR.shape[1], tile.k),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_TN


def gram(
    row_TW: Tensor,
    slot_SN: Tensor,
    groups: Segments,
    tiles: Tiles,
    learns: Sequence[bool],
    *,
    transposed: bool,
) -> Tensor:
    """``sum over the slots of expert e of row_t outer slot_s`` for every expert that learns.

    Slots are summed in a fixed number of parts, so that few experts still fill the device, and the
    parts in a second step: no atomics, the same bits in every run.

    Args:
        row_TW: ``[T, W]``.
        slot_SN: ``[S, N]``, or columns of a wider one.
        learns: per expert.
        transposed: whether an expert's output is ``[N, W]`` and not ``[W, N]``.

    Returns:
        ``[L, N, W]`` or ``[L, W, N]``.
    """
    (tokens, width), columns = row_TW.shape, slot_SN.shape[1]
    tile, count = tiles.gram, sum(learns)
    b_w, b_n = fit(width, tile.k), tile.columns(columns)
    grid_w, grid_n = triton.cdiv(width, b_w), triton.cdiv(columns, b_n)
    split = parts(count * grid_w * grid_n, tokens)
    shape = (split, count, *((columns, width) if transposed else (width, columns)))
    out = row_TW.new_empty(shape, dtype=torch.float32 if split > 1 else row_TW.dtype)
    done = 0
    for first, run in runs(learns):
        gram_kernel[(grid_w, grid_n, run * split)](
            row_TW,
            slot_SN,
            out[:, done:],
            groups.token,
            groups.offset,
            tokens,
            first,
            split,
            out.stride(0),
            W=width,
            N=columns,
            width=slot_SN.stride(0),
            transposed=transposed,
            precision=precision(),
            b_m=tile.m,
            b_n=b_n,
            b_w=b_w,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        done += run
    return out[0] if split == 1 else out.sum(0).to(row_TW.dtype)


def runs(learns: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First index and length of every run of experts that learn."""
    first = None
    for e, learning in enumerate([*learns, False]):
        if learning and first is None:
            first = e
        elif not learning and first is not None:
            yield first, e - first
            first = None


def precision() -> str:
    """Of fp32 products: as torch is told to do its own. Other dtypes are exact either way."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
