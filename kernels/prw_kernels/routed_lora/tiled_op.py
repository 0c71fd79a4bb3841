"""Routed LoRA by Triton kernels as one operator: autograd, torch.compile and FSDP see one node.

Shape suffixes: T tokens, S slots, D input width, O output width, E experts, R rank, Q the ranks of
all projections side by side, L experts that learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prw_kernels.routed_lora.blocks import Groups, block_for, is_dense
from prw_kernels.routed_lora.checks import check_once
from prw_kernels.routing import segments
from prw_kernels.routing.reference import slots


@torch.library.custom_op("prw_kernels::routed_lora", mutates_args=())
def routed_lora_op(
    x_TD: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    results: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    expert_T: Tensor,
    gate_T: Tensor | None,
    scaling: float,
) -> list[Tensor]:
    """``y_p = base_p + scaling * gate * B_pe (A_pe x)``, where the base is a result or a product.

    Args:
        x_TD: contiguous, in the dtype of the factors.
        A: ``[R, D]`` of every projection and expert, the projections one after the other.
        B: ``[O_p, R]``, likewise.
        results: per projection ``[T, O_p]``; empty if there are weights.
        weights: per projection ``[O_p, D]``, ``base_p = x W_p^T + b_p``. They are frozen.
        biases: per projection ``[O_p]``, or empty.
        expert_T: integers in ``[0, E)``.
        gate_T: fp32, or None for 1.
        scaling: of every expert.

    Returns:
        For the backward ``h_SQ``, that is ``A_e x`` in the order of slots, and ``token_S``,
        ``expert_I`` and ``offset_F`` of `prw_kernels.routing.Segments`, empty where nothing is
        sorted (`is_dense`); then ``[T, O_p]`` per projection.
    """
    from prw_kernels.routed_lora.launch import expand, shrink

    count = len(results) or len(weights)
    A_EQD, B_EOR = _stack(A, B, count)
    with torch.cuda.device_of(x_TD):
        groups = _group(x_TD, expert_T, len(A) // count, A[0].shape[0])
        h_SQ = shrink(x_TD, A_EQD, groups)
        outputs = [h_SQ, *_routing(groups)]
        for p, h_SR in enumerate(h_SQ.chunk(count, dim=1)):
            dtype = results[p].dtype if results else x_TD.dtype
            y_TO = expand(
                h_SR,
                B_EOR[p],
                groups,
                x_TD.new_empty((x_TD.shape[0], B_EOR[p].shape[1]), dtype=dtype),
                transposed=True,
                scaling=scaling,
                gate_T=gate_T,
                bias=biases[p] if biases else None,
                base_TN=results[p] if results else None,
                choice_T=expert_T if len(A) > count else None,
            )
            # In place: out of place, torch first copies the residual.
            outputs.append(y_TO.addmm_(x_TD, weights[p].t()) if weights else y_TO)
    return outputs


@routed_lora_op.register_fake
def _(
    x_TD: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    results: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    expert_T: Tensor,
    gate_T: Tensor | None,
    scaling: float,
) -> list[Tensor]:
    count, rank = len(results) or len(weights), A[0].shape[0]
    experts, total, sizes = len(A) // count, x_TD.shape[0], (0, 0, 0)
    if not is_dense(experts, rank):
        block = block_for(x_TD, rank)
        total = slots(x_TD.shape[0], experts, block)
        sizes = (total, total // block, experts + 1)
    widths = [factor.shape[0] for factor in B[::experts]]
    dtypes = [result.dtype for result in results] or [x_TD.dtype] * count
    return [
        x_TD.new_empty((total, count * rank)),
        *(x_TD.new_empty(size, dtype=torch.int32) for size in sizes),
        *(
            x_TD.new_empty((x_TD.shape[0], width), dtype=dtype)
            for width, dtype in zip(widths, dtypes, strict=True)
        ),
    ]


@torch.library.custom_op("prw_kernels::routed_lora_backward", mutates_args=())
def routed_lora_backward_op(
    dy: list[Tensor],
    x_TD: Tensor,
    h_SQ: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    weights: list[Tensor],
    expert_T: Tensor,
    gate_T: Tensor | None,
    token_S: Tensor,
    expert_I: Tensor,
    offset_F: Tensor,
    scaling: float,
    needs_x: bool,
    needs_gate: bool,
    learns: list[bool],
) -> list[Tensor]:
    """The derivatives of `routed_lora_op`, from incoming ``[T, O_p]`` in the dtype of the factors.

    Returns:
        ``dx_TD`` if needed, ``dgate_T`` if needed, and if an expert learns ``dA_LQD`` and per
        projection ``dB_LOR``.
    """
    from prw_kernels.routed_lora.launch import expand, gram, shrink_gradient

    groups = _regroup(expert_T, token_S, expert_I, offset_F, len(A) // len(dy))
    A_EQD, B_EOR = _stack(A, B, len(dy))
    outputs: list[Tensor] = []
    with torch.cuda.device_of(x_TD):
        ws_SQ, wh_SQ, d_gate_T = shrink_gradient(
            dy, B_EOR, h_SQ, gate_T, scaling, groups, needs_gate=needs_gate
        )
        if needs_x:
            dx_TD = expand(ws_SQ, A_EQD, groups, torch.empty_like(x_TD), transposed=False)
            for dy_TO, weight_OD in zip(dy, weights, strict=False):
                dx_TD.addmm_(dy_TO, weight_OD)
            outputs.append(dx_TD)
        if d_gate_T is not None:
            outputs.append(d_gate_T)
        if any(learns):
            outputs.append(gram(x_TD, ws_SQ, groups, learns, transposed=True))
            for dy_TO, wh_SR in zip(dy, wh_SQ.chunk(len(dy), dim=1), strict=True):
                outputs.append(gram(dy_TO, wh_SR, groups, learns, transposed=False))
    return outputs


@routed_lora_backward_op.register_fake
def _(
    dy: list[Tensor],
    x_TD: Tensor,
    h_SQ: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    weights: list[Tensor],
    expert_T: Tensor,
    gate_T: Tensor | None,
    token_S: Tensor,
    expert_I: Tensor,
    offset_F: Tensor,
    scaling: float,
    needs_x: bool,
    needs_gate: bool,
    learns: list[bool],
) -> list[Tensor]:
    outputs = [torch.empty_like(x_TD)] if needs_x else []
    if needs_gate:
        outputs.append(x_TD.new_empty(x_TD.shape[:1], dtype=torch.float32))
    if count := sum(learns):
        outputs.append(x_TD.new_empty((count, h_SQ.shape[1], x_TD.shape[1])))
        rank = h_SQ.shape[1] // len(dy)
        outputs += [x_TD.new_empty((count, dy_TO.shape[1], rank)) for dy_TO in dy]
    return outputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep what the backward needs: nothing of the output's size, no shape set by the routing."""
    x_TD, A, B, _, weights, biases, expert_T, gate_T, ctx.scaling = inputs
    ctx.set_materialize_grads(False)
    ctx.counts = len(A), len(weights), len(biases)
    ctx.save_for_backward(x_TD, expert_T, gate_T, *output[:4], *A, *B, *weights)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    check_once()
    x_TD, expert_T, gate_T, h_SQ, token_S, expert_I, offset_F, *rest = ctx.saved_tensors
    factors, weight_count, bias_count = ctx.counts
    A, B, weights = rest[:factors], rest[factors : 2 * factors], rest[2 * factors :]
    count = len(grads) - 4
    experts = factors // count
    shapes = [(x_TD.shape[0], factor.shape[0]) for factor in B[::experts]]
    dy = [
        x_TD.new_zeros(shape) if grad is None else grad.to(x_TD.dtype).contiguous()
        for grad, shape in zip(grads[4:], shapes, strict=True)
    ]
    needs_x, needs_A, needs_B, needs_results, _, _, _, needs_gate, _ = ctx.needs_input_grad
    learns = [any(needs_A[e::experts]) or any(needs_B[e::experts]) for e in range(experts)]
    found = routed_lora_backward_op(
        *(dy, x_TD, h_SQ, A, B, weights, expert_T, gate_T),
        *(token_S, expert_I, offset_F, ctx.scaling, needs_x, needs_gate, learns),
    )
    dx = found.pop(0) if needs_x else None
    d_gate = found.pop(0) if needs_gate else None
    d_A: list[Tensor | None] = [None] * factors
    d_B: list[Tensor | None] = [None] * factors
    for i, e in enumerate(e for e, learning in enumerate(learns) if learning):
        for p, dA_RD in enumerate(found[0][i].chunk(count)):
            d_A[p * experts + e] = dA_RD
            d_B[p * experts + e] = found[1 + p][i]
    d_results = [grad if n else None for n, grad in zip(needs_results, grads[4:], strict=False)]
    frozen = [None] * weight_count, [None] * bias_count
    return dx, d_A, d_B, d_results, *frozen, None, d_gate, None


routed_lora_op.register_autograd(_backward, setup_context=_setup_context)


def _group(x_TD: Tensor, expert_T: Tensor, experts: int, rank: int) -> Groups:
    if is_dense(experts, rank):
        return Groups(slots=x_TD.shape[0], token=None, expert=expert_T, offset=None, dense=experts)
    found = segments(expert_T, experts, block=block_for(x_TD, rank))
    return _regroup(expert_T, found.token, found.expert, found.offset, experts)


def _regroup(
    expert_T: Tensor, token_S: Tensor, expert_I: Tensor, offset_F: Tensor, experts: int
) -> Groups:
    """The groups again, from what `_routing` kept of them."""
    if not token_S.shape[0]:
        return Groups(
            slots=expert_T.shape[0], token=None, expert=expert_T, offset=None, dense=experts
        )
    total = token_S.shape[0]
    block = total // expert_I.shape[0]
    return Groups(slots=total, token=token_S, expert=expert_I, offset=offset_F, block=block)


def _routing(groups: Groups) -> list[Tensor]:
    if groups.token is None or groups.offset is None:
        return [groups.expert.new_empty(0, dtype=torch.int32) for _ in range(3)]
    return [groups.token, groups.expert, groups.offset]


def _stack(A: Sequence[Tensor], B: Sequence[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
    """Per expert the ranks of all projections side by side ``[E, Q, D]``; per projection B."""
    experts = len(A) // count
    A_EQD = torch.stack([A[p * experts + e] for e in range(experts) for p in range(count)])
    A_EQD = A_EQD.view(experts, -1, A_EQD.shape[2])
    if len({b_OR.shape for b_OR in B}) == 1:
        return A_EQD, list(torch.stack(list(B)).unflatten(0, (count, experts)))
    return A_EQD, [torch.stack(list(B[p * experts : (p + 1) * experts])) for p in range(count)]
