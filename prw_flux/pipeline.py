"""CoLoGen as a diffusers pipeline: FLUX.1 with a source image, a task and a route.

The denoising loop, callbacks, true CFG and text to image are FluxPipeline's own code. What is added
happens before each call of the transformer: the recorded source joins its attention. Arguments are
in FluxKontextPipeline's order; those it does not have follow, by name only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from prw_flux import arguments
from prw_flux.adapter import PRWAdapter
from prw_flux.asked import Asked, all_caches, all_images, prompt_count, sizes_of, text_first
from prw_flux.attach import attach
from prw_flux.cache_origin import metas
from prw_flux.call_source import (
    plan_of,
    require_pooled,
    require_possible,
    source_of,
    source_of_images,
    source_pooled,
)
from prw_flux.coredi.sampling import Carried, Generators, beside
from prw_flux.encode import ImageInput, sequence_length
from prw_flux.loader import PRWLoaderMixin
from prw_flux.output import read_grounding, returned
from prw_flux.references import Sizes
from prw_flux.source_cache import SourceCache
from prw_flux.sources import following
from prw_flux.stored import require_storable
from prw_flux.tasks.grounding import Ground


class CoLoGenPipeline(PRWLoaderMixin, FluxPipeline):
    """FLUX.1 that sees a source image through the experts of a `PRWAdapter`.

    Without an image it is FluxPipeline, bit for bit.

    Args:
        scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer: As in
            FluxPipeline; the text encoders may be None where embeddings are given to every call.
        image_encoder, feature_extractor: As in FluxPipeline; unused with a source.
        prw: The adapter, attached to the transformer here.

    Attributes:
        coredi: The feature stream that the adapter was trained beside, or None. It comes with a run
            or a saved pipeline that has one, and acts beside a source.
    """

    _optional_components = [
        "image_encoder",
        "feature_extractor",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "prw",
    ]
    # offloading hooks a component's forward, and the adapter's is never called
    _exclude_from_cpu_offload = ["prw"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        prw: PRWAdapter | None = None,
    ) -> None:
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        if prw is not None:
            if not isinstance(prw, PRWAdapter):
                raise TypeError(
                    f"prw must be a PRWAdapter, got {type(prw).__name__}: read one with "
                    "PRWAdapter.from_pretrained(...), or use pipe.load_prw_weights(...)."
                )
            attach(transformer, prw)
        self.register_modules(prw=prw)

    @torch.no_grad()
    def encode_source(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        images: Sequence[Any] | None = None,
        task: str | None = None,
        prompt: str | list[str] | None = None,
        route: str = "free",
        mask_image: Any = None,
        source_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        source_size: int | tuple[int, int] | None = None,
        source_pooled_embeds: Tensor | None = None,
        max_area: int | None = None,
        _auto_resize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Run a source through the transformer once, for any number of calls with `source_cache`.

        Args:
            image: One image, or a batch as a list.
            images: Several references of one result instead, a cache for each.
            task: A task of the adapter; it may be left out where the adapter has only one.
            prompt: Needed where the adapter's `source_pooled` is "prompt"; not read elsewhere.
            route, mask_image, source_scale, source_size: As in a call.
            height, width, max_area, _auto_resize: Of the images to be generated, as in a call.
            source_pooled_embeds: [B, P] instead of the pooled text that the adapter asks for.
            device, dtype: How the caches are stored, as in `SourceCache.to`; each as soon as it is
                recorded, so that only one of `images` is on the accelerator in full.

        Returns:
            A `SourceCache` (`.nbytes`, `.to()`, `.save()`), or a list of them for `images`.

        Raises:
            ValueError: If the adapter's source follows the current timestep, so that a cache would
                be wrong at the next step; or for an unknown task or route.
        """
        asked = Asked(
            images=all_images(image, images),
            task=task,
            route=route,
            scale=source_scale,
            sizes=self._sizes(height, width, source_size, max_area, _auto_resize),
            mask_image=mask_image,
            pooled=source_pooled_embeds,
        )
        require_storable(dtype)
        if not asked.images:
            raise ValueError("encode_source needs a source: pass image= or images=.")
        plan = plan_of(self, asked)
        require_pooled(self, asked, [one.batch for one in plan.references])
        if plan.adapter.config.source_timestep == "current":
            raise ValueError(
                'This adapter was trained with source_timestep="current": its source changes with '
                "every step and cannot be encoded once. Pass image= to each call instead."
            )
        pooled = source_pooled(self, plan, asked, prompt)
        if pooled is None:
            raise ValueError(
                'This adapter was trained with source_pooled="prompt": give encode_source the '
                "prompt= that the calls will use."
            )
        known = metas(plan, pooled, self.transformer, self.vae)
        source = source_of_images(self, plan, pooled, metas=known, storage=(device, dtype))
        caches = source.caches()
        self.maybe_free_model_hooks()
        return caches if images is not None else caches[0]

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_ip_adapter_image: Any = None,
        negative_ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        max_area: int | None = None,
        _auto_resize: bool = True,
        *,
        task: str | None = None,
        route: str | None = None,
        images: Sequence[Any] | None = None,
        mask_image: Any = None,
        source_cache: SourceCache | Sequence[SourceCache] | None = None,
        source_size: int | tuple[int, int] | None = None,
        source_scale: float | None = None,
        source_pooled_embeds: Tensor | None = None,
        use_kv_cache: bool = True,
        image_guidance_scale: float = 1.0,
        representation_scale: float = 1.0,
    ) -> Any:
        """Generate.

        Args:
            image: The source: PIL, numpy uint8 [h, w, 3], tensor [3, h, w] in [0, 1], latents
                [B, C, H, W], or a list with one image per prompt. None with neither `images` nor
                `source_cache` is text to image, bit for bit FluxPipeline's; a text that stands
                first is the prompt.
            prompt: One text or a batch; or give `prompt_embeds` and `pooled_prompt_embeds`.
            prompt_2, negative_prompt, negative_prompt_2, true_cfg_scale: As in FluxPipeline. Each
                branch has its own recorded source where the adapter's source sees the prompt.
            height, width: Of the result. From the source where None: its shape at `max_area`.
            num_inference_steps, sigmas, guidance_scale: As in FluxPipeline.
            num_images_per_prompt: Results per prompt, consecutive in the output.
            generator, latents: As in FluxPipeline, one generator or one per result.
            prompt_embeds, pooled_prompt_embeds: As in FluxPipeline.
            ip_adapter_image, ip_adapter_image_embeds: Of text to image only; an IP-Adapter and a
                source exclude each other.
            negative_ip_adapter_image, negative_ip_adapter_image_embeds: Likewise.
            negative_prompt_embeds, negative_pooled_prompt_embeds: As in FluxPipeline.
            output_type: "pil", "np", "pt" or "latent" (packed).
            return_dict: False returns a tuple.
            joint_attention_kwargs: As in FluxPipeline; never changed.
            callback_on_step_end, callback_on_step_end_tensor_inputs: As in FluxPipeline.
            max_sequence_length: Text tokens; the second tokenizer's limit, at most 512, where None.
            max_area: Pixels of the result where height and width are None; where this is None, too,
                those the adapter was trained at, or the source's own, at most a megapixel.
            _auto_resize: False leaves the source its size, but for whole tokens.
            task: How the source is placed and what its pooled sentence says; never an expert.
            route: Which experts may act: "free" (default), "stage:NAME" (the adapter as it was at
                the end of that stage) or "expert:NAME" (that expert alone, gate 1).
            images: Several references of one result, one entry each; none sees another. The first
                decides the size. Of a task that is not aligned, each lies left of the one before.
            mask_image: Of task "inpaint": white is painted grey in the source and filled.
            source_cache: Of `encode_source`, one or a list, of several tasks even. Beside `image`
                or `images`, it is used where it fits and else encoded again, with a line in the
                log; alone, it must fit.
            source_size: (height, width) at which the source is encoded, or the side of a square of
                that area. An aligned source is stretched over the result by its positions: half the
                side is a quarter of the cost, for an adapter that was trained so.
            source_scale: Of what the experts add to the source's keys and values. 1 (where None) is
                as trained, 0 is the base's own reading of the source, which is not "no source".
            source_pooled_embeds: [B, P] instead of the pooled text that the adapter asks for.
            use_kv_cache: False encodes the source again in every step, for the same bits.
            image_guidance_scale: w in v0 + w (v - v0), with v0 the velocity without a source; not 1
                costs a text-to-image pass per step and branch.
            representation_scale: w_r of ReDi's Eq. 13, for an adapter that was trained beside a
                feature stream (`coredi`), whose features are then denoised with the image: 1 is as
                trained, 0 is without features, anything else doubles the calls.

        Returns:
            CoLoGenPipelineOutput: `images` and, of task "ground", `grounding`, one
            (box, mask, confidence) per image. A tuple of what is not None if `return_dict=False`.

        Raises:
            ValueError, TypeError: For an argument that cannot work, before anything is computed:
                an unknown task or route, a source without an adapter, a cache that was made by
                another adapter, base, task, route or pooled text.
        """
        image, prompt = text_first(image, prompt)
        arguments.require_kwargs(joint_attention_kwargs)
        if max_sequence_length is None:
            max_sequence_length = sequence_length(self.tokenizer_2)
        flux = {
            "prompt": prompt,
            "prompt_2": prompt_2,
            "negative_prompt": negative_prompt,
            "negative_prompt_2": negative_prompt_2,
            "prompt_embeds": prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
            "callback_on_step_end_tensor_inputs": list(callback_on_step_end_tensor_inputs or ()),
            "max_sequence_length": max_sequence_length,
            "true_cfg_scale": true_cfg_scale,
            "num_inference_steps": num_inference_steps,
            "sigmas": sigmas,
            "guidance_scale": guidance_scale,
            "num_images_per_prompt": num_images_per_prompt,
            "generator": generator,
            "latents": latents,
            "ip_adapter_image": ip_adapter_image,
            "ip_adapter_image_embeds": ip_adapter_image_embeds,
            "negative_ip_adapter_image": negative_ip_adapter_image,
            "negative_ip_adapter_image_embeds": negative_ip_adapter_image_embeds,
            "output_type": output_type,
            "joint_attention_kwargs": joint_attention_kwargs,
            "callback_on_step_end": callback_on_step_end,
        }
        asked = Asked(
            images=all_images(image, images),
            caches=all_caches(source_cache),
            task=task,
            route=route,
            scale=source_scale,
            sizes=self._sizes(height, width, source_size, max_area, _auto_resize),
            mask_image=mask_image,
            pooled=source_pooled_embeds,
        )
        if not asked.images and not asked.caches:
            arguments.require_no_source(
                {"task": task, "route": route, "mask_image": mask_image, "source_size": source_size,
                 "source_scale": source_scale, "source_pooled_embeds": source_pooled_embeds,
                 "max_area": max_area, "use_kv_cache": None if use_kv_cache else False,
                 "image_guidance_scale":
                     None if image_guidance_scale == 1.0 else image_guidance_scale,
                 "representation_scale":
                     None if representation_scale == 1.0 else representation_scale}
            )  # fmt: skip
            (results,) = super().__call__(height=height, width=width, return_dict=False, **flux)
            return returned(results, None, return_dict)

        plan = plan_of(self, asked)
        require_possible(
            self,
            plan,
            asked,
            flux,
            keep=use_kv_cache,
            image_guidance=image_guidance_scale,
            representation=representation_scale,
        )
        source = source_of(self, plan, asked, flux, keep=use_kv_cache)
        features = self._features(route or "free", generator, float(representation_scale))
        with features, following(self.transformer, source, float(image_guidance_scale)):
            (results,) = super().__call__(
                height=plan.size[0], width=plan.size[1], return_dict=False, **flux
            )
        grounding = None
        if plan.spec.name == Ground.name and output_type != "latent":
            picture = plan.references[0].picture() if plan.references else asked.caches[0].picture
            asks = [prompt] if isinstance(prompt, str) else prompt
            asks = asks or [""] * prompt_count(prompt, prompt_embeds)
            grounding = None if picture is None else read_grounding(results, picture, asks)
        return returned(results, grounding, return_dict)

    def _features(
        self, route: str, generator: Generators, scale: float
    ) -> AbstractContextManager[Carried | None]:
        """While open, features are denoised beside the image, where the adapter has a stream."""
        coredi = self.coredi
        if coredi is not None:
            coredi = coredi.to(self._execution_device)
        return beside(
            coredi, self.transformer, route=route, generator=generator, representation=scale
        )

    def _sizes(self, *said: Any) -> Sizes:
        trained = self.prw.config.resolution if self.prw is not None else None
        return sizes_of(*said, step=2 * self.vae_scale_factor, trained=trained)
