"""The two passes through the stock transformer: first the source alone, then text and noise.

Under the mask of CoLoGen's two-step attention (the source sees the source, text and noisy tokens
see everything) this is the same function as one joint pass, whatever the timestep of the source.

Shapes: B samples, S source tokens, N noisy tokens, L text tokens, C packed latent channels,
E width of the text embedding, P of the pooled one. Times are in [0, 1], 1 is noise.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

import prw
from prw_flux.adapter import PRWAdapter
from prw_flux.attach import attach, bound, require_attached
from prw_flux.fit import require_device, require_layers
from prw_flux.parallel import require_spreadable
from prw_flux.source_cache import FluxCall, Recorded, SourceCache, SourceMeta
from prw_flux.step_caches import bridged


def source_pass(
    transformer: FluxTransformer2DModel,
    source_BSC: Tensor,
    source_ids_S3: Tensor,
    pooled_BP: Tensor,
    timestep_B: Tensor,
    guidance_B: Tensor | None = None,
    call: prw.Call | prw.Record | None = None,
    *,
    scale: float = 1.0,
    meta: SourceMeta | None = None,
) -> SourceCache:
    """Run the source through the transformer with no text, recording K and V of every block.

    Args:
        transformer: With an adapter attached.
        source_BSC: Packed source latents.
        source_ids_S3: Their rotary positions.
        pooled_BP: Pooled text that modulates the source; one row serves all samples.
        timestep_B: Time that modulates the source: 0, or that of the noisy latent.
        guidance_B: Guidance that modulates the source; 1 where None and the model embeds one.
        call: Routing call; None takes the one bound to the adapter's weave.
        scale: Of the experts' residual: 1 as trained, 0 the keys and values of the base.
        meta: Kept with the cache.

    Returns:
        The cache, differentiable if gradients are enabled.
    """
    adapter = require_attached(transformer)
    batch = source_BSC.shape[0]
    require_device(adapter, transformer)
    require_spreadable(transformer, source_BSC)
    cache = SourceCache(len(adapter.blocks), meta)
    flux_call = FluxCall(cache, "source", adapter.resolve(call), scale)
    with bridged(transformer), bound(transformer, cache):
        transformer(
            hidden_states=source_BSC,
            encoder_hidden_states=source_BSC.new_zeros(
                batch, 0, transformer.config.joint_attention_dim
            ),
            pooled_projections=pooled_BP.expand(batch, -1),
            timestep=timestep_B.expand(batch),
            img_ids=source_ids_S3,
            txt_ids=source_ids_S3.new_zeros(0, 3),
            guidance=_guidance(transformer, guidance_B, source_BSC),
            joint_attention_kwargs={"prw": flux_call},
            return_dict=False,
        )
    cache.require_complete()
    return cache


def main_pass(
    transformer: FluxTransformer2DModel,
    noisy_BNC: Tensor,
    noisy_ids_N3: Tensor,
    text_BLE: Tensor,
    text_ids_L3: Tensor | None,
    pooled_BP: Tensor,
    timestep_B: Tensor,
    guidance_B: Tensor | None = None,
    cache: Recorded | None = None,
) -> Tensor:
    """Velocity of the noisy latents, given text and (unless `cache` is None) a source.

    Args:
        transformer: With an adapter attached where there is a cache.
        noisy_BNC: Packed noisy latents.
        noisy_ids_N3: Their rotary positions.
        text_BLE: Text embedding; its positions are zero where `text_ids_L3` is None.
        text_ids_L3: Rotary positions of the text.
        pooled_BP: Pooled text.
        timestep_B: Time of the noisy latents.
        guidance_B: Guidance; 1 where None and the model embeds one.
        cache: Of `source_pass`; its batch divides B.

    Returns:
        [B, N, C]
    """
    if text_ids_L3 is None:
        text_ids_L3 = noisy_ids_N3.new_zeros(text_BLE.shape[1], 3)
    extra: dict[str, Any] = {}
    context: AbstractContextManager[None] = nullcontext()
    if cache is not None:
        adapter = require_attached(transformer)
        require_layers(adapter, cache)
        extra = {"joint_attention_kwargs": {"prw": FluxCall(cache, "main")}}
        context = bound(transformer, cache)
    with context:
        velocity: Tensor = transformer(
            hidden_states=noisy_BNC,
            encoder_hidden_states=text_BLE,
            pooled_projections=pooled_BP,
            timestep=timestep_B,
            img_ids=noisy_ids_N3,
            txt_ids=text_ids_L3,
            guidance=_guidance(transformer, guidance_B, noisy_BNC),
            return_dict=False,
            **extra,
        )[0]
    return velocity


def _guidance(
    transformer: FluxTransformer2DModel, guidance_B: Tensor | None, x: Tensor
) -> Tensor | None:
    """[B] in float32, or None for a model that does not embed guidance."""
    if not transformer.config.guidance_embeds:
        return None
    if guidance_B is None:
        return torch.ones(x.shape[0], device=x.device)
    return guidance_B.expand(x.shape[0])


class TwoPass(nn.Module):
    """Both passes in one forward, the module that trains.

    Wrap this, not the transformer, for distributed training: one forward, one backward.

    Args:
        transformer: Stock; frozen by this constructor, and `adapter` is attached to it.
        adapter: Its experts and routers are the parameters that may learn.
    """

    def __init__(self, transformer: FluxTransformer2DModel, adapter: PRWAdapter) -> None:
        super().__init__()
        attach(transformer, adapter)
        self.transformer = transformer.requires_grad_(False)
        self.adapter = adapter

    def forward(
        self,
        noisy_BNC: Tensor,
        noisy_ids_N3: Tensor,
        text_BLE: Tensor,
        pooled_BP: Tensor,
        timestep_B: Tensor,
        source_BSC: Tensor | None = None,
        source_ids_S3: Tensor | None = None,
        source_pooled_BP: Tensor | None = None,
        guidance_B: Tensor | None = None,
        call: prw.Call | prw.Record | None = None,
    ) -> Tensor:
        """Velocity [B, N, C]; arguments as in `source_pass` and `main_pass`.

        One source may serve m noisy latents, m consecutive ones of B: a source that has a time of
        its own is then encoded once for m draws of noise and time, and the gradient is that of m
        forwards.

        Args:
            noisy_BNC, noisy_ids_N3, text_BLE, pooled_BP, timestep_B: Of the main pass.
            source_BSC: Packed sources, B / m of them; None trains text to image.
            source_ids_S3: Rotary positions of the source.
            source_pooled_BP: Pooled text of the source; None takes `pooled_BP`, and of m samples
                with one source the first one's.
            guidance_B: FLUX.1-dev is trained at 1, the default.
            call: Routing call of the source pass.

        Raises:
            ValueError: If the number of sources does not divide B, or a source that follows the
                time of its noisy latent is to serve several.
        """
        cache: SourceCache | None = None
        if source_BSC is not None:
            if source_ids_S3 is None:
                raise ValueError("source_ids_S3 is missing: a source needs its positions.")
            draws = self._draws(noisy_BNC.shape[0], source_BSC.shape[0])
            cache = source_pass(
                self.transformer,
                source_BSC,
                source_ids_S3,
                pooled_BP[::draws] if source_pooled_BP is None else source_pooled_BP,
                self.adapter.source_time(timestep_B[::draws]),
                self.adapter.source_guidance(
                    guidance_B[::draws] if guidance_B is not None else None
                ),
                call,
            )
        return main_pass(
            self.transformer,
            noisy_BNC,
            noisy_ids_N3,
            text_BLE,
            None,
            pooled_BP,
            timestep_B,
            guidance_B,
            cache,
        )

    def _draws(self, batch: int, sources: int) -> int:
        """m, the noisy latents of each source."""
        if sources == 0 or batch % sources:
            raise ValueError(f"{sources} sources cannot be shared by {batch} noisy latents.")
        if batch != sources and self.adapter.config.source_timestep == "current":
            raise ValueError(
                f"{batch} noisy latents cannot share {sources} sources under source_timestep "
                '"current", where a source has the time of its noisy latent: give as many sources.'
            )
        return batch // sources
