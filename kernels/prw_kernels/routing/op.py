"""Routing: the operators, their checks, and the choice of implementation.

Shape suffixes: T tokens, E experts, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prw_kernels.backend import runs_triton
from prw_kernels.routing.reference import Segments, segments_reference, slots

MOST = 256
"""Experts up to which the kernels are used: their registers hold a row of this width."""

MOST_SLOTS = 2**30
"""Indices are int32, with room for the last program's masked ones."""


def segments(expert_T: Tensor, experts: int, *, block: int) -> Segments:
    """Group tokens by expert in tiles of ``block`` slots; see `Segments` for a worked example.

    Stable, deterministic, without host synchronisation on CUDA, and its shapes follow from
    ``(T, experts, block)`` alone: ``S = (ceil(T / block) + experts) * block``. Two Triton launches
    on CUDA and ROCm devices (and in Triton's interpreter), a stable sort elsewhere.

    Args:
        expert_T: the expert of each token, integers in ``[0, experts)``, ``[T]``.
        experts: E.
        block: slots per tile.

    Returns:
        Segments.

    Raises:
        ValueError: not a vector of integers, no expert, an empty block, more slots than int32 can
            count, or, on the CPU, an index outside the pool. On other devices that would need
            a synchronisation: there such an index is taken to the nearest one of the pool, so that
            no kernel reads or writes out of bounds. ``TRITON_DEBUG=1`` makes it a device assertion.
    """
    _check(expert_T, experts, block)
    if torch.compiler.is_compiling():
        token_S, slot_T, tile_I, offset_F = segments_op(expert_T, experts, block)
        return Segments(token=token_S, slot=slot_T, expert=tile_I, offset=offset_F, block=block)
    return _segments(expert_T, experts, block)


@torch.library.custom_op("prw_kernels::segments", mutates_args=())
def segments_op(
    expert_T: Tensor, experts: int, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`segments` as one operator for compiled graphs: token, slot, expert, offset."""
    found = _segments(expert_T, experts, block)
    return found.token, found.slot, found.expert, found.offset


@segments_op.register_fake
def _(expert_T: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = slots(expert_T.shape[0], experts, block)
    sizes = (total, expert_T.shape[0], total // block, experts + 1)
    token_S, slot_T, tile_I, offset_F = (
        expert_T.new_empty(size, dtype=torch.int32) for size in sizes
    )
    return token_S, slot_T, tile_I, offset_F


def _check(expert_T: Tensor, experts: int, block: int) -> None:
    if expert_T.dim() != 1 or expert_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expert_T is {expert_T.dtype} of shape {tuple(expert_T.shape)}; give a vector of "
            "int32 or int64, one index per token"
        )
    if experts < 1 or block < 1:
        raise ValueError(f"{experts} experts in tiles of {block} slots: both must be at least 1")
    if slots(expert_T.shape[0], experts, block) > MOST_SLOTS:
        raise ValueError(
            f"{expert_T.shape[0]} tokens need more slots than int32 can count; split them"
        )


def _segments(expert_T: Tensor, experts: int, block: int) -> Segments:
    if expert_T.device.type == "cpu" and expert_T.numel():
        lowest, highest = (int(end) for end in expert_T.aminmax())
        if lowest < 0 or highest >= experts:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"expert index {wrong} is outside the pool of {experts} experts")
    if experts > MOST or not runs_triton(expert_T.device):
        return segments_reference(expert_T, experts, block=block)
    from prw_kernels.routing.launch import launch_segments

    return launch_segments(expert_T, experts, block=block)
