"""Routing in plain PyTorch: the truth the kernels are compared with.

Shape suffixes: T tokens, D width of h, E experts, S slots (places for tokens, whole tiles of them
per expert), C chunks of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Who was chosen, with what weight.

    Attributes:
        expert: int64 ``[T]``.
        gate: probability of the chosen expert, ``[T]``; fp32 (fp64 for fp64 inputs).
        probs: ``[T, E]``, typed like ``gate``.
        count: int32 ``[C, columns]``, tokens of each chunk and expert, which spares
            `prw_kernels.routing.segments` a launch; None where that has no use for it.
    """

    expert: Tensor
    gate: Tensor
    probs: Tensor
    count: Tensor | None = None


def route_reference(
    h_TD: Tensor,
    signal_ED: Tensor,
    noise_ED: Tensor | None = None,
    eps_TE: Tensor | None = None,
) -> Routed:
    """`prw_kernels.routing.route` with autograd: ``p = softmax(h W_r + eps softplus(h W_n))``.

    In fp32, or in fp64 for fp64 inputs. A tie goes to the lowest index.
    """
    h_TD = h_TD.to(torch.promote_types(h_TD.dtype, torch.float32))
    with torch.autocast(h_TD.device.type, enabled=False):
        logits_TE = F.linear(h_TD, signal_ED.to(h_TD.dtype))
        if noise_ED is not None and eps_TE is not None:
            width_TE = F.softplus(F.linear(h_TD, noise_ED.to(h_TD.dtype)))
            logits_TE = logits_TE + eps_TE.to(h_TD.dtype) * width_TE
        probs_TE = torch.softmax(logits_TE, dim=-1)
    expert_T = logits_TE.detach().argmax(dim=-1)
    gate_T = probs_TE.gather(1, expert_T[:, None]).squeeze(1)
    return Routed(expert=expert_T, gate=gate_T, probs=probs_TE)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Tokens grouped by expert, every group rounded up to whole tiles of ``block`` slots.

    A kernel that works on tile ``i`` has one expert, ``expert[i]``, and reads the rows
    ``token[i * block : (i + 1) * block]``. All shapes follow from the numbers of tokens and experts
    alone. Within an expert the tokens keep their order.

    Six tokens, three experts, tiles of two slots, ``expert_T = [2, 0, 2, 2, 0, 0]``::

        slot index    0  1 | 2  3 | 4  5 | 6  7 | 8  9 | 10 11
        token         1  4 | 5  6 | 0  2 | 3  6 | 6  6 | 6  6      6 (= T) marks an empty slot
        expert          0  |   0  |   2  |   2  |  -1  |  -1       -1 marks an unused tile
        offset        [0, 4, 4, 8]                                 expert 1 is empty
        slot          [4, 0, 5, 6, 1, 2]                           slot of token 0, 1, ...

    Attributes:
        token: int32 ``[S]``, the token in each slot; T where the slot is empty.
        slot: int32 ``[T]``, the slot of each token.
        expert: int32 ``[S / block]``, the expert of each tile; -1 where the tile is unused. Used
            tiles come first.
        offset: int32 ``[E + 1]``, the first slot of each expert, a multiple of ``block``; the last
            entry is the end of the last expert.
        block: slots per tile.
    """

    token: Tensor
    slot: Tensor
    expert: Tensor
    offset: Tensor
    block: int


def slots(tokens: int, experts: int, block: int) -> int:
    """``S = (ceil(T / block) + E) * block``: enough for every way to route."""
    return (-(-tokens // block) + experts) * block


def segments_reference(expert_T: Tensor, experts: int, *, block: int) -> Segments:
    """`prw_kernels.routing.segments` by a stable sort; without host synchronisation on CUDA.

    Args:
        expert_T: integers in ``[0, experts)``; others are taken to the nearest of these.
        experts: E.
        block: slots per tile.
    """
    tokens, device = expert_T.shape[0], expert_T.device
    total = slots(tokens, experts, block)
    sorted_T, order_T = torch.sort(expert_T.long().clamp(0, experts - 1), stable=True)
    index_T = torch.arange(tokens, device=device)
    index_E = torch.arange(experts, device=device)
    first_E = torch.searchsorted(sorted_T, index_E)
    count_E = torch.searchsorted(sorted_T, index_E, right=True) - first_E
    end_E = ((count_E + block - 1) // block * block).cumsum(0)
    offset_F = torch.cat([end_E.new_zeros(1), end_E])
    sorted_slot_T = index_T - first_E[sorted_T] + offset_F[sorted_T]
    tile_start = torch.arange(0, total, block, device=device)
    tile_expert = torch.searchsorted(end_E, tile_start, right=True)
    return Segments(
        token=index_T.new_full((total,), tokens).scatter_(0, sorted_slot_T, order_T).int(),
        slot=torch.empty_like(index_T).scatter_(0, order_T, sorted_slot_T).int(),
        expert=torch.where(tile_expert < experts, tile_expert, -1).int(),
        offset=offset_F.int(),
        block=block,
    )
