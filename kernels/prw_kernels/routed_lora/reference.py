"""Routed LoRA in plain PyTorch: the truth every other backend is compared with.

Shape suffixes: D in_features, O out_features, R rank, N experts, P projections,
S samples, T tokens of one sample, ``...`` the leading dimensions of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Factors = Sequence[Sequence[Tensor]]


def routed_lora(
    results: Sequence[Tensor],
    x: Tensor,
    A: Factors,
    B: Factors,
    scaling: Sequence[float],
    expert: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Add the gated residual of the routed expert to one or more linear projections of ``x``.

    ``y_p = result_p + B_pe (A_pe x) * scaling_e * gate``  with ``e = expert``

    The order of operations is PEFT's, so with a single expert and no gate the bits are PEFT's.
    Nothing depends on the values of ``expert``: shapes are static, and every factor that requires
    a gradient receives one, a zero when no token chose its expert. Autocast is off inside; the
    computation runs in the dtype of the factors and each output keeps the dtype of its result.

    Args:
        results: P tensors ``[..., O_p]``, usually the outputs of the frozen linears.
        x: ``[..., D]``, the input the projections share; any strides, any number of dimensions.
        A: P x N tensors ``[R_e, D]``; the rank may differ between experts.
        B: P x N tensors ``[O_p, R_e]``.
        scaling: N factors, alpha / rank of each expert.
        expert: int64 index in ``[0, N)``, its shape a prefix of ``x.shape[:-1]``: one choice per
            token, or one per sample. May be None when N is 1.
        gate: weight of the chosen expert, shaped like ``expert``; None means 1.

    Returns:
        P tensors shaped and typed like ``results``.

    Raises:
        ValueError: no experts, several experts without ``expert``, or an ``expert`` or ``gate``
            whose shape is not a prefix of the shape of ``x``.
    """
    _check(x, scaling, expert, gate)
    with torch.autocast(x.device.type, enabled=False):
        inputs = x.to(A[0][0].dtype)
        weight = None if gate is None else _spread(gate, x.dim())
        if expert is None or len(scaling) == 1:
            deltas = [
                F.linear(F.linear(inputs, A_p[0]), B_p[0]) * scaling[0]
                for A_p, B_p in zip(A, B, strict=True)
            ]
        elif expert.dim() == 1 and x.dim() > 2 and _alike(A, scaling):
            deltas = _gathered(inputs, A, B, scaling[0], expert)
        else:
            deltas = _selected(inputs, A, B, scaling, expert)
        return tuple(
            (result + (delta if weight is None else delta * weight)).to(result.dtype)
            for result, delta in zip(results, deltas, strict=True)
        )


def _check(
    x: Tensor, scaling: Sequence[float], expert: Tensor | None, gate: Tensor | None
) -> None:
    if not scaling:
        raise ValueError("routed_lora needs at least one expert")
    if expert is None and len(scaling) > 1:
        raise ValueError(f"routed_lora has {len(scaling)} experts: say which with expert=")
    for name, value in (("expert", expert), ("gate", gate)):
        if value is not None and value.shape != x.shape[: min(value.dim(), x.dim() - 1)]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, which does not begin the shape of the "
                f"input {tuple(x.shape)}"
            )


def _spread(value: Tensor, dims: int) -> Tensor:
    """View ``value`` with trailing ones, so that it broadcasts against ``dims`` dimensions."""
    return value.reshape(value.shape + (1,) * (dims - value.dim()))


def _alike(A: Factors, scaling: Sequence[float]) -> bool:
    """Whether all experts have one rank and one scaling, and so can be stacked."""
    return len({a.shape[0] for A_p in A for a in A_p}) == 1 and len(set(scaling)) == 1


def _selected(
    x: Tensor, A: Factors, B: Factors, scaling: Sequence[float], expert: Tensor
) -> list[Tensor]:
    """Every expert on every token, then a selection: N times the work, for any routing."""
    chosen = _spread(expert, x.dim())
    deltas = []
    for A_p, B_p in zip(A, B, strict=True):
        delta = F.linear(F.linear(x, A_p[0]), B_p[0]) * scaling[0]
        for e in range(1, len(scaling)):
            other = F.linear(F.linear(x, A_p[e]), B_p[e]) * scaling[e]
            delta = torch.where(chosen == e, other, delta)
        deltas.append(delta)
    return deltas


def _gathered(
    x: Tensor, A: Factors, B: Factors, scaling: float, expert_S: Tensor
) -> list[Tensor]:
    """One choice per sample: gather that sample's factors and multiply in one batched product.

    The projections share the first product, so ``x`` is read once.
    """
    rank, samples = A[0][0].shape[0], x.shape[0]
    x_STD = x.flatten(1, -2)
    A_NQD = torch.stack([torch.cat(of_expert) for of_expert in zip(*A, strict=True)])  # Q = P R
    h_STQ = torch.bmm(x_STD, A_NQD.index_select(0, expert_S).transpose(1, 2))
    deltas = []
    for h_STR, B_p in zip(h_STQ.split(rank, dim=-1), B, strict=True):
        B_SOR = torch.stack(list(B_p)).index_select(0, expert_S)
        delta = torch.bmm(h_STR, B_SOR.transpose(1, 2)) * scaling
        deltas.append(delta.reshape(samples, *x.shape[1:-1], B_SOR.shape[1]))
    return deltas
