"""What one forward tells the veteran gate: usage and its derivative, in closed form, no graph.

Shape suffixes: T routed rows, D input width, E experts that take part.
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
    """What a routing was computed from: enough to differentiate it afterwards."""

    h_TD: Tensor
    noise: Sequence[Tensor]
    eps_TE: Tensor | None


@torch.no_grad()
def observe(
    routing: Routing,
    inputs: RouterPass | None,
    newest: int,
    keep: Tensor | None,
    learning: Sequence[tuple[int, Tensor, Tensor | None]],
) -> GroupRecord:
    """Count the rows of the newest expert and differentiate the straight-through count.

    Args:
        routing: the result, ``probs`` ``[..., E]``.
        inputs: what it was computed from; None for a forced route, which has no derivative.
        newest: index of the expert that counts.
        keep: bool, shaped like ``routing.expert``; rows outside are not counted.
        learning: index, signal column and noise column of each pair that may learn.

    Returns:
        The record of this one forward.
    """
    used = routing.expert == newest
    count = torch.full((), used.numel(), dtype=torch.int64, device=used.device)
    if keep is not None:
        used, count = used & keep, keep.sum()
    columns: list[Tensor] = []
    jacobian: list[Tensor] = []
    if learning and inputs is not None:
        rows = None if keep is None else keep.reshape(-1, 1)
        with torch.autocast(used.device.type, enabled=False):  # in fp32, as the router itself
            signal_ED, noise_ED = usage_jacobian(routing.probs.flatten(0, -2), inputs, newest, rows)
        for index, signal, noise in learning:
            columns.append(signal)
            jacobian.append(signal_ED[index])
            if noise is not None:
                columns.append(noise)
                jacobian.append(noise_ED[index])
    seen = Routing(routing.expert, routing.gate.detach(), routing.probs.detach())
    return GroupRecord(used.sum(), count, tuple(columns), tuple(jacobian), [seen])


def usage_jacobian(
    probs_TE: Tensor, inputs: RouterPass, newest: int, keep_T1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The derivative of the straight-through usage ``sum_t u_t`` by the router's columns.

    With ``u_t = 1[e_t = n] + (p_tn - p_tn.detach())`` and ``w = h W_r + eps * softplus(h W_n)``:

    ``d u_t / d w_tj = p_tn (1[j = n] - p_tj)``

    ``d sum_t u_t / d W_r[:, j] = sum_t h_t  du_t/dw_tj``

    ``d sum_t u_t / d W_n[:, j] = sum_t h_t  du_t/dw_tj  eps_tj  sigmoid(h_t W_n[:, j])``

    Args:
        probs_TE: p.
        inputs: h, the columns of W_n and eps; without eps the second derivative is zero.
        newest: n.
        keep_T1: bool; other rows do not count, whatever they contain.

    Returns:
        By W_r and by W_n, both ``[E, D]``.
    """
    h_TD = inputs.h_TD
    slope_TE = -probs_TE * probs_TE[:, newest, None]
    slope_TE[:, newest] += probs_TE[:, newest]
    if keep_T1 is not None:
        slope_TE = torch.where(keep_T1, slope_TE, 0.0)
        h_TD = torch.where(keep_T1, h_TD, 0.0)
    signal_ED = slope_TE.T @ h_TD
    if inputs.eps_TE is None:
        return signal_ED, torch.zeros_like(signal_ED)
    width_TE = column_product(h_TD, inputs.noise)[:, : probs_TE.shape[1]].sigmoid()
    return signal_ED, (slope_TE * inputs.eps_TE.to(h_TD.dtype) * width_TE).T @ h_TD
