"""A frozen base whose weights are spread over ranks by FSDP2, as `accelerate launch` asks for it.

Experts and routers stay whole on every rank: they are no part of the transformer, are small, grow
with the stages, and a checkpoint and a consolidation need them whole.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from prw import ConfigError
from prw_flux.config import RunConfig


def is_asked_for() -> bool:
    """Whether the launcher was told to shard: ``accelerate launch --use_fsdp``."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def require_shardable(config: RunConfig) -> None:
    """Refuse what a sharded base cannot do.

    Raises:
        ConfigError: FSDP1, a quantised base, or blocks that are not recomputed.
    """
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("the base is sharded by FSDP2 only: launch with --fsdp_version 2")
    if config.base.quantisation != "none":
        raise ConfigError(
            f"base.quantisation={config.base.quantisation} cannot be sharded: leave out --use_fsdp "
            "(a quantised base fits on every rank), or set base.quantisation=none"
        )
    if not config.checkpointing:
        raise ConfigError(
            "a sharded base needs --set checkpointing=true: keys and values of the source leave "
            "their block on the side, where FSDP2 would not gather its weights for the backward"
        )


def shard(transformer: FluxTransformer2DModel) -> None:
    """Spread every block, and what is around them, over all ranks.

    Of accelerate's settings, ``fsdp_reshard_after_forward`` and ``fsdp_offload_params`` count.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import fully_shard

    plugin = FullyShardedDataParallelPlugin()
    options: dict[str, Any] = {"reshard_after_forward": bool(plugin.reshard_after_forward)}
    if isinstance(plugin.cpu_offload, torch.distributed.fsdp.CPUOffloadPolicy):
        options["offload_policy"] = plugin.cpu_offload
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        fully_shard(block, **options)
    fully_shard(transformer, **options)
    # blocks return views, which nothing here writes to
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
