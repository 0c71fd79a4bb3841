"""The source of one pipeline call: planned, checked against the call, then a `Source`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prw_flux import arguments
from prw_flux.adapter import PRWAdapter
from prw_flux.asked import Asked, prompt_count
from prw_flux.attach import attach, attached
from prw_flux.cache_origin import caches_serve
from prw_flux.plan import Plan, make_plan
from prw_flux.sources import Source

if TYPE_CHECKING:
    from prw_flux.pipeline import CoLoGenPipeline

CHECKED = (
    "prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_embeds",
    "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
    "callback_on_step_end_tensor_inputs", "max_sequence_length",
)  # fmt: skip
"""What FluxPipeline checks itself, beside the size."""


def plan_of(pipe: CoLoGenPipeline, asked: Asked) -> Plan:
    """The plan of a call with a source.

    Raises:
        ValueError, TypeError: for what cannot work, as in a pipeline without an adapter.
    """
    adapter: PRWAdapter | None = pipe.prw
    if adapter is None:
        raise ValueError(
            "This pipeline has no PRW adapter, so it cannot use a source image: "
            "pipe.load_prw_weights(...), or CoLoGenPipeline.from_pipe(pipe, prw=adapter)."
        )
    if attached(pipe.transformer) is not adapter:
        attach(pipe.transformer, adapter)
    return make_plan(adapter, asked, pipe.transformer.config.in_channels // 4)


def require_possible(
    pipe: CoLoGenPipeline,
    plan: Plan,
    asked: Asked,
    flux: Mapping[str, Any],
    *,
    keep: bool,
    image_guidance: Any,
    representation: Any,
) -> None:
    """Raise ValueError unless a source and the rest of its call belong together.

    Args:
        pipe, plan, asked: the call.
        flux: what FluxPipeline will be called with, by argument.
        keep: `use_kv_cache` of the call.
        image_guidance, representation: its two scales.
    """
    arguments.require_numbers(
        image_guidance_scale=image_guidance, representation_scale=representation
    )
    arguments.require_stream(pipe.coredi is not None, representation, image_guidance)
    arguments.require_no_ip_adapter({k: v for k, v in flux.items() if "ip_adapter" in k})
    pipe.check_inputs(
        height=plan.size[0], width=plan.size[1], **{name: flux[name] for name in CHECKED}
    )
    prompts = prompt_count(flux["prompt"], flux["prompt_embeds"])
    arguments.require_counts(
        prompts,
        {name: flux[name] for name in CHECKED if "prompt" in name},
        num_images_per_prompt=flux["num_images_per_prompt"],
        num_inference_steps=flux["num_inference_steps"],
        generator=flux["generator"],
    )
    batches = [one.batch for one in plan.references] + [one.batch for one in asked.caches]
    arguments.require_pairs(batches, prompts)
    require_pooled(pipe, asked, (*batches, prompts))
    results = prompts * flux["num_images_per_prompt"]
    channels, step = pipe.transformer.config.in_channels, 2 * pipe.vae_scale_factor
    arguments.require_latents(flux["latents"], plan.size, step, channels, results)
    if asked.caches and not keep:
        raise ValueError("use_kv_cache=False would not use the source_cache: leave one out.")


def require_pooled(pipe: CoLoGenPipeline, asked: Asked, batches: Sequence[int]) -> None:
    """Raise ValueError unless a pooled text that was given suits sources of these batches."""
    width = pipe.transformer.config.pooled_projection_dim
    arguments.require_pooled(asked.pooled, width, batches)


def source_of(
    pipe: CoLoGenPipeline, plan: Plan, asked: Asked, flux: Mapping[str, Any], *, keep: bool
) -> Source:
    """What the main passes of a call see: its caches where they serve, else its images.

    Args:
        pipe, plan, asked, flux, keep: as in `require_possible`.

    Raises:
        ValueError: for caches that do not serve, where there is nothing else.
    """
    if asked.caches:
        seen = asked.pooled
        if seen is None and plan.text is None:
            embedded = flux["prompt_embeds"] is not None
            seen = flux["pooled_prompt_embeds"] if embedded else pooled(pipe, flux["prompt"] or "")
        negative = any(flux[k] is not None for k in ("negative_prompt", "negative_prompt_embeds"))
        branches = 2 if flux["true_cfg_scale"] > 1 and negative else 1
        if caches_serve(plan, asked, seen, pipe.transformer, pipe.vae, branches=branches):
            return Source.of_caches(pipe.transformer, plan.adapter, asked.caches)
    return source_of_images(
        pipe,
        plan,
        source_pooled(pipe, plan, asked),
        images_per_prompt=flux["num_images_per_prompt"],
        keep=keep,
    )


def source_of_images(
    pipe: CoLoGenPipeline, plan: Plan, pooled_BP: Tensor | None, **options: Any
) -> Source:
    """The images of a plan as a source, on the pipeline's device; see `Source.of_plan`."""
    model = pipe.text_encoder if pipe.text_encoder is not None else pipe.transformer
    return Source.of_plan(
        pipe.transformer,
        pipe.vae,
        plan,
        pooled_BP,
        device=pipe._execution_device,
        dtype=model.dtype,  # as FluxPipeline chooses that of its latents
        **options,
    )


def source_pooled(
    pipe: CoLoGenPipeline, plan: Plan, asked: Asked, prompt: str | Sequence[str] | None = None
) -> Tensor | None:
    """[B, P] that modulates the source; None where that is a prompt, and none is given here."""
    text = prompt if plan.text is None else plan.text
    if asked.pooled is not None or text is None:
        return asked.pooled
    return pooled(pipe, text)


def pooled(pipe: CoLoGenPipeline, prompt: str | Sequence[str]) -> Tensor:
    """[B, P] pooled CLIP embedding of a text, or of each.

    Raises:
        ValueError: without a text encoder.
    """
    if pipe.text_encoder is None:
        raise ValueError(
            "Without a text encoder the source needs source_pooled_embeds=, the pooled CLIP "
            "embedding that the adapter was trained with."
        )
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    found: Tensor = pipe._get_clip_prompt_embeds(texts)
    return found
