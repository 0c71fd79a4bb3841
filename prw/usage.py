"""What one forward tells the losses: usage and its derivative, in closed form, no graph.

Shape suffixes: T routed rows, D width of what the router reads, E experts that take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prw.call import GroupRecord, is_first
from prw.router import RouterPass, Routing


@torch.no_grad()
def observe(
    routing: Routing,
    seen: RouterPass | None,
    newest: int,
    keep: Tensor | None,
    learning: Sequence[tuple[int, Tensor, Tensor | None]],
    *,
    keep_inputs: bool = False,
) -> GroupRecord:
    """Count the rows of the newest expert and differentiate the straight-through count.

    Args:
        routing: the result, ``probs`` ``[..., E]``.
        seen: the evaluation it came from; None for a forced route, which has no derivative.
        newest: index of the expert that counts.
        keep: bool, shaped like ``routing.expert``; rows outside are not counted.
        learning: index, signal column and noise column of each pair that may learn.
        keep_inputs: whether the record holds the evaluation, for losses that need more than usage.

    Returns:
        The record of this one forward.
    """
    first = is_first(routing.probs) if torch.compiler.is_compiling() else None
    if first is not None:
        keep = first.expand(routing.expert.shape) if keep is None else keep & first
    used = routing.expert == newest
    count = torch.full((), used.numel(), dtype=torch.int64, device=used.device)
    keep_T = None
    if keep is not None:
        used, count, keep_T = used & keep, keep.sum(), keep.flatten()
    columns: list[Tensor] = []
    jacobian: list[Tensor] = []
    if seen is not None and keep_T is not None:
        # whatever stands in rows that do not count, NaN included, must not reach a product
        seen = replace(seen, h_TD=torch.where(keep_T[:, None], seen.h_TD, 0.0))
    if learning and seen is not None:
        with torch.autocast(used.device.type, enabled=False):  # in fp32, as the router itself
            plain = replace(seen, probs_TE=routing.probs.flatten(0, -2).detach())
            signal_ED, noise_ED = seen.router.usage_jacobian(plain, newest, keep_T)
        for index, signal, noise in learning:
            columns.append(signal)
            jacobian.append(signal_ED[index])
            if noise is not None:
                columns.append(noise)
                jacobian.append(noise_ED[index])
    kept = Routing(routing.expert, routing.gate.detach(), routing.probs.detach())
    inputs: list[RouterPass] = []
    if keep_inputs and seen is not None:
        inputs = [replace(seen, h_TD=seen.h_TD.detach(), probs_TE=seen.probs_TE.detach())]
    return GroupRecord(
        used=used.sum(),
        count=count,
        columns=tuple(columns),
        jacobian=tuple(jacobian),
        routings=[kept],
        newest=newest,
        masks=[keep],
        passes=inputs,
        first=[first],
    )
