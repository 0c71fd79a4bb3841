"""Routed LoRA: the operator, its checks, and the choice of implementation.

Shape suffixes: D input width, O output width, R rank, ``...`` the leading axes of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from prw_kernels.routed_lora.per_sample import per_sample
from prw_kernels.routed_lora.per_token import fits, per_token
from prw_kernels.routed_lora.reference import reference
from prw_kernels.routed_lora.tiled import check_tiled, picks_tiled, tiled


def routed_lora(
    results: Sequence[Tensor],
    x: Tensor,
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scaling: Sequence[Sequence[float]],
    expert: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    backend: Literal["auto", "reference", "triton"] = "auto",
) -> tuple[Tensor, ...]:
    """Add the gated residual of the routed expert to one or more linear projections of ``x``.

    ``y_p = result_p + B_pe (A_pe x) * (scaling_pe * gate)``  with ``e = expert``

    The order of operations is PEFT's: with one expert and no gate, or gate 1, the bits are PEFT's.
    Shapes never depend on the values of ``expert``, and every factor that requires a gradient
    receives one, zeros when nobody chose its expert. Autocast is off inside: the computation runs
    in the dtype of the factors, and each output keeps the dtype of its result.

    Args:
        results: per projection ``[..., O_p]``, usually the outputs of the frozen linears.
        x: ``[..., D]``, the input the projections share; any strides, at least two axes.
        A: per projection and expert ``[R_e, D]``; experts may differ in rank.
        B: per projection and expert ``[O_p, R_e]``.
        scaling: per projection and expert, alpha / rank.
        expert: int64 in ``[0, experts)``, shaped like a prefix of ``x.shape[:-1]``: all of it for
            one choice per token, the first axis for one per sample. May be None with one expert.
        gate: weight of the choice, shaped like ``expert``; None means 1.
        backend: ``"reference"`` computes every expert on every token; ``"auto"`` takes batched
            products where there is one choice per sample and, on a CPU, products of sorted rows
            where there is one per token; on CUDA and ROCm devices the kernels of `tiled` where
            `picks_tiled` says so; all in the same numbers up to rounding. ``"triton"`` takes the
            kernels always, there or in Triton's interpreter.

    Returns:
        Per projection a tensor shaped and typed like its result.

    Raises:
        ValueError: no expert, several without ``expert``, or an ``expert`` or ``gate`` whose shape
            does not begin the shape of ``x``; with backend ``"triton"``, arguments that
            `check_tiled` refuses.
    """
    check_routed(x, scaling, expert, gate)
    with torch.autocast(x.device.type, enabled=False):
        # On strides that do not fold, torch picks the product (and its bits) by requires_grad: a
        # veteran would differ from the expert that learnt.
        inputs = x.to(A[0][0].dtype).contiguous()
        if backend == "triton" or picks_tiled(backend, inputs, A, expert):
            check_tiled(inputs, A, B, expert, gate, results=results)
            if inputs.numel():
                return tiled(inputs, A, B, scaling, expert, gate, results=results)
        way = None
        if backend == "auto" and expert is not None and len(scaling[0]) > 1:
            way = _faster(inputs, A, B, scaling, expert)
        if way is not None and expert is not None:
            weight = torch.ones_like(expert, dtype=inputs.dtype) if gate is None else gate
            deltas = way(inputs, A, B, expert, weight * scaling[0][0])
        else:
            deltas = reference(inputs, A, B, scaling, expert, gate)
        return tuple(
            (result + delta).to(result.dtype) for result, delta in zip(results, deltas, strict=True)
        )


def check_routed(
    x: Tensor, scaling: Sequence[Sequence[float]], expert: Tensor | None, gate: Tensor | None
) -> None:
    """Refuse arguments of `routed_lora` that no implementation can compute."""
    experts = len(scaling[0]) if scaling else 0
    if not experts:
        raise ValueError("routed_lora needs at least one expert")
    if expert is None and experts > 1:
        raise ValueError(f"routed_lora has {experts} experts: say which with expert=")
    for name, value in (("expert", expert), ("gate", gate)):
        if value is not None and value.shape != x.shape[:-1][: value.dim()]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, which does not begin the shape of the "
                f"input {tuple(x.shape)}"
            )


def _faster(
    x: Tensor,
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scaling: Sequence[Sequence[float]],
    expert: Tensor,
) -> Callable[..., list[Tensor]] | None:
    """The implementation that costs one LoRA, where there is one; shapes and dtypes decide."""
    if not _alike(A, scaling):
        return None
    if x.dim() > 2 and expert.dim() == 1:
        return per_sample
    return per_token if expert.shape == x.shape[:-1] and fits(x, A, B) else None


def _alike(A: Sequence[Sequence[Tensor]], scaling: Sequence[Sequence[float]]) -> bool:
    """Whether all experts have one rank and one scaling, so that they can be stacked."""
    return (
        len({a.shape[0] for A_p in A for a in A_p}) == 1
        and len({s for row in scaling for s in row}) == 1
    )
