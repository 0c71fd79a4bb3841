"""Sampling with a source: before each call of the transformer, the right recorded source joins it.

Shapes: M samples of a main pass, B sources that they share, S source tokens, C packed channels,
P pooled width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

import prw
from prw_flux.adapter import PRWAdapter
from prw_flux.attach import attached, bind
from prw_flux.passes import source_pass
from prw_flux.source_cache import FluxCall, SourceCache, SourceMeta


def fingerprint(tensor: Tensor) -> str:
    """Hash of a tensor's shape and values, equal for equal values of any device."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return hashlib.sha256(str(list(values.shape)).encode() + values.numpy().tobytes()).hexdigest()


class Source:
    """A source during one sampling run, recorded as often as its adapter needs and no more.

    Under source_timestep "zero" that is once per pooled text, under "current" once per call.

    Args:
        transformer: With `adapter` attached.
        adapter: Says what modulates the source.
        tokens_BSC: Packed latents; one serves all prompts, else one per prompt.
        ids_S3: Their rotary positions.
        pooled_BP: Pooled text of the source; None takes that of each main pass.
        call: Routing call.
        meta: Of the caches.
        images_per_prompt: Consecutive samples of a main pass with one prompt.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        adapter: PRWAdapter,
        tokens_BSC: Tensor,
        ids_S3: Tensor,
        pooled_BP: Tensor | None,
        call: prw.Call,
        meta: SourceMeta,
        images_per_prompt: int = 1,
    ) -> None:
        self.transformer = transformer
        self.adapter = adapter
        self.tokens_BSC = tokens_BSC
        self.ids_S3 = ids_S3
        self.pooled_BP = pooled_BP
        self.call = call
        self.meta = meta
        self.size = (meta.height, meta.width)
        self.images_per_prompt = images_per_prompt
        self.recorded: list[tuple[Tensor, SourceCache]] = []
        self.fixed: SourceCache | None = None

    @classmethod
    def of_cache(
        cls,
        transformer: FluxTransformer2DModel,
        adapter: PRWAdapter,
        cache: SourceCache,
        size: tuple[int, int],
    ) -> Source:
        """A source that was recorded before, for results of this (height, width)."""
        empty = torch.empty(0)
        source = cls(transformer, adapter, empty, empty, None, prw.Call(), cache.meta)
        source.fixed, source.size = cache, size
        return source

    def encode(self) -> SourceCache:
        """The one cache of a source that depends on neither time nor prompt."""
        if self.fixed is None:
            assert self.pooled_BP is not None
            zero = self.tokens_BSC.new_zeros(1)
            self.fixed = self._record(zero, self.adapter.source_guidance(None), self.pooled_BP)
        return self.fixed

    def at(self, timestep_M: Tensor, guidance_M: Tensor | None, pooled_MP: Tensor) -> SourceCache:
        """The cache for a main pass with this time, guidance and pooled text."""
        if self.fixed is not None:
            return self.fixed
        zero = self.adapter.config.source_timestep == "zero"
        if zero and self.pooled_BP is not None:
            return self.encode()
        for known, cache in self.recorded if zero else []:
            if known is pooled_MP:
                return cache
        pooled = pooled_MP[:: self.images_per_prompt] if self.pooled_BP is None else self.pooled_BP
        time = self.adapter.source_time(timestep_M)[:1]
        guidance = self.adapter.source_guidance(guidance_M)
        cache = self._record(time, guidance[:1] if guidance is not None else None, pooled)
        if zero:
            self.recorded.append((pooled_MP, cache))
        return cache

    def _record(self, timestep: Tensor, guidance: Tensor | None, pooled_BP: Tensor) -> SourceCache:
        tokens = self.tokens_BSC
        if pooled_BP.shape[0] > tokens.shape[0] == 1:
            tokens = tokens.expand(pooled_BP.shape[0], -1, -1)
        if pooled_BP.shape[0] not in (1, tokens.shape[0]):
            raise ValueError(
                f"{tokens.shape[0]} source images do not pair with {pooled_BP.shape[0]} prompts."
            )
        return source_pass(
            self.transformer,
            tokens,
            self.ids_S3,
            pooled_BP,
            timestep,
            guidance,
            self.call,
            meta=self.meta,
        )


@contextmanager
def following(transformer: FluxTransformer2DModel, source: Source) -> Iterator[None]:
    """While open, every call of `transformer` is a main pass with `source`.

    A hook sees what modulates the noisy latents at that call (time, guidance, pooled text), which
    is what modulates the source under source_timestep "current".
    """

    def join(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        joint = kwargs.get("joint_attention_kwargs") or {}
        if "prw" in joint:  # a source pass, started from here
            return None
        _require_whole(transformer, source.adapter, joint)
        cache = source.at(kwargs["timestep"], kwargs["guidance"], kwargs["pooled_projections"])
        call = FluxCall(cache, "main")
        bind(transformer, cache)
        return args, {**kwargs, "joint_attention_kwargs": {**joint, "prw": call}}

    handle = transformer.register_forward_pre_hook(join, with_kwargs=True)
    try:
        if source.pooled_BP is not None and source.adapter.config.source_timestep == "zero":
            source.encode()
        yield
    finally:
        handle.remove()
        if attached(transformer) is source.adapter:
            bind(transformer, None)


def _require_whole(
    transformer: FluxTransformer2DModel, adapter: PRWAdapter, joint: Mapping[str, Any]
) -> None:
    """Raise where a source would be lost, or would be made by other weights than the result."""
    if attached(transformer) is not adapter:
        raise ValueError(
            "The attention processors were replaced while sampling, so the source would be lost: "
            "leave them alone until the pipeline returns."
        )
    if joint.get("scale", 1.0) != 1.0:
        raise ValueError(
            f"joint_attention_kwargs={{'scale': {joint['scale']}}} would scale the LoRAs of the "
            "noisy latents but not of the source, which is encoded once: use "
            "pipe.set_adapters(names, weights) instead."
        )
