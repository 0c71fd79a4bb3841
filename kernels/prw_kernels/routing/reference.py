"""Routing in plain PyTorch: the truth the kernels are compared with.

Shape suffixes: T tokens, E experts, S slots (places for tokens, whole tiles of them per expert).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
