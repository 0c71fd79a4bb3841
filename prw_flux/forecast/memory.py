"""Bytes that one rank holds while it trains a stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final, final

import torch

from prw_flux.adapter import PRWAdapter
from prw_flux.config import RunConfig
from prw_flux.forecast.architecture import Architecture, parameters
from prw_flux.forecast.work import Tokens
from prw_flux.memory import BITS, weight_bytes

SAVED: Final = 17
"""Tensors of [token, width] that a block keeps for its backward, counted with attention that keeps
no scores (a test counts them again)."""
FULL: Final = 4
"""Bytes of what trains, of its gradient and of each of AdamW's two moments."""


@final
@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by what they hold; weights and optimizer are the same on every rank.

    Attributes:
        base, encoders: frozen weights; encoders 0 where samples are encoded before.
        adapter: all experts so far and the routers.
        gradients, optimizer: of what trains; the optimizer's with moving averages, if there are.
        activations: of the samples that a rank has at a time, without checkpointing.
        checkpointed: the same with the blocks checkpointed.
        peak: of all, as the run is configured.
    """

    base: int
    encoders: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int
    peak: int


def activations(shape: Architecture, tokens: Tokens, draws: int, itemsize: int) -> tuple[int, int]:
    """Bytes of one sample's activations: all kept, and with the blocks checkpointed.

    Checkpointed are kept: the input of every block, the recorded K and V of the source, and all of
    the one block that is computed again.
    """
    rows, row = tokens.source + draws * tokens.main, shape.width * itemsize
    largest = max(tokens.source, draws * tokens.main)
    inputs = shape.blocks * (rows + 2 * tokens.source) * row
    return SAVED * shape.blocks * rows * row, inputs + SAVED * largest * row


@cache
def adapter_sizes(
    double: int, single: int, width: int, rank: int, router_train: str, stages: int
) -> tuple[tuple[int, int], ...]:
    """Parameters of the adapter, and those that train, in each of so many stages."""
    with torch.device("meta"):
        adapter = PRWAdapter(double, single, width, rank=rank, router_train=router_train)
        found = []
        for stage in range(stages):
            adapter.weave.unlock(f"stage{stage}")
            trained = sum(parameter.numel() for parameter in adapter.weave.parameters())
            found.append((parameters(adapter), trained))
    return tuple(found)


def stage_memory(
    config: RunConfig, shape: Architecture, tokens: Tokens, number: int, samples: int
) -> Memory:
    """What a rank holds in stage `number`, with `samples` of its batch at a time."""
    itemsize = 2 if config.precision == "bf16" else 4
    own = shape.transformer.config
    sizes = adapter_sizes(
        own.num_layers,
        own.num_single_layers,
        shape.width,
        config.adapter.rank,
        config.adapter.router_train,
        len(config.stages),
    )
    every, trained = sizes[number]
    kept, checkpointed = activations(shape, tokens, config.draws, itemsize)
    base = parameters(shape.transformer) * itemsize
    if config.base.quantisation != "none":
        base = weight_bytes(shape.transformer, BITS[config.base.quantisation])
    resting = config.data.cache is not None or config.data.samples is not None
    encoders = 0 if resting else shape.encoder_parameters() * itemsize
    adapter, gradients = every * FULL, trained * FULL
    optimizer = (3 if config.ema else 2) * gradients
    used = samples * (checkpointed if config.checkpointing else kept)
    return Memory(
        base=base,
        encoders=encoders,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=samples * kept,
        checkpointed=samples * checkpointed,
        peak=base + encoders + adapter + gradients + optimizer + used,
    )
