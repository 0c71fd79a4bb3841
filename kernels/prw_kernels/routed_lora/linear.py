"""Frozen linear projections of one input together with their routed LoRA: the residual goes first.

Shape suffixes: D input width, O output width, R rank, ``...`` the leading axes of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prw_kernels.routed_lora.backends import Backend, Case, choose
from prw_kernels.routed_lora.checks import check
from prw_kernels.routed_lora.op import routed_lora
from prw_kernels.routed_lora.tiled import tiled, why_not_tiled


def routed_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scaling: Sequence[Sequence[float]],
    expert: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    """Linear projections of ``x`` plus the gated residual of the routed expert.

    ``y_p = x W_p^T + b_p + B_pe (A_pe x) * (scaling_pe * gate)``  with ``e = expert``

    On CUDA and ROCm devices the residual and the bias are written first and the product with W is
    added to them in its own fp32 accumulator (``delta.addmm_(x, W^T)``), forward and backward: the
    outputs are not read and written once more, and x is shared by one autograd node. That takes
    weights that are plain (not quantised, not subclasses), frozen, contiguous and in the dtype of
    x, and no autocast; then the residual is computed in that dtype too, and the factors are cast.
    Everything else is ``F.linear`` followed by `routed_lora`.

    Args:
        x: ``[..., D]``, at least two axes.
        weights: per projection ``[O_p, D]``.
        biases: per projection ``[O_p]`` or None.
        A: per projection and expert ``[R_e, D]``.
        B: per projection and expert ``[O_p, R_e]``.
        scaling: per projection and expert, alpha / rank.
        expert: as in `routed_lora`.
        gate: as in `routed_lora`.
        backend: as in `routed_lora`.

    Returns:
        Per projection ``[..., O_p]``.

    Raises:
        ValueError: as `routed_lora`.
    """
    _check_weights(x, weights, biases, len(A))
    case = Case(x, A, scaling, expert)
    if _folds(backend, case) and _plain(x, weights, biases):
        # Stand-ins for the results, of which only the shape is looked at.
        like = [x.new_empty(()).expand(*x.shape[:-1], W.shape[0]) for W in weights]
        check(like, x, A, B, scaling, expert, gate)
        choose(backend, case)  # says in the log what "auto" picks
        A = [[a.to(x.dtype) for a in A_p] for A_p in A]
        B = [[b.to(x.dtype) for b in B_p] for B_p in B]
        given = [] if all(b is None for b in biases) else _filled(weights, biases)
        inputs = x.contiguous()
        return tiled(inputs, A, B, scaling, expert, gate, weights=weights, biases=given)
    results = [F.linear(x, W, b) for W, b in zip(weights, biases, strict=True)]
    return routed_lora(results, x, A, B, scaling, expert, gate, backend=backend)


def _folds(backend: Backend, case: Case) -> bool:
    """Whether the kernels are asked for, by name or by the rule of `choose`, and can run."""
    if backend not in ("auto", "triton") or case.x.numel() == 0 or why_not_tiled(case.x):
        return False
    return backend == "triton" or (case.x.is_cuda and not case.plain)


def _check_weights(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], projections: int
) -> None:
    if not 0 < len(weights) == len(biases) == projections:
        raise ValueError(
            f"{len(weights)} weights, {len(biases)} biases and {projections} projections in A: "
            "give one of each per projection, None where there is no bias"
        )
    for p, (W, bias) in enumerate(zip(weights, biases, strict=True)):
        if W.dim() != 2 or W.shape[1] != x.shape[-1]:
            raise ValueError(
                f"weights[{p}] is {tuple(W.shape)}, which does not go with an input of width "
                f"{x.shape[-1]}"
            )
        if bias is not None and bias.shape != W.shape[:1]:
            raise ValueError(f"biases[{p}] is {tuple(bias.shape)}, expected ({W.shape[0]},)")


def _plain(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether the weights can be read as they lie and need no gradient."""
    frozen = [*weights, *(bias for bias in biases if bias is not None)]
    return not torch.is_autocast_enabled(x.device.type) and all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == x.dtype
        and tensor.is_contiguous()
        and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in frozen
    )


def _filled(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [
        weight.new_zeros(weight.shape[0]) if bias is None else bias
        for weight, bias in zip(weights, biases, strict=True)
    ]
