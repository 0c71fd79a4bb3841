"""Put the processors of an adapter on a stock FLUX.1 transformer, and take them off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxTransformer2DModel,
)

from prw_flux.adapter import PRWAdapter
from prw_flux.fit import require_fit
from prw_flux.processor import PRWFluxAttnProcessor
from prw_flux.source_cache import Recorded


def processors(transformer: FluxTransformer2DModel) -> list[Any]:
    """Attention processors in the order in which the blocks run."""
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    return [block.attn.processor for block in blocks]


def attach(transformer: FluxTransformer2DModel, adapter: PRWAdapter) -> None:
    """Let `adapter` act on source passes of `transformer`; every other call stays bitwise stock.

    Attaching a second adapter replaces the first. Weights and state dict are not touched.

    Raises:
        ValueError: If the adapter was made for another transformer, or foreign attention layers
            (nunchaku's) or processors (of an IP-Adapter) are in place.
    """
    _require_stock_layers(transformer)
    require_fit(adapter, transformer)
    _require_replaceable(transformer)
    _install(transformer, [PRWFluxAttnProcessor(adapter, i) for i in range(len(adapter.blocks))])


def detach(transformer: FluxTransformer2DModel) -> None:
    """Stock processors again. Does nothing where none of ours is in place."""
    if any(type(p) is PRWFluxAttnProcessor for p in processors(transformer)):
        _require_replaceable(transformer)
        _install(transformer, [FluxAttnProcessor() for _ in processors(transformer)])


def attached(transformer: FluxTransformer2DModel) -> PRWAdapter | None:
    """The adapter whose processors are in place, or None for a stock transformer.

    Raises:
        ValueError: If only some of them are: a call would lose part of the source in silence.
    """
    found = [
        p.adapter if type(p) is PRWFluxAttnProcessor else None for p in processors(transformer)
    ]
    if len({id(adapter) for adapter in found}) > 1:
        ours = sum(adapter is not None for adapter in found)
        raise ValueError(
            f"Only {ours} of {len(found)} attention processors belong to this PRW adapter, the "
            "others were replaced (by an IP-Adapter?): unload that and call attach() again."
        )
    return found[0]


def require_attached(transformer: FluxTransformer2DModel) -> PRWAdapter:
    """The attached adapter.

    Raises:
        ValueError: If there is none.
    """
    adapter = attached(transformer)
    if adapter is None:
        raise ValueError(
            "The transformer's attention processors are not PRW's: call "
            "prw_flux.attach(transformer, adapter) first."
        )
    return adapter


def bind(transformer: FluxTransformer2DModel, cache: Recorded | None) -> None:
    """Give each processor its own slot of `cache`, or none, for the passes that follow.

    One that looked its slot up by its number would be compiled once per layer. Where gradients are
    enabled nothing is bound and it does look it up, in the call of its own pass: a block may be
    recomputed when another cache is bound.
    """
    installed = processors(transformer)
    slots = cache.slots if cache is not None and not torch.is_grad_enabled() else repeat(None)
    for processor, slot in zip(installed, slots, strict=False):
        processor.slot = slot


@contextmanager
def bound(transformer: FluxTransformer2DModel, cache: Recorded) -> Iterator[None]:
    """`bind` while open; afterwards nothing keeps the cache alive."""
    bind(transformer, cache)
    try:
        yield
    finally:
        bind(transformer, None)


def _require_stock_layers(transformer: FluxTransformer2DModel) -> None:
    """Raise for nunchaku, whose models and fused layers leave no place between K, V and RoPE."""
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    for block in blocks:
        attention = dict(block.named_children()).get("attn")
        layers = dict(attention.named_children()).values() if attention is not None else ()
        odd = [type(x) for x in layers if "nunchaku" in type(x).__module__]
        if not isinstance(attention, FluxAttention) or odd:
            found = odd[0] if odd else type(block if attention is None else attention)
            raise ValueError(
                f"The attention of this transformer is {found.__module__}.{found.__qualname__}, "
                "which PRW cannot act inside (nunchaku is one such): load the base with diffusers "
                "itself, in bfloat16 or quantised by bitsandbytes or torchao."
            )


def _require_replaceable(transformer: FluxTransformer2DModel) -> None:
    known = (FluxAttnProcessor, PRWFluxAttnProcessor)
    foreign = {type(p).__name__ for p in processors(transformer) if type(p) not in known}
    if foreign:
        raise ValueError(
            f"The transformer has attention processors of {', '.join(sorted(foreign))}, which PRW "
            "cannot stand beside: unload them (for an IP-Adapter, pipe.unload_ip_adapter())."
        )


def _install(transformer: FluxTransformer2DModel, new: list[Any]) -> None:
    """Replace all processors; the chosen attention backend and parallel plan carry over."""
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    for block, processor in zip(blocks, new, strict=True):
        old = block.attn.processor
        processor._attention_backend = old._attention_backend
        processor._parallel_config = old._parallel_config
        block.attn.set_processor(processor)
