"""Routed LoRA with one choice per token: rows sorted by expert, one product per segment.

Shape suffixes: T tokens, D input width, O output width, E experts, R rank, Q the ranks of all
projections side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16
"""Bytes that every stride of a grouped product must be a multiple of."""


def fits(x: Tensor, A: Sequence[Sequence[Tensor]], B: Sequence[Sequence[Tensor]]) -> bool:
    """Whether `per_token` can compute this: on a CPU, not fp64, aligned widths, some token."""
    widths = [x.shape[-1], *(A_p[0].shape[0] for A_p in A), *(B_p[0].shape[0] for B_p in B)]
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.numel() > 0
        and all(width * x.itemsize % ALIGNMENT == 0 for width in widths)
    )


def per_token(
    x: Tensor,
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    expert: Tensor,
    weight: Tensor,
) -> list[Tensor]:
    """``delta_p = B_pe (A_pe x) * weight`` for ``e = expert[t]``, at the cost of one LoRA.

    Args:
        x: ``[..., D]`` in the dtype of the factors.
        A: per projection and expert ``[R, D]``, all of one rank.
        B: per projection and expert ``[O_p, R]``.
        expert: int64 ``x.shape[:-1]``.
        weight: shaped like ``expert``, gate times scaling.

    Returns:
        Per projection ``[..., O_p]``.
    """
    pairs = [factor for factors in (*A, *B) for factor in factors]
    rows_TD, expert_T, weight_T = x.flatten(0, -2), expert.flatten(), weight.flatten()
    deltas = _PerToken.apply(rows_TD, expert_T, weight_T, len(A), *pairs)  # type: ignore[no-untyped-call]
    return [delta.unflatten(0, x.shape[:-1]) for delta in deltas]


@torch.library.custom_op("prw_kernels::segment_product", mutates_args=())
def segment_product(rows_TK: Tensor, factor_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm` as an operator with shapes of its own, for compiled graphs.

    The shape function of torch's (2.13) knows bf16 only.

    Args:
        rows_TK: sorted rows.
        factor_EKN: one factor per segment.
        ends_E: int32, where each segment ends.
    """
    return F.grouped_mm(rows_TK, factor_EKN, offs=ends_E)


@segment_product.register_fake
def _(rows_TK: Tensor, factor_EKN: Tensor, ends_E: Tensor) -> Tensor:
    return rows_TK.new_empty(rows_TK.shape[0], factor_EKN.shape[2])


def _product(rows_TK: Tensor, factor_EKN: Tensor, ends_E: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        product: Tensor = segment_product(rows_TK, factor_EKN, ends_E)
        return product
    return F.grouped_mm(rows_TK, factor_EKN, offs=ends_E)


class _PerToken(torch.autograd.Function):
    """The two products of a low-rank pair and their derivatives, as in `_PerSample`.

    Only the products whose factor depends on the row are done in sorted order. Rank-sized tensors
    go back to the given order, in which a factor's gradient is one product over all tokens where
    the rows of other experts are zero: shapes never depend on values.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, expert_T: Tensor, weight_T: Tensor, count: int, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        experts = len(factors) // (2 * count)
        of = [factors[i : i + experts] for i in range(0, len(factors), experts)]
        A_EQD = torch.stack([torch.cat(pair) for pair in zip(*of[:count], strict=True)])
        B_EOR = [torch.stack(of_projection) for of_projection in of[count:]]
        order_T = torch.argsort(expert_T, stable=True)
        back_T = torch.empty_like(order_T).scatter_(
            0, order_T, torch.arange(len(order_T), device=order_T.device)
        )
        index_E = torch.arange(experts, device=expert_T.device)
        ends_E = (expert_T[:, None] == index_E).sum(0).cumsum(0).to(torch.int32)
        h_TQ = _product(x_TD.index_select(0, order_T), A_EQD.mT, ends_E)
        wh_TQ = (h_TQ * weight_T.index_select(0, order_T)[:, None]).to(h_TQ.dtype)
        deltas = tuple(
            _product(wh_TR, b_EOR.mT, ends_E).index_select(0, back_T)
            for wh_TR, b_EOR in zip(wh_TQ.chunk(count, dim=-1), B_EOR, strict=True)
        )
        h_TQ = h_TQ.index_select(0, back_T)
        saved = (x_TD, expert_T, weight_T, order_T, back_T, ends_E, h_TQ, A_EQD, *B_EOR)
        ctx.save_for_backward(*saved)
        return deltas

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, expert_T, weight_T, order_T, back_T, ends_E, h_TQ, A_EQD, *B_EOR = ctx.saved_tensors
        dy = [grad.to(h_TQ.dtype) for grad in grads]
        s_TQ = torch.cat(
            [
                _product(dy_TO.index_select(0, order_T), b_EOR, ends_E)
                for dy_TO, b_EOR in zip(dy, B_EOR, strict=True)
            ],
            dim=-1,
        ).index_select(0, back_T)
        needs_x, _, needs_weight, _, *needs = ctx.needs_input_grad
        d_weight = (s_TQ * h_TQ).sum(1).to(weight_T.dtype) if needs_weight else None
        ws_TQ = (s_TQ * weight_T[:, None]).to(s_TQ.dtype)
        dx = None
        if needs_x:
            sorted_TQ = ws_TQ.index_select(0, order_T)
            dx = _product(sorted_TQ, A_EQD, ends_E).index_select(0, back_T)
        count, experts = len(B_EOR), A_EQD.shape[0]
        d_factors: list[Tensor | None] = [None] * len(needs)
        for e in [e for e in range(experts) if any(needs[e::experts])]:
            mine_T1 = (expert_T == e)[:, None]
            dA_QD = torch.where(mine_T1, ws_TQ, 0.0).T @ x_TD
            wh_TQ = torch.where(mine_T1, h_TQ * weight_T[:, None], 0.0).to(h_TQ.dtype)
            parts = zip(dA_QD.chunk(count), dy, wh_TQ.chunk(count, dim=-1), strict=True)
            for p, (dA_RD, dy_TO, wh_TR) in enumerate(parts):
                d_factors[p * experts + e] = dA_RD
                d_factors[(count + p) * experts + e] = dy_TO.T @ wh_TR
        return dx, None, d_weight, None, *d_factors
