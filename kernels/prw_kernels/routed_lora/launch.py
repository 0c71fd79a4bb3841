"""Launches of the routed LoRA kernels; imported only where there is Triton.

Shape suffixes: T tokens, S slots, D input width, O output width, E experts, R rank, Q the ranks of
all projections side by side, K and N the summed axis and the columns of a product, W the width of a
row, L experts that learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from prw_kernels.routed_lora.blocks import Groups, arch_for, columns, fit, parts, runs
from prw_kernels.routed_lora.kernels import gather_kernel, gram_kernel, scatter_kernel
from prw_kernels.tiles import Tile, tile
from prw_kernels.tiles.timing import timed


def shrink(row_TK: Tensor, factor_ENK: Tensor, groups: Groups) -> Tensor:
    """``out_s = F_e row_t`` for every slot: ``[S, N]``; rows of empty slots hold anything."""
    out_SN = row_TK.new_empty((groups.slots, factor_ENK.shape[1]))
    _gather(row_TK, factor_ENK, out_SN, groups, (None, None, None, None, 1.0), transposed=True)
    return out_SN


def shrink_gradient(
    dy: Sequence[Tensor],
    B_EOR: Sequence[Tensor],
    h_SQ: Tensor,
    gate_T: Tensor | None,
    scaling: float,
    groups: Groups,
    *,
    needs_gate: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """With ``s = B_e^T dy_t`` and ``w = scaling * gate_t``, per projection.

    Returns:
        ``w s`` and ``w h``, both ``[S, Q]``, and if needed ``dgate_T = scaling <s, h>`` in fp32.
    """
    ws_SQ, wh_SQ = torch.empty_like(h_SQ), torch.empty_like(h_SQ)
    count, tokens = len(dy), dy[0].shape[0]
    d_gate = None
    if needs_gate:
        # One partial sum per program of a row; `columns` gives each at least 32 columns, or all.
        most = triton.cdiv(h_SQ.shape[1] // count * max(groups.dense, 1), 32)
        d_gate = h_SQ.new_empty((count, most, tokens), dtype=torch.float32)
    of_projections = (value.chunk(count, dim=1) for value in (h_SQ, ws_SQ, wh_SQ))
    for p, (h_SR, ws_SR, wh_SR) in enumerate(zip(*of_projections, strict=True)):
        extra = (h_SR, wh_SR, gate_T, None if d_gate is None else d_gate[p], scaling)
        _gather(dy[p], B_EOR[p], ws_SR, groups, extra, transposed=False)
    return ws_SQ, wh_SQ, None if d_gate is None else d_gate.sum((0, 1))


def _gather(
    row_TK: Tensor,
    factor: Tensor,
    out_SN: Tensor,
    groups: Groups,
    extra: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float],
    *,
    transposed: bool,
) -> None:
    tokens, width = row_TK.shape
    rank, d_gate = out_SN.shape[1], extra[3]

    def launch(t: Tile) -> None:
        if d_gate is not None:
            d_gate.zero_()  # partial sums of a search's other tiles, and those without program
        rows, every = triton.cdiv(groups.slots, t.m), rank * max(groups.dense, 1)
        b_n = columns(every, t.n, rows)
        gather_kernel[(rows, triton.cdiv(every, b_n))](
            row_TK,
            factor,
            out_SN,
            groups.token,
            groups.expert,
            *extra,
            tokens,
            K=width,
            N=rank,
            width=out_SN.stride(0),
            transposed=transposed,
            experts=groups.dense,
            precision=precision(),
            b_tile=groups.block,
            b_m=t.m,
            b_n=b_n,
            b_k=fit(width, t.k),
            num_warps=t.warps,
            num_stages=t.stages,
        )

    _run("gather", launch, row_TK, rank)


def expand(
    h_SR: Tensor,
    factor: Tensor,
    groups: Groups,
    out_TN: Tensor,
    *,
    transposed: bool,
    scaling: float = 1.0,
    gate_T: Tensor | None = None,
    bias: Tensor | None = None,
    base_TN: Tensor | None = None,
    choice_T: Tensor | None = None,
) -> Tensor:
    """``out_t = F_e^T h_s * scaling * gate_t + bias + base_t``: every row written once.

    Args:
        h_SR: ``[S, K]``, or columns of a wider one.
        factor: ``[E, N, K]`` if transposed, else ``[E, K, N]``.
        groups: of the tokens.
        out_TN: returned, written.
        transposed: see `factor`.
        scaling: of every expert.
        gate_T: fp32, or None for 1.
        bias: ``[N]``, or None.
        base_TN: added, or None.
        choice_T: the expert of each token; a row whose choice is outside the pool becomes NaN.
    """
    (tokens, width), rank = out_TN.shape, h_SR.shape[1]

    def launch(t: Tile) -> None:
        b_n = columns(width, t.n)
        scatter_kernel[(triton.cdiv(groups.slots, t.m), triton.cdiv(width, b_n))](
            h_SR,
            factor,
            out_TN,
            groups.token,
            groups.expert,
            gate_T,
            bias,
            base_TN,
            choice_T,
            scaling,
            tokens,
            factor.shape[0],
            K=rank,
            N=width,
            width=h_SR.stride(0),
            transposed=transposed,
            experts=groups.dense,
            precision=precision(),
            b_tile=groups.block,
            b_m=t.m,
            b_n=b_n,
            b_k=fit(rank, t.k),
            num_warps=t.warps,
            num_stages=t.stages,
        )

    _run("scatter", launch, out_TN, rank)
    return out_TN


def gram(
    row_TW: Tensor,
    slot_SN: Tensor,
    groups: Groups,
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
        groups: of the tokens.
        learns: per expert.
        transposed: whether an expert's output is ``[N, W]`` and not ``[W, N]``.

    Returns:
        ``[L, N, W]`` or ``[L, W, N]``.
    """
    (tokens, width), rank, count = row_TW.shape, slot_SN.shape[1], sum(learns)
    most = tile("gram", arch_for(row_TW), rank, tokens)
    split = parts(count * triton.cdiv(width, most.k) * triton.cdiv(rank, most.n), tokens)
    shape = (split, count, *((rank, width) if transposed else (width, rank)))
    out = row_TW.new_empty(shape, dtype=torch.float32 if split > 1 else row_TW.dtype)

    def launch(t: Tile) -> None:
        b_w, b_n, done = fit(width, t.k), columns(rank, t.n), 0
        for first, run in runs(learns):
            gram_kernel[(triton.cdiv(width, b_w), triton.cdiv(rank, b_n), run * split)](
                row_TW,
                slot_SN,
                out[:, done:],
                groups.expert if groups.dense else groups.token,
                groups.offset,
                tokens,
                first,
                split,
                out.stride(0),
                W=width,
                N=rank,
                width=slot_SN.stride(0),
                transposed=transposed,
                experts=groups.dense,
                precision=precision(),
                b_m=t.m,
                b_n=b_n,
                b_w=b_w,
                num_warps=t.warps,
                num_stages=t.stages,
            )
            done += run

    _run("gram", launch, row_TW, rank)
    return out[0] if split == 1 else out.sum(0).to(row_TW.dtype)


def _run(kernel: str, launch: Callable[[Tile], None], row: Tensor, rank: int) -> None:
    """Launch with the tile of the table, or with the fastest where a search is asked for."""

    launch(tile(kernel, arch_for(row), rank, row.shape[0], measure=timed(launch)))


def precision() -> str:
    """Of fp32 products: as torch is told to do its own. Other dtypes are exact either way."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
