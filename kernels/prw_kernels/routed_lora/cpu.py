"""Routed LoRA on a CPU, written by hand: the autograd operation and which of two ways it takes.

Shape suffixes: D input width, O output width, R rank, ``...`` the leading axes of the input; U and
L as in `cpu_problem`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from prw_kernels.routed_lora import cpu_concat, cpu_sorted
from prw_kernels.routed_lora.checks import check_once, check_pool
from prw_kernels.routed_lora.cpu_problem import Needs, Problem, by_projection, units

CONCAT_RANKS = 64
"""Up to this sum of ranks, multiplying bf16 rows with every expert is faster than sorting them."""


def cpu(
    x: Tensor,
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scaling: Sequence[Sequence[float]],
    expert: Tensor,
    gate: Tensor | None,
) -> list[Tensor]:
    """``delta_p = B_pe (A_pe x) * scaling_pe * gate`` for ``e = expert``, at the cost of one LoRA.

    Args:
        x: contiguous ``[..., D]`` in the dtype of the factors.
        A: per projection and expert ``[R_e, D]``.
        B: per projection and expert ``[O_p, R_e]``.
        scaling: per projection and expert.
        expert: int64, shaped like ``x.shape[:-1]`` or like a prefix of it.
        gate: shaped like ``expert``; None means 1.

    Returns:
        Per projection ``[..., O_p]``, none of them a view.
    """
    weight = torch.ones_like(expert, dtype=x.dtype) if gate is None else gate
    factors = [factor for side in (A, B) for factors_p in side for factor in factors_p]
    flat = [float(s) for scaling_p in scaling for s in scaling_p]
    return list(_Routed.apply(x, expert, weight, flat, len(A), *factors))  # type: ignore[no-untyped-call]


def _way(x: Tensor, A: Sequence[Sequence[Tensor]]) -> ModuleType:
    """Shapes and dtypes decide, never values."""
    ranks = max(sum(A_RD.shape[0] for A_RD in A_p) for A_p in A)
    small = x.dtype == torch.bfloat16 and ranks <= CONCAT_RANKS
    return cpu_concat if small else cpu_sorted


def forward(
    x: Tensor,
    expert: Tensor,
    gate: Tensor,
    scaling: Sequence[float],
    count: int,
    factors: Sequence[Tensor],
) -> list[Tensor]:
    """The residual of each projection, then what the backward needs besides these arguments.

    Args:
        x, expert, gate: as in `cpu`.
        scaling: by projection, then by expert.
        count: how many projections.
        factors: all A, then all B, each by projection, then by expert.
    """
    problem = Problem.of(x, expert, gate, scaling, count, factors)
    deltas = [x.new_empty(*x.shape[:-1], B_p[0].shape[0]) for B_p in problem.B]
    saved = _way(x, problem.A).forward(problem, [units(delta, expert) for delta in deltas])
    return [*deltas, *saved]


def backward(
    grads: Sequence[Tensor],
    x: Tensor,
    expert: Tensor,
    gate: Tensor,
    scaling: Sequence[float],
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x, of the gate and of every factor: of those, in turn, that are needed.

    Autocast is off, also where a whole training step runs under it.
    """
    problem = Problem.of(x, expert, gate, scaling, len(grads), factors)
    factors_need = [by_projection(half, len(grads)) for half in by_projection(needs[2:], 2)]
    wanted = Needs(needs[0], needs[1], *factors_need)
    dy = [units(grad.to(x.dtype).contiguous(), expert) for grad in grads]
    way = _way(x, problem.A)
    with torch.autocast("cpu", enabled=False):
        dx, d_gate, d_A, d_B = way.backward(problem, dy, list(saved), wanted)
    found = [] if dx is None else [dx.view(x.shape)]
    found += [] if d_gate is None else [d_gate.view(gate.shape).to(gate.dtype)]
    return found + [grad for side in (d_A, d_B) for of in side for grad in of if grad is not None]


@torch.library.custom_op("prw_kernels::cpu_forward", mutates_args=())
def _forward_op(
    x: Tensor,
    expert: Tensor,
    gate: Tensor,
    scaling: list[float],
    count: int,
    factors: list[Tensor],
) -> list[Tensor]:
    check_pool(expert, len(scaling) // count)  # nobody looked while the graph was made
    return forward(x, expert, gate, scaling, count, factors)


@_forward_op.register_fake
def _(
    x: Tensor,
    expert: Tensor,
    gate: Tensor,
    scaling: list[float],
    count: int,
    factors: list[Tensor],
) -> list[Tensor]:
    A = by_projection(factors[: len(scaling)], count)
    B = by_projection(factors[len(scaling) :], count)
    deltas = [x.new_empty(*x.shape[:-1], B_p[0].shape[0]) for B_p in B]
    return [*deltas, *_way(x, A).saved_like(x, expert, A)]


@torch.library.custom_op("prw_kernels::cpu_backward", mutates_args=())
def _backward_op(
    grads: list[Tensor],
    x: Tensor,
    expert: Tensor,
    gate: Tensor,
    scaling: list[float],
    factors: list[Tensor],
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    return backward(grads, x, expert, gate, scaling, factors, saved, needs)


@_backward_op.register_fake
def _(
    grads: list[Tensor],
    x: Tensor,
    expert: Tensor,
    gate: Tensor,
    scaling: list[float],
    factors: list[Tensor],
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    A, B = factors[: len(scaling)], factors[len(scaling) :]
    empty = [leaf.new_empty(leaf.shape) for leaf in (x, gate, *A)]
    empty += [B_OR.new_empty(B_OR.T.shape).T for B_OR in B]
    return [leaf for leaf, need in zip(empty, needs, strict=True) if need]


class _Routed(torch.autograd.Function):
    """`forward` and `backward`, as they are, or as operators in a compiled graph.

    An operator costs 0.1 ms a call, more than all the rest of a small layer's bookkeeping.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expert: Tensor,
        gate: Tensor,
        scaling: list[float],
        count: int,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        run = _forward_op if torch.compiler.is_compiling() else forward
        found = run(x, expert, gate, scaling, count, list(factors))
        ctx.scaling, ctx.count = scaling, count
        ctx.save_for_backward(x, expert, gate, *factors, *found[count:])
        return tuple(found[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_once()
        x, expert, gate, *rest = ctx.saved_tensors
        size = 2 * len(ctx.scaling)
        x_needs, _, gate_needs, _, _, *factors_need = ctx.needs_input_grad
        needs = [x_needs, gate_needs, *factors_need]
        run = _backward_op if torch.compiler.is_compiling() else backward
        found = iter(
            run(list(grads), x, expert, gate, ctx.scaling, rest[:size], rest[size:], needs)
        )
        dx, d_gate, *d_factors = [next(found) if need else None for need in needs]
        return dx, None, d_gate, None, None, *d_factors
