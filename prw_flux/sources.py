"""Sampling with a source: before each call of the transformer, the right recorded source joins it.

Shapes: M samples of a main pass, B sources that they share, S source tokens, C packed channels,
P pooled width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

import prw
from prw_flux.adapter import PRWAdapter
from prw_flux.attach import attached, bind
from prw_flux.passes import source_pass
from prw_flux.plan import Plan
from prw_flux.source_cache import FluxCall, Recorded, SourceCache, SourceMeta, joined
from prw_flux.step_caches import bridged


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedReference:
    """A `prw_flux.references.Reference` as the transformer reads it.

    Attributes:
        tokens_BSC: packed latents; one serves all prompts, else one per prompt.
        ids_S3: their rotary positions.
        meta: of its caches.
        picture: uint8 [B, 3, h, w], if it was an image.
    """

    tokens_BSC: Tensor
    ids_S3: Tensor
    meta: SourceMeta | None = None
    picture: Tensor | None = None


class Source:
    """The references of one sampling run, recorded as often as the adapter needs and no more.

    Under source_timestep "zero" that is once per pooled text, under "current" once per call. Each
    reference is recorded alone, so that none depends on the company it has.

    Args:
        transformer: With `adapter` attached.
        adapter: Says what modulates the source.
        references: At least one.
        pooled_BP: Pooled text of the source; None takes that of each main pass.
        call: Routing call.
        scale: Of the experts' residual.
        images_per_prompt: Consecutive samples of a main pass with one prompt.
        keep: False records again in every main pass.
        storage: device and dtype of what is recorded, as in `SourceCache.to`; None as it comes.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        adapter: PRWAdapter,
        references: Sequence[EncodedReference],
        pooled_BP: Tensor | None,
        call: prw.Call,
        *,
        scale: float = 1.0,
        images_per_prompt: int = 1,
        keep: bool = True,
        storage: tuple[torch.device | str | None, torch.dtype | None] = (None, None),
    ) -> None:
        self.transformer = transformer
        self.adapter = adapter
        self.references = tuple(references)
        self.pooled_BP = pooled_BP
        self.call = call
        self.scale = scale
        self.images_per_prompt = images_per_prompt
        self.keep = keep and adapter.config.source_timestep == "zero"
        self.storage = storage
        self._fixed: Recorded | None = None  # serves every main pass
        self._by_pooled: list[tuple[Tensor, Recorded]] = []  # each serves the passes of one text

    @classmethod
    def of_plan(
        cls,
        transformer: FluxTransformer2DModel,
        vae: Any,
        plan: Plan,
        pooled_BP: Tensor | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        metas: Sequence[SourceMeta] | None = None,
        **options: Any,
    ) -> Source:
        """A source whose images are encoded now, and recorded when a main pass asks.

        Args:
            transformer, pooled_BP: As in `Source`.
            vae: Encodes the images.
            plan: With references.
            device, dtype: Of the tokens and of the pooled text.
            metas: Of caches that are kept, which then remember their pictures too.
            options: Others of `Source`.
        """
        encoded = [
            EncodedReference(
                tokens_BSC=reference.tokens(vae, device, dtype),
                ids_S3=reference.ids(device),
                meta=None if metas is None else metas[index],
                picture=None if metas is None else reference.picture(),
            )
            for index, reference in enumerate(plan.references)
        ]
        if pooled_BP is not None:
            pooled_BP = pooled_BP.to(device=device, dtype=dtype)
        return cls(
            transformer, plan.adapter, encoded, pooled_BP, plan.call, scale=plan.scale, **options
        )

    @classmethod
    def of_caches(
        cls,
        transformer: FluxTransformer2DModel,
        adapter: PRWAdapter,
        caches: Sequence[SourceCache],
    ) -> Source:
        """A source that was recorded before."""
        source = cls(transformer, adapter, (), None, prw.Call())
        source._fixed = joined(caches)
        return source

    def prepare(self) -> None:
        """Record now what depends on neither time nor prompt, outside the sampling loop."""
        if self.keep and self._fixed is None and self.pooled_BP is not None:
            self._fixed = joined(self.caches())

    def caches(self) -> list[SourceCache]:
        """One cache per reference, recorded now; for what depends on neither time nor prompt."""
        assert self.pooled_BP is not None
        zero = self.references[0].tokens_BSC.new_zeros(1)
        return self._record(zero, self.adapter.source_guidance(None), self.pooled_BP)

    def at(self, timestep_M: Tensor, guidance_M: Tensor | None, pooled_MP: Tensor) -> Recorded:
        """What a main pass with this time, guidance and pooled text sees."""
        if self._fixed is not None:
            return self._fixed
        for known, cache in self._by_pooled:
            if known is pooled_MP:
                return cache
        pooled = pooled_MP[:: self.images_per_prompt] if self.pooled_BP is None else self.pooled_BP
        time = self.adapter.source_time(timestep_M)[:1]
        guidance = self.adapter.source_guidance(guidance_M)
        found = joined(self._record(time, guidance[:1] if guidance is not None else None, pooled))
        if self.keep:
            self._by_pooled.append((pooled_MP, found))
        return found

    def _record(
        self, timestep: Tensor, guidance: Tensor | None, pooled_BP: Tensor
    ) -> list[SourceCache]:
        caches = []
        for reference in self.references:
            tokens = reference.tokens_BSC
            if pooled_BP.shape[0] > tokens.shape[0] == 1:
                tokens = tokens.expand(pooled_BP.shape[0], -1, -1)
            if pooled_BP.shape[0] not in (1, tokens.shape[0]):
                raise ValueError(
                    f"{tokens.shape[0]} source images do not pair with {pooled_BP.shape[0]} "
                    "prompts: give one image, or one per prompt."
                )
            cache = source_pass(
                self.transformer,
                tokens,
                reference.ids_S3,
                pooled_BP,
                timestep,
                guidance,
                self.call,
                scale=self.scale,
                meta=reference.meta,
            )
            cache.picture = reference.picture
            caches.append(cache if self.storage == (None, None) else cache.to(*self.storage))
        return caches


@contextmanager
def following(
    transformer: FluxTransformer2DModel, source: Source, image_guidance: float = 1.0
) -> Iterator[None]:
    """While open, every call of `transformer` is a main pass with `source`.

    A hook sees what modulates the noisy latents at that call (time, guidance, pooled text), which
    is what modulates the source under source_timestep "current".

    Args:
        transformer: Its attention processors are the adapter's.
        source: What joins.
        image_guidance: w; where it is not 1, a call gives v0 + w (v - v0), with v0 the velocity
            without source, at the cost of a text-to-image step.
    """

    def join(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        joint = kwargs.get("joint_attention_kwargs") or {}
        if "prw" in joint:  # a pass that was started from here
            return None
        _require_whole(transformer, source.adapter, joint)
        cache = source.at(kwargs["timestep"], kwargs["guidance"], kwargs["pooled_projections"])
        call = FluxCall(cache, "main")
        bind(transformer, cache)
        return args, {**kwargs, "joint_attention_kwargs": {**joint, "prw": call}}

    def strengthen(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        joint = kwargs["joint_attention_kwargs"]
        if joint["prw"] is None or joint["prw"].mode == "source":
            return None
        stock = {**kwargs, "joint_attention_kwargs": {**joint, "prw": None}}
        with bridged(transformer):  # a step cache would take this pass for the one before it
            without = module(*args, **stock)[0]
        return (without + image_guidance * (output[0] - without),)

    handles = [transformer.register_forward_pre_hook(join, with_kwargs=True)]
    if image_guidance != 1.0:
        handles.append(transformer.register_forward_hook(strengthen, with_kwargs=True))
    try:
        source.prepare()
        yield
    finally:
        for handle in handles:
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
