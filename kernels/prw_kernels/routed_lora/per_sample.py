"""Routed LoRA with one choice per sample: gathered factors, batched products, written backward.

Shape suffixes: B samples, T tokens of a sample, D input width, O output width, E experts, R rank,
Q the ranks of all projections side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prw_kernels.routed_lora.checks import check_once


def per_sample(
    x: Tensor,
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scaling: Sequence[Sequence[float]],
    expert: Tensor,
    gate: Tensor | None,
) -> list[Tensor]:
    """``delta_p = B_pe (A_pe x) * scaling * gate`` for ``e = expert[b]``, at the cost of one LoRA.

    Args:
        x: ``[B, ..., D]`` in the dtype of the factors.
        A: per projection and expert ``[R, D]``, all of one rank.
        B: per projection and expert ``[O_p, R]``.
        scaling: per projection and expert, all one number.
        expert: int64 ``[B]``.
        gate: ``[B]``; None means 1.

    Returns:
        Per projection ``[B, ..., O_p]``.
    """
    weight = torch.ones_like(expert, dtype=x.dtype) if gate is None else gate
    pairs = [factor for factors in (*A, *B) for factor in factors]
    deltas = _PerSample.apply(x.flatten(1, -2), expert, weight * scaling[0][0], len(A), *pairs)  # type: ignore[no-untyped-call]
    return [delta.unflatten(1, x.shape[1:-1]) for delta in deltas]


class _PerSample(torch.autograd.Function):
    """The two products of a low-rank pair and their derivatives.

    ``h = A x``, ``y = w B h``, and with ``g = dL/dy``:
    ``s = B^T g``, ``dw = <s, h>``, ``dx = A^T (w s)``, ``dA = (w s) x^T``, ``dB = g (w h)^T``.

    Only rank-sized tensors are weighted, and a factor's gradient is one product over all tokens in
    which the rows of other experts are zero: static shapes, and zeros for an expert nobody chose.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, expert_B: Tensor, weight_B: Tensor, count: int, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        experts = len(factors) // (2 * count)
        of = [factors[i : i + experts] for i in range(0, len(factors), experts)]
        A_EQD = torch.stack([torch.cat(pair) for pair in zip(*of[:count], strict=True)])
        B_EOR = [torch.stack(of_projection) for of_projection in of[count:]]
        h_BTQ = torch.bmm(x_BTD, _gather(A_EQD, expert_B).transpose(1, 2))
        weight_B11 = weight_B[:, None, None]
        deltas = tuple(
            torch.bmm(h_BTR, _gather(b_EOR, expert_B).transpose(1, 2)) * weight_B11
            for h_BTR, b_EOR in zip(h_BTQ.chunk(count, dim=-1), B_EOR, strict=True)
        )
        ctx.save_for_backward(x_BTD, expert_B, weight_B11, h_BTQ, A_EQD, *B_EOR)
        return deltas

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_once()
        with torch.autocast(grads[0].device.type, enabled=False):
            return _gradients(ctx, grads)


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    x_BTD, expert_B, weight_B11, h_BTQ, A_EQD, *B_EOR = ctx.saved_tensors
    dy = [grad.to(h_BTQ.dtype) for grad in grads]
    s_BTQ = torch.cat(
        [
            torch.bmm(dy_BTO, _gather(b_EOR, expert_B))
            for dy_BTO, b_EOR in zip(dy, B_EOR, strict=True)
        ],
        dim=-1,
    )
    needs_x, _, needs_weight, _, *needs = ctx.needs_input_grad
    d_weight = (s_BTQ * h_BTQ).sum((1, 2)).to(weight_B11.dtype) if needs_weight else None
    ws_BTQ = (s_BTQ * weight_B11).to(s_BTQ.dtype)
    dx = torch.bmm(ws_BTQ, _gather(A_EQD, expert_B)) if needs_x else None
    count, experts = len(B_EOR), A_EQD.shape[0]
    d_factors: list[Tensor | None] = [None] * len(needs)
    learning = [e for e in range(experts) if any(needs[e::experts])]
    for e in learning:
        mine_B11 = (expert_B == e).to(s_BTQ.dtype)[:, None, None]
        dA_QD = (ws_BTQ * mine_B11).flatten(0, 1).T @ x_BTD.flatten(0, 1)
        wh_BTQ = (h_BTQ * (weight_B11 * mine_B11)).to(h_BTQ.dtype)
        parts = zip(dA_QD.chunk(count), dy, wh_BTQ.chunk(count, dim=-1), strict=True)
        for p, (dA_RD, dy_BTO, wh_BTR) in enumerate(parts):
            d_factors[p * experts + e] = dA_RD
            dB_OR = dy_BTO.flatten(0, 1).T @ wh_BTR.flatten(0, 1)
            d_factors[(count + p) * experts + e] = dB_OR
    return dx, None, d_weight, None, *d_factors


def _gather(factor_E: Tensor, expert_B: Tensor) -> Tensor:
    return factor_E.index_select(0, expert_B)
