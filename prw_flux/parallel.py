"""A source whose tokens are spread over ranks: diffusers' context parallelism, Ulysses only.

Shapes: B samples, S source tokens (of all ranks, or of this one), D channels, O = D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.hooks.context_parallel import EquipartitionSharder
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

import prw


def require_spreadable(transformer: FluxTransformer2DModel, source_BSC: Tensor) -> None:
    """Raise where a source cannot take part in the parallelism that `transformer` has.

    Raises:
        ValueError: For tensor parallelism, which cuts the heads that an expert writes to; for ring
            attention and "anything" splits, which need as many keys as queries or text in every
            pass; or for a number of tokens that the ranks do not divide.
    """
    config = transformer._parallel_config
    if config is None:
        return
    ulysses = "ContextParallelConfig(ulysses_degree=...)"
    context = config.context_parallel_config
    if context is None:
        raise ValueError(f"Experts cannot act on heads cut by tensor parallelism: use {ulysses}.")
    if context.ring_degree > 1 or context.ulysses_anything:
        raise ValueError(
            "A source has a pass without text and adds keys that have no queries, which ring "
            f"attention and ulysses_anything do not allow: use {ulysses}."
        )
    tokens, ranks = source_BSC.shape[1], context.ulysses_degree
    if tokens % ranks:
        raise ValueError(
            f"A source of {tokens} tokens cannot be spread over {ranks} ranks: choose a size of "
            f"which (height / 16) x (width / 16) is a multiple of {ranks}."
        )


def refine(
    pool: prw.Pool,
    outputs: Mapping[str, Tensor],
    x_BSD: Tensor,
    call: prw.Call | None,
    config: Any,
) -> dict[str, Tensor]:
    """`Pool.add` on the rows that this rank has.

    A router of whole samples reads the mean over all ranks. So each rank gathers the source,
    adds up the residual of all of it (rank 128 of 3072: 8 % of a K/V projection), and keeps its
    part.

    Args:
        pool: Experts of this block.
        outputs: [B, S, O] base projections of this rank's rows.
        x_BSD: What they were computed from.
        call: Routing call.
        config: Parallel configuration of the attention processor, or None.
    """
    context = config.context_parallel_config if config is not None else None
    if context is None or pool.config.granularity == "token":
        return pool.add(outputs, x_BSD, call)[0]
    mesh = context._flattened_mesh
    whole = EquipartitionSharder.unshard(x_BSD, 1, mesh)
    zeros = {name: y.new_zeros(*whole.shape[:2], y.shape[2]) for name, y in outputs.items()}
    residuals, _ = pool.add(zeros, whole, call)
    return {n: y + EquipartitionSharder.shard(residuals[n], 1, mesh) for n, y in outputs.items()}
