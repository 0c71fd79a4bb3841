"""What one forward tells the veteran gate: usage and its derivative, in closed form, no graph.

Shape suffixes: T routed rows, D in_features, N experts that take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prw.call import GroupRecord
from prw.router import Routing, column_product


@dataclass(frozen=True)
class RouterPass:
    """The inputs of one routing: what is needed to differentiate it afterwards."""

    h_TD: Tensor
    noise: Sequence[Tensor]
    eps_TN: Tensor | None


@torch.no_grad()
def observe(
    routing: Routing,
    inputs: RouterPass,
    newest: int,
    keep: Tensor | None,
    learning: Sequence[tuple[int, Tensor, Tensor | None]],
) -> GroupRecord:
    """Count the rows of the newest expert ``n`` and differentiate the straight-through count.

    With ``u_t = 1[e_t = n] + (p_tn - p_tn.detach())`` and ``w = h W_r + eps * softplus(h W_n)``:

    ``d u_t / d w_tj = p_tn (1[j = n] - p_tj)``

    ``d (sum_t u_t) / d W_r[:, j] = sum_t h_t  d u_t / d w_tj``

    ``d (sum_t u_t) / d W_n[:, j] = sum_t h_t  d u_t / d w_tj * eps_tj * sigmoid(h_t W_n[:, j])``

    Args:
        routing: the result, ``probs`` ``[..., N]``.
        inputs: what it was computed from.
        newest: n.
        keep: bool, shaped like ``routing.expert``; rows outside are not counted.
        learning: index, signal column and noise column of each pair that may learn.

    Returns:
        The record of this one forward.
    """
    h_TD = inputs.h_TD.detach()
    chosen = routing.expert == newest
    probs_TN = routing.probs.detach().flatten(0, -2).to(h_TD.dtype)
    if keep is None:
        count = torch.full((), chosen.numel(), dtype=torch.int64, device=chosen.device)
    else:
        chosen = chosen & keep
        count = keep.sum()
    columns: list[Tensor] = []
    jacobian: list[Tensor] = []
    if learning and newest < probs_TN.shape[1]:
        slope_TN = -probs_TN * probs_TN[:, newest, None]
        slope_TN[:, newest] += probs_TN[:, newest]
        if keep is not None:
            slope_TN = torch.where(keep.reshape(-1, 1), slope_TN, 0.0)
            h_TD = torch.where(keep.reshape(-1, 1), h_TD, 0.0)
        signal_ND = slope_TN.T @ h_TD
        noise_ND = None
        if inputs.eps_TN is not None:
            width_TN = column_product(h_TD, inputs.noise)[:, : probs_TN.shape[1]].sigmoid()
            noise_ND = (slope_TN * inputs.eps_TN.to(h_TD.dtype) * width_TN).T @ h_TD
        for index, signal, noise in learning:
            columns.append(signal)
            jacobian.append(signal_ND[index])
            if noise is not None:
                columns.append(noise)
                zero = torch.zeros_like(signal_ND[index])
                jacobian.append(zero if noise_ND is None else noise_ND[index])
    detached = Routing(routing.expert, routing.gate.detach(), routing.probs.detach())
    return GroupRecord(chosen.sum(), count, tuple(columns), tuple(jacobian), [detached])
