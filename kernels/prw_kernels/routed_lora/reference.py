"""Routed LoRA in plain PyTorch: the truth every other implementation is compared with.

Shape suffixes: D input width, O output width, R rank, ``...`` the leading axes of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    x: Tensor,
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scaling: Sequence[Sequence[float]],
    expert: Tensor | None,
    gate: Tensor | None,
) -> list[Tensor]:
    """``delta_p = B_pe (A_pe x) * scaling_pe * gate``, each expert computed for every token.

    A selection keeps the chosen expert's value, so the other experts change no bit of it, whatever
    they contain. Costs as many LoRAs as there are experts. Autograd differentiates it.

    Args:
        x: ``[..., D]`` in the dtype of the factors.
        A: per projection and expert ``[R_e, D]``.
        B: per projection and expert ``[O_p, R_e]``.
        scaling: per projection and expert.
        expert: int64, ``x.shape[:-1]`` or a prefix of it; None only with one expert. An index
            outside the pool gives NaN, where nobody has looked (on a device, in a compiled graph).
        gate: shaped like ``expert``; None means 1.

    Returns:
        Per projection ``[..., O_p]``.
    """
    experts = len(A[0])
    chosen = []
    if expert is not None and experts > 1:
        chosen = [spread(expert == e, x.dim()) for e in range(experts)]
    weight = None if gate is None else spread(gate, x.dim())
    deltas = []
    for A_p, B_p, scaling_p in zip(A, B, scaling, strict=True):
        delta = _residual(x, A_p[0], B_p[0], scaling_p[0], weight)
        if chosen:
            delta = torch.where(chosen[0], delta, torch.nan)
        for e in range(1, experts):
            other = _residual(x, A_p[e], B_p[e], scaling_p[e], weight)
            delta = torch.where(chosen[e], other, delta)
        deltas.append(delta)
    return deltas


def spread(value: Tensor, dims: int) -> Tensor:
    """`value` with trailing axes of size 1, so that it broadcasts against `dims` axes."""
    return value.reshape(value.shape + (1,) * (dims - value.dim()))


def _residual(x: Tensor, A: Tensor, B: Tensor, scaling: float, weight: Tensor | None) -> Tensor:
    factor = scaling if weight is None else weight * scaling
    return F.linear(F.linear(x, A), B) * factor
