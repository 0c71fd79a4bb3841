"""CoLoGen as a diffusers pipeline: FLUX.1 with a source image, a task and a route.

The denoising loop, callbacks, true CFG and text to image are FluxPipeline's own code. What is added
happens before each call of the transformer: the recorded source joins its attention.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
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

from prw_flux.adapter import PRWAdapter, TaskSpec
from prw_flux.attach import attach, attached
from prw_flux.encode import (
    ImageInput,
    encode_image,
    fitted_size,
    pack,
    position_ids,
    resize,
    sequence_length,
    source_offset,
    to_pixels,
    whole_size,
)
from prw_flux.locate import EMBEDDED, is_run, resolve_base, resolve_run
from prw_flux.source_cache import SourceCache, SourceMeta
from prw_flux.sources import Source, fingerprint, following


class CoLoGenPipeline(FluxPipeline):
    """FLUX.1 that sees a source image through the experts of a `PRWAdapter`.

    Without an image it is FluxPipeline, bit for bit.

    Args:
        scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer: As in
            FluxPipeline; the text encoders may be None where embeddings are given to every call.
        image_encoder, feature_extractor: As in FluxPipeline; unused with a source.
        prw: The adapter, attached to the transformer here.
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
        self.register_modules(prw=prw)
        if prw is not None:
            attach(transformer, prw)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a pipeline folder or Hub id, or the folder of a training run.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, any FLUX.1
                pipeline (then without adapter), "tiny-flux", or a run.
            base: Another place for the base of a run, when it is not where the run says.
            kwargs: As in `DiffusionPipeline.from_pretrained`. `dtype` (float32 by default) casts
                the experts too, routers stay in float32.

        Raises:
            FileNotFoundError: If a local folder is neither, or the base of a run is missing.
            ValueError: If `base` is given for something that is not a run.
        """
        folder = Path(pretrained_model_name_or_path)
        # without a dtype diffusers loads float32 and transformers what the file has
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
        if is_run(folder):
            location, revision = resolve_run(folder, base)
            adapter = PRWAdapter.from_pretrained(folder / "adapter", dtype=kwargs["dtype"])
            if revision is not None:
                kwargs.setdefault("revision", revision)
            pipe: Self = super().from_pretrained(location, prw=adapter, **kwargs)
            return pipe
        if base is not None:
            raise ValueError(f"{folder} is not a run (it has no run.json): leave base out.")
        if str(folder) == EMBEDDED:
            pretrained_model_name_or_path = resolve_base(EMBEDDED)
        elif folder.is_dir() and not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{folder} is neither a pipeline (no model_index.json) nor a run (no run.json)."
            )
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, prw: PRWAdapter | None = None) -> Self:
        """Share the components of any FLUX.1 pipeline; nothing is copied or cast."""
        wanted = set(cls._get_signature_keys(cls)[0])
        components = {k: v for k, v in pipeline.components.items() if k in wanted}
        if prw is not None:
            components["prw"] = prw
        return cls(**components)

    @torch.no_grad()
    def encode_source(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        task: str | None = None,
        prompt: str | Sequence[str] | None = None,
        route: str = "free",
        height: int | None = None,
        width: int | None = None,
        source_pooled_embeds: Tensor | None = None,
    ) -> SourceCache:
        """Run a source through the transformer once, for any number of calls with `source_cache`.

        Args:
            image: One image, or a batch as a list.
            task: A task of the adapter; it may be left out where the adapter has only one.
            prompt: Needed where the adapter's `source_pooled` is "prompt"; not read elsewhere.
            route: "free", "stage:NAME" or "expert:NAME".
            height, width: Of the images to be generated; from the image where None.
            source_pooled_embeds: [B, P] instead of the pooled text that the adapter asks for.

        Raises:
            ValueError: If the adapter's source follows the current timestep, so that a cache would
                be wrong at the next step; or for an unknown task or route.
        """
        adapter = self._attached_adapter()
        if adapter.config.source_timestep == "current":
            raise ValueError(
                'This adapter was trained with source_timestep="current": its source changes with '
                "every step and cannot be encoded once. Pass image= to each call instead."
            )
        if adapter.config.source_pooled == "prompt" and source_pooled_embeds is None:
            if prompt is None:
                raise ValueError(
                    'This adapter was trained with source_pooled="prompt": give encode_source the '
                    "prompt= that the calls will use."
                )
            source_pooled_embeds = self._pooled(prompt)
        source = self._source(image, task, route, height, width, source_pooled_embeds)
        cache = source.encode()
        self.maybe_free_model_hooks()
        return cache

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        task: str | None = None,
        route: str | None = None,
        source_cache: SourceCache | None = None,
        source_pooled_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        **flux: Any,
    ) -> Any:
        """Generate.

        Args:
            prompt: Text, one or a batch; or give `prompt_embeds` and `pooled_prompt_embeds`.
            image: The source: PIL, numpy uint8 [h, w, 3], tensor [3, h, w] in [0, 1], packed-ready
                latents [B, C, H, W], or a list with one image per prompt. None with no
                `source_cache` is plain text to image.
            task: How the source is placed and what its pooled sentence says; never an expert.
            route: Which experts may act: "free" (default), "stage:NAME" (the adapter as it was at
                the end of that stage) or "expert:NAME" (that expert alone, gate 1).
            source_cache: Of `encode_source`, instead of `image`.
            source_pooled_embeds: [B, P] instead of the pooled text that the adapter asks for.
            height, width: Of the result. From the source where None: its shape at the area the
                adapter was trained at, or its own size, at most a megapixel, if that is unknown.
            num_images_per_prompt: Results per prompt, consecutive in the output.
            max_sequence_length: Text tokens; the second tokenizer's limit, at most 512, where None.
            flux: Every other keyword of FluxPipeline: prompt_2, negative_prompt, true_cfg_scale,
                num_inference_steps, sigmas, guidance_scale, generator, latents, prompt_embeds,
                output_type, return_dict, callback_on_step_end and so on.

        Returns:
            FluxPipelineOutput, or a tuple if `return_dict=False`.

        Raises:
            ValueError: For an unknown task or route, a source without an adapter, or a cache that
                was made by another adapter, task, route or pooled text.
        """
        if prompt is not None and not isinstance(prompt, (str, list)):
            raise TypeError(
                f"prompt must be a str or a list of str, got {type(prompt).__name__}; the prompt "
                "comes first here, pass the source as image=."
            )
        if max_sequence_length is None:
            max_sequence_length = sequence_length(self.tokenizer_2)
        flux |= {
            "prompt": prompt,
            "num_images_per_prompt": num_images_per_prompt,
            "max_sequence_length": max_sequence_length,
        }
        if image is None and source_cache is None:
            if task is not None or route is not None:
                raise ValueError("task= and route= act on a source: pass image= or source_cache=.")
            return super().__call__(height=height, width=width, **flux)
        if image is not None and source_cache is not None:
            raise ValueError("Pass image= or source_cache=, not both.")
        if source_cache is not None:
            source = self._cached_source(source_cache, task, route, height, width, flux)
        else:
            assert image is not None
            source = self._source(
                image,
                task,
                route or "free",
                height,
                width,
                source_pooled_embeds,
                num_images_per_prompt,
            )
        height, width = source.size
        with following(self.transformer, source):
            return super().__call__(height=height, width=width, **flux)

    def _attached_adapter(self) -> PRWAdapter:
        adapter: PRWAdapter | None = self.prw
        if adapter is None:
            raise ValueError(
                "This pipeline has no PRW adapter, so it cannot use a source image: load a trained "
                "run, or CoLoGenPipeline.from_pipe(pipe, prw=adapter)."
            )
        if attached(self.transformer) is not adapter:
            attach(self.transformer, adapter)
        return adapter

    def _source(
        self,
        image: ImageInput | Sequence[ImageInput],
        task: str | None,
        route: str,
        height: int | None,
        width: int | None,
        pooled: Tensor | None,
        images_per_prompt: int = 1,
    ) -> Source:
        """The source of a call, which also says how large the result is."""
        adapter = self._attached_adapter()
        spec = adapter.task(task)
        call = adapter.route(route)
        latents, height, width = self._source_latents(image, spec, height, width)
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        dtype = self._source_dtype()
        ids = position_ids(
            rows,
            columns,
            offset=source_offset(spec.aligned, columns),
            device=self._execution_device,
            dtype=dtype,
        )
        if pooled is None and adapter.config.source_pooled != "prompt":
            pooled = self._pooled("" if adapter.config.source_pooled == "empty" else spec.sentence)
        meta = SourceMeta(
            adapter=adapter.state_id,
            source_timestep=adapter.config.source_timestep,
            source_pooled=adapter.config.source_pooled,
            pooled=fingerprint(pooled) if pooled is not None else "",
            task=spec.name,
            route=route,
            height=height,
            width=width,
        )
        tokens = pack(latents).to(device=self._execution_device, dtype=dtype)
        pooled = pooled.to(tokens) if pooled is not None else None
        return Source(self.transformer, adapter, tokens, ids, pooled, call, meta, images_per_prompt)

    def _source_latents(
        self,
        image: ImageInput | Sequence[ImageInput],
        spec: TaskSpec,
        height: int | None,
        width: int | None,
    ) -> tuple[Tensor, int, int]:
        """Latents [B, C, H, W] of the source, and the size of the result in pixels.

        An aligned source is resized to the result, whose places it shares; any other keeps its
        shape.
        """
        channels, factor = self.transformer.config.in_channels // 4, self.vae_scale_factor
        if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == channels:
            own = (image.shape[2] * factor, image.shape[3] * factor)
            height, width = height or own[0], width or own[1]
            if spec.aligned and (height, width) != own:
                raise ValueError(
                    f"Latents of {own[0]} x {own[1]} pixels cannot be the source of an "
                    f"aligned task at {height} x {width}: pass the image, or that size."
                )
            return image, height, width
        pixels = to_pixels(image)
        rows, columns = pixels.shape[-2], pixels.shape[-1]
        fitted = fitted_size(rows, columns, self.prw.config.resolution, 2 * factor)
        height, width = self._size(height or fitted[0], width or fitted[1])
        pixels = resize(pixels, (height, width) if spec.aligned else fitted)
        device = self._execution_device
        return encode_image(self.vae, pixels, device=device), height, width

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """The nearest size that packs into whole tokens, two latents wide."""
        step = 2 * self.vae_scale_factor
        return whole_size(height, step), whole_size(width, step)

    def _cached_source(
        self,
        cache: SourceCache,
        task: str | None,
        route: str | None,
        height: int | None,
        width: int | None,
        flux: dict[str, Any],
    ) -> Source:
        """A source that was encoded before, checked against this call."""
        adapter = self._attached_adapter()
        cache.meta.require(
            adapter=adapter.state_id,
            source_timestep=adapter.config.source_timestep,
            source_pooled=adapter.config.source_pooled,
            task=task,
            route=route,
        )
        size = self._size(height or cache.meta.height, width or cache.meta.width)
        if adapter.task(cache.meta.task).aligned:
            cache.meta.require(height=size[0], width=size[1])
        if cache.meta.source_pooled == "prompt":
            pooled = flux.get("pooled_prompt_embeds")
            pooled = self._pooled(flux["prompt"]) if pooled is None else pooled
            cache.meta.require(pooled=fingerprint(pooled))
        return Source.of_cache(self.transformer, adapter, cache, size)

    def _source_dtype(self) -> torch.dtype:
        """As FluxPipeline chooses the dtype of its latents."""
        model = self.text_encoder if self.text_encoder is not None else self.transformer
        dtype: torch.dtype = model.dtype
        return dtype

    def _pooled(self, prompt: str | Sequence[str]) -> Tensor:
        """[B, P] pooled CLIP embedding."""
        if self.text_encoder is None:
            raise ValueError(
                "Without a text encoder the source needs source_pooled_embeds=, the pooled CLIP "
                "embedding that the adapter was trained with."
            )
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        pooled: Tensor = self._get_clip_prompt_embeds(texts)
        return pooled
