"""Step caches of diffusers, which reuse what an earlier denoising step computed.

They tell passes apart by `cache_context` at best, and none of them knows a source: one that skipped
a block of a source pass would leave a hole in the recorded keys and values, and one that kept
something of a source pass would give it to the noisy latents. So they are bridged for as long as a
source pass lasts. Main passes are theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.hooks.hooks import HookFunctionReference, HookRegistry, ModelHook
from torch import nn

CACHES = frozenset(
    """faster_cache first_block_cache mag_cache pyramid_attention_broadcast sea_cache
    taylorseer_cache text_kv_cache""".split()
)
"""Modules of `diffusers.hooks` whose hooks are step caches; offloading and casting are others."""


@contextmanager
def bridged(model: nn.Module) -> Iterator[None]:
    """While open, no step cache of `model` acts or learns; their states stay as they are."""
    found = [reference for module in model.modules() for reference in _references(module)]
    before = [(r.pre_forward, r.forward, r.post_forward) for r in found]
    idle = ModelHook()
    for reference in found:
        if reference.original_forward is not None:
            reference.forward = reference.original_forward
        reference.pre_forward, reference.post_forward = idle.pre_forward, idle.post_forward
    try:
        yield
    finally:
        for reference, functions in zip(found, before, strict=True):
            reference.pre_forward, reference.forward, reference.post_forward = functions


def _references(module: nn.Module) -> list[HookFunctionReference]:
    """Where the hooks of step caches on this module keep their functions."""
    registry: HookRegistry | None = vars(module).get("_diffusers_hook")
    if registry is None:
        return []
    return [
        hook.fn_ref
        for hook in registry.hooks.values()
        if type(hook).__module__.rpartition(".")[2] in CACHES
    ]
