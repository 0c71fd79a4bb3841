"""Routed LoRA by Triton kernels: what the kernels take, made of what the operator is given.

Shape suffixes: T tokens, D input width, O output width, E experts, R rank,
``...`` the leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prw_kernels.backend import check_interpreted, installed, runs_triton
from prw_kernels.routed_lora.reference import spread
from prw_kernels.routed_lora.tiled_op import routed_lora_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_tiled(x: Tensor) -> str:
    """Why the kernels cannot take an x in this dtype on this device; empty if they can."""
    if not installed():
        return 'needs the package triton: pip install "prw[triton]"'
    if not runs_triton(x.device):
        return (
            f"runs on CUDA and ROCm devices and x is on {x.device}; move it there, set "
            "TRITON_INTERPRET=1 to try the kernels on a CPU"
        )
    if x.dtype not in DTYPES:
        return f"computes in float32, bfloat16 and float16 and the factors are {x.dtype}; cast them"
    return ""


def tiled(
    x: Tensor,
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scaling: Sequence[Sequence[float]],
    expert: Tensor | None,
    gate: Tensor | None,
    *,
    results: Sequence[Tensor] = (),
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """``y_p = base_p + B_pe (A_pe x) * (scaling_pe * gate)``; the base a result or a product.

    Args:
        x: contiguous ``[..., D]`` in the dtype of the factors, not empty.
        A: per projection and expert ``[R_e, D]``. Ranks that differ are padded.
        B: per projection and expert ``[O_p, R_e]``.
        scaling: per projection and expert. Where they differ they go into B.
        expert: shaped like a prefix of ``x.shape[:-1]``; None only with one expert.
        gate: shaped like a prefix of ``x.shape[:-1]``; None means 1.
        results: per projection ``[..., O_p]``, or empty if there are weights.
        weights: per projection ``[O_p, D]``, frozen, in the dtype of x.
        biases: per projection ``[O_p]``, frozen, or empty.

    Returns:
        Per projection ``[..., O_p]``.

    Raises:
        ValueError: tensors on several devices, or a dtype that Triton's interpreter gets wrong.
    """
    for other in (expert, gate, *results, *weights, *biases):
        if other is not None and other.device != x.device:
            raise ValueError(f"x is on {x.device} and another argument on {other.device}")
    check_interpreted(x, *results)
    lead = x.shape[:-1]
    x_TD = x.view(-1, x.shape[-1])
    if expert is None:
        expert_T = torch.zeros(x_TD.shape[0], dtype=torch.int64, device=x.device)
    else:
        expert_T = _per_token(expert, lead)
    gate_T = None if gate is None else _per_token(gate.to(torch.float32), lead)
    factor, B = _one_scaling(scaling, B)
    A, B = _one_rank(A, B)
    _, _, _, _, *outputs = routed_lora_op(
        x_TD,
        [a for A_p in A for a in A_p],
        [b for B_p in B for b in B_p],
        [result.reshape(-1, result.shape[-1]).contiguous() for result in results],
        list(weights),
        list(biases),
        expert_T,
        gate_T,
        factor,
    )
    return tuple(y_TO.view(*lead, y_TO.shape[-1]) for y_TO in outputs)


def _per_token(value: Tensor, lead: torch.Size) -> Tensor:
    """A choice per sample becomes one per token of it."""
    return spread(value, len(lead)).expand(lead).reshape(-1).contiguous()


def _one_scaling(
    scaling: Sequence[Sequence[float]], B: Sequence[Sequence[Tensor]]
) -> tuple[float, Sequence[Sequence[Tensor]]]:
    if len({s for row in scaling for s in row}) == 1:
        return float(scaling[0][0]), B
    scaled = [
        [b_OR * s for b_OR, s in zip(B_p, row, strict=True)]
        for B_p, row in zip(B, scaling, strict=True)
    ]
    return 1.0, scaled


def _one_rank(
    A: Sequence[Sequence[Tensor]], B: Sequence[Sequence[Tensor]]
) -> tuple[Sequence[Sequence[Tensor]], Sequence[Sequence[Tensor]]]:
    """Zero rows and columns make the ranks alike and change no number."""
    rank = max(a_RD.shape[0] for A_p in A for a_RD in A_p)
    if all(a_RD.shape[0] == rank for A_p in A for a_RD in A_p):
        return A, B
    padded_A = [[F.pad(a_RD, (0, 0, 0, rank - a_RD.shape[0])) for a_RD in A_p] for A_p in A]
    padded_B = [[F.pad(b_OR, (0, rank - b_OR.shape[1])) for b_OR in B_p] for B_p in B]
    return padded_A, padded_B
