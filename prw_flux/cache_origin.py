"""Where a source cache comes from: what it remembers of that, and whether it serves a call."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from torch import Tensor, nn

from prw_flux.asked import Asked
from prw_flux.digests import adapter_digest, base_digest, tensor_digest
from prw_flux.plan import Plan
from prw_flux.source_cache import SourceMeta

logger = logging.getLogger(__name__)


def metas(plan: Plan, pooled: Tensor, transformer: nn.Module, vae: nn.Module) -> list[SourceMeta]:
    """What the caches of a plan's references remember of where they come from.

    Args:
        plan: with references.
        pooled: [B, P] that modulates the source.
        transformer, vae: what the source goes through.
    """
    config = plan.adapter.config
    common = SourceMeta(
        adapter=adapter_digest(plan.adapter),
        base=base_digest(transformer, vae),
        source_timestep=config.source_timestep,
        source_pooled=config.source_pooled,
        pooled=tensor_digest(pooled),
        task=plan.spec.name,
        route=plan.route,
        scale=plan.scale,
        height=plan.size[0],
        width=plan.size[1],
    )
    return [
        dataclasses.replace(common, image=one.digest(), place=one.place) for one in plan.references
    ]


def caches_serve(
    plan: Plan,
    asked: Asked,
    pooled: Tensor | None,
    transformer: nn.Module,
    vae: nn.Module,
    *,
    branches: int = 1,
) -> bool:
    """Whether the caches of a call are what it would record itself; False where there are none.

    Args:
        plan, asked: the call.
        pooled: [B, P] that must have modulated the source; None where that is not known.
        transformer, vae: what the source went through.
        branches: prompts per result, 2 under true CFG.

    Raises:
        ValueError: If they are not, and there is no image to encode instead. With one, a line in
            the log says so.
    """
    if not asked.caches:
        return False
    what = _misfit(plan, asked, pooled, transformer, vae)
    if what is None and branches > 1 and plan.text is None:
        what = "prompt than the negative one, which true CFG needs a source for"
    if what is None:
        return True
    if not plan.references:
        raise ValueError(
            f"This source cache was made with another {what}: call encode_source again, or pass "
            "image= beside it."
        )
    logger.warning("The source cache was made with another %s: the source is encoded again.", what)
    return False


def _misfit(
    plan: Plan, asked: Asked, pooled: Tensor | None, transformer: nn.Module, vae: nn.Module
) -> str | None:
    """The first thing in which a cache is not what this call would record, in words."""
    adapter, config = plan.adapter, plan.adapter.config
    for cache in asked.caches:
        if len(cache) != len(adapter.blocks):
            return f"number of blocks ({len(cache)}, not {len(adapter.blocks)})"
    if plan.references and len(asked.caches) != len(plan.references):
        return f"number of references ({len(asked.caches)}, not {len(plan.references)})"
    known: dict[str, Any] = {
        "source_timestep": config.source_timestep,
        "source_pooled": config.source_pooled,
        "task": asked.task,
        "route": asked.route,
        "scale": asked.scale,
    }
    if plan.references:
        known |= {"task": plan.spec.name, "route": plan.route, "scale": plan.scale}
    digests = {
        "adapter": adapter_digest(adapter),
        "base": base_digest(transformer, vae),
        "pooled": tensor_digest(pooled) if pooled is not None else None,
    }
    for index, cache in enumerate(asked.caches):
        own: dict[str, Any] = {}
        if plan.references:
            reference = plan.references[index]
            own = {"place": reference.place, "image": reference.digest()}
        task = adapter.tasks.get(cache.meta.task or "")
        if task is None or task.aligned:
            own |= {"height": plan.size[0], "width": plan.size[1]}
        what = cache.meta.difference(**known, **own, **digests)
        if what is not None:
            return what
    return None
