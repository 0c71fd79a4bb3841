"""Routed LoRA: the operator.

Shape suffixes: D input width, O output width, R rank, ``...`` the leading axes of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prw_kernels.routed_lora.backends import Backend, Case, choose
from prw_kernels.routed_lora.checks import check


def routed_lora(
    results: Sequence[Tensor],
    x: Tensor,
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scaling: Sequence[Sequence[float]],
    expert: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    backend: Backend = "auto",
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
        backend: ``"reference"`` computes every expert on every token and is the truth; ``"cpu"`` is
            written by hand for CPUs; ``"triton"`` for GPUs; ``"auto"`` takes the fastest that can
            compute the case, by its shapes, dtypes and device, and says so once in the log
            ``prw_kernels``. All are the same numbers up to rounding.

    Returns:
        Per projection a tensor shaped and typed like its result.

    Raises:
        ValueError: arguments that do not fit together, an index outside the pool (seen on a CPU;
            on a device, where nothing is waited for, the row is NaN or the device asserts), or a
            backend that is not available or cannot compute the case.
        RuntimeError: in a backward pass with ``create_graph=True``, unless the backend is
            ``"reference"``; that one also takes `torch.func`.
    """
    check(results, x, A, B, scaling, expert, gate)
    with torch.autocast(x.device.type, enabled=False):
        # On strides that do not fold, torch picks the product (and its bits) by requires_grad: a
        # veteran would differ from the expert that learnt.
        inputs = x.to(A[0][0].dtype).contiguous()
        chosen = choose(backend, Case(inputs, A, scaling, expert))
        if chosen.adds:
            return tuple(chosen.run(inputs, A, B, scaling, expert, gate, results=results))
        deltas = chosen.run(inputs, A, B, scaling, expert, gate)
        pairs = zip(results, deltas, strict=True)
        return tuple(_sum(result, delta, chosen.owned) for result, delta in pairs)


def _sum(result: Tensor, delta: Tensor, in_place: bool) -> Tensor:
    """``result + delta`` in the dtype of the result; memory that is there already is cheaper."""
    if in_place and delta.dtype == result.dtype:
        return delta.add_(result)
    return (result + delta).to(result.dtype)
